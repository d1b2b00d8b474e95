"""What the device does with a batch of a language model's, with its encoders: see `blip_stages`, which it is like."""

from collections.abc import Callable, Sequence
from typing import cast

import torch

from service.backbone.decoding import KeepGoing, Start, Steps, Writing, write_all
from service.backbone.opt import Decoding, Opt
from service.backbone.opt_answers import begin_texts, rank_texts
from service.bank import BatchLeases
from service.types import Batch, ChooseInput, ContinueInput, Job, PerceiveInput, PerceiveOutput, StageOutput


def run_opt(model: Opt, batch: Batch, leases: BatchLeases, keep_going: KeepGoing) -> Sequence[StageOutput]:
    """Run a batch's stage. Called by the device thread, without gradients."""
    match batch.stage:
        case "perceive":
            return run_perceive(model, batch.jobs)
        case "generate":
            return write_all(begin_continue(model, batch.jobs, leases), keep_going)
        case "rank":
            return run_choose(model, batch.jobs, leases, keep_going)
        case _:
            raise AssertionError(f"a language model has no stage {batch.stage}. This is a bug.")


def run_perceive(model: Opt, jobs: Sequence[Job]) -> list[PerceiveOutput]:
    """Media of one encoder and one shape as one batch; no adapter has a part in it."""
    inputs = [cast(PerceiveInput, job.inputs) for job in jobs]
    states = model.perceive(inputs[0].encoder, torch.stack([one.values for one in inputs]).to(model.device))
    return [PerceiveOutput(own.clone()) for own in states]


def begin_continue(
    model: Opt, jobs: Sequence[Job], leases: BatchLeases, writer: Callable[[Decoding], Steps] = lambda steps: steps
) -> Writing:
    """Beam search; jobs share beams by their shape. `writer`: see `begin_texts`."""
    inputs = [cast(ContinueInput, job.inputs) for job in jobs]
    return begin_texts(
        model,
        [Start(one.start_ids, one.max_length) for one in inputs],
        [one.states for one in inputs],
        leases.adaptation([job.adapter for job in jobs]),
        num_beams=inputs[0].num_beams,
        writer=writer,
    )


def run_choose(model: Opt, jobs: Sequence[Job], leases: BatchLeases, keep_going: KeepGoing) -> Sequence[StageOutput]:
    """Answer ranking, each job with its own candidates and shortlist length."""
    inputs = [cast(ChooseInput, job.inputs) for job in jobs]
    return rank_texts(
        model,
        [one.start_ids for one in inputs],
        [one.states for one in inputs],
        leases.adaptation([job.adapter for job in jobs]),
        [one.candidates for one in inputs],
        [one.k for one in inputs],
        keep_going=keep_going,
    )
