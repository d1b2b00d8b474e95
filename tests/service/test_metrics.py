"""The series and the stage timer."""

import re
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from service.metrics import Metrics
from service.types import MediaBytes, RankDecode, VqaQuery
from tests.service.worlds import Service, World, context, picture, running


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


def test_residency_is_of_those_that_are_there_now(world: World, tmp_path: Path) -> None:
    """Three adapters, two slots: whoever lost its slot has no series any more, and the totals are the sums."""
    with running(world.copy(tmp_path, slots="8:2").settings) as service:
        assert resident(service, "device") == resident(service, "host") == {}
        for name in ("ask", "tell", "look"):
            ask(service, name)
        assert resident(service, "device").keys() == {("tell", "1"), ("look", "1")}
        assert resident(service, "host").keys() == {("ask", "1"), ("tell", "1"), ("look", "1")}
        ask(service, "ask")
        assert resident(service, "device").keys() == {("ask", "1"), ("look", "1")}
        service.runtime.bank.unload(service.runtime.loader.snapshot.version("look", 1).weights_digest)
        assert resident(service, "device").keys() == {("ask", "1")}
        assert resident(service, "host").keys() == {("ask", "1"), ("tell", "1")}


def ask(service: Service, adapter: str) -> None:
    query = VqaQuery(adapter, "what colour is it?", MediaBytes("image", picture()), RankDecode())
    service.call(service.runtime.vqa.answer(query, context()))


def resident(service: Service, tier: str) -> dict[tuple[str, str], float]:
    """Bytes by name and version as they are scraped, which must fit the totals."""
    registry = service.runtime.metrics.registry
    pattern = rf'bank_adapter_resident_bytes{{adapter="(.*)",tier="{tier}",version="(.*)"}} (.*)'
    found = re.findall(pattern, generate_latest(registry).decode())
    assert registry.get_sample_value("bank_resident_adapters", {"tier": tier}) == len(found)
    assert registry.get_sample_value("bank_resident_bytes", {"tier": tier}) == sum(float(size) for _, _, size in found)
    return {(name, version): float(size) for name, version, size in found}
