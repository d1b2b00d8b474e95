"""The border to fsspec: which URLs open, what is tried again, and which errors come out."""

import errno
import logging
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from adapters.artifacts import LocalArtifactStore, RemoteArtifactStore, open_store, open_trees
from adapters.artifacts.objects import CHUNK_BYTES, LocalObjects, Objects, Retries, open_objects
from adapters.errors import ArtifactUnavailable, InvalidReference
from tests.adapters.artifacts.stores import NO_WAITING


class Flaky(MemoryFileSystem):  # type: ignore[misc]
    """A memory whose next calls of a kind fail as they are told to, and which counts them."""

    protocol = "flaky"
    failures: dict[str, list[BaseException]] = {}  # noqa: RUF012 - shared, as the memory is
    num_calls: Counter[str] = Counter()  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("flaky://")))

    def _called(self, name: str) -> None:
        self.num_calls[name] += 1
        if self.failures.get(name):
            raise self.failures[name].pop(0)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        self._called("cat_file")
        return bytes(super().cat_file(path, start=start, end=end))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self._called("pipe_file")
        super().pipe_file(path, value)

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:  # type: ignore[override]
        self._called("put_file")
        super().put_file(lpath, rpath)

    def find(self, path: str, **options: Any) -> Any:
        self._called("find")
        return super().find(path, **options)

    def info(self, path: str, **options: Any) -> Any:
        self._called("info")
        return super().info(path)

    def rm_file(self, path: str) -> None:
        self._called("rm_file")
        super().rm_file(path)


@pytest.fixture
def flaky() -> Iterator[type[Flaky]]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.failures, Flaky.num_calls = {}, Counter()
    yield Flaky
    Flaky.failures = {}
    fs = Flaky()
    if fs.exists("/flaky"):
        fs.rm("/flaky", recursive=True)


def flaky_objects() -> Objects:
    return open_objects("flaky://flaky/x", retries=NO_WAITING)


# --- URLs ------------------------------------------------------------------------------------------------------------


def test_a_folder_is_a_local_store_and_a_url_a_remote_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"cache": tmp_path / "cache", "max_cache_bytes": 1}
    assert isinstance(open_store(tmp_path / "store", **options), LocalArtifactStore)
    assert isinstance(open_store(str(tmp_path / "store"), **options), LocalArtifactStore)
    for url in (f"file://{tmp_path}/x", "memory://x", f"FILE://{tmp_path}/y z"):
        assert isinstance(open_store(url, **options), RemoteArtifactStore)
    assert isinstance(open_objects(f"file://{tmp_path}/x"), LocalObjects)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nosuch://bucket", "nothing opens nosuch:// URLs"),
        ("s3://", "no URL of a bucket or folder"),
        ("file:///", "no URL of a bucket or folder"),
        ("simplecache::s3://bucket", "chained URLs"),
        ("memory://a/simplecache::b", "chained URLs"),
        ("memory://a/*", "wildcards"),
        ("s3://bucket/x?versionId=1", "queries"),
        ("memory://a\nb", "cannot be used"),
    ],
)
def test_a_url_that_nothing_opens_is_refused(url: str, message: str) -> None:
    with pytest.raises(InvalidReference, match=message) as caught:
        open_objects(url)
    assert caught.value.param == "artifacts_url"


@pytest.mark.parametrize(
    ("url", "package"),
    [
        ("wandb://bucket/x", "wandbfs"),
        ("oss://bucket/x", "ossfs"),
        ("webdav://host/x", "webdav4"),
        ("box://x", "boxfs"),
    ],
)
def test_a_driver_that_is_not_installed_is_named(url: str, package: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactUnavailable, match=f"not installed: .*[Ii]nstall {package}"):
        open_store(url, cache=tmp_path, max_cache_bytes=1)
    with pytest.raises(ArtifactUnavailable, match=package):
        open_trees(url)


@pytest.mark.parametrize("location", ["s3:bucket", "s3:/bucket", "simplecache::s3://bucket", "gs:"])
def test_what_is_nearly_a_url_does_not_become_a_folder(location: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidReference):
        open_store(location, cache=tmp_path, max_cache_bytes=1)
    with pytest.raises(InvalidReference):
        open_trees(location)
    assert not Path(location).exists()


