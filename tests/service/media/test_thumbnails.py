from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from service.errors import CorruptMedia, MediaTooLarge, UnsupportedMedia
from service.media import MediaLimits, thumbnail
from tests.service.media.clips import LEVEL_STEP, make_clip


def opened(data: bytes) -> Image.Image:
    image = Image.open(BytesIO(data))
    assert image.format == "JPEG"
    return image


def png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_picture_keeps_its_aspect() -> None:
    data = png(Image.new("RGB", (400, 200), (10, 200, 30)))
    assert opened(thumbnail(data)).size == (160, 80)
    small = opened(thumbnail(data, size=40))
    assert small.size == (40, 20)
    assert np.abs(np.asarray(small).astype(int) - (10, 200, 30)).max() < 6


def test_a_small_picture_is_not_enlarged() -> None:
    assert opened(thumbnail(png(Image.new("RGBA", (30, 20))))).size == (30, 20)


def test_a_clip_shows_its_middle_frame() -> None:
    image = opened(thumbnail(make_clip(num_frames=41)))
    assert image.size == (160, 96)
    assert np.asarray(image)[20:60, 10:60].mean() / LEVEL_STEP == pytest.approx(20, abs=0.6)


def test_refusals() -> None:
    with pytest.raises(UnsupportedMedia):
        thumbnail(b"some text")
    with pytest.raises(CorruptMedia):
        thumbnail(png(Image.new("RGB", (30, 20)))[:40])
    with pytest.raises(MediaTooLarge):
        thumbnail(png(Image.new("RGB", (30, 20))), limits=MediaLimits(max_pixels=599))
