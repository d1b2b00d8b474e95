"""How far bfloat16 and float16 are from float32, on everything the parity sets ask for.

    python -m tests.parity.precision              prints the tables
    python -m tests.parity.precision --write      and puts them into docs/parity.md

Each case is served once in each precision as a server would: the backbone loaded in it and packed, adapters folded in
float32 and then cast. What is compared is ours with ours, row by row, the rows beside a case's included.
"""

import argparse
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from service.backbone.base import DTYPES
from service.types import GenerateOutput, MatchOutput, RankInput, RankOutput, TextInput, VisionOutput
from tests.parity.epalm import mutations as epalm_mutations
from tests.parity.epalm.cases import Case as EPalmCase
from tests.parity.epalm.serving import make_worlds
from tests.parity.mutations import default_cases
from tests.parity.outcomes import quiet, write
from tests.parity.serving import Ran, Rows, Served, serve
from tests.parity.sets import Case

NAME = "precision"
HALVES = ("bfloat16", "float16")
UNIADAPTER, EPALM = "UniAdapter", "eP-ALM"
EMBEDDINGS = "embeddings"


@dataclass(frozen=True)
class Choice:
    """Something that was decided, and by how much in float32's eyes: the distance to what came second."""

    chosen: tuple[int, ...]
    margin: float


@dataclass(repr=False)
class Outputs:
    """What cases gave, by kind of output, always in the same order."""

    numbers: dict[str, list[Tensor]] = field(default_factory=dict)
    choices: dict[str, list[Choice]] = field(default_factory=dict)

    def add(self, kind: str, value: Tensor) -> None:
        """Keep numbers, as float32."""
        self.numbers.setdefault(kind, []).append(value.detach().float().cpu().clone())

    def decide(self, kind: str, chosen: Sequence[int], margin: float) -> None:
        """Keep a decision."""
        self.choices.setdefault(kind, []).append(Choice(tuple(chosen), margin))

    def decide_best(self, kind: str, scores: Tensor) -> None:
        """Keep the place of the best of scores [n], n > 1."""
        first, second = scores.float().topk(2).values.tolist()
        self.decide(kind, [int(scores.argmax())], first - second)


# --- what a case gives -----------------------------------------------------------------------------------


def uniadapter_outputs(cases: Iterable[Case], dtype: str) -> Outputs:
    """Serve the cases in a precision."""
    outputs = Outputs()
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            served = serve(case, Path(folder), dtype)
        assert served.backbone.dtype == served.bank.dtype == DTYPES[dtype]
        for rows in (*served.rows.values(), *served.beside.values()):
            _add_vision(outputs, served, rows)
            if rows.match:
                _add_retrieval(outputs, served, rows)
            if rows.generate or rows.rank:
                _add_answers(outputs, served, rows)
    return outputs


def _places(served: Served, stack: str) -> list[str]:
    """The hooked places of a stack, in the order they are passed."""
    record = next(record for record in served.records if any(p.startswith(f"{stack}.") for p in record.seen.calls))
    return [place for place in record.seen.calls if place.startswith(f"{stack}.")]


def _add_vision(outputs: Outputs, served: Served, rows: Rows) -> None:
    for ran in rows.vision:
        output = ran.output
        assert isinstance(output, VisionOutput) and output.states.dtype == served.backbone.dtype
        for place in _places(served, "vision"):
            outputs.add("hidden states, vision", ran.rows(place))
        outputs.add("hidden states, vision", output.states)
        if output.frames is not None:
            outputs.add(EMBEDDINGS, functional.normalize(output.frames, dim=-1))


def _add_text_states(outputs: Outputs, served: Served, kind: str, ran: Ran, length: int) -> None:
    for place in _places(served, "text"):
        outputs.add(kind, ran.rows(place)[:, :length])


