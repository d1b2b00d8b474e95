"""What an adapter gives for a probe's inputs, computed by the engine that serves: the same way for writing and for checking.

Every job is background work and runs alone in its batch. So it never takes longer than a small request would, one slot
is enough, and two runs of equal weights are equal launches: their numbers agree to the bit, or very nearly.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import torch
from torch import Tensor

from adapters.config import AdapterConfig, AudioPreprocessing
from adapters.errors import InvalidPackage, MissingPart
from adapters.families.epalm import options_of
from adapters.package import Package
from adapters.probe import ProbeInputs, Vocabulary, draw_inputs
from service.backbone.base import Backbone
from service.backbone.blip_backbone import BlipBackbone
from service.backbone.config import TextConfig
from service.backbone.opt_backbone import OptBackbone
from service.loader import Pin
from service.pipelines.blip import BlipStages, frame_similarities, weighs_frames
from service.pipelines.opt import OptStages
from service.pipelines.stage_set import AnyStages
from service.types import AdapterInfo, ChooseInput, MatchInput, RankInput, RankOutput, RequestContext, VisionOutput

LOWEST_PROBABILITY = 1e-30  # below it float32 would soon give a logarithm of minus infinity

Outputs = dict[str, Tensor]


def inputs_for(config: AdapterConfig, backbone: Backbone) -> ProbeInputs:
    """Inputs for a new probe of an adapter of this backbone."""
    unspoken = [] if backbone.tokenizer is None else backbone.tokenizer.all_special_ids  # [UNK] and [MASK] too
    special = frozenset((*backbone.special_tokens(), *unspoken))
    if isinstance(backbone, OptBackbone):
        options, opt_ids, words = options_of(config), backbone.config.special_ids, backbone.config.language_model
        end = opt_ids.eos if options.answer_token_id is None else options.answer_token_id
        vocabulary = Vocabulary(
            size=words.vocab_size,
            text=(opt_ids.bos, end),
            answer=(opt_ids.bos, opt_ids.eos),
            special=special | {end},
            max_tokens=words.max_positions // 2,
        )
        return draw_inputs(config, patch=backbone.config.encoders[options.encoder].patch, vocabulary=vocabulary)
    assert isinstance(backbone, BlipBackbone), "there are two kinds of backbones. This is a bug."
    stacks = [stack for stack in (backbone.config.text_encoder, backbone.config.decoder) if stack is not None]
    ids = backbone.config.special_ids
    vocabulary = Vocabulary(
        size=min(stack.vocab_size for stack in stacks),
        text=(ids.cls, ids.sep),
        answer=(ids.bos, ids.sep),
        special=special,
        max_tokens=min(stack.max_positions for stack in stacks),
    )
    return draw_inputs(config, patch=backbone.config.vision.patch, vocabulary=vocabulary)


def check_inputs(inputs: ProbeInputs, config: AdapterConfig, backbone: Backbone) -> None:
    """Refuse inputs this backbone could not run: a bad token id would cost a CUDA device.

    Raises: InvalidPackage; MissingPart for retrieval on a backbone without projections.
    """
    if isinstance(backbone, OptBackbone):
        words = backbone.config.language_model
        room = words.max_positions - (inputs.text_ids.shape[1] if inputs.answer_ids is not None else 0)
        limits = [
            ("text_ids", inputs.text_ids, words.max_positions, words.vocab_size),
            ("answer_ids", inputs.answer_ids, room, words.vocab_size),
        ]
        patch = backbone.config.encoders[options_of(config).encoder].patch
    else:
        assert isinstance(backbone, BlipBackbone), "there are two kinds of backbones. This is a bug."
        stacks: list[tuple[str, Tensor | None, TextConfig | None]] = [
            ("text_ids", inputs.text_ids, backbone.config.text_encoder)
        ]
        stacks += [("answer_ids", inputs.answer_ids, backbone.config.decoder)]
        limits = [(name, ids, s.max_positions, s.vocab_size) for name, ids, s in stacks if s is not None]
        patch = backbone.config.vision.patch
        if config.task == "retrieval" and backbone.config.embed_dim is None:
            raise MissingPart("this backbone has no projections, which retrieval needs")
    if not isinstance(config.preprocessing, AudioPreprocessing):
        side, resolution = inputs.medium.shape[-1], config.pixels.resolution
        if side * patch != resolution:
            raise InvalidPackage(
                f"the probe's pixels have {side} squares a side; at resolution {resolution} this backbone has "
                f"{resolution // patch} patches",
                param="pixels",
            )
    for name, ids, max_positions, vocab_size in limits:
        if ids is not None and (ids.shape[1] > max_positions or int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
            raise InvalidPackage(
                f"the probe's {name} are not what this backbone reads: at most {max_positions} ids below {vocab_size}",
                param=name,
            )


@asynccontextmanager
async def lodged(package: Package, stages: AnyStages) -> AsyncIterator[Pin]:
    """An adapter in the bank for as long as the block lasts, under a digest nobody can ask for; afterwards the host
    has it no more, and its slot is the next to be filled. Its tensors may be a variant of a package's.

    Raises: NonFiniteTensor when the serving dtype cannot hold it.
    """
    bank = stages.bank
    digest = f"probe:{secrets.token_hex(16)}"  # no reference, and no digest of weights, has this form
    named = replace(package, weights_digest=digest)
    adapter = await asyncio.to_thread(bank.fold, named)
    bank.put(adapter, hold=True)
    try:
        yield Pin(AdapterInfo("probe", None, digest), digest, package.config, stages.hosted.name)
    finally:
        bank.release(digest)
        bank.unload(digest)


async def outputs_of(
    inputs: ProbeInputs, config: AdapterConfig, pin: Pin, stages: AnyStages, context: RequestContext
) -> Outputs:
    """What the pinned adapter gives: the outputs of the config's task, float32 on the host.

    `config` says how the inputs are prepared and whether frames are weighed, also where the pin is `__base__`.
    """
    if isinstance(stages, OptStages):
        outputs = await _chosen(inputs, config, pin, stages, context)
    else:
        seen = await stages.vision(inputs.frames(config.pixels), pin, context)
        given = _retrieved if config.task == "retrieval" else _ranked
        outputs = await given(inputs, config, seen, pin, stages, context)
    return {name: output.clone() for name, output in outputs.items()}


async def _chosen(
    inputs: ProbeInputs, config: AdapterConfig, pin: Pin, stages: OptStages, context: RequestContext
) -> Outputs:
    preprocessing = config.preprocessing
    if isinstance(preprocessing, AudioPreprocessing):
        values = inputs.spectrogram(preprocessing)
    else:
        frames = inputs.frames(preprocessing)
        values = frames[0] if options_of(config).encoder == "vit" else frames
    states = await stages.encode(options_of(config).encoder, values, context)
    answers = inputs.answers()

    async def rank(ids: tuple[int, ...]) -> RankOutput:
        return await stages.rank(ChooseInput(ids, states, answers, len(answers)), pin, context)

    return _table(inputs, [await rank(ids) for ids in inputs.texts()])


async def _retrieved(
    inputs: ProbeInputs,
    config: AdapterConfig,
    seen: VisionOutput,
    pin: Pin,
    stages: BlipStages,
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
    stages: BlipStages,
    context: RequestContext,
) -> Outputs:
    answers = inputs.answers()
    states = seen.states.flatten(0, 1)
    ranked = [await stages.rank(RankInput(ids, states, answers, len(answers)), pin, context) for ids in inputs.texts()]
    return _table(inputs, ranked)


def _table(inputs: ProbeInputs, ranked: Sequence[RankOutput]) -> Outputs:
    """Scores and first words' log-probabilities by text and answer."""
    scores = torch.empty(len(inputs.text_ids), len(inputs.answers()))
    probabilities = torch.empty_like(scores)
    for row, one in enumerate(ranked):
        order = list(one.indices)
        scores[row, order] = torch.tensor(one.scores)
        probabilities[row, order] = torch.tensor(one.first_token_probs)
    return {"scores": scores, "first_words": probabilities.clamp_min(LOWEST_PROBABILITY).log()}
