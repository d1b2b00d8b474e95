import pytest

from loadtest.bench import fairness
from tests.loadtest.test_bench import run


def test_the_others_are_answered_whatever_the_hot_one_does(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(fairness, ["--job", "decode", "--seconds", "0.5", "--requests", "64"], capsys)
    turns = {scene: turns[0] for scene, turns in result["scenes"].items()}
    assert turns["alone"]["hot"] is None and turns["hot"]["hot"]["answered"] == 1
    for scene in ("alone", "hot", "overload"):
        others = turns[scene]["others"]
        assert others["answered"] == 1 and 0 < others["p50_ms"] <= others["p95_ms"] <= others["longest_ms"]
        assert others["per_s"] == turns["alone"]["others"]["per_s"]
    assert turns["overload"]["hot"]["per_s"] > turns["hot"]["hot"]["per_s"]
    assert result["times_alone"].keys() == {"hot", "overload"}
