import random
import struct
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from service.errors import BadMedia, CorruptMedia, MediaTooLarge, UnsupportedMedia
from service.media import MediaLimits, Preprocessing, VideoFrames, decode_video, sample_times
from service.media.clip import Run, plan_runs
from service.media.picture import to_pixels
from tests.service.media.clips import frame_numbers, make_clip, make_sound, rgb

PREP = Preprocessing(32)
FAST_VP9 = {"deadline": "realtime", "cpu-used": "8"}
KINDS: dict[str, dict[str, Any]] = {
    "mp4 h264": {"container": "mp4", "codec": "libx264"},
    "mov h264": {"container": "mov", "codec": "libx264"},
    "mkv h264": {"container": "matroska", "codec": "libx264"},
    "webm vp9": {"container": "webm", "codec": "libvpx-vp9", "options": FAST_VP9},
    "webm vp8": {"container": "webm", "codec": "libvpx"},
    "avi mpeg4": {"container": "avi", "codec": "mpeg4"},
    "avi mpeg4, reordered": {"container": "avi", "codec": "mpeg4", "options": {"bf": "2"}},
    "avi h264, reordered": {"container": "avi", "codec": "libx264"},
    "mp4 mpeg4, reordered": {"container": "mp4", "codec": "mpeg4", "options": {"bf": "2"}},
    "mp4 hevc": {"container": "mp4", "codec": "libx265", "options": {"x265-params": "log-level=none:keyint=10"}},
    "mp4 h264, open groups": {
        "container": "mp4",
        "codec": "libx264",
        "options": {"x264-params": "open-gop=1:keyint=10:bframes=3"},
    },
    "mp4, index first": {"container_options": {"movflags": "faststart"}},
    "mp4, in fragments": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
}


def test_sample_times_are_the_centres_of_equal_intervals() -> None:
    assert sample_times(8.0, 4) == (1.0, 3.0, 5.0, 7.0)
    assert sample_times(3.0, 1) == (1.5,)


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_those_shown_at_the_target_times(kind: str) -> None:
    video = decode_video(make_clip(**KINDS[kind]), PREP, 4)
    assert video.frames.shape == (4, 3, 32, 32)
    assert video.frames.dtype == np.float32
    assert video.duration_s == pytest.approx(2.0, abs=0.002)
    assert frame_numbers(video) == [6, 18, 31, 43]  # targets 0.25, 0.75, 1.25, 1.75 s; a frame lasts 0.04 s
    assert video.times_s == pytest.approx((0.24, 0.72, 1.24, 1.72), abs=0.002)


@pytest.mark.parametrize("num_frames", [1, 3, 16, 50])
@pytest.mark.parametrize("kind", ["mp4 h264", "mp4 h264, open groups", "webm vp9", "mp4 mpeg4, reordered", "mp4 hevc"])
def test_decoding_only_what_is_needed_changes_nothing(kind: str, num_frames: int) -> None:
    data = make_clip(**KINDS[kind])
    video = decode_video(data, PREP, num_frames)
    with av.open(BytesIO(data), "r") as container:
        shown = [(frame.time, frame) for frame in container.decode(video=0)]
    for i, target_s in enumerate(sample_times(2.0, num_frames)):
        frame = [frame for time_s, frame in shown if time_s <= target_s + 1e-6][-1]
        expected = to_pixels(Image.fromarray(frame.to_ndarray(format="rgb24")), PREP)
        assert (video.frames[i] == expected).all(), i


def test_every_frame_once_when_as_many_are_asked_for() -> None:
    assert frame_numbers(decode_video(make_clip(), PREP, 50)) == list(range(50))


def test_targets_on_the_edge_of_frames_keep_an_even_step() -> None:
    assert frame_numbers(decode_video(make_clip(), PREP, 25)) == list(range(1, 50, 2))


@pytest.mark.parametrize("kind", ["mp4 h264", "mkv h264", "webm vp9"])
def test_times_count_from_the_first_frame(kind: str) -> None:
    data = make_clip(**KINDS[kind], start_s=3.0)
    with av.open(BytesIO(data), "r") as container:
        assert (container.streams.video[0].start_time or 0) > 0
    video = decode_video(data, PREP, 4)
    assert frame_numbers(video) == [6, 18, 31, 43]
    assert video.times_s == pytest.approx((0.24, 0.72, 1.24, 1.72), abs=0.002)
    assert video.duration_s == pytest.approx(2.0, abs=0.002)


