"""Stages as coroutines: each builds a job from data, submits it to the engine and awaits its output.

Also what every pipeline shares: deadlines, media, questions within their limits, and the cache of vision states.
"""

import asyncio
import hashlib
import itertools
import re
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional

from adapters.config import AdapterConfig, Preprocessing
from adapters.families.uniadapter import options_of
from service.backbone.base import Backbone
from service.backbone.cost import decode_cost, text_cost, tokens_per_frame, vision_cost
from service.engine import Engine
from service.errors import BadQuery, DeadlineExceeded
from service.loader import Pin
from service.media import MediaWorkers
from service.media import Preprocessing as PixelPreprocessing
from service.metrics import Metrics
from service.types import (
    GenerateInput,
    GenerateOutput,
    Job,
    MatchInput,
    MatchOutput,
    MediaKind,
    RankInput,
    RankOutput,
    RequestContext,
    Stage,
    StageInput,
    StageOutput,
    TextInput,
    TextOutput,
    VisionInput,
    VisionOutput,
)

T = TypeVar("T")

MAX_DECODING = 128  # media of admitted requests that the workers know of at once; below what they refuse
MAX_TEXT_CHARS = 20_000  # above this a text is counted in words, not tokenised
_lone_shapes = itertools.count()


@asynccontextmanager
async def within_deadline(context: RequestContext) -> AsyncIterator[None]:
    """Cancel the block at the request's deadline. Raises: DeadlineExceeded."""
    try:
        async with asyncio.timeout(max(0.0, context.deadline - time.monotonic())):
            yield
    except TimeoutError as error:
        raise DeadlineExceeded("the deadline passed before the answer was ready") from error


def preprocessing_of(config: AdapterConfig | None, backbone: Backbone) -> Preprocessing:
    """The adapter's preprocessing; for `__base__` the backbone's native resolution."""
    return config.preprocessing if config is not None else Preprocessing(resolution=backbone.manifest.resolution)


def text_limit(config: AdapterConfig | None, backbone: Backbone) -> int:
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
class EncodedQuery:
    """A text within its limit, and warnings about words the vocabulary does not know."""

    ids: tuple[int, ...]
    warnings: tuple[str, ...]


def tokenize_within(backbone: Backbone, text: str, limit: int, *, param: str) -> EncodedQuery:
    """Tokens of a text. Raises: BadQuery for an empty text and for one over the limit, with both counts."""
    if not text.strip():
        raise BadQuery(f"{param} is empty", param=param)
    if len(text) > MAX_TEXT_CHARS:
        num_words = len(re.findall(r"\S+", text))
        raise BadQuery(f"{param} has {num_words} words; at most {limit} tokens are allowed", param=param)
    tokens = backbone.tokenize(text)
    if len(tokens.ids) > limit:
        raise BadQuery(f"{param} has {len(tokens.ids)} tokens; at most {limit} are allowed", param=param)
    warnings = (f"unknown words: {', '.join(tokens.unknown)}",) if tokens.unknown else ()
    return EncodedQuery(tokens.ids, warnings)


@dataclass(frozen=True)
class Medium:
    """A picture or clip to look at. `digest` is given where the bytes' identity is known, and lets states be cached."""

    kind: MediaKind
    source: bytes | Path
    digest: str | None = None


@dataclass(frozen=True)
class Seen:
    """What the vision tower made of a medium. `times_s` [F] are the frames' times; a picture has one at 0."""

    output: VisionOutput
    times_s: tuple[float, ...]
    duration_s: float | None

    @property
    def num_bytes(self) -> int:
        """Bytes of the states."""
        return self.output.states.numel() * self.output.states.element_size()


