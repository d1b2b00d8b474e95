"""Writers that are killed, and disks that are full: what is visible afterwards is whole, or nothing is."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from adapters.artifacts import open_store, open_trees
from adapters.errors import ArtifactUnavailable
from adapters.package import files_digest, read_files
from tests.adapters.artifacts.stores import NO_WAITING, a_place, forks, hidden, make_folder

ROOT = Path(__file__).parents[3]
STEPS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.utime")


def die_at(number: int, below: str) -> None:
    """Kill this process, as by `kill -9`, before its `number`th step that changes anything below a folder."""
    num_seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal num_seen
        changes = event in STEPS or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if changes and any(isinstance(each, (str, os.PathLike)) and str(each).startswith(below) for each in arguments):
            num_seen += 1
            if num_seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def killed_at_every_step(
    action: Callable[..., None], folder: Path, *arguments: str, origin: Path | None = None
) -> list[Path]:
    """Run `action(folder / n, *arguments)` in processes of which the nth dies at its nth step; the last one ends by itself.

    Each folder is a copy of `origin` at first, where one is given.
    """
    folders = []
    for number in count(1):
        folders.append(folder / str(number))
        if origin is not None:
            shutil.copytree(origin, folders[-1])
        process = forks().Process(target=dying, args=(action, str(folders[-1]), arguments, number))
        process.start()
        process.join()
        if process.exitcode == 0:
            assert number > 5, "it should have died more often than this"
            return folders
        assert process.exitcode == -signal.SIGKILL
    raise AssertionError


def dying(action: Callable[..., None], folder: str, arguments: tuple[str, ...], number: int) -> None:
    die_at(number, folder)
    action(folder, *arguments)


def put(folder: str, kind: str, package: str) -> None:
    with a_place(kind, Path(folder)) as place:
        place.open().put(package)


def read(folder: str, location: str, digest: str) -> None:
    open_store(location, cache=Path(folder, "cache"), max_cache_bytes=10**9).read(digest)


def put_tree(folder: str, tree: str) -> None:
    open_trees(folder).put_tree(tree)


def fetch_tree(folder: str, location: str, digest: str) -> None:
    open_trees(location).fetch_tree(digest, Path(folder, "tree"))


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_killed_put_leaves_no_artifact_or_a_whole_one(kind: str, tmp_path: Path) -> None:
    package = make_folder(tmp_path / "p")
    digest = files_digest(read_files(package))
    seen = set()
    for folder in killed_at_every_step(put, tmp_path / "runs", kind, str(package)):
        with a_place(kind, folder) as place:
            store = place.open()
            seen.add(store.has(digest))
            assert store.digests() == ((digest,) if store.has(digest) else ())
            if store.has(digest):
                assert store.read(digest) == read_files(package)
            assert store.put(package) == digest
            store.verify(digest)
            store.sweep_leftovers(0)
            assert store.leftovers(0) == ()
            assert hidden(folder / "store") == []
            store.verify(digest)
    assert seen == {True, False}


def test_a_killed_put_spoils_nothing_of_what_is_there(tmp_path: Path) -> None:
    """It mends one file and writes all of them again: what others may be reading is replaced at once, or stays."""
    package = make_folder(tmp_path / "p")
    with a_place("file", tmp_path / "origin") as place:
        digest = place.open().put(package)
        place.fs.pipe_file(place.path(digest, "README.md"), b"damaged")
    for folder in killed_at_every_step(put, tmp_path / "runs", "file", str(package), origin=tmp_path / "origin"):
        with a_place("file", folder) as place:
            for name, data in read_files(package).items():
                assert place.fs.cat_file(place.path(digest, name)) in (data, b"damaged")
            place.open().put(package)
            place.open().verify(digest)


def put_until(folder: str, kind: str, package: str, num_bytes: int) -> None:
    """Put a package and be killed by the system when a file grows beyond `num_bytes`."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    put(folder, kind, package)


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("num_bytes", [0, 1, 10_000])
def test_a_put_that_is_killed_in_the_middle_of_a_file_spoils_nothing(kind: str, num_bytes: int, tmp_path: Path) -> None:
    package = make_folder(tmp_path / "p")
    with a_place(kind, tmp_path) as place:
        store = place.open()
        digest = store.put(package)
        place.fs.pipe_file(place.path(digest, "README.md"), b"damaged")
        process = forks().Process(target=put_until, args=(str(tmp_path), kind, str(package), num_bytes))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGXFSZ
        if store.has(digest):
            for name, data in read_files(package).items():
                assert place.fs.cat_file(place.path(digest, name)) in (data, b"damaged")
        store.put(package)
        store.verify(digest)
        store.sweep_leftovers(0)
        assert (store.leftovers(0), hidden(tmp_path)) == ((), [])


