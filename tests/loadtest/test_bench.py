import json
from typing import Any

import pytest
import torch

from loadtest.bench import decode, kernels, launches, rates, stages, words
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


def test_every_way_through_every_stage_is_timed_beside_its_limit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rates.PRODUCT_SIDE, "cpu", 256)  # rates of a moment: nothing is claimed of them here
    monkeypatch.setitem(rates.READ_BYTES, "cpu", 1 << 20)
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


def test_words_are_written_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(words, ["--rank", "4"], capsys)
    assert result["columns"] == ["", "launched", "fixed shapes", "times"] and not result["failed"]
    assert [row[0] for row in result["table"]][:4] == [
        "1 texts, frozen",
        "1 texts, 1 adapter",
        "4 texts, frozen",
        "4 texts, 1 adapter",
    ]
    assert all(min(row[1:]) > 0 for row in result["table"])


def launches_of(table: dict[str, Any]) -> dict[str, dict[str, int]]:
    """What each row of a table launches, by its columns."""
    return {row[0]: dict(zip(table["columns"][1:], row[1:], strict=True)) for row in table["rows"]}


def test_what_a_batch_launches_on_a_gpu_does_not_grow_with_its_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    small, large = (run(launches, ["--batch", batch, "--rank", "4"], capsys)["tables"] for batch in ("3", "9"))
    *forwards, of_words = zip(small, large, strict=True)
    for few, many in forwards:
        few, many = launches_of(few), launches_of(many)
        assert few["frozen"] == many["frozen"] and few["1 adapter"] == many["1 adapter"]
        for column in ("a GPU", "a Hopper GPU"):
            assert few["scattered"][column] == many["scattered"][column] < many["scattered"]["a loop"]
            assert few["side by side"][column] == many["side by side"][column] <= many["scattered"][column]
        assert few["scattered"]["a loop"] < many["scattered"]["a loop"]
    few, many = (table["rows"] for table in of_words)
    assert few == many
    for _, launched, waits, recorded, recorded_waits, within in few:
        assert waits == recorded_waits == 1, "the best words, and which beams they go on"
        assert recorded < 8 and within > 50 and launched > 50
    frozen, same, side_by_side, scattered = (within for *_, within in few)
    assert frozen < same <= side_by_side == scattered


def test_what_is_looked_at_is_waited_for_and_views_are_free() -> None:
    x = torch.arange(6.0)
    counted = launches.count(lambda: [x.view(2, 3).t()[0].add(1).tolist(), bool(x[0] > 0), x.unsqueeze(0).expand(4, 6)])
    assert counted.waits == 2
    assert counted.launches == 3, "an addition, a comparison, and the number it is looked at as"