def _add_retrieval(outputs: Outputs, served: Served, rows: Rows) -> None:
    clips = torch.stack([functional.normalize(functional.normalize(f, dim=-1).mean(0), dim=0) for f in rows.frames])
    for text, matched in zip(rows.text, rows.match, strict=True):
        length = len(cast(TextInput, text.job.inputs).ids)
        _add_text_states(outputs, served, "hidden states, text", text, length)
        _add_text_states(outputs, served, "hidden states, text and medium", matched, length)
        logits = cast(MatchOutput, matched.output).logits
        outputs.add("matching logits", logits)
        for pair in logits:
            outputs.decide_best("does a text match a medium", pair)
        outputs.decide_best("best medium of a text, by matching", logits[:, 1])
    outputs.add(EMBEDDINGS, rows.texts)
    by_text = rows.texts @ clips.t()
    for similarities in by_text:
        outputs.decide_best("best medium of a text, by vector", similarities)
        best = similarities.sort(descending=True)
        gap = float((best.values[:-1] - best.values[1:]).min())
        outputs.decide("order of all media of a text, by vector", best.indices.tolist(), gap)
    for similarities in by_text.t():
        outputs.decide_best("best text of a medium, by vector", similarities)


def _add_answers(outputs: Outputs, served: Served, rows: Rows) -> None:
    for num_beams, ran_rows in rows.generate.items():
        for ran in ran_rows:
            output = cast(GenerateOutput, ran.output)
            outputs.decide(_written(num_beams), output.hypotheses[0].ids, output.gap)
    for ran in rows.rank:
        question = cast(RankInput, ran.job.inputs).question_ids
        _add_text_states(outputs, served, "hidden states, text and medium", ran, len(question))
        outputs.add("word logits", ran.rows("words"))
    for ran in rows.forced:
        (scored,) = ran.scored_rows()
        outputs.add("word logits", scored)
    for ran in rows.rank_all or rows.rank:
        _add_ranking(outputs, cast(RankOutput, ran.output))


def _add_ranking(outputs: Outputs, ranking: RankOutput) -> None:
    """A ranking of all its candidates."""
    by_index = dict(zip(ranking.indices, ranking.scores, strict=True))
    scores = torch.tensor([by_index[index] for index in sorted(by_index)])
    outputs.add("scores of ranked answers", scores)
    outputs.decide_best("ranked answer", scores)


def _written(num_beams: int) -> str:
    return "written answer, greedy" if num_beams == 1 else f"written answer, {num_beams} beams"


def epalm_outputs(cases: Sequence[EPalmCase], dtype: str) -> Outputs:
    """Run the cases in a precision."""
    outputs = Outputs()
    for world in make_worlds(cases, dtype=DTYPES[dtype]):
        for features in world.features.values():
            assert features.dtype == DTYPES[dtype]
            outputs.add("encoders' first tokens", features)
        for scored in world.asked.values():
            for x in scored.inputs:
                outputs.add("hidden states, language model", x)
            outputs.add("word logits", scored.logits)
        for num_beams in (1, 3):
            for generated in world.generated(num_beams).values():
                outputs.decide(_written(num_beams), generated.hypotheses[0].ids, generated.gap)
        for ranking in world.ranked.values():
            ordered = torch.tensor(ranking.scores).sort(descending=True).values
            margin = float(ordered[0] - ordered[1]) if len(ordered) > 1 else 0.0
            outputs.decide("ranked answer", [ranking.indices[ranking.best]], margin)
    return outputs


# --- how far apart ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drift:
    """How far numbers of a kind are from float32's; each figure but `typical` is that of the worst tensor.

    `of_largest`: the largest difference over the largest value. `of_rms`: root mean square of the differences over that of
    the values; `typical` is its median. `cosine`: the lowest of single embeddings; of nothing else.
    """

    system: str
    kind: str
    dtype: str
    num_values: int
    largest: float
    of_largest: float
    of_rms: float
    typical: float
    cosine: float | None


@dataclass(frozen=True)
class Flips:
    """How many choices of a kind fell the other way; `widest` is float32's largest margin among these."""

    system: str
    kind: str
    dtype: str
    num_choices: int
    num_flipped: int
    widest: float


