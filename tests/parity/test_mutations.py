"""Every detail counts: break one, and some comparison fails. `python -m tests.parity.mutations` makes the whole table."""

import pytest

from tests.parity.mutations import MUTATIONS, NOT_MUTATED, default_cases, details, run
from tests.parity.outcomes import PAGE, Mutation

CASES = default_cases()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.detail)
def test_a_broken_detail_is_noticed(mutation: Mutation) -> None:
    assert run(mutation, CASES, stop_at_first=True).failed


def test_every_detail_a_set_names_is_broken_once() -> None:
    named = {detail for case in CASES for detail in details(case.set_facts["sensitivity"])}
    assert named - {mutation.detail for mutation in MUTATIONS} == set(NOT_MUTATED)


def test_the_page_has_a_line_for_every_mutation() -> None:
    page = PAGE.read_text()
    assert [m.detail for m in MUTATIONS if f"| {m.detail} | {m.changed} |" not in page] == []
