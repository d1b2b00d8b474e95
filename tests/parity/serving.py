"""A case served as a server would: import, package, store, registry, loader, bank, engine; in batches that are mixed.

(No class here prints its tensors: asyncio formats a finished task, result and all, once per run.)

Every stage is queued whole before the device thread starts, so that one batch holds the case's rows under every variant,
the rows of its companions and rows of `__base__`, taken from each in turn. Forward hooks on the real modules see what
passes between; what they see is brought to the CPU.
"""

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapters.artifacts import LocalArtifactStore
from adapters.config import BASE_ADAPTER
from adapters.families import FAMILIES
from adapters.families.base import Adaptation, UniformAdaptation
from adapters.families.uniadapter import options_of
from adapters.importers.checkpoint import ImportedAdapter
from adapters.importers.uniadapter import import_uniadapter
from adapters.package import Package, write_package
from adapters.registry import PackageInfo, open_registry
from service.auth import LOCAL
from service.backbone import convert
from service.backbone.base import Backbone
from service.backbone.config import SpecialIds
from service.backbone.decoding import Writing
from service.backbone.folder import load_backbone, write_backbone
from service.backbones import Backbones, HostedBackbone
from service.bank import AdapterBank, BatchLeases, batch_leases
from service.engine import Engine
from service.loader import Loader, Pin
from service.metrics import Metrics
from service.recordings import Recordings
from service.scheduler import BatchLimits, Scheduler
from service.types import (
    Batch,
    GenerateInput,
    GenerateOutput,
    Job,
    MatchInput,
    MatchOutput,
    RankInput,
    RankOutput,
    Stage,
    StageInput,
    StageOutput,
    TextInput,
    TextOutput,
    VisionInput,
    VisionOutput,
)
from tests.devices import DEVICE
from tests.kernels import SERVED, SETTINGS, Setting
from tests.parity.companions import Companion, make_companions
from tests.parity.sets import OWN, WHOLE, Case, Variant
from tests.tape import Counted, make_recordings

TIMEOUT_S = 200.0
Row = tuple[int, ...]


@dataclass(repr=False)
class Seen:
    """What passed through the hooked places during one batch: every call's output, by place."""

    calls: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, place: str, value: Tensor) -> None:
        self.calls.setdefault(place, []).append(value.detach().clone().cpu())


@dataclass(frozen=True, repr=False)
class BatchRecord:
    """A batch that ran."""

    batch: Batch
    seen: Seen
    outputs: Sequence[StageOutput] = ()

    def rows(self, job: Job, place: str, call: int = 0) -> Tensor:
        """What a place gave for the rows of a job."""
        start = sum(_num_rows(other) for other in self.batch.jobs[: self.batch.jobs.index(job)])
        return self.seen.calls[place][call][start : start + _num_rows(job)]

    @property
    def adapters(self) -> set[str]:
        return {job.adapter for job in self.batch.jobs}


def _num_rows(job: Job) -> int:
    match job.inputs:
        case VisionInput(pixels):
            return len(pixels)
        case MatchInput(ids):
            return len(ids)
        case _:
            return 1


def _later_tokens(job: Job, output: StageOutput) -> list[int]:
    """Of each candidate that a ranking job scored, in order, how many tokens have a logit behind the first word's."""
    assert isinstance(job.inputs, RankInput) and isinstance(output, RankOutput)
    return [len(job.inputs.candidates[index]) - 2 for index in output.indices]


