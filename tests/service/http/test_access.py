"""Keys over real sockets: who is let in by which route, with which adapter, and what a key that is limited can find out.

Three teams share a server. `vqa` and `retrieval` are everybody's; `team-a-copy` and `team-b-copy` have the same weights, those
of `retrieval`; `team-b-own` and its galleries are team B's alone.
"""

import asyncio
import base64
import json
import logging
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.datastructures import Headers
from starlette.requests import Request

from adapters.families.uniadapter import init_tensors
from adapters.package import read_package, write_package
from service import auth
from service.auth import LOCAL, NOBODY, KeyEntry, Scope, digest_of, new_key
from service.backbone.folder import load_backbone
from service.client import Client, ServiceError
from service.config import Settings
from service.errors import Unauthenticated
from service.gallery import Source
from service.home import push_package
from service.http.access import ACCESS, LIST, OPEN, shown_key
from service.http.app import create_app
from service.http.exchange import Exchange
from service.http.routes.ops import SHARED_DETAILS
from service.pipelines.galleries import BuildOptions
from service.runtime import Runtime
from service.types import RequestContext
from tests.service.http.serving import Serving, served
from tests.service.http.tiny import build_home, picture

PICTURE = {"base64": base64.b64encode(picture()).decode()}
QUESTION = {"adapter": "vqa", "question": "is it red", "image": PICTURE}
SEARCH: dict[str, Any] = {"gallery": "pictures", "query": {"text": "a red circle"}}
HIDDEN = re.compile(r"team-b|b-pictures|b-older")  # what no other team may read anywhere


