"""Batches: who is in them, what they hold, and when they are made."""

import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from adapters.config import Preprocessing
from service.media import MediaWorkers
from service.train.batches import Ahead, Batches, Plan, padded
from service.train.examples import Example
from service.train.pixels import PixelStore
from tests.service.train.conftest import RESOLUTION


def test_every_epoch_sees_every_example_once_in_an_order_of_its_own() -> None:
    plan = Plan(10, 4, seed=3)
    assert plan.steps_per_epoch == 3
    seen = [row for step in range(5) for row in plan.rows(step)]
    first, second = seen[:10], seen[10:]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    again = [row for step in (4, 2, 0) for row in Plan(10, 4, seed=3).rows(step)]
    assert again == seen[16:] + seen[8:12] + seen[:4]
    assert Plan(10, 4, seed=4).rows(0) != plan.rows(0)
    assert Counter(Plan(3, 7, seed=0).rows(0)).most_common(1)[0][1] == 3  # a batch may be larger than an epoch


def test_one_batch_is_made_ahead_and_no_more() -> None:
    made: list[int] = []
    done = threading.Semaphore(0)

    def make(step: int) -> int:
        made.append(step)
        done.release()
        return 10 * step

    with Ahead(make, 3) as ahead:
        assert ahead(0) == 0
        assert done.acquire(timeout=5) and done.acquire(timeout=5)
        assert not done.acquire(timeout=0.05) and made == [0, 1]
        assert (ahead(1), ahead(2)) == (10, 20)
    assert made == [0, 1, 2]
    with Ahead(make, 9) as resumed:
        assert resumed(5) == 50


def test_an_error_surfaces_at_the_step_it_belongs_to() -> None:
    def make(step: int) -> int:
        if step == 1:
            raise ValueError("no such picture")
        return step

    with Ahead(make, 5) as ahead:
        assert ahead(0) == 0
        with pytest.raises(ValueError, match="no such picture"):
            ahead(1)


def test_texts_are_padded_to_the_longest() -> None:
    ids, mask = padded([(2, 5, 3), (2, 3)], pad=9)
    assert ids.tolist() == [[2, 5, 3], [2, 3, 9]]
    assert mask.tolist() == [[True, True, True], [True, True, False]]


@pytest.fixture
def batches(media: Path, workers: MediaWorkers) -> Batches:
    examples = [
        Example(1, 0, (2, 7, 3), ((8, 5, 3), (8, 3)), (0.5, 0.25)),
        Example(2, 1, (2, 3), ((8, 6, 3),), (1.0,)),
        Example(3, 0, (2, 9, 9, 3), ((8, 4, 3),), (1.0,)),
    ]
    clips = PixelStore(
        [media / "0.mp4", media / "1.mp4"], Preprocessing(resolution=RESOLUTION, num_frames=2), workers, max_bytes=2**20
    )
    clips.trust(0)
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
