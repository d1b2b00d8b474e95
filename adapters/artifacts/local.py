"""Packages in a local folder."""

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from adapters.artifacts.base import Entry, Leftover, Made, aged, hex_of
from adapters.config import DIGEST_PATTERN
from adapters.errors import ArtifactNotFound, ArtifactUnavailable, Conflict, DigestMismatch, InvalidPackage
from adapters.package import files_digest, read_files, write_files


class LocalArtifactStore:
    """Packages as folders `root/sha256/<hex>/`. Any number of threads and processes may share a root.

    A folder appears and disappears by one rename, so nobody ever sees half a package. A crash can leave a hidden
    folder behind, never a wrong one.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self.folder = self.root / "sha256"
        with self._typed_errors("made"):
            self.folder.mkdir(parents=True, exist_ok=True)

    def put(self, package_dir: str | os.PathLike[str]) -> str:
        """See ArtifactStore. A damaged copy kept under the same digest is replaced."""
        files = read_files(Path(package_dir))
        digest = files_digest(files)
        self.keep(digest, files)
        return digest

    def keep(self, digest: str, files: Mapping[str, bytes]) -> None:
        """Keep the files of a package under their digest. A damaged copy kept there is replaced."""
        if self.has(digest) and not self._is_intact(digest):
            self.delete(digest)
        with self._typed_errors("written"):
            try:
                write_files(self._folder_of(digest), files)
            except Conflict:
                if not self.has(digest):  # what is in the way is not a package folder
                    raise

    def path(self, digest: str) -> Path:
        """The folder of a package, to be read and never written. Raises: ArtifactNotFound."""
        folder = self._folder_of(digest)
        if not self.has(digest):
            raise ArtifactNotFound(f"no artifact {digest}", param="digest")
        return folder

    def read(self, digest: str) -> dict[str, bytes]:
        """See ArtifactStore."""
        files = self._files(digest)
        _check_digest(digest, files_digest(files))
        return files

    def load(self, digest: str, make: Callable[[Mapping[str, bytes]], Made]) -> Made:
        """See ArtifactStore. The files are compared on another thread, beside `make`."""
        files = self._files(digest)
        with ThreadPoolExecutor(1, thread_name_prefix="digest") as thread:
            found = thread.submit(files_digest, files)
            try:
                return make(files)
            finally:
                _check_digest(digest, found.result())

    def _files(self, digest: str) -> dict[str, bytes]:
        """The files as they are. Raises: ArtifactNotFound, ArtifactUnavailable, DigestMismatch for what are no such files."""
        folder = self.path(digest)
        try:
            return read_files(folder)
        except InvalidPackage as error:
            self.path(digest)  # deleted meanwhile: say that instead
            reason = error.__cause__
            if isinstance(reason, OSError) and not isinstance(reason, (FileNotFoundError, NotADirectoryError)):
                raise ArtifactUnavailable(f"artifact {digest}: {error.message}") from error  # the disk, not the package
            raise DigestMismatch(f"artifact {digest} is damaged: {error.message}", param="digest") from error

    def verify(self, digest: str) -> None:
        """See ArtifactStore."""
        self.read(digest)

    def has(self, digest: str) -> bool:
        """See ArtifactStore."""
        folder = self._folder_of(digest)
        with self._typed_errors("read"):
            return folder.is_dir()

    def is_near(self, digest: str) -> bool:
        """See ArtifactStore."""
        return True

    def delete(self, digest: str) -> None:
        """See ArtifactStore."""
        folder = self._folder_of(digest)
        doomed = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.deleted")
        with self._typed_errors("written"):
            try:
                os.rename(folder, doomed)
            except FileNotFoundError:
                return
        shutil.rmtree(doomed, ignore_errors=True)

    def digests(self) -> tuple[str, ...]:
        """See ArtifactStore."""
        with self._typed_errors("read"):
            names = sorted(f"sha256:{entry.name}" for entry in os.scandir(self.folder) if entry.is_dir())
        return tuple(name for name in names if re.fullmatch(DIGEST_PATTERN, name))

    def entries(self) -> tuple[Entry, ...]:
        """See ArtifactStore."""
        entries = []
        for digest in self.digests():
            folder = self._folder_of(digest)
            with suppress(FileNotFoundError), self._typed_errors("read"):  # deleted meanwhile
                appeared = folder.stat().st_mtime
                entries.append(Entry(digest, _num_bytes(folder), datetime.fromtimestamp(appeared, UTC)))
        return tuple(entries)

    def leftovers(self, older_than_s: float) -> tuple[Leftover, ...]:
        """See ArtifactStore."""
        found = []
        with self._typed_errors("read"):
            hidden = [Path(entry.path) for entry in os.scandir(self.folder) if entry.name.startswith(".")]
        for path in hidden:
            with suppress(FileNotFoundError), self._typed_errors("read"):  # its writer has finished, or another sweeper
                newest = max(each.stat().st_mtime for each in (path, *path.rglob("*")))
                name = path.relative_to(self.root).as_posix()
                found.append(Leftover(name, _num_bytes(path), datetime.fromtimestamp(newest, UTC)))
        return aged(found, older_than_s)

    def sweep_leftovers(self, older_than_s: float) -> tuple[Leftover, ...]:
        """See ArtifactStore."""
        swept = self.leftovers(older_than_s)
        for leftover in swept:
            shutil.rmtree(self.root / leftover.name, ignore_errors=True)
        return swept

    def _is_intact(self, digest: str) -> bool:
        try:
            self.verify(digest)
        except (ArtifactNotFound, DigestMismatch):
            return False
        return True

    def _folder_of(self, digest: str) -> Path:
        return self.folder / hex_of(digest)

    @contextmanager
    def _typed_errors(self, done: str) -> Iterator[None]:
        """What the disk refuses, a full one too, becomes ArtifactUnavailable; what is not there stays FileNotFoundError."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            reason = error.strerror or str(error)
            raise ArtifactUnavailable(f"the store {str(self.root)!r} cannot be {done}: {reason}") from error


def _check_digest(digest: str, found: str) -> None:
    """Raises: DigestMismatch."""
    if found != digest:
        raise DigestMismatch(f"artifact {digest} is damaged: its files have the digest {found}", param="digest")


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
