"""Other precisions drift, and no further than they should. `python -m tests.parity.precision` makes the whole table."""

import math

import pytest
import torch

from tests.parity import precision
from tests.parity.epalm.mutations import default_cases as epalm_cases
from tests.parity.mutations import default_cases
from tests.parity.outcomes import PAGE
from tests.parity.precision import Drift, Flips, Outputs, Report

CASES = ("video_retrieval", "video_vqa")
EPALM_CASES = ("image_vqa", "video_qa")
EPS = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # half the distance from 1 to the next number
STATES, SCORES, WRITING = 8, 25, 40  # how many of these the rms of differences may be, over that of the values
MARGIN = 256  # and how many of these float32 may have been sure by


def bound(drift: Drift) -> float:
    """Generous: at most half of each is reached. A language model's states take up what is injected, at its own scale."""
    if drift.system == precision.EPALM and drift.kind != "encoders' first tokens":
        return WRITING * EPS[drift.dtype]
    is_score = "logits" in drift.kind or "scores" in drift.kind
    return (SCORES if is_score else STATES) * EPS[drift.dtype]


@pytest.fixture(scope="module")
def report() -> Report:
    return precision.measure(
        [case for case in default_cases() if case.name in CASES],
        [case for case in epalm_cases() if case.name in EPALM_CASES],
    )


def test_numbers_drift_within_bounds(report: Report) -> None:
    assert {drift.dtype for drift in report.drifts} == set(precision.HALVES)
    assert all(math.isfinite(drift.largest) and drift.largest > 0 for drift in report.drifts)
    assert not [drift for drift in report.drifts if drift.of_rms > bound(drift)]
    assert all(
        d.cosine is not None and d.cosine > 1 - 8 * EPS[d.dtype] for d in report.drifts if d.kind == "embeddings"
    )


def test_only_close_choices_fall_the_other_way(report: Report) -> None:
    assert sum(flips.num_choices for flips in report.flips) > 200
    assert not [flips for flips in report.flips if flips.widest > MARGIN * EPS[flips.dtype]]


def test_the_page_has_a_line_for_every_output_and_choice(report: Report) -> None:
    page = PAGE.read_text()
    rows = [*report.drifts, *report.flips]
    assert [row for row in rows if f"| {row.system} | {row.kind} | " not in page] == []


def test_what_breaks_shows() -> None:
    exact, rough = Outputs(), Outputs()
    x = torch.linspace(-1, 1, 8)
    for outputs, values in ((exact, x), (rough, torch.cat([x[:7], torch.tensor([math.nan])]))):
        outputs.add("states", values)
        outputs.add("embeddings", values.nan_to_num())
    (states, embeddings) = precision.drifts("a", "float16", exact, rough)
    assert states.largest == states.of_rms == math.inf
    assert embeddings.largest == 1 and embeddings.cosine is not None and embeddings.cosine < 1


def test_a_choice_is_counted_with_its_margin() -> None:
    exact, rough = Outputs(), Outputs()
    for outputs, second in ((exact, 0.5), (rough, 2.0)):
        outputs.decide_best("best", torch.tensor([1.0, second]))
        outputs.decide_best("best", torch.tensor([5.0, second]))
    assert list(precision.flips("a", "float16", exact, rough)) == [Flips("a", "best", "float16", 2, 1, 0.5)]
