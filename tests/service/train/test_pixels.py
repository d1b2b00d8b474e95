"""Pixels: exactly the service's, within a budget of memory, broken files found beforehand."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters.config import Preprocessing
from service.errors import MissingMedia
from service.media import AnyMediaKind, MediaWorkers, decode_image, decode_video
from service.media import Preprocessing as PixelPreprocessing
from service.train.pixels import PixelStore
from tests.service.train.conftest import COLOURS, RESOLUTION

PREPROCESSING = Preprocessing(resolution=RESOLUTION, num_frames=3)
PREP = PixelPreprocessing(RESOLUTION)
PICTURES = [f"{name}.png" for name in COLOURS]
PICTURE_BYTES = 3 * RESOLUTION**2


def store(folder: Path, names: Sequence[str], workers: MediaWorkers, max_bytes: int = 2**20) -> PixelStore:
    kind: AnyMediaKind = "video" if names[0].endswith("mp4") else "image"
    return PixelStore([folder / name for name in names], kind, PREPROCESSING, workers, max_bytes=max_bytes)


@pytest.mark.parametrize("max_bytes", [2**20, 0])
def test_pictures_are_bit_for_bit_what_the_service_sees(media: Path, workers: MediaWorkers, max_bytes: int) -> None:
    pictures = store(media, PICTURES, workers, max_bytes)
    assert pictures.check(range(4), lambda: None) == {}
    given = pictures.pixels([2, 0, 2])
    expected = np.stack([decode_image(media / PICTURES[file], PREP) for file in (2, 0, 2)])
    assert given.shape == (3, 1, 3, RESOLUTION, RESOLUTION) and given.dtype == torch.float32
    assert torch.equal(given[:, 0], torch.from_numpy(expected))


def test_clips_are_bit_for_bit_what_the_service_sees(media: Path, workers: MediaWorkers) -> None:
    clips = store(media, ["0.mp4", "1.mp4"], workers)
    assert clips.check(range(2), lambda: None) == {}
    expected = decode_video(media / "1.mp4", PREP, 3).frames
    assert torch.equal(clips.pixels([1])[0], torch.from_numpy(expected))


def test_what_was_used_least_recently_makes_room(
    media: Path, workers: MediaWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = store(media, PICTURES, workers, 2 * PICTURE_BYTES)
    decoded: list[str] = []
    submit = workers.submit

    def counted(function: object, path: Path, *rest: object) -> object:
        decoded.append(path.name)
        return submit(function, path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(workers, "submit", counted)
    for files in ([0, 1], [0], [2], [0], [1]):  # 2 takes the place of 1, then 1 that of 2
        pictures.pixels(files)
    assert decoded == [PICTURES[i] for i in (0, 1, 2, 1)]


def test_broken_files_are_found_by_the_check(media: Path, workers: MediaWorkers) -> None:
    names = ["gone.png", "red.png", "broken.png", "blue.png"]
    calls: list[None] = []
    broken = store(media, names, workers).check([1, 2, 3], lambda: calls.append(None))
    assert broken.keys() == {2} and len(calls) == 3
    assert "picture" in broken[2]
    assert store(media, ["0.mp4", "broken.mp4"], workers).check([0, 1], lambda: None).keys() == {1}


def test_a_file_that_goes_missing_later_is_named(media: Path, workers: MediaWorkers, tmp_path: Path) -> None:
    for name in ("red.png", "blue.png"):
        (tmp_path / name).write_bytes((media / name).read_bytes())
    pictures = store(tmp_path, ["red.png", "blue.png"], workers, max_bytes=0)
    pictures.check([0, 1], lambda: None)
    (tmp_path / "blue.png").unlink()
    with pytest.raises(MissingMedia, match=r"blue\.png"):
        pictures.pixels([0, 1])
