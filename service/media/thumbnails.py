"""Small JPEGs of pictures and clips, for people to look at."""

from io import BytesIO

from PIL import Image

from service.errors import UnsupportedMedia
from service.media.clip import opened_clip
from service.media.picture import load_picture
from service.media.source import DEFAULT_LIMITS, MediaLimits, MediaSource, media_kind, read_source

_QUALITY = 85


def thumbnail(source: MediaSource, size: int = 160, limits: MediaLimits = DEFAULT_LIMITS) -> bytes:
    """JPEG bytes, the longer side at most `size` pixels, aspect kept; of a clip, the frame in the middle of its duration.

    Raises: `UnsupportedMedia`, `CorruptMedia`, `MediaTooLarge`, `MissingMedia`.
    """
    picture = _picture(read_source(source, limits), limits)
    picture.thumbnail((size, size), Image.Resampling.BICUBIC)
    encoded = BytesIO()
    picture.save(encoded, "JPEG", quality=_QUALITY)
    return encoded.getvalue()


def _picture(data: bytes, limits: MediaLimits) -> Image.Image:
    kind = media_kind(data)
    if kind is None:
        raise UnsupportedMedia("neither a picture nor a clip of a format we read")
    if kind == "image":
        return load_picture(data, limits)
    with opened_clip(data, limits) as clip:
        return next(clip.shots((clip.duration_s / 2,))).picture