def test_messages_show_no_credentials() -> None:
    for call in (
        lambda: open_objects("ftp://me:secret@host/*"),
        lambda: open_objects("ftp://me:secret@127.0.0.1:1/x").read("y"),
    ):
        with pytest.raises((InvalidReference, ArtifactUnavailable)) as caught:
            call()
        assert "secret" not in caught.value.message
        assert "ftp://" in caught.value.message


# --- what is tried again ---------------------------------------------------------------------------------------------


class DriverError(Exception):
    """What some drivers raise: no OSError."""


@pytest.mark.parametrize(
    "error",
    [ConnectionResetError("reset"), TimeoutError(), OSError(errno.EBUSY, "slow down"), EOFError(), DriverError("503")],
)
@pytest.mark.parametrize("num_failures", [1, 3])
def test_what_may_pass_is_tried_again(flaky: type[Flaky], error: Exception, num_failures: int) -> None:
    objects = flaky_objects()
    for name in ("pipe_file", "cat_file", "find", "info", "rm_file"):
        flaky.failures[name] = [error] * num_failures
    objects.write("a/b", b"data")
    assert objects.read("a/b") == b"data"
    assert b"".join(objects.chunks("a/b", 4)) == b"data"
    assert list(objects.find("a")) == ["b"]
    assert objects.exists("a/b")
    objects.remove("a/b")
    assert not objects.exists("a/b")
    assert flaky.num_calls["pipe_file"] == 1 + num_failures


def test_it_ends_after_some_attempts_with_the_reason(flaky: type[Flaky], caplog: pytest.LogCaptureFixture) -> None:
    flaky.failures["cat_file"] = [ConnectionRefusedError("nobody listens")] * 99
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ArtifactUnavailable, match="flaky://flaky/x: reading a/b failed: nobody"),
    ):
        flaky_objects().read("a/b")
    assert flaky.num_calls["cat_file"] == NO_WAITING.max_attempts
    assert len(caplog.records) == NO_WAITING.max_attempts - 1


def test_a_driver_that_tries_for_long_itself_is_not_asked_again(flaky: type[Flaky]) -> None:
    flaky.failures["cat_file"] = [TimeoutError("after a minute")] * 99
    objects = open_objects("flaky://flaky/x", retries=Retries(max_total_s=0.0))
    with pytest.raises(ArtifactUnavailable, match="after a minute"):
        objects.read("a/b")
    assert flaky.num_calls["cat_file"] == 1


