import os
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from service.errors import MediaTooLarge, MissingMedia, UnsupportedMedia
from service.media import MediaLimits, any_media_kind, decode_image, media_kind
from service.media.picture import Preprocessing
from service.media.source import read_source
from tests.service.media.clips import make_clip, make_sound
from tests.service.media.sounds import make_sound_file, tone

LIMITS = MediaLimits(max_bytes=100)


def picture(format: str) -> bytes:
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, format)
    return file.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_recognised(format: str) -> None:
    assert media_kind(picture(format)) == "image"


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mp4", "libx264"), ("mov", "libx264"), ("webm", "libvpx"), ("matroska", "libx264"), ("avi", "mpeg4")],
)
def test_clips_are_recognised(container: str, codec: str) -> None:
    assert media_kind(make_clip(container, codec, num_frames=2)) == "video"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello, this is text",
        b"#EXTM3U\nfile:///etc/passwd",
        b"RIFF\0\0\0\0WAVEfmt ",
        b"\0\0\0\x20ftypavif",
        b"GIF89a" + bytes(20),
    ],
)
def test_other_bytes_are_not(data: bytes) -> None:
    assert media_kind(data) is None


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("wav", "pcm_s16le"),
        ("flac", "flac"),
        ("ogg", "libopus"),
        ("mp3", "libmp3lame"),
        ("adts", "aac"),
        ("ipod", "aac"),
    ],
)
def test_sounds_are_recognised_where_they_are_asked_for(container: str, codec: str) -> None:
    rate = 48_000 if codec == "libopus" else 16_000
    sound = make_sound_file(tone(440, 0.2, rate), container=container, codec=codec, rate=rate)
    assert any_media_kind(sound[:12]) == "audio"


def test_pictures_and_clips_stay_what_they_are_beside_sounds() -> None:
    assert any_media_kind(picture("PNG")) == any_media_kind(picture("JPEG")) == "image"
    assert any_media_kind(make_clip(num_frames=2)) == any_media_kind(make_sound("mp4")) == "video"
    assert any_media_kind(b"hello, this is text") is None


def test_bytes_above_the_limit_are_refused() -> None:
    assert read_source(bytes(100), LIMITS) == bytes(100)
    with pytest.raises(MediaTooLarge, match="101 bytes, 100 are allowed"):
        read_source(bytes(101), LIMITS)


def test_a_file_above_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.mp4"
    with open(path, "wb") as file:
        file.truncate(2**40)  # sparse: reading it would need a terabyte
    with pytest.raises(MediaTooLarge):
        read_source(path, MediaLimits())


def test_a_file_is_read_like_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(picture("PNG"))
    prep = Preprocessing(16)
    assert (decode_image(path, prep) == decode_image(picture("PNG"), prep)).all()


def test_a_missing_file_is_missing_media(tmp_path: Path) -> None:
    with pytest.raises(MissingMedia, match=r"gone\.jpg") as caught:
        read_source(tmp_path / "gone.jpg", LIMITS)
    assert str(tmp_path) not in caught.value.message


def test_a_pipe_or_folder_is_refused_unopened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it would wait for a writer for ever
    for path in (tmp_path / "pipe.mp4", tmp_path):
        with pytest.raises(UnsupportedMedia, match="not a regular file"):
            read_source(path, LIMITS)
