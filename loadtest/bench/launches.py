"""What a device is told to do for a batch: how many operations, and how often it is asked what came of them. Counted, not timed.

    python -m loadtest.bench launches [--size tiny|base] [--batch 16] [--rank 64]

Where launching takes longer than what is launched, as on a GPU that writes a word of a few texts, this is most of what a batch
costs; and it can be counted on any machine, but for what an operation is made of there (an attention with a mask is one here).
Each stage runs on the frozen backbone, with one adapter for all rows, and with a different one for each, side by side in the
bank and scattered; by the kernels of each kind of device. Then a word of texts written by beam search, with those of a GPU, and
recorded, when all of it but what is brought to it and the way back is launched at once.
The default precision is float16, in which a CPU is told what a GPU would be.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from adapters.families.base import Adaptation, BackboneDims, SlotView, adapt_rows
from adapters.families.slots import ANY, COPYING_KERNELS, DEFAULT_KERNELS, GROUPED_KERNELS, Kernels
from loadtest.bench.harness import Bench, Table
from loadtest.bench.models import BLIP_SIZES, adapter_dims, make_blip, make_slots
from loadtest.bench.stages import STAGES, make_stage
from loadtest.bench.words import UNBOUNDED, Writer, begin_texts, write_word
from service.backbone.blip import Blip
from service.backbone.blip_fixed import BlipFixedSteps
from service.recordings import Recordings

GPU = "a GPU"
KERNELS: Mapping[str, Kernels] = {
    "a loop": Kernels(segments_from=ANY, stacked_up_to=0, gathered_up_to=0, gathered_at_most=0),
    "a CPU": DEFAULT_KERNELS,
    GPU: COPYING_KERNELS,
    "a Hopper GPU": GROUPED_KERNELS,
}
MAKES_ROOM = frozenset({"empty", "new_empty", "empty_like", "empty_strided"})
WAITS = frozenset({"tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"})
SLOTS_PER_ADAPTER = 2  # scattered adapters lie in so many slots each, all but one of them somebody else's
NUM_BEAMS, MAX_LENGTH = 3, 8


class Count(NamedTuple):
    """Operations that compute or copy, and times that the host asks what is in a tensor, hence waits."""

    launches: int
    waits: int


class _Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_view = not func._schema.is_mutable and bool(_memories(result) & _memories(args))
        self.seen[name] += not is_view and name not in MAKES_ROOM
        return result


def _memories(values: Any) -> set[int]:
    """Where the tensors among these, and in lists of them, are."""
    found = tree_leaves(values)
    return {value.untyped_storage().data_ptr() for value in found if isinstance(value, torch.Tensor)}


class _Waits(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.seen[name] += name in WAITS
        return func(*args, **(kwargs or {}))


def count(run: Callable[[], object]) -> Count:
    """What a run launches, and how often it waits."""
    with torch.inference_mode(), _Waits() as waits, _Launches() as launches:
        run()
    return Count(launches.seen.total(), waits.seen.total())


def mixes(views: Sequence[SlotView], num_rows: int) -> dict[str, Sequence[int]]:
    """Slots of rows: the same for all, one for each side by side, and one for each with gaps between them, in order."""
    scattered = sorted(random.Random(0).sample(range(len(views)), num_rows))
    return {"1 adapter": [0] * num_rows, "side by side": range(num_rows), "scattered": scattered}


def count_forwards(model: Blip, views: Sequence[SlotView], stage_name: str, num_rows: int, resolution: int) -> Table:
    """A stage by each kernel. A forward is counted the second time it runs: what is made once for a batch is there."""
    stage = make_stage(stage_name, model, num_rows, resolution)

    def launches(adaptation: Adaptation | None) -> int:
        with torch.inference_mode():
            stage.forward(adaptation)
        return count(lambda: stage.forward(adaptation)).launches

    table = Table(f"operations of a forward: {stage_name}, batch {num_rows}", ("", *KERNELS))
    table.rows.append(("frozen", *[launches(None)] * len(KERNELS)))
    for name, rows in mixes(views, num_rows).items():
        table.rows.append((name, *(launches(adapt_rows(views, rows, kernels)) for kernels in KERNELS.values())))
    return table


class Bundles:
    """A recorder that counts as a GPU's would: what is recorded is one launch. Here it is done again, unseen."""

    def __init__(self) -> None:
        self.size = 0  # operations of the last recording
        self.num_played = 0

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """See Recorder."""
        self.size = count(run).launches

        def again() -> None:
            self.num_played += 1
            with _disable_current_modes():
                run()

        return again


def count_words(model: Blip, views: Sequence[SlotView], dims: BackboneDims, num_rows: int) -> Table:
    """A word of texts that are written together, in the middle of them: launched operation by operation, and recorded."""
    columns = ("", "operations", "waits", "recorded: operations", "waits", "in the recording")
    table = Table(f"a word of {num_rows} texts, {NUM_BEAMS} beams", columns)
    cases: dict[str, Adaptation | None] = {"frozen": None}
    cases |= {name: adapt_rows(views, rows, KERNELS[GPU]) for name, rows in mixes(views, num_rows).items()}
    for name, adaptation in cases.items():
        launched = count_word(model, num_rows, adaptation, lambda steps: steps)
        bundles = Bundles()
        writer = partial(BlipFixedSteps, recordings=Recordings(bundles, UNBOUNDED, share=1.0), dims=dims)
        recorded = count_word(model, num_rows, adaptation, writer, bundles)
        table.rows.append((name, *launched, *recorded, bundles.size))
    return table


def count_word(
    model: Blip, num_texts: int, adaptation: Adaptation | None, writer: Writer, bundles: Bundles | None = None
) -> Count:
    """Choosing a word of each text and writing it, none of which ends."""
    writing = begin_texts(model, num_texts, adaptation, NUM_BEAMS, MAX_LENGTH, writer)
    for _ in range(2):
        write_word(writing)
    if bundles is None:
        return count(lambda: write_word(writing))
    played = bundles.num_played
    counted = count(lambda: write_word(writing))
    return counted._replace(launches=counted.launches + bundles.num_played - played)


def main(words: Sequence[str]) -> None:
    """Run the count and print it."""
    bench = Bench("launches", __doc__, sorted(BLIP_SIZES, reverse=True), repeats=1)
    bench.parser.set_defaults(dtype="float16")
    bench.parser.add_argument("--batch", type=int, default=16)
    bench.parser.add_argument("--rank", type=int, default=16)
    bench.parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    arguments = bench.start(words)
    config, num_rows = BLIP_SIZES[arguments.size], arguments.batch
    model = make_blip(config, bench.device, bench.dtype)
    views = make_slots(config, arguments.rank, SLOTS_PER_ADAPTER * num_rows, bench.device, bench.dtype)
    resolution = config.vision.grid * config.vision.patch
    names = STAGES if arguments.stage == "all" else (arguments.stage,)
    tables = [count_forwards(model, views, name, num_rows, resolution) for name in names]
    tables.append(count_words(model, views, adapter_dims(config), num_rows))
    shown = [{"title": table.title, "columns": list(table.columns), "rows": table.rows} for table in tables]
    bench.report(tables, {"tables": shown})
