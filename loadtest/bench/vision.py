"""Adapters of one batch against the frozen backbone alone, in the vision stage.

    python -m loadtest.bench vision [--size tiny|base] [--device cpu|cuda] [--dtype float32|bfloat16] [--batch 16] [--repeats 7]

Each row is the same pictures through the same weights: without an adaptation, with one adapter for all rows, and with a
different adapter for every row. Weights are random; speed does not know. A table for people, the last line JSON.
"""

import argparse
import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adapters.config import AdapterConfig, BackboneRef, Preprocessing
from adapters.families.base import Adaptation, BlipDims, SlotView, adapt_rows
from adapters.families.uniadapter import UniAdapter, init_tensors
from loadtest.bench.timing import medians
from service.backbone.config import VisionConfig
from service.backbone.vit import VisionTower

SIZES = {
    "tiny": VisionConfig(width=128, layers=4, heads=4, mlp_width=512, patch=16, grid=4),
    "base": VisionConfig(width=768, layers=12, heads=12, mlp_width=3072, patch=16, grid=24),
}
RANKS = {"tiny": (16, 64), "base": (128, 512)}


def adapter_slots(
    vision: VisionConfig, rank: int, count: int, device: torch.device, dtype: torch.dtype
) -> list[SlotView]:
    """`count` different adapters of a rank, folded as the bank folds them."""
    family, dims = UniAdapter(), BlipDims(vision.width, vision.layers, 256, ())
    config = AdapterConfig(
        family="uniadapter",
        task="retrieval",
        rank=rank,
        backbone=BackboneRef(architecture="blip", width=vision.width, layers=vision.layers, parts={}),
        preprocessing=Preprocessing(resolution=vision.grid * vision.patch),
    )
    slots = []
    for seed in range(count):
        tensors = init_tensors(config, dims, torch.Generator().manual_seed(seed))
        folded = {name: t.to(device, dtype) for name, t in family.fold(config, tensors, dims).items()}
        slots.append(SlotView(family, folded))
    return slots


def main(words: Sequence[str]) -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(
        prog="loadtest.bench vision", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args(words)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    vision, batch = SIZES[arguments.size], arguments.batch
    side = vision.grid * vision.patch
    tower = VisionTower(vision).to(device, dtype).eval().requires_grad_(False)
    pixels = torch.randn(batch, 3, side, side, device=device, dtype=dtype)

    def forward(adaptation: Adaptation | None) -> Callable[[], Tensor]:
        return lambda: tower(pixels, adaptation)

    runs = {"frozen": forward(None)}
    for rank in RANKS[arguments.size]:
        slots = adapter_slots(vision, rank, batch, device, dtype)
        runs[f"r={rank}, one adapter"] = forward(adapt_rows(slots, [0] * batch, device))
        runs[f"r={rank}, {batch} adapters"] = forward(adapt_rows(slots, list(range(batch)), device))
    seconds = medians(runs, arguments.repeats, device)
    print(f"vision stage, {arguments.size}, batch {batch}, {side} px, {arguments.dtype} on {device}\n")
    print(f"{'':24s}{'ms':>10s}{'of frozen':>12s}")
    for name, value in seconds.items():
        print(f"{name:24s}{1000 * value:10.1f}{seconds['frozen'] / value:12.2f}")
    result = {
        "bench": "vision",
        "size": arguments.size,
        "batch": batch,
        "dtype": arguments.dtype,
        "device": str(device),
    }
    print(json.dumps(result | {"median_s": seconds}))
