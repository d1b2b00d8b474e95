"""Packages on a remote file system: the manifest decides what is there, and nothing wrong ever comes out."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from adapters.artifacts import RemoteArtifactStore
from adapters.artifacts.cache import PackageCache
from adapters.artifacts.manifest import sha256
from adapters.artifacts.objects import Objects
from adapters.errors import ArtifactNotFound, ArtifactUnavailable, Conflict, DigestMismatch
from adapters.package import read_files
from tests.adapters.artifacts.stores import FILES, NO_WAITING, Place, hidden, make_folder


class Recorded:
    """A driver's object that notes what is written and removed, and calls back before each."""

    def __init__(self, fs: Any) -> None:
        self.fs = fs
        self.steps: list[tuple[str, str]] = []
        self.before: Callable[[str, str], None] = lambda step, path: None

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.fs, name)
        if name not in ("pipe_file", "put_file", "rm_file", "rm", "cat_file"):
            return method

        def called(*arguments: Any, **options: Any) -> Any:
            path = arguments[1] if name == "put_file" else arguments[0]
            self.before(name, path)
            self.steps.append((name, path.rpartition("/")[2]))
            return method(*arguments, **options)

        return called


def recorded(place: Place) -> tuple[RemoteArtifactStore, Recorded]:
    fs = Recorded(place.fs)
    objects = Objects(place.location, place.root, lambda: fs, retries=NO_WAITING)
    return RemoteArtifactStore(objects, PackageCache(place.cache, place.max_cache_bytes)), fs


def is_manifest(path: str) -> bool:
    return re.search(r"/[0-9a-f]{64}\.json$", path) is not None


def nothing_in(cache: Path) -> bool:
    return list((cache / "sha256").iterdir()) == [] and hidden(cache) == []


# --- the manifest ----------------------------------------------------------------------------------------------------


def test_the_manifest_is_written_last_and_removed_first(place_in_memory: Place, tmp_path: Path) -> None:
    store, fs = recorded(place_in_memory)
    digest = store.put(make_folder(tmp_path / "p"))
    manifest = f"{digest.removeprefix('sha256:')}.json"
    assert [name for step, name in fs.steps if step == "pipe_file"] == [*FILES, manifest]
    fs.steps.clear()
    store.delete(digest)
    assert fs.steps[0] == ("rm_file", manifest)


def test_the_manifest_tells_what_is_there(remote: Place, tmp_path: Path) -> None:
    package = make_folder(tmp_path / "p")
    digest = remote.open().put(package)
    manifest = json.loads(remote.fs.cat_file(remote.manifest(digest)))
    assert manifest["digest"] == digest
    assert manifest["files"] == {
        name: {"size_bytes": len(data), "sha256": sha256(data)} for name, data in read_files(package).items()
    }


def test_without_its_manifest_an_artifact_is_not_there(remote: Place, tmp_path: Path) -> None:
    store = remote.open()
    digest = store.put(make_folder(tmp_path / "p"))
    remote.fs.rm_file(remote.manifest(digest))
    assert not store.has(digest) and store.digests() == ()
    for call in (store.read, store.verify):
        with pytest.raises(ArtifactNotFound, match="no artifact"):
            call(digest)
    (leftover,) = store.leftovers(0)
    assert leftover.name == f"sha256/{digest.removeprefix('sha256:')}"
    assert store.put(tmp_path / "p") == digest
    assert store.leftovers(0) == ()
    store.verify(digest)


@pytest.mark.parametrize("files", [FILES[:1], FILES[:3], FILES])
def test_an_upload_that_was_interrupted_is_completed(remote: Place, tmp_path: Path, files: tuple[str, ...]) -> None:
    store = remote.open()
    digest = store.put(make_folder(tmp_path / "p"))
    remote.fs.rm_file(remote.manifest(digest))
    for name in FILES:
        if name not in files:
            remote.fs.rm_file(remote.path(digest, name))
    remote.fs.pipe_file(remote.path(digest, files[0]), b"half")
    assert store.put(tmp_path / "p") == digest
    assert store.read(digest) == read_files(tmp_path / "p")


