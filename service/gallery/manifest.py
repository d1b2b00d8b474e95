"""What a gallery version says about itself: its identity, its plan, the manifest with every file's digest, its items and gaps.

Knows values and their rules only: neither how a version is built, nor how it is read or where it lies.
"""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import AwareDatetime, ConfigDict, Field, JsonValue, ValidationError

from adapters.config import Digest, Preprocessing, Strict, describe
from adapters.errors import DigestMismatch, InvalidPackage, InvalidReference
from service.gallery.files import canonical_json, digest_file, digest_of
from service.gallery.frames import DEFAULT_TAU, Pooling
from service.gallery.index import IndexKind

GalleryKind = Literal["video", "image", "text"]

FORMAT_VERSION: Final = 1
NUMERICS_VERSION = "1"
"""Raised whenever the same weights and input would give other vectors than before."""
MAX_ID_CHARS = 200

_FILE_NAMES = {"vectors.npy", "offsets.npy", "ids.json", "items.jsonl", "thumbnails.bin", "quarantine.jsonl"}


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
    ingredients = {
        "parts": dict(parts),
        "weights_digest": weights_digest,
        "preprocessing": dict(preprocessing),
        "frame_sampling": frame_sampling,
        "pooling": dict(pooling),
        "numerics": numerics,
    }
    return digest_of(canonical_json(ingredients))


def check_item_id(item_id: str) -> str:
    """Return `item_id` when it may name an item: 1 to 200 characters of any script, no control characters.

    It never becomes a file name. Raises: InvalidReference.
    """
    if not 1 <= len(item_id) <= MAX_ID_CHARS:
        raise InvalidReference(f"an item id has 1 to {MAX_ID_CHARS} characters, not {len(item_id)}", param="id")
    if any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in item_id):
        raise InvalidReference(f"item id {item_id!a} holds control characters", param="id")
    return item_id


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

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """The record of a file as it is now. Raises: OSError."""
        sha256, size_bytes = digest_file(path)
        return cls(sha256=sha256, size_bytes=size_bytes)

    def check(self, path: Path, *, verify: bool) -> None:
        """Compare the size of the file at `path`, with `verify` its digest too. Raises: DigestMismatch naming it."""
        try:
            size = path.stat().st_size
            same = size == self.size_bytes and (not verify or FileRecord.of(path) == self)
        except OSError as error:
            raise DigestMismatch(
                f"{path.name} of the gallery cannot be read: {error.strerror}", param=path.name
            ) from error
        if not same:
            raise DigestMismatch(f"{path.name} of the gallery is not the file that was written", param=path.name)


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