class RecordingEngine(Engine):
    """The engine; keeps every batch and what the hooks saw of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.records: list[BatchRecord] = []

    def _run_stage(self, hosted: HostedBackbone, batch: Batch, leases: BatchLeases) -> list[StageOutput]:
        with hooks(hosted.backbone) as seen:
            outputs = super()._run_stage(hosted, batch, leases)
        self.records.append(BatchRecord(batch, seen, outputs))
        return outputs

    def _begin_stage(self, hosted: HostedBackbone, batch: Batch, leases: BatchLeases) -> Writing:
        with hooks(hosted.backbone) as seen:
            writing = super()._begin_stage(hosted, batch, leases)
        self.records.append(BatchRecord(batch, seen))
        return writing


@contextmanager
def hooks(backbone: Backbone) -> Iterator[Seen]:
    """Forward hooks on every module whose output is compared; the word head is no module and is wrapped instead."""
    seen = Seen()
    model = backbone.model
    places: dict[str, nn.Module] = {}
    places |= {f"vision.{i}": block for i, block in enumerate(model.vision.blocks)}
    if model.text_encoder is not None:
        places |= {"text": model.text_encoder, "text.0": model.text_encoder.embeddings}
        places |= {f"text.{i + 1}": layer for i, layer in enumerate(model.text_encoder.layers)}
    handles = [
        module.register_forward_hook(lambda _m, _i, output, place=place: seen.add(place, output))
        for place, module in places.items()
    ]
    decoder = model.decoder
    if decoder is not None:
        plain = decoder.logits

        def logits(h: Tensor) -> Tensor:
            words = plain(h)
            seen.add("words", words)
            return words

        decoder.logits = logits  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        if decoder is not None:
            del decoder.logits


@dataclass(frozen=True, repr=False)
class Ran:
    """A job, what came of it and the batch it ran in."""

    job: Job
    output: StageOutput
    record: BatchRecord

    def rows(self, place: str, call: int = 0) -> Tensor:
        """What a place gave for this job's rows."""
        return self.record.rows(self.job, place, call)

    def scored_rows(self) -> list[Tensor]:
        """Word logits [L - 1, V] of each of this ranking job's candidates, of all but their last tokens.

        Call 0 gave the first words, for all candidates of a question; the other calls gave the rest, token by token.
        """
        first, *chunks = self.record.seen.calls["words"]
        jobs, outputs = self.record.batch.jobs, self.record.outputs
        counts = [_later_tokens(job, output) for job, output in zip(jobs, outputs, strict=True)]
        own = jobs.index(self.job)
        start = sum(sum(other) for other in counts[:own])
        later = torch.cat([first[:0], *chunks])
        assert len(later) == sum(sum(each) for each in counts), "a candidate's last token has no logit"
        parts = later[start : start + sum(counts[own])].split(counts[own])
        return [torch.cat([first[own : own + 1], part]) for part in parts]


@dataclass(repr=False)
class Rows:
    """Everything that one adapter's rows gave. Lists are by clip, text or question."""

    pin: Pin
    weighs_frames: bool
    vision: list[Ran] = field(default_factory=list)
    text: list[Ran] = field(default_factory=list)
    match: list[Ran] = field(default_factory=list)  # by text, each with every clip
    generate: dict[int, list[Ran]] = field(default_factory=dict)  # by beams
    rank: list[Ran] = field(default_factory=list)
    rank_all: list[Ran] = field(default_factory=list)
    forced: list[Ran] = field(default_factory=list)
    train: list[Ran] = field(default_factory=list)

    @cached_property
    def states(self) -> list[Tensor]:
        """[T, P, D] of every clip."""
        return [cast(VisionOutput, ran.output).states for ran in self.vision]

    @cached_property
    def frames(self) -> list[Tensor]:
        """Unnormalised frame features [T, E] of every clip."""
        frames = [cast(VisionOutput, ran.output).frames for ran in self.vision]
        return [frame for frame in frames if frame is not None]

    @cached_property
    def texts(self) -> Tensor:
        """Unit text features [texts, E]."""
        return torch.stack([cast(TextOutput, ran.output).vector for ran in self.text])

    def logits(self) -> Tensor:
        """Matching logits [texts, clips, 2]."""
        return torch.stack([cast(MatchOutput, ran.output).logits for ran in self.match])

    def generated(self, num_beams: int) -> list[GenerateOutput]:
        """Answers of every question."""
        return [cast(GenerateOutput, ran.output) for ran in self.generate[num_beams]]

    def ranked(self, which: list[Ran]) -> list[RankOutput]:
        """Rankings of every question."""
        return [cast(RankOutput, ran.output) for ran in which]


