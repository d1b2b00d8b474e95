"""What arrives: its bytes, its limits, the format its first bytes claim, and the boundary for a library's errors."""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, UnidentifiedImageError

from service.errors import BadMedia, CorruptMedia, MediaTooLarge, MissingMedia, UnsupportedMedia

MediaSource = bytes | Path
MediaKind = Literal["image", "video"]
AnyMediaKind = Literal["image", "video", "audio"]
PictureFormat = Literal["JPEG", "PNG", "WEBP"]
ClipFormat = Literal["mp4", "matroska", "avi"]
SoundFormat = Literal["wav", "flac", "ogg", "mp3", "aac", "mp4", "matroska"]

_IMAGE_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis", b"crx "}
_SOUND_BRANDS = {b"ftypM4A ", b"ftypM4B "}
_MP4_BOXES = {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"}


@dataclass(frozen=True)
class MediaLimits:
    """What one picture or clip may cost.

    `max_pixels` is read from the header and holds for a picture and for each frame. `max_decoded_frames` counts the frames
    that must be decoded to reach the sampled ones. `timeout_s` and `memory_bytes` (the address space of a worker,
    some 0.3 GiB of it the worker itself) are enforced by `MediaWorkers` only.
    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = 40_000_000
    max_duration_s: float = 600.0
    max_decoded_frames: int = 20_000
    timeout_s: float = 20.0
    memory_bytes: int = 2 * 2**30


DEFAULT_LIMITS = MediaLimits()


def picture_format(data: bytes) -> PictureFormat | None:
    """The picture format the first bytes claim; None if it is none of ours."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def clip_format(data: bytes) -> ClipFormat | None:
    """The container the first bytes claim (MOV counts as mp4, WebM as matroska); None if it is none of ours."""
    if data[4:8] in _MP4_BOXES and data[8:12] not in _IMAGE_BRANDS:
        return "mp4"
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if data.startswith(b"RIFF") and data[8:12] == b"AVI ":
        return "avi"
    return None


def sound_format(data: bytes) -> SoundFormat | None:
    """The container of sound the first bytes claim, a clip's that may hold some counts too; None if it is none of ours."""
    if data.startswith(b"RIFF") and data[8:12] == b"WAVE":
        return "wav"
    if data.startswith(b"fLaC"):
        return "flac"
    if data.startswith(b"OggS"):
        return "ogg"
    if len(data) > 1 and data[0] == 0xFF and data[1] & 0xF6 == 0xF0:  # ADTS: the layer's bits are zero
        return "aac"
    if data.startswith(b"ID3") or (len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0):
        return "mp3"
    clip = clip_format(data)
    return clip if clip == "mp4" or clip == "matroska" else None


def media_kind(data: bytes) -> MediaKind | None:
    """Image or video, by the first 12 bytes; None for a format we do not read. A container may still hold no picture."""
    if picture_format(data):
        return "image"
    return "video" if clip_format(data) else None


def any_media_kind(data: bytes) -> AnyMediaKind | None:
    """The same with sounds. A container that may hold pictures is a clip, but for MP4s that call themselves M4A."""
    if data[4:12] in _SOUND_BRANDS:
        return "audio"
    return media_kind(data) or ("audio" if sound_format(data) else None)


def media_digest(data: bytes) -> str:
    """Which bytes these are: sha256:... Takes some 0.6 ms a mebibyte, and lets other threads run meanwhile."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def read_source(source: MediaSource, limits: MediaLimits) -> bytes:
    """The whole of `source`.

    Raises: `MediaTooLarge` above `max_bytes` (a file's size is asked before it is read), `MissingMedia` for a path that
    cannot be read, `UnsupportedMedia` for a folder, pipe or device.
    """
    if isinstance(source, bytes):
        _check_size(len(source), limits)
        return source
    try:
        status = os.stat(source)
        if not stat.S_ISREG(status.st_mode):
            raise UnsupportedMedia(f"{source.name} is not a regular file")
        _check_size(status.st_size, limits)
        with open(source, "rb") as file:
            data = file.read(limits.max_bytes + 1)  # the file may have grown since
    except OSError as error:
        raise MissingMedia(f"{source.name} cannot be read: {error.strerror}") from error
    _check_size(len(data), limits)
    return data


def _check_size(num_bytes: int, limits: MediaLimits) -> None:
    if num_bytes > limits.max_bytes:
        raise MediaTooLarge(f"{num_bytes} bytes, {limits.max_bytes} are allowed")


def check_pixels(width: int, height: int, limits: MediaLimits) -> None:
    """Raises: `MediaTooLarge` if a picture of this size is above the limit."""
    if width * height > limits.max_pixels:
        raise MediaTooLarge(f"{width} x {height} pixels, {limits.max_pixels} are allowed")


@contextmanager
def media_errors(what: str) -> Iterator[None]:
    """Turn whatever a decoder raises into `BadMedia`. Broken files make Pillow and FFmpeg raise errors of any class."""
    try:
        yield
    except BadMedia:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaTooLarge(f"the {what} has too many pixels") from error
    except MemoryError as error:
        raise MediaTooLarge(f"the {what} needs more memory than allowed") from error
    except UnidentifiedImageError as error:
        raise CorruptMedia(f"the {what}'s header is broken") from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or error
        raise CorruptMedia(f"the {what} cannot be decoded: {reason}") from error
