"""Packages that were read from afar, on a local disk: at most so many bytes, the least recently read go first."""

import fcntl
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from adapters.artifacts.local import LocalArtifactStore
from adapters.errors import ArtifactNotFound, ArtifactUnavailable, DigestMismatch

log = logging.getLogger(__name__)


class PackageCache:
    """A LocalArtifactStore with a bound, shared by all threads and processes of a host.

    Who reads a package holds a lock on its folder, and nothing that is held makes room. One at a time writes: so
    whatever is hidden was left by a writer that died, and goes. `max_bytes` 0 keeps nothing.
    """

    def __init__(self, root: str | os.PathLike[str], max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._root = Path(root)
        self._packages = LocalArtifactStore(root)

    def read(self, digest: str) -> dict[str, bytes] | None:
        """The files of a package, with exactly the bytes that `digest` names; None when it has to be fetched."""
        try:
            folder = self._packages.path(digest)
            with _locked(folder, fcntl.LOCK_SH):
                now = time.time_ns()
                os.utime(folder, ns=(now, now))  # what the least recently read is told by
                return self._packages.read(digest)
        except (ArtifactNotFound, FileNotFoundError):
            return None
        except (DigestMismatch, ArtifactUnavailable, OSError) as error:
            log.warning("a cached package is fetched anew: %s", error)
        with suppress(ArtifactUnavailable):
            self.delete(digest)
        return None

    def has(self, digest: str) -> bool:
        """Whether a package is here, damaged or not; no where that cannot be told."""
        with suppress(ArtifactUnavailable):
            return self._packages.has(digest)
        return False

    def keep(self, digest: str, files: Mapping[str, bytes]) -> None:
        """Keep a package's files, after making room for them. Raises: ArtifactUnavailable for a disk that is full."""
        num_bytes = sum(map(len, files.values()))
        if num_bytes > self.max_bytes:
            return
        with self._writing():
            self._packages.sweep_leftovers(0)
            if not self._packages.has(digest):
                self._make_room(num_bytes)
                self._packages.keep(digest, files)

    def delete(self, digest: str) -> None:
        """Forget a package, unless somebody is reading it."""
        with self._writing():
            self._take(digest)

    def _make_room(self, num_bytes: int) -> None:
        entries = sorted(self._packages.entries(), key=lambda entry: entry.modified_at)
        total = sum(entry.num_bytes for entry in entries)
        for entry in entries:
            if total + num_bytes <= self.max_bytes:
                return
            if self._take(entry.digest):
                total -= entry.num_bytes

    def _take(self, digest: str) -> bool:
        """Delete a package that nobody reads; whether that is so."""
        with suppress(ArtifactNotFound, FileNotFoundError, BlockingIOError):
            with _locked(self._packages.path(digest), fcntl.LOCK_EX | fcntl.LOCK_NB):
                self._packages.delete(digest)
                return True
        return False

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            lock = open(self._root / ".lock", "ab")  # noqa: SIM115 - closed below
        except OSError as error:
            raise ArtifactUnavailable(f"the cache {str(self._root)!r} cannot be written: {error.strerror}") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@contextmanager
def _locked(folder: Path, kind: int) -> Iterator[None]:
    """A lock on a folder. Raises: FileNotFoundError when it is gone, BlockingIOError when LOCK_NB may not wait for it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, kind)
        if not os.path.samestat(os.fstat(descriptor), os.stat(folder)):  # another one by now
            raise FileNotFoundError(folder)
        yield
    finally:
        os.close(descriptor)
