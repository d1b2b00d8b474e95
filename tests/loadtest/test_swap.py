import pytest

from loadtest.bench import swap
from tests.loadtest.test_bench import run


def test_every_way_into_a_slot_stands_beside_what_the_machine_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(swap, ["--ranks", "4,8"], capsys)
    assert result["copy_bytes_per_s"] > 0
    for rank in (4, 8):
        rows = {row["name"]: row for row in result["rows"] if row["rank"] == rank}
        loads = [name for name in rows if name.startswith("disk")]
        assert loads == ["disk to host", "disk to slot", "disk to host, not cached", "disk to slot, not cached"]
        for name in (*loads, "host to slot"):
            assert rows[name]["ms"] > 0 and rows[name]["best_ms"] > 0
    small, large = (row["megabytes"] for row in result["rows"] if row["name"] == "disk to host")
    assert small < large < 2.1 * small
