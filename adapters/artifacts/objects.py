"""Files on any file system that fsspec opens: ranged reads, whole writes, one listing; retries, and errors of ours.

The only module that knows fsspec. Paths are relative to the root the URL names. What is not there raises
FileNotFoundError; whatever else goes wrong is tried again where that can help, and becomes ArtifactUnavailable.
"""

import errno
import logging
import os
import random
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import fsspec

from adapters.errors import ArtifactUnavailable, InvalidReference

log = logging.getLogger(__name__)

T = TypeVar("T")

CHUNK_BYTES = 8 * 2**20  # of one ranged read: what a transfer holds in memory
URL_PATTERN = r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)"
LOCAL_PROTOCOLS = ("file", "local")
UPLOADS = ".uploads"
# s3fs would hold ten parts of 50 MiB of the file it uploads.
UPLOAD_OPTIONS: Mapping[str, Mapping[str, int]] = {"s3": {"max_concurrency": 2}, "s3a": {"max_concurrency": 2}}
# Names that drivers have for the time of the last change: local and gcsfs, s3fs, adlfs, and the one of files nobody changes.
TIME_FIELDS = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
BUGS = (AssertionError, AttributeError, NameError, TypeError)
# Trying again does not help against these. Many drivers have errors of their own for a network that fails, so all others
# may pass.
PERMANENT_ERRORS = (
    ArithmeticError,
    FileExistsError,
    ImportError,
    IsADirectoryError,
    LookupError,
    NotADirectoryError,
    NotImplementedError,
    PermissionError,
    ValueError,
)
PERMANENT_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)
MAX_REASON_CHARS = 500


@dataclass(frozen=True)
class Retries:
    """How often a failed operation is tried, and how long to wait before the second time; each later wait is 4 times as long.

    It is not tried again once `max_total_s` have gone by: some drivers try for long themselves, and somebody is waiting.
    """

    max_attempts: int = 4
    first_wait_s: float = 0.2
    max_total_s: float = 5.0

    def wait_s(self, attempt: int) -> float:
        """Seconds to wait after this attempt, counted from 1; up to half less, so that many clients do not come back at once."""
        return float(self.first_wait_s * 4 ** (attempt - 1) * random.uniform(0.5, 1.0))


RETRIES = Retries()


class ObjectInfo(NamedTuple):
    """One file. A driver that tells no times gives the present: to it nothing is ever old."""

    num_bytes: int
    modified_at: datetime


class FileSystem(Protocol):
    """What of fsspec.AbstractFileSystem is used here; paths are the driver's own."""

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes: ...
    def pipe_file(self, path: str, value: bytes) -> object: ...
    def put_file(self, lpath: str, rpath: str, **options: Any) -> object: ...
    def find(self, path: str, *, detail: bool, **options: Any) -> Mapping[str, Mapping[str, Any]]: ...
    def info(self, path: str) -> Mapping[str, Any]: ...
    def modified(self, path: str) -> datetime: ...
    def mkdir(self, path: str, create_parents: bool) -> object: ...
    def rm_file(self, path: str) -> object: ...
    def rm(self, path: str, recursive: bool) -> object: ...
    def invalidate_cache(self) -> None: ...


