"""Galleries built, embedded anew and deleted over HTTP, from folders that the server may read and from no others."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.config import InvalidSettings, Settings
from tests.service.http.serving import Serving, serving_tiny
from tests.service.http.tiny import picture

WAIT_S = 60.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below it `open` and `more`, which galleries may be built from, and `closed`."""
    root = tmp_path_factory.mktemp("sources")
    for folder in ("open", "more", "closed"):
        (root / folder / "red").mkdir(parents=True)
        (root / folder / "red" / "one.png").write_bytes(picture((200, 30, 30)))
        (root / folder / "red" / "two.png").write_bytes(picture((30, 200, 30)))
    (root / "closed" / "lines.jsonl").write_text('{"text": "secret"}')
    (root / "open-too").mkdir()
    return root


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory, folders: Path) -> Iterator[Serving]:
    """The whole service, which may read two folders."""
    allowed = f"{folders / 'open'}:{folders / 'more'}"
    with serving_tiny(tmp_path_factory.mktemp("home"), gallery_sources=allowed) as running:
        yield running


@pytest.fixture
def http(serving: Serving) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=serving.url, timeout=30) as client:
        yield client


def build(http: httpx.Client, name: str, source: object, **wanted: Any) -> httpx.Response:
    fields = {"source": str(source), "adapter": "retrieval"} | wanted
    return http.post(f"/v1/galleries/{name}/builds", json=fields)


