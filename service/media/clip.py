"""Clips: MP4, MOV, WebM, Matroska and AVI bytes -> frames sampled by time.

All packets of the picture stream are read first (compressed, so at most the clip's own size). They tell every frame's time, the
true duration and where decoding may start, whatever a header or an index claims; then only what leads to a wanted
frame is decoded:

    packets   K . . . . . K . . . . . K . . . . .      K: decoding may start here
    wanted            ^                 ^   ^
    decoded   [-------]           .     [---]
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from typing import NamedTuple, cast

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from service.errors import CorruptMedia, MediaTooLarge, UnsupportedMedia
from service.media.picture import Preprocessing, to_pixels
from service.media.source import (
    DEFAULT_LIMITS,
    MediaLimits,
    MediaSource,
    check_pixels,
    clip_format,
    media_errors,
    read_source,
)

# Decoders we let bytes from outside reach. FFmpeg has hundreds, most of them rarely tested.
_CODECS = (
    *("av1", "flv1", "h263", "h264", "hevc", "mjpeg", "mpeg1video", "mpeg2video", "mpeg4"),
    *("msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "prores", "vp8", "vp9", "wmv1", "wmv2", "wmv3"),
)
_ROTATE_LEFT = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
_READ_BYTES = 2**20


@dataclass(frozen=True, eq=False)
class VideoFrames:
    """Frames of one clip. Times count from the clip's first frame; `times_s` are those of the frames taken, not of the targets."""

    frames: npt.NDArray[np.float32]  # [T, 3, H, W]
    times_s: tuple[float, ...]
    duration_s: float


def sample_times(duration_s: float, num_frames: int) -> tuple[float, ...]:
    """Target times t_i = (i + 1/2) * duration / T: the centres of T equal intervals."""
    return tuple((i + 0.5) * duration_s / num_frames for i in range(num_frames))


def decode_video(
    source: MediaSource, prep: Preprocessing, num_frames: int, limits: MediaLimits = DEFAULT_LIMITS
) -> VideoFrames:
    """`num_frames` frames, each the last one shown at or before its target time; a short clip repeats frames.

    Raises: `UnsupportedMedia`, `CorruptMedia`, `MediaTooLarge`, `MissingMedia`.
    """
    if num_frames < 1:
        raise ValueError("num_frames must be at least 1")
    data = read_source(source, limits)
    frames = np.empty((num_frames, 3, prep.resolution, prep.resolution), np.float32)
    times_s: list[float] = []
    previous: Shot | None = None
    with opened_clip(data, limits) as clip:
        targets_s = sample_times(clip.duration_s, num_frames)
        for i, shot in enumerate(clip.shots(targets_s)):
            frames[i] = frames[i - 1] if shot is previous else to_pixels(shot.picture, prep)
            times_s.append(shot.time_s)
            previous = shot
    return VideoFrames(frames, tuple(times_s), clip.duration_s)


class Shot(NamedTuple):
    """One upright RGB frame and when it is shown, from the clip's first frame."""

    time_s: float
    picture: Image.Image


@contextmanager
def opened_clip(data: bytes, limits: MediaLimits) -> "Iterator[Clip]":
    """The clip in `data`, its packets read and its limits checked; what decoding raises inside is `BadMedia` outside."""
    claimed = clip_format(data)
    if claimed is None:
        raise UnsupportedMedia("not an MP4, MOV, WebM, Matroska or AVI clip")
    # The format is forced: a probe might pick a playlist format, which opens addresses named inside the file.
    with media_errors("clip"), av.open(BytesIO(data), "r", format=claimed, buffer_size=_READ_BYTES) as container:
        stream = _picture_stream(list(container.streams.video))
        check_pixels(stream.codec_context.width, stream.codec_context.height, limits)
        stream.codec_context.thread_count = 1
        # The size may change on the way; what the decoder counts includes its margins.
        stream.codec_context.options = {"max_pixels": str(2 * limits.max_pixels + 2**20)}
        packets = _read_packets(container, stream)
        timeline = Timeline.of(packets, stream, by_order=claimed == "avi")
        if timeline.duration_s > limits.max_duration_s:
            raise MediaTooLarge(f"the clip lasts {timeline.duration_s:.1f} s, {limits.max_duration_s:g} s are allowed")
        yield Clip(packets, timeline, stream.codec_context, limits)


