"""The demo's table: every adapter against the frozen backbone, ablations and controls, all through the real service.

Media are real PNG and MP4 files, decoded by the media workers; answers and hits come from the pipelines behind `/vqa`
and `/retrieve`. A fully fine-tuned model is served as a backbone of its own.
"""

import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from adapters.config import BASE_ADAPTER
from adapters.errors import AdapterNotFound
from adapters.package import read_package
from service.config import Settings
from service.demo.recipes import ABLATIONS, ASSETS, RECIPES
from service.demo.samples import write_media
from service.demo.world import TASKS, Item, Task, evaluation_set, split_of
from service.gallery.sources import read_sources
from service.home import push_package
from service.pipelines.galleries import BuildOptions
from service.runtime import Runtime
from service.types import MediaBytes, RankDecode, RequestContext, RetrieveQuery, TextQuery, VqaQuery

T = TypeVar("T")
Results = dict[str, Any]

RERANK_DEPTH = 64
CONCURRENCY = 8
REQUEST_TIMEOUT_S = 3600.0
PATIENCE_S = 24 * 3600.0  # nobody else waits: nothing is refused for want of capacity
RECORDED = ASSETS / "results.json"
RECORDED_SEED = 2026


@dataclass(frozen=True)
class Contender:
    """One row of the table: a backbone folder and, unless it is None, a package on it."""

    name: str
    backbone: Path
    package: Path | None = None


def evaluate(seed: int, num_items: int, *, tasks: Sequence[str] | None = None) -> Results:
    """Measure the shipped adapters, and the shipped ablations, on evaluation sets of a seed.

    Raises: AdapterNotFound for a task there is no demo adapter of.
    """
    names = list(tasks or RECIPES)
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        raise AdapterNotFound(f"no demo task {', '.join(unknown)}; there are {', '.join(RECIPES)}", param="task")
    results: Results = {"seed": seed, "items": num_items, "tasks": {}}
    for name in names:
        results["tasks"][name] = evaluate_task(name, seed, num_items, shipped(name))
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {"tasks": {}}
    for name in names:
        row = recorded["tasks"].get(name, {}).get("full-fine-tuning")
        if row is not None:
            results["tasks"][name]["full-fine-tuning"] = row | {"recorded_with_seed": recorded["seed"]}
    return results


def shipped(task: str) -> list[Contender]:
    """What of a task can be measured from the assets alone."""
    backbone = ASSETS / "backbone"
    contenders = [Contender("frozen", backbone), Contender("adapter", backbone, ASSETS / "adapters" / task)]
    for variant in ABLATIONS.get(task, ()):
        package = ASSETS / "ablations" / f"{task}.{variant}"
        if package.is_dir():
            contenders.append(Contender(variant, backbone, package))
    return contenders


def evaluate_task(name: str, seed: int, num_items: int, contenders: Sequence[Contender]) -> Results:
    """Every contender's row on one evaluation set, with the set's own controls."""
    task = TASKS[name]
    items = evaluation_set(name, seed, num_items)
    row: Results = {"kind": task.kind, "goal": task.goal, "scenes_in_training_split": _overlap(items)}
    with tempfile.TemporaryDirectory(prefix="adapter-bank-eval-") as folder:
        media = write_media(items, Path(folder) / "media")
        for contender in contenders:
            home = Path(folder) / contender.name
            row[contender.name] = asyncio.run(_measure(contender, task, items, media, home))
    return row


def _overlap(items: Sequence[Item]) -> int:
    """Items whose scene belongs to the training split: its content hash decides, so there can be none."""
    return sum(split_of(item.key) == "train" for item in items)


async def _measure(
    contender: Contender, task: Task, items: Sequence[Item], media: Sequence[Path], home: Path
) -> Results:
    settings = Settings(home=home, backbone=contender.backbone, max_queue_seconds=PATIENCE_S)
    reference = BASE_ADAPTER
    share = 0.0
    if contender.package is not None:
        reference = push_package(settings, contender.package, "contender").name
    runtime = Runtime(settings)
    await runtime.start()
    try:
        if contender.package is not None:
            share = _tunable_share(contender.package, runtime)
        goal = _retrieval if task.goal == "retrieval" else _answers
        return {"tunable_share": share} | await goal(runtime, reference, task, items, media)
    finally:
        await runtime.close()