def test_a_killed_fetch_leaves_a_cache_that_works(tmp_path: Path) -> None:
    package = make_folder(tmp_path / "p")
    with a_place("file", tmp_path) as place:
        digest = place.open().put(package)
        for folder in killed_at_every_step(read, tmp_path / "runs", place.location, digest):
            place.cache = folder / "cache"
            assert place.open().read(digest) == read_files(package)
            other = place.open().put(make_folder(folder / "other", folder.name))
            assert place.open().read(other)
            assert hidden(place.cache) == []


def make_tree(path: Path) -> Path:
    for name in ("manifest.json", "vectors.npy", "media/a.jpg", "media/deep/b.jpg"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(name.encode() * 5000)
    return path


def test_a_killed_put_of_a_tree_leaves_no_tree_or_a_whole_one(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    for folder in killed_at_every_step(put_tree, tmp_path / "runs", str(tree)):
        trees = open_trees(folder)
        for entry in trees.entries():
            trees.verify(entry.digest)
        digest = trees.put_tree(tree)
        trees.verify(digest)
        trees.sweep_leftovers(0)
        assert trees.digests() == (digest,)
        assert trees.leftovers(0) == ()


def test_a_killed_fetch_of_a_tree_leaves_no_tree_or_a_whole_one(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    trees = open_trees(tmp_path / "store")
    digest = trees.put_tree(tree)
    for folder in killed_at_every_step(fetch_tree, tmp_path / "runs", f"file://{tmp_path}/store", digest):
        target = folder / "tree"
        if not target.exists():
            trees.fetch_tree(digest, target)
        assert {path.relative_to(target): path.read_bytes() for path in target.rglob("*") if path.is_file()} == {
            path.relative_to(tree): path.read_bytes() for path in tree.rglob("*") if path.is_file()
        }
        assert hidden(folder) == []


# --- full disks ------------------------------------------------------------------------------------------------------


def write_what_does_not_fit(full: str, package: str, location: str, digest: str, tree: str) -> dict[str, str]:
    """What each writer says when there is no room below `full`."""
    said = {}
    for name, where in (("folder", f"{full}/folder"), ("file", f"file://{full}/file")):
        store = open_store(where, cache=f"{full}/unused-{name}", max_cache_bytes=10**9, retries=NO_WAITING)
        try:
            store.put(package)
        except ArtifactUnavailable as error:
            said[name] = error.message
        assert (store.digests(), hidden(Path(full))) == ((), [])
    cached = open_store(location, cache=f"{full}/cache", max_cache_bytes=10**9)
    assert cached.read(digest) == read_files(Path(package))  # served all the same
    assert (list(Path(full, "cache/sha256").iterdir()), hidden(Path(full))) == ([], [])
    trees = open_trees(location, retries=NO_WAITING)
    try:
        trees.fetch_tree(tree, Path(full, "tree"))
    except ArtifactUnavailable as error:
        said["tree"] = error.message
    assert not Path(full, "tree").exists()
    return said


def run_in_a_full_file_system(arguments: list[str]) -> dict[str, str]:
    """In a file system of one megabyte that only this process sees. Skips where the system does not allow that."""
    mount = 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"'
    code = (
        "import json, sys; from tests.adapters.artifacts.test_crashes import write_what_does_not_fit as write; "
        "print(json.dumps(write(*sys.argv[1:])))"
    )
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, arguments[0]]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode != 0:
        pytest.skip("no file system of one's own can be mounted here")
    done = subprocess.run(
        [*command, sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return said


def test_a_full_disk_leaves_nothing_and_is_named(tmp_path: Path) -> None:
    package = make_folder(tmp_path / "p", num_bytes=400_000)  # three such files
    with a_place("file", tmp_path) as place:
        digest = place.open().put(package)
        tree = open_trees(place.location).put_tree(package)
        (tmp_path / "full").mkdir()
        arguments = [str(tmp_path / "full"), str(package), place.location, digest, tree]
        said = run_in_a_full_file_system(arguments)
    assert said.keys() == {"folder", "file", "tree"}
    assert all("No space left on device" in message for message in said.values())


def write_under_a_limit(*arguments: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    said = write_what_does_not_fit(*arguments)
    assert said.keys() == {"folder", "file", "tree"}
    assert all("File too large" in message for message in said.values())


def test_a_file_that_may_not_be_written_leaves_nothing_and_is_named(tmp_path: Path) -> None:
    package = make_folder(tmp_path / "p")
    with a_place("file", tmp_path) as place:
        digest = place.open().put(package)
        tree = open_trees(place.location).put_tree(package)
        arguments = (str(tmp_path / "limited"), str(package), place.location, digest, tree)
        process = forks().Process(target=write_under_a_limit, args=arguments)
        process.start()
        process.join()
    assert process.exitcode == 0