@dataclass(repr=False)
class Served:
    """A case's rows by variant, its companions' rows, and the parts they went through."""

    case: Case
    backbone: Backbone
    bank: AdapterBank
    packages: dict[str, Package]
    companions: list[Companion]
    rows: dict[Variant, Rows]
    beside: dict[str, Rows]
    records: list[BatchRecord]
    metrics: Metrics
    recordings: Recordings | None = None
    recorder: Counted | None = None

    @cached_property
    def asking(self) -> list[tuple[Rows, Companion | None]]:
        """Everyone's rows, and which companion's they are: first the case's, then its twin's, so that slots of one size are
        filled side by side. Variants that come to the same adapter have the same rows.
        """
        own = list({id(rows): rows for rows in (self.rows[OWN], *self.rows.values())}.values())
        beside = [(self.beside[companion.name], companion) for companion in self.companions]
        twins = [(rows, companion) for rows, companion in beside if companion.is_twin]
        others = [(rows, companion) for rows, companion in beside if not companion.is_twin]
        return [(own[0], None), *twins, *((rows, None) for rows in own[1:]), *others]

    @property
    def asked_alike(self) -> list[Rows]:
        """Those that are asked the very same: the case's, its variants' and its twin's."""
        return [rows for rows, companion in self.asking if companion is None or companion.is_twin]

    @contextmanager
    def mixed(self, variant: Variant, x: Tensor) -> Iterator[tuple[Adaptation, Tensor, Mapping[str, slice]]]:
        """An adaptation through the bank for each row of x [B, L, D] once per adapter, one after the other, in the order of
        their slots; x on the device, and which rows are whose.
        """
        pins = {"case": self.rows[variant].pin, **{name: rows.pin for name, rows in self.beside.items()}}
        with batch_leases(self.bank) as leases:
            for pin in pins.values():
                assert leases.add(pin.digest)
            names = sorted(pins, key=lambda name: self.bank.place(pins[name].digest))
            adaptation = leases.adaptation([pins[name].digest for name in names] * len(x))
            assert adaptation is not None
            rows = {name: slice(place, None, len(names)) for place, name in enumerate(names)}
            yield adaptation, x.to(self.bank.device).repeat_interleave(len(names), 0), rows

    def slot_tensors(self, variant: Variant) -> Mapping[str, Tensor]:
        """What is in the slot of the case's adapter."""
        with batch_leases(self.bank) as leases:
            digest = self.rows[variant].pin.digest
            adaptation = leases.adaptation([digest]) if leases.add(digest) else None
            assert isinstance(adaptation, UniformAdaptation)
            return adaptation.view.tensors


def serve(case: Case, folder: Path, dtype: str = "float32", setting: Setting = SETTINGS[SERVED]) -> Served:
    """Import a case and its companions into `folder` and run every stage that its recorded outputs ask for."""
    return asyncio.run(_serve(case, folder, dtype, setting))


async def _serve(case: Case, folder: Path, dtype: str, setting: Setting) -> Served:
    backbone = import_backbone(case, folder / "backbone", dtype)
    if setting.packs:  # as a server does
        backbone.pack()
    companions = make_companions(case)
    variants = {quantity.variant for quantity in case.claimed.values()} | {OWN, WHOLE}
    documents = {v.name: {**case.document, "config": case.settings(v)} for v in variants if not v.frozen}
    documents |= {c.name: c.document for c in companions if c.document is not None}
    packages, registry, store = {}, open_registry(folder / "registry.sqlite"), LocalArtifactStore(folder / "artifacts")
    for name, document in documents.items():
        imported = import_adapter(document, backbone)
        packages[name] = write_package(
            folder / "packages" / name, imported.config, imported.tensors, f"# {name}\n", None
        )
        store.put(folder / "packages" / name)
        record = registry.add_version(name, PackageInfo.of(packages[name]))
        registry.set_alias(name, "prod", record.version)
    metrics = Metrics()
    bank = make_bank(backbone, packages.values(), metrics, setting)
    loader = Loader(registry, store, Backbones.of_one(backbone, bank, metrics), metrics)
    try:
        async with AsyncExitStack() as stack:

            async def pin(name: str) -> Pin:
                return await stack.enter_async_context(loader.pin(name, LOCAL))

            rows: dict[Variant, Rows] = {}
            for variant in sorted(variants, key=lambda v: v.name):
                found = await pin(BASE_ADAPTER if variant.frozen else variant.name)
                weighs = bool(case.settings(variant).get("frame_aware_attention")) if variant.frozen else _weighs(found)
                same = [own for own in rows.values() if own.pin.digest == found.digest and own.weighs_frames == weighs]
                rows[variant] = same[0] if same else Rows(found, weighs)
            beside = {}
            for companion in companions:
                found = await pin(BASE_ADAPTER if companion.document is None else companion.name)
                beside[companion.name] = Rows(found, _weighs(found))
            recordings = make_recordings(DEVICE) if setting.records else ()
            served = Served(case, backbone, bank, packages, companions, rows, beside, [], metrics, *recordings)
            await _run_stages(served)
            return served
    finally:
        await loader.close()
        registry.close()


