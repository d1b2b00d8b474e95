"""Served in mixed batches, every recorded output of the UniAdapter reference comes out; so does what shared its batches.

`PARITY_DATA=folder` compares with other sets than those in `data`.
"""

from collections.abc import Callable
from functools import cache

import pytest

from adapters.config import BASE_ADAPTER
from tests.parity.claims import Claims
from tests.parity.serving import serve
from tests.parity.sets import Case, data_root, find_sets, is_exempt, meaning, read_set

SYSTEM = "uniadapter"
CASES = [case for folder in find_sets(SYSTEM) for case in read_set(folder)]
TENSORS = [(case, name) for case in CASES for name in case.names if not is_exempt(name)]

ClaimsOf = Callable[[Case], Claims]


@pytest.fixture(scope="module")
def claims_of(tmp_path_factory: pytest.TempPathFactory) -> ClaimsOf:
    """A case, imported and served once for all its tensors."""

    @cache
    def served(label: str) -> Claims:
        case = next(case for case in CASES if case.label == label)
        return Claims(serve(case, tmp_path_factory.mktemp(label)))

    return lambda case: served(case.label)


def test_there_is_a_set() -> None:
    assert find_sets(SYSTEM), f"no set below {data_root() / SYSTEM}"
    assert CASES


@pytest.mark.parametrize(("case", "name"), TENSORS, ids=[f"{case.label}-{name}" for case, name in TENSORS])
def test_it_comes_out(case: Case, name: str, claims_of: ClaimsOf) -> None:
    meaning(name)  # an output that no comparison claims is an error
    failed = [str(comparison) for comparison in claims_of(case).of(name) if not comparison.holds]
    assert not failed


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_everything_recorded_is_described_and_stored(case: Case) -> None:
    """A tensor of the file that its description forgets, or the other way round, would be compared by halves."""
    described = {name for name in case.facts["tensors"] if name.startswith("expected.")}
    assert described == {name for name in case.tensors if name.startswith("expected.")}
    assert all(name.split(".")[0] in ("input", "expected", "alternative") for name in case.tensors)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_the_rows_beside_it_are_right_too(case: Case, claims_of: ClaimsOf) -> None:
    found = claims_of(case).companions()
    assert len(found) > 20
    assert not [str(comparison) for comparison in found if not comparison.holds]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_its_batches_were_mixed(case: Case, claims_of: ClaimsOf) -> None:
    """One batch per stage held the case's rows, its twin's, two adapters of other ranks and options, and rows without any."""
    served = claims_of(case).served
    own = {rows.pin.digest for rows in served.rows.values()}
    beside = {rows.pin.digest for rows in served.beside.values()}
    assert BASE_ADAPTER in beside and len(beside) == 4
    assert {record.batch.stage for record in served.records} >= {"vision"}
    for record in served.records:
        assert record.adapters & (own - {BASE_ADAPTER}) and beside <= record.adapters
    counted = served.metrics.registry.get_sample_value("bank_batch_adapters_count", {"stage": "vision"})
    summed = served.metrics.registry.get_sample_value("bank_batch_adapters_sum", {"stage": "vision"})
    assert counted is not None and summed is not None and summed >= 4 * counted
    own_config, twin_config = (served.packages[name].config for name in ("own", "twin"))
    assert (own_config.rank, own_config.heads) == (twin_config.rank, twin_config.heads)
    configs = [package.config for name, package in served.packages.items() if name in ("own", "wide", "fresh")]
    assert len({config.rank for config in configs}) == 3
    assert len({config.options["kv_rank"] for config in configs}) >= 2
    if case.has("text_ids"):
        assert len({config.options["frame_aware_attention"] for config in configs}) == 2
        assert len({config.heads for config in configs}) == 2


def test_an_output_nobody_claims_is_an_error() -> None:
    with pytest.raises(Exception, match=r"no comparison claims expected\.something_new"):
        meaning("something_new")