def _tunable_share(package: Path, runtime: Runtime) -> float:
    """Trained numbers over the backbone's; the cross-modal norms in a package stay as they were made."""
    tensors = read_package(package).tensors
    tuned = sum(t.numel() for name, t in tensors.items() if "adapter_layer_norm_cross_modal" not in name)
    return tuned / sum(p.numel() for p in runtime.backbone.model.parameters())


def _context() -> RequestContext:
    return RequestContext(deadline=time.monotonic() + REQUEST_TIMEOUT_S, client="evaluation")


async def _limited(jobs: Sequence[Awaitable[T]]) -> list[T]:
    """Results in order, a few at a time."""
    gate = asyncio.Semaphore(CONCURRENCY)

    async def run(job: Awaitable[T]) -> T:
        async with gate:
            return await job

    return await asyncio.gather(*(run(job) for job in jobs))


async def _answers(
    runtime: Runtime, reference: str, task: Task, items: Sequence[Item], media: Sequence[Path]
) -> Results:
    """Accuracy of the best-ranked answer, over all and by kind of question, and with the media moved on by one."""
    own = await _asked(runtime, reference, task, items, media)
    swapped = await _asked(runtime, reference, task, items, [*media[1:], media[0]])
    kinds: dict[str, list[bool]] = {}
    for item, right in zip(items, own, strict=True):
        kinds.setdefault(item.questions[0].kind, []).append(right)
    return {
        "accuracy": _mean(own),
        "accuracy_media_swapped": _mean(swapped),
        "accuracy_by_kind": {kind: _mean(rights) for kind, rights in sorted(kinds.items())},
    }


async def _asked(
    runtime: Runtime, reference: str, task: Task, items: Sequence[Item], media: Sequence[Path]
) -> list[bool]:
    async def one(item: Item, data: bytes) -> bool:
        query = VqaQuery(
            adapter=reference,
            question=item.questions[0].question,
            media=MediaBytes(task.kind, data),
            decode=RankDecode(task.answers, len(task.answers)),
        )
        return (await runtime.vqa.answer(query, _context())).answer == item.questions[0].answer

    return await _limited([one(item, path.read_bytes()) for item, path in zip(items, media, strict=True)])


async def _retrieval(
    runtime: Runtime, reference: str, task: Task, items: Sequence[Item], media: Sequence[Path]
) -> Results:
    """Recall of each caption's own item: by vector, frame-aware, and with matching over the first RERANK_DEPTH."""
    options = BuildOptions(task.kind)
    await runtime.galleries.build("evaluation", reference, read_sources(media[0].parent), options, _context())
    results: Results = {"rerank_depth": min(RERANK_DEPTH, len(items))}
    for mode in ("none", "frames", "match") if task.kind == "video" else ("none", "match"):
        places = await _limited([_place(runtime, item, path, mode) for item, path in zip(items, media, strict=True)])
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


def table(results: Results) -> str:
    """The results for people, as a Markdown table."""
    lines = [
        f"Seed {results['seed']}, {results['items']} items a task.",
        "",
        "| task | variant | tuned | accuracy / recall@1 | control / by vector |",
        "|---|---|---|---|---|",
    ]
    for task, row in results["tasks"].items():
        for name, measured in row.items():
            if not isinstance(measured, dict):
                continue
            share = "100 %" if name == "full-fine-tuning" else f"{100 * measured['tunable_share']:.2f} %"
            if row["goal"] == "retrieval":
                depth = f"recall@{measured['rerank_depth']} {measured['recall_at_rerank_depth']:.3f}"
                scores = f"{measured['match']['recall@1']:.3f} | {measured['none']['recall@1']:.3f}, {depth}"
            else:
                scores = f"{measured['accuracy']:.3f} | media swapped {measured['accuracy_media_swapped']:.3f}"
            lines.append(f"| {task} | {name} | {share} | {scores} |")
    return "\n".join(lines)


def record_table(work: Path) -> None:
    """Measure everything a rebuild made, the fine-tuned copies too, and keep the results beside the assets."""
    results: Results = {"seed": RECORDED_SEED, "items": 500, "tasks": {}}
    for name in RECIPES:
        contenders = shipped(name)
        fine_tuned = work / "fine-tuned" / name
        if fine_tuned.is_dir():
            contenders.append(Contender("full-fine-tuning", fine_tuned))
        results["tasks"][name] = evaluate_task(name, RECORDED_SEED, results["items"], contenders)
        RECORDED.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
