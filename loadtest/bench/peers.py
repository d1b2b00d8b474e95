"""What else one could do, on the same machine in the same run: the library's own generation, adapters swapped by hand, a model for
every task, and libraries that mix adapters.

    python -m loadtest.bench peers [--size tiny|base] [--compare library,swaps,copies,peft,adapterhub] [--ranks 128] [--vision]

    library      `generate` of transformers on the same weights, one question a picture and several; answers must be equal, or
                 explained by the rules by which a search ends, or the run fails                        loadtest/bench/peer_library.py
    swaps        one adapter in the model, replaced for every request, against one mixed batch          loadtest/bench/peer_by_hand.py
    copies       bytes of a whole model for every task, against one with an adapter for each
    peft         LoRA of PEFT, mixed by `adapter_names`                                               loadtest/bench/peer_processes.py
    adapterhub   bottlenecks of AdapterHub's `adapters`, mixed by `BatchSplit`

The last two need environments of their own (`make peers`) and are skipped, with a word, where these are absent. Weights are random.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from loadtest.bench import peer_by_hand, peer_library, peer_processes
from loadtest.bench.harness import Bench, Table
from loadtest.bench.models import BLIP_SIZES
from service.backbone.config import BlipConfig

Comparison = Callable[[Bench, BlipConfig], tuple[list[Table], dict[str, Any]]]

COMPARISONS: dict[str, Comparison] = {
    "copies": peer_by_hand.compare_copies,  # first: later, memory that others gave back would serve it unseen
    "library": peer_library.compare,
    "swaps": peer_by_hand.compare_swaps,
    **{name: partial(peer_processes.compare, name=name) for name in peer_processes.PEERS},
}
RANKS = {"tiny": "16", "base": "128"}


def main(words: Sequence[str]) -> None:
    """Run the comparisons and print them. Raises: SystemExit when answers differ for no known reason."""
    bench = Bench("peers", __doc__, sorted(BLIP_SIZES, reverse=True), repeats=5)
    bench.parser.add_argument("--compare", default=",".join(COMPARISONS), help="which, such as library,swaps")
    bench.parser.add_argument("--ranks", default="", help="of the UniAdapters, such as 128,512")
    bench.parser.add_argument("--batch", type=int, default=8, help="questions a batch beside the library")
    bench.parser.add_argument("--checked", type=int, default=4, help="batches whose answers are compared")
    bench.parser.add_argument("--adapters", type=int, default=16, help="rows of a batch elsewhere, each with its own")
    bench.parser.add_argument("--vision", action="store_true", help="the vision tower too, where it is optional")
    bench.parser.add_argument("--environments", default=".peers", help="where `make peers` made them")
    arguments = bench.start(words)
    names = arguments.compare.split(",")
    if unknown := [name for name in names if name not in COMPARISONS]:
        bench.parser.error(f"--compare: {', '.join(unknown)} not among {', '.join(COMPARISONS)}")
    arguments.ranks = [int(rank) for rank in (arguments.ranks or RANKS[arguments.size]).split(",")]
    tables: list[Table] = []
    values: dict[str, Any] = {}
    for name in COMPARISONS:
        if name in names:
            own, values[name] = COMPARISONS[name](bench, BLIP_SIZES[arguments.size])
            tables += own
    bench.report(tables, values)
    if unexplained := num_unexplained(values.get("library", {})):
        sys.exit(f"{unexplained} answers differ from the library's for no known reason")


def num_unexplained(library: dict[str, Any]) -> int:
    """Answers that nothing explains."""
    return sum(answers["unexplained"] for answers in library.get("answers", {}).values())
