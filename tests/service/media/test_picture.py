import random
import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from service.errors import BadMedia, CorruptMedia, MediaTooLarge, UnsupportedMedia
from service.media import MediaLimits, Preprocessing, decode_image
from service.media.picture import load_picture
from service.media.source import DEFAULT_LIMITS

PREP = Preprocessing(32)


def photo(width: int = 64, height: int = 48) -> Image.Image:
    """Smooth colours, different in every corner."""
    corners = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [250, 240, 30]]], np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def loaded(data: bytes) -> np.ndarray:
    return np.asarray(load_picture(data, DEFAULT_LIMITS))


@pytest.mark.parametrize("resolution", [32, 224, 384])
@pytest.mark.parametrize("size", [(640, 480), (97, 301)])
def test_pixels_equal_the_reference_processor(resolution: int, size: tuple[int, int]) -> None:
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG", quality=95)
    reference = BlipImageProcessorPil(size={"height": resolution, "width": resolution})
    expected = reference(Image.open(BytesIO(data)), return_tensors="np")["pixel_values"][0]

    pixels = decode_image(data, Preprocessing(resolution))

    assert pixels.shape == (3, resolution, resolution)
    assert pixels.dtype == np.float32
    assert pixels.flags.c_contiguous
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=1e-5)


def test_mean_and_std_are_used_per_channel() -> None:
    data = encoded(Image.new("RGB", (8, 8), (51, 102, 204)), "PNG")
    pixels = decode_image(data, Preprocessing(4, mean=(0.2, 0.3, 0.4), std=(1.0, 0.5, 0.1)))
    np.testing.assert_allclose(pixels[:, 0, 0], [0.0, 0.2, 4.0], atol=1e-5)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_the_three_formats_are_read(format: str) -> None:
    decoded = loaded(encoded(photo(), format)).astype(int)
    assert np.abs(decoded - np.asarray(photo())).mean() < 6


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_unsupported(format: str) -> None:
    with pytest.raises(UnsupportedMedia):
        decode_image(encoded(photo(), format), PREP)


@pytest.mark.parametrize("data", [b"", b"plain text", b"<svg></svg>"])
def test_other_bytes_are_unsupported(data: bytes) -> None:
    with pytest.raises(UnsupportedMedia):
        decode_image(data, PREP)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_picture_is_corrupt(format: str, share: float) -> None:
    data = encoded(photo(256, 256).effect_spread(40), format)
    with pytest.raises(CorruptMedia) as caught:
        decode_image(data[: max(14, int(len(data) * share))], PREP)
    assert "0x" not in caught.value.message


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_orientation_is_undone(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(), format, exif=exif, lossless=True)
    expected = ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB")
    assert (loaded(data) == np.asarray(expected)).all()
    if orientation == 6:  # a phone held upright: the stored left edge is the top
        assert (loaded(data)[0, -1] == np.asarray(photo())[0, 0]).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0garbage!",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abcd",
    ],
)
def test_a_broken_exif_block_does_not_spoil_the_picture(exif: bytes) -> None:
    assert loaded(encoded(photo(), "JPEG", exif=exif)).shape == (48, 64, 3)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize("side", [7_000, 12_000, 60_000])
def test_a_bomb_is_refused_by_its_header(side: int) -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    no_pixels = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(MediaTooLarge):
        decode_image(no_pixels, PREP)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_the_pixel_limit_is_inclusive(format: str) -> None:
    data = encoded(photo(), format)
    decode_image(data, PREP, MediaLimits(max_pixels=64 * 48))
    with pytest.raises(MediaTooLarge, match="64 x 48"):
        decode_image(data, PREP, MediaLimits(max_pixels=64 * 48 - 1))


def test_running_out_of_memory_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(image: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", no_memory)
    with pytest.raises(MediaTooLarge, match="memory"):
        decode_image(encoded(photo(), "PNG"), PREP)


def test_16_bit_samples_keep_their_high_byte() -> None:
    samples = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    decoded = loaded(encoded(Image.fromarray(samples), "PNG"))
    assert (decoded == (samples >> 8)[..., None]).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_colour_modes_become_rgb(mode: str) -> None:
    image = photo().convert(mode)
    assert (loaded(encoded(image, "PNG")) == np.asarray(image.convert("RGB"))).all()


def test_transparency_is_dropped() -> None:
    clear_red = Image.new("RGBA", (4, 4), (200, 10, 20, 0))
    assert (loaded(encoded(clear_red, "PNG")) == (200, 10, 20)).all()
    palette = photo().convert("P")
    data = encoded(palette, "PNG", transparency=bytes(range(256)))
    assert (loaded(data) == np.asarray(palette.convert("RGB"))).all()


def test_cmyk_becomes_rgb() -> None:
    decoded = loaded(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert np.abs(decoded.astype(int) - (255, 0, 0)).max() < 6


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    animation: Any = Image.open(BytesIO(data))
    assert animation.n_frames == 3
    assert (loaded(data) == (255, 0, 0)).all()


@pytest.mark.filterwarnings("default")  # Pillow warns about some of these
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_damaged_bytes_never_raise_anything_but_bad_media(format: str) -> None:
    data = encoded(photo(), format)
    dice = random.Random(format)
    num_refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(dice.randint(1, 4)):
            damaged[dice.randrange(len(data))] = dice.randrange(256)
        try:
            assert decode_image(bytes(damaged), PREP).shape == (3, 32, 32)
        except BadMedia:
            num_refused += 1
    assert num_refused > 0
