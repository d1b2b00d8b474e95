"""The series and the stage timer."""

import pytest
from prometheus_client import generate_latest

from service.metrics import Metrics
from tests.service.worlds import context


def test_a_stage_is_timed_into_the_histogram_and_the_request() -> None:
    metrics, request = Metrics(), context()
    with metrics.stage("vision", request), metrics.stage("decode", request):
        pass
    with metrics.stage("vision", request):
        pass
    assert metrics.registry.get_sample_value("bank_stage_seconds_count", {"stage": "vision"}) == 2
    assert set(request.stage_ms) == {"vision", "decode"}
    assert request.stage_ms["vision"] >= request.stage_ms["decode"] >= 0


def test_a_stage_that_fails_is_timed_too() -> None:
    metrics, request = Metrics(), context()
    with pytest.raises(ValueError, match="oops"), metrics.stage("match", request):
        raise ValueError("oops")
    assert "match" in request.stage_ms
    assert metrics.registry.get_sample_value("bank_stage_seconds_count", {"stage": "match"}) == 1


def test_a_stage_needs_no_request() -> None:
    metrics = Metrics()
    with metrics.stage("search"):
        pass
    assert metrics.registry.get_sample_value("bank_stage_seconds_count", {"stage": "search"}) == 1


def test_two_services_in_one_process_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.backbone_loads.inc()
    assert one.registry.get_sample_value("bank_backbone_loads_total") == 1
    assert other.registry.get_sample_value("bank_backbone_loads_total") == 0


def test_every_series_is_ours_by_name_and_explained() -> None:
    text = generate_latest(Metrics().registry).decode()
    helps = [line.split(maxsplit=3) for line in text.splitlines() if line.startswith("# HELP")]
    assert len(helps) > 15
    for _, _, name, explanation in helps:
        assert name.startswith("bank_")
        assert explanation