def ended(http: httpx.Client, response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 202, response.text
    end = time.monotonic() + WAIT_S
    while True:
        operation: dict[str, Any] = http.get(f"/v1/operations/{response.json()['id']}").json()
        if operation["status"] != "running":
            return operation
        assert time.monotonic() < end, operation
        time.sleep(0.05)


def error_of(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


def test_a_gallery_is_built_searched_embedded_anew_and_deleted(http: httpx.Client, folders: Path) -> None:
    started = build(http, "built", folders / "open", pooling="mean", index="hnsw", copy_media=True)
    operation = ended(http, started)
    assert (operation["kind"], operation["subject"], operation["status"]) == ("gallery", "built", "succeeded")
    assert (operation["from_version"], operation["to_version"], operation["galleries"]) == (None, 1, ["built"])
    assert operation in http.get("/v1/operations").json()["operations"]
    details = http.get("/v1/galleries/built").json()
    assert (details["version"], details["num_items"], details["index"]) == (1, 2, "hnsw")
    found = http.post("/retrieve", json={"gallery": "built", "query": {"text": "a red circle"}}).json()
    assert {hit["id"] for hit in found["hits"]} == {"red/one.png", "red/two.png"}
    again = ended(http, http.post("/v1/galleries/built/rebuild"))
    assert (again["from_version"], again["to_version"]) == (1, 2)
    other = ended(http, http.post("/v1/galleries/built/rebuild", json={"adapter": "retrieval@1"}))
    assert other["to_version"] == 3 and http.get("/v1/galleries/built").json()["versions"] == [1, 2, 3]
    live = http.delete("/v1/galleries/built/versions/3")
    assert error_of(live) == (409, "conflict", "status")
    deleted = http.delete("/v1/galleries/built/versions/1", params={"reason": "old"})
    assert deleted.json() == {"name": "built", "versions": [1]}
    assert http.delete("/v1/galleries/built/versions/1").status_code == 404
    assert http.get("/v1/galleries/built").json()["versions"] == [2, 3]
    assert http.get("/v1/galleries/built?version=1").status_code == 404
    assert error_of(http.delete("/v1/galleries/built?expect=2")) == (409, "conflict", "expect")
    assert http.delete("/v1/galleries/built?expect=3").json() == {"name": "built", "versions": [2, 3]}
    assert error_of(http.get("/v1/galleries/built")) == (404, "gallery_not_found", "gallery")
    assert "built" not in http.get("/v1/galleries").text
    assert error_of(http.delete("/v1/galleries/built")) == (404, "gallery_not_found", "gallery")
    (line,) = http.get("/v1/audit?limit=1").json()["lines"]
    assert (line["action"], line["subject"], line["before"]) == ("delete_gallery", "built", "3")


def test_sources_may_be_named_from_an_allowed_folder(http: httpx.Client, folders: Path) -> None:
    lines = [{"file": "red/one.png", "id": "first"}, {"file": str(folders / "open" / "red" / "two.png")}]
    (folders / "more" / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for source, num_items in (
        ("red", 2),
        ("lines.jsonl", 2),
        (folders / "more" / "red", 2),
        (folders / "open" / ".", 2),
    ):
        assert ended(http, build(http, "named", source))["status"] == "succeeded"
        assert http.get("/v1/galleries/named").json()["num_items"] == num_items


@pytest.mark.parametrize(
    "source",
    [
        "{root}/closed",
        "{root}/closed/lines.jsonl",
        "{root}/nothing",
        "{root}",
        "{root}/open-too",
        "{root}/open/../closed",
        "../closed",
        "red/../../closed/lines.jsonl",
        "/",
        "/etc/passwd",
        "link",
        "link/red",
        "file.jsonl",
        "loop",
        "a\0b",
        "x" * 4000,
    ],
)
def test_nothing_is_read_outside_the_allowed_folders(http: httpx.Client, folders: Path, source: str) -> None:
    for name, target in (
        ("link", folders / "closed"),
        ("file.jsonl", folders / "closed" / "lines.jsonl"),
        ("loop", "loop"),
    ):
        link = folders / "open" / name
        if not link.is_symlink():
            link.symlink_to(target)
    try:
        refused = build(http, "escaped", source.format(root=folders))
        assert refused.status_code == 422, refused.text
        assert error_of(refused)[2] == "source"
        is_perhaps_inside = source[:4] in ("link", "file", "loop", "xxxx")  # of the other folder: nothing is there
        assert error_of(refused)[1] == ("conversion_error" if is_perhaps_inside else "unsafe_path")
        assert str(folders) not in refused.text and "secret" not in refused.text
        assert http.get("/v1/galleries/escaped").status_code == 404
    finally:
        for name in ("link", "file.jsonl", "loop"):
            (folders / "open" / name).unlink()


def test_files_that_lie_elsewhere_are_left_out(http: httpx.Client, serving: Serving, folders: Path) -> None:
    """A folder with links, and a manifest that names what it should not."""
    media = folders / "open" / "mixed"
    media.mkdir()
    (media / "good.png").write_bytes(picture())
    (media / "good-link.png").symlink_to(folders / "more" / "red" / "one.png")
    (media / "bad-link.png").symlink_to(folders / "closed" / "red" / "one.png")
    named = ("good.png", "bad-link.png", "../../closed/red/one.png", str(folders / "closed" / "red" / "two.png"))
    lines = [json.dumps({"file": file, "id": f"line-{number}"}) for number, file in enumerate(named)]
    (media / "lines.jsonl").write_text("\n".join(lines))
    for source, left_out in (("mixed", {"bad-link.png"}), ("mixed/lines.jsonl", {"line-1", "line-2", "line-3"})):
        operation = ended(http, build(http, "partly", source))
        gallery = serving.runtime.galleries.store.open("partly", operation["to_version"])
        entries = gallery.quarantined()
        assert {entry.source for entry in entries} == left_out
        assert all("lies outside" in entry.message and "closed" not in entry.message for entry in entries)
        assert set(gallery.ids).isdisjoint(left_out)


def test_a_source_that_is_none_is_refused_at_once(http: httpx.Client, folders: Path) -> None:
    assert error_of(build(http, "none", "nothing")) == (422, "conversion_error", "source")
    assert error_of(build(http, "none", "red/one.png")) == (422, "conversion_error", "source")
    assert error_of(build(http, "none", "red", adapter="vqa")) == (422, "bad_query", "adapter")
    assert error_of(build(http, "none", "red", adapter="retrieval@9")) == (404, "adapter_not_found", "adapter")
    assert error_of(build(http, "No", "red")) == (422, "invalid_reference", "gallery")
    assert error_of(build(http, "none", "red", pooling="odd")) == (422, "invalid_request", "pooling")
    assert error_of(http.post("/v1/galleries/none/rebuild")) == (404, "gallery_not_found", "gallery")


def test_without_the_setting_nothing_is_read(tmp_path: Path) -> None:
    with serving_tiny(tmp_path) as running, httpx.Client(base_url=running.url, timeout=30) as http:
        refused = build(http, "none", tmp_path)
        assert error_of(refused) == (422, "bad_query", "source")
        assert "BANK_GALLERY_SOURCES" in refused.json()["error"]["message"]


def test_the_setting_takes_absolute_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANK_GALLERY_SOURCES", "/data/a:/data/b")
    assert Settings.load().source_folders == (Path("/data/a"), Path("/data/b"))
    monkeypatch.setenv("BANK_GALLERY_SOURCES", "data")
    with pytest.raises(InvalidSettings, match="'data' is no absolute path"):
        Settings.load()


def test_a_request_that_is_sent_twice_builds_once(http: httpx.Client, folders: Path) -> None:
    headers = {"Idempotency-Key": "once"}
    body = {"source": "red", "adapter": "retrieval"}
    first = http.post("/v1/galleries/twice/builds", json=body, headers=headers)
    ended(http, first)
    second = http.post("/v1/galleries/twice/builds", json=body, headers=headers)
    assert second.json()["id"] == first.json()["id"] and second.json()["to_version"] == 1
    other = http.post("/v1/galleries/twice/builds", json=body | {"index": "hnsw"}, headers=headers)
    assert error_of(other) == (409, "conflict", "idempotency_key")
