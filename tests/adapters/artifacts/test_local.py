"""What only a local folder promises."""

import os
from pathlib import Path

import pytest

from adapters.artifacts import LocalArtifactStore
from adapters.errors import ArtifactNotFound, ArtifactUnavailable, DigestMismatch
from adapters.package import read_files
from tests.adapters.artifacts.stores import ABSENT, make_folder


def test_a_package_is_a_folder_of_plain_files(tmp_path: Path) -> None:
    store = LocalArtifactStore(tmp_path / "store")
    digest = store.put(make_folder(tmp_path / "p"))
    assert store.path(digest) == tmp_path / "store" / "sha256" / digest.removeprefix("sha256:")
    assert read_files(store.path(digest)) == read_files(tmp_path / "p")
    with pytest.raises(ArtifactNotFound, match=ABSENT):
        store.path(ABSENT)


def test_a_file_that_does_not_belong_there_is_damage(tmp_path: Path) -> None:
    store = LocalArtifactStore(tmp_path / "store")
    digest = store.put(make_folder(tmp_path / "p"))
    (store.path(digest) / "extra").write_text("")
    with pytest.raises(DigestMismatch, match="is damaged"):
        store.verify(digest)
    store.put(tmp_path / "p")
    store.verify(digest)


def test_what_a_dead_deleter_left_is_swept(tmp_path: Path) -> None:
    store = LocalArtifactStore(tmp_path)
    digest = store.put(make_folder(tmp_path / "p"))
    os.rename(store.path(digest), tmp_path / "sha256" / ".abc.deleted")
    assert store.digests() == ()
    (leftover,) = store.sweep_leftovers(0)
    assert leftover.name == "sha256/.abc.deleted"
    assert os.listdir(tmp_path / "sha256") == []


def test_a_disk_that_fails_is_not_taken_for_a_damaged_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a put would throw away what is whole. Here: too many open files."""
    import resource

    store = LocalArtifactStore(tmp_path)
    digest = store.put(make_folder(tmp_path / "p"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open("/dev/null", os.O_RDONLY)  # the number that the next file would get
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(ArtifactUnavailable, match="Too many open files"):
            store.read(digest)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    store.verify(digest)


def test_a_folder_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactUnavailable, match=f"{tmp_path}/file/store.* cannot be made: Not a directory"):
        LocalArtifactStore(tmp_path / "file" / "store")
