"""Packages for tests of probes: every kind of adapter the family has, and ways to make a probe that lies."""

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from pydantic import JsonValue
from torch import Tensor

from adapters.config import AdapterConfig, Task
from adapters.families import family_of
from adapters.families.base import HEADS
from adapters.package import Package, package_files, parse_package
from adapters.probe import Probe
from service.backbone.base import Backbone
from service.backbones import DEFAULT, Backbones
from service.bank import Buckets
from service.engine import Engine
from service.lifecycle.probe import inputs_for, lodged, outputs_of
from service.lifecycle.validate import compute_probe
from service.media import MediaWorkers
from service.metrics import Metrics
from service.pipelines.stage_set import AnyStages, StageSet
from service.scheduler import BatchLimits, Scheduler
from tests.service.worlds import adapter_config, context, make_bank, random_tensors


@dataclass(frozen=True)
class Kind:
    """One kind of adapter."""

    task: Task = "vqa"
    options: Mapping[str, JsonValue] = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    resolution: int = 16

    def config(self, backbone: Backbone) -> AdapterConfig:
        return adapter_config(
            backbone, self.task, options=self.options, heads=self.heads, resolution=self.resolution, rank=4
        )

    @property
    def parts(self) -> tuple[str, ...]:
        """Every tuned part."""
        visual, textual, multimodal = (self.options.get(name, True) for name in ("visual", "textual", "multimodal"))
        present = {"visual": visual, "textual": textual or multimodal, "multimodal": multimodal}
        stacks = ("text", "decoder") if self.task == "vqa" else ("text",)
        memory = [f"{stack}.video_{term}_adapter" for stack in stacks for term in ("key", "value")]
        return (
            *(name for name, is_on in present.items() if is_on),
            *(memory if self.options.get("kv_rank") else ()),
            *self.heads,
        )

    def tensors_of(self, part: str, backbone: Backbone) -> tuple[str, ...]:
        """Names of a part's tensors."""
        groups = family_of("uniadapter").site_groups(self.config(backbone), backbone.dims())
        return groups.get(part, (f"{part}.weight", f"{part}.bias"))


KINDS = {
    "vqa": Kind(),
    "vqa-kv": Kind(options={"kv_rank": 3}, resolution=24),
    "vqa-no-query-residual": Kind(options={"query_residual": False, "kv_rank": 2}),
    "vqa-cross-only": Kind(options={"textual": False, "query_residual": False}),
    "vqa-text-only": Kind(options={"visual": False, "multimodal": False}),
    "vision-only": Kind(options={"textual": False, "multimodal": False, "query_residual": False}),
    "retrieval": Kind("retrieval"),
    "retrieval-kv": Kind("retrieval", {"kv_rank": 2}, resolution=24),
    "retrieval-frames": Kind("retrieval", {"frame_aware_attention": True}),
    "retrieval-frames-kv-heads": Kind("retrieval", {"frame_aware_attention": True, "kv_rank": 3}, HEADS),
    "retrieval-no-query-residual": Kind("retrieval", {"query_residual": False}, ("itm_head",)),
}


def package_of(
    backbone: Backbone, kind: Kind, *, seed: int = 1, tensors: Mapping[str, Tensor] | None = None
) -> Package:
    """A package without a probe, random unless its `tensors` are given."""
    config = kind.config(backbone)
    own = random_tensors(config, backbone.dims(), seed) if tensors is None else tensors
    return parse_package(package_files(config, own, "# A test\n"))


def probed(package: Package, stages: AnyStages) -> Package:
    """The package with the probe it deserves."""
    return replace(package, probe=asyncio.run(compute_probe(package, stages)).tensors())


def forged(package: Package, stages: AnyStages) -> Package:
    """The package with a probe that is true and was never examined: somebody else's tool wrote it."""

    async def outputs() -> Probe:
        inputs = inputs_for(package.config, stages.backbone)
        async with lodged(package, stages) as pin:
            return Probe(inputs, await outputs_of(inputs, package.config, pin, stages, context()))

    return replace(package, probe=asyncio.run(outputs()).tensors())


def zeroed(package: Package, names: Iterable[str]) -> Package:
    """The package with these tensors zeroed, as a package of its own."""
    tensors = package.tensors | {name: torch.zeros_like(package.tensors[name]) for name in names}
    return parse_package(package_files(package.config, tensors, "# A test\n"))


@contextmanager
def stages_of(backbone: Backbone, buckets: Buckets = ((4, 2), (8, 1))) -> Iterator[AnyStages]:
    """Stages over an engine of their own, for the block."""
    bank = make_bank(backbone, buckets)
    scheduler = Scheduler(BatchLimits(max_rows=64, max_tokens=10_000))
    backbones = Backbones.of_one(backbone, bank, Metrics())
    engine = Engine(backbones, scheduler, Metrics(), measured=lambda cost, seconds: None, on_fatal=lambda error: None)
    engine.start()
    try:
        yield StageSet(engine, backbones, MediaWorkers(1), Metrics(), feature_cache_bytes=0).on(DEFAULT)
    finally:
        engine.stop()