def is_url(location: str) -> bool:
    """Whether this is `scheme://...` and no path. Raises: InvalidReference for `s3:bucket`, which would become a folder."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:(?!.*//)", location, re.DOTALL):
        raise InvalidReference(f"{location!r} is neither a path nor a URL: s3://bucket/folder", param="artifacts_url")
    return "://" in location


def open_objects(url: str, *, retries: Retries = RETRIES) -> "Objects":
    """The files below a URL. Nothing is asked of the network yet.

    Raises: InvalidReference for a URL nothing opens, ArtifactUnavailable naming the package when its driver is missing.
    """
    match = re.fullmatch(URL_PATTERN, url)
    if "::" in url or re.search(r"[*?#\[\]]", url) or not url.isprintable():
        raise InvalidReference(
            f"{_shown(url)!r}: chained URLs, queries and wildcards cannot be used", param="artifacts_url"
        )
    if match is None or not match[2].strip("/"):
        raise InvalidReference(f"{_shown(url)!r} is no URL of a bucket or folder", param="artifacts_url")
    protocol = match[1].lower()
    try:
        driver = fsspec.get_filesystem_class(protocol)
    except ValueError as error:
        raise InvalidReference(f"nothing opens {protocol}:// URLs", param="artifacts_url") from error
    except ImportError as error:
        raise ArtifactUnavailable(
            f"{protocol}:// needs a package that is not installed: {error}", param="artifacts_url"
        ) from error
    root = driver._strip_protocol(url).rstrip("/")
    if protocol in LOCAL_PROTOCOLS:
        return LocalObjects(Path(root), retries=retries)
    return Objects(url, root, lambda: fsspec.url_to_fs(url, skip_instance_cache=True)[0], retries=retries)


class Objects:
    """Files below one root. Thread-safe as far as the driver is; the ones for object stores are."""

    def __init__(self, url: str, root: str, connect: Callable[[], FileSystem], *, retries: Retries = RETRIES) -> None:
        """`root` is what the driver calls the URL; `connect` makes the driver's object, at the first use."""
        self.url = _shown(url)
        self._upload_options = UPLOAD_OPTIONS.get(url.partition("://")[0].lower(), {})
        self._root = root
        self._retries = retries
        self._connect = connect
        self._fs: FileSystem | None = None
        self._lock = threading.Lock()

    def read(self, path: str) -> bytes:
        """A whole small file. Raises: FileNotFoundError."""
        return bytes(self._attempt(f"reading {path}", lambda fs: fs.cat_file(self._full(path))))

    def chunks(self, path: str, num_bytes: int) -> Iterator[bytes]:
        """The first `num_bytes` of a file, in pieces; fewer only when the file is shorter. Raises: FileNotFoundError."""
        for start in range(0, num_bytes, CHUNK_BYTES):
            end = min(start + CHUNK_BYTES, num_bytes)
            chunk = self._range(path, start, end)
            yield chunk
            if len(chunk) != end - start:
                return

    def _range(self, path: str, start: int, end: int) -> bytes:
        what = f"reading bytes {start} to {end} of {path}"
        return bytes(self._attempt(what, lambda fs: fs.cat_file(self._full(path), start=start, end=end)))

    def exists(self, path: str) -> bool:
        """Whether the file is there."""
        try:
            return bool(self._attempt(f"looking for {path}", lambda fs: fs.info(self._full(path))["type"] == "file"))
        except FileNotFoundError:
            return False

    def find(self, folder: str) -> dict[str, ObjectInfo]:
        """Every file below a folder (the root for ""), by its path below it; none when there is no such folder."""
        top = f"{self._full(folder)}/"

        def listed(fs: FileSystem) -> dict[str, ObjectInfo]:
            # The common `find` would take a folder that cannot be listed for an empty one.
            is_common = getattr(fs.find, "__func__", None) is fsspec.AbstractFileSystem.find
            found = fs.find(top.rstrip("/"), detail=True, **({"on_error": _raise_unless_gone} if is_common else {}))
            return {
                name.removeprefix(top): ObjectInfo(int(info["size"]), _modified_at(fs, info))
                for name, info in found.items()
                if name.startswith(top) and info.get("type") == "file"
            }

        try:
            return self._attempt(f"listing {folder}", listed)
        except FileNotFoundError:
            return {}

    def write(self, path: str, data: bytes) -> None:
        """Put a whole file. Object stores show it when it is complete, and not before."""
        self._written(path, lambda fs: fs.pipe_file(self._full(path), data))

    def upload(self, source: Path, path: str) -> None:
        """Put a file from disk, streamed by the driver. Object stores show it when it is complete, and not before."""
        self._written(path, lambda fs: fs.put_file(str(source), self._full(path), **self._upload_options))

    def unfinished(self) -> dict[str, ObjectInfo]:
        """Files whose write was interrupted before they were put in place; an object store keeps such parts to itself."""
        return {}

    def remove(self, path: str) -> None:
        """Remove a file; no error when it is gone already."""
        with suppress(FileNotFoundError):
            self._attempt(f"removing {path}", lambda fs: fs.rm_file(self._full(path)))

    def remove_tree(self, folder: str) -> None:
        """Remove a folder, or a file, and all below; no error when it is gone already."""
        with suppress(FileNotFoundError):
            self._attempt(f"removing {folder}", lambda fs: fs.rm(self._full(folder), recursive=True))

    def _written(self, path: str, write: Callable[[FileSystem], object]) -> None:
        try:
            try:
                self._attempt(f"writing {path}", write)
            except FileNotFoundError:  # a file system with real folders
                self._make_folders(path)
                self._attempt(f"writing {path}", write)
        except FileNotFoundError as error:
            raise ArtifactUnavailable(f"{self.url}: there is no such bucket or folder to write to") from error

    def _make_folders(self, path: str) -> None:
        """Make the folders of a file below the root; never the root, which may be a bucket and its name a mistake."""
        parents = path.split("/")[:-1]
        for depth in range(1, len(parents) + 1):
            self._make_folder("/".join(parents[:depth]))

    def _make_folder(self, path: str) -> None:
        def make(fs: FileSystem) -> None:
            with suppress(FileExistsError):
                fs.mkdir(self._full(path), create_parents=False)

        self._attempt(f"making the folder {path}", make)

    def _attempt(self, what: str, operation: Callable[[FileSystem], T]) -> T:
        """Do it, again where it failed for a reason that may pass. Raises: FileNotFoundError, ArtifactUnavailable."""
        start, attempt = time.monotonic(), 1
        while True:
            try:
                fs = self._connected()
                fs.invalidate_cache()  # of listings: others write too
                return operation(fs)
            except (FileNotFoundError, ArtifactUnavailable, *BUGS):
                raise
            except Exception as error:
                reason = (str(error) or type(error).__name__)[:MAX_REASON_CHARS]
                is_late = time.monotonic() - start > self._retries.max_total_s
                if attempt == self._retries.max_attempts or is_late or not _may_pass(error):
                    raise ArtifactUnavailable(f"{self.url}: {what} failed: {reason}") from error
                log.warning("%s: %s failed and is tried again: %s", self.url, what, reason)
            time.sleep(self._retries.wait_s(attempt))
            attempt += 1

    def _connected(self) -> FileSystem:
        with self._lock:
            if self._fs is None:
                try:
                    self._fs = self._connect()
                except FileNotFoundError as error:  # of the driver's own files, such as a key
                    raise ArtifactUnavailable(f"{self.url} cannot be opened: {error}") from error
            return self._fs

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root