@pytest.mark.parametrize(
    "error",
    [
        PermissionError("denied"),
        OSError(errno.ENOSPC, "full"),
        NotImplementedError("read only"),
        ValueError("no such region"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(flaky: type[Flaky], error: Exception) -> None:
    flaky.failures["pipe_file"] = [error]
    with pytest.raises(ArtifactUnavailable, match=r"writing a/b failed: .*(denied|full|read only|no such region)"):
        flaky_objects().write("a/b", b"")
    assert flaky.num_calls["pipe_file"] == 1


def test_a_bug_is_not_taken_for_an_outage(flaky: type[Flaky]) -> None:
    flaky.failures["pipe_file"] = [TypeError("no such argument")]
    with pytest.raises(TypeError):
        flaky_objects().write("a/b", b"")


def test_what_is_not_there_is_neither_tried_again_nor_unavailable(flaky: type[Flaky]) -> None:
    objects = flaky_objects()
    with pytest.raises(FileNotFoundError):
        objects.read("a/b")
    assert objects.find("a") == {}
    objects.remove("a/b")
    objects.remove_tree("a")
    assert flaky.num_calls["cat_file"] == 1


def test_waits_grow_and_are_bounded() -> None:
    retries = Retries()
    for attempt, longest in ((1, 0.2), (2, 0.8), (3, 3.2)):
        waits = [retries.wait_s(attempt) for _ in range(100)]
        assert longest / 2 <= min(waits) < max(waits) <= longest


# --- a network that is really not there ------------------------------------------------------------------------------


def test_a_host_that_does_not_answer_is_found_out_at_the_first_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        url = f"ftp://127.0.0.1:{taken.getsockname()[1]}/packages"
        store = open_store(url, cache=tmp_path, max_cache_bytes=1, retries=NO_WAITING)
        with pytest.raises(ArtifactUnavailable, match="refused"):
            store.digests()


def test_a_host_that_hangs_up_is_called_again_and_then_unavailable(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as thread:

        def hang_up() -> int:
            for _ in range(NO_WAITING.max_attempts):
                server.accept()[0].close()
            return NO_WAITING.max_attempts

        calls = thread.submit(hang_up)
        url = f"ftp://127.0.0.1:{server.getsockname()[1]}/packages"
        with pytest.raises(ArtifactUnavailable):
            open_store(url, cache=tmp_path, max_cache_bytes=1, retries=NO_WAITING).has(f"sha256:{0:064x}")
        assert calls.result(30) == NO_WAITING.max_attempts


# --- files -----------------------------------------------------------------------------------------------------------


def test_files_are_read_in_pieces_of_bounded_size(flaky: type[Flaky]) -> None:
    objects = flaky_objects()
    data = bytes(range(256)) * (2 * CHUNK_BYTES // 256) + b"end"
    objects.write("big", data)
    chunks = list(objects.chunks("big", len(data)))
    assert [len(chunk) for chunk in chunks] == [CHUNK_BYTES, CHUNK_BYTES, 3]
    assert b"".join(chunks) == data
    assert b"".join(objects.chunks("big", len(data) + CHUNK_BYTES)) == data  # it ends where the file does
    assert list(objects.chunks("big", 0)) == []


def test_an_interrupted_piece_is_read_again_and_not_the_whole_file(flaky: type[Flaky]) -> None:
    objects = flaky_objects()
    data = b"x" * (2 * CHUNK_BYTES)
    objects.write("big", data)
    chunks = objects.chunks("big", len(data))
    assert len(next(chunks)) == CHUNK_BYTES
    flaky.failures["cat_file"] = [ConnectionResetError()]
    assert len(b"".join(chunks)) == CHUNK_BYTES
    assert flaky.num_calls["cat_file"] == 3


def test_folders_are_made_below_the_root_but_never_the_root(tmp_path: Path) -> None:
    """With the local driver as any other one with real folders, and not as LocalObjects uses it."""
    objects = Objects("sftp://host/root", str(tmp_path / "root"), lambda: fsspec.filesystem("file"), retries=NO_WAITING)
    with pytest.raises(ArtifactUnavailable, match="sftp://host/root: there is no such bucket or folder"):
        objects.write("a/b/c", b"data")
    assert not (tmp_path / "root").exists()
    (tmp_path / "root").mkdir()
    objects.write("a/b/c", b"data")
    objects.write("a/b/d", b"")
    (tmp_path / "source").write_bytes(b"uploaded")
    objects.upload(tmp_path / "source", "e/f")
    assert {path: objects.read(path) for path in ("a/b/c", "a/b/d", "e/f")} == {
        "a/b/c": b"data",
        "a/b/d": b"",
        "e/f": b"uploaded",
    }
    objects.remove_tree("a/b")
    assert objects.find("a") == {}


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").symlink_to("x")  # a loop: it can be neither listed nor read
    objects = LocalObjects(tmp_path, retries=NO_WAITING)
    with pytest.raises(ArtifactUnavailable, match="symbolic links"):
        objects.find("a/x")


def test_times_are_read_whatever_a_driver_calls_them(flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch) -> None:
    at = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)
    objects = flaky_objects()
    objects.write("a/b", b"")
    told: list[dict[str, object]] = [
        {"LastModified": at},
        {"last_modified": at.replace(tzinfo=None)},
        {"mtime": at.timestamp(), "created": 1.0},
        {"updated": "2024-05-06T07:08:09Z"},
    ]
    for info in told:
        listing = {"/flaky/x/a/b": {"name": "/flaky/x/a/b", "size": 0, "type": "file", **info}}
        monkeypatch.setattr(Flaky, "find", lambda self, path, listing=listing, **options: listing)
        assert objects.find("a")["b"].modified_at == at
    nothing = {"/flaky/x/a/b": {"name": "/flaky/x/a/b", "size": 0, "type": "file"}}
    monkeypatch.setattr(Flaky, "find", lambda self, path, **options: nothing)
    assert (datetime.now(UTC) - objects.find("a")["b"].modified_at).total_seconds() < 60


def test_one_connection_is_made_by_many_threads() -> None:
    made = []
    barrier = threading.Barrier(8)

    def connect() -> Any:
        made.append(1)
        return fsspec.filesystem("memory")

    objects = Objects("memory://x", "/x", connect)

    def use() -> None:
        barrier.wait()
        objects.exists("y")

    with ThreadPoolExecutor(8) as threads:
        for job in [threads.submit(use) for _ in range(8)]:
            job.result()
    assert len(made) == 1
