"""Whole folder trees, such as gallery versions, by digest: put somewhere else and fetched back, file by file.

Nothing here holds a file in memory. What was transferred before an interruption is not transferred again.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters.artifacts.base import hex_of
from adapters.artifacts.manifest import FileRecord, Manifest, Stamp, record_of, tree_manifest
from adapters.artifacts.objects import Objects
from adapters.artifacts.remote import RemoteFolders
from adapters.errors import ArtifactNotFound, ArtifactUnavailable, Conflict, DigestMismatch, InvalidPackage


class TreeStore(RemoteFolders):
    """Trees on a file system that fsspec opens, below `trees/`: apart from packages, which others list and delete."""

    def __init__(self, objects: Objects) -> None:
        super().__init__(objects, "trees/sha256")

    def put_tree(self, folder: str | os.PathLike[str]) -> str:
        """Keep a copy of a folder and all below, and return its digest: of the path, size and bytes of every file.

        The folder must not change meanwhile. Files that are there with the right size are not sent again, so an
        interrupted put goes on where it stopped; `verify` reads them all. Empty folders, times and modes are not kept.
        Raises: InvalidPackage for a folder that cannot be read, holds nothing or changes; UnsafePath for a link, a
        device or a name with control characters; ArtifactUnavailable.
        """
        source = Path(folder)
        manifest, stamps = tree_manifest(source)

        def send(name: str, path: str) -> None:
            self._objects.upload(source / name, path)
            if not _is_unchanged(source / name, stamps[name]):
                self._objects.remove(path)  # it may be of the right size, which the next put would trust
                raise InvalidPackage(f"{name} changed while it was read", param="path")

        stale = self._stale(manifest)
        if stale or not self._has_manifest(manifest):
            self._complete(manifest, stale, send)
        return manifest.digest

    def fetch_tree(self, digest: str, target: str | os.PathLike[str]) -> None:
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
            with _held(part, whole) as is_ours:
                if is_ours:
                    self._fetch_files(manifest, part)
                    os.rename(part, whole)
                    _sync(whole.parent)
                elif not all(_has_size(whole / name, record) for name, record in manifest.files.items()):
                    raise _taken(whole)
        except OSError as error:
            if _is_taken(whole):
                raise _taken(whole) from error
            reason = error.strerror or str(error)
            raise ArtifactUnavailable(f"tree {digest} cannot be written to {str(whole)!r}: {reason}") from error

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

    def _fetch_files(self, manifest: Manifest, part: Path) -> None:
        for name, record in manifest.files.items():
            path = part / name
            if not _is_whole(path, record):
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "wb") as file:
                    for chunk in self._contents(manifest, name):
                        file.write(chunk)
                    file.flush()
                    os.fsync(file.fileno())
        for folder, _, _ in os.walk(part):
            _sync(Path(folder))


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
def _held(part: Path, whole: Path) -> Iterator[bool]:
    """The folder `part`, made and locked; False when, by the time it could be locked, it had become `whole`."""
    part.parent.mkdir(parents=True, exist_ok=True)
    while not _is_taken(whole):
        part.mkdir(exist_ok=True)
        descriptor = os.open(part, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if part.exists() and os.path.samestat(os.fstat(descriptor), os.stat(part)):
                yield True
                return
        finally:
            os.close(descriptor)
    yield False


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