@pytest.mark.parametrize(("container", "codec"), [("mp4", "libx264"), ("webm", "libvpx")])
def test_a_variable_frame_rate_is_sampled_by_time(container: str, codec: str) -> None:
    data = make_clip(container, codec, num_frames=5, times_s=[0, 0.1, 0.2, 3, 9])
    video = decode_video(data, PREP, 6)
    assert video.duration_s == pytest.approx(9, abs=2.3)  # the last frame's own duration is the muxer's guess
    targets_s = sample_times(video.duration_s, 6)
    shown_s = [0.2 if target_s < 3 else 3 if target_s < 9 else 9 for target_s in targets_s]
    assert video.times_s == pytest.approx(shown_s, abs=0.002)
    assert frame_numbers(video) == [{0.2: 2, 3: 3, 9: 4}[time_s] for time_s in shown_s]


def test_a_short_clip_repeats_frames() -> None:
    video = decode_video(make_clip(num_frames=3), PREP, 8)
    assert frame_numbers(video) == [0, 0, 0, 1, 1, 2, 2, 2]
    assert (video.frames[0] == video.frames[1]).all()
    assert video.times_s[0] == video.times_s[2] == 0.0
    assert frame_numbers(decode_video(make_clip(num_frames=1), PREP, 3)) == [0, 0, 0]


def test_a_container_without_frame_count_or_duration() -> None:
    data = make_clip("webm", "libvpx", container_options={"live": "1"})
    with av.open(BytesIO(data), "r") as container:
        assert container.streams.video[0].frames == 0
        assert container.duration is None
    video = decode_video(data, PREP, 4)
    assert video.duration_s == pytest.approx(2.0, abs=0.05)
    assert frame_numbers(video) == [6, 18, 31, 43]


def corners(video: VideoFrames) -> list[str]:
    """The colour in each corner: top left, top right, bottom left, bottom right."""
    names = []
    for y, x in ((3, 3), (3, -4), (-4, 3), (-4, -4)):
        red, _, blue = rgb(video.frames[0])[:, y, x]
        names.append("red" if red > 150 > blue else "blue" if blue > 150 > red else "dark")
    return names


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        (0, ["dark", "red", "dark", "blue"]),
        (90, ["red", "blue", "dark", "dark"]),
        (180, ["blue", "dark", "red", "dark"]),
        (-90, ["dark", "dark", "blue", "red"]),
    ],
)
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_rotation_is_applied(container: str, degrees: int, expected: list[str]) -> None:
    assert corners(decode_video(make_clip(container, num_frames=3, rotation=degrees), PREP, 1)) == expected


def test_a_phone_held_upright_is_turned_clockwise() -> None:
    """The matrix as phones write it (x' = -y, y' = x), put into the file by hand."""
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    data = make_clip(num_frames=3)
    track = data.index(b"tkhd")
    assert upright in data[track:]
    data = data[:track] + data[track:].replace(upright, turned, 1)
    assert corners(decode_video(data, PREP, 1)) == ["dark", "dark", "blue", "red"]


