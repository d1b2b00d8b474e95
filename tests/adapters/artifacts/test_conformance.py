"""What every store of packages promises, wherever it keeps them."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from adapters.errors import ArtifactNotFound, DigestMismatch, InvalidPackage, InvalidReference, UnsafePath
from adapters.package import WEIGHTS_FILE, files_digest, read_files
from tests.adapters.artifacts.stores import ABSENT, Place, a_place, forks, hidden, make_folder, num_bytes_below


def test_a_package_is_kept_under_its_digest(place: Place, tmp_path: Path) -> None:
    store = place.open()
    package = make_folder(tmp_path / "p")
    digest = store.put(package)
    assert digest == files_digest(read_files(package))
    assert place.fs.cat_file(place.path(digest, "README.md")) == b"x"
    assert store.read(digest) == read_files(package)
    assert store.has(digest) and store.digests() == (digest,)
    store.verify(digest)
    (package / "README.md").write_text("changed afterwards")
    assert store.read(digest)["README.md"] == b"x"


def test_it_is_there_for_whoever_comes_later(place: Place, tmp_path: Path) -> None:
    digest = place.open().put(make_folder(tmp_path / "p"))
    place.cache = tmp_path / "another host's"
    assert place.open().read(digest) == read_files(tmp_path / "p")


@pytest.mark.parametrize("num_bytes", [0, 1, 1 << 20])
def test_what_is_loaded_is_made_of_exactly_the_files_that_were_put(
    place: Place, num_bytes: int, tmp_path: Path
) -> None:
    digest = place.open().put(make_folder(tmp_path / "p", num_bytes=num_bytes))
    files = read_files(tmp_path / "p")
    for _ in range(2):  # from afar, and from the cache
        assert place.open().load(digest, dict) == files
    with pytest.raises(ZeroDivisionError):
        place.open().load(digest, lambda files: 1 / 0)
    with pytest.raises(ArtifactNotFound, match=ABSENT):
        place.open().load(ABSENT, dict)


@pytest.mark.parametrize("damage", ["other bytes", "longer", "shorter", "another file", "no weights"])
def test_nothing_that_is_made_of_damaged_files_gets_out(place: Place, damage: str, tmp_path: Path) -> None:
    store = place.open()
    digest = store.put(make_folder(tmp_path / "p", num_bytes=1 << 20))
    path = place.path(digest, WEIGHTS_FILE)
    whole = place.fs.cat_file(path)
    assert isinstance(whole, bytes)
    changed = {"other bytes": whole[:-1] + b"?", "longer": whole + b"?", "shorter": whole[:-1]}
    if damage in changed:
        place.fs.pipe_file(path, changed[damage])
    elif damage == "another file":
        place.fs.pipe_file(place.path(digest, "probe.safetensors"), b"?")
    else:
        place.fs.rm_file(path)
    for make in (dict, lambda files: 1 / 0):
        if damage == "another file" and place.is_remote:
            continue  # a remote artifact is the files that its manifest lists
        with pytest.raises(DigestMismatch, match="is damaged"):
            store.load(digest, make)


def test_an_empty_file_is_a_file(place: Place, tmp_path: Path) -> None:
    store = place.open()
    digest = store.put(make_folder(tmp_path / "p", num_bytes=0))
    assert store.read(digest) == read_files(tmp_path / "p")


def test_putting_again_changes_nothing(place: Place, tmp_path: Path) -> None:
    store = place.open()
    package = make_folder(tmp_path / "p")
    digest = store.put(package)
    before, files = store.entries(), place.everything()
    time.sleep(0.02)
    assert store.put(package) == digest
    assert (store.entries(), place.everything()) == (before, files)


def test_digests_are_sorted_and_only_those_of_packages(place: Place, tmp_path: Path) -> None:
    store = place.open()
    digests = [store.put(make_folder(tmp_path / str(i), str(i))) for i in range(4)]
    place.fs.pipe_file(f"{place.root}/sha256/{'f' * 64}", b"a file of that name")
    place.fs.pipe_file(f"{place.root}/sha256/notes.json", b"{}")
    assert store.digests() == tuple(sorted(digests))
    assert [entry.digest for entry in store.entries()] == sorted(digests)


def test_a_store_that_nobody_used_is_empty(place: Place) -> None:
    store = place.open()
    assert (store.digests(), store.entries(), store.leftovers(0), store.sweep_leftovers(0)) == ((), (), (), ())


def test_what_is_not_there(place: Place) -> None:
    store = place.open()
    assert not store.has(ABSENT)
    with pytest.raises(ArtifactNotFound, match=ABSENT):
        store.read(ABSENT)
    with pytest.raises(ArtifactNotFound):
        store.verify(ABSENT)
    store.delete(ABSENT)


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:../../etc", "sha256:" + "A" * 64, "0" * 64, ABSENT + "\n"])
def test_nothing_but_a_digest_becomes_a_path(place: Place, digest: str) -> None:
    store = place.open()
    calls: list[Callable[[str], object]] = [store.read, store.has, store.verify, store.delete]
    for call in calls:
        with pytest.raises(InvalidReference):
            call(digest)


def test_folders_that_are_no_packages_are_refused(place: Place, tmp_path: Path) -> None:
    store = place.open()
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


def test_delete(place: Place, tmp_path: Path) -> None:
    store = place.open()
    digest, kept = (store.put(make_folder(tmp_path / name, name)) for name in ("p", "q"))
    files = place.everything()
    assert store.read(digest)
    store.delete(digest)
    assert not store.has(digest)
    assert store.digests() == (kept,)
    assert place.everything() == [name for name in files if digest.removeprefix("sha256:") not in name]
    with pytest.raises(ArtifactNotFound):
        store.read(digest)
    assert store.put(tmp_path / "p") == digest
    store.verify(digest)


@pytest.mark.parametrize("damage", ["changed", "shorter", "empty", "missing"])
def test_damage_is_found_and_a_new_put_mends_it(place: Place, tmp_path: Path, damage: str) -> None:
    store = place.open()
    package = make_folder(tmp_path / "p")
    digest = store.put(package)
    file = place.path(digest, "adapter_model.safetensors")
    whole = place.fs.cat_file(file)
    if damage == "missing":
        place.fs.rm_file(file)
    else:
        place.fs.pipe_file(file, {"changed": b"X" + whole[1:], "shorter": whole[:-1], "empty": b""}[damage])
    for check in (store.verify, store.read):
        with pytest.raises(DigestMismatch, match="is damaged"):
            check(digest)
    assert store.put(package) == digest
    store.verify(digest)
    assert store.read(digest) == read_files(package)


def test_entries_tell_size_and_when_it_appeared(place: Place, tmp_path: Path) -> None:
    store = place.open()
    before = time.time() - 1  # file systems round
    digest = store.put(make_folder(tmp_path / "p"))
    (entry,) = store.entries()
    assert (entry.digest, entry.num_bytes) == (digest, num_bytes_below(tmp_path / "p"))
    assert entry.modified_at.tzinfo is not None
    assert before <= entry.modified_at.timestamp() <= time.time() + 1


def test_the_time_of_an_artifact_is_that_of_its_appearance_and_not_of_its_last_use(tmp_path: Path) -> None:
    for kind, where in (("folder", ""), ("file", ".json")):
        with a_place(kind, tmp_path / kind) as place:
            store = place.open()
            digest = store.put(make_folder(tmp_path / f"p-{kind}"))
            os.utime(f"{place.path(digest)}{where}", (1_000_000, 1_000_000))
            assert store.read(digest)
            assert [entry.modified_at for entry in store.entries()] == [datetime.fromtimestamp(1_000_000, UTC)]


def test_leftovers_are_listed_and_swept_once_they_are_old(place: Place, tmp_path: Path) -> None:
    store = place.open()
    digest = store.put(make_folder(tmp_path / "p"))
    if place.is_remote:
        half = f"sha256/{'a' * 64}"
        place.fs.makedirs(f"{place.root}/{half}", exist_ok=True)
        place.fs.pipe_file(f"{place.root}/{half}/README.md", b"12345")
    else:
        half = f"sha256/.{'a' * 64}.0123456789abcdef.tmp"
        os.mkdir(f"{place.root}/{half}")
        place.fs.pipe_file(f"{place.root}/{half}/README.md", b"12345")
    assert store.digests() == (digest,)
    assert store.leftovers(3600) == store.sweep_leftovers(3600) == ()
    (leftover,) = store.leftovers(0)
    assert (leftover.name, leftover.num_bytes) == (half, 5)
    assert abs(leftover.modified_at.timestamp() - time.time()) < 60
    assert store.sweep_leftovers(0) == (leftover,)
    assert store.leftovers(0) == ()
    assert not place.fs.exists(f"{place.root}/{half}")
    store.verify(digest)


def test_threads_may_put_read_and_delete_the_same_at_once(place: Place, tmp_path: Path) -> None:
    store = place.open()
    packages = [make_folder(tmp_path / str(index), str(index)) for index in range(3)]
    expected = {store.put(package): read_files(package) for package in packages}
    doomed = store.put(make_folder(tmp_path / "doomed", "doomed"))

    def work(seed: int) -> None:
        for round_ in range(10):
            package = packages[(seed + round_) % 3]
            digest = store.put(package)
            assert store.read(digest) == expected[digest]
            if seed == 0:
                store.delete(doomed)

    with ThreadPoolExecutor(6) as threads:
        for job in [threads.submit(work, seed) for seed in range(6)]:
            job.result()
    assert store.digests() == tuple(sorted(expected))
    assert store.leftovers(0) == ()


def put_and_read_all(location: str, cache: str, packages: list[str], seed: int) -> None:
    """What each of several processes does: the same digests, in an order of its own, through caches of which one is shared."""
    place = Place(location, None, "", Path(cache if seed % 2 else f"{cache}-{seed}"), max_cache_bytes=150_000)
    store = place.open()
    for round_ in range(3):
        for step in range(len(packages)):
            package = Path(packages[(seed * 3 + step * (1 + round_)) % len(packages)])
            files = read_files(package)
            digest = store.put(package)
            assert digest == files_digest(files)
            assert store.read(digest) == files
            assert store.has(digest)
        assert store.leftovers(3600) == ()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_eight_processes_may_put_and_read_the_same_at_once(kind: str, tmp_path: Path) -> None:
    packages = [make_folder(tmp_path / "packages" / str(index), str(index)) for index in range(5)]
    with a_place(kind, tmp_path) as place:
        arguments = (place.location, str(place.cache), [str(package) for package in packages])
        processes = [forks().Process(target=put_and_read_all, args=(*arguments, seed)) for seed in range(8)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 8
        store = place.open()
        assert len(store.digests()) == len(packages)
        assert store.leftovers(0) == ()
        for digest in store.digests():
            store.verify(digest)
        for cache in tmp_path.glob("cache*"):
            assert hidden(cache) == []
            assert num_bytes_below(cache) <= 150_000
