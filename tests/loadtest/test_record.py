"""What a benchmark prints is put on top of the page of results."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from loadtest.bench.record import recorded

TOLD = {"command": "python -m loadtest.bench one --size tiny", "machine": "a device", "torch": "2.0", "commit": "abc"}


def test_the_newest_section_is_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "RESULTS.md"
    page.write_text("# Results\n\nNewest first.\n\n## before\n\nold\n")

    def bench(words: Sequence[str]) -> None:
        print("\na table\n\nrow  1\n")
        print(json.dumps(TOLD))

    recorded(bench, [], page)
    text = page.read_text()
    assert text.startswith("# Results\n\nNewest first.\n\n## ") and text.endswith("\n\n## before\n\nold\n")
    assert "`python -m loadtest.bench one --size tiny`\n\na device, torch 2.0, commit `abc`." in text
    assert "row  1" in text and "row  1" in capsys.readouterr().out


def test_a_benchmark_that_fails_leaves_the_page(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    page.write_text("## before\n")

    def bench(words: Sequence[str]) -> None:
        raise RuntimeError("no device")

    with pytest.raises(RuntimeError):
        recorded(bench, [], page)
    assert page.read_text() == "## before\n"
