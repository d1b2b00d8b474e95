"""Galleries on disk: what goes into one, the resumable build, the immutable version, the folder of them all.

    ROOT/NAME/v3/                   one version, never changed after it appears
        manifest.json               GalleryManifest: what it is, and size and digest of every file below
        vectors.npy                 [N, E] float32, unit length
        frames.npy                  [F, E] float32, unnormalised frame features of all items, one after the other (not for texts)
        offsets.npy                 [3, N + 1] int64: where item i starts in frames.npy (rows), items.jsonl and thumbnails.bin (bytes)
        ids.json, items.jsonl       ids in order; id, metadata, text, media reference and frame times of each
        thumbnails.bin              JPEG files, one after the other
        quarantine.jsonl            what was left out, and why
        index.faiss                 the graph of an `hnsw` index
        media/SHA256.EXT            copies, where the build was told to copy
    ROOT/NAME/.build-KEY/           a build in progress: shards, quarantine list, media copies
    ROOT/NAME/.lock                 held by whoever builds
    ROOT/NAME/.last-version         the highest number when one was deleted: a number is never given twice

Every file is written beside its place, synced and renamed, and a version appears by one rename, so a crash leaves a whole version or none.
Knows nothing of models: vectors come from the caller.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import threading
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import BinaryIO, Final, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import AwareDatetime, ConfigDict, Field, JsonValue, ValidationError

from adapters.config import Digest, Preprocessing, Strict, check_name, describe
from adapters.errors import (
    AdapterBankError,
    Conflict,
    ConversionError,
    DigestMismatch,
    InvalidPackage,
    InvalidReference,
    NonFiniteTensor,
    UnsafePath,
)
from service.errors import GalleryBusy, GalleryNotFound, MissingMedia
from service.gallery.frames import DEFAULT_TAU, Floats, Ints, Pooling, frame_attention_weights, pool
from service.gallery.index import IndexKind, VectorIndex

GalleryKind = Literal["video", "image", "text"]

FORMAT_VERSION: Final = 1
NUMERICS_VERSION = "1"
"""Raised whenever the same weights and input would give other vectors than before."""
MAX_ID_CHARS = 200
SHARD_SIZE = 64

_MEDIA_KINDS: dict[str, GalleryKind] = {
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp"), "image"),
    **dict.fromkeys((".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"), "video"),
}
_FILE_NAMES = {"vectors.npy", "offsets.npy", "ids.json", "items.jsonl", "thumbnails.bin", "quarantine.jsonl"}
_COPY_PATTERN = r"media/[0-9a-f]{64}(\.[a-z0-9]{1,8})?"
_CHUNK_BYTES = 2**20
_MAX_NAMES_LISTED = 20
_MAX_MESSAGE_CHARS = 500
_UNIT_TOLERANCE = 1e-3


# --- Identity -------------------------------------------------------------------------------------------------------------


def embedding_key(
    parts: Mapping[str, str],
    weights_digest: str,
    preprocessing: Mapping[str, JsonValue],
    frame_sampling: str,
    pooling: Mapping[str, JsonValue],
    numerics: str = NUMERICS_VERSION,
) -> str:
    """A digest, sha256:..., of everything that decides a vector's numbers: vectors may be compared only where it is equal.

    `parts` are backbone parts by digest; `pooling` the kind and its tau. A number and its float (1, 1.0) count as different.
    """
    return _digest_of(
        {
            "parts": dict(parts),
            "weights_digest": weights_digest,
            "preprocessing": dict(preprocessing),
            "frame_sampling": frame_sampling,
            "pooling": dict(pooling),
            "numerics": numerics,
        }
    )


def check_item_id(item_id: str) -> str:
    """Return `item_id` when it may name an item: 1 to 200 characters of any script, no control characters.

    It never becomes a file name. Raises: InvalidReference.
    """
    if not 1 <= len(item_id) <= MAX_ID_CHARS:
        raise InvalidReference(f"an item id has 1 to {MAX_ID_CHARS} characters, not {len(item_id)}", param="id")
    if any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in item_id):
        raise InvalidReference(f"item id {item_id!a} holds control characters", param="id")
    return item_id


# --- Sources: what shall go in --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """One thing to embed: a media `file`, perhaps with a caption in `text`, or a `text` alone."""

    id: str
    kind: GalleryKind
    file: Path | None = None  # absolute; None for texts
    text: str | None = None
    metadata: Mapping[str, JsonValue] = field(default_factory=dict)


class _Line(Strict):
    """One line of a source manifest."""

    model_config = ConfigDict(strict=True)

    id: str | None = None
    file: str | None = None
    text: str | None = None
    caption: str | None = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)


def read_sources(path: Path, kind: GalleryKind | None = None) -> list[Source]:
    """What a folder or a manifest names, in order; every source is of one kind.

    A folder: all pictures or clips below it by extension, sorted by relative path (the id); hidden names are skipped, and so are files
    of another kind where `kind` is given. A manifest, NAME.jsonl: lines {"file": ...} or {"text": ...} with optional "id",
    "metadata" and, for a file, "caption"; files are relative to the manifest's folder, ids default to the file as written or to the
    line number. Whether files exist is for the build to find: one that is missing is quarantined, not fatal.
    Raises: ConversionError, for a manifest with the line's number.
    """
    path = Path(os.path.abspath(path))
    if path.is_dir():
        placed = list(_folder_sources(path, kind))
    elif path.suffix == ".jsonl" and path.is_file():
        placed = list(_manifest_sources(path))
    else:
        raise ConversionError(f"{path.name} is neither a folder nor a .jsonl file", param="source")
    _check_unique(placed)
    kinds = {source.kind for _, source in placed}
    if not placed:
        raise ConversionError(f"{path.name} holds nothing to embed", param="source")
    if len(kinds) > 1 or (kind is not None and kinds != {kind}):
        wanted = f"{kind} items" if kind else "one kind of item"
        raise ConversionError(
            f"{path.name} holds {' and '.join(sorted(kinds))} items; a gallery holds {wanted}", param="source"
        )
    return [source for _, source in placed]


def sources_digest(sources: Iterable[Source]) -> str:
    """A digest, sha256:..., of ids, texts, metadata, and path, size and modification time of files: changes when a build would."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(_canonical([*_describe_source(source), *_stamp(source.file)]) + b"\n")
    return f"sha256:{digest.hexdigest()}"


