"""Folder trees: put and fetched back bit for bit, resumed after interruptions, never in memory."""

import json
import shutil
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adapters.artifacts import TreeStore, open_trees, sweep_fetches
from adapters.artifacts.manifest import sha256
from adapters.artifacts.objects import CHUNK_BYTES, Objects
from adapters.errors import ArtifactNotFound, ArtifactUnavailable, Conflict, DigestMismatch, InvalidPackage, UnsafePath
from tests.adapters.artifacts.stores import ABSENT, MIB, NO_WAITING, Place, forks, hidden
from tests.adapters.artifacts.test_remote import Recorded

NAMES = ("ids.json", "manifest.json", "media/a.jpg", "media/deep/b c.jpg", "vectors.npy")


def make_tree(path: Path, mark: str = "") -> Path:
    for name in NAMES:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(f"{name}{mark}".encode() * 1000)
    (path / "empty").write_bytes(b"")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def trees(remote: Place) -> TreeStore:
    return open_trees(remote.location, retries=NO_WAITING)


@pytest.fixture
def recorded(place_in_memory: Place) -> tuple[TreeStore, Recorded]:
    fs = Recorded(place_in_memory.fs)
    return TreeStore(Objects("memory://x", place_in_memory.root, lambda: fs, retries=NO_WAITING)), fs


