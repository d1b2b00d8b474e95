"""Where packages are kept: by digest, so that a name can never come to mean other bytes.

Knows folders and digests; what is in a package, beyond which files, is checked before it is put here.
"""

import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Protocol

from adapters.config import DIGEST_PATTERN
from adapters.errors import ArtifactNotFound, Conflict, DigestMismatch, InvalidPackage, InvalidReference
from adapters.package import files_digest, read_files, write_files


class ArtifactStore(Protocol):
    """Packages by their package digest."""

    def put(self, package_dir: str | os.PathLike[str]) -> str:
        """Keep a copy of a package and return its digest; once kept, putting it again changes nothing."""

    def path(self, digest: str) -> Path:
        """The local folder of a package, to be read and never written. Raises: ArtifactNotFound."""

    def verify(self, digest: str) -> None:
        """Read every byte again. Raises: ArtifactNotFound, DigestMismatch."""

    def has(self, digest: str) -> bool:
        """Whether the package is here."""

    def delete(self, digest: str) -> None:
        """Forget a package; no error when it is gone already."""

    def digests(self) -> tuple[str, ...]:
        """Every digest kept, sorted."""


class LocalArtifactStore:
    """Packages as folders `root/sha256/<hex>/`. Any number of threads and processes may share a root.

    A folder appears and disappears by one rename, so nobody ever sees half a package. A crash can leave a hidden
    folder behind, never a wrong one.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self.folder = self.root / "sha256"
        self.folder.mkdir(parents=True, exist_ok=True)

    def put(self, package_dir: str | os.PathLike[str]) -> str:
        """See ArtifactStore. A damaged copy kept under the same digest is replaced. Raises: InvalidPackage."""
        files = read_files(Path(package_dir))
        digest = files_digest(files)
        if self.has(digest) and not self._is_intact(digest):
            self.delete(digest)
        try:
            write_files(self._folder_of(digest), files)
        except Conflict:
            if not self.has(digest):  # what is in the way is not a package folder
                raise
        return digest

    def path(self, digest: str) -> Path:
        """See ArtifactStore."""
        folder = self._folder_of(digest)
        if not folder.is_dir():
            raise ArtifactNotFound(f"no artifact {digest}", param="digest")
        return folder

    def verify(self, digest: str) -> None:
        """See ArtifactStore."""
        folder = self.path(digest)
        try:
            found = files_digest(read_files(folder))
        except InvalidPackage as error:
            self.path(digest)  # deleted meanwhile: say that instead
            raise DigestMismatch(f"artifact {digest} is damaged: {error}", param="digest") from error
        if found != digest:
            raise DigestMismatch(f"artifact {digest} is damaged: its files have the digest {found}", param="digest")

    def has(self, digest: str) -> bool:
        """See ArtifactStore."""
        return self._folder_of(digest).is_dir()

    def delete(self, digest: str) -> None:
        """See ArtifactStore."""
        folder = self._folder_of(digest)
        doomed = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.deleted")
        try:
            os.rename(folder, doomed)
        except FileNotFoundError:
            return
        shutil.rmtree(doomed, ignore_errors=True)

    def digests(self) -> tuple[str, ...]:
        """See ArtifactStore."""
        names = sorted(f"sha256:{entry.name}" for entry in os.scandir(self.folder) if entry.is_dir())
        return tuple(name for name in names if re.fullmatch(DIGEST_PATTERN, name))

    def _is_intact(self, digest: str) -> bool:
        try:
            self.verify(digest)
        except (ArtifactNotFound, DigestMismatch):
            return False
        return True

    def _folder_of(self, digest: str) -> Path:
        if not re.fullmatch(DIGEST_PATTERN, digest):
            raise InvalidReference(
                f"{digest[:100]!r} is no digest: sha256: and 64 lower-case hex digits", param="digest"
            )
        return self.folder / digest.removeprefix("sha256:")
