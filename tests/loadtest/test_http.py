import pytest

from loadtest.bench import http
from tests.loadtest.test_bench import run

KINDS = ["vqa, form", "vqa, JSON", "vqa, gallery item", "retrieve"]


def test_every_kind_of_request_is_answered_over_http_and_without(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--size", "tiny", "--requests", "12", "--in-flight", "3", "--pictures", "2"]
    result = run(http, words, capsys)
    assert list(result["saturation"]) == list(result["http_of_engine"]) == KINDS
    for kind, ways in result["saturation"].items():
        assert list(ways) == ["HTTP", "pipeline", "engine"]
        assert all(turns[0]["per_s"] > 0 for turns in ways.values())
        assert ways["engine"][0]["generator_ms"] == 0 <= result["generator_share"][kind] < 1
    stages = {kind: list(spent) for kind, spent in result["one_at_a_time_ms"].items()}
    rest = ["rest of the server", "server, total", "client, total"]
    assert stages["vqa, form"] == stages["vqa, JSON"] == ["receive", "decode", "vision", "generate", *rest]
    assert stages["vqa, gallery item"] == ["receive", "generate", *rest]
    assert stages["retrieve"] == ["receive", "text", "search", *rest]
    for spent in result["one_at_a_time_ms"].values():
        assert spent["client, total"] > spent["server, total"] > 0
