import socket
import sys
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from service.http.limits import MAX_HEAD_BYTES
from service.http.protocol import BoundedProtocol
from service.http.server import protocol
from tests.service.http.serving import served

PIECE = b"x" * 8192
END = b"\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


async def count_body(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the number of bytes of the body."""
    body = await Request(scope, receive).body()
    await PlainTextResponse(str(len(body)))(scope, receive, send)


@pytest.fixture(scope="module", params=[BoundedProtocol, "h11"], ids=["httptools", "h11"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    with served(count_body, lifespan=False, http=request.param) as url:
        yield url


@pytest.fixture
def connection(url: str) -> Iterator[socket.socket]:
    place = urlsplit(url)
    with socket.create_connection((str(place.hostname), int(place.port or 0)), timeout=10) as connection:
        yield connection


def answer(connection: socket.socket) -> bytes:
    """What comes back up to the end of its first line."""
    return connection.recv(65536).partition(b"\r\n")[0]


def feed(connection: socket.socket, piece: bytes, *, until: int) -> None:
    """Send a piece again and again, so many bytes in all, or until nobody listens any more."""
    try:
        for _ in range(0, until, len(piece)):
            connection.sendall(piece)
    except OSError:
        return


def test_a_head_within_the_limit_is_read(connection: socket.socket) -> None:
    connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX-Long: ")
    feed(connection, PIECE, until=MAX_HEAD_BYTES - len(PIECE))
    connection.sendall(END)
    assert answer(connection) == b"HTTP/1.1 200 OK"


@pytest.mark.parametrize(
    "start, piece",
    [
        (b"GET /", PIECE),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX-Long: ", PIECE),
        (b"GET / HTTP/1.1\r\nHost: a\r\n", b"X-Many: y\r\n" * 100),
        (b"", b"\r\n" * 1000),
        (CHUNKED + b"0\r\n", b"X-Trailer: y\r\n" * 100),
        (CHUNKED + b"0\r\nX-Trailer: ", PIECE),
        (CHUNKED + b"5;", PIECE),
    ],
    ids=["target", "header", "headers", "nothing", "trailers", "trailer", "chunk extension"],
)
def test_what_never_becomes_complete_is_refused(connection: socket.socket, start: bytes, piece: bytes) -> None:
    connection.sendall(start)
    feed(connection, piece, until=64 * MAX_HEAD_BYTES)
    try:
        assert answer(connection) in (b"HTTP/1.1 400 Bad Request", b"")
    except ConnectionResetError:  # as it was still sending
        return


def test_bodies_are_not_counted(connection: socket.socket) -> None:
    num_bytes = 4 * MAX_HEAD_BYTES
    connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % num_bytes)
    feed(connection, PIECE, until=num_bytes)
    assert answer(connection) == b"HTTP/1.1 200 OK"


def test_a_body_of_small_chunks_is_read(connection: socket.socket) -> None:
    connection.sendall(CHUNKED)
    feed(connection, b"1\r\nx\r\n" * 1000, until=4 * MAX_HEAD_BYTES)
    connection.sendall(b"0\r\n\r\n")
    assert answer(connection) == b"HTTP/1.1 200 OK"


def test_requests_on_one_connection_are_not_added_up(url: str) -> None:
    with httpx.Client() as http:
        for _ in range(20):
            assert http.get(url, headers={"X-Long": PIECE}).status_code == 200


def test_without_httptools_the_parser_is_uvicorns_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert protocol() is BoundedProtocol
    monkeypatch.setitem(sys.modules, "service.http.protocol", None)
    assert protocol() == "h11"
