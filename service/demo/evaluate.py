"""The demo's table: every adapter against the frozen backbone, ablations and controls, all through the real service.

Media are real PNG, MP4, WAV and AAC files, decoded by the media workers; answers, captions and hits come from the pipelines
behind `/vqa`, `/caption` and `/retrieve`. A fully fine-tuned model is served as a backbone of its own.
"""

import asyncio
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.config import BASE_ADAPTER
from adapters.errors import AdapterNotFound
from adapters.package import read_package
from service.config import Settings
from service.demo.measures import Results, Trial, measure_answers, measure_captions, measure_retrieval
from service.demo.recipes import ABLATIONS, ASSETS, EPALM_RECIPES
from service.demo.samples import write_media
from service.demo.world import TASKS, Item, Task, evaluation_set, split_of
from service.home import push_package
from service.runtime import Runtime

PATIENCE_S = 24 * 3600.0  # nobody else waits: nothing is refused for want of capacity
RECORDED = ASSETS / "results.json"
RECORDED_SEED = 2026


@dataclass(frozen=True)
class Contender:
    """One row of the table: a backbone folder and, unless it is None, a package on it.

    One that does not `perceive` is its language model alone, asked in the package's words.
    """

    name: str
    backbone: Path
    package: Path | None = None
    perceives: bool = True


def evaluate(seed: int, num_items: int, *, tasks: Sequence[str] | None = None) -> Results:
    """Measure the shipped adapters, and the shipped ablations, on evaluation sets of a seed.

    Raises: AdapterNotFound for a task there is no demo adapter of.
    """
    names = list(tasks or TASKS)
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise AdapterNotFound(f"no demo task {', '.join(unknown)}; there are {', '.join(TASKS)}", param="task")
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
    package = ASSETS / "adapters" / task
    if task in EPALM_RECIPES:
        backbone = ASSETS / "opt"
        return [
            Contender("frozen, perceiving nothing", backbone, package, perceives=False),
            Contender("adapter", backbone, package),
        ]
    backbone = ASSETS / "backbone"
    contenders = [Contender("frozen", backbone), Contender("adapter", backbone, package)]
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
            share = _tunable_share(contender.package, runtime) if contender.perceives else 0.0
        trial = Trial(runtime, reference, task, items, media, perceives=contender.perceives)
        match task.goal:
            case "retrieval":
                return {"tunable_share": share} | await measure_retrieval(trial)
            case "caption":
                return {"tunable_share": share} | await measure_captions(trial)
            case _:
                return {"tunable_share": share} | await measure_answers(trial)
    finally:
        await runtime.close()


def _tunable_share(package: Path, runtime: Runtime) -> float:
    """Trained numbers over the backbone's; the cross-modal norms in a package stay as they were made.

    Of a language model's encoders only the one counts that the package perceives with.
    """
    read = read_package(package)
    tuned = sum(t.numel() for name, t in read.tensors.items() if "adapter_layer_norm_cross_modal" not in name)
    others = {name for name in ("vit", "timesformer", "ast") if name not in read.config.backbone.parts}
    return tuned / sum(size for part, size in runtime.backbone.part_sizes().items() if part not in others)


def table(results: Results) -> str:
    """The results for people, as a Markdown table."""
    lines = [
        f"Seed {results['seed']}, {results['items']} items a task.",
        "",
        "| task | variant | tuned | accuracy / recall@1 / captions | control / by vector |",
        "|---|---|---|---|---|",
    ]
    for task, row in results["tasks"].items():
        for name, measured in row.items():
            if not isinstance(measured, dict):
                continue
            share = "100 %" if name == "full-fine-tuning" else f"{100 * measured['tunable_share']:.2f} %"
            if row["goal"] == "caption":
                scores = (
                    f"exact {measured['exact']:.3f}, CIDEr-D {measured['cider']:.2f} | "
                    f"media swapped {measured['exact_media_swapped']:.3f}, {measured['cider_media_swapped']:.2f}"
                )
            elif row["goal"] == "retrieval":
                depth = f"recall@{measured['rerank_depth']} {measured['recall_at_rerank_depth']:.3f}"
                scores = f"{measured['match']['recall@1']:.3f} | {measured['none']['recall@1']:.3f}, {depth}"
            else:
                scores = f"{measured['accuracy']:.3f} | media swapped {measured['accuracy_media_swapped']:.3f}"
            lines.append(f"| {task} | {name} | {share} | {scores} |")
    return "\n".join(lines)


def record_table(work: Path) -> None:
    """Measure everything a rebuild made, the fine-tuned copies too, and keep the results beside the assets."""
    results: Results = {"seed": RECORDED_SEED, "items": 500, "tasks": {}}
    for name in TASKS:
        contenders = shipped(name)
        fine_tuned = work / "fine-tuned" / name
        if name in EPALM_RECIPES and (fine_tuned / "adapter").is_dir():
            contenders.append(Contender("full-fine-tuning", fine_tuned / "backbone", fine_tuned / "adapter"))
        elif (fine_tuned / "backbone.json").exists():
            contenders.append(Contender("full-fine-tuning", fine_tuned))
        results["tasks"][name] = evaluate_task(name, RECORDED_SEED, results["items"], contenders)
        RECORDED.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
