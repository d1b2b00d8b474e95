"""A service without HTTP in front, and jobs of a BLIP for its engine, submitted as its pipelines do, with nothing to decode.

text     a text of 35 tokens becomes a vector
decode   a question of 16 tokens about given states is answered in 4 words, greedily; the states are as many as those of a
         picture of 96 pixels, few enough for the decoder's work to count
"""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Literal, get_args

import torch

from loadtest.bench.worlds import MAX_TEXT_TOKENS
from service.auth import LOCAL
from service.config import Settings
from service.loader import Pin
from service.pipelines.blip import BlipStages
from service.runtime import Runtime
from service.types import GenerateInput, RequestContext

JobKind = Literal["text", "decode"]
JOB_KINDS: tuple[JobKind, ...] = get_args(JobKind)

QUESTION_TOKENS, ANSWER_TOKENS, NUM_STATES = 16, 5, 37  # an answer's first token is given
FIRST_WORD = 5
TIMEOUT_S = 3600.0  # nothing is late here, only slow


class Jobs:
    """Jobs of one kind for any adapter of a service."""

    def __init__(self, runtime: Runtime, kind: JobKind) -> None:
        stages = runtime.stages.on("")
        assert isinstance(stages, BlipStages), "the benchmark's own backbone is a BLIP. This is a bug."
        config, model = stages.backbone.config, stages.backbone.model
        generator = torch.Generator().manual_seed(4)
        words = torch.randint(FIRST_WORD, FIRST_WORD + 100, (MAX_TEXT_TOKENS - 2,), generator=generator).tolist()
        self.kind = kind
        self._loader = runtime.loader
        self._stages = stages
        self._ids = (config.special_ids.cls, *words, config.special_ids.sep)
        states = torch.randn(NUM_STATES, config.vision.width, generator=generator).to(model.device, model.dtype)
        self._question = GenerateInput(self._ids[-QUESTION_TOKENS:], states, 1, ANSWER_TOKENS)

    async def ask(self, name: str) -> None:
        """One job for an adapter, which is brought to the host first if need be."""
        async with self._loader.pin(name, LOCAL) as pin:
            await self.run(pin)

    async def run(self, pin: Pin) -> None:
        """One job for an adapter that was looked up."""
        context = RequestContext(deadline=time.monotonic() + TIMEOUT_S, client="bench")
        if self.kind == "text":
            await self._stages.text(self._ids, pin, context)
        else:
            await self._stages.generate(self._question, pin, context)

    async def warm(self, names: Sequence[str]) -> None:
        """One job for each adapter, one after the other."""
        for name in names:
            await self.ask(name)


@asynccontextmanager
async def started(settings: Settings) -> AsyncIterator[Runtime]:
    """A service without HTTP in front, while the block lasts."""
    runtime = Runtime(settings)
    try:
        await runtime.start()
        yield runtime
    finally:
        await runtime.close()
