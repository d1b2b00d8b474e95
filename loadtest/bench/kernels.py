"""Adapters' maths alone, without a backbone: by each kernel, and for many mixes of adapters in a batch.

    python -m loadtest.bench kernels [--size tiny|base] [--ranks 64,128,512] [--tokens 1,2,3,4,8,35,577] [--adapters 16]

Milliseconds of one bottleneck (LayerNorm, down-projection, ReLU, up-projection, addition) in every layer. The first tables
have a row of so many tokens for each of `--adapters` adapters, and say which kernel is fastest where; `as served` is what
`adapters/families/slots.py` picks. The second ones say what a mix costs: by popularity of the adapters, by their number and
by the number of rows, in times of the same rows with one adapter for all.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from adapters.families.base import Adaptation, Site, adapt_rows
from adapters.families.slots import COPYING_KERNELS, GROUPED_KERNELS, Kernels
from adapters.products import can_group
from loadtest.bench.harness import Bench, Table, take_turns
from loadtest.bench.models import BLIP_SIZES, make_slots
from loadtest.traffic import POPULARITIES, Popularity, picks

NEVER = 1 << 30
KERNELS: dict[str, Kernels | None] = {
    "slot by slot": Kernels(segments_from=1),
    "a loop": Kernels(segments_from=NEVER, stacked_up_to=0, gathered_up_to=0, gathered_at_most=0),
    "stacked": Kernels(segments_from=NEVER, stacked_up_to=NEVER, gathered_up_to=0, gathered_at_most=0),
    "gathered": Kernels(segments_from=NEVER, stacked_up_to=0, gathered_up_to=NEVER),
    "copied": replace(COPYING_KERNELS, stacked_up_to=0),
    "grouped": GROUPED_KERNELS,
    "as served": None,
}
FEW_TOKENS = 64  # more are never gathered: the numbers of its rows would be as many as those of the weights
PICTURE_ROWS = 16  # a mix of more pictures would take minutes and show the same


def bottlenecks(adaptation: Adaptation, x: Tensor, layers: int) -> Tensor:
    """x [B, T, D] and what an adaptation adds to it layer by layer."""
    out = x.clone()
    for layer in range(layers):
        out = adaptation.add(Site("vision", layer, "mlp"), x, out)
    return out


class Maths:
    """Adapters of one rank in slots, and rows for them."""

    def __init__(self, bench: Bench, rank: int, num_adapters: int) -> None:
        self.bench = bench
        self.config = BLIP_SIZES[bench.arguments.size]
        slot_rank = max(rank, bench.arguments.slot_rank)
        self.views = make_slots(self.config, rank, num_adapters, bench.device, bench.dtype, slot_rank=slot_rank)

    def ms(self, adaptations: dict[str, Adaptation], num_rows: int, tokens: int) -> dict[str, float]:
        """Milliseconds of the same rows by each of these, taking turns."""
        size = (num_rows, tokens, self.config.vision.width)
        x = torch.randn(size, device=self.bench.device, dtype=self.bench.dtype)
        runs = {name: partial(bottlenecks, own, x, self.config.vision.layers) for name, own in adaptations.items()}
        seconds = take_turns(runs, self.bench.arguments.repeats, self.bench.device)
        return {name: 1000 * spread.median for name, spread in seconds.items()}

    def by_kernel(self, tokens: int) -> dict[str, float]:
        """Milliseconds of a row for each adapter, by each kernel."""
        rows = range(len(self.views))
        tried = [name for name in KERNELS if self._is_tried(name, tokens)]
        return self.ms({name: adapt_rows(self.views, rows, KERNELS[name]) for name in tried}, len(rows), tokens)

    def _is_tried(self, name: str, tokens: int) -> bool:
        match name:
            case "gathered":
                return tokens <= FEW_TOKENS and self.bench.device.type == "cpu"
            case "grouped":
                return can_group(self.bench.device, self.bench.dtype)
        return True

    def of_one(self, popularity: Popularity, num_adapters: int, num_rows: int, tokens: int) -> float:
        """Times that a mix takes of the same rows with one adapter."""
        slots = sorted(itertools.islice(picks(popularity, range(num_adapters), seed=0), num_rows))
        mix, one = adapt_rows(self.views, slots), adapt_rows(self.views, [0] * num_rows)
        ms = self.ms({"mix": mix, "one": one}, num_rows, tokens)
        return ms["mix"] / ms["one"]


def kernel_table(maths: Maths, rank: int, token_list: Sequence[int]) -> Table:
    """Milliseconds by tokens and kernel."""
    table = Table(f"rank {rank}, {len(maths.views)} adapters, ms", ("tokens", *KERNELS))
    for tokens in token_list:
        ms = maths.by_kernel(tokens)
        table.rows.append((str(tokens), *(ms.get(name, "") for name in KERNELS)))
    return table


def mix_table(maths: Maths, rank: int, tokens: int, adapter_list: Sequence[int], batch_list: Sequence[int]) -> Table:
    """Times of one adapter, by popularity, number of adapters and number of rows."""
    batches = [batch for batch in batch_list if tokens <= FEW_TOKENS or batch <= PICTURE_ROWS]
    table = Table(f"rank {rank}, {tokens} tokens a row, times of one adapter", ("", *(f"{n} rows" for n in batches)))
    for popularity in POPULARITIES:
        for count in adapter_list if popularity != "identical" else [1]:
            times = [maths.of_one(popularity, count, batch, tokens) for batch in batches]
            table.rows.append((f"{popularity}, {count} adapters", *times))
    return table


def numbers(text: str) -> list[int]:
    """The numbers of a list with commas."""
    return [int(word) for word in text.split(",") if word]


def main(words: Sequence[str]) -> None:
    """Run the comparison and print it."""
    bench = Bench("kernels", __doc__, sorted(BLIP_SIZES, reverse=True), repeats=7)
    bench.parser.add_argument("--ranks", default="", help="such as 64,128,512")
    bench.parser.add_argument("--tokens", default="1,2,3,4,6,8,35,577", help="a row, in the first tables")
    bench.parser.add_argument("--adapters", type=int, default=16, help="distinct ones, in the first tables")
    bench.parser.add_argument(
        "--slot-rank", type=int, default=0, help="of the slots, where they are wider than the adapters"
    )
    bench.parser.add_argument("--mix-ranks", default="64", help="of the second tables; none of them where empty")
    bench.parser.add_argument("--mix-tokens", default="1,35,577")
    bench.parser.add_argument("--mix-adapters", default="1,4,16,64")
    bench.parser.add_argument("--mix-rows", default="1,4,16,64")
    arguments = bench.start(words)
    ranks = numbers(arguments.ranks or ("64,128,512" if arguments.size == "base" else "8,16"))
    tables = []
    for rank in ranks:
        tables.append(kernel_table(Maths(bench, rank, arguments.adapters), rank, numbers(arguments.tokens)))
    adapter_list, row_list = numbers(arguments.mix_adapters), numbers(arguments.mix_rows)
    for rank in numbers(arguments.mix_ranks):
        maths = Maths(bench, rank, max(adapter_list))
        tables += [mix_table(maths, rank, tokens, adapter_list, row_list) for tokens in numbers(arguments.mix_tokens)]
    shown = [{"title": table.title, "columns": list(table.columns), "rows": table.rows} for table in tables]
    bench.report(tables, {"tables": shown})
