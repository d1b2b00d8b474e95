"""One training run, from a manifest to a package.

    read_examples -> check (every file decoded once) -> batches, one ahead -> fit -> write_probed_package

Which examples a step sees follows from the seed and the step alone, so a run that was stopped goes on, from its
checkpoint, to the very parameters it would have had.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from pydantic import JsonValue
from tqdm import tqdm

from adapters.config import AdapterConfig, AnswerDecoding, BackboneRef, Preprocessing
from adapters.errors import Conflict, ConversionError
from adapters.families.base import HEADS
from adapters.families.uniadapter import UniAdapterOptions
from adapters.package import Package
from adapters.training.adapter import AnswerTraining, RetrievalTraining, TrainableAdapter
from adapters.training.loop import FitOptions, Objective, Progress, fit
from adapters.training.objectives import RetrievalSettings
from service.backbone.blip_backbone import TASK_PARTS, BlipBackbone
from service.backbone.folder import load_blip
from service.config import MIB, InvalidSettings
from service.errors import BadMedia
from service.lifecycle.writing import write_probed_package
from service.media import MediaLimits, MediaWorkers
from service.train.batches import Ahead, Batches, Plan
from service.train.examples import Example, Examples, read_examples, text_limit
from service.train.options import TrainOptions, pick_device
from service.train.pixels import IN_FLIGHT, PixelStore
from service.train.quarantine import Quarantine

MAX_BROKEN_SHARE = 0.05
MAX_ANSWERS = 20_000  # candidates a package lists; the service takes no more by default
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
    backbone = load_blip(options.backbone, device=str(pick_device(options.device)))
    backbone.require(options.task)
    _check_resolution(options, backbone)
    examples = read_examples(options.data, options.task, backbone)
    config = package_config(options, backbone, examples)
    heads, device = backbone.head_tensors(), backbone.device
    adapter = TrainableAdapter(config, backbone.dims(), heads, seed=options.seed, device=device)
    tuned = _tuned_share(adapter, backbone)
    say(f"{options.data.name}: {len(examples.examples):,} examples of {len(examples.files):,} files")
    say(f"tuning {tuned}, on {device}")
    _say_unknown(examples, say)
    with MediaWorkers(options.media_workers, MediaLimits(), max_queued=options.batch_size + IN_FLIGHT) as workers:
        store = PixelStore(examples.files, config.pixels, workers, max_bytes=options.cache_mib * MIB)
        quarantine = _quarantine(options, examples, store, say)
        usable = _usable(options, examples, quarantine)
        store.trust(usable[0].file)
        batches = Batches(usable, store, backbone.config.special_ids.pad)
        try:
            losses = _fit(options, backbone, adapter, batches, quarantine, say)
        except KeyboardInterrupt:
            if options.checkpoint_file.exists():
                say(f"stopped; the same command goes on from {options.checkpoint_file}")
            raise
    config = config.model_copy(update={"provenance": _provenance(options, examples, quarantine)})
    card = model_card(options, config, tuned, len(usable), losses)
    package = write_probed_package(options.out, config, adapter.package_tensors(), card, backbone)
    say(f"wrote {options.out}: {options.task}, rank {options.rank}, {package.weights_digest}")
    return package


def _tuned_share(adapter: TrainableAdapter, backbone: BlipBackbone) -> str:
    """How much of the backbone's size is tuned, in words."""
    num_frozen = sum(p.numel() for p in backbone.model.parameters())
    share = 100 * adapter.num_parameters / num_frozen
    return f"{adapter.num_parameters:,} parameters, {share:.2f} % of the backbone's {num_frozen:,}"


def _say_unknown(examples: Examples, say: Say) -> None:
    if examples.unknown:
        common = sorted(examples.unknown, key=lambda word: -examples.unknown[word])[:MAX_LISTED]
        say(f"words the vocabulary does not know: {len(examples.unknown)}, most often {', '.join(common)}")


# --- what will be written -------------------------------------------------------------------------------------------------


def _check_resolution(options: TrainOptions, backbone: BlipBackbone) -> None:
    patch = backbone.config.vision.patch
    if options.resolution is not None and options.resolution % patch:
        raise InvalidSettings(f"{options.resolution} is no multiple of the patch size {patch}", param="resolution")


def package_config(options: TrainOptions, backbone: BlipBackbone, examples: Examples) -> AdapterConfig:
    """The config of the package to be, provenance aside."""
    dims = backbone.dims()
    family = UniAdapterOptions(kv_rank=options.kv_rank, frame_aware_attention=options.frame_aware)
    tuned_heads = HEADS if options.is_retrieval and options.heads else ()
    used_heads = HEADS if options.is_retrieval and not options.heads else ()
    return AdapterConfig(
        family="uniadapter",
        task=options.task,
        rank=options.rank,
        options=family.model_dump(mode="json"),
        heads=tuned_heads,
        backbone=BackboneRef(
            architecture="blip",
            width=dims.width,
            layers=dims.layers,
            parts={part: backbone.parts[part] for part in (*TASK_PARTS[options.task], *used_heads)},
        ),
        preprocessing=Preprocessing(
            resolution=options.resolution or backbone.manifest.resolution, num_frames=options.num_frames
        ),
        max_text_tokens=text_limit(backbone),
        decoding=None if options.is_retrieval else _decoding(backbone, examples),
    )


def _decoding(backbone: BlipBackbone, examples: Examples) -> AnswerDecoding:
    """Candidates are the answers trained on; a generated answer may be as long as the longest of them."""
    decoder = backbone.config.decoder
    assert decoder is not None, "the caller required a decoder. This is a bug."
    longest = max(len(ids) for example in examples.examples for ids in example.answers)
    answers = examples.answers[:MAX_ANSWERS]
    return AnswerDecoding(
        answers=answers,
        rank_k=min(AnswerDecoding().rank_k, len(answers)),
        max_length=min(max(AnswerDecoding().max_length, longest), decoder.max_positions),
    )