def test_a_tree_comes_back_as_it_was(trees: TreeStore, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    digest = trees.put_tree(tree)
    assert trees.has(digest) and trees.digests() == (digest,)
    trees.verify(digest)
    trees.fetch_tree(digest, tmp_path / "new" / "v1")
    assert contents(tmp_path / "new" / "v1") == contents(tree)
    assert hidden(tmp_path / "new") == []


def test_the_same_files_are_the_same_tree(trees: TreeStore, remote: Place, tmp_path: Path) -> None:
    digest = trees.put_tree(make_tree(tmp_path / "tree"))
    before, files = trees.entries(), remote.everything()
    assert trees.put_tree(make_tree(tmp_path / "other" / "place")) == digest
    assert (trees.entries(), remote.everything()) == (before, files)
    assert trees.put_tree(make_tree(tmp_path / "third", "!")) != digest
    assert len(trees.digests()) == 2


def test_a_folder_takes_trees_as_a_url_does(tmp_path: Path) -> None:
    digest = open_trees(tmp_path / "a folder [*]").put_tree(make_tree(tmp_path / "tree"))
    open_trees(str(tmp_path / "a folder [*]")).fetch_tree(digest, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "tree")


def test_trees_and_packages_do_not_see_each_other(trees: TreeStore, remote: Place, tmp_path: Path) -> None:
    digest = trees.put_tree(make_tree(tmp_path / "tree"))
    packages = remote.open()
    assert (packages.digests(), packages.leftovers(0), packages.has(digest)) == ((), (), False)


def test_what_is_not_there(trees: TreeStore, tmp_path: Path) -> None:
    for call in (lambda: trees.verify(ABSENT), lambda: trees.fetch_tree(ABSENT, tmp_path / "new")):
        with pytest.raises(ArtifactNotFound):
            call()
    trees.delete(ABSENT)
    assert not (tmp_path / "new").exists()


def test_delete_and_leftovers(trees: TreeStore, remote: Place, tmp_path: Path) -> None:
    digest = trees.put_tree(make_tree(tmp_path / "tree"))
    (entry,) = trees.entries()
    assert (entry.digest, entry.num_bytes) == (digest, sum(map(len, contents(tmp_path / "tree").values())))
    remote.fs.rm_file(f"{remote.root}/trees/sha256/{digest.removeprefix('sha256:')}.json")
    (leftover,) = trees.leftovers(0)
    assert (leftover.name, leftover.num_bytes) == (f"trees/sha256/{digest.removeprefix('sha256:')}", entry.num_bytes)
    assert trees.leftovers(3600) == ()
    assert trees.put_tree(tmp_path / "tree") == digest
    assert trees.leftovers(0) == ()
    trees.delete(digest)
    assert (trees.digests(), trees.leftovers(0), remote.everything()) == ((), (), [])


# --- what must not be put or fetched ---------------------------------------------------------------------------------


def test_links_and_empty_folders_are_refused(trees: TreeStore, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    (tree / "media" / "link").symlink_to("/etc/hostname")
    with pytest.raises(UnsafePath, match="link"):
        trees.put_tree(tree)
    with pytest.raises(InvalidPackage):
        trees.put_tree(tmp_path / "nothing")
    assert (trees.digests(), trees.leftovers(0)) == ((), ())


def test_a_file_that_changes_while_it_is_put_makes_no_tree(
    recorded: tuple[TreeStore, Recorded], tmp_path: Path
) -> None:
    trees, fs = recorded
    tree = make_tree(tmp_path / "tree")

    def change(step: str, path: str) -> None:
        if path.endswith("media/a.jpg"):
            (tree / "media/a.jpg").write_bytes(b"X" * len((tree / "media/a.jpg").read_bytes()))

    fs.before = change
    with pytest.raises(InvalidPackage, match=r"media/a\.jpg changed while it was read"):
        trees.put_tree(tree)
    assert trees.digests() == ()
    fs.before = lambda step, path: None
    digest = trees.put_tree(make_tree(tree))  # as it was before: what was sent meanwhile is not taken for it
    trees.verify(digest)


@pytest.mark.parametrize("damage", ["changed", "shorter", "missing"])
def test_a_damaged_tree_never_appears(trees: TreeStore, remote: Place, tmp_path: Path, damage: str) -> None:
    digest = trees.put_tree(make_tree(tmp_path / "tree"))
    file = f"{remote.root}/trees/sha256/{digest.removeprefix('sha256:')}/vectors.npy"
    data = remote.fs.cat_file(file)
    if damage == "missing":
        remote.fs.rm_file(file)
    else:
        remote.fs.pipe_file(file, b"X" + data[1:] if damage == "changed" else data[:-1])
    for call in (lambda: trees.verify(digest), lambda: trees.fetch_tree(digest, tmp_path / "new")):
        with pytest.raises(DigestMismatch, match=r"damaged: vectors\.npy"):
            call()
    assert not (tmp_path / "new").exists()
    if damage == "changed":  # of the right size: a put trusts it, so it has to be deleted first
        trees.delete(digest)
    trees.put_tree(tmp_path / "tree")
    trees.fetch_tree(digest, tmp_path / "new")
    assert contents(tmp_path / "new") == contents(tmp_path / "tree")
    assert hidden(tmp_path) == []


def test_a_manifest_to_match_does_not_help(trees: TreeStore, remote: Place, tmp_path: Path) -> None:
    digest = trees.put_tree(make_tree(tmp_path / "tree"))
    folder = f"{remote.root}/trees/sha256/{digest.removeprefix('sha256:')}"
    manifest = json.loads(remote.fs.cat_file(f"{folder}.json"))
    manifest["files"]["ids.json"] = {"size_bytes": 4, "sha256": sha256(b"evil")}
    remote.fs.pipe_file(f"{folder}/ids.json", b"evil")
    remote.fs.pipe_file(f"{folder}.json", json.dumps(manifest).encode())
    for call in (lambda: trees.verify(digest), lambda: trees.fetch_tree(digest, tmp_path / "new")):
        with pytest.raises(DigestMismatch, match="its files have the digest"):
            call()
    assert not (tmp_path / "new").exists() and hidden(tmp_path) == []


def test_nothing_is_fetched_over_something_else(trees: TreeStore, tmp_path: Path) -> None:
    digest = trees.put_tree(make_tree(tmp_path / "tree"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for target in ("taken", "file"):
        with pytest.raises(Conflict, match="exists and is not an empty folder"):
            trees.fetch_tree(digest, tmp_path / target)
    (tmp_path / "empty").mkdir()
    trees.fetch_tree(digest, tmp_path / "empty")
    assert contents(tmp_path / "empty") == contents(tmp_path / "tree")


# --- interruptions ---------------------------------------------------------------------------------------------------


def fail_at(fs: Recorded, step: str, name: str) -> None:
    def fail(called: str, path: str) -> None:
        if called == step and path.endswith(name):
            raise PermissionError("not now")

    fs.before = fail


def test_an_interrupted_put_goes_on_where_it_stopped(recorded: tuple[TreeStore, Recorded], tmp_path: Path) -> None:
    trees, fs = recorded
    tree = make_tree(tmp_path / "tree")
    fail_at(fs, "put_file", "b c.jpg")
    with pytest.raises(ArtifactUnavailable, match="not now"):
        trees.put_tree(tree)
    assert trees.digests() == ()
    sent = [name for step, name in fs.steps if step == "put_file"]
    fs.steps.clear()
    fs.before = lambda step, path: None
    digest = trees.put_tree(tree)
    again = [name for step, name in fs.steps if step == "put_file"]
    assert sent == ["empty", "ids.json", "manifest.json", "a.jpg"]
    assert again == ["b c.jpg", "vectors.npy"]
    trees.verify(digest)


def test_an_interrupted_fetch_goes_on_where_it_stopped(recorded: tuple[TreeStore, Recorded], tmp_path: Path) -> None:
    trees, fs = recorded
    digest = trees.put_tree(make_tree(tmp_path / "tree"))
    fail_at(fs, "cat_file", "b c.jpg")
    with pytest.raises(ArtifactUnavailable, match="not now"):
        trees.fetch_tree(digest, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (part,) = (path for path in tmp_path.iterdir() if path.name.startswith("."))
    (part / "ids.json").write_bytes(b"X" + (part / "ids.json").read_bytes()[1:])  # a crash may leave anything
    fs.steps.clear()
    fs.before = lambda step, path: None
    trees.fetch_tree(digest, tmp_path / "new")
    read = [name for step, name in fs.steps if step == "cat_file" and not name.startswith(digest[7:])]
    assert read == ["ids.json", "b c.jpg", "vectors.npy"]
    assert contents(tmp_path / "new") == contents(tmp_path / "tree")
    assert hidden(tmp_path) == []


def test_files_larger_than_a_piece_are_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    num_bytes = 12 * CHUNK_BYTES
    with open(make_tree(tmp_path / "tree") / "vectors.npy", "wb") as file:
        file.truncate(num_bytes)
    trees = open_trees(tmp_path / "store")
    tracemalloc.start()
    try:
        digest = trees.put_tree(tmp_path / "tree")
        trees.fetch_tree(digest, tmp_path / "new")
        trees.verify(digest)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "new" / "vectors.npy").stat().st_size == num_bytes
    assert peak < 3 * CHUNK_BYTES + MIB
    shutil.rmtree(tmp_path / "store")


class Enough(Exception):
    """Somebody does not want a transfer any more."""


def test_a_transfer_tells_how_far_it_is_and_ends_when_it_is_told_to(tmp_path: Path) -> None:
    trees, tree = open_trees(tmp_path / "store"), make_tree(tmp_path / "tree")
    total = sum(map(len, contents(tree).values()))
    told: list[tuple[int, int]] = []

    def report(num_bytes: int, total_bytes: int) -> None:
        told.append((num_bytes, total_bytes))

    def stop_half_way(num_bytes: int, total_bytes: int) -> None:
        if num_bytes > total / 2:
            raise Enough

    with pytest.raises(Enough):
        trees.put_tree(tree, stop_half_way)
    assert trees.digests() == ()
    digest = trees.put_tree(tree, report)
    assert told[0] == (0, 0) and (told[-1], sorted(told)) == ((total, total), told)
    first = next(num_bytes for num_bytes, total_bytes in told if total_bytes)
    assert total / 2 < first < total  # what was sent before counts
    with pytest.raises(Enough):
        trees.fetch_tree(digest, tmp_path / "new", stop_half_way)
    assert not (tmp_path / "new").exists()
    told.clear()
    trees.fetch_tree(digest, tmp_path / "new", report)
    assert told[0][0] > total / 2 and told[-1] == (total, total)


def test_one_small_file_is_read_without_the_others(trees: TreeStore, remote: Place, tmp_path: Path) -> None:
    digest = trees.put_tree(make_tree(tmp_path / "tree"))
    assert trees.read(digest, "media/a.jpg") == (tmp_path / "tree/media/a.jpg").read_bytes()
    with pytest.raises(ArtifactNotFound, match="no file 'other'"):
        trees.read(digest, "other")
    with pytest.raises(ArtifactNotFound):
        trees.read(ABSENT, "ids.json")
    remote.fs.pipe_file(f"{remote.root}/trees/sha256/{digest.removeprefix('sha256:')}/ids.json", b"evil")
    with pytest.raises(DigestMismatch):
        trees.read(digest, "ids.json")


def test_what_fetches_left_is_swept_once_it_is_old_and_nobody_works_at_it(
    recorded: tuple[TreeStore, Recorded], tmp_path: Path
) -> None:
    trees, fs = recorded
    digest = trees.put_tree(make_tree(tmp_path / "tree"))
    fail_at(fs, "cat_file", "b c.jpg")
    with pytest.raises(ArtifactUnavailable):
        trees.fetch_tree(digest, tmp_path / "into" / "new")

    def sweep(*_: object) -> None:
        sweep_fetches(tmp_path / "into", time.time() + 60)

    sweep_fetches(tmp_path / "into", time.time() - 60)
    assert len(hidden(tmp_path / "into")) == 1
    fs.before = lambda step, path: None
    trees.fetch_tree(digest, tmp_path / "into" / "new", sweep)
    assert contents(tmp_path / "into" / "new") == contents(tmp_path / "tree")
    fail_at(fs, "cat_file", "b c.jpg")
    with pytest.raises(ArtifactUnavailable):
        trees.fetch_tree(digest, tmp_path / "into" / "other")
    sweep()
    assert hidden(tmp_path / "into") == [] and (tmp_path / "into" / "new").is_dir()


# --- others at the same time -----------------------------------------------------------------------------------------


def test_threads_that_fetch_to_one_place_wait_for_each_other(
    recorded: tuple[TreeStore, Recorded], tmp_path: Path
) -> None:
    trees, fs = recorded
    digest = trees.put_tree(make_tree(tmp_path / "tree"))
    fs.steps.clear()
    with ThreadPoolExecutor(6) as threads:
        jobs = [threads.submit(fetched_or_there, trees, digest, tmp_path / "new") for _ in range(6)]
        outcomes = [job.result() for job in jobs]
    assert True in outcomes
    assert contents(tmp_path / "new") == contents(tmp_path / "tree")
    assert [name for _, name in fs.steps].count("vectors.npy") == 1
    assert hidden(tmp_path) == []


def fetched_or_there(trees: TreeStore, digest: str, target: Path) -> bool:
    try:
        trees.fetch_tree(digest, target)
    except Conflict:  # it was there before this one began
        return False
    return True


def put_and_fetch(location: str, folders: list[str], targets: str, seed: int) -> None:
    trees: Any = open_trees(location)
    for step in range(len(folders)):
        folder = folders[(seed + step) % len(folders)]
        digest = trees.put_tree(folder)
        for target in (Path(targets, f"own-{seed}-{step}"), Path(targets, f"shared-{Path(folder).name}")):
            fetched_or_there(trees, digest, target)
            assert contents(target) == contents(Path(folder))


def test_eight_processes_may_put_and_fetch_the_same_at_once(tmp_path: Path) -> None:
    folders = [make_tree(tmp_path / "trees" / str(index), str(index)) for index in range(3)]
    arguments = (f"file://{tmp_path}/store", [str(folder) for folder in folders], str(tmp_path / "targets"))
    processes = [forks().Process(target=put_and_fetch, args=(*arguments, seed)) for seed in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    trees = open_trees(tmp_path / "store")
    assert len(trees.digests()) == len(folders)
    assert trees.leftovers(0) == ()
    assert hidden(tmp_path / "targets") == []
