"""The comparisons know nothing of the sets beside them: they hold on sets of other sizes, options and names too."""

from pathlib import Path

import pytest

from tests.parity.claims import Claims
from tests.parity.serving import serve
from tests.parity.sets import Case, find_sets, read_set
from tests.parity.synthetic import SETS, write_sets

CASES = [(set_name, case_name) for set_name, (_, recipes) in SETS.items() for case_name in recipes]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    write_sets(folder)
    return folder


def _case(root: Path, set_name: str, case_name: str) -> Case:
    folder = next(folder for folder in find_sets("uniadapter", root) if folder.name == set_name)
    return next(case for case in read_set(folder) if case.name == case_name)


@pytest.mark.parametrize(("set_name", "case_name"), CASES)
def test_another_set_comes_out_too(root: Path, tmp_path: Path, set_name: str, case_name: str) -> None:
    case = _case(root, set_name, case_name)
    found = Claims(serve(case, tmp_path)).all()
    assert len(found) > len(case.claimed)
    assert not [str(comparison) for comparison in found if not comparison.holds]