# --- what was tampered with ------------------------------------------------------------------------------------------


def tampered(text: bytes, name: str, change: Callable[[dict[str, Any]], None]) -> bytes:
    manifest = json.loads(text)
    change(manifest["files"][name])
    return json.dumps(manifest).encode()


@pytest.mark.parametrize("also_the_manifest", [False, True])
def test_a_file_that_was_tampered_with_never_appears(remote: Place, tmp_path: Path, also_the_manifest: bool) -> None:
    """Not even with a manifest to match: the digest is that of the bytes."""
    store = remote.open()
    digest = store.put(make_folder(tmp_path / "p"))
    name = "adapter_model.safetensors"
    data = b"evil" + remote.fs.cat_file(remote.path(digest, name))[4:]
    remote.fs.pipe_file(remote.path(digest, name), data)
    if also_the_manifest:
        text = remote.fs.cat_file(remote.manifest(digest))
        text = tampered(text, name, lambda record: record.update(sha256=sha256(data)))
        remote.fs.pipe_file(remote.manifest(digest), text)
    for call in (store.read, store.verify, store.read):
        with pytest.raises(DigestMismatch, match="is damaged"):
            call(digest)
    assert nothing_in(remote.cache)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(size_bytes=2**60),
        lambda record: record.update(size_bytes=0, sha256=sha256(b"")),
        lambda record: record.update(sha256=sha256(b"other")),
        lambda record: record.update(sha256="none"),
    ],
)
def test_a_manifest_that_was_tampered_with_is_damage(remote: Place, tmp_path: Path, change: Any) -> None:
    store = remote.open()
    digest = store.put(make_folder(tmp_path / "p"))
    text = remote.fs.cat_file(remote.manifest(digest))
    remote.fs.pipe_file(remote.manifest(digest), tampered(text, "README.md", change))
    for call in (store.read, store.verify):
        with pytest.raises(DigestMismatch, match="is damaged"):
            call(digest)
    assert nothing_in(remote.cache)
    assert store.put(tmp_path / "p") == digest
    assert store.read(digest) == read_files(tmp_path / "p")


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "README.md/../../escaped"])
def test_a_manifest_cannot_name_files_elsewhere(remote: Place, tmp_path: Path, name: str) -> None:
    store = remote.open()
    digest = store.put(make_folder(tmp_path / "p"))
    manifest = json.loads(remote.fs.cat_file(remote.manifest(digest)))
    manifest["files"][name] = manifest["files"]["README.md"]
    remote.fs.pipe_file(remote.manifest(digest), json.dumps(manifest).encode())
    with pytest.raises(DigestMismatch, match="no plain path"):
        store.read(digest)
    assert not list(tmp_path.rglob("escaped"))


def test_the_files_of_another_package_are_not_this_one(remote: Place, tmp_path: Path) -> None:
    store = remote.open()
    digest, other = (store.put(make_folder(tmp_path / name, name)) for name in ("p", "q"))
    remote.fs.pipe_file(remote.path(digest, "README.md"), b"q")
    text = remote.fs.cat_file(remote.manifest(other)).replace(other.encode(), digest.encode())
    remote.fs.pipe_file(remote.manifest(digest), text)
    with pytest.raises(DigestMismatch, match=f"its files have the digest {other}"):
        store.read(digest)


# --- the cache beside it ---------------------------------------------------------------------------------------------


def test_what_was_read_is_read_from_the_cache_afterwards(place_in_memory: Place, tmp_path: Path) -> None:
    store, fs = recorded(place_in_memory)
    digest = store.put(make_folder(tmp_path / "p"))
    files = store.read(digest)
    fs.steps.clear()
    assert store.read(digest) == files
    assert fs.steps == []


