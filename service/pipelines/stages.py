"""What the stages of all backbones share: jobs handed to the engine and awaited, deadlines, media, texts within their limits.

`blip` and `opt` have the stages of each kind; `StageSet` finds those an adapter needs.
"""

import asyncio
import hashlib
import itertools
import re
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from adapters.config import Preprocessing
from service.backbone.base import Backbone, TokenizedText
from service.backbones import HostedBackbone
from service.bank import AdapterBank
from service.engine import Engine
from service.errors import BadQuery, DeadlineExceeded
from service.loader import Pin
from service.media import MediaWorkers
from service.media import Preprocessing as PixelPreprocessing
from service.metrics import Metrics
from service.types import Job, MediaKind, RequestContext, Stage, StageInput, StageOutput

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


@dataclass(frozen=True)
class EncodedQuery:
    """A text within its limit, and warnings about words the vocabulary does not know."""

    ids: tuple[int, ...]
    warnings: tuple[str, ...]


def tokenize_within(backbone: Backbone, text: str, limit: int, *, param: str) -> EncodedQuery:
    """Tokens of a text. Raises: BadQuery for an empty text and for one over the limit, with both counts."""
    return within_limit(text, limit, lambda: backbone.tokenize(text), param=param)


def within_limit(text: str, limit: int, tokenize: Callable[[], TokenizedText], *, param: str) -> EncodedQuery:
    """What `tokenize` makes of a text. Raises: BadQuery, see `tokenize_within`."""
    if not text.strip():
        raise BadQuery(f"{param} is empty", param=param)
    if len(text) > MAX_TEXT_CHARS:
        num_words = len(re.findall(r"\S+", text))
        raise BadQuery(f"{param} has {num_words} words; at most {limit} tokens are allowed", param=param)
    tokens = tokenize()
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


class Sized(Protocol):
    """What takes memory."""

    @property
    def num_bytes(self) -> int:
        """How much."""


S = TypeVar("S", bound=Sized)


class FeatureCache(Generic[S]):
    """What an encoder made of media; the least recently used make room. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[str, S] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: str) -> S | None:
        """What is kept under a key."""
        with self._lock:
            seen = self._entries.get(key)
            if seen is not None:
                self._entries.move_to_end(key)
            return seen

    def put(self, key: str, seen: S) -> None:
        """Keep something, unless they alone are over the budget."""
        with self._lock:
            if key in self._entries or seen.num_bytes > self.max_bytes:
                return
            self._entries[key] = seen
            self._bytes += seen.num_bytes
            while self._bytes > self.max_bytes:
                _, dropped = self._entries.popitem(last=False)
                self._bytes -= dropped.num_bytes


def cache_key(*parts: str) -> str:
    """A key for a `FeatureCache`."""
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


class Decoder:
    """Hands media to the workers. One for all backbones of a service."""

    def __init__(self, media: MediaWorkers, metrics: Metrics) -> None:
        self.media = media
        self._metrics = metrics
        # Who was admitted waits for a worker and is not refused: one `match` may look at hundreds of media.
        self._decoding = asyncio.Semaphore(MAX_DECODING)

    @asynccontextmanager
    async def turn(self, context: RequestContext) -> AsyncIterator[MediaWorkers]:
        """The workers, for one medium, when it is its turn."""
        with self._metrics.stage("decode", context):
            async with self._decoding:
                yield self.media

    async def pixels(
        self, medium: Medium, preprocessing: Preprocessing, context: RequestContext
    ) -> tuple[Tensor, tuple[float, ...], float | None]:
        """Frames [F, 3, R, R] of a picture or clip, their times, and the clip's length, in seconds."""
        prep = PixelPreprocessing(preprocessing.resolution, preprocessing.mean, preprocessing.std)
        async with self.turn(context) as media:
            if medium.kind == "image":
                picture = await media.image(medium.source, prep)
                return torch.from_numpy(picture)[None], (0.0,), None
            clip = await media.video(medium.source, prep, preprocessing.num_frames)
            return torch.from_numpy(clip.frames), clip.times_s, clip.duration_s


class StageRunner(Generic[S]):
    """Runs jobs of one backbone for requests, and keeps what it made of media. `StageSet` makes one for each backbone."""

    def __init__(
        self,
        engine: Engine,
        hosted: HostedBackbone,
        decoder: Decoder,
        metrics: Metrics,
        *,
        feature_cache_bytes: int,
    ) -> None:
        self.engine = engine
        self.hosted = hosted
        self.backbone: Backbone = hosted.backbone
        self.decoder = decoder
        self.metrics = metrics
        self._features: FeatureCache[S] = FeatureCache(feature_cache_bytes)

    @property
    def bank(self) -> AdapterBank:
        """Where the backbone's adapters are."""
        return self.hosted.bank

    async def run(
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
        """A job's output."""
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
            backbone=self.hosted.name,
            request_id=context.request_id,
        )
        with self.metrics.stage(stage, context):
            return await asyncio.wrap_future(self.engine.submit(job))


async def gather_or_cancel(jobs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order; when one fails, the others are cancelled and awaited before its error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job) for job in jobs]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    return [task.result() for task in tasks]
