"""Texts on the device thread: who comes in joins at the next word, who is done leaves, and others have their turns.

A script stands in place of the model: `Words` texts end after as many words as their question's first id says.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from adapters.config import BASE_ADAPTER
from service.backbones import Backbones
from service.bank import BatchLeases
from service.engine import Engine, engine, texts
from service.errors import DeadlineExceeded, EngineFailed
from service.metrics import Metrics
from service.scheduler import BatchLimits, Scheduler
from service.types import Batch, ContinueInput, GenerateInput, GenerateOutput, Hypothesis, Job, StageOutput
from tests.service.test_bank import slot_leases
from tests.service.test_engine import WAIT_S, Scripted, job, put_adapters, set_clock
from tests.service.worlds import World, make_bank

MAX_ROWS, MAX_TOKENS = 4, 1000
NUMBERS = count(1_000_000)  # of jobs that are copies of others


def text(num_words: int, adapter: str = BASE_ADAPTER, *, beams: int = 1, timeout_s: float = WAIT_S) -> Job:
    asked = GenerateInput((num_words,), torch.zeros(1, 1), beams, 99)
    return replace(job(adapter, timeout_s=timeout_s), stage="generate", inputs=asked, shape=(beams,), rows=beams)


@dataclass
class Words:
    """A `Writing` of nothing but numbers of words."""

    jobs: list[Job]
    left: list[int]
    log: list[list[int]]
    num_beams: int
    fail_at: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.left)

    def choose(self) -> list[tuple[int, GenerateOutput]]:
        self.left = [words - 1 for words in self.left]
        return self.let_go([place for place, words in enumerate(self.left) if words <= 0])

    def let_go(self, places: Sequence[int]) -> list[tuple[int, GenerateOutput]]:
        found = [(place, GenerateOutput((Hypothesis((self.jobs[place].number,), 0.0),), 1.0)) for place in places]
        kept = [place for place in range(len(self.left)) if place not in places]
        self.jobs, self.left = [self.jobs[p] for p in kept], [self.left[p] for p in kept]
        return found

    def step(self) -> None:
        self.log.append([one.number for one in self.jobs])
        if any(one.number in self.fail_at for one in self.jobs):
            raise RuntimeError("a kernel says no")

    def can_join(self, other: "Words") -> bool:
        return other.num_beams == self.num_beams

    def join(self, other: "Words") -> None:
        self.jobs, self.left = self.jobs + other.jobs, self.left + other.left

    def reorder(self, places: Sequence[int]) -> None:
        self.jobs, self.left = [self.jobs[p] for p in places], [self.left[p] for p in places]


@dataclass
class ScriptedTexts(Scripted):
    """`words` is who was written, word by word; texts of `bad` jobs fail when they are written."""

    words: list[list[int]] = field(default_factory=list)
    bad: set[int] = field(default_factory=set)

    def begin_batch(self, _: object, batch: Batch, leases: BatchLeases) -> Words:
        self.batches.append(batch)
        asked = [one.inputs for one in batch.jobs]
        lengths = [(one.start_ids if isinstance(one, ContinueInput) else one.question_ids)[0] for one in asked]  # type: ignore[union-attr]
        return Words(list(batch.jobs), lengths, self.words, batch.jobs[0].shape[0], self.bad)

    def run_batch(self, model: object, batch: Batch, leases: BatchLeases, keep_going: object) -> list[StageOutput]:
        if batch.stage != "generate":
            return super().run_batch(model, batch, leases, keep_going)  # type: ignore[arg-type]
        writing = self.begin_batch(model, batch, leases)
        found: list[StageOutput] = []
        while writing.left:
            found += [output for _, output in writing.choose()]
            if writing.left:
                writing.step()
        return found

    def is_at_rest(self) -> bool:
        return super().is_at_rest() and not self.engine._texts


@pytest.fixture
def scripted(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedTexts]:
    """Stepped by hand."""
    metrics, bank = Metrics(), make_bank(world.backbone, ((4, 2), (8, 1)))
    measured: list[tuple[float, float]] = []
    device = Engine(
        Backbones.of_one(world.backbone, bank, metrics),
        Scheduler(BatchLimits(max_rows=MAX_ROWS, max_tokens=MAX_TOKENS)),
        metrics,
        measured=lambda cost, seconds: measured.append((cost, seconds)),
        on_fatal=lambda error: None,
    )
    scripted = ScriptedTexts(device, bank, metrics, measured=measured)
    monkeypatch.setattr(engine, "run_batch", scripted.run_batch)
    monkeypatch.setattr(engine, "begin_batch", scripted.begin_batch)
    yield scripted
    device.stop()


def number(result: Future[StageOutput]) -> int:
    output = result.result(0)
    assert isinstance(output, GenerateOutput)
    return output.hypotheses[0].ids[0]


def test_a_short_text_that_comes_later_ends_before_a_long_one(scripted: ScriptedTexts) -> None:
    long, short = text(6), text(2)
    first = scripted.engine.submit(long)
    scripted.engine.step()
    second = scripted.engine.submit(short)
    scripted.engine.step(), scripted.engine.step()
    assert number(second) == short.number and not first.done()
    while not first.done():
        scripted.engine.step()
    assert number(first) == long.number
    both = sorted((long.number, short.number))
    assert [sorted(row) for row in scripted.words] == [[long.number], both, *[[long.number]] * 3]
    assert scripted.is_at_rest()
    assert sum(cost for cost, _ in scripted.measured) == long.cost + short.cost


def test_newcomers_wait_for_company_where_to_let_them_in_is_dear(
    scripted: ScriptedTexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other work does not wait with them, and after half a second they come in together."""
    newcomers = scripted.engine._texts._newcomers
    for work in (1.0, 2.0):
        newcomers.price.learn(work, 5.0 + work)
    first_text = text(9)
    first = scripted.engine.submit(first_text)
    scripted.engine.step()
    for _ in range(100):
        newcomers.arrived((first_text.backbone, first_text.shape), time.monotonic())
    later = [scripted.engine.submit(text(2)), scripted.engine.submit(text(2))]
    other = scripted.engine.submit(job())
    scripted.engine.step(), scripted.engine.step()
    assert other.done() and [len(row) for row in scripted.words] == [1, 1, 1]
    now = time.monotonic()
    monkeypatch.setattr(texts, "time", SimpleNamespace(monotonic=lambda: now + 1.0))
    scripted.engine.step()
    assert [len(row) for row in scripted.words] == [1, 1, 1, 3]
    while not (first.done() and all(result.done() for result in later)):
        scripted.engine.step()
    assert [len(batch.jobs) for batch in scripted.batches if batch.stage == "generate"] == [1, 2]
    assert scripted.is_at_rest()


