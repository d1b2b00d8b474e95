"""A request's answer does not depend on its batch: alone or in any mix, the same numbers, ids and choices.

By every kernel and in every precision. In float32 numbers are within 1e-5 + 1e-5 |b|; in bfloat16 and float16 1e-5 becomes 8
times the rounding of a single number (2^-8 and 2^-11), of which 5 were seen. Where numbers are small, as those of a unit
vector, their root mean square stands in for 1. Ids and choices are equal unless the lone run decided by less than 1e-4, in the
others by less than 12 times that rounding, and of all answers at most a quarter differs; those cases are counted and shown.
"""

import math
import random
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import JsonValue
from torch import Tensor

from adapters.config import BASE_ADAPTER
from adapters.package import write_package
from service.backbone.base import Backbone
from service.backbone.folder import load_backbone
from service.backbones import Backbones
from service.bank import AdapterBank
from service.engine import Engine
from service.metrics import Metrics
from service.scheduler import BatchLimits, Scheduler
from service.types import (
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
from tests.devices import DEVICE, PRECISIONS
from tests.kernels import SERVED, SETTINGS, Setting, settings_of, watching
from tests.service.test_bank import slot_leases
from tests.service.worlds import EMBED_DIM, PATCH, WIDTH, adapter_config, random_tensors, write_tiny_backbone
from tests.tape import make_recordings


@dataclass(frozen=True)
class Bounds:
    """What numbers may differ by, absolutely and relatively, and below which gap of log-probabilities a choice may fall
    either way.
    """

    numbers: float
    near_tie: float


BOUNDS = {
    "float32": Bounds(1e-5, 1e-4),
    "bfloat16": Bounds(8 * 2.0**-8, 12 * 2.0**-8),
    "float16": Bounds(8 * 2.0**-11, 12 * 2.0**-11),
}
RUNNERS = [(dtype, name) for dtype in PRECISIONS for name in settings_of(DEVICE)]
NUM_EXAMPLES = {"float32": 60, "bfloat16": 32, "float16": 32}
NUM_AS_SERVED = 250  # in float32
HEADS = ("vision_proj", "text_proj", "itm_head")
ADAPTERS: tuple[
    tuple[int, dict[str, JsonValue], tuple[str, ...]], ...
] = (  # rank, options, heads; two of them always want the wide bucket's slots, and two are of one size
    (3, {}, HEADS),
    (8, {"kv_rank": 2}, ()),
    (8, {"query_residual": False}, ()),
    (6, {"kv_rank": 9, "query_residual": False}, ("itm_head",)),
    (11, {"frame_aware_attention": True, "multimodal": True, "textual": False}, ("vision_proj", "text_proj")),
)
ALIKE = (1, 2)
BUCKETS = ((8, 2), (12, 2))  # fewer slots than adapters: some mixes must wait for each other


@dataclass(frozen=True)
class Ask:
    """A request, small enough to draw and to remember. `seed` decides its contents."""

    stage: Stage
    adapter: int  # into ADAPTERS; -1 is __base__
    length: int
    frames: int
    side: int  # patches per side
    beams: int
    count: int  # pairs, or candidates
    seed: int


ASKS = st.builds(
    Ask,
    stage=st.sampled_from(("vision", "text", "match", "generate", "rank")),
    adapter=st.integers(-1, len(ADAPTERS) - 1),
    length=st.integers(3, 12),
    frames=st.integers(1, 3),
    side=st.integers(1, 3),
    beams=st.sampled_from((1, 3)),
    count=st.integers(1, 5),
    seed=st.integers(0, 3),
)


class Runner:
    """A bank of four adapters, and engines that are stepped by hand."""

    def __init__(self, folder: Path, setting: Setting, dtype: str) -> None:
        self.setting = setting
        self.bounds = BOUNDS[dtype]
        write_tiny_backbone(folder / "backbone")
        self.backbone: Backbone = load_backbone(folder / "backbone", device=str(DEVICE), dtype=dtype)
        if setting.packs:
            self.backbone.pack()
        self.metrics = Metrics()
        self.recordings, self.recorder = make_recordings(DEVICE) if setting.records else (None, None)
        self.bank = self._new_bank()
        self.digests: list[str] = []
        self.media: dict[tuple[int, int], Tensor] = {}
        for seed, (rank, options, heads) in enumerate(ADAPTERS):
            config = adapter_config(self.backbone, rank=rank, options=options, heads=heads)
            tensors = random_tensors(config, self.backbone.dims(), seed)
            package = write_package(folder / str(seed), config, tensors, "", None)
            self.bank.put(self.bank.fold(package), hold=True)
            self.digests.append(package.weights_digest)

    def _new_bank(self) -> AdapterBank:
        return AdapterBank(
            self.backbone.dims(),
            self.backbone.head_tensors(),
            device=self.backbone.device,
            dtype=self.backbone.dtype,
            buckets=BUCKETS,
            host_bytes=1 << 30,
            metrics=self.metrics,
            kernels=self.setting.kernels,
        )

    def empty_slots(self) -> None:
        """As if nothing had run: adapters get slots in the order they are asked for."""
        adapters = list(map(self.bank.adapter, self.digests))
        self.bank = self._new_bank()
        for adapter in adapters:
            self.bank.put(adapter, hold=True)

    def run(self, jobs: list[Job], max_rows: int) -> list[StageOutput]:
        """Queue all, then step until every one has its output."""
        engine = self.engine(max_rows)
        results = [engine.submit(job) for job in jobs]
        while not all(result.done() for result in results):
            engine.step()
        assert not self.metrics.registry.get_sample_value("bank_retried_batches_total"), (
            "a batch failed, and ran item by item"
        )
        return [result.result() for result in results]

    def engine(self, max_rows: int) -> Engine:
        """One that is stepped by hand."""
        return Engine(
            Backbones.of_one(self.backbone, self.bank, self.metrics, self.recordings),
            Scheduler(BatchLimits(max_rows=max_rows, max_tokens=1 << 30)),
            self.metrics,
            measured=lambda cost, seconds: None,
            on_fatal=lambda error: None,
        )

    def job(self, ask: Ask) -> Job:
        inputs, shape, rows = self._inputs(ask)
        adapter = BASE_ADAPTER if ask.adapter < 0 else self.digests[ask.adapter]
        deadline = time.monotonic() + 600
        return Job(ask.stage, adapter, inputs, shape, rows=rows, tokens=rows, cost=float(rows), deadline=deadline)

    def medium(self, seed: int, tokens: int) -> Tensor:
        """States [M, D] of a medium: the very same ones for all who ask about it, as the cache gives them."""
        if (seed, tokens) not in self.media:
            generator = torch.Generator().manual_seed(1000 + seed)
            self.media[seed, tokens] = self._states(torch.randn(tokens, WIDTH, generator=generator))
        return self.media[seed, tokens]

    def _states(self, states: Tensor) -> Tensor:
        """As the vision stage would give them."""
        return states.to(self.backbone.device, self.backbone.dtype)

    def _inputs(self, ask: Ask) -> tuple[StageInput, tuple[int, ...], int]:
        generator = torch.Generator().manual_seed(ask.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def words(length: int, first: int) -> tuple[int, ...]:
            return (first, *torch.randint(8, 40, (length - 2,), generator=generator).tolist(), ids.sep)

        ids, tokens = self.backbone.config.special_ids, ask.side**2 + 1
        match ask.stage:
            case "vision":
                size = ask.side * PATCH
                return VisionInput(normal(ask.frames, 3, size, size)), (size,), ask.frames
            case "text":
                return TextInput(words(ask.length, ids.cls)), (), 1
            case "match":
                texts = tuple(words(ask.length + i % 2, ids.cls) for i in range(ask.count))
                clips = tuple(self._states(normal(1 + (ask.frames + i) % 3, tokens, WIDTH)) for i in range(ask.count))
                weighed = tuple(3 * normal(len(clip)) if ask.seed % 2 else None for clip in clips)
                return MatchInput(texts, clips, weighed), (), ask.count
            case "generate":
                states = self.medium(ask.seed, ask.frames * tokens)
                return GenerateInput(words(ask.length, ids.cls), states, ask.beams, 6), (ask.beams, 6), ask.beams
            case "rank":
                candidates = tuple(words(3 + i % 3, ids.bos) for i in range(ask.count + 1))
                states = self.medium(ask.seed, ask.frames * tokens)
                return RankInput(words(ask.length, ids.cls), states, candidates, ask.count), (), ask.count


def ranking_gap(alone: RankOutput, every: RankOutput, asked: RankInput) -> float:
    """The smallest distance behind a lone ranking's choices, of log-probabilities of first words and of scores; candidates
    with one first word tie exactly, and by index.
    """
    places = every.indices[: len(alone.indices) + 1]
    log_probs = [math.log(prob) for prob in every.first_token_probs]
    gaps = [
        log_probs[i] - log_probs[i + 1]
        for i in range(len(places) - 1)
        if asked.candidates[places[i]][1] != asked.candidates[places[i + 1]][1]
    ]
    best = sorted(alone.scores, reverse=True)
    return min([*gaps, *(best[0] - score for score in best[1:2])], default=float("inf"))


class Check:
    """Compares a mixed run with the lone one, counting what was compared and what was too close to call."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.bounds = runner.bounds
        self.counts: Counter[str] = Counter()
        self.alone = cache(lambda ask: runner.run([runner.job(ask)], 1 << 30)[0])
        self.every = cache(self._rank_all)

    def _rank_all(self, ask: Ask) -> StageOutput:
        """A ranking with every candidate on the shortlist."""
        job = self.runner.job(ask)
        assert isinstance(job.inputs, RankInput)
        whole = RankInput(job.inputs.question_ids, job.inputs.states, job.inputs.candidates, len(job.inputs.candidates))
        again = Job("rank", job.adapter, whole, (), rows=1, tokens=1, cost=1.0, deadline=job.deadline)
        return self.runner.run([again], 1 << 30)[0]

    def near(self, a: Tensor, b: Tensor) -> bool:
        """Whether numbers are near enough."""
        a, b = a.float(), b.float()
        least = b.square().mean().sqrt().clamp(max=1.0)
        return a.shape == b.shape and bool(((a - b).abs() <= self.bounds.numbers * (least + b.abs())).all())

    def __call__(self, ask: Ask, mixed: StageOutput) -> None:
        self.counts[ask.stage] += 1
        alone = self.alone(ask)
        match alone, mixed:
            case VisionOutput(), VisionOutput():
                assert self.near(mixed.states, alone.states)
                assert mixed.frames is not None and alone.frames is not None and self.near(mixed.frames, alone.frames)
            case TextOutput(), TextOutput():
                assert self.near(mixed.vector, alone.vector)
            case MatchOutput(), MatchOutput():
                assert self.near(mixed.logits, alone.logits)
            case GenerateOutput(), GenerateOutput():
                self._generated(ask, alone, mixed)
            case RankOutput(), RankOutput():
                self._ranked(ask, alone, mixed)
            case _:
                raise AssertionError(f"{type(alone)} alone, {type(mixed)} in the mix")

    def _generated(self, ask: Ask, alone: GenerateOutput, mixed: GenerateOutput) -> None:
        same = [h.ids for h in alone.hypotheses] == [h.ids for h in mixed.hypotheses]
        if not same:
            assert alone.gap < self.bounds.near_tie, "another answer in the mix"
            self.counts["generate: another answer, but too close to call"] += 1
            return
        self.counts["generate: too close to call, same answer"] += alone.gap < self.bounds.near_tie
        assert self.near(
            torch.tensor([h.score for h in mixed.hypotheses]), torch.tensor([h.score for h in alone.hypotheses])
        )

    def _ranked(self, ask: Ask, alone: RankOutput, mixed: RankOutput) -> None:
        asked, every = self.runner.job(ask).inputs, self.every(ask)
        assert isinstance(asked, RankInput) and isinstance(every, RankOutput)
        is_close = ranking_gap(alone, every, asked) < self.bounds.near_tie
        if (alone.indices, alone.best) != (mixed.indices, mixed.best):
            assert is_close, "another choice in the mix"
            self.counts["rank: another choice, but too close to call"] += 1
            return
        self.counts["rank: too close to call, same choice"] += is_close
        assert self.near(torch.tensor(mixed.scores), torch.tensor(alone.scores))
        log_probs = [torch.tensor(ranking.first_token_probs).log() for ranking in (mixed, alone)]
        assert self.near(*log_probs)


@pytest.fixture(scope="module", params=RUNNERS, ids=lambda names: ", ".join(names))
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    dtype, name = request.param
    return Runner(tmp_path_factory.mktemp("independence"), SETTINGS[name], dtype)


def test_no_answer_depends_on_its_batch(
    runner: Runner, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    check = Check(runner)
    dtype, name = request.node.callspec.params["runner"]
    num_examples = NUM_AS_SERVED if (dtype, name) == ("float32", SERVED) else NUM_EXAMPLES[dtype]

    @settings(
        max_examples=num_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(asks=st.lists(ASKS, min_size=2, max_size=9), max_rows=st.sampled_from((1, 4, 64)))
    def mixes(asks: list[Ask], max_rows: int) -> None:
        outputs = runner.run([runner.job(ask) for ask in asks], max_rows)
        for ask, output in zip(asks, outputs, strict=True):
            check(ask, output)

    mixes()
    with capsys.disabled():
        print(
            f"\nalone against the mix, {dtype}, {name}:",
            ", ".join(f"{name} {count}" for name, count in sorted(check.counts.items())),
        )
    for stage, kind in (("generate", "answer"), ("rank", "choice")):
        assert 4 * check.counts[f"{stage}: another {kind}, but too close to call"] <= check.counts[stage]
    assert min(check.counts[stage] for stage in ("vision", "text", "match", "generate", "rank")) > num_examples / 4


@pytest.mark.parametrize("stage", ["vision", "text", "match", "generate", "rank"])
def test_one_stage_with_every_adapter_at_once(runner: Runner, stage: Stage) -> None:
    """All in one queue, twice over, in sizes that pad each other: several share every batch, the two of one size first, side by
    side and with as many rows each.
    """
    runner.empty_slots()
    check = Check(runner)
    asks = [
        Ask(
            stage,
            adapter,
            3 + 2 * (place % 10),
            1 + place // 3 % 3,
            2 if stage == "vision" else 1 + place % 3,
            3,
            2,
            place % 4,
        )
        for place, adapter in enumerate([-1, *ALIKE, 0, 3, 4] * 2)
    ]
    with watching(runner.setting) as watch:
        outputs = runner.run([runner.job(ask) for ask in asks], 1 << 30)
    for ask, output in zip(asks, outputs, strict=True):
        check(ask, output)
    if runner.setting.only is not None:
        assert runner.setting.only in watch.kernels
    summed = runner.metrics.registry.get_sample_value("bank_batch_adapters_sum", {"stage": stage})
    counted = runner.metrics.registry.get_sample_value("bank_batch_adapters_count", {"stage": stage})
    assert summed is not None and counted is not None and summed > counted


def test_texts_that_come_in_at_any_word_are_written_as_alone(runner: Runner) -> None:
    """Questions arrive while others are being answered, with other adapters, lengths and limits; some are given up."""
    check, chance = Check(runner), random.Random(7)
    for beams in (1, 3):
        asks = [
            Ask(
                "generate",
                chance.randint(-1, len(ADAPTERS) - 1),
                chance.randint(3, 12),
                1,
                1 + number % 3,
                beams,
                2,
                number % 4,
            )
            for number in range(24)
        ]
        engine = runner.engine(max_rows=64)
        results: list[Future[StageOutput]] = []
        given_up: set[int] = set()
        most = 0
        while len(results) < len(asks) or not all(result.done() for result in results):
            for ask in asks[len(results) : len(results) + chance.choice((0, 1, 1, 2))]:
                results.append(engine.submit(runner.job(ask)))
            if results and chance.random() < 0.1:
                number = chance.randrange(len(results))
                if results[number].cancel():
                    given_up.add(number)
            engine.step()
            most = max([most, *(len(texts.jobs) for texts in engine._texts)])
        assert most > 3 and 0 < len(given_up) < 12
        for number, (ask, result) in enumerate(zip(asks, results, strict=True)):
            if number not in given_up:
                check(ask, result.result())
        assert not engine._texts and not slot_leases(runner.bank)
    if runner.recordings is not None and runner.recorder is not None:
        assert runner.recorder.num_played > runner.recorder.num_recorded > 1
        assert not runner.recordings.has_failed


def test_an_answer_does_depend_on_its_adapter(runner: Runner) -> None:
    """Else the tests above would show nothing: answers of different adapters are further apart than what is allowed."""
    check = Check(runner)
    for stage in ("vision", "text", "match", "generate", "rank"):
        answers = [check.alone(Ask(stage, adapter, 7, 2, 2, 3, 4, 1)) for adapter in range(-1, len(ADAPTERS))]
        assert len({_fingerprint(answer) for answer in answers}) == len(answers)
        if stage in ("vision", "text", "match"):
            for one, other in combinations(answers, 2):
                assert not check.near(*(torch.tensor(_fingerprint(answer)) for answer in (one, other)))


def _fingerprint(output: StageOutput) -> tuple[float, ...]:
    match output:
        case VisionOutput():
            assert output.frames is not None and output.frames.shape[-1] == EMBED_DIM
            return tuple(output.states.flatten().tolist())
        case TextOutput():
            return tuple(output.vector.tolist())
        case MatchOutput():
            return tuple(output.logits.flatten().tolist())
        case GenerateOutput():
            return tuple(h.score for h in output.hypotheses)
        case RankOutput():
            return output.scores
