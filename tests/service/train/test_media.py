"""What files claim to be, and that all claim the same."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from adapters.errors import ConversionError
from service.errors import MissingMedia, UnsupportedMedia
from service.media import AnyMediaKind
from service.train.media import kind_of, shared_kind

SEEN: tuple[AnyMediaKind, ...] = ("image", "video")
ALL: tuple[AnyMediaKind, ...] = (*SEEN, "audio")


def kind(
    folder: Path, names: Sequence[str], kinds: tuple[AnyMediaKind, ...] = ALL
) -> tuple[AnyMediaKind | None, dict[int, str]]:
    return shared_kind([folder / name for name in names], kinds, lambda file: [file + 1])


@pytest.mark.parametrize("name, expected", [("red.png", "image"), ("0.mp4", "video"), ("440.wav", "audio")])
def test_a_file_says_what_it_is(media: Path, name: str, expected: str) -> None:
    assert kind_of(media / name, ALL) == expected
    assert kind(media, [name, name]) == (expected, {})


def test_files_that_cannot_be_used_are_left_to_the_caller(media: Path) -> None:
    (media / "text.png").write_text("no picture at all")
    found, broken = kind(media, ["gone.png", "red.png", "text.png", "blue.png"])
    assert found == "image" and broken.keys() == {0, 2}
    assert "gone.png cannot be read" in broken[0]
    assert broken[2] == "neither a picture nor a clip nor a sound we read"
    assert kind(media, ["text.png", "gone.png"])[0] is None


def test_who_hears_nothing_has_no_use_for_sounds(media: Path) -> None:
    with pytest.raises(UnsupportedMedia, match="neither a picture nor a clip we read"):
        kind_of(media / "440.wav", SEEN)
    with pytest.raises(MissingMedia, match=r"gone\.wav cannot be read"):
        kind_of(media / "gone.wav", SEEN)
    assert kind(media, ["red.png", "440.wav"], SEEN)[0] == "image"


def test_media_do_not_mix(media: Path) -> None:
    with pytest.raises(ConversionError, match="a picture in line 1 and a clip in line 3: "):
        kind(media, ["red.png", "blue.png", "0.mp4"])
    with pytest.raises(ConversionError, match="a sound in line 2 and a picture in line 3 and a clip in line 4: "):
        kind(media, ["gone.wav", "440.wav", "red.png", "0.mp4"])
