"""What an adapter gives for a probe's inputs, computed by the engine that serves: the same way for writing and for checking.

Every job is background work and runs alone in its batch. So it never takes longer than a small request would, one slot
is enough, and two runs of equal weights are equal launches: their numbers agree to the bit, or very nearly.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import torch
from torch import Tensor

from adapters.config import AdapterConfig
from adapters.errors import InvalidPackage, MissingPart
from adapters.package import Package
from adapters.probe import ProbeInputs, Vocabulary, draw_inputs
from service.backbone.base import Backbone
from service.bank import fold_package
from service.loader import Pin
from service.pipelines.stages import StageRunner, frame_similarities, weighs_frames
from service.types import AdapterInfo, MatchInput, RankInput, RequestContext, VisionOutput

LOWEST_PROBABILITY = 1e-30  # below it float32 would soon give a logarithm of minus infinity

Outputs = dict[str, Tensor]


def inputs_for(config: AdapterConfig, backbone: Backbone) -> ProbeInputs:
    """Inputs for a new probe of an adapter of this backbone."""
    stacks = [stack for stack in (backbone.config.text_encoder, backbone.config.decoder) if stack is not None]
    ids = backbone.config.special_ids
    unspoken = [] if backbone.tokenizer is None else backbone.tokenizer.all_special_ids  # [UNK] and [MASK] too
    vocabulary = Vocabulary(
        size=min(stack.vocab_size for stack in stacks),
        cls=ids.cls,
        sep=ids.sep,
        dec=ids.bos,
        special=frozenset((*ids.model_dump().values(), *unspoken)),
        max_tokens=min(stack.max_positions for stack in stacks),
    )
    return draw_inputs(config, patch=backbone.config.vision.patch, vocabulary=vocabulary)


def check_inputs(inputs: ProbeInputs, config: AdapterConfig, backbone: Backbone) -> None:
    """Refuse inputs this backbone could not run: a bad token id would cost a CUDA device.

    Raises: InvalidPackage; MissingPart for retrieval on a backbone without projections.
    """
    patch, side = backbone.config.vision.patch, inputs.pixels.shape[-1]
    if side * patch != config.preprocessing.resolution:
        raise InvalidPackage(
            f"the probe's pixels have {side} squares a side; at resolution {config.preprocessing.resolution} this "
            f"backbone has {config.preprocessing.resolution // patch} patches",
            param="pixels",
        )
    if config.task == "retrieval" and backbone.config.embed_dim is None:
        raise MissingPart("this backbone has no projections, which retrieval needs")
    for name, ids, stack in (
        ("text_ids", inputs.text_ids, backbone.config.text_encoder),
        ("answer_ids", inputs.answer_ids, backbone.config.decoder),
    ):
        if ids is None or stack is None:
            continue
        if ids.shape[1] > stack.max_positions or int(ids.min()) < 0 or int(ids.max()) >= stack.vocab_size:
            raise InvalidPackage(
                f"the probe's {name} are not what this backbone reads: at most {stack.max_positions} ids below "
                f"{stack.vocab_size}",
                param=name,
            )


@asynccontextmanager
async def lodged(package: Package, stages: StageRunner) -> AsyncIterator[Pin]:
    """An adapter in the bank for as long as the block lasts, under a digest nobody can ask for; afterwards the host
    has it no more, and its slot is the next to be filled. Its tensors may be a variant of a package's.

    Raises: NonFiniteTensor when the serving dtype cannot hold it.
    """
    bank = stages.engine.bank
    digest = f"probe:{secrets.token_hex(16)}"  # no reference, and no digest of weights, has this form
    named = replace(package, weights_digest=digest)
    adapter = await asyncio.to_thread(fold_package, named, stages.backbone.dims(), bank.dtype)
    bank.put(adapter, hold=True)
    try:
        yield Pin(AdapterInfo("probe", None, digest), digest, package.config)
    finally:
        bank.release(digest)
        bank.unload(digest)


async def outputs_of(
    inputs: ProbeInputs, config: AdapterConfig, pin: Pin, stages: StageRunner, context: RequestContext
) -> Outputs:
    """What the pinned adapter gives: the outputs of the config's task, float32 on the host.

    `config` says how the inputs are prepared and whether frames are weighed, also where the pin is `__base__`.
    """
    seen = await stages.vision(inputs.frames(config.preprocessing), pin, context)
    given = _retrieved if config.task == "retrieval" else _ranked
    outputs = await given(inputs, config, seen, pin, stages, context)
    return {name: output.clone() for name, output in outputs.items()}


async def _retrieved(
    inputs: ProbeInputs,
    config: AdapterConfig,
    seen: VisionOutput,
    pin: Pin,
    stages: StageRunner,
    context: RequestContext,
) -> Outputs:
    texts = inputs.texts()
    vectors = [(await stages.text(ids, pin, context)).vector for ids in texts]
    similarities = [frame_similarities(seen.frames, vector) if weighs_frames(config) else None for vector in vectors]
    pairs = MatchInput(texts, (seen.states,) * len(texts), tuple(similarities))
    match = await stages.match(pairs, pin, context)
    assert seen.frames is not None, "retrieval was run without projections. This is a bug."
    return {"frames": seen.frames, "texts": torch.stack(vectors), "match": match.logits}


async def _ranked(
    inputs: ProbeInputs,
    config: AdapterConfig,
    seen: VisionOutput,
    pin: Pin,
    stages: StageRunner,
    context: RequestContext,
) -> Outputs:
    answers = inputs.answers()
    scores = torch.empty(len(inputs.text_ids), len(answers))
    probabilities = torch.empty_like(scores)
    for row, ids in enumerate(inputs.texts()):
        question = RankInput(ids, seen.states.flatten(0, 1), answers, len(answers))
        ranked = await stages.rank(question, pin, context)
        order = list(ranked.indices)
        scores[row, order] = torch.tensor(ranked.scores)
        probabilities[row, order] = torch.tensor(ranked.first_token_probs)
    return {"scores": scores, "first_words": probabilities.clamp_min(LOWEST_PROBABILITY).log()}
