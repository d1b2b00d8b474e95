import json
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.families.base import adapt_rows
from loadtest.bench import peer_by_hand, peer_library, peer_processes, peers
from loadtest.bench.harness import ROOT
from loadtest.bench.models import BLIP_SIZES, fold_adapters, make_blip, make_slots
from loadtest.bench.peer_by_hand import OneAdapter
from loadtest.bench.peer_library import LIBRARY_RULES, OUR_RULES, Rules, explain
from loadtest.bench.stages import make_stage
from service.backbone.blip import Blip

CPU = torch.device("cpu")
TINY = BLIP_SIZES["tiny"]

# Talks like a peer: its ways sleep.
SLEEPER = """
import sys, time
sys.path.insert(0, {scripts!r})
from turns import serve
serve({{"rank": 3}}, {{way: lambda: time.sleep(0.01) for way in ("frozen", "one", "mixed")}}, "cpu")
"""


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    peers.main([*words, "--repeats", "1", "--json"])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_every_answer_of_the_library_is_equal_or_explained(capsys: pytest.CaptureFixture[str]) -> None:
    library = run(["--compare", "library", "--checked", "4"], capsys)["library"]
    total: Counter[str] = Counter()
    for answers in library["answers"].values():
        assert sum(answers[kind] for kind in peer_library.KINDS) == 4 * 8 and answers["distinct answers"] > 8
        total.update(answers)
    assert total["equal"] > 32 and total["unexplained"] == 0
    assert total["by the stop rule"] + total["by cut texts"] > 0, "no search here shows the rules that differ"
    for seconds in library["seconds"].values():
        assert set(seconds) == {"transformers", "ours"} and all(low <= high for _, low, high in seconds.values())


def test_answers_that_nothing_explains_fail_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = peer_library.convert

    def with_another_bias(*arguments: Any) -> Blip:
        model = convert(*arguments)
        assert model.decoder is not None
        model.decoder.bias = torch.nn.Parameter(torch.randn(len(model.decoder.bias)), requires_grad=False)
        return model

    monkeypatch.setattr(peer_library, "convert", with_another_bias)
    with pytest.raises(SystemExit, match="answers differ from the library's for no known reason"):
        run(["--compare", "library", "--checked", "1"], capsys)


def test_a_difference_is_explained_only_where_both_sides_follow_from_their_rules() -> None:
    stop, cut = Rules(True, False), Rules(False, True)
    follows = {OUR_RULES: (1,), LIBRARY_RULES: (2,)}
    assert explain((1,), (1,), {}, 1.0) == "equal"
    assert explain((2,), (1,), {**follows, stop: (2,), cut: (1,)}, 1.0) == "by the stop rule"
    assert explain((2,), (1,), {**follows, stop: (1,), cut: (2,)}, 1.0) == "by cut texts"
    assert explain((2,), (1,), {**follows, stop: (1,), cut: (1,)}, 1.0) == "by both rules"
    assert explain((3,), (1,), {**follows, stop: (2,), cut: (1,)}, 1.0) == "unexplained"
    assert explain((2,), (3,), {**follows, stop: (2,), cut: (1,)}, 1.0) == "unexplained"
    assert explain((2,), (3,), {**follows, stop: (2,), cut: (1,)}, 1e-5) == "a tie"


def test_swapped_weights_answer_as_a_mixed_batch_does(capsys: pytest.CaptureFixture[str]) -> None:
    model = make_blip(TINY, CPU, torch.float32)
    stage, slots = make_stage("text", model, 3, 64), make_slots(TINY, 8, 3, CPU, torch.float32)
    one = OneAdapter(fold_adapters(TINY, 8, 3, torch.float32), CPU)
    mixed = stage.forward(adapt_rows(slots, range(3)))
    for number in (2, 0, 1):
        torch.testing.assert_close(stage.forward(one.load(number))[number], mixed[number], rtol=1e-5, atol=1e-5)
    swaps = run(["--compare", "swaps", "--adapters", "3", "--ranks", "8,16", "--vision"], capsys)["swaps"]
    assert set(swaps) == {f"{stage}, r={rank}" for stage in ("vision", "text", "decode") for rank in (8, 16)}
    assert all(len(ways) == 3 and peer_by_hand.MIXED in ways for ways in swaps.values())


