"""Each test builds the small application it needs and serves it over a real socket."""

import asyncio
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from service.admission import Admission
from service.config import Settings
from service.errors import Overloaded
from service.http.exchange import Exchange
from service.http.limits import BodyLimit, LoopbackOnly
from service.http.middleware import Attended, Exchanges
from service.metrics import Metrics
from service.types import AdapterInfo
from tests.service.http.serving import served

MAX_BYTES = 1000


@contextmanager
def around(
    app: ASGIApp, metrics: Metrics | None = None, settings: Settings | None = None, max_bytes: int = 10 * MAX_BYTES
) -> Iterator[httpx.Client]:
    """A client of `app` inside all the middleware, in the service's order."""
    counted = metrics or Metrics()
    door = Admission(max_queue_seconds=1.0, max_bytes=max_bytes, metrics=counted)
    limited = BodyLimit(Attended(app), max_bytes=MAX_BYTES, max_package_bytes=8 * MAX_BYTES, admission=lambda: door)
    inner = LoopbackOnly(limited)
    stack = Exchanges(inner, settings=settings or Settings(), metrics=lambda: counted)
    with served(stack, lifespan=False) as url, httpx.Client(base_url=url, timeout=20) as client:
        yield client


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    body = await Request(scope, receive).body()
    await PlainTextResponse(str(len(body)))(scope, receive, send)


async def hang(scope: Scope, receive: Receive, send: Send) -> None:
    await asyncio.Event().wait()


def code_of(response: httpx.Response) -> str:
    body = response.json()["error"]
    assert body["request_id"] == response.headers["x-request-id"]
    return str(body["code"])


def test_a_sane_request_id_is_kept_and_others_are_replaced() -> None:
    with around(echo) as client:
        assert client.get("/", headers={"X-Request-Id": "job-7:a.b"}).headers["x-request-id"] == "job-7:a.b"
        for given in ("", "x" * 65, "two words", 'quote"'):
            made = client.get("/", headers={"X-Request-Id": given}).headers["x-request-id"]
            assert len(made) == 32 and made != given


def test_a_reply_tells_stages_and_adapter() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["state"]["exchange"]
        exchange.context.spent("vision", 0.0123)
        exchange.adapter = AdapterInfo("vqa", 3, "sha256:x")
        await PlainTextResponse("done")(scope, receive, send)

    with around(app) as client:
        headers = client.get("/").headers
    assert headers["x-stage-vision-ms"] == "12.30"
    assert headers["server-timing"].startswith("vision;dur=12.30, total;dur=")
    assert headers["x-adapter"] == "vqa@3"


def test_requests_are_counted_by_route_adapter_and_status() -> None:
    metrics = Metrics()
    with around(echo, metrics) as client:
        client.get("/whatever/a/client/writes")
    counted = {tuple(sample.labels.values()) for metric in metrics.requests.collect() for sample in metric.samples}
    assert counted == {("unmatched", "", "main", "200")}


def test_domain_errors_are_answered_by_the_table() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise Overloaded("full", retry_after_s=1.2)

    with around(app) as client:
        response = client.post("/", content=b"x" * 100)
    assert (response.status_code, code_of(response)) == (429, "overloaded")
    assert response.headers["retry-after"] == "2"