def _picture_stream(streams: list[VideoStream]) -> VideoStream:
    """The first moving picture; cover art of a sound file is a stream too, but not one."""
    moving = [stream for stream in streams if not stream.disposition & Disposition.attached_pic]
    if not moving:
        raise UnsupportedMedia("the file holds no moving picture")
    context = moving[0].codec_context
    if context is None:
        raise CorruptMedia("the clip's header names no codec")
    codec = context.codec.canonical_name
    if codec not in _CODECS:
        raise UnsupportedMedia(f"the clip's codec {codec} is not one we read")
    return moving[0]


def _read_packets(container: InputContainer, stream: VideoStream) -> "list[av.Packet[VideoStream]]":
    """The stream's packets, in decoding order. Sound is read past, to see where the file really ends.

    Raises: `CorruptMedia` if there is none, or the file ends well before the duration it declares.
    """
    packets: list[av.Packet[VideoStream]] = []
    end_s = 0.0
    for packet in container.demux():
        if packet.pts is not None:
            end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream is stream and packet.size:
            packets.append(cast("av.Packet[VideoStream]", packet))
    if not packets:
        raise CorruptMedia("the clip holds no frame")
    declared_s = (container.duration or 0) / av.time_base
    if end_s < declared_s - max(0.5, 0.05 * declared_s):
        raise CorruptMedia(f"the clip is cut off: {end_s:.1f} s of {declared_s:.1f} s are there")
    return packets


@dataclass(frozen=True)
class Timeline:
    """When each packet's frame is shown. Packets are in decoding order; ticks are `tick_s` seconds.

    AVI stores no times of display: with `by_order` the frames, as they come out, take the packets' decoding times in turn.
    Where frames are stored out of order, counting them is right only from the first packet, so that alone is a key.
    """

    ticks: tuple[int, ...]
    keys: tuple[bool, ...]
    tick_s: Fraction
    end: int
    by_order: bool

    @classmethod
    def of(cls, packets: "Sequence[av.Packet[VideoStream]]", stream: VideoStream, *, by_order: bool) -> "Timeline":
        """Read the times off the packets; without usable times of display, fall back to decoding times."""
        ticks = [packet.pts for packet in packets if packet.pts is not None]
        keys = [packet.is_keyframe for packet in packets]
        by_order = by_order or len(ticks) < len(packets)
        if by_order:
            ticks = _filled([packet.dts for packet in packets])
            if stream.codec_context.has_b_frames:
                keys = [i == 0 for i in range(len(packets))]
        last = max(range(len(ticks)), key=ticks.__getitem__)
        usual_duration = (ticks[last] - min(ticks)) // max(1, len(ticks) - 1)
        end = ticks[last] + max(1, packets[last].duration or usual_duration)
        return cls(tuple(ticks), tuple(keys), stream.time_base or Fraction(1, 1000), end, by_order)

    @property
    def start(self) -> int:
        return min(self.ticks)

    @property
    def duration_s(self) -> float:
        return float((self.end - self.start) * self.tick_s)

    def tick(self, time_s: float) -> int:
        """The tick begun at `time_s` from the clip's first frame; a thousandth of a tick hides the rounding of seconds."""
        return self.start + math.floor(time_s / self.tick_s + 1e-3)

    def seconds(self, tick: int) -> float:
        """Seconds from the clip's first frame."""
        return float((tick - self.start) * self.tick_s)


def _filled(ticks: Sequence[int | None]) -> list[int]:
    """Unknown times take the one before; the first takes 0."""
    filled: list[int] = []
    for tick in ticks:
        filled.append(tick if tick is not None else filled[-1] if filled else 0)
    return filled


class Run(NamedTuple):
    """Decode from packet `start` up to packet `stop` (its frame may come out a few packets later) and keep the frames at `wanted`."""

    start: int
    stop: int
    wanted: tuple[int, ...]  # ticks, ascending; repeats allowed


