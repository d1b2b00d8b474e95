"""What the device does with a batch of a BLIP's: pad the jobs' inputs, run one forward for all, split the result.

Every function gets jobs of its own stage, in any mix of adapters, and returns one output per job, in order. Padding is
masked everywhere, so a job's output does not depend on its neighbours.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from adapters.families.uniadapter import frame_factors
from service.backbone.blip import Blip
from service.backbone.blip_answers import BlipSteps, begin_answers, rank_answers
from service.backbone.blip_small import SmallBatches
from service.backbone.decoding import KeepGoing, Steps, Writing, pad_ids, write_all
from service.bank import BatchLeases
from service.recordings import Recordings
from service.types import (
    Batch,
    GenerateInput,
    Job,
    MatchInput,
    MatchOutput,
    RankInput,
    StageOutput,
    TextInput,
    TextOutput,
    VisionInput,
    VisionOutput,
)


def run_blip(
    model: Blip, batch: Batch, leases: BatchLeases, keep_going: KeepGoing, recordings: Recordings | None = None
) -> Sequence[StageOutput]:
    """Run a batch's stage, by a recording if there is one. Called by the device thread, without gradients."""
    small = None if recordings is None else SmallBatches(model, recordings, leases.dims)
    match batch.stage:
        case "vision":
            return run_vision(model, batch.jobs, leases, small)
        case "text":
            return run_text(model, batch.jobs, leases, small)
        case "match":
            return run_match(model, batch.jobs, leases)
        case "generate":
            return write_all(begin_generate(model, batch.jobs, leases), keep_going)
        case "rank":
            return run_rank(model, batch.jobs, leases, keep_going)
        case _:
            raise AssertionError(f"a BLIP has no stage {batch.stage}. This is a bug.")


def run_vision(
    model: Blip, jobs: Sequence[Job], leases: BatchLeases, small: SmallBatches | None = None
) -> list[VisionOutput]:
    """Frames of all jobs as one batch; projections of each CLS where the backbone has that head."""
    inputs = [cast(VisionInput, job.inputs).pixels for job in jobs]
    adapters = [job.adapter for job, pixels in zip(jobs, inputs, strict=True) for _ in range(len(pixels))]
    pixels = torch.cat(inputs).to(model.device)
    seen = None if small is None else small.see(pixels, leases.views(adapters))
    if seen is not None:
        states = seen.states[: len(pixels)]
        projected = (
            None if seen.frames is None else seen.frames[: len(pixels)].clone()
        )  # the next batch's are there too
    else:
        adaptation = leases.adaptation(adapters)
        states = model.encode_vision(pixels, adaptation)  # [sum of F, P, D]
        projected = None if model.vision_proj is None else model.project("vision_proj", states[:, 0], adaptation)
    sizes = [len(pixels) for pixels in inputs]
    frames: Sequence[Tensor | None] = [None] * len(jobs)
    if projected is not None:
        frames = to_host(projected.float()).split(sizes)
    return [VisionOutput(own.clone(), f) for own, f in zip(states.split(sizes), frames, strict=True)]


def run_text(
    model: Blip, jobs: Sequence[Job], leases: BatchLeases, small: SmallBatches | None = None
) -> list[TextOutput]:
    """Unit-norm text features."""
    ids, mask = _pad(model, [cast(TextInput, job.inputs).ids for job in jobs])
    adapters = [job.adapter for job in jobs]
    read = None if small is None else small.read(ids, mask, leases.views(adapters))
    if read is not None:
        features = read.result[: len(jobs)].clone()
    else:
        adaptation = leases.adaptation(adapters)
        hidden = model.encode_text(ids, mask, adaptation)
        features = functional.normalize(model.project("text_proj", hidden[:, 0], adaptation).float(), dim=-1)
    return [TextOutput(feature) for feature in to_host(features)]


def run_match(model: Blip, jobs: Sequence[Job], leases: BatchLeases) -> list[MatchOutput]:
    """Matching logits of every pair of every job; frame weights where a job brings similarities."""
    inputs = [cast(MatchInput, job.inputs) for job in jobs]
    sizes = [len(pairs.ids) for pairs in inputs]
    ids, mask = _pad(model, [ids for pairs in inputs for ids in pairs.ids])
    states = [clip for pairs in inputs for clip in pairs.states]
    similarities = [similarity for pairs in inputs for similarity in pairs.similarities]
    y, seen = _pad_states([clip.flatten(0, 1) for clip in states])
    factors = None
    if any(similarity is not None for similarity in similarities):
        factors = pad_sequence(
            [_factors(clip, similarity) for clip, similarity in zip(states, similarities, strict=True)],
            batch_first=True,
            padding_value=1.0,
        ).to(y)
    adaptation = leases.adaptation([job.adapter for job, size in zip(jobs, sizes, strict=True) for _ in range(size)])
    hidden = model.encode_multimodal(ids, mask, y, seen, adaptation, factors)
    logits = to_host(model.project("itm_head", hidden[:, 0], adaptation).float())
    return [MatchOutput(own) for own in logits.split(sizes)]


