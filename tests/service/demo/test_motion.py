"""Clips of things that move: the pixels show the motion that is told."""

from random import Random

import numpy as np
import pytest

from service.demo.drawing import INK
from service.demo.motion import MOTIONS, Mover, MovingScene, draw_clip, random_movers


def middle(frame: np.ndarray, colour: str) -> np.ndarray:
    """Where the pixels of a colour are, on average: x, y."""
    distance = np.abs(frame.astype(int) - np.array(INK[colour])).sum(axis=-1)
    rows, columns = np.nonzero(distance < 40)
    assert len(rows) > 30, "all of the thing is in the picture, and nothing hides it"
    return np.array([columns.mean(), rows.mean()])


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_thing_goes_where_it_is_told_to_go(motion: str) -> None:
    for grain in range(10):
        clip = draw_clip(MovingScene((Mover("circle", "blue", motion),), grain))
        assert clip.shape == (8, 64, 64, 3) and clip.dtype == np.uint8
        covered = middle(clip[-1], "blue") - middle(clip[0], "blue")
        direction = np.array(MOTIONS[motion])
        assert covered @ direction >= 18 * abs(direction).sum()
        assert np.abs(covered * (1 - np.abs(direction))).max() < 1.0


def test_two_things_are_both_seen_in_every_frame() -> None:
    rng = Random(0)
    for grain in range(60):
        movers = random_movers(rng)
        clip = draw_clip(MovingScene(movers, grain))
        for frame in clip:
            for mover in movers:
                middle(frame, mover.colour)


def test_equal_scenes_give_equal_pixels_and_things_of_a_clip_differ_in_everything() -> None:
    rng = Random(2)
    for grain in range(20):
        movers = random_movers(rng)
        for field in ("shape", "colour", "motion"):
            assert len({getattr(mover, field) for mover in movers}) == len(movers)
        scene = MovingScene(movers, grain)
        assert np.array_equal(draw_clip(scene), draw_clip(scene))