def test_bytes_of_copies_are_those_of_the_tensors(capsys: pytest.CaptureFixture[str]) -> None:
    peers.main(["--compare", "copies"])
    told = capsys.readouterr().out.splitlines()
    copies = json.loads(told[-1])["copies"]
    weights = sum(tensor.numel() * 4 for tensor in make_blip(TINY, CPU, torch.float32).state_dict().values())
    assert copies["one BLIP"]["weights_bytes"] == weights
    assert list(copies) == ["one BLIP", *(f"one UniAdapter, r={rank}" for rank in (8, 16, 64))]
    (row,) = [line for line in told if line.startswith("a BLIP for each")]
    assert row.split()[-1] == f"{weights * 1000 / 2**30:.1f}"


def test_a_peer_without_an_environment_is_skipped_in_plain_sight(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--compare", "peft,adapterhub", "--environments", str(tmp_path)]
    peers.main(words)
    told = capsys.readouterr().out
    for name in ("peft", "adapterhub"):
        assert f"skipped  {tmp_path}/{name} is not there; make peers makes it" in told
        assert "make peers" in json.loads(told.splitlines()[-1])[name]["skipped"]


def test_a_peer_and_ours_take_turns(tmp_path: Path) -> None:
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER.format(scripts=str(peer_processes.SCRIPTS)))
    asked: list[str] = []

    def ours(way: str) -> float:
        asked.append(way)
        return 2.0

    with peer_processes.start_peer(Path(sys.executable), script, []) as peer:
        assert peer.facts["rank"] == 3 and peer.facts["torch"] == torch.__version__
        ways = {way: partial(ours, way) for way in peer_processes.WAYS}
        seconds = peer_processes.take_turns_with(peer, ways, 2)
    assert asked == [*peer_processes.WAYS] * 3
    assert all(0.01 <= spread.low < 0.5 for spread in seconds["peer"].values())
    assert all(spread == (2.0, 2.0, 2.0) for spread in seconds["ours"].values())


def test_what_a_peer_says_when_it_ends_is_told(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit('this peer has a text tower only')")
    with pytest.raises(RuntimeError, match="ended with 1:\nthis peer has a text tower only"):
        with peer_processes.start_peer(Path(sys.executable), script, []):
            pass


@pytest.mark.parametrize("name", peer_processes.PEERS)
def test_a_peer_in_its_environment(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not (ROOT / ".peers" / name / "bin" / "python").exists():
        pytest.skip(f".peers/{name} is not there; {peer_processes.MAKE_ENVIRONMENTS} makes it")
    values = run(["--compare", name, "--adapters", "3"], capsys)[name]
    assert set(values["text, r=16"]["seconds"]) == {"peer", "ours"}
    counts = values["text, r=16"]["parameters"]
    assert abs(counts["peer"] / counts["ours"] - 1) < 0.05


def test_make_peers_makes_every_environment_from_exact_pins() -> None:
    (names,) = re.findall(r"^PEERS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert names.split() == list(peer_processes.PEERS)
    for name, peer in peer_processes.PEERS.items():
        assert (peer_processes.SCRIPTS / peer.script).exists()
        lines = (peer_processes.SCRIPTS / f"{name}-requirements.txt").read_text().splitlines()
        pins = [line for line in lines if not line.startswith("#")]
        assert pins and all(re.fullmatch(r"[A-Za-z0-9_.-]+==[^=]+", pin) for pin in pins)
        assert not any(pin.startswith("torch==") for pin in pins), "constraints.txt pins torch for all"