def to_host(x: Tensor) -> Tensor:
    """A tensor on its way to the host: it is there when the device has been waited for, as the engine does after each batch."""
    try:
        return x.to("cpu", non_blocking=True)
    except RuntimeError:  # it goes to memory that is pinned for it, of which there may be no more
        return x.cpu()


def _factors(clip: Tensor, similarity: Tensor | None) -> Tensor:
    """Key factors [F*P] of one pair, on the host like its similarity; ones without frame weights."""
    if similarity is None:
        return torch.ones(clip.shape[0] * clip.shape[1])
    return frame_factors(similarity.float()[None], clip.shape[1])[0]


def _question_states(
    model: Blip, jobs: Sequence[Job], questions: Sequence[GenerateInput | RankInput], leases: BatchLeases
) -> tuple[Tensor, Tensor, list[str]]:
    """States of the questions [B, L, D], their mask, and each row's adapter.

    Questions about the same medium that follow one another share its keys and values: to project these takes as long as
    to see the medium.
    """
    ids, mask = _pad(model, [question.question_ids for question in questions])
    adapters = [job.adapter for job in jobs]
    pairs = zip(adapters, questions, strict=True)
    media = [list(about) for _, about in groupby(pairs, key=lambda pair: (pair[0], medium_of(pair[1])))]
    y, seen = _pad_states([about[0][1].states for about in media])
    assert model.text_encoder is not None, "the caller checked that there is a text encoder. This is a bug."
    memory = model.text_encoder.remember(y, seen, leases.adaptation([about[0][0] for about in media]))
    memory = replace(memory, readers=tuple(map(len, media)))
    return model.read(ids, mask, memory, leases.adaptation(adapters)), mask, adapters


def medium_of(inputs: object) -> tuple[int, ...]:
    """What tells questions about the same states from others: where they are, and their shape; nothing for other stages."""
    if isinstance(inputs, GenerateInput | RankInput):
        return (inputs.states.data_ptr(), *inputs.states.shape)
    return ()


def begin_generate(
    model: Blip, jobs: Sequence[Job], leases: BatchLeases, writer: Callable[[BlipSteps], Steps] = lambda steps: steps
) -> Writing:
    """Beam search; jobs share beams and length by their shape. `writer`: see `begin_answers`."""
    inputs = [cast(GenerateInput, job.inputs) for job in jobs]
    states, mask, adapters = _question_states(model, jobs, inputs, leases)
    adaptation = leases.adaptation(adapters)
    assert model.decoder is not None
    memory = model.decoder.body.remember(states, mask, adaptation)
    num_beams, max_length = inputs[0].num_beams, inputs[0].max_length
    return begin_answers(
        model, memory, len(jobs), adaptation, num_beams=num_beams, max_length=max_length, writer=writer
    )


def run_rank(model: Blip, jobs: Sequence[Job], leases: BatchLeases, keep_going: KeepGoing) -> Sequence[StageOutput]:
    """Answer ranking, each job with its own candidates and shortlist length."""
    inputs = [cast(RankInput, job.inputs) for job in jobs]
    states, mask, adapters = _question_states(model, jobs, inputs, leases)
    adaptation = leases.adaptation(adapters)
    assert model.decoder is not None
    memory = model.decoder.body.remember(states, mask, adaptation)
    candidates, ks = [i.candidates for i in inputs], [i.k for i in inputs]
    return rank_answers(model, memory, adaptation, candidates, ks, keep_going=keep_going)


def _pad(model: Blip, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    return pad_ids(rows, model.config.special_ids.pad, model.device)


def _pad_states(states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Memories [M_i, D] as [B, M, D] with mask [B, M] (True: a token)."""
    y = pad_sequence(list(states), batch_first=True)
    lengths = torch.tensor([len(state) for state in states], device=y.device)
    return y, torch.arange(y.shape[1], device=y.device)[None] < lengths[:, None]
