"""How the demo's encoders are trained: labels that say what is there, and nothing that words would be needed for."""

from dataclasses import replace
from random import Random

import pytest
import torch

from adapters.families.epalm import EncoderName
from service.demo.motion import Mover, MovingScene
from service.demo.perception import READ_BLOCKS, SENSES, PerceptionTraining, inputs_of, labels_of, num_values
from service.demo.scenes import COLOURS, PLACES, SHAPES, SIZES, Scene, Thing
from service.demo.sounds import KINDS, LENGTHS_S, PITCHES, Noise, Sound
from service.demo.world import draft


@pytest.mark.parametrize("name", SENSES)
def test_labels_have_the_values_they_are_read_with(name: EncoderName) -> None:
    sense = SENSES[name]
    seen = torch.tensor([labels_of(draft(sense.world, "train", 0, index).content, sense) for index in range(600)])
    assert seen.shape[1] == len(num_values(sense))
    assert (seen.amax(dim=0) == torch.tensor(num_values(sense)) - 1).all(), "every value comes up"
    assert (seen.amin(dim=0) >= 0).all()


def test_a_picture_is_labelled_by_shape_and_by_colour() -> None:
    sense = SENSES["vit"]
    labels = iter(labels_of((Scene((Thing("star", "blue", "top", "small"),), 0),), sense))
    for shape in SHAPES:
        found = next(labels), next(labels), next(labels)
        there = (1 + COLOURS.index("blue"), 1 + PLACES.index("top"), 1 + SIZES.index("small"))
        assert found == (there if shape == "star" else (0, 0, 0))
    for colour in COLOURS:
        found = next(labels), next(labels), next(labels)
        there = (1 + SHAPES.index("star"), 1 + PLACES.index("top"), 1 + SIZES.index("small"))
        assert found == (there if colour == "blue" else (0, 0, 0))
    first = 1 + SHAPES.index("star"), 1 + COLOURS.index("blue"), 1 + PLACES.index("top"), 1 + SIZES.index("small")
    assert tuple(labels) == (*first, 0, 0, 0, 0), "the first thing and the second"


def test_a_clip_s_labels_do_not_depend_on_the_order_its_things_are_listed_in() -> None:
    one, other = Mover("star", "red", "up"), Mover("cross", "cyan", "still")
    sense = SENSES["timesformer"]
    assert labels_of(MovingScene((one, other), 0), sense) == labels_of(MovingScene((other, one), 0), sense)


def test_a_sound_is_labelled_noise_by_noise() -> None:
    first, second = Noise("hiss", "low", "long"), Noise("tone", "high", "short")
    own = [1 + list(KINDS).index("hiss"), 1 + list(PITCHES).index("low"), 1 + list(LENGTHS_S).index("long")]
    assert labels_of(Sound((first,), 0), SENSES["ast"]) == [*own, 0, 0, 0]
    assert labels_of(Sound((first, second), 0), SENSES["ast"])[:3] == own
    assert all(labels_of(Sound((first, second), 0), SENSES["ast"])[3:])


@pytest.mark.parametrize("name", SENSES)
def test_what_is_learned_reaches_the_first_token_of_every_block_read(name: EncoderName) -> None:
    sense = SENSES[name]
    training = PerceptionTraining(sense)
    contents = [draft(sense.world, "train", 1, index).content for index in range(2)]
    inputs, labels = inputs_of(contents), torch.tensor([labels_of(content, sense) for content in contents])
    before = training.loss(inputs, labels)
    optimizer = torch.optim.AdamW(training.parameters.values(), lr=1e-3)
    for _ in range(12):
        optimizer.zero_grad()
        training.loss(inputs, labels).backward()
        optimizer.step()
    assert training.loss(inputs, labels) < 0.3 * before
    assert len(training.accuracy(contents)) == READ_BLOCKS
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in training.parameters.values())


def test_scenes_of_one_thing_come_first_where_a_sense_wants_them() -> None:
    sense = SENSES["timesformer"]
    training = PerceptionTraining(replace(sense, alone_until=2), ordered=False)
    num_things = len(sense.attributes["shape"]) * 2  # labels that shapes name: colours and motions
    there = [(labels_of_step(training, step)[:, :num_things] > 0).sum(dim=1) for step in range(4)]
    alone = torch.full((sense.batch_size,), 2)
    assert torch.equal(there[0], alone) and torch.equal(there[1], alone)
    assert set(torch.cat(there[2:]).tolist()) == {2, 4}, "one thing or two"
    assert not torch.equal(labels_of_step(training, 0), labels_of_step(training, 1))
    assert torch.equal(
        labels_of_step(training, 1), labels_of_step(PerceptionTraining(training.sense, ordered=False), 1)
    )


def labels_of_step(training: PerceptionTraining, step: int) -> torch.Tensor:
    return torch.tensor([training.example(index)[1] for index in training.indices(step)])


def test_an_encoder_sees_new_items_in_each_step_or_the_same_ones_again() -> None:
    rng = Random(0)
    assert SENSES["ast"].num_items is not None
    training = PerceptionTraining(SENSES["ast"])
    index = rng.randrange(50)
    assert training.example(index)[0] is training.example(index)[0]
    fresh = PerceptionTraining(SENSES["vit"])
    assert fresh.example(index)[0] is not fresh.example(index)[0]
    assert torch.equal(fresh.example(index)[0], fresh.example(index)[0])
