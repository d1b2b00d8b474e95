from pathlib import Path

import pytest

from loadtest.bench import popularity
from tests.loadtest.test_bench import run


def test_more_adapters_than_slots_are_swapped_and_cold_ones_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "popularity.svg"
    words = ["--counts", "2,3,12", "--slots", "2", "--popularities", "uniform,distinct", "--in-flight", "4"]
    words += ["--requests", "12", "--weights", "3", "--rank", "64", "--host-cache-mib", "3", "--svg", str(picture)]
    result = run(popularity, words, capsys)
    rows = {(r["job"], r["popularity"], r["num_adapters"], r["is_critical"]): r["turns"][0] for r in result["rows"]}
    assert len(rows) == 2 * (2 * 3 + 1)
    for job in ("text", "decode"):
        enough, many = rows[job, "uniform", 2, False], rows[job, "distinct", 12, False]
        critical = rows[job, "uniform", 12, True]
        assert enough["filled"] == enough["from_disk"] == 0
        assert many["filled"] > 0.5 and many["from_disk"] > 0.5 and critical["from_disk"] > 0
        assert all(turn["adapters"] <= min(2, turn["jobs"]) for turn in (enough, many, critical))
        assert enough["per_s"] > 0 and enough["p50_ms"] <= enough["p95_ms"]
    assert set(result["kept_with_one_too_many"]) == {"text", "decode"}
    assert picture.read_text().startswith("<svg")