def test_an_outage_does_not_take_away_what_is_cached(place_in_memory: Place, tmp_path: Path) -> None:
    store, fs = recorded(place_in_memory)
    cached, other = (store.put(make_folder(tmp_path / name, name)) for name in ("p", "q"))
    files = store.read(cached)

    def fail(step: str, path: str) -> None:
        raise ConnectionError("the network is down")

    fs.before = fail
    assert store.read(cached) == files
    with pytest.raises(ArtifactUnavailable, match="the network is down"):
        store.read(other)
    with pytest.raises(ArtifactUnavailable, match="the network is down"):
        store.verify(cached)


def test_a_damaged_copy_in_the_cache_is_fetched_anew(remote: Place, tmp_path: Path) -> None:
    store = remote.open()
    digest = store.put(make_folder(tmp_path / "p"))
    files = store.read(digest)
    copy = remote.cache / "sha256" / digest.removeprefix("sha256:") / "README.md"
    copy.write_text("y")
    assert store.read(digest) == files
    assert copy.read_text() == "x"
    copy.unlink()
    assert store.read(digest) == files
    assert copy.read_text() == "x"


def test_a_cache_that_cannot_be_written_costs_a_fetch_and_no_answer(
    remote: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = remote.open()
    digest = store.put(make_folder(tmp_path / "p"))
    (remote.cache / ".lock").mkdir()
    for _ in range(2):
        assert store.read(digest) == read_files(tmp_path / "p")
    assert [record.message for record in caplog.records if "cannot be kept in the cache" in record.message]


# --- others at the same time -----------------------------------------------------------------------------------------


def test_what_is_deleted_while_it_is_read_is_not_damaged_but_gone(place_in_memory: Place, tmp_path: Path) -> None:
    store, fs = recorded(place_in_memory)
    digest = store.put(make_folder(tmp_path / "p"))

    def delete(step: str, path: str) -> None:
        if path.endswith("README.md") and step == "cat_file":
            place_in_memory.open().delete(digest)

    fs.before = delete
    with pytest.raises(ArtifactNotFound):
        store.read(digest)
    assert nothing_in(place_in_memory.cache)


def test_files_that_a_deleter_takes_during_a_put_are_put_again(place_in_memory: Place, tmp_path: Path) -> None:
    store, fs = recorded(place_in_memory)
    package = make_folder(tmp_path / "p")
    digest = store.put(package)
    store.delete(digest)
    num_deleted = 0

    def delete(step: str, path: str) -> None:
        nonlocal num_deleted
        if step == "pipe_file" and is_manifest(path) and num_deleted < 1:
            num_deleted += 1
            place_in_memory.fs.rm_file(place_in_memory.path(digest, "README.md"))

    fs.before = delete
    assert store.put(package) == digest
    assert num_deleted == 1
    store.verify(digest)


def test_a_put_that_is_undone_whenever_it_is_done_says_so(place_in_memory: Place, tmp_path: Path) -> None:
    store, fs = recorded(place_in_memory)
    package = make_folder(tmp_path / "p")

    def delete(step: str, path: str) -> None:
        if step == "pipe_file" and is_manifest(path):
            place_in_memory.fs.rm_file(f"{path.removesuffix('.json')}/README.md")

    fs.before = delete
    with pytest.raises(Conflict, match="deleted as fast as it is written"):
        store.put(package)


def test_a_sweeper_spares_what_was_completed_after_it_looked(place_in_memory: Place, tmp_path: Path) -> None:
    store = place_in_memory.open()
    digest = store.put(make_folder(tmp_path / "p"))
    manifest = place_in_memory.fs.cat_file(place_in_memory.manifest(digest))
    place_in_memory.fs.rm_file(place_in_memory.manifest(digest))
    seen = store.leftovers(0)

    class Late(RemoteArtifactStore):
        def leftovers(self, older_than_s: float) -> Any:
            place_in_memory.fs.pipe_file(place_in_memory.manifest(digest), manifest)
            return seen

    late = Late(
        Objects("memory://x", place_in_memory.root, lambda: fsspec.filesystem("memory")),
        PackageCache(place_in_memory.cache, 1),
    )
    assert late.sweep_leftovers(0) == ()
    store.verify(digest)