def test_texts_take_no_more_rows_than_a_batch_may_have(scripted: ScriptedTexts) -> None:
    results = [scripted.engine.submit(text(3 + place % 3)) for place in range(9)]
    while not all(result.done() for result in results):
        scripted.engine.step()
        assert sum(texts.num_rows for texts in scripted.engine._texts) <= MAX_ROWS
    assert max(map(len, scripted.words)) == MAX_ROWS
    lone = scripted.engine.submit(text(2, beams=2 * MAX_ROWS))  # more than there may be: alone
    results = [scripted.engine.submit(text(2))]
    while not (lone.done() and results[0].done()):
        scripted.engine.step()
    assert scripted.is_at_rest()


def test_texts_of_a_language_model_keep_no_more_tokens_than_a_batch_may_have(scripted: ScriptedTexts) -> None:
    """Its steps look at all of every text, however many came in one after the other."""
    results = []
    for _ in range(6):
        long = replace(text(4), inputs=ContinueInput((4,), None, 1, 99), tokens=MAX_TOKENS // 2)
        results.append(scripted.engine.submit(long))
        scripted.engine.step()
        assert sum(job.tokens for texts in scripted.engine._texts for job in texts.jobs) <= MAX_TOKENS
    while not all(result.done() for result in results):
        scripted.engine.step()
    assert max(map(len, scripted.words)) == 2 and scripted.is_at_rest()


def test_texts_of_other_beams_are_written_beside(scripted: ScriptedTexts) -> None:
    greedy, wide = text(3), text(3, beams=2)
    results = [scripted.engine.submit(greedy), scripted.engine.submit(wide)]
    scripted.engine.step(), scripted.engine.step()
    assert [texts.writing.num_beams for texts in scripted.engine._texts] == [1, 2]
    while not all(result.done() for result in results):
        scripted.engine.step()
    assert scripted.is_at_rest()


def test_slots_are_leased_as_long_as_their_texts_are_written(scripted: ScriptedTexts, world: World) -> None:
    long, short = put_adapters(scripted, world, (2, 4))
    results = [scripted.engine.submit(text(4, long)), scripted.engine.submit(text(2, short))]
    scripted.engine.step()
    assert slot_leases(scripted.bank) == 2
    scripted.engine.step()
    assert results[1].done() and slot_leases(scripted.bank) == 1
    more = scripted.engine.submit(text(9, long))  # the same slot again
    scripted.engine.step()
    assert slot_leases(scripted.bank) == 1
    while not all(result.done() for result in (*results, more)):
        scripted.engine.step()
    assert scripted.is_at_rest()


def test_a_text_that_nobody_waits_for_any_more_is_let_go(
    scripted: ScriptedTexts, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    (adapter,) = put_adapters(scripted, world, (2,))
    cancelled, late, kept = text(50, adapter), text(50, timeout_s=WAIT_S), text(4, timeout_s=1e9)
    results = [scripted.engine.submit(one) for one in (cancelled, late, kept)]
    scripted.engine.step()
    assert len(scripted.words[-1]) == 3
    results[0].cancel()
    scripted.engine.step()
    assert cancelled.number not in scripted.words[-1] and slot_leases(scripted.bank) == 0
    set_clock(monkeypatch, late.deadline + 1)
    scripted.engine.step()
    assert scripted.words[-1] == [kept.number]
    scripted.engine.step()
    assert number(results[2]) == kept.number
    with pytest.raises(DeadlineExceeded):
        results[1].result(0)
    with pytest.raises(CancelledError):
        results[0].result(0)
    assert scripted.is_at_rest()
    assert scripted.sample("bank_dropped_jobs_total", reason="deadline") == 1


def test_a_step_that_fails_is_retried_text_by_text_and_only_the_bad_one_fails(
    scripted: ScriptedTexts, world: World
) -> None:
    (adapter,) = put_adapters(scripted, world, (2,))
    jobs = [text(4), text(4, adapter), text(4)]
    results = [scripted.engine.submit(one) for one in jobs[:2]]
    scripted.engine.step()
    scripted.bad.add(jobs[1].number)
    results.append(scripted.engine.submit(jobs[2]))
    while not all(result.done() for result in results):
        scripted.engine.step()
    assert number(results[0]) == jobs[0].number and number(results[2]) == jobs[2].number
    with pytest.raises(EngineFailed):
        results[1].result(0)
    assert scripted.sample("bank_retried_batches_total") == 1
    assert scripted.is_at_rest()


def test_other_work_gets_its_half_beside_texts(scripted: ScriptedTexts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that took long is followed by as long a time of writing, then the next one has its turn."""
    clock = [0.0]
    monkeypatch.setattr(engine.time, "perf_counter", lambda: clock[0])

    def take(batch: Batch) -> None:
        clock[0] += 3.0

    scripted.script = take
    step = Words.step

    def write(words: Words) -> None:
        clock[0] += 1.0
        step(words)

    monkeypatch.setattr(Words, "step", write)
    writing = scripted.engine.submit(text(12))
    scripted.engine.step()
    others = [scripted.engine.submit(job(rows=MAX_ROWS)) for _ in range(2)]
    order: list[str] = []
    while not writing.done():
        before = len(scripted.words), [other.done() for other in others].count(True)
        scripted.engine.step()
        order += ["other"] * ([other.done() for other in others].count(True) - before[1])
        order += ["word"] * (len(scripted.words) - before[0])
    assert order[:8] == ["other", "word", "word", "word", "other", "word", "word", "word"]
    assert scripted.is_at_rest()


def test_a_lone_job_waits_for_company_no_longer_than_it_is_told(
    scripted: ScriptedTexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.engine._max_wait_s = 5.0
    first = scripted.engine.submit(job())
    scripted.engine._wake.acquire()  # nothing new is submitted while it waits
    monkeypatch.setattr(scripted.engine._wake, "wait", lambda timeout: waited.append(timeout))
    waited: list[float] = []
    scripted.engine._wake.release()
    scripted.engine.step()
    assert not first.done() and len(waited) == 1 and 0 < waited[0] <= 5.0
    rest = [scripted.engine.submit(job()) for _ in range(MAX_ROWS - 1)]
    scripted.engine.step()  # reads them in: the batch is full
    assert first.done() and all(other.done() for other in rest) and len(scripted.batches) == 1
    late = scripted.engine.submit(replace(job(), submitted_at=0.0))
    scripted.engine.step()
    assert late.done()


def rounds_until(scripted: ScriptedTexts, waiting: Sequence[Future[StageOutput]], comes: Job) -> int:
    """How many rounds it takes, with another text like `comes` submitted before each."""
    for rounds in range(200):
        if all(result.done() for result in waiting):
            return rounds
        scripted.engine.submit(replace(comes, number=next(NUMBERS)))
        scripted.engine.step()
    return 200


def test_texts_of_one_adapter_do_not_keep_its_slot_from_another_for_ever(scripted: ScriptedTexts, world: World) -> None:
    busy, other = put_adapters(scripted, world, (8, 8))  # there is one slot of rank 8
    scripted.engine.submit(text(3, busy))
    scripted.engine.step()
    waiting = [scripted.engine.submit(text(2, other)), scripted.engine.submit(job(other))]
    assert rounds_until(scripted, waiting, text(3, busy)) < 10
    while scripted.engine._has_work:
        scripted.engine.step()
    assert scripted.is_at_rest() and scripted.engine._texts._first is None


def test_narrow_texts_do_not_keep_room_from_a_wide_one_for_ever(scripted: ScriptedTexts) -> None:
    for _ in range(2):
        scripted.engine.submit(text(3))
        scripted.engine.step()
    wide = scripted.engine.submit(text(2, beams=MAX_ROWS))
    assert rounds_until(scripted, [wide], text(3)) < 10


def test_texts_come_in_again_when_who_waited_for_room_has_left(scripted: ScriptedTexts) -> None:
    scripted.engine.submit(text(50))
    scripted.engine.step()
    wide = scripted.engine.submit(text(2, beams=MAX_ROWS))
    scripted.engine.step()
    narrow = scripted.engine.submit(text(2))
    scripted.engine.step()
    assert scripted.engine._texts._first is not None and len(scripted.words[-1]) == 1
    wide.cancel()
    scripted.engine.step()
    assert len(scripted.words[-1]) == 2
    scripted.engine.step()
    assert narrow.done()


def test_background_work_keeps_texts_out_only_in_its_turn(scripted: ScriptedTexts, world: World) -> None:
    busy, other = put_adapters(scripted, world, (8, 8))
    scripted.engine.submit(text(50, busy))
    scripted.engine.step()
    probe = scripted.engine.submit(job(other, background=True))
    scripted.engine.step()
    assert not probe.done() and scripted.engine._texts._first is None
    scripted.engine.submit(text(2, busy))
    scripted.engine.step()  # which earns the background a share
    scripted.engine.step()
    assert scripted.engine._texts._first is not None
