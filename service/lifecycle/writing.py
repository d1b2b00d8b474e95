"""Packages with a probe, for whoever writes one on the command line: an engine is made for the purpose, and ended."""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from adapters.config import AdapterConfig
from adapters.families import family_of
from adapters.package import (
    PROBE_FILE,
    Package,
    package_files,
    parse_package,
    read_files,
    replace_file,
    with_probe,
    write_files,
)
from service.backbone.base import Backbone
from service.backbones import DEFAULT, Backbones
from service.bank import AdapterBank
from service.engine import Engine
from service.lifecycle.validate import compute_probe
from service.media import MediaWorkers
from service.metrics import Metrics
from service.pipelines.stage_set import AnyStages, StageSet
from service.scheduler import BatchLimits, Scheduler

TIMEOUT_S = 24 * 3600.0  # nobody waits but who gave the command


def write_probed_package(
    out: Path, config: AdapterConfig, tensors: Mapping[str, Tensor], readme: str, backbone: Backbone
) -> Package:
    """Write a package with a probe, computed with the float32 `backbone` it was made for: all of it or nothing.

    Not for use on an event loop.
    Raises: Conflict when `out` exists and is not an empty folder; what `compute_probe` raises.
    """
    files = _probed(package_files(config, tensors, readme), backbone)
    package = parse_package(files)
    write_files(out, files)
    return replace(package, path=out)


def renew_probe(folder: Path, backbone: Backbone, out: Path | None = None) -> Package:
    """Compute the probe of the package in `folder`, in place or as a copy in `out`. Its other files stay as they are.

    Not for use on an event loop.
    Raises: InvalidPackage; Conflict when `out` exists and is not an empty folder; what `compute_probe` raises.
    """
    files = _probed({name: data for name, data in read_files(folder).items() if name != PROBE_FILE}, backbone)
    package = parse_package(files)
    if out is None:
        replace_file(folder, PROBE_FILE, files[PROBE_FILE])
    else:
        write_files(out, files)
    return replace(package, path=out or folder)


def _probed(files: Mapping[str, bytes], backbone: Backbone) -> dict[str, bytes]:
    package = parse_package(files, dims=backbone.dims())
    with workbench(backbone, family_of(package.config.family).slot_rank(package.config)) as stages:
        probe = asyncio.run(compute_probe(package, stages, timeout_s=TIMEOUT_S))
    return with_probe(files, probe.tensors())


@contextmanager
def workbench(backbone: Backbone, rank: int) -> Iterator[AnyStages]:
    """The parts that serve, with one slot of that rank, for as long as the block lasts."""
    metrics = Metrics()
    bank = AdapterBank(
        backbone.dims(),
        backbone.head_tensors(),
        device=backbone.device,
        dtype=backbone.dtype,
        buckets=((rank, 1),),
        host_bytes=1,  # what is held stays beyond it
        metrics=metrics,
    )
    backbones = Backbones.of_one(backbone, bank, metrics)
    engine = Engine(
        backbones,
        Scheduler(BatchLimits(max_rows=1, max_tokens=1)),  # a job above a limit runs alone, as all do here
        metrics,
        measured=lambda cost, seconds: None,
        on_fatal=lambda error: None,  # whoever waits hears of it
        num_threads=torch.get_num_threads(),
    )
    media = MediaWorkers(1)  # never started: a probe brings pixels
    engine.start()
    try:
        yield StageSet(engine, backbones, media, metrics, feature_cache_bytes=0).on(DEFAULT)
    finally:
        engine.stop()
        media.close()