def _weighs(pin: Pin) -> bool:
    return pin.config is not None and options_of(pin.config).frame_aware_attention


def import_backbone(case: Case, folder: Path, dtype: str = "float32") -> Backbone:
    """The checkpoint's frozen part as a backbone folder, loaded."""
    source = convert.read_authors(case.checkpoint)
    model, _ = convert.assemble(source, num_heads=case.num_heads, special_ids=SpecialIds(**case.special_ids))
    write_backbone(folder, model, None, {})
    return load_backbone(folder, device=str(DEVICE), dtype=dtype)


def import_adapter(document: Mapping[str, Any], backbone: Backbone) -> ImportedAdapter:
    """The checkpoint's adapter."""
    return import_uniadapter(
        document,
        dims=backbone.dims(),
        parts=backbone.parts,
        check_backbone=lambda state: convert.check_same_backbone(state, backbone),
    )


def make_bank(backbone: Backbone, packages: Iterable[Package], metrics: Metrics, setting: Setting) -> AdapterBank:
    """A bank with two buckets: one for the narrowest adapters alone, one that holds them all."""
    ranks = sorted(FAMILIES["uniadapter"].slot_rank(package.config) for package in packages)
    buckets = tuple({rank: len(ranks) for rank in (ranks[0], ranks[-1])}.items())
    return AdapterBank(
        backbone.dims(),
        backbone.head_tensors(),
        device=backbone.device,
        dtype=backbone.dtype,
        buckets=buckets,
        host_bytes=1 << 30,
        metrics=metrics,
        kernels=setting.kernels,
    )


# --- stages ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Wanted:
    """A job to run, and the list its result goes to."""

    stage: Stage
    pin: Pin
    inputs: StageInput
    into: list[Ran]
    shape: tuple[int, ...] = ()


async def run_together(served: Served, wanted: Sequence[Wanted]) -> None:
    """Queue all jobs, then start a device thread, and keep what came of each."""
    engine = RecordingEngine(
        Backbones.of_one(served.backbone, served.bank, served.metrics, served.recordings),
        Scheduler(BatchLimits(max_rows=1 << 30, max_tokens=1 << 30)),
        served.metrics,
        measured=lambda cost, seconds: None,
        on_fatal=lambda error: None,
        num_threads=1,
    )
    deadline = time.monotonic() + TIMEOUT_S
    jobs = [
        Job(w.stage, w.pin.digest, w.inputs, w.shape, rows=1, tokens=1, cost=1.0, deadline=deadline) for w in wanted
    ]
    futures = [engine.submit(job) for job in jobs]
    engine.start()
    try:
        outputs = [await asyncio.wrap_future(future) for future in futures]
    finally:
        await asyncio.to_thread(engine.stop)
    served.records += engine.records
    record_of = {job.number: record for record in engine.records for job in record.batch.jobs}
    for w, job, output in zip(wanted, jobs, outputs, strict=True):
        w.into.append(Ran(job, output, record_of[job.number]))