def drifts(system: str, dtype: str, exact: Outputs, rough: Outputs) -> Iterator[Drift]:
    """The numbers of a precision beside float32's."""
    assert exact.numbers.keys() == rough.numbers.keys()
    for kind, expected in exact.numbers.items():
        pairs = list(zip(expected, rough.numbers[kind], strict=True))
        distances = torch.tensor([_distances(a, b) for a, b in pairs]).nan_to_num(nan=float("inf"))
        worst, typical = distances.amax(0).tolist(), float(distances[:, -1].median())
        cosine = None
        if kind == EMBEDDINGS:
            cosine = min(float(functional.cosine_similarity(a, b, dim=-1).min()) for a, b in pairs)
        yield Drift(system, kind, dtype, sum(a.numel() for a in expected), *worst, typical, cosine)


def _distances(expected: Tensor, got: Tensor) -> tuple[float, float, float]:
    assert expected.shape == got.shape
    difference = (got - expected).abs()
    largest = float(difference.max())
    rms = float(difference.square().mean().sqrt() / expected.square().mean().sqrt())
    return largest, largest / float(expected.abs().max()), rms


def flips(system: str, dtype: str, exact: Outputs, rough: Outputs) -> Iterator[Flips]:
    """The choices of a precision beside float32's."""
    assert exact.choices.keys() == rough.choices.keys()
    for kind, expected in exact.choices.items():
        pairs = zip(expected, rough.choices[kind], strict=True)
        margins = [a.margin for a, b in pairs if a.chosen != b.chosen]
        yield Flips(system, kind, dtype, len(expected), len(margins), max(margins, default=0.0))


@dataclass(frozen=True)
class Report:
    """All drifts and flips."""

    drifts: list[Drift]
    flips: list[Flips]


def measure(cases: Sequence[Case], epalm_cases: Sequence[EPalmCase], dtypes: Sequence[str] = HALVES) -> Report:
    """Serve all cases in float32 and in each of the others."""
    report = Report([], [])
    with quiet():
        found = {dtype: uniadapter_outputs(cases, dtype) for dtype in ("float32", *dtypes)}
        also = {dtype: epalm_outputs(epalm_cases, dtype) for dtype in ("float32", *dtypes)}
    for system, outputs in ((UNIADAPTER, found), (EPALM, also)):
        for dtype in dtypes:
            report.drifts.extend(drifts(system, dtype, outputs["float32"], outputs[dtype]))
            report.flips.extend(flips(system, dtype, outputs["float32"], outputs[dtype]))
    return report


def table(report: Report) -> str:
    """Both tables."""
    lines = [
        "| system | output | numbers | precision | largest difference | over the largest value | rms over rms | median of it | lowest cosine |",
        "|---|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    for d in sorted(report.drifts, key=lambda d: (d.system != UNIADAPTER, _place(report.drifts, d), d.dtype)):
        cosine = "" if d.cosine is None else f"{d.cosine:.6f}"
        lines.append(
            f"| {d.system} | {d.kind} | {d.num_values:,} | {d.dtype} "
            f"| {d.largest:.1e} | {_percent(d.of_largest)} | {_percent(d.of_rms)} | {_percent(d.typical)} | {cosine} |"
        )
    lines += ["", "| system | choice | precision | fell the other way | widest float32 margin among them |"]
    lines.append("|---|---|---|--:|--:|")
    for f in sorted(report.flips, key=lambda f: (f.system != UNIADAPTER, _place(report.flips, f), f.dtype)):
        widest = f"{f.widest:.1e}" if f.num_flipped else ""
        lines.append(f"| {f.system} | {f.kind} | {f.dtype} | {f.num_flipped} of {f.num_choices} | {widest} |")
    return "\n".join(lines)


def _place(rows: Sequence[Drift] | Sequence[Flips], row: Drift | Flips) -> int:
    """Where its kind came first."""
    return next(place for place, other in enumerate(rows) if (other.system, other.kind) == (row.system, row.kind))


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/parity.md")
    arguments = parser.parse_args()
    text = table(measure(default_cases(), epalm_mutations.default_cases()))
    print(text)
    if arguments.write:
        write(text, NAME)


if __name__ == "__main__":
    main()
