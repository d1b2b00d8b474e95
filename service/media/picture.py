"""Pictures: JPEG, PNG and WebP bytes -> an upright RGB picture -> normalised pixels [3, H, W]."""

from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from service.errors import UnsupportedMedia
from service.media.source import (
    DEFAULT_LIMITS,
    MediaLimits,
    MediaSource,
    check_pixels,
    media_errors,
    picture_format,
    read_source,
)

# Imported because importing registers the format; without them Pillow loads every format it has at the first picture.
_FORMATS = (JpegImagePlugin, PngImagePlugin, WebPImagePlugin)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Preprocessing:
    """The authors' evaluation transform: RGB, resize to `resolution` x `resolution` (aspect not kept), / 255, (x - mean) / std."""

    resolution: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resample: Literal["bicubic"] = "bicubic"


def decode_image(
    source: MediaSource, prep: Preprocessing, limits: MediaLimits = DEFAULT_LIMITS
) -> npt.NDArray[np.float32]:
    """One picture, upright, preprocessed: [3, H, W] float32 with H = W = `prep.resolution`. An animation gives its first frame.

    Transparency is dropped and 16-bit samples keep their high byte, as Pillow's own RGB conversions do.
    Raises: `UnsupportedMedia`, `CorruptMedia`, `MediaTooLarge`, `MissingMedia`.
    """
    return to_pixels(load_picture(read_source(source, limits), limits), prep)


def load_picture(data: bytes, limits: MediaLimits) -> Image.Image:
    """Decode to an upright 8-bit RGB picture; its size is checked before its pixels are."""
    claimed = picture_format(data)
    if claimed is None:
        raise UnsupportedMedia("not a JPEG, PNG or WebP picture")
    with media_errors("picture"), Image.open(BytesIO(data), formats=(claimed,)) as image:
        check_pixels(*image.size, limits)
        image.load()
        return _upright(image, _to_rgb(image))


def to_pixels(image: Image.Image, prep: Preprocessing) -> npt.NDArray[np.float32]:
    """Resize and normalise an RGB picture of any size: [3, H, W] float32, contiguous."""
    resized = image.resize((prep.resolution, prep.resolution), Image.Resampling.BICUBIC)
    pixels = np.empty((3, prep.resolution, prep.resolution), np.float32)
    for channel, band, mean, std in zip(pixels, resized.split(), prep.mean, prep.std, strict=True):
        channel[:] = np.asarray(band)
        channel *= 1 / (255 * std)  # (x / 255 - mean) / std
        channel -= mean / std
    return pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I;16":  # a direct conversion would clip at 255
        high_bytes = (np.asarray(image) >> 8).astype(np.uint8)
        return Image.fromarray(high_bytes).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        # Pillow warns about a direct conversion; the colours are the same.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _upright(original: Image.Image, image: Image.Image) -> Image.Image:
    try:
        orientation = cast(Any, original.getexif().get(_EXIF_ORIENTATION))
    except Exception:  # the picture itself is fine; a broken note about it is not worth a refusal
        return image
    transposition = _UPRIGHT.get(orientation)
    return image if transposition is None else image.transpose(transposition)
