"""The cache of packages: bounded, the least recently read go first, and never what is being read."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from adapters.artifacts.cache import PackageCache
from adapters.package import files_digest
from tests.adapters.artifacts.stores import ABSENT, forks, hidden, num_bytes_below

WAIT_S = 60.0


def package(name: str, num_bytes: int = 100) -> tuple[str, dict[str, bytes]]:
    """(digest, files) of this many bytes together."""
    files = {"README.md": name.encode(), "adapter_config.json": b"{}"}
    files["adapter_model.safetensors"] = b"w" * (num_bytes - sum(map(len, files.values())))
    return files_digest(files), files


@contextmanager
def reading(cache: Path, digest: str) -> Iterator[None]:
    """As a reader who takes long."""
    folder = os.open(cache / "sha256" / digest.removeprefix("sha256:"), os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_SH)
    yield
    os.close(folder)


def test_what_is_kept_can_be_read(tmp_path: Path) -> None:
    cache = PackageCache(tmp_path, 1000)
    digest, files = package("a")
    assert cache.read(digest) is None
    cache.keep(digest, files)
    cache.keep(digest, files)
    assert cache.read(digest) == files
    assert PackageCache(tmp_path, 1000).read(digest) == files
    cache.delete(digest)
    cache.delete(digest)
    assert cache.read(digest) is None


def test_the_least_recently_read_makes_room(tmp_path: Path) -> None:
    cache = PackageCache(tmp_path, 300)
    a, b, c, d = (package(name) for name in "abcd")
    for digest, files in (a, b, c):
        cache.keep(digest, files)
    assert cache.read(a[0]) is not None  # b is the oldest now
    cache.keep(*d)
    assert [cache.read(digest) is not None for digest, _ in (a, b, c, d)] == [True, False, True, True]
    assert num_bytes_below(tmp_path) == 300
    assert hidden(tmp_path) == []


def test_as_many_go_as_must(tmp_path: Path) -> None:
    cache = PackageCache(tmp_path, 300)
    for name in "abc":
        cache.keep(*package(name))
    big = package("big", 201)
    cache.keep(*big)
    assert [entry.name for entry in (tmp_path / "sha256").iterdir()] == [big[0].removeprefix("sha256:")]


@pytest.mark.parametrize("max_bytes", [0, 99])
def test_what_is_larger_than_the_cache_is_not_kept_and_takes_nothing_away(tmp_path: Path, max_bytes: int) -> None:
    cache = PackageCache(tmp_path, max_bytes)
    small = package("s", 50)
    cache.keep(*small)
    cache.keep(*package("a", 100))
    assert cache.read(package("a")[0]) is None
    assert (cache.read(small[0]) is not None) == (max_bytes >= 50)


def test_what_is_being_read_makes_no_room(tmp_path: Path) -> None:
    cache = PackageCache(tmp_path, 200)
    a, b, c, d = (package(name) for name in "abcd")
    cache.keep(*a)
    cache.keep(*b)
    with reading(tmp_path, a[0]):
        cache.keep(*c)
        assert [cache.read(digest) is not None for digest, _ in (a, b, c)] == [True, False, True]
        cache.delete(a[0])
        assert cache.read(a[0]) == a[1]
        with reading(tmp_path, c[0]):
            cache.keep(*d)  # beyond the bound, for as long as the others are read
            assert cache.read(d[0]) == d[1]
    cache.keep(*b)
    assert num_bytes_below(tmp_path) <= 200


def read_slowly(root: str, digest: str, has_begun: Event, may_end: Event) -> None:
    with reading(Path(root), digest):
        has_begun.set()
        assert may_end.wait(WAIT_S)


def test_not_even_when_another_process_reads_it(tmp_path: Path) -> None:
    cache = PackageCache(tmp_path, 100)
    a, b = package("a"), package("b")
    cache.keep(*a)
    has_begun, may_end = forks().Event(), forks().Event()
    process = forks().Process(target=read_slowly, args=(str(tmp_path), a[0], has_begun, may_end))
    process.start()
    assert has_begun.wait(WAIT_S)
    cache.keep(*b)
    assert cache.read(a[0]) == a[1]
    may_end.set()
    process.join()
    assert process.exitcode == 0
    cache.delete(b[0])
    cache.keep(*b)
    assert (cache.read(a[0]), cache.read(b[0])) == (None, b[1])


def test_what_a_dead_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    cache = PackageCache(tmp_path, 1000)
    for name in (".x.0011.tmp", ".x.2233.deleted"):
        (tmp_path / "sha256" / name).mkdir()
        (tmp_path / "sha256" / name / "README.md").write_text("half")
    cache.keep(*package("a"))
    assert hidden(tmp_path) == []


def test_a_reader_who_finds_another_folder_in_its_place_has_to_fetch(tmp_path: Path) -> None:
    cache = PackageCache(tmp_path, 1000)
    digest, files = package("a")
    cache.keep(digest, files)
    folder = tmp_path / "sha256" / digest.removeprefix("sha256:")
    (folder / "README.md").write_text("not what it was")
    assert cache.read(digest) is None
    assert not folder.exists()
    cache.keep(digest, files)
    assert cache.read(digest) == files
    assert cache.read(ABSENT) is None