def _folder_sources(folder: Path, kind: GalleryKind | None) -> Iterator[tuple[str, Source]]:
    """(where it was found, source), sorted by relative path."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    for file in sorted(found, key=lambda file: file.relative_to(folder).as_posix()):
        media_kind = _MEDIA_KINDS.get(file.suffix.lower())
        if media_kind is None or media_kind != (kind or media_kind):
            continue
        relative = file.relative_to(folder).as_posix()
        with _source_errors(f"{relative!a}"):
            yield relative, Source(check_item_id(relative), media_kind, file)


def _manifest_sources(manifest: Path) -> Iterator[tuple[str, Source]]:
    for number, line in enumerate(manifest.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            place = f"{manifest.name} line {number}"
            with _source_errors(place):
                yield place, _line_source(_Line.model_validate_json(line), number, manifest.parent)


def _line_source(line: _Line, number: int, folder: Path) -> Source:
    _canonical(line.metadata)  # refuses NaN and lone surrogates
    if (line.file is None) == (line.text is None):
        raise ConversionError("needs either 'file' or 'text'")
    if line.file is None:
        if line.caption is not None:
            raise ConversionError("'caption' belongs to a file; a text is its own")
        if not (line.text or "").strip():
            raise ConversionError("'text' is empty")
        return Source(
            check_item_id(str(number) if line.id is None else line.id), "text", None, line.text, line.metadata
        )
    kind = _MEDIA_KINDS.get(PurePosixPath(line.file).suffix.lower())
    if kind is None or "\0" in line.file:
        raise ConversionError(f"{line.file!a} has no extension of a picture or clip we read")
    item_id = line.id if line.id is not None else PurePosixPath(line.file).as_posix()
    return Source(check_item_id(item_id), kind, Path(os.path.abspath(folder / line.file)), line.caption, line.metadata)


@contextmanager
def _source_errors(place: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise ConversionError(f"{place}: {describe(error)}", param="source") from error
    except AdapterBankError as error:
        raise ConversionError(f"{place}: {error.message}", param="source") from error
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{place}: {error}", param="source") from error


def _check_unique(placed: Sequence[tuple[str, Source]]) -> None:
    seen: dict[str, str] = {}
    for place, source in placed:
        if source.id in seen:
            raise ConversionError(f"{seen[source.id]} and {place} both have the id {source.id!r}", param="source")
        seen[source.id] = place


def _describe_source(source: Source) -> list[JsonValue]:
    file = None if source.file is None else os.fsencode(source.file).hex()
    return [source.id, source.kind, file, source.text, dict(source.metadata)]


def _stamp(file: Path | None) -> tuple[int, int]:
    """(size, modification time in ns); (-1, -1) for a file that is not there."""
    if file is None:
        return (0, 0)
    try:
        status = os.stat(file)
    except OSError:
        return (-1, -1)
    return (status.st_size, status.st_mtime_ns)


# --- What a version says about itself -------------------------------------------------------------------------------------


class EmbeddedBy(Strict):
    """The adapter that made the vectors; "__base__" has neither version nor weights."""

    name: str
    version: int | None = None
    weights_digest: Digest | None = None


class GalleryPlan(Strict):
    """What the caller decides about a gallery version before it is built. `pooling` and `tau` mean nothing for texts."""

    name: str
    kind: GalleryKind
    embedding_key: Digest
    adapter: EmbeddedBy
    preprocessing: Preprocessing
    pooling: Pooling = "mean"
    tau: float = Field(default=DEFAULT_TAU, gt=0)
    index: IndexKind = "flat"
    copy_media: bool = False


class FileRecord(Strict):
    """Size and digest of one file of a version."""

    sha256: Digest
    size_bytes: int = Field(ge=0)


class GalleryManifest(GalleryPlan):
    """manifest.json of one version."""

    model_config = ConfigDict(strict=True)

    format_version: Literal[1] = FORMAT_VERSION
    version: int = Field(ge=1)
    num_items: int = Field(ge=1)
    num_quarantined: int = Field(ge=0)
    dimension: int = Field(ge=1)
    numerics: str = NUMERICS_VERSION
    created_at: AwareDatetime
    files: dict[str, FileRecord]

    @classmethod
    def parse(cls, text: bytes) -> "GalleryManifest":
        """Read JSON text. Raises: InvalidPackage naming every field that is wrong."""
        try:
            manifest = cls.model_validate_json(text)
        except ValidationError as error:
            raise InvalidPackage(f"gallery manifest: {describe(error)}", param="manifest.json") from error
        expected = _FILE_NAMES | ({"frames.npy"} if manifest.kind != "text" else set())
        expected |= {"index.faiss"} if manifest.index == "hnsw" else set()
        if manifest.files.keys() != expected:
            wrong = sorted(manifest.files.keys() ^ expected)
            raise InvalidPackage(f"gallery manifest: missing or unexpected files {wrong!a}", param="files")
        return manifest


@dataclass(frozen=True)
class MediaReference:
    """Where an item's media file is and what it must be. `path` is absolute, or relative to the version's folder if `copied`."""

    path: str
    sha256: str
    size_bytes: int
    copied: bool


@dataclass(frozen=True)
class GalleryItem:
    """One item. `text` is the text itself, or a medium's caption; `frame_times_s` when each frame was taken (videos)."""

    id: str
    metadata: Mapping[str, JsonValue]
    text: str | None
    media: MediaReference | None
    frame_times_s: tuple[float, ...]
    duration_s: float | None


