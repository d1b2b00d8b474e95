"""The comparisons know nothing of the sets beside them: they hold on other models, sizes, options and names too."""

from pathlib import Path

import pytest

from tests.parity.epalm.cases import read_sets
from tests.parity.epalm.claims import Claims
from tests.parity.epalm.serving import make_worlds
from tests.parity.epalm.synthetic import SETS, write_sets


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    write_sets(folder)
    return folder


@pytest.mark.parametrize("set_name", SETS)
def test_another_set_comes_out_too(root: Path, set_name: str) -> None:
    cases = [case for case in read_sets(root) if case.folder.name == set_name]
    assert {case.name for case in cases} == set(SETS[set_name].cases)
    worlds = make_worlds(cases)
    assert sum(len(world.cases) for world in worlds) == len(cases)
    for world in worlds:
        for case in world.cases:
            found = list(Claims(world, case).all())
            assert len(found) > len(case.claimed) == len(case.names)
            assert not [str(comparison) for comparison in found if not comparison.holds]


def test_models_that_cannot_share_a_backbone_are_apart(root: Path) -> None:
    """Two language models, or two encoders of a kind."""
    cases = {case.name: case for case in read_sets(root) if case.folder.name == "several"}
    worlds = make_worlds(list(cases.values()))
    together = [{case.name for case in world.cases} for world in worlds]
    assert {"asked", "clip", "plain_question"} in together
    assert {"asked_of_the_same"} in together, "it looks with other eyes than they do"
    assert {"asked_to_the_end", "sound"} in together