def plan_runs(ticks: Sequence[int], keys: Sequence[bool], targets: Sequence[int]) -> list[Run]:
    """The stretches to decode so that every target (ticks, ascending) gets the last frame at or before it.

    A stretch starts at the last key packet shown no later than its frame, so that frames decoded after a key packet but
    shown before it start from the key packet before. Targets in one stretch share the decoding.
    """
    by_time = sorted(range(len(ticks)), key=ticks.__getitem__)
    shown = [ticks[i] for i in by_time]
    runs: list[Run] = []
    for target in targets:
        packet = by_time[max(0, bisect_right(shown, target) - 1)]
        start = next((i for i in range(packet, -1, -1) if keys[i] and ticks[i] <= ticks[packet]), 0)
        if runs and start <= runs[-1].stop:
            run = runs.pop()
            runs.append(Run(run.start, max(run.stop, packet), (*run.wanted, ticks[packet])))
        else:
            runs.append(Run(start, packet, (ticks[packet],)))
    return runs


class Clip:
    """A clip whose packets are read; decodes on demand."""

    def __init__(
        self,
        packets: list["av.Packet[VideoStream]"],
        timeline: Timeline,
        context: VideoCodecContext,
        limits: MediaLimits,
    ) -> None:
        self._packets = packets
        self._timeline = timeline
        self._context = context
        self._limits = limits

    @property
    def duration_s(self) -> float:
        return self._timeline.duration_s

    def shots(self, targets_s: Sequence[float]) -> Iterator[Shot]:
        """One shot per target (seconds, ascending); a repeated shot is the same object.

        Raises: `MediaTooLarge` before decoding if too many frames lead to the targets; `CorruptMedia` if a stretch yields none.
        """
        timeline = self._timeline
        targets = [timeline.tick(target_s) for target_s in targets_s]
        runs = plan_runs(timeline.ticks, timeline.keys, targets)
        num_frames = sum(run.stop - run.start + 1 for run in runs)
        if num_frames > self._limits.max_decoded_frames:
            raise MediaTooLarge(f"{num_frames} frames to decode, {self._limits.max_decoded_frames} are allowed")
        for run in runs:
            taken: tuple[int, VideoFrame] | None = None
            for tick, frame in self._take(run):
                if taken is None or taken[1] is not frame:
                    taken = tick, frame
                    shot = Shot(timeline.seconds(tick), _to_picture(frame))
                yield shot

    def _take(self, run: Run) -> Iterator[tuple[int, VideoFrame]]:
        """For each wanted tick the frame shown then: (its tick, frame)."""
        wanted = list(run.wanted)
        previous: tuple[int, VideoFrame] | None = None
        for tick, frame in self._frames(run):
            while wanted and tick >= wanted[0]:
                yield (tick, frame) if tick == wanted.pop(0) or previous is None else previous
            if not wanted:
                return
            previous = tick, frame
        if previous is None:
            raise CorruptMedia("no frame of the clip can be decoded")
        for _ in wanted:
            yield previous

    def _frames(self, run: Run) -> Iterator[tuple[int, VideoFrame]]:
        """Decoded frames with their ticks, in the order they are shown. A broken packet costs its frames only."""
        order = iter(range(run.start, len(self._packets)))
        for frame in self._decode(run):
            if self._timeline.by_order:
                yield self._timeline.ticks[next(order, -1)], frame
            elif frame.pts is not None:
                yield frame.pts, frame

    def _decode(self, run: Run) -> Iterator[VideoFrame]:
        self._context.flush_buffers()
        wanted = set(run.wanted)
        for i in range(run.start, len(self._packets)):
            # Frames nothing depends on need not be decoded (half of the time of H.264), unless they are counted or wanted.
            skippable = not self._timeline.by_order and self._timeline.ticks[i] not in wanted
            self._context.skip_frame = "NONREF" if skippable else "DEFAULT"
            try:
                yield from self._context.decode(self._packets[i])
            except av.error.InvalidDataError:
                continue
        yield from self._context.decode(None)


def _to_picture(frame: VideoFrame) -> Image.Image:
    """8-bit RGB, turned as the clip's display matrix says (`rotation`: degrees counter-clockwise)."""
    picture = Image.fromarray(frame.to_ndarray(format="rgb24", threads=1))
    transposition = _ROTATE_LEFT.get(round(frame.rotation / 90) * 90 % 360)
    return picture if transposition is None else picture.transpose(transposition)