@pytest.mark.parametrize("name", ["notes.mp4", "list.mkv"])
def test_text_named_like_a_clip_is_unsupported(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n")
    with pytest.raises(UnsupportedMedia, match="not an MP4"):
        decode_video(path, PREP, 4)


def test_sound_alone_is_unsupported() -> None:
    with pytest.raises(UnsupportedMedia, match="no moving picture"):
        decode_video(make_sound(), PREP, 4)


def test_cover_art_is_not_a_clip() -> None:
    cover = BytesIO()
    Image.new("RGB", (32, 32)).save(cover, "JPEG")
    data = make_sound(cover=cover.getvalue())
    with av.open(BytesIO(data), "r") as container:
        assert len(container.streams.video) == 1
    with pytest.raises(UnsupportedMedia, match="no moving picture"):
        decode_video(data, PREP, 4)


@pytest.mark.parametrize("kind", ["webm vp9", "mkv h264", "avi mpeg4"])
def test_a_clip_without_frames_is_corrupt(kind: str) -> None:
    with pytest.raises(CorruptMedia):
        decode_video(make_clip(**KINDS[kind], num_frames=0), PREP, 4)


def test_a_codec_we_do_not_read_is_named() -> None:
    with pytest.raises(UnsupportedMedia, match="ffv1"):
        decode_video(make_clip("matroska", "ffv1", num_frames=2), PREP, 1)


@pytest.mark.parametrize("share", [0.4, 0.6])
@pytest.mark.parametrize("kind", ["mp4 h264", "mp4, index first", "webm vp9", "mkv h264"])
def test_a_clip_cut_off_is_corrupt(kind: str, share: float) -> None:
    data = make_clip(**KINDS[kind])
    with pytest.raises(CorruptMedia):
        decode_video(data[: int(len(data) * share)], PREP, 4)


def test_a_broken_packet_costs_only_what_depends_on_it() -> None:
    data = make_clip(**KINDS["webm vp9"])
    with av.open(BytesIO(data), "r") as container:
        broken = bytes([packet for packet in container.demux(video=0) if packet.size][33])
    damaged = data.replace(broken, b"\xff" * len(broken))
    assert frame_numbers(decode_video(damaged, PREP, 50)) == [*range(33), *[32] * 7, *range(40, 50)]


def test_limits() -> None:
    data = make_clip()
    fits = MediaLimits(max_bytes=len(data), max_pixels=160 * 96, max_duration_s=2.0, max_decoded_frames=50)
    decode_video(data, PREP, 50, fits)
    for refused, message in (
        (MediaLimits(max_bytes=len(data) - 1), "bytes"),
        (MediaLimits(max_pixels=160 * 96 - 1), "160 x 96 pixels"),
        (MediaLimits(max_duration_s=1.9), "2.0 s, 1.9 s are allowed"),
        (MediaLimits(max_decoded_frames=49), "50 frames to decode"),
    ):
        with pytest.raises(MediaTooLarge, match=message):
            decode_video(data, PREP, 50, refused)


def test_only_the_frames_on_the_way_count_as_decoded() -> None:
    data = make_clip(options={"g": "10", "sc_threshold": "0"})
    decode_video(data, PREP, 2, MediaLimits(max_decoded_frames=20))  # frames 12 and 37: from 10 and from 30


def test_no_frames_asked_for_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        decode_video(make_clip(), PREP, 0)


@pytest.mark.parametrize("kind", ["mp4 h264", "webm vp9", "avi mpeg4"])
def test_damaged_bytes_never_raise_anything_but_bad_media(kind: str) -> None:
    data = make_clip(**KINDS[kind], num_frames=12)
    dice = random.Random(kind)
    num_refused = 0
    for _ in range(80):
        damaged = bytearray(data)
        for _ in range(dice.randint(1, 6)):
            damaged[dice.randrange(len(data))] = dice.randrange(256)
        try:
            assert decode_video(bytes(damaged), PREP, 3).frames.shape == (3, 3, 32, 32)
        except BadMedia:
            num_refused += 1
    assert num_refused > 0


class TestPlan:
    TICKS = (0, 10, 20, 30, 40, 50)
    KEYS = (True, False, False, True, False, False)

    def test_decoding_starts_at_the_key_before(self) -> None:
        assert plan_runs(self.TICKS, self.KEYS, [45]) == [Run(3, 4, (40,))]

    def test_targets_in_one_stretch_share_it(self) -> None:
        assert plan_runs(self.TICKS, self.KEYS, [5, 29, 29]) == [Run(0, 2, (0, 20, 20))]

    def test_a_later_stretch_is_reached_by_its_own_key(self) -> None:
        assert plan_runs(self.TICKS, self.KEYS, [5, 55]) == [Run(0, 0, (0,)), Run(3, 5, (50,))]

    def test_a_target_before_the_first_frame_takes_the_first(self) -> None:
        assert plan_runs((7, 9), (True, False), [0]) == [Run(0, 0, (7,))]

    def test_frames_shown_before_their_key_start_from_the_one_before(self) -> None:
        ticks = (0, 10, 40, 20, 30)  # 20 and 30 are decoded after the key at 40
        assert plan_runs(ticks, (True, False, True, False, False), [35]) == [Run(0, 4, (30,))]

    def test_without_any_key_it_starts_at_the_first_packet(self) -> None:
        assert plan_runs((0, 10, 20), (False, False, False), [20]) == [Run(0, 2, (20,))]
