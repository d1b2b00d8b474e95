"""The file system as galleries use it: digests, writing whole or not at all, build locks, numbered folders, mapped arrays.

Knows nothing of items, manifests or vectors; what the files hold and why is for the other modules to know.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from service.errors import GalleryBusy
from service.gallery.frames import Floats

_LAST_VERSION = ".last-version"


# --- digests ---------------------------------------------------------------------------------------------------------


def canonical_json(data: object) -> bytes:
    """JSON in one form. Raises: ValueError for NaN, infinities and lone surrogates."""
    text = json.dumps(data, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8")


def digest_of(data: bytes) -> str:
    """sha256:..."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def digest_file(path: Path) -> tuple[str, int]:
    """(sha256:..., size in bytes)."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return f"sha256:{digest.hexdigest()}", file.tell()


def stamp(file: Path | None) -> tuple[int, int]:
    """(size, modification time in ns); (-1, -1) for a file that is not there, (0, 0) where there is none to be."""
    if file is None:
        return (0, 0)
    try:
        status = os.stat(file)
    except OSError:
        return (-1, -1)
    return (status.st_size, status.st_mtime_ns)


def regular_stamp(path: Path) -> tuple[int, int]:
    """(size, modification time in ns). Raises: OSError, also for a folder or pipe."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise FileNotFoundError(errno.ENOENT, "not a regular file")
    return status.st_size, status.st_mtime_ns


# --- writing ---------------------------------------------------------------------------------------------------------


def write_file(path: Path, data: bytes) -> None:
    """Put `data` at `path`, as `written_file` does."""
    with written_file(path) as file:
        file.write(data)


@contextmanager
def written_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at `path`, whole and synced, when the block ends."""
    temporary = path.with_name(f"{path.name}.{unique_suffix()}.tmp")
    with open(temporary, "wb") as file:
        yield file
        sync(file)
    os.replace(temporary, path)
    sync_folder(path.parent)


def unique_suffix() -> str:
    """This thread of this process: makes names that nobody else uses."""
    return f"{os.getpid()}-{threading.get_ident()}"


def sync(file: BinaryIO) -> None:
    """Wait until what was written is on disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def locked(path: Path, name: str) -> BinaryIO:
    """The open lock file; closing it, or dying, gives the lock back."""
    file = open(path, "ab")  # noqa: SIM115 - held as long as the build
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise GalleryBusy(f"gallery {name!r} is being built already", param="gallery") from error
    return file


# --- version folders -------------------------------------------------------------------------------------------------


def version_numbers(folder: Path) -> list[int]:
    """Versions of the gallery in `folder`, ascending; a folder without a manifest is none."""
    if not folder.is_dir():
        return []
    found = (path.name[1:] for path in folder.iterdir() if re.fullmatch(r"v[1-9][0-9]{0,17}", path.name))
    return sorted(int(number) for number in found if (folder / f"v{number}" / "manifest.json").is_file())


def highest_version(folder: Path) -> int:
    """The highest number ever given, deleted versions included; 0 if there was none."""
    recorded = folder / _LAST_VERSION
    numbers = [int(recorded.read_bytes())] if recorded.exists() else []
    return max([*numbers, *version_numbers(folder)], default=0)


def record_highest_version(folder: Path) -> None:
    """Keep the highest number known after its version is deleted."""
    write_file(folder / _LAST_VERSION, str(highest_version(folder)).encode())


# --- arrays ----------------------------------------------------------------------------------------------------------


def new_array(path: Path, shape: tuple[int, int]) -> "np.memmap[tuple[int, ...], np.dtype[np.float32]]":
    """A file of float32, mapped for writing."""
    return np.lib.format.open_memmap(path, "w+", np.float32, shape)


def mapped_array(path: Path) -> Floats:
    """A matrix mapped for reading. Raises: ValueError if the file holds anything else."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype != np.float32 or array.ndim != 2:
        raise ValueError(f"{path.name} is no matrix of float32")
    return np.asarray(array)


def mapped_bytes(path: Path) -> npt.NDArray[np.uint8]:
    """A file's bytes, mapped for reading."""
    if path.stat().st_size == 0:  # cannot be mapped
        return np.empty(0, np.uint8)
    return np.asarray(np.memmap(path, np.uint8, "r"))