async def _run_stages(served: Served) -> None:
    case = served.case
    resolution = case.pixels.shape[-1]
    await run_together(
        served,
        [
            Wanted("vision", rows.pin, VisionInput(clip), rows.vision, (resolution,))
            for rows, companion in served.asking
            for clip in (case.pixels if companion is None else companion.clips)
        ],
    )
    if case.has("text_ids"):
        await _run_retrieval(served)
    if case.has("question_ids"):
        await _run_questions(served)


def _texts_of(served: Served, kind: str) -> list[tuple[Rows, list[Row]]]:
    """Every adapter's rows with its texts."""
    own = served.case.rows(kind)
    return [(rows, own if companion is None else companion.texts) for rows, companion in served.asking]


async def _run_retrieval(served: Served) -> None:
    both = _texts_of(served, "text")
    await run_together(served, [Wanted("text", r.pin, TextInput(ids), r.text) for r, texts in both for ids in texts])
    wanted = []
    for rows, texts in both:
        for text, ids in zip(rows.texts, texts, strict=True):
            similarities = [
                torch.nn.functional.normalize(f, dim=-1) @ text if rows.weighs_frames else None for f in rows.frames
            ]
            pairs = MatchInput((ids,) * len(rows.states), tuple(rows.states), tuple(similarities))
            wanted.append(Wanted("match", rows.pin, pairs, rows.match))
    await run_together(served, wanted)


async def _run_questions(served: Served) -> None:
    case = served.case
    both = _texts_of(served, "question")
    beams = {
        int(q.parameters.get("beams", 1)) for q in case.claimed.values() if q.kind in ("answer_ids", "answer_scores")
    }
    for num_beams in sorted(beams):
        wanted = []
        for rows, texts in both:
            into = rows.generate.setdefault(num_beams, [])
            for ids, states in zip(texts, rows.states, strict=True):
                question = GenerateInput(ids, states.flatten(0, 1), num_beams, case.max_length)
                wanted.append(Wanted("generate", rows.pin, question, into, (num_beams, case.max_length)))
        await run_together(served, wanted)
    await run_together(served, _ranking(served))
    if case.has("given_answer_ids"):
        given = case.rows("given_answer")
        await run_together(
            served,
            [
                Wanted("rank", rows.pin, RankInput(ids, states.flatten(0, 1), (candidate,), 1), rows.forced)
                for rows in served.asked_alike
                for ids, states, candidate in zip(case.rows("question"), rows.states, given, strict=True)
            ]
            + _companion_ranking(served),
        )


def _ranking(served: Served) -> list[Wanted]:
    case = served.case
    wanted = _companion_ranking(served)
    train: list[list[Row]] = []
    if case.has("train_answer_ids"):
        left = iter(case.rows("train_answer"))
        train = [[next(left) for _ in range(count)] for count in case.input("train_answer_counts").tolist()]
    for rows in served.asked_alike:
        decoding = rows.pin.config.decoding if rows.pin.config is not None else None
        k = decoding.rank_k if decoding is not None else int(case.config.get("k_test", 128))
        for place, (ids, states) in enumerate(zip(case.rows("question"), rows.states, strict=True)):
            y = states.flatten(0, 1)
            if case.has("answer_ids"):
                candidates = tuple(case.rows("answer"))
                wanted.append(Wanted("rank", rows.pin, RankInput(ids, y, candidates, k), rows.rank))
                wanted.append(Wanted("rank", rows.pin, RankInput(ids, y, candidates, len(candidates)), rows.rank_all))
            if train:
                own = tuple(train[place])
                wanted.append(Wanted("rank", rows.pin, RankInput(ids, y, own, len(own)), rows.train))
    return wanted


def _companion_ranking(served: Served) -> list[Wanted]:
    wanted = []
    for companion, rows in zip(served.companions, served.beside.values(), strict=True):
        if companion.answers and not companion.is_twin:
            rows.rank = []
            for ids, states in zip(companion.texts, rows.states, strict=True):
                asked = RankInput(ids, states.flatten(0, 1), tuple(companion.answers), len(companion.answers))
                wanted.append(Wanted("rank", rows.pin, asked, rows.rank))
    return wanted
