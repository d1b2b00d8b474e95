import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters.artifacts import ArtifactStore, LocalArtifactStore
from adapters.errors import ArtifactNotFound, DigestMismatch, InvalidPackage, InvalidReference, UnsafePath
from adapters.package import files_digest, read_files

ABSENT = f"sha256:{0:064x}"


def make_folder(path: Path, readme: str = "x") -> Path:
    """A folder with the files of a package: what they say is none of the store's business."""
    path.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "probe.safetensors"):
        (path / name).write_bytes(name.encode() * 1000)
    (path / "README.md").write_text(readme)
    return path


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return LocalArtifactStore(tmp_path / "store")


def test_a_package_is_kept_under_its_digest(store: ArtifactStore, tmp_path: Path) -> None:
    package = make_folder(tmp_path / "p")
    digest = store.put(package)
    assert digest == files_digest(read_files(package))
    assert store.path(digest) == tmp_path / "store" / "sha256" / digest.removeprefix("sha256:")
    assert read_files(store.path(digest)) == read_files(package)
    assert store.has(digest) and store.digests() == (digest,)
    store.verify(digest)
    (package / "README.md").write_text("changed afterwards")
    store.verify(digest)


def test_putting_again_changes_nothing(store: ArtifactStore, tmp_path: Path) -> None:
    package = make_folder(tmp_path / "p")
    digest = store.put(package)
    inode = store.path(digest).stat().st_ino
    assert store.put(package) == digest
    assert store.path(digest).stat().st_ino == inode
    assert [entry.name for entry in store.path(digest).parent.iterdir()] == [digest.removeprefix("sha256:")]


def test_digests_are_sorted_and_only_those_of_packages(store: ArtifactStore, tmp_path: Path) -> None:
    digests = [store.put(make_folder(tmp_path / str(i), str(i))) for i in range(4)]
    (tmp_path / "store" / "sha256" / ".half.tmp").mkdir()
    (tmp_path / "store" / "sha256" / ("f" * 64)).write_text("a file")
    assert store.digests() == tuple(sorted(digests))


def test_what_is_not_there(store: ArtifactStore) -> None:
    assert not store.has(ABSENT)
    with pytest.raises(ArtifactNotFound, match=ABSENT):
        store.path(ABSENT)
    with pytest.raises(ArtifactNotFound):
        store.verify(ABSENT)
    store.delete(ABSENT)


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:../../etc", "sha256:" + "A" * 64, "0" * 64, ABSENT + "\n"])
def test_nothing_but_a_digest_reaches_the_file_system(store: ArtifactStore, digest: str) -> None:
    calls: list[Callable[[str], object]] = [store.path, store.has, store.verify, store.delete]
    for call in calls:
        with pytest.raises(InvalidReference):
            call(digest)


def test_folders_that_are_no_packages_are_refused(store: ArtifactStore, tmp_path: Path) -> None:
    package = make_folder(tmp_path / "p")
    (package / "evil.pkl").write_bytes(b"")
    with pytest.raises(InvalidPackage, match="unexpected"):
        store.put(package)
    (package / "evil.pkl").unlink()
    (package / "README.md").unlink()
    (package / "README.md").symlink_to("/etc/hostname")
    with pytest.raises(UnsafePath):
        store.put(package)
    assert store.digests() == ()


def test_delete(store: ArtifactStore, tmp_path: Path) -> None:
    digest, kept = (store.put(make_folder(tmp_path / name, name)) for name in ("p", "q"))
    store.delete(digest)
    assert not store.has(digest)
    assert store.digests() == (kept,)
    assert len(list((tmp_path / "store" / "sha256").iterdir())) == 1
    assert store.put(tmp_path / "p") == digest
    store.verify(digest)


@pytest.mark.parametrize("damage", ["changed", "missing", "extra"])
def test_damage_is_found_and_a_new_put_mends_it(store: ArtifactStore, tmp_path: Path, damage: str) -> None:
    package = make_folder(tmp_path / "p")
    digest = store.put(package)
    if damage == "changed":
        (store.path(digest) / "README.md").write_text("y")
    elif damage == "missing":
        (store.path(digest) / "adapter_config.json").unlink()
    else:
        (store.path(digest) / "extra").write_text("")
    with pytest.raises(DigestMismatch, match="is damaged"):
        store.verify(digest)
    assert store.put(package) == digest
    store.verify(digest)


def put_all(root: Path, packages: list[Path]) -> list[str]:
    store = LocalArtifactStore(root)
    digests = [store.put(package) for package in packages]
    for digest in digests:
        store.verify(digest)
    return digests


def test_threads_and_processes_may_put_the_same_at_once(tmp_path: Path) -> None:
    packages = [make_folder(tmp_path / str(index), str(index)) for index in range(8)]
    root = tmp_path / "store"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as other, ThreadPoolExecutor(4) as threads:
        other.submit(put_all, tmp_path / "warm", packages).result()  # imports done, the race can begin
        jobs = [pool.submit(put_all, root, packages) for pool in (other, threads, threads, threads, threads)]
        results = [job.result() for job in jobs]
    assert all(result == results[0] for result in results)
    assert LocalArtifactStore(root).digests() == tuple(sorted(results[0]))
    assert len(list((root / "sha256").iterdir())) == len(packages)
