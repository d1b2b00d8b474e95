"""Serving many tasks without a service for it: weights swapped for every request, or a whole model for every task.

Swapped: the model holds one adapter. A request for another one copies that adapter's tensors from the host over it, and the
requests of a batch run one after the other. Our side runs them as one batch. A UniAdapter cannot be merged into the weights,
since a ReLU stands between its matrices, so nothing is gained by trying.
"""

import ctypes
import gc
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from adapters.families.base import Adaptation, SlotView, UniformAdaptation, adapt_rows
from adapters.families.uniadapter import UniAdapter
from loadtest.bench.harness import Bench, Table, take_turns
from loadtest.bench.models import fold_adapters, make_blip, make_slots
from loadtest.bench.stages import make_stage, num_bytes
from service.backbone.blip import Blip
from service.backbone.config import BlipConfig

T = TypeVar("T")
Forward = Callable[[Adaptation | None], Tensor]

WRITTEN_TOKENS = 9  # decoding steps of an answer: its adapter is copied once, before the first
MEMORY_RANKS = {"tiny": (8, 16, 64), "base": (64, 128, 512)}
MIXED = "ours, one mixed batch"
TASKS = (1, 10, 100, 1000)
MIB, GIB = 2.0**20, 2.0**30


class OneAdapter:
    """A model's only adapter on the device, and all adapters on the host."""

    def __init__(self, adapters: Sequence[Mapping[str, Tensor]], device: torch.device) -> None:
        self._loaded = {name: tensor.to(device, copy=True) for name, tensor in adapters[0].items()}
        self._host = [{name: _on_host(tensor, device) for name, tensor in own.items()} for own in adapters]
        self.adaptation = UniformAdaptation(SlotView(UniAdapter(), self._loaded))

    def load(self, number: int) -> UniformAdaptation:
        """Put an adapter in the other one's place."""
        for name, tensor in self._host[number].items():
            self._loaded[name].copy_(tensor, non_blocking=True)
        return self.adaptation


def _on_host(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor


def mixed(forward: Forward, adaptation: Adaptation, steps: int) -> None:
    """A batch at once."""
    for _ in range(steps):
        forward(adaptation)


def in_turn(forward: Forward, one: OneAdapter, count: int, steps: int, *, copies: bool) -> None:
    """Requests one after the other, each with its adapter; without `copies` what is loaded serves them all."""
    for number in range(count):
        adaptation = one.load(number) if copies else one.adaptation
        for _ in range(steps):
            forward(adaptation)


def compare_swaps(bench: Bench, config: BlipConfig) -> tuple[list[Table], dict[str, Any]]:
    """A batch with an adapter for every row: as one batch, and one after the other with and without the copies."""
    arguments = bench.arguments
    model = make_blip(config, bench.device, bench.dtype)
    tables, values = [], {}
    for rank in arguments.ranks:
        slots = make_slots(model.config, rank, arguments.adapters, model.device, model.dtype)
        adapters = fold_adapters(config, rank, arguments.adapters, bench.dtype)
        for name in (*(("vision",) if arguments.vision else ()), "text", "decode"):
            ways, work = swap_ways(bench, model, slots, OneAdapter(adapters, bench.device), name)
            seconds = take_turns(ways, arguments.repeats, bench.device)
            title = f"{name}, {len(slots)} requests with {len(slots)} adapters, {work}, r={rank}, {arguments.dtype}"
            table = Table(title, ("", "ms", "lowest", "highest", "requests/s", "of ours"))
            for way, spread in seconds.items():
                share = seconds[MIXED].median / spread.median
                table.rows.append((way, *(1000 * value for value in spread), len(slots) / spread.median, share))
            tables.append(table)
            values[f"{name}, r={rank}"] = seconds
    return tables, values


def swap_ways(
    bench: Bench, model: Blip, slots: Sequence[SlotView], one: OneAdapter, stage: str
) -> tuple[dict[str, Callable[[], object]], str]:
    """The ways through a stage, and what they do in words."""
    count, resolution = len(slots), model.config.vision.grid * model.config.vision.patch
    with torch.inference_mode():
        batch, single = (make_stage(stage, model, rows, resolution) for rows in (count, 1))
    steps = WRITTEN_TOKENS if stage == "decode" else 1
    ways: dict[str, Callable[[], object]] = {
        MIXED: partial(mixed, batch.forward, adapt_rows(slots, range(count)), steps),
        "one after the other, weights swapped": partial(in_turn, single.forward, one, count, steps, copies=True),
        "one after the other, nothing copied": partial(in_turn, single.forward, one, count, steps, copies=False),
    }
    return ways, f"{steps} steps" if stage == "decode" else f"{batch.tokens} tokens a row"


def compare_copies(bench: Bench, config: BlipConfig) -> tuple[list[Table], dict[str, Any]]:
    """Bytes of a model for each task beside those of one backbone with an adapter for each, from tensors that were made."""
    device, dtype = bench.device, bench.dtype
    model, resident = measure(partial(make_blip, config, device, dtype), device)
    measured = {"one BLIP": (num_bytes(model), resident)}
    for rank in MEMORY_RANKS[bench.arguments.size]:
        (made,) = fold_adapters(config, rank, 1, dtype)
        made = {name: tensor.to(device) for name, tensor in made.items()}
        copies, resident = measure(partial(copy_slots, made, bench.arguments.adapters), device)
        size = sum(tensor.numel() * tensor.element_size() for tensor in copies[0].values())
        measured[f"one UniAdapter, r={rank}"] = (size, resident / len(copies))
        del copies
    sizes = Table(
        f"memory of what was made, {bench.arguments.dtype}",
        ("", "weights, MiB", "resident, MiB", "of a BLIP"),
        [(name, own / MIB, seen / MIB, own / measured["one BLIP"][0]) for name, (own, seen) in measured.items()],
    )
    (_, (whole, _)), *adapters = measured.items()
    totals = Table("memory of N tasks, GiB", ("", *(f"N={tasks}" for tasks in TASKS)))
    totals.rows.append(("a BLIP for each", *(whole * tasks / GIB for tasks in TASKS)))
    for name, (own, _) in adapters:
        rank_name = name.rpartition(", ")[2]
        totals.rows.append((f"one BLIP, a UniAdapter for each, {rank_name}", *((whole + own * n) / GIB for n in TASKS)))
    values = {name: {"weights_bytes": own, "resident_bytes": seen} for name, (own, seen) in measured.items()}
    return [sizes, totals], values


def copy_slots(folded: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """As many copies of an adapter's tensors."""
    return [{name: tensor.clone() for name, tensor in folded.items()} for _ in range(count)]


def measure(make: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What was made, and by how many bytes the memory of the process (or what is allocated on its GPU) grew."""
    before = resident_bytes(device)
    made = make()
    return made, resident_bytes(device) - before


def resident_bytes(device: torch.device) -> float:
    """Bytes in use now; not a number where the system does not say."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # give back what is free, or it would serve what is made next unseen
        with open("/proc/self/statm") as told:
            return float(told.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError):
        return float("nan")
