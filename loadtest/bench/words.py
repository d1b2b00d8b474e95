"""A word of texts that are written together: launched operation by operation, and recorded and launched at once.

    python -m loadtest.bench words [--size tiny|base] [--device cuda] [--rank 64] [--beams 3]

Both sides write the same texts by beam search, on the frozen backbone, with one adapter for all, and with one for each text. On
a device without graphs nothing is launched at once: there the second side does the same work, of fixed shapes, operation by
operation, and the table says what fixed shapes cost. Texts of random weights never end here; speed does not know.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from adapters.families.base import Adaptation, adapt_rows
from loadtest.bench.harness import Bench, Table, take_turns
from loadtest.bench.models import BLIP_SIZES, adapter_dims, make_blip, make_slots
from service.backbone.blip import Blip
from service.backbone.blip_answers import BlipSteps, begin_answers
from service.backbone.blip_fixed import BlipFixedSteps
from service.backbone.decoding import Steps, Writing
from service.recordings import CudaGraphs, Recordings

BATCHES, QUESTION_LENGTH, CALLS = (1, 4, 16), 16, 8
UNBOUNDED = 1 << 40
LAUNCHED, AT_ONCE, FIXED = "launched", "at once", "fixed shapes"
Writer = Callable[[BlipSteps], Steps]


class Repeater:
    """A recorder for devices that have none: what is recorded is done again, operation by operation."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """See Recorder."""
        return run


def begin_texts(
    model: Blip, num_texts: int, adaptation: Adaptation | None, num_beams: int, max_length: int, writer: Writer
) -> Writing:
    """Answers to questions of random states."""
    assert model.decoder is not None
    size = (num_texts, QUESTION_LENGTH, model.config.vision.width)
    with torch.inference_mode():
        states = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)
        seen = torch.ones(size[:2], dtype=torch.bool, device=model.device)
        memory = model.decoder.body.remember(states, seen, adaptation)
        arguments = model, memory, num_texts, adaptation
        return begin_answers(*arguments, num_beams=num_beams, max_length=max_length, writer=writer)


def write_word(writing: Writing) -> None:
    """Choose a word of each text and write it."""
    with torch.inference_mode():
        assert not writing.choose(), "a text ended. This is a bug."
        writing.step()


def main(words: Sequence[str]) -> None:
    """Run the comparison and print it."""
    bench = Bench("words", __doc__, sorted(BLIP_SIZES, reverse=True), repeats=5)
    bench.parser.add_argument("--rank", type=int, default=64)
    bench.parser.add_argument("--beams", type=int, default=3)
    arguments = bench.start(words)
    config = BLIP_SIZES[arguments.size]
    model = make_blip(config, bench.device, bench.dtype)
    assert model.decoder is not None
    model.decoder.bias[config.special_ids.sep] = -1e4
    views = make_slots(config, arguments.rank, max(BATCHES), bench.device, bench.dtype)
    is_recorded = bench.device.type == "cuda"
    other = AT_ONCE if is_recorded else FIXED
    recordings = Recordings(CudaGraphs(bench.device) if is_recorded else Repeater(), UNBOUNDED, share=1.0)
    recorded: Writer = partial(BlipFixedSteps, recordings=recordings, dims=adapter_dims(config))
    max_length = CALLS * (arguments.repeats + 1) + 2
    table = Table("a word of texts, ms", ("", LAUNCHED, other, "times"))
    for num_texts in BATCHES:
        cases: dict[str, Adaptation | None] = {"frozen": None, "1 adapter": adapt_rows(views, [0] * num_texts)}
        if num_texts > 1:
            cases[f"{num_texts} adapters"] = adapt_rows(views, range(num_texts))
        for name, adaptation in cases.items():
            begin = partial(begin_texts, model, num_texts, adaptation, arguments.beams, max_length)
            writings = {LAUNCHED: begin(lambda steps: steps), other: begin(recorded)}
            runs = {side: partial(write_word, writing) for side, writing in writings.items()}
            spreads = take_turns(runs, arguments.repeats, bench.device, calls=CALLS)
            ms = [1000 * spreads[side].median for side in (LAUNCHED, other)]
            table.rows.append((f"{num_texts} texts, {name}", *ms, ms[0] / ms[1]))
    bench.report([table], {"table": table.rows, "columns": list(table.columns), "failed": recordings.has_failed})