class LocalObjects(Objects):
    """Files of a local or mounted folder: synced, and put in place by a rename.

    `root/.uploads/` holds what is being written, on the same file system and outside of every artifact.
    """

    def __init__(self, root: Path, *, retries: Retries = RETRIES) -> None:
        connect = partial(fsspec.filesystem, "file", skip_instance_cache=True)
        super().__init__(f"file://{root}", str(root), connect, retries=retries)

    def write(self, path: str, data: bytes) -> None:
        """See Objects."""
        self._attempt(f"writing {path}", lambda _: self._put_in_place(path, lambda new: new.write_bytes(data)))

    def upload(self, source: Path, path: str) -> None:
        """See Objects."""
        self._attempt(f"writing {path}", lambda _: self._put_in_place(path, lambda new: shutil.copyfile(source, new)))

    def unfinished(self) -> dict[str, ObjectInfo]:
        """See Objects."""
        return {f"{UPLOADS}/{name}": info for name, info in self.find(UPLOADS).items()}

    def remove_tree(self, folder: str) -> None:
        """See Objects."""
        path = Path(self._full(folder))
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            self.remove(folder)

    def _put_in_place(self, path: str, fill: Callable[[Path], object]) -> None:
        target = Path(self._full(path))
        temporary = Path(self._full(UPLOADS)) / secrets.token_hex(8)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            fill(temporary)
            _sync(temporary)
            for _ in range(self._retries.max_attempts):
                target.parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):  # somebody deletes the artifact and its folder: make it anew
                    os.replace(temporary, target)
                    _sync(target.parent)
                    return
            raise ArtifactUnavailable(f"{self.url}: {path} is removed whenever it is written")
        finally:
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _may_pass(error: Exception) -> bool:
    return not isinstance(error, PERMANENT_ERRORS) and getattr(error, "errno", None) not in PERMANENT_CODES


def _modified_at(fs: FileSystem, info: Mapping[str, Any]) -> datetime:
    for field in TIME_FIELDS:
        match info.get(field):
            case datetime() as time_:
                return time_ if time_.tzinfo else time_.replace(tzinfo=UTC)
            case int() | float() as seconds:
                return datetime.fromtimestamp(seconds, UTC)
            case str() as text:
                return datetime.fromisoformat(text)
    try:
        return fs.modified(info["name"])
    except (NotImplementedError, FileNotFoundError):
        return datetime.now(UTC)


def _shown(url: str) -> str:
    """A URL for messages: without a user's name and password."""
    return re.sub(r"//[^/@]*@", "//", url)
