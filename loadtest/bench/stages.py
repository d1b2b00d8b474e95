"""A stage of the backbone with a different adapter for every row, against the frozen backbone alone and against the limit.

    python -m loadtest.bench stages [--size tiny|base] [--stage vision|text|decode] [--batch 16] [--ranks 128,512]

Every row is the same batch through the same weights: by an independent plain model, by the frozen backbone without an
adaptation, with one adapter for all rows, and with as many adapters as `--adapters` says, row by row. The limit of a stage
is the longer of its operations over the rate of a large matrix product and its bytes over the rate of reading memory, both
measured in the same run, with the bytes of each distinct adapter counted once; `of limit` is the share of frozen
throughput that is kept over the share that could be.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.families.base import Adaptation, adapt_rows
from loadtest.bench import plain
from loadtest.bench.harness import Bench, Spread, Table, take_turns
from loadtest.bench.models import BLIP_SIZES, make_blip, make_slots
from loadtest.bench.rates import Rates, measure_rates
from service.backbone.blip import Blip, TextLayer
from service.backbone.config import BlipConfig, TextConfig
from service.backbone.cost import text_cost, tokens_per_frame, vision_cost
from service.backbone.vit import interpolate_positions

STAGES = ("vision", "text", "decode")
TEXT_LENGTH = 35
QUESTION_LENGTH, WRITTEN = 16, 4  # what a decoding step reads, and how much was written before it


class Work(NamedTuple):
    """Operations, and bytes of weights read."""

    operations: float
    num_bytes: float

    def plus(self, other: "Work") -> "Work":
        """Both."""
        return Work(self.operations + other.operations, self.num_bytes + other.num_bytes)


@dataclass(frozen=True)
class Stage:
    """One stage of a batch: ways through it, and what they have to do.

    `adapter_products` is how many products of a row with a rank x width matrix a layer's terms take, and
    `adapter_matrices` how many such matrices they read.
    """

    forward: Callable[[Adaptation | None], Tensor]
    independent: Callable[[], Tensor]
    frozen: Work
    rows: int
    tokens: int
    adapter_products: int
    adapter_matrices: int

    def adapted(self, config: BlipConfig, rank: int, num_adapters: int, element_size: int) -> Work:
        """What so many distinct adapters add."""
        matrix = config.vision.width * rank * config.vision.layers
        operations = 2.0 * self.adapter_products * matrix * self.rows * self.tokens
        return Work(operations, float(self.adapter_matrices * matrix * num_adapters * element_size))


def make_stage(name: str, model: Blip, batch: int, resolution: int) -> Stage:
    """A stage over random inputs."""
    config, device, dtype = model.config, model.device, model.dtype
    weights = dict(model.state_dict())
    generator = torch.Generator(device).manual_seed(3)
    heads, layers = config.vision.heads, config.vision.layers
    stack = _stack(config)
    if name == "vision":
        pixels = torch.randn(batch, 3, resolution, resolution, device=device, dtype=dtype, generator=generator)
        patch, tokens = config.vision.patch, tokens_per_frame(config, resolution)
        grid = resolution // patch
        native = {**weights, "vision.pos_embed": interpolate_positions(model.vision.pos_embed, grid, grid)}
        return Stage(
            lambda adaptation: model.encode_vision(pixels, adaptation),
            lambda: plain.vision(native, pixels, layers=layers, heads=heads, patch=patch),
            Work(vision_cost(config, resolution, batch), num_bytes(model.vision)),
            batch,
            tokens,
            adapter_products=2,
            adapter_matrices=2,
        )
    length = TEXT_LENGTH if name == "text" else QUESTION_LENGTH
    ids = torch.randint(5, stack.vocab_size, (batch, length), device=device, generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    if name == "text":
        assert model.text_encoder is not None
        return Stage(
            lambda adaptation: model.encode_text(ids, mask, adaptation),
            lambda: plain.text(weights, ids, layers=layers, heads=heads),
            Work(text_cost(stack, batch, TEXT_LENGTH), num_bytes(model.text_encoder.layers)),
            batch,
            TEXT_LENGTH,
            adapter_products=2,
            adapter_matrices=2,
        )
    decoder = model.decoder
    assert decoder is not None
    states = torch.randn(batch, length, stack.width, device=device, dtype=dtype, generator=generator)
    memory = decoder.body.remember(states, mask, None)
    cache = decoder.body.new_cache(batch, WRITTEN + 1)
    cache.seen[:, :WRITTEN] = True
    cache.kept.tensor.normal_(generator=generator)

    def step(adaptation: Adaptation | None) -> Tensor:
        cache.length = WRITTEN
        return decoder.step(ids[:, 0], cache, memory, adaptation)

    def flat(t: Tensor) -> Tensor:
        return t.transpose(1, 2).flatten(2)

    past = [(flat(k), flat(v)) for k, v in cache.kept.tensor[:, :, :, :, :WRITTEN]]
    seen = [(flat(k), flat(v)) for k, v in zip(memory.keys, memory.values, strict=True)]
    read_bytes = (
        num_bytes(decoder)
        - num_bytes(decoder.body.embeddings.position)
        - sum(map(_memory_bytes, decoder.body.text_layers()))
    )
    return Stage(
        step,
        lambda: plain.decode_step(weights, ids[:, 0], past, seen, heads=heads),
        Work(
            2.0 * batch * read_bytes / dtype.itemsize, read_bytes
        ),  # attention over so few tokens is nothing beside it
        batch,
        1,
        adapter_products=4,
        adapter_matrices=3,
    )


def num_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's weights."""
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def _memory_bytes(layer: TextLayer) -> int:
    """What projects a memory, which is done once and not at every step."""
    return num_bytes(layer.crossattention.key) + num_bytes(layer.crossattention.value)


