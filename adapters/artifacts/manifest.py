"""The manifest of an artifact: name, size and digest of each file. It is written last, so an artifact exists once it does.

    {"format_version": 1, "digest": "sha256:...", "files": {"README.md": {"size_bytes": 7, "sha256": "sha256:..."}}}

A package's digest is that of its files' bytes (`adapters.package.files_digest`); a tree's is that of its manifest, so a
tree is never in memory as a whole.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, ValidationError

from adapters.config import Digest, Strict, describe
from adapters.errors import DigestMismatch, InvalidPackage, UnsafePath
from adapters.package import files_digest


class FileRecord(Strict):
    """Size and digest of one file."""

    size_bytes: int = Field(ge=0)
    sha256: Digest


class Manifest(Strict):
    """What an artifact is made of. `files` by their path below its folder, with `/` between the parts."""

    format_version: Literal[1] = 1
    digest: Digest
    files: dict[str, FileRecord] = Field(min_length=1)

    @classmethod
    def of_package(cls, files: Mapping[str, bytes]) -> "Manifest":
        """The manifest of a package's files."""
        records = {name: FileRecord(size_bytes=len(data), sha256=sha256(data)) for name, data in files.items()}
        return cls(digest=files_digest(files), files=records)

    @classmethod
    def of_tree(cls, records: Mapping[str, FileRecord]) -> "Manifest":
        """The manifest of a tree."""
        return cls(digest=tree_digest(records), files=dict(records))

    @classmethod
    def parse(cls, text: bytes, digest: str) -> "Manifest":
        """Read the manifest kept for `digest`. Raises: DigestMismatch for one that is damaged or another artifact's."""
        try:
            manifest = cls.model_validate_json(text)
            for name in manifest.files:
                check_file_name(name)
        except ValidationError as error:
            raise _damaged(digest, describe(error)) from error
        except UnsafePath as error:
            raise _damaged(digest, error.message) from error
        if manifest.digest != digest:
            raise _damaged(digest, f"it is that of {manifest.digest}")
        return manifest

    @property
    def num_bytes(self) -> int:
        """Of all files together."""
        return sum(record.size_bytes for record in self.files.values())

    def check_tree(self) -> None:
        """Refuse a manifest that is not the one its digest was made of. Raises: DigestMismatch."""
        if (found := tree_digest(self.files)) != self.digest:
            raise _damaged(self.digest, f"its files have the digest {found}")

    def dump(self) -> bytes:
        """The manifest as JSON; the same bytes for the same files."""
        return _canonical(self.model_dump(mode="json"))


class Stamp(NamedTuple):
    """What changes with a file."""

    size_bytes: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        """The stamp of a file as it is now. Raises: OSError, UnsafePath for a link, folder or device."""
        status = os.stat(path, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode):
            raise UnsafePath(f"{path.name!a} is not a regular file", param="path")
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


def check_file_name(name: str) -> str:
    """Return `name` when it may be the path of a file below a folder. Raises: UnsafePath."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in name or not name.isprintable():
        raise UnsafePath(f"{name[:100]!a} is no plain path below a folder", param="path")
    return name


def tree_files(folder: Path) -> Iterator[str]:
    """The files below a folder, as `Manifest` names them, sorted. Raises: UnsafePath for a link or device, OSError."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            yield from (f"{entry.name}/{name}" for name in tree_files(Path(entry.path)))
        elif entry.is_file(follow_symlinks=False):
            yield check_file_name(entry.name)
        else:
            raise UnsafePath(f"{entry.name!a} is not a regular file", param="path")


def tree_digest(files: Mapping[str, FileRecord]) -> str:
    """The digest of a tree: of name, size and digest of each of its files."""
    return sha256(_canonical({name: record.model_dump(mode="json") for name, record in files.items()}))


def sha256(data: bytes) -> str:
    """sha256:..."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def record_of(path: Path) -> FileRecord:
    """Size and digest of a file, read piece by piece. Raises: OSError."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(size_bytes=file.tell(), sha256=f"sha256:{digest}")


def tree_manifest(folder: Path, before_each: Callable[[], object] = lambda: None) -> tuple[Manifest, dict[str, Stamp]]:
    """The manifest of a folder, and the stamp each file had before it was read; `before_each` file that is called.

    Raises: InvalidPackage for a folder that cannot be read or holds no file, UnsafePath for a link, device or odd name.
    """
    try:
        stamps = {name: Stamp.of(folder / name) for name in tree_files(folder)}
        records = {}
        for name in stamps:
            before_each()
            records[name] = record_of(folder / name)
    except OSError as error:
        raise InvalidPackage(f"cannot read the folder {str(folder)!r}: {error.strerror}", param="path") from error
    if not records:
        raise InvalidPackage(f"the folder {str(folder)!r} holds no file", param="path")
    return Manifest.of_tree(records), stamps


def _canonical(data: object) -> bytes:
    return json.dumps(data, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def _damaged(digest: str, reason: str) -> DigestMismatch:
    return DigestMismatch(f"the manifest of artifact {digest} is damaged: {reason}", param="digest")