def test_a_bug_is_answered_without_its_reason_and_logged_with_the_request(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("secret")

    with around(app) as client, caplog.at_level(logging.ERROR, "service.http.middleware"):
        response = client.get("/", headers={"X-Request-Id": "bug-1"})
    assert (response.status_code, code_of(response)) == (500, "internal")
    assert "secret" not in response.text
    assert "bug-1" in caplog.text and "secret" in caplog.text


def test_half_a_reply_ends_with_the_connection() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError("broken on the way")

    with around(app) as client, pytest.raises(httpx.RemoteProtocolError):
        client.get("/")


# --- limits -----------------------------------------------------------------------------------------------------


def test_a_body_of_exactly_the_limit_passes() -> None:
    with around(echo) as client:
        assert client.post("/", content=b"x" * MAX_BYTES).text == str(MAX_BYTES)


def test_a_declared_length_above_the_limit_is_refused_unread() -> None:
    with around(hang) as client, _connection(client) as raw:
        raw.sendall(b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000000000\r\n\r\n")
        reply = _read_all(raw)
    assert reply.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in reply.lower()
    assert b'"code":"too_large"' in reply


def test_a_chunked_body_is_counted_as_it_streams() -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * 300

    with around(echo) as client:
        response = client.post("/", content=endless())
    assert (response.status_code, code_of(response)) == (413, "too_large")


def test_a_client_that_sends_a_large_body_first_still_gets_its_answer() -> None:
    with around(echo) as client:
        assert client.post("/", content=b"x" * 20_000_000).status_code == 413


def test_a_connection_stays_open_after_an_error_without_a_body() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(status_code=404)(scope, receive, send)

    with around(app) as client:
        assert "connection" not in client.get("/").headers


def test_foreign_hosts_and_proxies_are_refused_before_the_application() -> None:
    with around(hang) as client:
        assert code_of(client.get("/", headers={"Host": "example.org"})) == "foreign_host"
        assert code_of(client.get("/", headers={"X-Forwarded-For": "1.2.3.4"})) == "forwarded_request"


# --- deadlines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["soon", "-5", "0", "1.5", "", "9" * 13, "١٢"])
def test_a_malformed_timeout_is_refused(given: str) -> None:
    with around(hang) as client:
        response = client.get("/", headers=[(b"X-Request-Timeout-Ms", given.encode())])
    assert (response.status_code, code_of(response)) == (422, "invalid_request")
    assert response.json()["error"]["param"] == "X-Request-Timeout-Ms"


@pytest.mark.parametrize(
    "headers, settings",
    [
        ({"X-Request-Timeout-Ms": "80"}, Settings()),
        ({}, Settings(default_timeout_ms=80)),
        ({"X-Request-Timeout-Ms": "99999"}, Settings(max_timeout_ms=80)),
    ],
    ids=["asked for", "default", "capped"],
)
def test_a_slow_answer_is_ended_at_the_deadline(headers: dict[str, str], settings: Settings) -> None:
    with around(hang, settings=settings) as client:
        start = time.monotonic()
        response = client.get("/", headers=headers)
    assert (response.status_code, code_of(response)) == (504, "deadline_exceeded")
    assert time.monotonic() - start < 5


def test_the_deadline_covers_the_upload() -> None:
    with around(echo) as client, _connection(client) as raw:
        raw.sendall(b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Request-Timeout-Ms: 80\r\nContent-Length: 50\r\n\r\nslow")
        reply = _read_all(raw)
    assert reply.startswith(b"HTTP/1.1 504 ")
    assert b"connection: close" in reply.lower()


def test_a_reply_under_way_is_not_cut_at_the_deadline() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def parts() -> AsyncIterator[bytes]:
            for _ in range(4):
                yield b"part"
                await asyncio.sleep(0.05)

        await StreamingResponse(parts())(scope, receive, send)

    with around(app) as client:
        assert client.get("/", headers={"X-Request-Timeout-Ms": "60"}).text == "part" * 4


def test_a_handler_that_something_else_cancelled_has_failed() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise asyncio.CancelledError

    with around(app) as client:
        assert code_of(client.get("/")) == "internal"


# --- clients that leave -----------------------------------------------------------------------------------------


def test_work_ends_when_its_client_leaves() -> None:
    begun, cancelled = threading.Event(), threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Request(scope, receive).body()
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    metrics = Metrics()
    with around(app, metrics) as client:
        with _connection(client) as raw:
            raw.sendall(b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 2\r\n\r\nhi")
            assert begun.wait(5)
        assert cancelled.wait(5)
        _wait_for(lambda: metrics.registry.get_sample_value("bank_requests_total", _labels("499")) == 1)


def test_a_client_that_leaves_while_sending_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    with around(echo, metrics) as client, caplog.at_level(logging.ERROR):
        with _connection(client) as raw:
            raw.sendall(b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 50\r\n\r\nhi")
        _wait_for(lambda: metrics.registry.get_sample_value("bank_requests_total", _labels("499")) == 1)
    assert not caplog.records


def test_work_after_the_reply_is_not_cut() -> None:
    finished = threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("done")(scope, receive, send)
        await asyncio.sleep(0.05)
        finished.set()

    with around(app) as client:
        assert client.post("/", content=b"x").text == "done"
        assert finished.wait(5)


def _labels(status: str) -> dict[str, str]:
    return {"route": "unmatched", "adapter": "", "arm": "main", "status": status}


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def _connection(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=10)


def _read_all(raw: socket.socket) -> bytes:
    """Until the server closes."""
    data = b""
    while part := raw.recv(65536):
        data += part
    return data


def test_bodies_that_find_no_room_beside_others_are_told_to_come_back() -> None:
    entered, leave = threading.Event(), threading.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).body()
        entered.set()
        await asyncio.to_thread(leave.wait, 20)
        await PlainTextResponse(str(len(body)))(scope, receive, send)

    with around(slow, max_bytes=MAX_BYTES) as client:
        first: list[int] = []
        sender = threading.Thread(target=lambda: first.append(client.post("/", content=b"x" * 700).status_code))
        sender.start()
        assert entered.wait(20)
        refused = client.post("/", content=b"x" * 400)
        chunked = client.post("/", content=iter([b"x" * 200, b"x" * 200]))
        leave.set()
        sender.join()
        assert first == [200]
        for answer in (refused, chunked):
            assert (answer.status_code, code_of(answer)) == (429, "overloaded")
            assert int(answer.headers["retry-after"]) >= 1
        answers = (client.post("/", content=b"x" * 400).text for _ in range(200))  # room is made just after a reply
        assert "400" in answers


def test_a_package_has_a_limit_of_its_own_and_takes_no_room_in_memory() -> None:
    with around(echo, max_bytes=MAX_BYTES) as client:
        assert client.put("/", content=b"x" * (8 * MAX_BYTES)).text == str(8 * MAX_BYTES)
        with _connection(client) as raw:
            raw.sendall(f"PUT / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {8 * MAX_BYTES + 1}\r\n\r\n".encode())
            reply = _read_all(raw)
    assert reply.startswith(b"HTTP/1.1 413 ") and b'"code":"too_large"' in reply