@dataclass(frozen=True)
class Quarantined:
    """A source that was left out: its id, the error's code (the class in snake_case) and message."""

    source: str
    code: str
    message: str


# --- Building -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EmbeddedItem:
    """What an embedder adds to a source. Media: `frames` [T, E] unnormalised (T = 1 for a picture). Texts: `vector` [E], unit length."""

    id: str
    frames: Floats | None = None
    vector: Floats | None = None
    frame_times_s: Sequence[float] = ()
    duration_s: float | None = None
    thumbnail: bytes | None = None  # JPEG


@dataclass(frozen=True)
class _Row:
    """An item as it is written."""

    id: str
    vector: Floats  # [E]
    frames: Floats  # [T, E]
    line: bytes
    thumbnail: bytes
    copy: str | None  # of the media file, relative to the work folder


class _Shard(Strict):
    """The manifest of one shard of a build: enough to lay out the version without opening the shard."""

    record: FileRecord
    dimension: int
    ids: list[str]
    num_frames: list[int]
    item_bytes: list[int]
    thumbnail_bytes: list[int]
    copies: list[str]


class GalleryBuild:
    """One version in the making, by one process at a time; the next attempt goes on where a crash stopped the last one.

    Every source is either `add`ed or `quarantine`d, in any order; the version keeps the order of `sources`. Items become durable 64 at a time.
    A leftover made with another embedding key, from other inputs or with other media rules is discarded.
    Not thread-safe. Use as a context manager: leaving gives the lock back, and keeps the work unless `finish` was reached.
    Raises: GalleryBusy while another build of the gallery runs.
    """

    def __init__(
        self, root: Path, plan: GalleryPlan, sources: Sequence[Source], *, shard_size: int = SHARD_SIZE
    ) -> None:
        self.plan = plan
        self._sources = {check_item_id(source.id): source for source in sources}
        if len(self._sources) != len(sources):
            raise ConversionError("two sources have the same id", param="source")
        if any(source.kind != plan.kind for source in sources):
            raise ConversionError(f"a gallery of kind {plan.kind!r} holds nothing else", param="source")
        self._stamps = {source.id: _stamp(source.file) for source in sources}
        self._shard_size = shard_size
        self._folder = Path(os.path.abspath(root)) / check_name(plan.name, param="gallery")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock: BinaryIO | None = _locked(self._folder / ".lock", plan.name)
        try:
            self._work = self._folder / f".build-{self._key(sources)}"
            self._shards: dict[str, _Shard] = {}
            self._durable: set[str] = set()  # ids in shards
            self._dimension: int | None = None
            self._buffer: dict[str, _Row] = {}
            self._quarantined: dict[str, Quarantined] = {}
            self._resume()
        except BaseException:
            self._unlock()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Keep what was added so far and give the lock back."""
        if self._lock is None:
            return
        try:
            self._flush()
        finally:
            self._unlock()

    def done_sources(self) -> frozenset[str]:
        """Ids that were added or quarantined, by this process or by the one it took over from."""
        return frozenset(self._done())

    def pending(self) -> list[Source]:
        """Sources still to embed, in order."""
        done = self._done()
        return [source for source in self._sources.values() if source.id not in done]

    def add(self, item: EmbeddedItem) -> None:
        """Take one embedded source.

        Raises: NonFiniteTensor, MissingMedia (the file is gone or changed since the build began): quarantine the source.
        """
        source = self._pending_source(item.id)
        vector, frames = self._checked_features(item)
        if self.plan.kind == "video" and len(item.frame_times_s) != len(frames):
            raise ValueError(f"{len(item.frame_times_s)} frame times for {len(frames)} frames")
        media = None if source.file is None else self._take_media(source, source.file)
        line = {
            "id": item.id,
            "metadata": dict(source.metadata),
            "text": source.text,
            "media": None if media is None else vars(media),
            "frame_times_s": [float(time) for time in item.frame_times_s],
            "duration_s": None if item.duration_s is None else float(item.duration_s),
        }
        copy = media.path if media is not None and media.copied else None
        self._buffer[item.id] = _Row(item.id, vector, frames, _canonical(line) + b"\n", item.thumbnail or b"", copy)
        if len(self._buffer) >= self._shard_size:
            self._flush()

    def quarantine(self, source_id: str, error: Exception) -> None:
        """Leave a source out, durably, and note why."""
        self._pending_source(source_id)
        message = str(error).encode("utf-8", "replace").decode()[:_MAX_MESSAGE_CHARS]
        entry = Quarantined(source_id, _error_code(error), message)
        with open(self._work / "quarantine.jsonl", "ab") as file:
            file.write(_canonical(vars(entry)) + b"\n")
            _sync(file)
        self._quarantined[source_id] = entry

    def finish(self, version: int | None = None) -> Path:
        """Write the version, by default the next free number, and return its folder. Ends the build.

        Raises: Conflict if the number is taken, ConversionError if every source was quarantined.
        """
        if self._lock is None:
            raise ValueError("this build is closed")
        if version is not None and version < 1:
            raise ValueError(f"versions count from 1, not {version}")
        self._flush()
        if pending := self.pending():
            raise ValueError(f"{len(pending)} sources are neither added nor quarantined, {pending[0].id!r} first")
        ids = [source_id for source_id in self._sources if source_id not in self._quarantined]
        if not ids:
            first = next(iter(self._quarantined.values()), None)
            reason = f"; {first.source!r}: {first.message}" if first else ""
            raise ConversionError(f"nothing could be embedded for gallery {self.plan.name!r}{reason}", param="source")
        version = _highest_version(self._folder) + 1 if version is None else version
        target = self._folder / f"v{version}"
        if target.exists():
            raise Conflict(f"gallery {self.plan.name!r} has a version {version} already", param="version")
        out = self._work / "out"
        self._write_version(out, ids, version)
        os.rename(out, target)
        _sync_folder(self._folder)
        shutil.rmtree(self._work)
        self._unlock()
        return target

    def _key(self, sources: Sequence[Source]) -> str:
        """What a leftover must have in common with this build to be carried on."""
        parts = [self.plan.embedding_key, self.plan.kind, self.plan.pooling, self.plan.tau, self.plan.copy_media]
        return _digest_of([*parts, FORMAT_VERSION, sources_digest(sources)]).removeprefix("sha256:")[:16]

    def _resume(self) -> None:
        for other in self._folder.glob(".build-*"):
            if other != self._work:
                shutil.rmtree(other)
        self._work.mkdir(exist_ok=True)
        self._clear_out()
        (self._work / "media").mkdir(exist_ok=True)
        for leftover in self._work.rglob("*.tmp"):
            leftover.unlink()
        self._read_quarantine()
        for path in sorted(self._work.glob("shard-*.json")):
            self._read_shard(path)

    def _clear_out(self) -> None:
        """Undo an attempt to write the version."""
        out = self._work / "out"
        if (out / "media").exists():
            os.rename(out / "media", self._work / "media")
        if out.exists():
            shutil.rmtree(out)

    def _read_quarantine(self) -> None:
        path = self._work / "quarantine.jsonl"
        whole = []
        for line in path.read_bytes().splitlines() if path.exists() else ():
            with suppress(ValueError, TypeError):  # a line that a crash cut short: its source is simply tried again
                entry = Quarantined(**json.loads(line))
                if self._quarantined.setdefault(entry.source, entry) is entry:
                    whole.append(line + b"\n")
        _write(path, b"".join(whole))

    def _read_shard(self, path: Path) -> None:
        """Carry a shard on; drop it, so that its sources are embedded again, unless every byte is as it was written."""
        data = path.with_suffix(".npz")
        try:
            shard = _Shard.model_validate_json(path.read_bytes())
            intact = shard.record == _record(data) and all((self._work / copy).is_file() for copy in shard.copies)
        except (OSError, ValidationError):
            intact = False
        if not intact:
            path.unlink()
            data.unlink(missing_ok=True)
            return
        self._keep(path.stem, shard)

    def _keep(self, stem: str, shard: _Shard) -> None:
        self._shards[stem] = shard
        self._durable.update(shard.ids)
        self._dimension = shard.dimension

    def _done(self) -> set[str]:
        return {*self._durable, *self._buffer, *self._quarantined}

    def _pending_source(self, source_id: str) -> Source:
        if self._lock is None:
            raise ValueError("this build is closed")
        if source_id not in self._sources:
            raise ValueError(f"{source_id!r} is no source of this build")
        if source_id in self._durable or source_id in self._buffer or source_id in self._quarantined:
            raise ValueError(f"{source_id!r} is done already")
        return self._sources[source_id]

    def _checked_features(self, item: EmbeddedItem) -> tuple[Floats, Floats]:
        """(vector [E], frames [T, E]); texts have no frames."""
        if self.plan.kind == "text":
            if item.vector is None or item.frames is not None:
                raise ValueError("a text has a vector and no frames")
            vector = np.asarray(item.vector, np.float32)
            frames = np.empty((0, len(vector)), np.float32)
        else:
            if item.frames is None or item.vector is not None:
                raise ValueError("pictures and clips have frames; their vector is made here")
            frames = np.asarray(item.frames, np.float32)
            if frames.ndim != 2 or len(frames) == 0:
                raise ValueError(f"frames must be [T, E] with T > 0, not {list(frames.shape)}")
            vector = self._pooled(frames) if np.isfinite(frames).all() else frames[0] * np.float32("nan")
        if not np.isfinite(vector).all() or not vector.any():
            raise NonFiniteTensor(
                f"the features of {item.id!r} hold NaN or an infinity, or have no direction", param="features"
            )
        if abs(float(np.linalg.norm(vector)) - 1) > _UNIT_TOLERANCE:
            raise ValueError(f"the vector of {item.id!r} is not of unit length")
        if len(vector) != (self._dimension or len(vector)):
            raise ValueError(f"the vector of {item.id!r} has {len(vector)} dimensions, others have {self._dimension}")
        self._dimension = len(vector)
        return vector, frames

    def _pooled(self, frames: Floats) -> Floats:
        if self.plan.pooling == "mean":
            return pool(frames)
        return pool(frames, frame_attention_weights(frames, self.plan.tau))

    def _take_media(self, source: Source, file: Path) -> MediaReference:
        """Digest the file, and copy it where the plan says so."""
        try:
            if self._stamps[source.id] != _stamp(file):
                raise MissingMedia(f"{file.name} changed while the gallery was being built", param=source.id)
            if self.plan.copy_media:
                return self._copy_media(file)
            record = _record(file)
        except OSError as error:
            raise MissingMedia(f"{file.name} cannot be read: {error.strerror}", param=source.id) from error
        return MediaReference(str(file), record.sha256, record.size_bytes, copied=False)

    def _copy_media(self, file: Path) -> MediaReference:
        temporary = self._work / "media" / "copy.tmp"
        with open(file, "rb") as original, open(temporary, "wb") as copy:
            shutil.copyfileobj(original, copy, _CHUNK_BYTES)
            _sync(copy)
        record = _record(temporary)
        suffix = file.suffix.lower()
        suffix = suffix if re.fullmatch(r"\.[a-z0-9]{1,8}", suffix) else ""
        path = f"media/{record.sha256.removeprefix('sha256:')}{suffix}"  # equal files share one copy
        os.replace(temporary, self._work / path)
        return MediaReference(path, record.sha256, record.size_bytes, copied=True)

    def _flush(self) -> None:
        """Make the buffered items durable as one shard."""
        if not self._buffer:
            return
        rows = list(self._buffer.values())
        used = [int(stem.removeprefix("shard-")) for stem in self._shards]
        stem = f"shard-{max(used, default=-1) + 1:06d}"
        data = self._work / f"{stem}.npz"
        with _written(data) as file:
            np.savez(
                file,
                vectors=np.stack([row.vector for row in rows]),
                frames=np.concatenate([row.frames for row in rows]),
                items=np.frombuffer(b"".join(row.line for row in rows), np.uint8),
                thumbnails=np.frombuffer(b"".join(row.thumbnail for row in rows), np.uint8),
            )
        _sync_folder(self._work / "media")
        shard = _Shard(
            record=_record(data),
            dimension=len(rows[0].vector),
            ids=[row.id for row in rows],
            num_frames=[len(row.frames) for row in rows],
            item_bytes=[len(row.line) for row in rows],
            thumbnail_bytes=[len(row.thumbnail) for row in rows],
            copies=[row.copy for row in rows if row.copy is not None],
        )
        _write(self._work / f"{stem}.json", shard.model_dump_json().encode())
        self._keep(stem, shard)
        self._buffer.clear()

    def _write_version(self, out: Path, ids: list[str], version: int) -> None:
        self._clear_out()
        out.mkdir()
        vectors = self._write_arrays(out, ids)
        _write(out / "ids.json", _canonical(ids))
        _write(out / "quarantine.jsonl", (self._work / "quarantine.jsonl").read_bytes())
        if self.plan.index == "hnsw":
            VectorIndex.build(vectors, "hnsw").save(out / "index.faiss")
        for path in out.iterdir():
            with open(path, "rb+") as file:
                _sync(file)
        manifest = GalleryManifest(
            **dict(self.plan),
            version=version,
            num_items=len(ids),
            num_quarantined=len(self._quarantined),
            dimension=vectors.shape[1],
            created_at=datetime.now(UTC),
            files={path.name: _record(path) for path in sorted(out.iterdir())},
        )
        _write(out / "manifest.json", manifest.model_dump_json(indent=2).encode() + b"\n")
        if self.plan.copy_media:
            os.rename(self._work / "media", out / "media")
        _sync_folder(out)

    def _write_arrays(self, out: Path, ids: list[str]) -> Floats:
        """Scatter the shards into the order of `ids`, one shard in memory at a time. Returns the vectors [N, E], mapped."""
        position_of = {item_id: position for position, item_id in enumerate(ids)}
        sizes = np.zeros((3, len(ids)), np.int64)  # frames, bytes of items.jsonl, bytes of thumbnails.bin
        for shard in self._shards.values():
            places = [position_of[item_id] for item_id in shard.ids]
            sizes[:, places] = shard.num_frames, shard.item_bytes, shard.thumbnail_bytes
        offsets = np.concatenate([np.zeros((3, 1), np.int64), sizes.cumsum(axis=1)], axis=1)  # [3, N + 1]
        np.save(out / "offsets.npy", offsets)
        dimension = next(iter(self._shards.values())).dimension
        vectors = _new_array(out / "vectors.npy", (len(ids), dimension))
        num_frames = int(offsets[0, -1])
        frames = _new_array(out / "frames.npy", (num_frames, dimension)) if num_frames else None
        with open(out / "items.jsonl", "wb") as items, open(out / "thumbnails.bin", "wb") as thumbnails:
            for stem, shard in self._shards.items():
                places = [position_of[item_id] for item_id in shard.ids]
                with np.load(self._work / f"{stem}.npz", allow_pickle=False) as data:
                    vectors[places] = data["vectors"]
                    if frames is not None:
                        _scatter_rows(frames, data["frames"], offsets[0], places, shard.num_frames)
                    _scatter_bytes(items, data["items"].tobytes(), offsets[1], places, shard.item_bytes)
                    _scatter_bytes(thumbnails, data["thumbnails"].tobytes(), offsets[2], places, shard.thumbnail_bytes)
        vectors.flush()
        if frames is not None:
            frames.flush()
        return vectors

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


# --- Reading --------------------------------------------------------------------------------------------------------------


class Gallery:
    """One version, open: arrays are mapped from disk and nothing ever changes, so threads share it freely.

    `vectors` [N, E] unit length; `frames` [F, E] unnormalised, all items' frames one after the other; `lengths` [N], frames of each item
    (0 for texts); `ids` in order; `index` over the vectors.
    """

    def __init__(self, path: Path, manifest: GalleryManifest, digest: str) -> None:
        self.path = path
        self.manifest = manifest
        self.digest = digest  # of manifest.json, and through it of every file
        self.ids: tuple[str, ...] = tuple(json.loads((path / "ids.json").read_bytes()))
        self.vectors = _mapped_array(path / "vectors.npy")
        self.frames = np.empty((0, manifest.dimension), np.float32)
        if manifest.kind != "text":
            self.frames = _mapped_array(path / "frames.npy")
        self._offsets: Ints = np.load(path / "offsets.npy", allow_pickle=False)
        self.lengths: Ints = np.diff(self._offsets[0])
        self._items = _mapped_bytes(path / "items.jsonl")
        self._thumbnails = _mapped_bytes(path / "thumbnails.bin")
        self._positions = {item_id: position for position, item_id in enumerate(self.ids)}
        self._verified: dict[int, tuple[Path, int, int]] = {}
        self._check_shapes()
        if manifest.index == "hnsw":
            self.index = VectorIndex.load(path / "index.faiss", self.vectors)
        else:
            self.index = VectorIndex.build(self.vectors, "flat")

    @classmethod
    def open(cls, path: Path, *, verify: bool = False) -> "Gallery":
        """Open the version at `path`. Sizes of its files are always checked; with `verify` their digests too, copied media included.

        Raises: GalleryNotFound, InvalidPackage for a broken manifest, DigestMismatch naming the file.
        """
        path = Path(os.path.abspath(path))
        try:
            text = (path / "manifest.json").read_bytes()
        except OSError as error:
            raise GalleryNotFound(f"there is no gallery version in folder {path.name!r}", param="gallery") from error
        manifest = GalleryManifest.parse(text)
        for name, record in manifest.files.items():
            _check_file(path / name, record, verify=verify)
        try:
            gallery = cls(path, manifest, f"sha256:{hashlib.sha256(text).hexdigest()}")
        except (OSError, ValueError, TypeError) as error:
            raise InvalidPackage(
                f"gallery {manifest.name!r} version {manifest.version}: {error}", param="gallery"
            ) from error
        if verify and manifest.copy_media:
            gallery._verify_copies()
        return gallery

    def __len__(self) -> int:
        return len(self.ids)

    def position_of(self, item_id: str) -> int:
        """Raises: GalleryNotFound."""
        if item_id not in self._positions:
            raise GalleryNotFound(
                f"gallery {self.manifest.name!r} has no item {item_id[:MAX_ID_CHARS]!r}", param="item"
            )
        return self._positions[item_id]

    def item(self, position: int) -> GalleryItem:
        """The item at `position`, read from disk."""
        line = self._slice(self._items, 1, position)
        try:
            data = json.loads(line)
            media = MediaReference(**data["media"]) if data["media"] else None
            times = tuple(data["frame_times_s"])
            return GalleryItem(data["id"], data["metadata"], data["text"], media, times, data["duration_s"])
        except (ValueError, KeyError, TypeError) as error:
            raise DigestMismatch(f"items.jsonl of gallery {self.manifest.name!r} is damaged", param="item") from error

    def frames_of(self, positions: npt.ArrayLike) -> tuple[Floats, Ints]:
        """(frames [n, T, E] padded with zeros to the longest, lengths [n]), as `rerank_frames` takes them."""
        chosen = np.asarray(positions, np.int64).reshape(-1)
        lengths = self.lengths[chosen]
        steps = np.arange(lengths.max(initial=0))  # [T]
        inside = steps < lengths[:, None]  # [n, T]
        rows = np.where(inside, self._offsets[0, chosen][:, None] + steps, 0)
        frames = np.where(inside[:, :, None], self.frames[rows], np.float32(0))
        return frames, lengths

    def thumbnail(self, position: int) -> bytes | None:
        """JPEG bytes, if the item has a thumbnail."""
        return self._slice(self._thumbnails, 2, position) or None

    def media_path(self, position: int) -> Path:
        """The item's media file, after making sure it is the one that was embedded; its digest is computed once per (time, size).

        Raises: MissingMedia if it is gone, changed or never was (texts), UnsafePath if a copy would lie outside the gallery.
        """
        item = self.item(position)
        if item.media is None:
            raise MissingMedia(f"{item.id!r} is a text: it has no media file", param="item")
        path = self._located(item.media)
        try:
            size, mtime_ns = _regular_stamp(path)
            if size != item.media.size_bytes:
                raise MissingMedia(f"the media file of {item.id!r} changed since it was embedded", param="item")
            if self._verified.get(position) != (path, mtime_ns, size):
                if _record(path).sha256 != item.media.sha256:
                    raise MissingMedia(f"the media file of {item.id!r} changed since it was embedded", param="item")
                self._verified[position] = (path, mtime_ns, size)
        except OSError as error:
            raise MissingMedia(
                f"the media file of {item.id!r} cannot be read: {error.strerror}", param="item"
            ) from error
        return path

    def quarantined(self) -> tuple[Quarantined, ...]:
        """What was left out of this version, and why."""
        lines = (self.path / "quarantine.jsonl").read_bytes().splitlines()
        return tuple(Quarantined(**json.loads(line)) for line in lines)

    def sources(self) -> list[Source]:
        """What this version was made of, to build it anew with another adapter. Files are where the media are now, unchecked."""
        items = map(self.item, range(len(self)))
        return [
            Source(
                item.id, self.manifest.kind, self._located(item.media) if item.media else None, item.text, item.metadata
            )
            for item in items
        ]

    def _located(self, media: MediaReference) -> Path:
        if not media.copied:
            if not os.path.isabs(media.path):
                raise UnsafePath("a referenced media file has no absolute path", param="media")
            return Path(media.path)
        path = self.path / media.path
        if not re.fullmatch(_COPY_PATTERN, media.path) or path.resolve().parent != (self.path / "media").resolve():
            raise UnsafePath("a media copy lies outside its gallery", param="media")
        return path

    def _slice(self, data: npt.NDArray[np.uint8], row: int, position: int) -> bytes:
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} in a gallery of {len(self)}")
        return data[self._offsets[row, position] : self._offsets[row, position + 1]].tobytes()

    def _check_shapes(self) -> None:
        num_items, dimension = self.manifest.num_items, self.manifest.dimension
        ends = [len(self.frames), len(self._items), len(self._thumbnails)]
        consistent = (
            len(self._positions) == len(self.ids) == num_items
            and self.vectors.shape == (num_items, dimension)
            and self.frames.shape[1:] == (dimension,)
            and self._offsets.shape == (3, num_items + 1)
            and (np.diff(self._offsets, axis=1) >= 0).all()
            and self._offsets[:, 0].tolist() == [0, 0, 0]
            and self._offsets[:, -1].tolist() == ends
            and (self.manifest.kind == "text" or bool((self.lengths > 0).all()))
        )
        if not consistent:
            raise ValueError("its files do not belong together")

    def _verify_copies(self) -> None:
        for position in range(len(self)):
            try:
                self.media_path(position)
            except MissingMedia as error:
                raise DigestMismatch(error.message, param="media") from error


class GalleryStore:
    """All galleries below one folder. Versions are opened once and shared; thread-safe.

    Each open version keeps its vectors in memory until `release` or `delete`.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))
        self._open: dict[tuple[str, int], Gallery] = {}
        self._lock = threading.Lock()
        self._opening: dict[tuple[str, int], threading.Lock] = {}

    def names(self) -> list[str]:
        """Galleries with at least one version, sorted."""
        folders = sorted(path.name for path in self.root.iterdir()) if self.root.is_dir() else []
        return [name for name in folders if _is_name(name) and _versions(self.root / name)]

    def versions(self, name: str) -> list[int]:
        """Ascending. Raises: GalleryNotFound listing the galleries there are, InvalidReference."""
        versions = _versions(self.root / check_name(name, param="gallery"))
        if not versions:
            raise GalleryNotFound(f"no gallery {name!r}; {_known(self.names())}", param="gallery")
        return versions

    def latest(self, name: str) -> int:
        """The highest version. Which one is served is the registry's to say. Raises: as `versions`."""
        return self.versions(name)[-1]

    def open(self, name: str, version: int) -> Gallery:
        """The same instance for every caller. Raises: as `versions` and `Gallery.open`."""
        key = (name, version)
        with self._lock:
            if key in self._open:
                return self._open[key]
        folder = self._version_folder(name, version)
        with self._lock:
            opening = self._opening.setdefault(key, threading.Lock())
        with opening:  # the first of several callers opens, without holding up those of other versions
            with self._lock:
                if key in self._open:
                    return self._open[key]
            try:
                gallery = Gallery.open(folder)
                with self._lock:
                    return self._open.setdefault(key, gallery)
            finally:
                with self._lock:
                    self._opening.pop(key, None)

    def build(self, plan: GalleryPlan, sources: Sequence[Source], *, shard_size: int = SHARD_SIZE) -> GalleryBuild:
        """Begin or carry on a build. Raises: as `GalleryBuild`."""
        return GalleryBuild(self.root, plan, sources, shard_size=shard_size)

    def release(self, name: str, version: int) -> None:
        """Forget an open version; whoever holds it may go on using it."""
        with self._lock:
            self._open.pop((name, version), None)

    def delete(self, name: str, version: int) -> None:
        """Remove a version for good; its number is not given again. Raises: as `versions`."""
        folder = self._version_folder(name, version)
        self.release(name, version)
        _write(folder.parent / ".last-version", str(_highest_version(folder.parent)).encode())
        try:
            os.rename(folder, folder.with_name(f".deleted-{folder.name}-{_here()}"))
        except FileNotFoundError as error:  # another process was faster
            raise GalleryNotFound(f"gallery {name!r} has no version {version} any more", param="version") from error
        _sync_folder(folder.parent)
        for doomed in folder.parent.glob(".deleted-*"):  # also what a crash left
            shutil.rmtree(doomed, ignore_errors=True)

    def _version_folder(self, name: str, version: int) -> Path:
        versions = self.versions(name)
        if version not in versions:
            known = _known([str(known) for known in reversed(versions)])
            raise GalleryNotFound(f"gallery {name!r} has no version {version}; {known}", param="version")
        return self.root / name / f"v{version}"


