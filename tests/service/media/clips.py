"""Real clips made in memory. Every frame shows its own number as a grey level, so a test can read which frame it got."""

from collections.abc import Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from service.media import CLIP_MEAN, CLIP_STD, VideoFrames

LEVEL_STEP = 5  # grey levels between two frames: room for 50 frames and for the codec's errors
TICK_S = Fraction(1, 1000)


def grey_frame(number: int, width: int, height: int) -> av.VideoFrame:
    """Left half: the frame's number. Right half: red above, blue below, to see which way is up."""
    picture = np.empty((height, width, 3), np.uint8)
    picture[:, : width // 2] = number * LEVEL_STEP
    picture[: height // 2, width // 2 :] = (255, 0, 0)
    picture[height // 2 :, width // 2 :] = (0, 0, 255)
    return av.VideoFrame.from_ndarray(picture, format="rgb24")


def make_clip(
    container: str = "mp4",
    codec: str = "libx264",
    *,
    num_frames: int = 50,
    times_s: Sequence[float] | None = None,
    start_s: float = 0.0,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    rotation: int | None = None,
    pixel_format: str = "yuv420p",
    size: tuple[int, int] = (160, 96),
) -> bytes:
    """A clip of 25 frames a second, unless `times_s` says when each frame is shown."""
    with TemporaryDirectory() as folder:  # a real file: some muxers open theirs again
        path = Path(folder, "clip")
        with av.open(str(path), "w", format=container, container_options=container_options) as output:
            stream: Any = output.add_stream(codec, rate=25, options={"g": "10", **(options or {})})
            stream.width, stream.height = size
            stream.pix_fmt = pixel_format
            stream.codec_context.time_base = Fraction(1, 25) if times_s is None else TICK_S
            if rotation is not None:
                stream.set_display_rotation(rotation)
            output.start_encoding()
            for number in range(num_frames):
                frame = grey_frame(number, *size)
                frame.time_base = stream.codec_context.time_base
                shown_s = number / 25 if times_s is None else times_s[number]
                frame.pts = round((start_s + shown_s) / frame.time_base)
                output.mux(stream.encode(frame))
            if num_frames:
                output.mux(stream.encode())
        return path.read_bytes()


def make_plain_clip(colour: tuple[int, int, int], *, num_frames: int = 6, size: tuple[int, int] = (32, 32)) -> bytes:
    """An MP4 of one colour, 25 frames a second."""
    width, height = size
    file = BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream: Any = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), colour, np.uint8), format="rgb24")
        for number in range(num_frames):
            frame.pts = number
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def make_sound(container: str = "mp4", *, cover: bytes | None = None) -> bytes:
    """Half a second of silence, with a cover picture (JPEG) if given."""
    file = BytesIO()
    with av.open(file, "w", format=container) as output:
        sound = output.add_stream("aac", rate=16_000, layout="mono")
        if cover is not None:
            art = output.add_stream("mjpeg")
            art.width = art.height = 32
            art.pix_fmt = "yuvj420p"
            art.disposition = av.stream.Disposition.attached_pic
        output.start_encoding()
        if cover is not None:
            packet = av.Packet(cover)
            packet.stream, packet.pts, packet.dts = art, 0, 0
            output.mux(packet)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 8_000), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 16_000
        output.mux(sound.encode(samples))
        output.mux(sound.encode())
    return file.getvalue()


def rgb(pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Undo the normalisation: [..., 3, H, W] float32 -> the same in 0..255."""
    mean = np.array(CLIP_MEAN)[:, None, None]
    std = np.array(CLIP_STD)[:, None, None]
    return np.asarray((pixels * std + mean) * 255)


def frame_numbers(video: VideoFrames) -> list[int]:
    """The number each frame shows."""
    height, width = video.frames.shape[2:]
    levels = rgb(video.frames)[:, :, height // 4 : -height // 4, width // 8 : width // 4].mean(axis=(1, 2, 3))
    return [round(level / LEVEL_STEP) for level in levels]
