"""The plain reference gives what was recorded: only then may it judge the rows that nobody recorded."""

import pytest
import torch

from tests.parity.recorded import Recorded
from tests.parity.sets import Case, compare, find_sets, read_set

CASES = [case for folder in find_sets("uniadapter") for case in read_set(folder)]
RECORDED = {case.label: Recorded(case) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_the_reference_gives_what_was_recorded(case: Case) -> None:
    recorded = RECORDED[case.label]
    with torch.inference_mode():
        found = [
            compare(name, recorded.get(name, quantity), case.ordered(name, quantity), *case.tolerance(name))
            for name, quantity in case.claimed.items()
        ]
    assert not [str(comparison) for comparison in found if not comparison.holds]


@pytest.mark.parametrize("case", [case for case in CASES if case.has("question_ids")], ids=lambda case: case.label)
def test_the_reference_gives_the_padded_sequences_too(case: Case) -> None:
    """With every question position seen, padding included, as the authors generate: our own code must never do this."""
    recorded = RECORDED[case.label]
    with torch.inference_mode():
        for name, num_beams in (("generate_greedy", 1), ("generate_beam3", 3)):
            if name in case.names:
                length = case.expected(name).shape[1]
                ids, _ = recorded.sequences(num_beams, case.max_length)
                assert torch.equal(ids[:, :length], case.expected(name))