class FeatureCache:
    """Vision states by medium, adapter and preprocessing; the least recently used make room. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[str, Seen] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: str) -> Seen | None:
        """What is kept under a key."""
        with self._lock:
            seen = self._entries.get(key)
            if seen is not None:
                self._entries.move_to_end(key)
            return seen

    def put(self, key: str, seen: Seen) -> None:
        """Keep states, unless they alone are over the budget."""
        with self._lock:
            if key in self._entries or seen.num_bytes > self.max_bytes:
                return
            self._entries[key] = seen
            self._bytes += seen.num_bytes
            while self._bytes > self.max_bytes:
                _, dropped = self._entries.popitem(last=False)
                self._bytes -= dropped.num_bytes


class StageRunner:
    """Runs stages for requests. One for all pipelines of a service."""

    def __init__(
        self, engine: Engine, backbone: Backbone, media: MediaWorkers, metrics: Metrics, *, feature_cache_bytes: int
    ) -> None:
        self.engine = engine
        self.backbone = backbone
        self.media = media
        self.metrics = metrics
        self._features = FeatureCache(feature_cache_bytes)
        # Who was admitted waits for a worker and is not refused: one `match` may look at hundreds of media.
        self._decoding = asyncio.Semaphore(MAX_DECODING)

    async def see(self, medium: Medium, pin: Pin, context: RequestContext) -> Seen:
        """Decode a medium and run the vision tower over it."""
        preprocessing = preprocessing_of(pin.config, self.backbone)
        key = self._feature_key(medium, pin, preprocessing)
        cached = self._features.get(key) if key is not None else None
        if cached is not None:
            return cached
        pixels, times_s, duration_s = await self._decode(medium, preprocessing, context)
        seen = Seen(await self.vision(pixels, pin, context), times_s, duration_s)
        if key is not None:
            self._features.put(key, seen)
        return seen

    def _feature_key(self, medium: Medium, pin: Pin, preprocessing: Preprocessing) -> str | None:
        if medium.digest is None:
            return None
        text = "|".join((medium.kind, medium.digest, pin.digest, preprocessing.model_dump_json()))
        return hashlib.sha256(text.encode()).hexdigest()

    async def _decode(
        self, medium: Medium, preprocessing: Preprocessing, context: RequestContext
    ) -> tuple[Tensor, tuple[float, ...], float | None]:
        prep = PixelPreprocessing(preprocessing.resolution, preprocessing.mean, preprocessing.std)
        with self.metrics.stage("decode", context):
            async with self._decoding:
                return await self._decoded(medium, prep, preprocessing.num_frames)

    async def _decoded(
        self, medium: Medium, prep: PixelPreprocessing, num_frames: int
    ) -> tuple[Tensor, tuple[float, ...], float | None]:
        if medium.kind == "image":
            picture = await self.media.image(medium.source, prep)
            return torch.from_numpy(picture)[None], (0.0,), None
        clip = await self.media.video(medium.source, prep, num_frames)
        return torch.from_numpy(clip.frames), clip.times_s, clip.duration_s

    async def vision(self, pixels: Tensor, pin: Pin, context: RequestContext) -> VisionOutput:
        """pixels [F, 3, R, R] -> states [F, P, D] and frame features."""
        num_frames, resolution = pixels.shape[0], pixels.shape[-1]
        cost = vision_cost(self.backbone.config, resolution, num_frames)
        tokens = num_frames * tokens_per_frame(self.backbone.config, resolution)
        output = await self._run("vision", VisionInput(pixels), (resolution,), num_frames, tokens, cost, pin, context)
        return cast(VisionOutput, output)

    async def text(self, ids: tuple[int, ...], pin: Pin, context: RequestContext) -> TextOutput:
        """One text's unit feature."""
        stack = self.backbone.config.text_encoder
        assert stack is not None, "the pipeline required a text encoder. This is a bug."
        cost = text_cost(stack, 1, len(ids))
        return cast(TextOutput, await self._run("text", TextInput(ids), (), 1, len(ids), cost, pin, context))

    async def match(self, pairs: MatchInput, pin: Pin, context: RequestContext) -> MatchOutput:
        """Matching logits of pairs."""
        cost = match_cost(self.backbone, pairs)
        tokens = sum(states.shape[0] * states.shape[1] for states in pairs.states)
        return cast(MatchOutput, await self._run("match", pairs, (), len(pairs.ids), tokens, cost, pin, context))

    async def generate(self, question: GenerateInput, pin: Pin, context: RequestContext) -> GenerateOutput:
        """Answers by beam search."""
        length, memory = len(question.question_ids), len(question.states)
        rows = question.num_beams
        cost = question_cost(self.backbone, length, memory) + self._decode_cost(rows, question.max_length, length)
        shape = (question.num_beams, question.max_length)
        output = await self._run("generate", question, shape, rows, memory + length, cost, pin, context)
        return cast(GenerateOutput, output)

    async def rank(self, question: RankInput, pin: Pin, context: RequestContext) -> RankOutput:
        """The best of given answers."""
        length, memory = len(question.question_ids), len(question.states)
        rows = min(question.k, len(question.candidates))
        longest = max(len(candidate) for candidate in question.candidates)
        cost = question_cost(self.backbone, length, memory) + self._decode_cost(rows, longest, length)
        tokens = memory + length + rows * longest
        return cast(RankOutput, await self._run("rank", question, (), rows, tokens, cost, pin, context))

    def _decode_cost(self, rows: int, steps: int, question_length: int) -> float:
        stack = self.backbone.config.decoder
        assert stack is not None, "the pipeline required a decoder. This is a bug."
        return decode_cost(stack, rows, steps, question_length)

    async def _run(
        self,
        stage: Stage,
        inputs: StageInput,
        shape: tuple[int, ...],
        rows: int,
        tokens: int,
        cost: float,
        pin: Pin,
        context: RequestContext,
    ) -> StageOutput:
        job = Job(
            stage=stage,
            adapter=pin.digest,
            inputs=inputs,
            shape=(*shape, next(_lone_shapes)) if context.alone else shape,
            rows=rows,
            tokens=tokens,
            cost=cost,
            deadline=context.deadline,
            client=context.client,
            background=context.background,
            request_id=context.request_id,
        )
        with self.metrics.stage(stage, context):
            return await asyncio.wrap_future(self.engine.submit(job))


def match_cost(backbone: Backbone, pairs: MatchInput) -> float:
    """Estimated operations of matching pairs."""
    longest = max(len(ids) for ids in pairs.ids)
    memory = max(states.shape[0] * states.shape[1] for states in pairs.states)
    stack = backbone.config.text_encoder
    assert stack is not None, "the pipeline required a text encoder. This is a bug."
    return text_cost(stack, len(pairs.ids), longest, memory)


def question_cost(backbone: Backbone, length: int, memory: int) -> float:
    """Estimated operations of a question looking at a memory."""
    stack = backbone.config.text_encoder
    assert stack is not None, "the pipeline required a text encoder. This is a bug."
    return text_cost(stack, 1, length, memory)


async def gather_or_cancel(jobs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order; when one fails, the others are cancelled and awaited before its error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job) for job in jobs]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    return [task.result() for task in tasks]
