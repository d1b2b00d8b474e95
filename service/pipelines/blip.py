"""The stages of a BLIP, as coroutines."""

from dataclasses import dataclass
from typing import cast

from torch import Tensor
from torch.nn import functional

from adapters.config import AdapterConfig, Preprocessing
from adapters.families.uniadapter import options_of
from service.backbone.blip_backbone import BlipBackbone
from service.backbone.cost import decode_cost, text_cost, tokens_per_frame, vision_cost
from service.loader import Pin
from service.pipelines.stages import Medium, StageRunner
from service.types import (
    GenerateInput,
    GenerateOutput,
    MatchInput,
    MatchOutput,
    RankInput,
    RankOutput,
    RequestContext,
    TextInput,
    TextOutput,
    VisionInput,
    VisionOutput,
)


def preprocessing_of(config: AdapterConfig | None, backbone: BlipBackbone) -> Preprocessing:
    """The adapter's preprocessing; for `__base__` the backbone's native resolution."""
    return config.pixels if config is not None else Preprocessing(resolution=backbone.resolution)


def frames_of(medium: Medium, preprocessing: Preprocessing) -> int:
    """How many frames of a medium are looked at."""
    return 1 if medium.kind == "image" else preprocessing.num_frames


def text_limit(config: AdapterConfig | None, backbone: BlipBackbone) -> int:
    """How many tokens a text may have: the adapter's limit within the backbone's positions."""
    wanted = config.max_text_tokens if config is not None else backbone.manifest.max_text_tokens
    stack = backbone.config.text_encoder
    return wanted if stack is None else min(wanted, stack.max_positions)


def weighs_frames(config: AdapterConfig | None) -> bool:
    """Whether the adapter weighs frames by their likeness to the text when a pair is matched."""
    return config is not None and config.family == "uniadapter" and options_of(config).frame_aware_attention


def frame_similarities(frames: Tensor | None, vector: Tensor) -> Tensor:
    """Cosines [F] of a text's unit vector [E] with the frames' features [F, E]."""
    assert frames is not None, "the pipeline required projections. This is a bug."
    return functional.normalize(frames, dim=-1) @ vector


@dataclass(frozen=True)
class Seen:
    """What the vision tower made of a medium. `times_s` [F] are the frames' times; a picture has one at 0."""

    output: VisionOutput
    times_s: tuple[float, ...]
    duration_s: float | None

    @property
    def num_bytes(self) -> int:
        """Bytes of states and frames."""
        return self.output.states.nbytes + (0 if self.output.frames is None else self.output.frames.nbytes)


class BlipStages(StageRunner[Seen]):
    """Runs the stages of one BLIP for requests."""

    backbone: BlipBackbone

    async def see(self, medium: Medium, pin: Pin, context: RequestContext) -> Seen:
        """What the vision tower makes of a medium with an adapter; kept, and shared by those who wait for it."""
        preprocessing = preprocessing_of(pin.config, self.backbone)

        async def look(context: RequestContext) -> Seen:
            pixels, times_s, duration_s = await self.decoder.pixels(medium, preprocessing, context)
            output = await self.vision(pixels, pin, context)
            frames = None if output.frames is None else output.frames.clone()  # they were part of the batch's
            return Seen(VisionOutput(output.states, frames), times_s, duration_s)

        return await self._states(medium, pin, look, context)

    def made_by(self, pin: Pin) -> tuple[str, ...]:
        """See StageRunner."""
        return pin.digest, preprocessing_of(pin.config, self.backbone).model_dump_json()

    def cost_of_seeing(self, medium: Medium, pin: Pin) -> float:
        """Estimated operations of looking at a medium; none where its states were kept."""
        if medium.kept is not None:
            return 0.0
        preprocessing = preprocessing_of(pin.config, self.backbone)
        return vision_cost(self.backbone.config, preprocessing.resolution, frames_of(medium, preprocessing))

    async def vision(self, pixels: Tensor, pin: Pin, context: RequestContext) -> VisionOutput:
        """pixels [F, 3, R, R] -> states [F, P, D] and frame features."""
        num_frames, resolution = pixels.shape[0], pixels.shape[-1]
        cost = vision_cost(self.backbone.config, resolution, num_frames)
        tokens = num_frames * tokens_per_frame(self.backbone.config, resolution)
        output = await self.run("vision", VisionInput(pixels), (resolution,), num_frames, tokens, cost, pin, context)
        return cast(VisionOutput, output)

    async def text(self, ids: tuple[int, ...], pin: Pin, context: RequestContext) -> TextOutput:
        """One text's unit feature."""
        stack = self.backbone.config.text_encoder
        assert stack is not None, "the pipeline required a text encoder. This is a bug."
        cost = text_cost(stack, 1, len(ids))
        return cast(TextOutput, await self.run("text", TextInput(ids), (), 1, len(ids), cost, pin, context))

    async def match(self, pairs: MatchInput, pin: Pin, context: RequestContext) -> MatchOutput:
        """Matching logits of pairs."""
        cost = match_cost(self.backbone, pairs)
        tokens = sum(states.shape[0] * states.shape[1] for states in pairs.states)
        return cast(MatchOutput, await self.run("match", pairs, (), len(pairs.ids), tokens, cost, pin, context))

    async def generate(self, question: GenerateInput, pin: Pin, context: RequestContext) -> GenerateOutput:
        """Answers by beam search."""
        length, memory = len(question.question_ids), len(question.states)
        rows = question.num_beams
        cost = question_cost(self.backbone, length, memory) + self._decode_cost(rows, question.max_length, length)
        shape = (question.num_beams, question.max_length)
        output = await self.run("generate", question, shape, rows, memory + length, cost, pin, context)
        return cast(GenerateOutput, output)

    async def rank(self, question: RankInput, pin: Pin, context: RequestContext) -> RankOutput:
        """The best of given answers."""
        length, memory = len(question.question_ids), len(question.states)
        rows = min(question.k, len(question.candidates))
        longest = max(len(candidate) for candidate in question.candidates)
        cost = question_cost(self.backbone, length, memory) + self._decode_cost(rows, longest, length)
        tokens = memory + length + rows * longest
        return cast(RankOutput, await self.run("rank", question, (), rows, tokens, cost, pin, context))

    def _decode_cost(self, rows: int, steps: int, question_length: int) -> float:
        stack = self.backbone.config.decoder
        assert stack is not None, "the pipeline required a decoder. This is a bug."
        return decode_cost(stack, rows, steps, question_length)


def match_cost(backbone: BlipBackbone, pairs: MatchInput) -> float:
    """Estimated operations of matching pairs."""
    longest = max(len(ids) for ids in pairs.ids)
    memory = max(states.shape[0] * states.shape[1] for states in pairs.states)
    stack = backbone.config.text_encoder
    assert stack is not None, "the pipeline required a text encoder. This is a bug."
    return text_cost(stack, len(pairs.ids), longest, memory)


def question_cost(backbone: BlipBackbone, length: int, memory: int) -> float:
    """Estimated operations of a question looking at a memory."""
    stack = backbone.config.text_encoder
    assert stack is not None, "the pipeline required a text encoder. This is a bug."
    return text_cost(stack, 1, length, memory)