@dataclass(frozen=True)
class Keyed(Serving):
    """A service with keys: each by its id."""

    file: Path
    keys: dict[str, str]

    def client(self, key_id: str | None) -> httpx.Client:
        """A client with one of the keys, or with none. There is no TLS here, and reading certificates is most of a call."""
        headers = {} if key_id is None else {"Authorization": f"Bearer {self.keys[key_id]}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, verify=False)

    def call(self, key_id: str | None, method: str, path: str, **request: Any) -> httpx.Response:
        """One request."""
        with self.client(key_id) as client:
            return client.request(method, path, **request)

    def failures(self, reason: str) -> float:
        """How often somebody was refused for a reason."""
        found = self.runtime.metrics.registry.get_sample_value("bank_auth_failures_total", {"reason": reason})
        return found or 0.0


HOLDERS: dict[str, dict[str, Any]] = {
    "infer": {"scopes": ["infer"]},
    "deploy": {"scopes": ["deploy"]},
    "metrics": {"scopes": ["metrics"]},
    "admin": {"scopes": ["admin"]},
    "expired": {"scopes": ["admin"], "expires": (datetime.now(UTC) - timedelta(seconds=1)).isoformat()},
    "a": {"scopes": ["infer", "deploy"], "adapters": ["team-a-*", "vqa"]},
    "b": {"scopes": ["infer", "deploy"], "adapters": ["team-b-*"]},
    "a-admin": {"scopes": ["admin"], "adapters": ["team-a-*"]},
    "none": {"scopes": ["infer", "deploy"], "adapters": ["nothing-*"]},
}


def write_keys(file: Path, keys: dict[str, str], **changes: dict[str, Any]) -> None:
    entries = [
        {"id": key_id, "sha256": digest_of(key)} | HOLDERS[key_id] | changes.get(key_id, {})
        for key_id, key in keys.items()
    ]
    file.write_text(json.dumps(entries))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The tiny home, shared by teams."""
    home = tmp_path_factory.mktemp("home")
    settings = build_home(home)
    packages = home / "packages"
    package = read_package(packages / "retrieval")
    tensors = init_tensors(
        package.config, load_backbone(settings.backbone_folder).dims(), torch.Generator().manual_seed(9)
    )
    write_package(packages / "own", package.config, tensors, "# own\n", None)
    for name, folder in (("team-a-copy", "retrieval"), ("team-b-copy", "retrieval"), ("team-b-own", "own")):
        push_package(settings, packages / folder, name)
    asyncio.run(build_galleries(settings, home / "media" / "0.png"))
    return settings


async def build_galleries(settings: Settings, file: Path) -> None:
    runtime = Runtime(settings)
    await runtime.start()
    context = RequestContext(deadline=time.monotonic() + 60)
    sources = [Source("secret.png", "image", file, metadata={"of": "team-b"})]
    try:
        for name, adapter in (
            ("b-pictures", "team-b-copy"),  # embedded with the weights of team-a-copy, too
            ("b-own", "team-b-own"),
            ("a-pictures", "team-a-copy"),
            ("mixed", "team-b-copy"),
            ("mixed", "team-a-copy"),
            ("plain", "__base__"),
        ):
            await runtime.galleries.build(name, adapter, sources, BuildOptions("image"), context)
    finally:
        await runtime.close()


@pytest.fixture(scope="module")
def keyed(home: Settings) -> Iterator[Keyed]:
    """The service with keys in a file."""
    keys = {key_id: new_key() for key_id in HOLDERS}
    file = home.home / "keys.json"
    write_keys(file, keys)
    settings = Settings.model_validate(home.model_dump() | {"api_keys_file": file})
    app = create_app(settings)
    with served(app) as url:
        yield Keyed(settings, app, url, file, keys)


def error_of(response: httpx.Response) -> tuple[int, str]:
    body = response.json()["error"]
    assert body["request_id"] == response.headers["x-request-id"]
    return response.status_code, body["code"]


# --- every route ---------------------------------------------------------------------------------------------

# A request that each route would answer, about what belongs to team B where it is about something. Nothing is changed: there is
# no version 99.
REQUESTS: dict[str, dict[str, Any]] = {
    "POST /vqa": {"json": QUESTION | {"adapter": "team-b-own"}},
    "POST /v1/vqa": {"json": QUESTION | {"adapter": "team-b-own"}},
    "POST /caption": {"json": {"adapter": "team-b-own", "image": QUESTION["image"]}},
    "POST /v1/caption": {"json": {"adapter": "team-b-own", "image": QUESTION["image"]}},
    "POST /retrieve": {"json": SEARCH | {"gallery": "b-own"}},
    "POST /v1/retrieve": {"json": SEARCH | {"gallery": "b-own"}},
    "GET /v1/adapters": {},
    "GET /v1/adapters/{name}": {"name": "team-b-own"},
    "GET /v1/galleries": {},
    "GET /v1/galleries/{name}": {"name": "b-own"},
    "POST /v1/galleries/{name}/builds": {"name": "b-own", "json": {"source": "x", "adapter": "team-b-own"}},
    "POST /v1/galleries/{name}/rebuild": {"name": "b-own", "json": {"adapter": "team-b-own@99"}},
    "DELETE /v1/galleries/{name}": {"name": "b-own", "params": {"expect": 99}},
    "DELETE /v1/galleries/{name}/versions/{version}": {"name": "b-own"},
    "GET /v1/galleries/{name}/items": {"name": "b-own"},
    "GET /v1/galleries/{name}/items/{item_id}": {"name": "b-own"},
    "GET /v1/galleries/{name}/items/{item_id}/thumbnail": {"name": "b-own"},
    "GET /v1/galleries/{name}/items/{item_id}/media": {"name": "b-own"},
    "PUT /v1/adapters/{name}": {"name": "team-b-own", "content": b"no tar"},
    "POST /v1/adapters/{name}/aliases/{alias}": {"name": "team-b-own", "json": {"version": 99}},
    "POST /v1/adapters/{name}/aliases/{alias}/rollback": {"name": "team-b-own"},
    "DELETE /v1/adapters/{name}/aliases/{alias}/canary": {"name": "team-b-own"},
    "POST /v1/adapters/{name}/versions/{version}/retire": {"name": "team-b-own"},
    "POST /v1/adapters/{name}/versions/{version}/reinstate": {"name": "team-b-own"},
    "DELETE /v1/adapters/{name}/versions/{version}": {"name": "team-b-own"},
    "POST /v1/adapters/{name}/versions/{version}/unload": {"name": "team-b-own"},
    "GET /v1/operations": {},
    "GET /v1/operations/{operation}": {},
    "DELETE /v1/operations/{operation}": {},
    "GET /v1/audit": {},
    "GET /v1/replicas": {},
    "GET /health/live": {},
    "GET /health/ready": {},
    "GET /metrics": {},
}
IN_PATHS = {"item_id": "secret.png", "alias": "prod", "version": 99, "operation": "validation-team-b-own@1"}
LISTINGS = ("GET /v1/adapters", "GET /v1/galleries", "GET /v1/operations")  # which leave out what may not be seen


def send(keyed: Keyed, key_id: str | None, route: str) -> httpx.Response:
    """The route's request, with a key."""
    request = dict(REQUESTS[route])
    method, _, path = route.partition(" ")
    path = path.format(name=request.pop("name", ""), **IN_PATHS)
    return keyed.call(key_id, method, path, **request)


def test_every_operation_of_the_document_is_tried_here_and_says_who_may(keyed: Keyed) -> None:
    document = httpx.get(f"{keyed.url}/openapi.json").json()
    operations = {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert operations.keys() == REQUESTS.keys()
    assert document["components"]["securitySchemes"].keys() == {"bearer", "header"}
    for route, operation in operations.items():
        access = ACCESS[route]
        assert operation["security"] == ([] if access == OPEN else [{"bearer": []}, {"header": []}]), route
        assert ("401" in operation["responses"]) == ("403" in operation["responses"]) == (access != OPEN), route
        assert all(f"`{scope}`" in operation["description"] for scope in access.scopes), route


def test_every_route_of_the_application_has_declared_its_scope_and_no_other_is_declared(keyed: Keyed) -> None:
    routes = list(iter_route_contexts(keyed.app.routes))
    served = {f"{method} {route.path_format}" for route in routes for method in (route.methods or {"GET"})}
    assert {route.replace("HEAD ", "GET ") for route in served} == ACCESS.keys()


@pytest.mark.parametrize("route", REQUESTS)
def test_without_a_valid_key_only_open_routes_answer(keyed: Keyed, route: str) -> None:
    is_open = ACCESS[route] == OPEN
    for key_id in (None, "expired"):
        response = send(keyed, key_id, route)
        if is_open:
            assert response.status_code == 200
        else:
            assert error_of(response) == (401, "unauthenticated")
            assert response.headers["www-authenticate"] == "Bearer"
    method, _, path = route.partition(" ")
    for header in ({"Authorization": f"Bearer {new_key()}"}, {"X-API-Key": "x"}, {"Authorization": "Basic eDp5"}):
        response = keyed.call(None, method, path.format(name="b-own", **IN_PATHS), headers=header)
        assert response.status_code == (200 if is_open else 401)


@pytest.mark.parametrize("route", REQUESTS)
@pytest.mark.parametrize("scope", auth.SCOPES)
def test_a_route_answers_to_its_scopes_and_to_admin(keyed: Keyed, route: str, scope: Scope) -> None:
    response = send(keyed, scope, route)
    if scope == "admin" or scope in ACCESS[route].scopes or ACCESS[route] == OPEN:
        assert response.status_code not in (401, 403) and response.status_code < 500, response.text
    else:
        assert error_of(response) == (403, "forbidden")
        assert all(wanted in response.json()["error"]["message"] for wanted in ACCESS[route].scopes)


@pytest.mark.parametrize("route", REQUESTS)
@pytest.mark.parametrize("key_id", ["none", "a", "a-admin"])
def test_no_route_gives_what_belongs_to_others(keyed: Keyed, route: str, key_id: str) -> None:
    response = send(keyed, key_id, route)
    if ACCESS[route] == OPEN:
        return
    if route in LISTINGS:
        assert response.status_code == 200 and not HIDDEN.search(response.text)
    else:
        assert error_of(response) == (403, "forbidden")


@pytest.mark.parametrize("path", ["/nothing", "/v1", "/v1/vqa/x", "/redoc", "/console", "/v1/galleries/x/y/z"])
def test_strangers_do_not_learn_which_routes_there_are(keyed: Keyed, path: str) -> None:
    assert error_of(keyed.call(None, "GET", path)) == (401, "unauthenticated")
    assert keyed.call("infer", "GET", path).status_code in (307, 404)


def test_a_wrong_method_is_no_way_in(keyed: Keyed) -> None:
    for method in ("PUT", "DELETE", "OPTIONS", "PATCH", "HEAD", "TRACE", "MADE-UP"):
        for path in ("/v1/adapters", "/metrics", "/health/live"):
            assert keyed.call(None, method, path).status_code in (400, 401)
    assert error_of(keyed.call("infer", "DELETE", "/v1/adapters")) == (405, "method_not_allowed")


@pytest.mark.parametrize(
    "path", ["//metrics", "/./metrics", "/%6detrics", "/metrics/", "/health/live/../../metrics", "/console/../metrics"]
)
def test_other_spellings_of_a_path_are_no_way_in(keyed: Keyed, path: str) -> None:
    with connection(keyed) as raw:
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        reply = read_all(raw)
    assert reply.split()[1] in (b"401", b"404") and b"bank_requests" not in reply


@pytest.mark.parametrize("key_id", [None, "admin"])
@pytest.mark.parametrize("has_keys", [True, False])
def test_a_route_that_nobody_declared_is_refused_to_everybody(
    keyed: Keyed, home: Settings, key_id: str | None, has_keys: bool, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(keyed.settings if has_keys else home, keyed.runtime)
    reached: list[int] = []

    @app.post("/v1/new", include_in_schema=False)
    def new() -> None:
        reached.append(1)

    app.mount("/files", FastAPI())
    with served(app) as url, caplog.at_level(logging.ERROR):
        other = Keyed(keyed.settings, app, url, keyed.file, keyed.keys)
        for method, path in (("POST", "/v1/new"), ("GET", "/files/openapi.json"), ("PUT", "/console/console.js")):
            expected = (401, "unauthenticated") if has_keys and key_id is None else (403, "forbidden")
            assert error_of(other.call(key_id, method, path)) == expected
    assert reached == []
    assert ("declares no scope" in caplog.text) == (not has_keys or key_id is not None)


def test_pages_and_the_document_are_open_and_hold_no_names(keyed: Keyed) -> None:
    for path in ("/", "/docs", "/openapi.json", "/console/console.js", "/console/console.css"):
        response = keyed.call(None, "GET", path)
        assert response.status_code == 200 and not re.search(r"team-|b-own", response.text)
    assert keyed.call(None, "HEAD", "/openapi.json").status_code == 200


# --- how a key is shown --------------------------------------------------------------------------------------


def test_a_key_may_come_in_either_header(keyed: Keyed) -> None:
    key = keyed.keys["infer"]
    for headers in (
        {"Authorization": f"Bearer {key}"},
        {"Authorization": f"bearer   {key}"},
        {"X-API-Key": key},
        {"Authorization": "Basic eDp5", "X-API-Key": key},  # the first is a proxy's affair
        {"Authorization": f"Bearer {key}", "X-API-Key": key},
    ):
        assert httpx.get(f"{keyed.url}/v1/adapters", headers=headers).status_code == 200, headers


@pytest.mark.parametrize(
    "headers",
    [
        [("authorization", "Bearer x"), ("x-api-key", "y")],
        [("authorization", "Bearer x"), ("authorization", "Bearer y")],
        [("x-api-key", "x"), ("x-api-key", "y")],
    ],
)
def test_of_two_keys_none_is_taken(headers: list[tuple[str, str]]) -> None:
    with pytest.raises(Unauthenticated, match="two"):
        shown_key(Headers(raw=[(name.encode(), value.encode()) for name, value in headers]))


def test_keys_are_not_taken_from_elsewhere(keyed: Keyed) -> None:
    key = keyed.keys["admin"]
    for path, headers in (
        (f"/v1/adapters?api_key={key}", {}),
        ("/v1/adapters", {"Cookie": f"api_key={key}"}),
        ("/v1/adapters", {"Authorization": key}),
        ("/v1/adapters", {"Authorization": f"Basic {base64.b64encode(f'x:{key}'.encode()).decode()}"}),
    ):
        assert error_of(httpx.get(keyed.url + path, headers=headers)) == (401, "unauthenticated")


def test_foreign_hosts_and_proxies_are_served_where_keys_tell_who_asks(keyed: Keyed) -> None:
    headers = {"Host": "bank.example.org", "X-Forwarded-For": "1.2.3.4", "Origin": "https://example.org"}
    assert keyed.call("infer", "GET", "/v1/adapters", headers=headers).status_code == 200
    assert error_of(keyed.call(None, "GET", "/v1/adapters", headers=headers)) == (401, "unauthenticated")


def test_without_keys_this_machine_may_do_everything_and_nobody_else_anything(keyed: Keyed, home: Settings) -> None:
    app = create_app(home, keyed.runtime)
    with served(app) as url:
        for header in ({}, {"Authorization": "Bearer made-up"}):
            assert httpx.get(f"{url}/metrics", headers=header).status_code == 200
        assert error_of(httpx.get(f"{url}/metrics", headers={"X-Forwarded-For": "::1"})) == (400, "forwarded_request")
        assert error_of(httpx.get(f"{url}/metrics", headers={"Host": "example.org"})) == (421, "foreign_host")
        assert "resident" in httpx.get(f"{url}/health/ready").json()


# --- before the body -----------------------------------------------------------------------------------------


def connection(keyed: Keyed) -> socket.socket:
    url = httpx.URL(keyed.url)
    return socket.create_connection((url.host, url.port or 80), timeout=10)


def read_all(raw: socket.socket) -> bytes:
    data = b""
    while part := raw.recv(65536):
        data += part
    return data


@pytest.mark.parametrize("length", ["Content-Length: 10000000000", "Content-Length: 100", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("key_id, status", [(None, b"401"), ("expired", b"401"), ("metrics", b"403")])
def test_a_body_is_not_read_before_its_sender_is_known(
    keyed: Keyed, length: str, key_id: str | None, status: bytes
) -> None:
    """The reply comes although no byte of the body does, nobody asks for it, and the connection ends."""
    key = "" if key_id is None else f"X-API-Key: {keyed.keys[key_id]}\r\n"
    with connection(keyed) as raw:
        raw.sendall(
            f"POST /v1/vqa HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{key}{length}\r\n"
            "Expect: 100-continue\r\n\r\n".encode()
        )
        reply = read_all(raw)
    assert reply.split()[1] == status
    assert b"100 Continue" not in reply
    assert b"connection: close" in reply.lower()


def test_an_upload_for_a_forbidden_name_is_not_read(keyed: Keyed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any path below an adapter's: its name is looked at before the handler is."""
    monkeypatch.setitem(ACCESS, "PUT /v1/adapters/{name}/upload", LIST)  # type: ignore[arg-type]
    app = create_app(keyed.settings, keyed.runtime)

    @app.put("/v1/adapters/{name}/upload")
    async def upload(name: str, request: Request) -> str:
        return f"{name}: {len(await request.body())}"

    with served(app) as url:
        other = Keyed(keyed.settings, app, url, keyed.file, keyed.keys)
        for name, status in (("team-b-own", b"403"), ("team%2Db-own", b"403"), ("made-up", b"403")):
            with connection(other) as raw:
                head = f"PUT /v1/adapters/{name}/upload HTTP/1.1\r\nHost: x\r\nX-API-Key: {keyed.keys['a']}\r\n"
                raw.sendall(f"{head}Content-Length: 10000000000\r\n\r\n".encode())
                assert read_all(raw).split()[1] == status
        allowed = other.call("a", "PUT", "/v1/adapters/team-a-new/upload", content=b"x" * 10)
        assert allowed.json() == "team-a-new: 10"


def test_an_endless_body_of_a_stranger_ends_at_once(keyed: Keyed) -> None:
    with connection(keyed) as raw:
        raw.sendall(b"POST /v1/vqa HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        sent = 0
        with pytest.raises(OSError):  # noqa: PT012
            while sent < 100_000_000:
                raw.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
                sent += 0x10000
    assert sent < 50_000_000


def test_a_stranger_s_bytes_take_no_room(keyed: Keyed) -> None:
    with connection(keyed) as raw:
        raw.sendall(b"POST /v1/vqa HTTP/1.1\r\nHost: x\r\nContent-Length: 60000000\r\n\r\n" + b"x" * 1000)
        assert read_all(raw).split()[1] == b"401"
    assert keyed.runtime.admission._bytes == 0


# --- adapters by pattern -------------------------------------------------------------------------------------


def ask(keyed: Keyed, key_id: str, **changes: Any) -> httpx.Response:
    return keyed.call(key_id, "POST", "/v1/vqa", json=QUESTION | changes)


def search(keyed: Keyed, key_id: str, **changes: Any) -> httpx.Response:
    return keyed.call(key_id, "POST", "/v1/retrieve", json=SEARCH | changes)


def digests_of(keyed: Keyed, name: str) -> tuple[str, str]:
    """(weights digest, package digest)."""
    record = keyed.runtime.loader.snapshot.adapters[name][-1]
    return record.weights_digest, record.package_digest


@pytest.mark.parametrize("reference", ["vqa", "vqa@1", "vqa@prod"])
def test_what_a_pattern_covers_may_be_used_by_each_of_its_references(keyed: Keyed, reference: str) -> None:
    assert ask(keyed, "a", adapter=reference).status_code == 200
    assert error_of(ask(keyed, "b", adapter=reference)) == (403, "forbidden")


@pytest.mark.parametrize(
    "reference", ["team-b-own", "team-b-own@1", "team-b-own@prod", "team-b-own@7", "team-b-nobody"]
)
def test_what_no_pattern_covers_is_forbidden_whether_it_exists_or_not(keyed: Keyed, reference: str) -> None:
    """So a key cannot be used to find out by guessing what others have."""
    response = ask(keyed, "a", adapter=reference)
    assert error_of(response) == (403, "forbidden")
    assert re.findall(r"team-b-[a-z]+", response.text) == [reference.partition("@")[0]]  # what was asked, no more


@pytest.mark.parametrize("which", [0, 1], ids=["weights", "package"])
def test_a_digest_is_as_good_as_the_names_it_has(keyed: Keyed, which: int) -> None:
    own, vqa = digests_of(keyed, "team-b-own")[which], digests_of(keyed, "vqa")[which]
    assert ask(keyed, "a", adapter=vqa).status_code == 200
    response = ask(keyed, "a", adapter=own)
    assert error_of(response) == (403, "forbidden") and not HIDDEN.search(response.text)
    assert error_of(ask(keyed, "a", adapter="sha256:" + "0" * 64)) == (404, "adapter_not_found")


@pytest.mark.parametrize("which", [0, 1], ids=["weights", "package"])
def test_a_digest_of_several_names_is_answered_under_one_that_is_allowed(keyed: Keyed, which: int) -> None:
    shared = digests_of(keyed, "team-b-copy")[which]
    assert shared == digests_of(keyed, "team-a-copy")[which] == digests_of(keyed, "retrieval")[which]
    for key_id, gallery, name in (("a", "a-pictures", "team-a-copy"), ("b", "b-pictures", "team-b-copy")):
        response = search(keyed, key_id, gallery=gallery, adapter=shared)
        assert response.json()["adapter"]["name"] == name
        assert response.headers["x-adapter"] == f"{name}@1"
    assert error_of(search(keyed, "none", gallery="a-pictures", adapter=shared)) == (403, "forbidden")


def test_the_backbone_alone_is_a_name_like_others(keyed: Keyed) -> None:
    assert ask(keyed, "infer", adapter="__base__").status_code == 200
    assert error_of(ask(keyed, "a", adapter="__base__")) == (403, "forbidden")
    assert error_of(search(keyed, "a", gallery="plain")) == (403, "forbidden")
    assert search(keyed, "infer", gallery="plain").status_code == 200


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapter": "team-a-copy"},  # the same weights, so the vectors could be compared
        {"adapter": "team-a-copy@1"},
        {"adapter": "team-b-copy"},
        {"query": {"image": PICTURE}},
        {"rerank": "match"},
    ],
)
def test_a_gallery_belongs_to_the_name_that_embedded_it(keyed: Keyed, changes: dict[str, Any]) -> None:
    assert error_of(search(keyed, "a", gallery="b-pictures", **changes)) == (403, "forbidden")
    own = {"adapter": "team-b-copy"} if changes.get("adapter") else {}
    assert search(keyed, "b", gallery="b-pictures", **changes | own).status_code == 200


def test_an_allowed_gallery_is_no_way_to_a_forbidden_adapter(keyed: Keyed) -> None:
    assert search(keyed, "a", gallery="a-pictures").json()["adapter"]["name"] == "team-a-copy"
    assert error_of(search(keyed, "a", gallery="a-pictures", adapter="team-b-copy")) == (403, "forbidden")
    assert error_of(search(keyed, "a", gallery="a-pictures", adapter="retrieval")) == (403, "forbidden")


@pytest.mark.parametrize("gallery", ["b-pictures", "b-own", "plain"])
def test_items_of_a_forbidden_gallery_are_not_looked_at(keyed: Keyed, gallery: str) -> None:
    item = {"gallery": gallery, "item": "secret.png"}
    assert error_of(ask(keyed, "a", image=item)) == (403, "forbidden")
    assert error_of(search(keyed, "a", gallery="a-pictures", query={"image": item})) == (403, "forbidden")
    assert error_of(ask(keyed, "a", image=item | {"item": "none"})) == (403, "forbidden")
    assert ask(keyed, "a", image={"gallery": "a-pictures", "item": "secret.png"}).status_code == 200


@pytest.mark.parametrize("version", ["", "?version=1", "?version=9"])
@pytest.mark.parametrize("what", ["", "/items", "/items/secret.png", "/items/secret.png/thumbnail", "/items/x/media"])
def test_nothing_of_a_forbidden_gallery_is_given_out(keyed: Keyed, what: str, version: str) -> None:
    response = keyed.call("a", "GET", f"/v1/galleries/b-pictures{what}{version}")
    expected = (404, "gallery_not_found") if version == "?version=9" else (403, "forbidden")
    assert error_of(response) == expected
    assert "team-b" not in response.text and "known" not in response.text.replace("known: a-pictures", "")


def test_links_of_hits_are_for_who_could_find_them(keyed: Keyed) -> None:
    hit = search(keyed, "b", gallery="b-pictures").json()["hits"][0]
    for link in (hit["thumbnail"], hit["media"]):
        response = keyed.call("b", "GET", link)
        assert response.status_code == 200 and response.headers["vary"] == "Authorization, X-API-Key"
        assert "private" in response.headers["cache-control"]
        assert error_of(keyed.call("a", "GET", link)) == (403, "forbidden")
        assert error_of(keyed.call(None, "GET", link)) == (401, "unauthenticated")


def test_versions_of_one_gallery_belong_to_who_embedded_each(keyed: Keyed) -> None:
    """`mixed` was embedded by team B first and by team A since."""
    assert keyed.call("a", "GET", "/v1/galleries/mixed").json()["versions"] == [2]
    assert keyed.call("infer", "GET", "/v1/galleries/mixed").json()["versions"] == [1, 2]
    path = "/v1/galleries/mixed/items/secret.png/media"
    assert [keyed.call("a", "GET", f"{path}?version={version}").status_code for version in (1, 2)] == [403, 200]
    assert [keyed.call("b", "GET", f"{path}?version={version}").status_code for version in (1, 2)] == [200, 403]
    assert error_of(keyed.call("b", "GET", path)) == (403, "forbidden")
    assert error_of(keyed.call("a", "GET", "/v1/galleries/mixed/items?page=v1.0")) == (403, "forbidden")
    assert error_of(search(keyed, "b", gallery="mixed")) == (403, "forbidden")


def test_listings_hold_what_may_be_used(keyed: Keyed) -> None:
    def listed(key_id: str, what: str) -> set[str]:
        return {entry["name"] for entry in keyed.call(key_id, "GET", f"/v1/{what}").json()[what]}

    assert listed("infer", "adapters") == {"vqa", "retrieval", "team-a-copy", "team-b-copy", "team-b-own"}
    assert listed("a", "adapters") == {"vqa", "team-a-copy"}
    assert listed("b", "adapters") == {"team-b-copy", "team-b-own"}
    assert listed("none", "adapters") == set()
    assert listed("a", "galleries") == {"a-pictures", "mixed"}
    assert listed("b", "galleries") == {"b-pictures", "b-own"}
    assert {"plain", "pictures", "b-own"} < listed("infer", "galleries")


@pytest.mark.parametrize(
    "method, path, request_",
    [
        ("POST", "/v1/vqa", {"json": QUESTION | {"adapter": "vqa@7"}}),
        ("POST", "/v1/vqa", {"json": QUESTION | {"adapter": "vqa@canary"}}),
        ("POST", "/v1/vqa", {"json": QUESTION | {"adapter": "team-a-cop"}}),
        ("POST", "/v1/vqa", {"json": QUESTION | {"image": {"gallery": "pictur", "item": "x"}}}),
        ("POST", "/v1/retrieve", {"json": SEARCH | {"gallery": "b-picture"}}),
        ("GET", "/v1/adapters/team-a-nobody", {}),
        ("POST", "/v1/adapters/team-a-nobody/aliases/prod", {"json": {"version": 1}}),
        ("POST", "/v1/adapters/team-a-nobody/aliases/prod/rollback", {}),
        ("DELETE", "/v1/adapters/team-a-nobody/aliases/prod/canary", {}),
        ("POST", "/v1/adapters/team-a-nobody/versions/1/retire", {}),
        ("POST", "/v1/adapters/team-a-nobody/versions/1/reinstate", {}),
        ("POST", "/v1/adapters/team-a-nobody/versions/1/unload", {}),
        ("DELETE", "/v1/adapters/team-a-nobody/versions/1", {}),
        ("POST", "/v1/adapters/team-a-copy/versions/9/retire", {}),
        ("POST", "/v1/galleries/new/builds", {"json": {"source": "x", "adapter": "team-a-nobody"}}),
        ("POST", "/v1/galleries/b-picture/rebuild", {}),
        ("DELETE", "/v1/galleries/b-picture", {}),
        ("DELETE", "/v1/galleries/a-pictures/versions/9", {}),
        ("GET", "/v1/galleries/b-picture", {}),
        ("GET", "/v1/galleries/b-picture?version=1", {}),
        ("GET", "/v1/galleries/b-picture/items/x", {}),
    ],
)
def test_hints_of_what_there_is_name_nothing_hidden(
    keyed: Keyed, method: str, path: str, request_: dict[str, Any]
) -> None:
    response = keyed.call("a", method, path, **request_)
    assert response.status_code == 404
    hint = re.sub(r"no (adapter|gallery) '[^']*'", "", response.json()["error"]["message"])
    assert not re.search(r"team-b|b-pictures|b-own|plain|retrieval|(?<!a-)pictures", hint)
    assert re.search(r"nearest|known", hint)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_operations_are_for_who_may_use_their_adapter(keyed: Keyed, method: str) -> None:
    for operation, expected in (
        ("validation-team-b-own@1", (403, "forbidden")),
        ("validation-team-b-own@9", (404, "not_found")),
        ("validation-team-b-ow@1", (404, "not_found")),
        ("nothing", (404, "not_found")),
    ):
        response = keyed.call("a", method, f"/v1/operations/{operation}")
        assert error_of(response) == expected
        assert not re.search(r"team-b|nearest|known", response.text.replace(operation, ""))
    assert keyed.call("a", "GET", "/v1/operations/validation-team-a-copy@1").json()["subject"] == "team-a-copy@1"


def test_nobody_may_put_a_gallery_in_the_place_of_others(keyed: Keyed) -> None:
    """Neither over HTTP nor where galleries are built."""
    principal = auth.Principal("a", frozenset({"deploy"}), ("team-a-*",))
    context = RequestContext(deadline=time.monotonic() + 60, principal=principal)
    sources = [Source("x", "image", keyed.settings.home / "media" / "1.png")]
    build = keyed.runtime.galleries.build
    for name, adapter in (("b-own", "team-a-copy"), ("mixed", "team-a-copy"), ("new", "team-b-copy")):
        with pytest.raises(auth.Forbidden):
            asyncio.run(build(name, adapter, sources, BuildOptions("image"), context))
        wanted = {"source": "x", "adapter": adapter}
        assert error_of(keyed.call("a", "POST", f"/v1/galleries/{name}/builds", json=wanted)) == (403, "forbidden")
        if name != "new":
            rebuilt = keyed.call("a", "POST", f"/v1/galleries/{name}/rebuild", json={"adapter": adapter})
            assert error_of(rebuilt) == (403, "forbidden")
            assert error_of(keyed.call("a", "DELETE", f"/v1/galleries/{name}")) == (403, "forbidden")
    assert error_of(keyed.call("a", "DELETE", "/v1/galleries/mixed/versions/1")) == (403, "forbidden")
    assert error_of(keyed.call("a", "DELETE", "/v1/galleries/mixed/versions/2")) == (409, "conflict")  # it is live


def test_operations_of_galleries_are_for_who_may_use_the_adapter(keyed: Keyed) -> None:
    operation = keyed.call("b", "POST", "/v1/galleries/b-pictures/rebuild").json()
    assert (operation["kind"], operation["adapter"], operation["subject"]) == ("gallery", "team-b-copy", "b-pictures")
    path = f"/v1/operations/{operation['id']}"
    assert error_of(keyed.call("a", "GET", path)) == (403, "forbidden")
    assert error_of(keyed.call("a", "DELETE", path)) == (403, "forbidden")
    assert operation["id"] not in keyed.call("a", "GET", "/v1/operations").text
    end = time.monotonic() + 30
    while keyed.call("b", "GET", path).json()["status"] == "running":
        assert time.monotonic() < end
        time.sleep(0.05)
    assert keyed.call("b", "GET", path).json()["status"] == "succeeded"


# --- what is told to whom ------------------------------------------------------------------------------------


def test_details_of_health_are_for_those_with_a_key(keyed: Keyed) -> None:
    for key_id in (None, "expired"):
        assert keyed.call(key_id, "GET", "/health/ready").json() == {"ready": True, "reasons": []}
    details = keyed.call("infer", "GET", "/health/ready").json()
    assert details["api_keys_error"] is None and "backbone" in details
    search(keyed, "b", gallery="b-own")
    own, _ = digests_of(keyed, "team-b-own")
    held = {key_id: keyed.call(key_id, "GET", "/health/ready").json()["resident"] for key_id in ("infer", "b", "a")}
    assert own in held["infer"]["device"] and own in held["b"]["device"]
    assert all(own not in digests for digests in held["a"].values())
    limited = keyed.call("a", "GET", "/health/ready").json()
    assert limited.keys() == {*SHARED_DETAILS, "resident"} < details.keys()


def test_refusals_are_counted_by_reason(keyed: Keyed) -> None:
    before = {reason: keyed.failures(reason) for reason in ("missing", "unknown", "expired", "scope", "pattern")}
    keyed.call(None, "GET", "/v1/adapters")
    keyed.call(None, "GET", "/v1/adapters", headers={"X-API-Key": new_key()})
    keyed.call("expired", "GET", "/v1/adapters")
    keyed.call("metrics", "GET", "/v1/adapters")
    ask(keyed, "a", adapter="team-b-own")
    assert {reason: keyed.failures(reason) - count for reason, count in before.items()} == dict.fromkeys(before, 1.0)
    text = keyed.call("metrics", "GET", "/metrics").text
    assert set(re.findall(r'bank_auth_failures_total{reason="(\w+)"}', text)) == before.keys()
    assert 'bank_requests_total{adapter="",arm="main",route="/v1/adapters",status="401"}' in text


def middleware_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "service.http.middleware"]


def test_the_log_names_the_key_s_id_and_never_the_key(keyed: Keyed, caplog: pytest.LogCaptureFixture) -> None:
    unknown = new_key()
    requests: list[Callable[[], object]] = [
        lambda: keyed.call("infer", "GET", "/v1/adapters"),
        lambda: keyed.call("expired", "GET", "/v1/adapters"),
        lambda: keyed.call(None, "GET", "/v1/adapters", headers={"X-API-Key": unknown}),
        lambda: ask(keyed, "a", adapter="team-b-own"),
    ]
    lines: list[str] = []
    with caplog.at_level(logging.DEBUG):
        for number, request in enumerate(requests, start=1):
            request()
            end = time.monotonic() + 10.0  # a reply may be here before its line is written
            while len(lines := middleware_lines(caplog)) < number and time.monotonic() < end:
                time.sleep(0.01)
    assert [line.rpartition("key=")[2] for line in lines] == ["infer", "(nobody)", "(nobody)", "a"]
    for key in (*keyed.keys.values(), unknown):
        assert key not in caplog.text and digest_of(key) not in caplog.text


def test_keys_are_served_fairly_against_each_other(keyed: Keyed, monkeypatch: pytest.MonkeyPatch) -> None:
    clients: list[str] = []
    engine = keyed.runtime.engine
    submit = engine.submit

    def noted(job: Any) -> Any:
        clients.append(job.client)
        return submit(job)

    monkeypatch.setattr(engine, "submit", noted)
    search(keyed, "a", gallery="a-pictures")
    headers = {"X-API-Key": keyed.keys["b"], "X-Forwarded-For": "1.2.3.4"}
    httpx.post(f"{keyed.url}/v1/retrieve", json=SEARCH | {"gallery": "b-own"}, headers=headers)
    assert clients == ["a", "b"]


# --- while it runs -------------------------------------------------------------------------------------------


@pytest.fixture
def changing(keyed: Keyed, tmp_path: Path) -> Iterator[Keyed]:
    """A server over the same parts whose keys a test may change."""
    keys = {key_id: new_key() for key_id in ("infer", "admin")}
    file = tmp_path / "keys.json"
    write_keys(file, keys)
    settings = keyed.settings.model_copy(update={"api_keys_file": file})
    app = create_app(settings, keyed.runtime)
    with served(app) as url:
        yield Keyed(settings, app, url, file, keys)


def eventually(condition: Any) -> None:
    end = time.monotonic() + 2.0
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_a_revoked_key_is_refused_within_two_seconds_on_kept_connections_too(changing: Keyed) -> None:
    with changing.client("infer") as client:
        assert client.get("/v1/adapters").status_code == 200
        auth.remove_entry(changing.file, "infer")
        eventually(lambda: client.get("/v1/adapters").status_code == 401)
        assert changing.call("admin", "GET", "/v1/adapters").status_code == 200


def test_a_key_may_lose_scopes_and_adapters(changing: Keyed) -> None:
    with changing.client("admin") as client:
        assert client.get("/metrics").status_code == 200
        write_keys(changing.file, changing.keys, admin={"scopes": ["infer"], "adapters": ["vqa"]})
        eventually(lambda: client.get("/metrics").status_code == 403)
        assert [entry["name"] for entry in client.get("/v1/adapters").json()["adapters"]] == ["vqa"]


def test_a_broken_file_opens_no_door_and_locks_nobody_out(changing: Keyed) -> None:
    def stale() -> float | None:
        changing.call("infer", "GET", "/v1/adapters")
        return changing.runtime.metrics.registry.get_sample_value("bank_api_keys_stale")

    assert stale() == 0
    whole = changing.file.read_text()
    for broken in (whole[:-1], "[]x", ""):
        changing.file.write_text(broken)
        eventually(lambda: stale() == 1)
        assert changing.call("infer", "GET", "/v1/adapters").status_code == 200
        assert changing.call(None, "GET", "/v1/adapters").status_code == 401
        assert changing.call("infer", "GET", "/metrics").status_code == 403
    assert "JSON" in changing.call("infer", "GET", "/health/ready").json()["api_keys_error"]
    changing.file.unlink()
    assert changing.call(None, "GET", "/v1/adapters").status_code == 401
    changing.file.write_text(whole)
    eventually(lambda: stale() == 0)


def test_an_empty_list_lets_nobody_in(changing: Keyed) -> None:
    changing.file.write_text("[]")
    eventually(lambda: changing.call("admin", "GET", "/v1/adapters").status_code == 401)
    assert changing.call(None, "GET", "/health/live").status_code == 200


def test_keys_may_come_from_a_variable(keyed: Keyed) -> None:
    key = new_key()
    entry = KeyEntry(id="only", sha256=digest_of(key), scopes=("infer",))
    settings = keyed.settings.model_copy(update={"api_keys_file": None, "api_keys": json.dumps([entry.document()])})
    with served(create_app(settings, keyed.runtime)) as url:
        assert httpx.get(f"{url}/v1/adapters").status_code == 401
        assert httpx.get(f"{url}/v1/adapters", headers={"X-API-Key": key}).status_code == 200


# --- the Python client ---------------------------------------------------------------------------------------


def test_the_client_sends_its_key(keyed: Keyed, monkeypatch: pytest.MonkeyPatch) -> None:
    with Client(keyed.url, api_key=keyed.keys["a"]) as bank:
        assert {adapter.name for adapter in bank.adapters()} == {"vqa", "team-a-copy"}
        hit = bank.retrieve("a-pictures", text="a red circle").hits[0]
        assert bank.download(hit.thumbnail or "").startswith(b"\xff\xd8\xff")
        with pytest.raises(ServiceError) as caught:
            bank.vqa("team-b-own", "is it red", image=picture())
        assert (caught.value.status, caught.value.code) == (403, "forbidden")
        with pytest.raises(ValueError, match="no path"):
            bank.download("http://127.0.0.1:9/elsewhere")
    monkeypatch.setenv("BANK_API_KEY", keyed.keys["b"] + "\n")
    with Client(keyed.url) as bank:
        assert {adapter.name for adapter in bank.adapters()} == {"team-b-copy", "team-b-own"}
    monkeypatch.delenv("BANK_API_KEY")
    with Client(keyed.url) as bank, pytest.raises(ServiceError) as caught:
        bank.adapters()
    assert (caught.value.status, caught.value.code) == (401, "unauthenticated")
    assert bank._http.headers.get("authorization") is None


# --- elsewhere -----------------------------------------------------------------------------------------------


def test_who_asks_is_nobody_until_the_door_has_looked() -> None:
    """Elsewhere it is the machine itself: the command line has no keys."""
    scope = {"type": "http", "headers": [], "client": ("127.0.0.1", 1)}
    assert Exchange.begin(scope, Settings()).context.principal is NOBODY
    assert RequestContext(deadline=0.0).principal is LOCAL
