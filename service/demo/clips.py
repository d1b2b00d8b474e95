"""Writes pictures as PNG and clips as MP4. A clip is 8 beats of half a second, one per sampled frame."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from service.demo.drawing import Pixels

NUM_BEATS = 8
CLIP_LENGTH_S = 4.0
ENCODED_SCALE = 2  # yuv420p halves the colour planes: at twice the size each drawn pixel keeps its own colour
QUALITY = "14"  # x264's crf


def write_picture(pixels: Pixels, path: str | Path) -> None:
    """`pixels` is uint8 `[H, W, 3]`."""
    Image.fromarray(pixels, "RGB").save(path, format="PNG")


def write_clip(frames: Pixels, path: str | Path, fps: int = 8) -> None:
    """Writes `frames`, uint8 `[8, H, W, 3]`, as an H.264 MP4 of 4 s.

    The frame shown at the middle of each eighth of the duration is the frame given; the others of its beat
    are moved by a pixel, as a hand-held camera would.
    """
    if frames.ndim != 4 or len(frames) != NUM_BEATS:
        raise ValueError(f"a clip has {NUM_BEATS} frames [8, H, W, 3], not {frames.shape}")
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": QUALITY, "bf": "0"})
        stream.height, stream.width = (side * ENCODED_SCALE for side in frames.shape[1:3])
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, fps)
        for pixels in _shown_frames(frames, fps):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(_enlarged(pixels), format="rgb24")))
        container.mux(stream.encode(None))


def _shown_frames(frames: Pixels, fps: int) -> Iterator[Pixels]:
    """Each beat's frames: the first and the last of a beat moved by a pixel, those around its middle as given."""
    per_beat = round(CLIP_LENGTH_S * fps / NUM_BEATS)
    for beat, pixels in enumerate(frames):
        for step in range(per_beat):
            at_rim = per_beat >= 4 and step in (0, per_beat - 1)
            yield _moved(pixels, axis=beat % 2, by=1 if step == 0 else -1) if at_rim else pixels


def _moved(pixels: Pixels, axis: int, by: int) -> Pixels:
    """The picture moved by a pixel, its rim repeated."""
    padding = [(1, 1) if index == axis else (0, 0) for index in range(3)]
    padded = np.pad(pixels, padding, mode="edge")
    return np.take(padded, np.arange(pixels.shape[axis]) + 1 - by, axis=axis)


def _enlarged(pixels: Pixels) -> Pixels:
    return np.ascontiguousarray(pixels.repeat(ENCODED_SCALE, axis=0).repeat(ENCODED_SCALE, axis=1))
