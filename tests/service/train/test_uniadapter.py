"""The batches a UniAdapter is trained on."""

from pathlib import Path

import pytest
import torch

from adapters.config import Preprocessing
from service.media import MediaWorkers
from service.train.examples import Example
from service.train.pixels import PixelStore
from service.train.uniadapter import Batches
from tests.service.train.conftest import RESOLUTION


@pytest.fixture
def batches(media: Path, workers: MediaWorkers) -> Batches:
    examples = [
        Example(1, 0, (2, 7, 3), ((8, 5, 3), (8, 3)), (0.5, 0.25)),
        Example(2, 1, (2, 3), ((8, 6, 3),), (1.0,)),
        Example(3, 0, (2, 9, 9, 3), ((8, 4, 3),), (1.0,)),
    ]
    files, preprocessing = [media / "0.mp4", media / "1.mp4"], Preprocessing(resolution=RESOLUTION, num_frames=2)
    clips = PixelStore(files, "video", preprocessing, workers, max_bytes=2**20)
    return Batches(examples, clips, pad=0)


def test_captions_of_one_file_match_each_other(batches: Batches) -> None:
    batch = batches.retrieval([2, 1, 0])
    assert batch.pair_ids.tolist() == [0, 1, 0]
    assert batch.pixels.shape == (3, 2, 3, RESOLUTION, RESOLUTION)
    assert torch.equal(batch.pixels[0], batch.pixels[2]) and not torch.equal(batch.pixels[0], batch.pixels[1])
    assert batch.ids.tolist() == [[2, 9, 9, 3], [2, 3, 0, 0], [2, 7, 3, 0]]


def test_questions_share_a_clip_and_keep_their_answers(batches: Batches) -> None:
    batch = batches.answers([2, 1, 0])
    assert batch.pixels.shape == (2, 2, 3, RESOLUTION, RESOLUTION)
    assert batch.clip_of_question.tolist() == [0, 1, 0]
    assert batch.question_of_answer.tolist() == [0, 1, 2, 2]
    assert batch.answer_ids.tolist() == [[8, 4, 3], [8, 6, 3], [8, 5, 3], [8, 3, 0]]
    # The loss divides by 2 clips * 2 frames; times 4 / 3 questions that makes a mean over questions.
    assert batch.answer_weights.tolist() == pytest.approx([4 / 3, 4 / 3, 2 / 3, 1 / 3])


def test_batches_move_to_a_device_whole(batches: Batches) -> None:
    moved = batches.answers([0, 1]).to(torch.device("meta"))
    assert {tensor.device.type for tensor in vars(moved).values()} == {"meta"}
