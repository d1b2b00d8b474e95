import re

import httpx
import pytest
from fastapi import FastAPI

from service.http.app import create_app
from service.http.routes.ops import CONSOLE_FOLDER
from tests.service.http.serving import Serving, served

PAGES = ["/", "/docs"]


def test_the_process_is_live(http: httpx.Client) -> None:
    assert http.get("/health/live").json() == {"status": "live"}


def test_a_ready_server_tells_what_it_holds(http: httpx.Client) -> None:
    body = http.get("/health/ready").json()
    assert body["ready"] is True and body["reasons"] == []
    assert {"vision", "text_encoder"} <= body["backbone"]["parts"].keys()


def test_a_server_that_is_not_ready_says_why(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    status = {"ready": False, "reasons": ["draining", "the device thread is dead"]}
    monkeypatch.setattr(serving.runtime, "status", lambda: status)
    response = httpx.get(f"{serving.url}/health/ready")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
    assert "the device thread is dead" in response.json()["error"]["message"]
    assert int(response.headers["retry-after"]) >= 1


def test_metrics_are_in_prometheus_format(http: httpx.Client) -> None:
    http.get("/v1/adapters/vqa")
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert 'bank_requests_total{adapter="",arm="main",route="/v1/adapters/{name}",status="200"}' in response.text


@pytest.mark.parametrize("path", PAGES)
def test_pages_load_nothing_from_elsewhere(http: httpx.Client, path: str) -> None:
    page = http.get(path)
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert links
    for link in links:
        assert link.startswith("/") and not link.startswith("//")
        assert http.get(link).status_code == 200


def test_the_console_s_own_files_name_no_other_host() -> None:
    for file in (path for path in CONSOLE_FOLDER.iterdir() if path.suffix in (".html", ".js", ".css")):
        assert not re.search(r"(?:https?:)?//[a-z0-9-]+\.[a-z]", file.read_text()), file.name


def test_the_console_keeps_a_key_in_its_tab_alone_and_sends_it_as_a_header() -> None:
    script = (CONSOLE_FOLDER / "console.js").read_text()
    assert re.findall(r"\bfetch\(", script) == ["fetch("]  # one place, which adds the header
    assert "Authorization: `Bearer ${key}`" in script
    assert "sessionStorage" in script and not re.search(r"localStorage|indexedDB|document\.cookie", script)
    # What the server holds is shown through `load`, which sends the key too; only a file of the user's own is shown otherwise.
    assert re.findall(r"\bsrc(?: =|:) ([^ ;]+)", script) == [
        "path",
        "URL.createObjectURL(blob)",
        "URL.createObjectURL(file)",
    ]
    page = (CONSOLE_FOLDER / "index.html").read_text()
    assert re.search(r'<input id="key" type="password" autocomplete="off"', page)


@pytest.mark.parametrize("path", ["/nothing", "/v1", "/console/nothing.js", "/console/../app.py", "/redoc"])
def test_unknown_paths_have_the_common_error(http: httpx.Client, path: str) -> None:
    response = http.get(path)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


def test_a_wrong_method_names_the_right_one(http: httpx.Client) -> None:
    response = http.get("/v1/vqa")
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_a_given_runtime_is_used_and_left_running(serving: Serving) -> None:
    other: FastAPI = create_app(serving.settings, serving.runtime)
    with served(other) as url:
        assert httpx.get(f"{url}/health/ready").status_code == 200
    assert httpx.get(f"{serving.url}/health/ready").status_code == 200
