"""What the stages of all backbones share: jobs handed to the engine and awaited, deadlines, media, texts within their limits.

`blip` and `opt` have the stages of each kind; `StageSet` finds those an adapter needs.
"""

import asyncio
import itertools
import re
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from adapters.config import Preprocessing
from service.backbone.base import Backbone, TokenizedText
from service.backbones import HostedBackbone
from service.bank import AdapterBank
from service.engine import Engine
from service.errors import BadQuery, DeadlineExceeded
from service.loader import Pin
from service.media import MediaWorkers, media_digest
from service.media import Preprocessing as PixelPreprocessing
from service.metrics import Metrics
from service.pipelines.features import Features, Make, S, Sized, cache_key
from service.types import Job, MediaBytes, MediaKind, RequestContext, Stage, StageInput, StageOutput

T = TypeVar("T")

MAX_DECODING = 128  # media of admitted requests that the workers know of at once; below what they refuse
MAX_TEXT_CHARS = 20_000  # above this a text is counted in words, not tokenised
HASHED_BY_THREADS_BYTES = 256 * 1024  # hashing so much takes 0.15 to 0.6 ms, three times as long as asking a thread to
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
class Kept:
    """States that were kept of a medium, and under which key."""

    key: str
    states: Sized


@dataclass(frozen=True)
class Medium:
    """A picture, clip or sound to look at. `digest` is given where states of these bytes may be kept and shared.

    `kept` is filled by `StageRunner.recall`.
    """

    kind: MediaKind
    source: bytes | Path
    digest: str | None = None
    kept: Kept | None = field(default=None, repr=False, compare=False)


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


class StageRunner(ABC, Generic[S]):
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
        self._features: Features[S] = Features(feature_cache_bytes, metrics, hosted.name)

    @property
    def bank(self) -> AdapterBank:
        """Where the backbone's adapters are."""
        return self.hosted.bank

    # --- states of media ---------------------------------------------------------------------------------

    async def uploaded(self, media: MediaBytes) -> Medium:
        """An upload to look at, with its digest where states are kept."""
        if not self._features.is_on:
            return Medium(media.kind, media.data)
        is_short = len(media.data) < HASHED_BY_THREADS_BYTES
        digest = media_digest(media.data) if is_short else await asyncio.to_thread(media_digest, media.data)
        return Medium(media.kind, media.data, digest)

    def recall(self, medium: Medium, pin: Pin, context: RequestContext) -> Medium:
        """The medium with what is kept of it, if anything: looking at it then costs nothing, whatever makes room meanwhile."""
        key = self._key(medium, pin, context)
        states = None if key is None else self._features.kept(key)
        return medium if key is None or states is None else replace(medium, kept=Kept(key, states))

    async def _states(self, medium: Medium, pin: Pin, make: Make[S], context: RequestContext) -> S:
        """What is kept of a medium, or what others wait for already; else what `make` makes of it.

        Raises: DeadlineExceeded, what `make` raises.
        """
        key = self._key(medium, pin, context)
        if key is None:
            return await make(context)
        if medium.kept is not None and medium.kept.key == key:
            self._features.count("hit")
            return cast(S, medium.kept.states)  # of this backbone's, by the key
        async with within_deadline(context):
            return await self._features.get(key, make, context)

    def _key(self, medium: Medium, pin: Pin, context: RequestContext) -> str | None:
        """The key of a medium's states; None where none are kept: a request that is alone is alone in this, too.

        A file's states serve requests for that file. What was put in its place since its digest was checked can give
        nobody else's upload a wrong answer.
        """
        made_by = self.made_by(pin)
        if medium.digest is None or made_by is None or context.alone or not self._features.is_on:
            return None
        origin = "upload" if isinstance(medium.source, bytes) else str(medium.source)
        return cache_key(origin, medium.kind, medium.digest, *made_by)

    @abstractmethod
    def made_by(self, pin: Pin) -> tuple[str, ...] | None:
        """What decides a medium's states besides its bytes: preprocessing and weights; None where nothing looks at it."""

    # --- jobs --------------------------------------------------------------------------------------------

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
