import json
from typing import Any

import pytest
import torch

from loadtest.bench import decode, kernels, stages
from loadtest.bench.harness import Table, take_turns


def run(bench: Any, words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    bench.main([*words, "--repeats", "1", "--json"])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_runs_take_turns_after_a_round_of_warm_up() -> None:
    turns: list[str] = []
    seconds = take_turns({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, 2, torch.device("cpu"))
    assert turns == ["a", "b", "a", "b", "a", "b"]
    assert all(0 < spread.low <= spread.median <= spread.high for spread in seconds.values())


def test_a_table_lines_its_columns_up() -> None:
    table = Table("speed", ("", "ms", "of frozen"), [("frozen", 12.345, 1.0), ("a long name", 4321.0, "-")])
    assert list(table.lines())[1:] == [
        "               ms  of frozen",
        "frozen       12.3          1",
        "a long name  4321          -",
    ]


def test_cached_and_uncached_decoding_write_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(decode, ["--tokens", "4", "--batch", "2"], capsys)
    assert result["equal"] and set(result["seconds"]) == {"cached", "uncached"}


def test_every_way_through_every_stage_is_timed_beside_its_limit(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(stages, ["--batch", "3", "--adapters", "2", "--ranks", "8,16"], capsys)
    assert set(result["stages"]) == {"vision", "text", "decode"}
    for stage in result["stages"].values():
        names = [row[0] for row in stage["table"]]
        ranks = ["r=8, 1 adapter", "r=8, 2 adapters", "r=16, 1 adapter", "r=16, 2 adapters"]
        assert names == ["plain model", "frozen", *ranks]
        limits = [row[5] for row in stage["table"]]
        assert limits[:2] == [1.0, 1.0] and all(0 < limit <= 1 for limit in limits)
    assert result["command"] == "python -m loadtest.bench stages --batch 3 --adapters 2 --ranks 8,16 --repeats 1 --json"
    assert result["torch"] == torch.__version__ and result["machine"]


def test_every_kernel_is_timed_and_every_mix_stands_beside_one_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--ranks", "4", "--tokens", "1,70", "--adapters", "3", "--mix-ranks", "2", "--mix-tokens", "2"]
    result = run(kernels, [*words, "--mix-adapters", "1,4", "--mix-rows", "1,5"], capsys)
    by_kernel, mixes = result["tables"]
    assert by_kernel["columns"] == ["tokens", *kernels.KERNELS]
    (few, many) = by_kernel["rows"]
    not_here = {"grouped"}  # on a CPU it is a loop
    assert {name for name, ms in zip(kernels.KERNELS, few[1:], strict=True) if ms == ""} == not_here
    far_more_numbers_of_rows_than_weights = {"gathered"}
    left_out = {name for name, ms in zip(kernels.KERNELS, many[1:], strict=True) if ms == ""}
    assert left_out == not_here | far_more_numbers_of_rows_than_weights
    names = [row[0] for row in mixes["rows"]]
    assert names[0] == "identical, 1 adapters" and len(names) == 7
    assert all(times > 0 for row in mixes["rows"] for times in row[1:])
