"""One training run, from a manifest to a package.

    read_examples -> one kind of media -> check (every file decoded once) -> batches, one ahead -> fit -> write_probed_package

The backbone's kind decides the family of the adapter; what differs by family is behind `FamilyTraining`.

Which examples a step sees follows from the seed and the step alone, so a run that was stopped goes on, from its
checkpoint, to the very parameters it would have had.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from pydantic import JsonValue
from tqdm import tqdm

from adapters.config import AdapterConfig
from adapters.errors import Conflict, ConversionError
from adapters.package import Package
from adapters.training.adapter import TrainableAdapter
from adapters.training.loop import FitOptions, Progress, fit
from service.backbone.base import Backbone
from service.backbone.blip_backbone import BlipBackbone
from service.backbone.folder import load_backbone, load_manifest
from service.backbone.opt_backbone import OptBackbone
from service.errors import BadMedia
from service.lifecycle.writing import write_probed_package
from service.media import AnyMediaKind, MediaLimits, MediaWorkers
from service.train.batches import Ahead, Plan
from service.train.epalm import EPalmTraining
from service.train.examples import Example, Examples, read_examples
from service.train.family import FamilyTraining
from service.train.media import IN_FLIGHT, MediaStore, kind_of, shared_kind
from service.train.options import TrainOptions, pick_device
from service.train.quarantine import Quarantine
from service.train.uniadapter import UniAdapterTraining

MAX_BROKEN_SHARE = 0.05
MAX_LISTED = 10
MEAN_DECAY = 0.98

Say = Callable[[str], None]


def say_now(line: str) -> None:
    """Print a line at once, also where the output is a file."""
    print(line, flush=True)


def train(options: TrainOptions, say: Say = say_now) -> Package:
    """Fine-tune and write the package, telling `say` what happens; goes on where an earlier attempt stopped.

    Raises: ConversionError for the manifest, BadMedia when too many of its files cannot be used, MissingPart, Conflict for
    a package that is there already, InvalidSettings; ProbeFailed when a tuned part came out as one that does nothing; what
    `fit` raises.
    """
    if options.out.exists() and not (options.out.is_dir() and not any(options.out.iterdir())):
        raise Conflict(f"{options.out} exists and is not an empty folder", param="out")
    options.check_fits(load_manifest(options.backbone).config.architecture)
    backbone = load_backbone(options.backbone, device=str(pick_device(options.device)))
    backbone.require(options.task)
    family = family_training(options, backbone)
    examples = read_examples(options.data, options.task, family.texts)
    say(f"{options.data.name}: {len(examples.examples):,} examples of {len(examples.files):,} files")
    quarantine = Quarantine.read(options.quarantine_file, examples) if options.checkpoint_file.exists() else None
    kind, broken = _kind(examples, family, quarantine)
    if kind is None:
        raise _too_many(options, _list_broken(options, examples, broken, say))
    config = family.config(examples, kind)
    adapter = TrainableAdapter(
        config, backbone.dims(), backbone.head_tensors(), seed=options.seed, device=backbone.device
    )
    tuned = _tuned_share(adapter, backbone)
    say(f"tuning {tuned}, on {backbone.device}")
    _say_unknown(examples, say)
    with MediaWorkers(options.media_workers, MediaLimits(), max_queued=options.batch_size + IN_FLIGHT) as workers:
        store = family.store(config, examples.files, kind, workers)
        if quarantine is None:
            quarantine = _quarantine(options, examples, _check(examples, store, broken), say)
        usable = _usable(options, examples, quarantine)
        try:
            losses = _fit(options, backbone, family, adapter, usable, store, quarantine, say)
        except KeyboardInterrupt:
            if options.checkpoint_file.exists():
                say(f"stopped; the same command goes on from {options.checkpoint_file}")
            raise
    config = config.model_copy(update={"provenance": _provenance(options, family, examples, quarantine)})
    card = model_card(options, family, config, tuned, len(usable), losses)
    package = write_probed_package(options.out, config, adapter.package_tensors(), card, backbone)
    say(f"wrote {options.out}: {options.task}, {config.family} of rank {config.rank}, {package.weights_digest}")
    return package


def family_training(options: TrainOptions, backbone: Backbone) -> FamilyTraining[Any]:
    """How adapters of the backbone's family are trained. Raises: InvalidSettings; MissingPart."""
    if isinstance(backbone, BlipBackbone):
        return UniAdapterTraining(options, backbone)
    assert isinstance(backbone, OptBackbone), "there are two kinds of backbones. This is a bug."
    return EPalmTraining(options, backbone)