def _stack(config: BlipConfig) -> TextConfig:
    assert config.text_encoder is not None and config.decoder is not None
    return config.text_encoder


def compare(
    stage: Stage, model: Blip, rank_list: Sequence[int], num_adapters: int, repeats: int, calls: int
) -> dict[str, Spread]:
    """Seconds of every way through a stage."""
    runs: dict[str, Callable[[], Tensor]] = {"plain model": stage.independent, "frozen": lambda: stage.forward(None)}
    for rank in rank_list:
        slots = make_slots(model.config, rank, num_adapters, model.device, model.dtype)
        one = adapt_rows(slots, [0] * stage.rows)
        many = adapt_rows(slots, sorted(row % num_adapters for row in range(stage.rows)))
        runs[f"r={rank}, 1 adapter"] = lambda one=one: stage.forward(one)  # type: ignore[misc]
        runs[f"r={rank}, {num_adapters} adapters"] = lambda many=many: stage.forward(many)  # type: ignore[misc]
    return take_turns(runs, repeats, model.device, calls=calls)


def tabulate(
    stage: Stage, config: BlipConfig, rates: Rates, seconds: dict[str, Spread], element_size: int, title: str
) -> Table:
    """Milliseconds, the share of frozen throughput, its limit, and how much of the limit is reached."""
    table = Table(title, ("", "ms", "lowest", "highest", "of frozen", "limit", "of limit", "GFLOP/s", "GB/s"))
    frozen = seconds["frozen"].median
    for name, spread in seconds.items():
        work, limit = stage.frozen, 1.0
        if name.startswith("r="):
            rank, count = (int(word.split("=")[-1].split()[0]) for word in name.split(", "))
            work = work.plus(stage.adapted(config, rank, count, element_size))
            limit = rates.limit(*stage.frozen) / rates.limit(*work)
        share = frozen / spread.median
        shares = (share, limit, share / limit)
        speeds = (work.operations / spread.median / 1e9, work.num_bytes / spread.median / 1e9)
        table.rows.append((name, *(1000 * value for value in spread), *shares, *speeds))
    return table


def main(words: Sequence[str]) -> None:
    """Run the comparison and print it."""
    bench = Bench("stages", __doc__, sorted(BLIP_SIZES, reverse=True), repeats=5)
    bench.parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    bench.parser.add_argument("--batch", type=int, default=16)
    bench.parser.add_argument("--adapters", type=int, default=16, help="distinct adapters in the batch")
    bench.parser.add_argument("--ranks", default="", help="such as 128,512")
    bench.parser.add_argument("--resolution", type=int, default=0, help="of the pictures; 0: the native one")
    bench.parser.add_argument("--calls", type=int, default=1, help="forwards a turn; for the short stages")
    arguments = bench.start(words)
    config = BLIP_SIZES[arguments.size]
    ranks = [int(rank) for rank in (arguments.ranks or ("128,512" if arguments.size == "base" else "16,64")).split(",")]
    resolution = arguments.resolution or config.vision.grid * config.vision.patch
    model = make_blip(config, bench.device, bench.dtype)
    rates = measure_rates(bench.device, bench.dtype)
    tables, values = [], {}
    for name in STAGES if arguments.stage == "all" else (arguments.stage,):
        with torch.inference_mode():
            stage = make_stage(name, model, arguments.batch, resolution)
            torch.testing.assert_close(stage.forward(None), stage.independent(), rtol=2e-2, atol=2e-2)
        seconds = compare(stage, model, ranks, arguments.adapters, arguments.repeats, arguments.calls)
        rates = rates.best(measure_rates(bench.device, bench.dtype))
        title = f"{name}, batch {arguments.batch}, {stage.tokens} tokens a row, {arguments.dtype}"
        tables.append(tabulate(stage, config, rates, seconds, bench.dtype.itemsize, title))
        values[name] = {"seconds": seconds, "table": [list(row) for row in tables[-1].rows]}
    rate = Table(
        "the device", ("", ""), [("product, GFLOP/s", rates.flops / 1e9), ("reading, GB/s", rates.bytes_read / 1e9)]
    )
    bench.report([rate, *tables], {"flops": rates.flops, "bytes_read": rates.bytes_read, "stages": values})
