"""The resumable build of one gallery version: what was embedded becomes durable shards, and shards become the version.

Knows the work folder and how a version is laid out. Knows nothing of models or decoding: features come from the caller.
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from pydantic import ValidationError

from adapters.config import Strict, check_name
from adapters.errors import Conflict, ConversionError, InvalidReference, NonFiniteTensor
from service.errors import MissingMedia
from service.gallery.files import (
    canonical_json,
    digest_of,
    highest_version,
    locked,
    new_array,
    stamp,
    sync,
    sync_folder,
    write_file,
    written_file,
)
from service.gallery.frames import Floats, Ints, frame_attention_weights, pool
from service.gallery.index import VectorIndex
from service.gallery.manifest import (
    FORMAT_VERSION,
    FileRecord,
    GalleryManifest,
    GalleryPlan,
    MediaReference,
    Quarantined,
    check_item_id,
)
from service.gallery.sources import Source, sources_digest

SHARD_SIZE = 64

_CHUNK_BYTES = 2**20
_MAX_MESSAGE_CHARS = 500
_UNIT_TOLERANCE = 1e-3


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
    Sources with a `problem` are quarantined from the start.
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
        self._stamps = {source.id: stamp(source.file) for source in sources}
        self._shard_size = shard_size
        self._folder = Path(os.path.abspath(root)) / check_name(plan.name, param="gallery")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock: BinaryIO | None = locked(self._folder / ".lock", plan.name)
        try:
            self._work = self._folder / f".build-{self._key(sources)}"
            self._out = self._work / "out"
            self._target: Path | None = None  # once `write` is through
            self._shards: dict[str, _Shard] = {}
            self._durable: set[str] = set()  # ids in shards
            self._dimension: int | None = None
            self._buffer: dict[str, _Row] = {}
            self._quarantined: dict[str, Quarantined] = {}
            self._resume()
            self._quarantine_problems()
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

    @property
    def num_quarantined(self) -> int:
        """How many of them were quarantined."""
        return len(self._quarantined)

    def pending(self) -> list[Source]:
        """Sources still to embed, in order."""
        done = self._done()
        return [source for source in self._sources.values() if source.id not in done]

    def add(self, item: EmbeddedItem) -> None:
        """Take one embedded source.

        Raises: NonFiniteTensor, MissingMedia (the file is gone, changed since the build began, or is not the one that the
        source names): quarantine the source.
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
        self._buffer[item.id] = _Row(item.id, vector, frames, canonical_json(line) + b"\n", item.thumbnail or b"", copy)
        if len(self._buffer) >= self._shard_size:
            self._flush()

    def quarantine(self, source_id: str, error: Exception) -> None:
        """Leave a source out, durably, and note why."""
        self._pending_source(source_id)
        message = str(error).encode("utf-8", "replace").decode()[:_MAX_MESSAGE_CHARS]
        entry = Quarantined(source_id, _error_code(error), message)
        with open(self._work / "quarantine.jsonl", "ab") as file:
            file.write(canonical_json(vars(entry)) + b"\n")
            sync(file)
        self._quarantined[source_id] = entry

    def finish(self, version: int | None = None) -> Path:
        """Write the version, by default the next free number, and return its folder. Ends the build. Raises: as `write`."""
        self.write(version)
        return self.publish()

    def write(self, version: int | None = None) -> Path:
        """Write the version's files where nobody looks for them, and return that folder. Until `publish` nothing else happens.

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
        version = highest_version(self._folder) + 1 if version is None else version
        target = self._folder / f"v{version}"
        if target.exists():
            raise Conflict(f"gallery {self.plan.name!r} has a version {version} already", param="version")
        self._write_version(self._out, ids, version)
        self._target = target
        return self._out

    def publish(self) -> Path:
        """Let the version that was written appear, by one rename, and return its folder. Ends the build."""
        target = self._target
        if self._lock is None or target is None:
            raise ValueError("this build is closed, or nothing was written")
        os.rename(self._out, target)
        sync_folder(self._folder)
        shutil.rmtree(self._work)
        self._unlock()
        return target

    def _key(self, sources: Sequence[Source]) -> str:
        """What a leftover must have in common with this build to be carried on."""
        parts = [self.plan.embedding_key, self.plan.kind, self.plan.pooling, self.plan.tau, self.plan.copy_media]
        return digest_of(canonical_json([*parts, FORMAT_VERSION, sources_digest(sources)])).removeprefix("sha256:")[:16]

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

    def _quarantine_problems(self) -> None:
        for source in self.pending():
            if source.problem is not None:
                self.quarantine(source.id, InvalidReference(source.problem))

    def _clear_out(self) -> None:
        """Undo an attempt to write the version."""
        out = self._out
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
        write_file(path, b"".join(whole))

    def _read_shard(self, path: Path) -> None:
        """Carry a shard on; drop it, so that its sources are embedded again, unless every byte is as it was written."""
        data = path.with_suffix(".npz")
        try:
            shard = _Shard.model_validate_json(path.read_bytes())
            intact = shard.record == FileRecord.of(data) and all((self._work / copy).is_file() for copy in shard.copies)
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
            if self._stamps[source.id] != stamp(file):
                raise MissingMedia(f"{file.name} changed while the gallery was being built", param=source.id)
            if self.plan.copy_media:
                return self._copy_media(source, file)
            record = FileRecord.of(file)
            _check_expected(source, file, record)
        except OSError as error:
            raise MissingMedia(f"{file.name} cannot be read: {error.strerror}", param=source.id) from error
        return MediaReference(str(file), record.sha256, record.size_bytes, copied=False)

    def _copy_media(self, source: Source, file: Path) -> MediaReference:
        temporary = self._work / "media" / "copy.tmp"
        with open(file, "rb") as original, open(temporary, "wb") as copy:
            shutil.copyfileobj(original, copy, _CHUNK_BYTES)
            sync(copy)
        record = FileRecord.of(temporary)
        _check_expected(source, file, record)
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
        with written_file(data) as file:
            np.savez(
                file,
                vectors=np.stack([row.vector for row in rows]),
                frames=np.concatenate([row.frames for row in rows]),
                items=np.frombuffer(b"".join(row.line for row in rows), np.uint8),
                thumbnails=np.frombuffer(b"".join(row.thumbnail for row in rows), np.uint8),
            )
        sync_folder(self._work / "media")
        shard = _Shard(
            record=FileRecord.of(data),
            dimension=len(rows[0].vector),
            ids=[row.id for row in rows],
            num_frames=[len(row.frames) for row in rows],
            item_bytes=[len(row.line) for row in rows],
            thumbnail_bytes=[len(row.thumbnail) for row in rows],
            copies=[row.copy for row in rows if row.copy is not None],
        )
        write_file(self._work / f"{stem}.json", shard.model_dump_json().encode())
        self._keep(stem, shard)
        self._buffer.clear()

    def _write_version(self, out: Path, ids: list[str], version: int) -> None:
        self._clear_out()
        out.mkdir()
        vectors = self._write_arrays(out, ids)
        write_file(out / "ids.json", canonical_json(ids))
        write_file(out / "quarantine.jsonl", (self._work / "quarantine.jsonl").read_bytes())
        if self.plan.index == "hnsw":
            VectorIndex.build(vectors, "hnsw").save(out / "index.faiss")
        for path in out.iterdir():
            with open(path, "rb+") as file:
                sync(file)
        manifest = GalleryManifest(
            **dict(self.plan),
            version=version,
            num_items=len(ids),
            num_quarantined=self.num_quarantined,
            dimension=vectors.shape[1],
            created_at=datetime.now(UTC),
            files={path.name: FileRecord.of(path) for path in sorted(out.iterdir())},
        )
        write_file(out / "manifest.json", manifest.model_dump_json(indent=2).encode() + b"\n")
        if self.plan.copy_media:
            for leftover in (self._work / "media").glob("*.tmp"):
                leftover.unlink()
            os.rename(self._work / "media", out / "media")
        sync_folder(out)

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
        vectors = new_array(out / "vectors.npy", (len(ids), dimension))
        num_frames = int(offsets[0, -1])
        frames = new_array(out / "frames.npy", (num_frames, dimension)) if num_frames else None
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


def _check_expected(source: Source, file: Path, found: FileRecord) -> None:
    if source.sha256 is not None and source.sha256 != found.sha256:
        raise MissingMedia(f"{file.name} is not the file that was embedded before", param=source.id)


def _error_code(error: Exception) -> str:
    """CorruptMedia -> corrupt_media."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(error).__name__).lower()


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