def _tuned_share(adapter: TrainableAdapter, backbone: Backbone) -> str:
    """How much of the backbone's size is tuned, in words."""
    num_frozen = sum(backbone.part_sizes().values())
    share = 100 * adapter.num_parameters / num_frozen
    return f"{adapter.num_parameters:,} parameters, {share:.2f} % of the backbone's {num_frozen:,}"


def _say_unknown(examples: Examples, say: Say) -> None:
    if examples.unknown:
        common = sorted(examples.unknown, key=lambda word: -examples.unknown[word])[:MAX_LISTED]
        say(f"words the vocabulary does not know: {len(examples.unknown)}, most often {', '.join(common)}")


# --- what will be written -------------------------------------------------------------------------------------------------


def _provenance(
    options: TrainOptions, family: FamilyTraining[Any], examples: Examples, quarantine: Quarantine
) -> dict[str, JsonValue]:
    return {
        "source": "adapter-bank train",
        "data": {
            "manifest": options.data.name,
            "digest": examples.digest,
            "examples": len(examples.examples),
            "files": quarantine.files,
            "quarantined": len(quarantine.quarantined),
        },
        **options.model_dump(mode="json", include={"steps", "batch_size", "seed", "precision"}),
        "learning_rate": family.learning_rate,
        **family.numeric(),
    }


def model_card(
    options: TrainOptions,
    family: FamilyTraining[Any],
    config: AdapterConfig,
    tuned: str,
    num_examples: int,
    losses: Mapping[str, float],
) -> str:
    """README.md of the package."""
    rows = {
        "task": options.task,
        **family.card_rows(config),
        "tuned": tuned,
        "data": f"{options.data.name}, {num_examples:,} examples",
        "training": f"{options.steps:,} steps of {options.batch_size}, learning rate up to {family.learning_rate:g}",
        "last losses": ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()) or "not recorded",
    }
    if config.decoding is not None and config.decoding.answers:
        rows["answers"] = f"{len(config.decoding.answers):,} candidates"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"# {options.out.name}\n\nTrained by `adapter-bank train`. The losses are running means over training batches; "
        f"nothing was evaluated.\n\n| | |\n|---|---|\n{table}\n"
    )


# --- data -----------------------------------------------------------------------------------------------------------------


def _kind(
    examples: Examples, family: FamilyTraining[Any], written: Quarantine | None
) -> tuple[AnyMediaKind | None, dict[int, str]]:
    """The kind of media, and why some files are of none; an earlier check's word is taken for all but the first.

    Raises: ConversionError where kinds are mixed; BadMedia, MissingMedia for what was fine when it was checked.
    """
    if written is None:
        return shared_kind(examples.files, family.kinds, examples.lines_of)
    usable = next((one for one in examples.examples if one.line not in written.lines), examples.examples[0])
    return kind_of(examples.files[usable.file], family.kinds), {}


def _check(examples: Examples, store: MediaStore[Any], broken: Mapping[int, str]) -> dict[int, str]:
    """Why some files cannot be used, beside those that are known to be `broken`."""
    others = [file for file in range(len(examples.files)) if file not in broken]
    with tqdm(total=len(examples.files), initial=len(broken), desc="decoding", unit="file", disable=None) as bar:
        return {**broken, **store.check(others, bar.update)}


def _quarantine(options: TrainOptions, examples: Examples, broken: Mapping[int, str], say: Say) -> Quarantine:
    """What is left out from now on. Raises: BadMedia above 5 %."""
    found = _list_broken(options, examples, broken, say)
    if len(found.quarantined) > MAX_BROKEN_SHARE * found.files:
        raise _too_many(options, found)
    if found.quarantined:
        say(f"{len(found.quarantined)} of {found.files} files are left out and listed in {options.quarantine_file}")
    return found