def _provenance(options: TrainOptions, examples: Examples, quarantine: Quarantine) -> dict[str, JsonValue]:
    names = {"steps", "batch_size", "learning_rate", "queue_size", "seed", "precision"}
    return {
        "source": "adapter-bank train",
        "data": {
            "manifest": options.data.name,
            "digest": examples.digest,
            "examples": len(examples.examples),
            "files": quarantine.files,
            "quarantined": len(quarantine.quarantined),
        },
        **options.model_dump(mode="json", include=names),
    }


def model_card(
    options: TrainOptions, config: AdapterConfig, tuned: str, num_examples: int, losses: Mapping[str, float]
) -> str:
    """README.md of the package."""
    preprocessing = config.pixels
    rows = {
        "task": options.task,
        "family": f"{config.family}, rank {options.rank}, key/value rank {options.kv_rank or 'none'}",
        "tuned": tuned,
        "input": f"{preprocessing.resolution} px; {preprocessing.num_frames} frames of a clip",
        "data": f"{options.data.name}, {num_examples:,} examples",
        "training": f"{options.steps:,} steps of {options.batch_size}, learning rate up to {options.learning_rate:g}",
        "last losses": ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()) or "not recorded",
    }
    if options.is_retrieval:
        rows["heads"] = ", ".join(config.heads) or "the backbone's own"
    if config.decoding is not None:
        rows["answers"] = f"{len(config.decoding.answers):,} candidates"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"# {options.out.name}\n\nTrained by `adapter-bank train`. The losses are running means over training batches; "
        f"nothing was evaluated.\n\n| | |\n|---|---|\n{table}\n"
    )


# --- data -----------------------------------------------------------------------------------------------------------------


def _quarantine(options: TrainOptions, examples: Examples, store: PixelStore, say: Say) -> Quarantine:
    """What is left out: as the run found it when it began, or finds it now. Raises: BadMedia above 5 %."""
    written = Quarantine.read(options.quarantine_file, examples) if options.checkpoint_file.exists() else None
    if written is not None:
        return written
    with tqdm(total=len(examples.files), desc="decoding", unit="file", disable=None) as bar:
        found = Quarantine.of(examples, store.check(examples.lines_of, bar.update))
    found.write(options.quarantine_file)
    broken = found.quarantined
    for entry in broken[:MAX_LISTED]:
        say(f"left out: {entry.file} (line {entry.lines[0]}): {entry.reason}")
    if len(broken) > MAX_BROKEN_SHARE * found.files:
        raise BadMedia(
            f"{len(broken)} of {found.files} files cannot be used, more than {100 * MAX_BROKEN_SHARE:.0f} %; all are "
            f"listed in {options.quarantine_file}",
            param="data",
        )
    if broken:
        say(f"{len(broken)} of {found.files} files are left out and listed in {options.quarantine_file}")
    return found


def _usable(options: TrainOptions, examples: Examples, quarantine: Quarantine) -> list[Example]:
    usable = [example for example in examples.examples if example.line not in quarantine.lines]
    needed = 2 if options.is_retrieval else 1
    if len({example.file for example in usable}) < needed:
        raise ConversionError(f"{options.task} needs lines of at least {needed} files that can be used", param="data")
    return usable


# --- fitting --------------------------------------------------------------------------------------------------------------


def _fit(
    options: TrainOptions,
    backbone: BlipBackbone,
    adapter: TrainableAdapter,
    batches: Batches,
    quarantine: Quarantine,
    say: Say,
) -> dict[str, float]:
    """Fit the adapter; returns running means of its last losses, empty when nothing was left to do."""
    plan = Plan(len(batches.examples), options.batch_size, options.seed)
    make: Callable[[Sequence[int]], Any] = batches.retrieval if options.is_retrieval else batches.answers
    schedule = FitOptions(
        steps=options.steps,
        learning_rate=options.learning_rate,
        warmup_steps=min(FitOptions.warmup_steps, options.steps // 10),
        checkpoint_every=options.checkpoint_every,
    )
    settings: dict[str, JsonValue] = {
        **options.numeric(),
        "backbone": backbone.digest,
        "data": quarantine.data,
        "preprocessing": adapter.config.preprocessing.model_dump(mode="json"),
        "lines_left_out": [*sorted(quarantine.lines)],
    }
    if options.checkpoint_file.exists():
        say(f"going on from {options.checkpoint_file}")
    with (
        Ahead(lambda step: make(plan.rows(step)), options.steps) as ahead,
        _Report(options.steps, say) as report,
    ):
        fit(
            adapter.parameters,
            _objective(options, backbone, adapter, ahead, plan),
            schedule,
            checkpoint=options.checkpoint_file,
            settings=settings,
            report=report,
            context=_precision(options, backbone.device),
        )
    return report.means


def _objective(
    options: TrainOptions, backbone: BlipBackbone, adapter: TrainableAdapter, batches: Callable[[int], Any], plan: Plan
) -> Objective:
    def on_device(step: int) -> Any:
        return batches(step).to(backbone.device)

    if not options.is_retrieval:
        return AnswerTraining(backbone.model, adapter, on_device)
    return RetrievalTraining(
        backbone.model,
        adapter,
        on_device,
        RetrievalSettings(frame_aware=options.frame_aware),
        ramp_steps=plan.steps_per_epoch,  # the released trainer's: soft targets have their full weight after one epoch
        queue_size=options.queue_size,
        seed=options.seed,
    )


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
