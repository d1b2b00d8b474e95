"""Whole folder trees, such as gallery versions, by digest: put somewhere else and fetched back, file by file.

Nothing here holds a file in memory. What was transferred before an interruption is not transferred again.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapters.artifacts.base import hex_of
from adapters.artifacts.manifest import FileRecord, Manifest, Stamp, record_of, tree_manifest
from adapters.artifacts.objects import Objects
from adapters.artifacts.remote import RemoteFolders
from adapters.errors import ArtifactNotFound, ArtifactUnavailable, Conflict, DigestMismatch, InvalidPackage

Report = Callable[[int, int], None]
"""Told now and then how many bytes of how many are through: (0, 0) while that is not known, or another one works at the
same tree. What it raises ends the transfer; what was transferred stays for the next attempt."""

LOCK_POLL_S = 0.02


def no_report(num_bytes: int, total_bytes: int) -> None:
    """Nobody wants to know."""


class TreeStore(RemoteFolders):
    """Trees on a file system that fsspec opens, below `trees/`: apart from packages, which others list and delete."""

    def __init__(self, objects: Objects) -> None:
        super().__init__(objects, "trees/sha256")

    def put_tree(self, folder: str | os.PathLike[str], report: Report = no_report) -> str:
        """Keep a copy of a folder and all below, and return its digest: of the path, size and bytes of every file.

        The folder must not change meanwhile. Files that are there with the right size are not sent again, so an
        interrupted put goes on where it stopped; `verify` reads them all. Empty folders, times and modes are not kept.
        Raises: InvalidPackage for a folder that cannot be read, holds nothing or changes; UnsafePath for a link, a
        device or a name with control characters; ArtifactUnavailable.
        """
        source = Path(folder)
        manifest, stamps = tree_manifest(source, lambda: report(0, 0))
        stale = self._stale(manifest)
        num_bytes = manifest.num_bytes - sum(manifest.files[name].size_bytes for name in stale)
        report(num_bytes, manifest.num_bytes)

        def send(name: str, path: str) -> None:
            nonlocal num_bytes
            self._objects.upload(source / name, path)
            if not _is_unchanged(source / name, stamps[name]):
                self._objects.remove(path)  # it may be of the right size, which the next put would trust
                raise InvalidPackage(f"{name} changed while it was read", param="path")
            num_bytes = min(num_bytes + manifest.files[name].size_bytes, manifest.num_bytes)
            report(num_bytes, manifest.num_bytes)

        if stale or not self._has_manifest(manifest):
            self._complete(manifest, stale, send)
        return manifest.digest

    def fetch_tree(self, digest: str, target: str | os.PathLike[str], report: Report = no_report) -> None:
        """Make the folder `target` with the files of a tree, synced to disk, by one rename: a whole tree or none.

        Until then they are in a hidden folder beside it, which stays after an interruption: the next attempt takes
        from it what is whole. Two who fetch the same tree to the same place wait for each other.
        Raises: Conflict when `target` exists and is not an empty folder; ArtifactNotFound, DigestMismatch;
        ArtifactUnavailable, also for a disk that is full.
        """
        manifest = self._manifest(digest)
        manifest.check_tree()
        whole = Path(target)
        if _is_taken(whole):
            raise _taken(whole)
        self._check_sizes(manifest)
        part = whole.with_name(f".{whole.name}.{hex_of(digest)[:16]}.part")
        try:
            with _held(part, whole, lambda: report(0, 0)) as is_ours:
                if is_ours:
                    self._fetch_files(manifest, part, report)
                    os.rename(part, whole)
                    _sync(whole.parent)
                elif not all(_has_size(whole / name, record) for name, record in manifest.files.items()):
                    raise _taken(whole)
        except OSError as error:
            if _is_taken(whole):
                raise _taken(whole) from error
            reason = error.strerror or str(error)
            raise ArtifactUnavailable(f"tree {digest} cannot be written to {str(whole)!r}: {reason}") from error

    def read(self, digest: str, name: str) -> bytes:
        """One small file of a tree. Raises: ArtifactNotFound, also where the tree has no such file; DigestMismatch."""
        manifest = self._manifest(digest)
        manifest.check_tree()
        if name not in manifest.files:
            raise ArtifactNotFound(f"tree {digest} in {self.url} has no file {name!a}", param="digest")
        return b"".join(self._contents(manifest, name))

    def verify(self, digest: str) -> None:
        """Read every byte that is kept again. Raises: ArtifactNotFound, DigestMismatch."""
        manifest = self._manifest(digest)
        manifest.check_tree()
        self._check_sizes(manifest)
        for name in manifest.files:
            for _ in self._contents(manifest, name):
                pass

    def _has_manifest(self, manifest: Manifest) -> bool:
        try:
            return self._manifest(manifest.digest) == manifest
        except (ArtifactNotFound, DigestMismatch):
            return False

    def _fetch_files(self, manifest: Manifest, part: Path, report: Report) -> None:
        num_bytes = sum(record.size_bytes for name, record in manifest.files.items() if _has_size(part / name, record))
        report(num_bytes, manifest.num_bytes)
        for name, record in manifest.files.items():
            path = part / name
            if not _is_whole(path, record):
                num_bytes -= record.size_bytes if _has_size(path, record) else 0
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "wb") as file:
                    for chunk in self._contents(manifest, name):
                        file.write(chunk)
                        num_bytes += len(chunk)
                        report(num_bytes, manifest.num_bytes)
                    file.flush()
                    os.fsync(file.fileno())
        for folder, _, _ in os.walk(part):
            _sync(Path(folder))


def sweep_fetches(folder: Path, before: float) -> None:
    """Remove what fetches into `folder` left that nobody went on with since a time (seconds since 1970)."""
    for part in folder.glob(".*.part"):
        with suppress(OSError):  # finished, or removed, since it was listed
            newest = max(path.stat().st_mtime for path in (part, *part.rglob("*")))
            descriptor = os.open(part, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if newest < before:
                    shutil.rmtree(part)
            finally:
                os.close(descriptor)


def _has_size(path: Path, record: FileRecord) -> bool:
    return path.is_file() and path.stat().st_size == record.size_bytes


def _is_whole(path: Path, record: FileRecord) -> bool:
    return _has_size(path, record) and record_of(path) == record


def _is_unchanged(path: Path, stamp: Stamp) -> bool:
    try:
        return Stamp.of(path) == stamp
    except OSError:
        return False


def _is_taken(target: Path) -> bool:
    return target.exists() and not (target.is_dir() and not any(target.iterdir()))


def _taken(target: Path) -> Conflict:
    return Conflict(f"{str(target)!r} exists and is not an empty folder", param="path")


@contextmanager
def _held(part: Path, whole: Path, wait: Callable[[], object]) -> Iterator[bool]:
    """The folder `part`, made and locked; False when, by the time it could be locked, it had become `whole`.

    While somebody else has it, `wait` is called now and then.
    """
    part.parent.mkdir(parents=True, exist_ok=True)
    while not _is_taken(whole):
        part.mkdir(exist_ok=True)
        descriptor = os.open(part, os.O_RDONLY | os.O_DIRECTORY)
        try:
            while not _is_locked(descriptor):
                wait()
                time.sleep(LOCK_POLL_S)
            if part.exists() and os.path.samestat(os.fstat(descriptor), os.stat(part)):
                yield True
                return
        finally:
            os.close(descriptor)
    yield False


def _is_locked(descriptor: int) -> bool:
    """Take the lock, if nobody else has it; whether that worked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
