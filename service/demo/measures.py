"""What is measured of one contender on one task: answers, captions or hits, from the pipelines that serve requests."""

import asyncio
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from adapters.config import BASE_ADAPTER
from service.backbone.opt_backbone import OptBackbone
from service.demo.cider import cider
from service.demo.world import Item, Task
from service.gallery.sources import read_sources
from service.pipelines.answering import OptAnswering, answering
from service.pipelines.galleries import BuildOptions
from service.pipelines.opt import OptStages
from service.runtime import Runtime
from service.types import (
    CaptionQuery,
    ContinueInput,
    GenerateDecode,
    MediaBytes,
    RankDecode,
    RequestContext,
    RetrieveQuery,
    TextQuery,
    VqaQuery,
)

T = TypeVar("T")
Results = dict[str, Any]

RERANK_DEPTH = 64
CONCURRENCY = 8
REQUEST_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Trial:
    """A contender, loaded, and an evaluation set with its files."""

    runtime: Runtime
    reference: str
    task: Task
    items: Sequence[Item]
    media: Sequence[Path]
    perceives: bool = True

    @property
    def swapped(self) -> list[Path]:
        """The media moved on by one item, as a control."""
        return [*self.media[1:], self.media[0]]


def _context() -> RequestContext:
    return RequestContext(deadline=time.monotonic() + REQUEST_TIMEOUT_S, client="evaluation")


async def _limited(jobs: Sequence[Awaitable[T]]) -> list[T]:
    """Results in order, a few at a time."""
    gate = asyncio.Semaphore(CONCURRENCY)

    async def run(job: Awaitable[T]) -> T:
        async with gate:
            return await job

    return await asyncio.gather(*(run(job) for job in jobs))


async def _told(trial: Trial, media: Sequence[Path]) -> list[str]:
    """The answer, or the caption, for each item. UniAdapters rank the task's answers; language models write."""
    if not trial.perceives:
        return await _limited([_told_unseeing(trial, item) for item in trial.items])
    writes = isinstance(trial.runtime.backbone, OptBackbone)
    answers = trial.task.answers
    decode = GenerateDecode() if writes else RankDecode(answers, len(answers))

    async def one(item: Item, data: bytes) -> str:
        source = MediaBytes(trial.task.kind, data)
        if trial.task.goal == "caption":
            asked = CaptionQuery(trial.reference, source, GenerateDecode())
            return (await trial.runtime.vqa.caption(asked, _context())).answer
        query = VqaQuery(trial.reference, item.questions[0].question, source, decode)
        return (await trial.runtime.vqa.answer(query, _context())).answer

    return await _limited([one(item, path.read_bytes()) for item, path in zip(trial.items, media, strict=True)])


async def _told_unseeing(trial: Trial, item: Item) -> str:
    """How the language model alone goes on with the text that the adapter would have been given."""
    runtime, context = trial.runtime, _context()
    pinned = [runtime.loader.pin(reference, context.principal) for reference in (trial.reference, BASE_ADAPTER)]
    async with pinned[0] as pin, pinned[1] as base:
        way, stages = answering(runtime.stages.of(pin)), runtime.stages.of(base)
        assert isinstance(way, OptAnswering) and isinstance(stages, OptStages), (
            "only these perceive apart. This is a bug."
        )
        text = way.caption(pin) if trial.task.goal == "caption" else way.question(item.questions[0].question, pin)
        search = way.search(GenerateDecode(), text, pin)
        asked = ContinueInput(text.ids, None, search.num_beams, search.max_length)
        found = await stages.generate(asked, base, context)
        return way.backbone.detokenize(found.hypotheses[0].ids[len(text.ids) :])


async def measure_answers(trial: Trial) -> Results:
    """Accuracy over all and by kind of question, and with the media moved on by one."""
    own, swapped = [
        [told == item.questions[0].answer for told, item in zip(await _told(trial, media), trial.items, strict=True)]
        for media in (trial.media, trial.swapped)
    ]
    kinds: dict[str, list[bool]] = {}
    for item, right in zip(trial.items, own, strict=True):
        kinds.setdefault(item.questions[0].kind, []).append(right)
    return {
        "accuracy": _mean(own),
        "accuracy_media_swapped": _mean(swapped),
        "accuracy_by_kind": {kind: _mean(rights) for kind, rights in sorted(kinds.items())},
    }


async def measure_captions(trial: Trial) -> Results:
    """The share of captions that are word for word right, and CIDEr-D; both also with the media moved on by one."""
    references = [item.caption or "" for item in trial.items]
    results: Results = {}
    for suffix, media in (("", trial.media), ("_media_swapped", trial.swapped)):
        captions = await _told(trial, media)
        rights = [caption == reference for caption, reference in zip(captions, references, strict=True)]
        results |= {f"exact{suffix}": _mean(rights), f"cider{suffix}": round(cider(captions, references), 3)}
    return results


async def measure_retrieval(trial: Trial) -> Results:
    """Recall of each caption's own item: by vector, frame-aware, and with matching over the first RERANK_DEPTH."""
    runtime, kind = trial.runtime, trial.task.kind
    assert kind != "audio", "nobody searches sounds. This is a bug."
    sources = read_sources(trial.media[0].parent)
    await runtime.galleries.build("evaluation", trial.reference, sources, BuildOptions(kind), _context())
    results: Results = {"rerank_depth": min(RERANK_DEPTH, len(trial.items))}
    for mode in ("none", "frames", "match") if kind == "video" else ("none", "match"):
        jobs = [_place(runtime, item, path, mode) for item, path in zip(trial.items, trial.media, strict=True)]
        places = await _limited(jobs)
        results[mode] = {f"recall@{k}": _mean([place < k for place in places]) for k in (1, 5, 10)}
        if mode == "none":
            results["recall_at_rerank_depth"] = _mean([place < RERANK_DEPTH for place in places])
    return results


async def _place(runtime: Runtime, item: Item, path: Path, mode: Any) -> int:
    """Where the item's own medium came, counted from 0; RERANK_DEPTH if it did not."""
    depth = None if mode == "none" else RERANK_DEPTH
    query = RetrieveQuery("evaluation", TextQuery(item.caption or ""), RERANK_DEPTH, mode, depth)
    hits = (await runtime.retrieve.search(query, _context())).hits
    return next((place for place, hit in enumerate(hits) if hit.id == path.name), RERANK_DEPTH)


def _mean(values: Sequence[bool]) -> float:
    return round(sum(values) / len(values), 4)
