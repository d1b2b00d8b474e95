"""Galleries on disk: one immutable version, open, and the folder of them all.

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
    ROOT/NAME/.v3.DIGEST.part/      a version that is being fetched from another host's
    ROOT/NAME/.lock                 held by whoever builds
    ROOT/NAME/.last-version         the highest number when one was deleted: a number is never given twice

Every file is written beside its place, synced and renamed, and a version appears by one rename, so a crash leaves a whole version or none.
Knows what is finished; work in progress is `build.py`'s, and models are nobody's here: vectors come from the caller.
"""

import json
import os
import re
import shutil
import threading
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adapters.artifacts import sweep_fetches
from adapters.artifacts.manifest import FileRecord as TreeFile
from adapters.artifacts.manifest import record_of, tree_digest
from adapters.config import check_name
from adapters.errors import DigestMismatch, InvalidPackage, InvalidReference, UnsafePath
from service.errors import GalleryBusy, GalleryNotFound, MissingMedia
from service.gallery.build import SHARD_SIZE, GalleryBuild
from service.gallery.files import (
    digest_of,
    locked,
    mapped_array,
    mapped_bytes,
    record_highest_version,
    regular_stamp,
    sync_folder,
    unique_suffix,
    version_numbers,
)
from service.gallery.frames import Floats, Ints
from service.gallery.index import VectorIndex
from service.gallery.manifest import (
    MAX_ID_CHARS,
    FileRecord,
    GalleryItem,
    GalleryManifest,
    GalleryPlan,
    MediaReference,
    Quarantined,
)
from service.gallery.sources import Source

_COPY_PATTERN = r"media/[0-9a-f]{64}(\.[a-z0-9]{1,8})?"
_MAX_NAMES_LISTED = 20


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
        self.vectors = mapped_array(path / "vectors.npy")
        self.frames = np.empty((0, manifest.dimension), np.float32)
        if manifest.kind != "text":
            self.frames = mapped_array(path / "frames.npy")
        self._offsets: Ints = np.load(path / "offsets.npy", allow_pickle=False)
        self.lengths: Ints = np.diff(self._offsets[0])
        self._items = mapped_bytes(path / "items.jsonl")
        self._thumbnails = mapped_bytes(path / "thumbnails.bin")
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
            record.check(path / name, verify=verify)
        try:
            gallery = cls(path, manifest, digest_of(text))
        except (OSError, ValueError, TypeError) as error:
            raise InvalidPackage(
                f"gallery {manifest.name!r} version {manifest.version}: {error}", param="gallery"
            ) from error
        if verify and manifest.copy_media:
            gallery._verify_copies()
        return gallery

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def tree_digest(self) -> str:
        """The digest of this version's folder in a `TreeStore`, from what its manifest and the names of its copies say."""
        files = {name: TreeFile(**dict(record)) for name, record in self.manifest.files.items()}
        files["manifest.json"] = record_of(self.path / "manifest.json")
        for copy in (self.path / "media").glob("*"):
            files[f"media/{copy.name}"] = TreeFile(size_bytes=copy.stat().st_size, sha256=f"sha256:{copy.name[:64]}")
        return tree_digest(files)

    @property
    def has_tree_digest(self) -> bool:
        """Whether `tree_digest` is known, so that asking for it does not look at the disk."""
        return "tree_digest" in vars(self)

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
            size, mtime_ns = regular_stamp(path)
            if size != item.media.size_bytes:
                raise MissingMedia(f"the media file of {item.id!r} changed since it was embedded", param="item")
            if self._verified.get(position) != (path, mtime_ns, size):
                if FileRecord.of(path).sha256 != item.media.sha256:
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
        """What this version was made of, to build it anew with another adapter.

        Files are where the media are now, unopened, and must be what they were: equal content is what the versions have in
        common, and whoever may only build anew has no say in which files the server reads.
        """
        return [self._source(self.item(position)) for position in range(len(self))]

    def _source(self, item: GalleryItem) -> Source:
        file = self._located(item.media) if item.media else None
        sha256 = item.media.sha256 if item.media else None
        return Source(item.id, self.manifest.kind, file, item.text, item.metadata, sha256=sha256)

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
        return [name for name in folders if _is_name(name) and version_numbers(self.root / name)]

    def numbers(self, name: str) -> list[int]:
        """The versions of a gallery, ascending; none for one that nobody has. Raises: InvalidReference."""
        return version_numbers(self.root / check_name(name, param="gallery"))

    def has(self, name: str, version: int) -> bool:
        """Whether a version is here. Raises: InvalidReference."""
        return (self.root / check_name(name, param="gallery") / f"v{version}" / "manifest.json").is_file()

    def versions(self, name: str) -> list[int]:
        """Ascending. Raises: GalleryNotFound listing the galleries there are, InvalidReference."""
        versions = self.numbers(name)
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

    def if_open(self, name: str, version: int) -> Gallery | None:
        """A version that is in memory; None for another."""
        with self._lock:
            return self._open.get((name, version))

    def is_open(self, name: str, version: int) -> bool:
        """Whether a version is in memory."""
        return self.if_open(name, version) is not None

    def opened(self) -> list[tuple[str, int]]:
        """The (name, version) of what is in memory."""
        with self._lock:
            return list(self._open)

    def manifest(self, name: str, version: int) -> GalleryManifest:
        """What a version is, without opening it. Raises: as `versions`, InvalidPackage."""
        path = self._version_folder(name, version) / "manifest.json"
        try:
            return GalleryManifest.parse(path.read_bytes())
        except OSError as error:
            raise GalleryNotFound(f"gallery {name!r} has no version {version} any more", param="version") from error

    def build(self, plan: GalleryPlan, sources: Sequence[Source], *, shard_size: int = SHARD_SIZE) -> GalleryBuild:
        """Begin or carry on a build. Raises: as `GalleryBuild`."""
        return GalleryBuild(self.root, plan, sources, shard_size=shard_size)

    def sweep_work(self, before: float, keep: Collection[str] = ()) -> None:
        """Remove what builds and fetches left that nobody went on with since a time (seconds since 1970).

        The builds of galleries to `keep` stay.
        """
        for folder in self.root.glob("*/"):
            sweep_fetches(folder, before)
        for work in self.root.glob("*/.build-*"):
            if work.parent.name in keep or work.stat().st_mtime >= before:
                continue
            with suppress(GalleryBusy), locked(work.parent / ".lock", work.parent.name):
                shutil.rmtree(work, ignore_errors=True)

    def release(self, name: str, version: int) -> None:
        """Forget an open version; whoever holds it may go on using it."""
        with self._lock:
            self._open.pop((name, version), None)

    def delete(self, name: str, version: int) -> None:
        """Remove a version for good; its number is not given again. Raises: as `versions`."""
        folder = self._version_folder(name, version)
        self.release(name, version)
        record_highest_version(folder.parent)
        try:
            os.rename(folder, folder.with_name(f".deleted-{folder.name}-{unique_suffix()}"))
        except FileNotFoundError as error:  # another process was faster
            raise GalleryNotFound(f"gallery {name!r} has no version {version} any more", param="version") from error
        sync_folder(folder.parent)
        for doomed in folder.parent.glob(".deleted-*"):  # also what a crash left
            shutil.rmtree(doomed, ignore_errors=True)

    def _version_folder(self, name: str, version: int) -> Path:
        versions = self.versions(name)
        if version not in versions:
            known = _known([str(known) for known in reversed(versions)])
            raise GalleryNotFound(f"gallery {name!r} has no version {version}; {known}", param="version")
        return self.root / name / f"v{version}"


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