def _list_broken(options: TrainOptions, examples: Examples, broken: Mapping[int, str], say: Say) -> Quarantine:
    found = Quarantine.of(examples, broken)
    found.write(options.quarantine_file)
    for entry in found.quarantined[:MAX_LISTED]:
        say(f"left out: {entry.file} (line {entry.lines[0]}): {entry.reason}")
    return found


def _too_many(options: TrainOptions, found: Quarantine) -> BadMedia:
    return BadMedia(
        f"{len(found.quarantined)} of {found.files} files cannot be used, more than {100 * MAX_BROKEN_SHARE:.0f} %; all are "
        f"listed in {options.quarantine_file}",
        param="data",
    )


def _usable(options: TrainOptions, examples: Examples, quarantine: Quarantine) -> list[Example]:
    usable = [example for example in examples.examples if example.line not in quarantine.lines]
    needed = 2 if options.is_retrieval else 1
    if len({example.file for example in usable}) < needed:
        raise ConversionError(f"{options.task} needs lines of at least {needed} files that can be used", param="data")
    return usable


# --- fitting --------------------------------------------------------------------------------------------------------------


def _fit(
    options: TrainOptions,
    backbone: Backbone,
    family: FamilyTraining[Any],
    adapter: TrainableAdapter,
    usable: Sequence[Example],
    store: MediaStore[Any],
    quarantine: Quarantine,
    say: Say,
) -> dict[str, float]:
    """Fit the adapter; returns running means of its last losses, empty when nothing was left to do."""
    plan = Plan(len(usable), options.batch_size, options.seed)
    config = adapter.config
    schedule = FitOptions(
        steps=options.steps,
        learning_rate=family.learning_rate,
        weight_decay=family.weight_decay,
        warmup_steps=min(FitOptions.warmup_steps, options.steps // 10),
        checkpoint_every=options.checkpoint_every,
    )
    settings: dict[str, JsonValue] = {
        **options.numeric(),
        **family.numeric(),
        **config.options,
        "rank": config.rank,
        "heads": [*config.heads],
        "backbone": backbone.digest,
        "data": quarantine.data,
        "preprocessing": config.preprocessing.model_dump(mode="json"),
        "lines_left_out": [*sorted(quarantine.lines)],
    }
    if options.checkpoint_file.exists():
        say(f"going on from {options.checkpoint_file}")
    with (
        Ahead(family.batches(usable, store, plan), options.steps) as ahead,
        _Report(options.steps, say) as report,
    ):
        fit(
            adapter.parameters,
            family.objective(adapter, lambda step: ahead(step).to(backbone.device), plan),
            schedule,
            checkpoint=options.checkpoint_file,
            settings=settings,
            report=report,
            context=_precision(options, backbone.device),
            rate_of=family.rate_of,
        )
    return report.means


def _precision(options: TrainOptions, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    if options.precision == "float32":
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


class _Report:
    """A bar with running means of the losses; where there is no terminal, a line now and then."""

    def __init__(self, steps: int, say: Say) -> None:
        self.means: dict[str, float] = {}
        self._say = say
        self._every = max(1, steps // 20)
        self._bar = tqdm(total=steps, desc="training", unit="step", disable=None)

    def __call__(self, progress: Progress) -> None:
        for name, loss in progress.losses.items():
            mean = self.means.get(name, loss)
            self.means[name] = MEAN_DECAY * mean + (1.0 - MEAN_DECAY) * loss
        shown = {name: f"{mean:.3f}" for name, mean in self.means.items()}
        if not self._bar.disable:
            if not self._bar.n:  # a resumed run's speed counts its own steps
                self._bar.initial = self._bar.n = self._bar.last_print_n = progress.step - 1
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()
        elif progress.step % self._every == 0 or progress.step == progress.steps:
            losses = ", ".join(f"{name} {mean}" for name, mean in shown.items())
            self._say(f"step {progress.step} of {progress.steps}: {losses}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()
