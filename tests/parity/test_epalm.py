"""Served in mixed batches, every recorded output of the eP-ALM reference comes out; so does what shared its batches.

`PARITY_DATA=folder` compares with other sets than those in `data`.
"""

from functools import cache

import pytest

from adapters.config import BASE_ADAPTER
from adapters.families.base import GroupedAdaptation
from tests.parity.epalm.cases import SYSTEM, Case, is_input, meaning, read_sets
from tests.parity.epalm.claims import Claims
from tests.parity.epalm.recorded import recorded_of
from tests.parity.epalm.serving import MADE_UP, World, make_worlds
from tests.parity.sets import UnknownTensor, compare, data_root, find_sets

CASES = read_sets()
TENSORS = [(case, name) for case in CASES for name in case.names]


@cache
def worlds_of(label: str) -> list[World]:
    """The worlds of a set, served once for all its tensors."""
    return make_worlds([case for case in CASES if str(case.folder) == label])


def claims_of(case: Case) -> Claims:
    world = next(world for world in worlds_of(str(case.folder)) if case in world.cases)
    return Claims(world, case)


def test_there_is_a_set() -> None:
    assert find_sets(SYSTEM), f"no set below {data_root() / SYSTEM}"
    assert CASES


@pytest.mark.parametrize(("case", "name"), TENSORS, ids=[f"{case.label}-{name}" for case, name in TENSORS])
def test_it_comes_out(case: Case, name: str) -> None:
    meaning(name)  # an output that no comparison claims is an error
    assert not [str(comparison) for comparison in claims_of(case).of(name) if not comparison.holds]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_everything_recorded_is_described_and_stored(case: Case) -> None:
    """A tensor of the file that its description forgets, or the other way round, would be compared by halves."""
    assert set(case.facts["tensors"]) == set(case.tensors)
    assert {name for name in case.tensors if not is_input(name)} == set(case.claimed)
    for name, (dtype, shape) in case.facts["tensors"].items():
        assert (str(case.tensors[name].dtype), list(case.tensors[name].shape)) == (f"torch.{dtype}", shape), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_the_reference_gives_what_was_recorded(case: Case) -> None:
    """Only then may it judge the rows that nobody recorded, and what padding changes."""
    recorded = recorded_of(case)
    found = [
        compare(name, recorded.get(quantity), case.tensors[name], case.tolerance(quantity), 0.0)
        for name, quantity in case.claimed.items()
    ]
    assert not [str(comparison) for comparison in found if not comparison.holds]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_the_rows_beside_it_are_right_too(case: Case) -> None:
    found = list(claims_of(case).beside())
    assert len(found) > 5
    assert not [str(comparison) for comparison in found if not comparison.holds]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_its_batches_were_mixed(case: Case) -> None:
    """One batch held every adapter of the world, one made up, and `__base__`; with and without a medium."""
    world = claims_of(case).world
    for is_training in (False, True):
        rows = world.rows(is_training=is_training)
        assert isinstance(world.adaptation(rows), GroupedAdaptation)
        assert {row.adapter.name for row in rows} == {MADE_UP, BASE_ADAPTER, *(own.name for own in world.cases)}
        for name in (MADE_UP, BASE_ADAPTER):
            assert {row.has_medium for row in rows if row.adapter.name == name} == {True, False}
        assert {row.has_medium for row in rows if row.adapter.name == case.name} == {True, False}
        assert len({len(row.text.ids) for row in rows}) > 1
    prompts = [world.adapters[name].slot.prompt() for name in (case.name, MADE_UP, BASE_ADAPTER)]
    assert len({0 if prompt is None else len(prompt) for prompt in prompts}) >= 2


@pytest.mark.parametrize("name", ["s0.something_new", "batch.topk_ids", "rank.s0.logits", "logits"])
def test_an_output_nobody_claims_is_an_error(name: str) -> None:
    with pytest.raises(UnknownTensor, match="no comparison claims"):
        meaning(name)
