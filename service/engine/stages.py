"""What the device does with a batch, whatever backbone it is for."""

from collections.abc import Sequence
from functools import partial

from service.backbone.blip import Blip
from service.backbone.blip_fixed import BlipFixedSteps
from service.backbone.decoding import KeepGoing, Writing
from service.backbone.opt_fixed import OptFixedSteps
from service.backbones import HostedBackbone
from service.bank import BatchLeases
from service.engine.blip_stages import begin_generate, run_blip
from service.engine.opt_stages import begin_continue, run_opt
from service.types import Batch, StageOutput


def run_batch(
    hosted: HostedBackbone, batch: Batch, leases: BatchLeases, keep_going: KeepGoing
) -> Sequence[StageOutput]:
    """Run a batch's stage on the backbone it is for. Called by the device thread, without gradients."""
    model = hosted.backbone.model
    if isinstance(model, Blip):
        return run_blip(model, batch, leases, keep_going, hosted.recordings)
    return run_opt(model, batch, leases, keep_going)


def begin_batch(hosted: HostedBackbone, batch: Batch, leases: BatchLeases) -> Writing:
    """Read what a `generate` batch's texts start from, and be ready to write. Called like `run_batch`."""
    model, recordings = hosted.backbone.model, hosted.recordings
    if isinstance(model, Blip):
        if recordings is None:
            return begin_generate(model, batch.jobs, leases)
        writer = partial(BlipFixedSteps, recordings=recordings, dims=hosted.bank.dims)
        return begin_generate(model, batch.jobs, leases, writer)
    if recordings is None:
        return begin_continue(model, batch.jobs, leases)
    return begin_continue(model, batch.jobs, leases, partial(OptFixedSteps, recordings=recordings))