# --- Files ----------------------------------------------------------------------------------------------------------------


def _versions(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    found = (path.name[1:] for path in folder.iterdir() if re.fullmatch(r"v[1-9][0-9]{0,17}", path.name))
    return sorted(int(number) for number in found if (folder / f"v{number}" / "manifest.json").is_file())


def _highest_version(folder: Path) -> int:
    recorded = folder / ".last-version"
    numbers = [int(recorded.read_bytes())] if recorded.exists() else []
    return max([*numbers, *_versions(folder)], default=0)


def _is_name(name: str) -> bool:
    try:
        return bool(check_name(name))
    except InvalidReference:
        return False


def _known(names: Sequence[str]) -> str:
    if not names:
        return "there are none"
    listed = ", ".join(names[:_MAX_NAMES_LISTED])
    rest = len(names) - _MAX_NAMES_LISTED
    return f"known: {listed}" + (f" and {rest} more" if rest > 0 else "")


def _error_code(error: Exception) -> str:
    """CorruptMedia -> corrupt_media."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(error).__name__).lower()


def _canonical(data: object) -> bytes:
    """JSON in one form. Raises: ValueError for NaN, infinities and lone surrogates."""
    text = json.dumps(data, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8")


def _digest_of(data: object) -> str:
    return f"sha256:{hashlib.sha256(_canonical(data)).hexdigest()}"


def _record(path: Path) -> FileRecord:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(sha256=f"sha256:{digest.hexdigest()}", size_bytes=file.tell())


def _check_file(path: Path, record: FileRecord, *, verify: bool) -> None:
    try:
        size = path.stat().st_size
        same = size == record.size_bytes and (not verify or _record(path) == record)
    except OSError as error:
        raise DigestMismatch(f"{path.name} of the gallery cannot be read: {error.strerror}", param=path.name) from error
    if not same:
        raise DigestMismatch(f"{path.name} of the gallery is not the file that was written", param=path.name)


def _regular_stamp(path: Path) -> tuple[int, int]:
    """(size, modification time in ns). Raises: OSError, also for a folder or pipe."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise FileNotFoundError(errno.ENOENT, "not a regular file")
    return status.st_size, status.st_mtime_ns


def _locked(path: Path, name: str) -> BinaryIO:
    """The open lock file; closing it, or dying, gives the lock back."""
    file = open(path, "ab")  # noqa: SIM115 - held as long as the build
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise GalleryBusy(f"gallery {name!r} is being built already", param="gallery") from error
    return file


def _write(path: Path, data: bytes) -> None:
    with _written(path) as file:
        file.write(data)


@contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at `path`, whole and synced, when the block ends."""
    temporary = path.with_name(f"{path.name}.{_here()}.tmp")
    with open(temporary, "wb") as file:
        yield file
        _sync(file)
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _here() -> str:
    """This thread of this process: makes names that nobody else uses."""
    return f"{os.getpid()}-{threading.get_ident()}"


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _new_array(path: Path, shape: tuple[int, int]) -> "np.memmap[tuple[int, ...], np.dtype[np.float32]]":
    return np.lib.format.open_memmap(path, "w+", np.float32, shape)


def _mapped_array(path: Path) -> Floats:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype != np.float32 or array.ndim != 2:
        raise ValueError(f"{path.name} is no matrix of float32")
    return np.asarray(array)


def _mapped_bytes(path: Path) -> npt.NDArray[np.uint8]:
    if path.stat().st_size == 0:  # cannot be mapped
        return np.empty(0, np.uint8)
    return np.asarray(np.memmap(path, np.uint8, "r"))


def _scatter_rows(target: Floats, rows: Floats, offsets: Ints, places: list[int], counts: list[int]) -> None:
    start = 0
    for place, count in zip(places, counts, strict=True):
        target[offsets[place] : offsets[place] + count] = rows[start : start + count]
        start += count


def _scatter_bytes(file: BinaryIO, data: bytes, offsets: Ints, places: list[int], counts: list[int]) -> None:
    start = 0
    for place, count in zip(places, counts, strict=True):
        file.seek(int(offsets[place]))
        file.write(data[start : start + count])
        start += count
