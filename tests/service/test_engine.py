"""The device thread: what happens to a job on every path, and that nothing stays leased, queued or unanswered after it.

Most tests put a script in place of the model: what is tested is when it is called and with what.
"""

import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch

from adapters.config import BASE_ADAPTER
from adapters.errors import AdapterNotFound
from service import scheduler
from service.backbones import Backbones
from service.bank import AdapterBank, BatchLeases
from service.engine import Engine, engine
from service.errors import BadQuery, DeadlineExceeded, EngineFailed, NotReady
from service.metrics import Metrics
from service.scheduler import BatchLimits, Scheduler
from service.types import Batch, Job, StageOutput, TextInput, TextOutput, VisionInput
from tests.service.test_bank import host_adapter, slot_leases
from tests.service.worlds import World, make_bank

WAIT_S = 30.0
Script = Callable[[Batch], None]


def job(
    adapter: str = BASE_ADAPTER, *, word: int = 5, rows: int = 1, timeout_s: float = WAIT_S, background: bool = False
) -> Job:
    return Job(
        "text",
        adapter,
        TextInput((2, word, 3)),
        (),
        rows,
        3,
        float(rows),
        time.monotonic() + timeout_s,
        client="c",
        background=background,
    )


@dataclass
class Scripted:
    """An engine whose model is a script; `batches` is what ran, in order."""

    engine: Engine
    bank: AdapterBank
    metrics: Metrics
    script: Script = lambda batch: None
    batches: list[Batch] = field(default_factory=list)
    fatal: list[BaseException] = field(default_factory=list)
    measured: list[tuple[float, float]] = field(default_factory=list)

    def run_batch(
        self, _: object, batch: Batch, leases: BatchLeases, keep_going: Callable[[], bool]
    ) -> list[StageOutput]:
        for one in batch.jobs:
            if one.adapter != BASE_ADAPTER:
                assert one.adapter in leases._leases, "a job runs without its adapter's slot"
        self.batches.append(batch)
        self.script(batch)
        return [TextOutput(torch.full((1,), float(one.number))) for one in batch.jobs]

    def sample(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def is_at_rest(self) -> bool:
        """Nothing queued, nothing unanswered, nothing leased."""
        return not (self.engine._results or self.engine._inbox or len(self.engine._scheduler) or slot_leases(self.bank))


@pytest.fixture(params=[False, True], ids=["", "ahead"])
def scripted(world: World, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Scripted]:
    """Not started: what is submitted before `engine.start()` is there when the first batch forms.

    Also as it runs where the next batch is prepared while one runs.
    """
    metrics = Metrics()
    bank = make_bank(world.backbone, ((4, 2), (8, 1)))
    fatal: list[BaseException] = []
    measured: list[tuple[float, float]] = []
    device = Engine(
        Backbones.of_one(world.backbone, bank, metrics),
        Scheduler(BatchLimits(max_rows=4, max_tokens=1000)),
        metrics,
        measured=lambda cost, seconds: measured.append((cost, seconds)),
        on_fatal=fatal.append,
        prepares_ahead=request.param,
    )
    scripted = Scripted(device, bank, metrics, fatal=fatal, measured=measured)
    monkeypatch.setattr(engine, "run_batch", scripted.run_batch)
    yield scripted
    device.stop()


def put_adapters(scripted: Scripted, world: World, ranks: Sequence[int]) -> list[str]:
    adapters = [host_adapter(world.backbone, rank, seed) for seed, rank in enumerate(ranks)]
    for adapter in adapters:
        scripted.bank.put(adapter, hold=True)
    return [adapter.digest for adapter in adapters]


def value(result: Future[StageOutput]) -> int:
    output = result.result(WAIT_S)
    assert isinstance(output, TextOutput)
    return int(output.vector)


@contextmanager
def held_up(scripted: Scripted) -> Iterator[None]:
    """The device is busy with a batch of its own for as long as the block lasts."""
    has_begun, may_end = threading.Event(), threading.Event()
    script = scripted.script

    def wait(batch: Batch) -> None:
        has_begun.set()
        assert may_end.wait(WAIT_S)

    scripted.script = wait
    blocker = scripted.engine.submit(job(timeout_s=1e9))
    assert has_begun.wait(WAIT_S)
    scripted.script = script
    try:
        yield
    finally:
        may_end.set()
        blocker.result(WAIT_S)


def set_clock(monkeypatch: pytest.MonkeyPatch, now: float) -> None:
    """The engine's clock, and nobody else's, stands at `now`."""
    clock = SimpleNamespace(monotonic=lambda: now, perf_counter=time.perf_counter, sleep=time.sleep)
    monkeypatch.setattr(engine, "time", clock)
    monkeypatch.setattr(scheduler, "time", clock)


# --- the ordinary way ----------------------------------------------------------------------------------------


def test_each_job_gets_its_own_output(scripted: Scripted) -> None:
    jobs = [job() for _ in range(10)]
    results = [scripted.engine.submit(one) for one in jobs]
    scripted.engine.start()
    assert [value(result) for result in results] == [one.number for one in jobs]
    assert [len(batch.jobs) for batch in scripted.batches] == [4, 4, 2]
    assert scripted.engine.last_forward_at is not None
    scripted.engine.stop()
    assert [cost for cost, _ in scripted.measured] == [4.0, 4.0, 2.0]
    assert scripted.is_at_rest()


def test_jobs_of_several_adapters_share_a_batch_and_their_slots_are_given_back(
    scripted: Scripted, world: World
) -> None:
    a, b, c = put_adapters(scripted, world, (4, 4, 8))
    results = [scripted.engine.submit(job(digest)) for digest in (a, b, c, BASE_ADAPTER)]
    scripted.engine.start()
    for result in results:
        result.result(WAIT_S)
    assert [len(batch.jobs) for batch in scripted.batches] == [4]
    scripted.engine.stop()
    assert scripted.sample("bank_batch_adapters_sum", stage="text") == 4
    assert scripted.is_at_rest()


@pytest.mark.parametrize(("scripted", "ahead"), [(True, 3), (False, 0)], indirect=["scripted"])
def test_the_next_batchs_slots_are_filled_while_one_runs(
    scripted: Scripted, world: World, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fourth adapter has to wait for a slot: the batch before it has them all."""
    digests = put_adapters(scripted, world, (4, 4, 8, 4))
    prefetch, found = scripted.bank.prefetch, dict[str, bool]()
    monkeypatch.setattr(scripted.bank, "prefetch", lambda digest: found.setdefault(digest, prefetch(digest)))
    scripted.engine.start()
    with held_up(scripted):
        results = [scripted.engine.submit(job(digest)) for digest in digests]
    for result in results:
        result.result(WAIT_S)
    scripted.engine.stop()
    own = scripted.bank._metrics.registry.get_sample_value
    assert sum(found.values()) == ahead
    assert own("bank_adapter_loads_total", {"tier": "device"}) == 4, "nothing was filled twice"
    assert own("bank_adapter_hits_total", {"tier": "host"}) == 4, "copied in is copied in, ahead or not"
    assert [len(batch.jobs) for batch in scripted.batches] == [1, 3, 1], "there are three slots"
    assert scripted.is_at_rest()


@pytest.mark.parametrize("scripted", [True], indirect=True)
def test_what_cannot_be_prepared_ahead_harms_no_batch_that_runs(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no memory is left")

    monkeypatch.setattr(scripted.engine._ahead, "prepare", broken)
    results = [scripted.engine.submit(job()) for _ in range(6)]
    scripted.engine.start()
    assert [value(result) > 0 for result in results] == 6 * [True]
    assert "could not be prepared ahead: no memory is left" in caplog.text
    assert scripted.sample("bank_retried_batches_total") == 0


def test_more_adapters_than_slots_in_one_queue_all_finish(scripted: Scripted, world: World) -> None:
    digests = put_adapters(scripted, world, [4] * 12)
    results = [scripted.engine.submit(job(digests[i % 12])) for i in range(48)]
    scripted.engine.start()
    for result in results:
        result.result(WAIT_S)
    assert all(len({one.adapter for one in batch.jobs}) <= 3 for batch in scripted.batches)
    scripted.engine.stop()
    assert scripted.is_at_rest()


def test_the_forward_runs_without_gradients_on_the_device_thread(scripted: Scripted) -> None:
    seen: list[tuple[bool, str]] = []
    scripted.script = lambda batch: seen.append((torch.is_inference_mode_enabled(), threading.current_thread().name))
    scripted.engine.start()
    scripted.engine.submit(job()).result(WAIT_S)
    assert seen == [(True, "device")]


# --- cancelling and deadlines --------------------------------------------------------------------------------


def test_a_job_cancelled_in_the_queue_never_runs(scripted: Scripted) -> None:
    kept, dropped = job(), job()
    results = [scripted.engine.submit(one) for one in (kept, dropped)]
    assert results[1].cancel()
    scripted.engine.start()
    assert value(results[0]) == kept.number
    assert [batch.jobs for batch in scripted.batches] == [(kept,)]
    assert scripted.sample("bank_dropped_jobs_total", reason="cancelled") == 1


def test_a_job_cancelled_while_others_run_never_runs(scripted: Scripted) -> None:
    scripted.engine.start()
    with held_up(scripted):
        first = scripted.engine.submit(job())
        dropped = scripted.engine.submit(job())
        assert dropped.cancel()
    value(first)
    assert [len(batch.jobs) for batch in scripted.batches] == [1, 1]
    with pytest.raises(CancelledError):
        dropped.result(WAIT_S)


def test_a_job_cancelled_while_it_runs_is_let_go(scripted: Scripted) -> None:
    results: list[Future[StageOutput]] = []
    scripted.script = lambda batch: results[0].cancel() and None
    results.append(scripted.engine.submit(job()))
    other = scripted.engine.submit(job())
    scripted.engine.start()
    other.result(WAIT_S)
    assert results[0].cancelled()
    scripted.engine.stop()
    assert not scripted.fatal
    assert scripted.is_at_rest()


def test_a_job_whose_deadline_passes_in_the_queue_never_runs(scripted: Scripted) -> None:
    late = scripted.engine.submit(job(timeout_s=0.0))
    on_time = scripted.engine.submit(job())
    scripted.engine.start()
    with pytest.raises(DeadlineExceeded):
        late.result(WAIT_S)
    on_time.result(WAIT_S)
    assert [len(batch.jobs) for batch in scripted.batches] == [1]
    assert scripted.sample("bank_dropped_jobs_total", reason="deadline") == 1


def test_a_deadline_that_passes_in_the_queue_of_a_busy_device_is_told_too(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.engine.start()
    with held_up(scripted):
        late, on_time = scripted.engine.submit(job(timeout_s=1000)), scripted.engine.submit(job(timeout_s=10_000))
        set_clock(monkeypatch, time.monotonic() + 2000)
    with pytest.raises(DeadlineExceeded):
        late.result(WAIT_S)
    on_time.result(WAIT_S)


def test_a_deadline_that_passes_while_the_job_runs_is_told(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    def outlast(batch: Batch) -> None:
        set_clock(monkeypatch, time.monotonic() + 2 * WAIT_S)

    scripted.script = outlast
    result, patient = scripted.engine.submit(job()), scripted.engine.submit(job(timeout_s=1000 * WAIT_S))
    scripted.engine.start()
    with pytest.raises(DeadlineExceeded):
        result.result(WAIT_S)
    patient.result(WAIT_S)


def test_decoding_goes_on_while_anybody_still_wants_it(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[bool] = []
    results: list[Future[StageOutput]] = []

    def decode(
        model: object, batch: Batch, leases: BatchLeases, keep_going: Callable[[], bool]
    ) -> Sequence[StageOutput]:
        for result in results:
            answers.append(keep_going())
            result.cancel()
        answers.append(keep_going())
        return [TextOutput(torch.zeros(1)) for _ in batch.jobs]

    monkeypatch.setattr(engine, "run_batch", decode)
    results += [scripted.engine.submit(job()) for _ in range(3)]
    scripted.engine.start()
    scripted.engine.stop()
    assert answers == [True, True, True, False]


# --- failures ------------------------------------------------------------------------------------------------


def fail_on(bad: Job, error: Exception) -> Script:
    def script(batch: Batch) -> None:
        if bad in batch.jobs:
            raise error

    return script


def test_a_batch_that_fails_is_run_again_item_by_item_and_only_the_bad_item_fails(scripted: Scripted) -> None:
    jobs = [job() for _ in range(4)]
    scripted.script = fail_on(jobs[1], RuntimeError("a kernel says no"))
    results = [scripted.engine.submit(one) for one in jobs]
    scripted.engine.start()
    assert [value(results[i]) for i in (0, 2, 3)] == [jobs[i].number for i in (0, 2, 3)]
    with pytest.raises(EngineFailed, match="text stage"):
        results[1].result(WAIT_S)
    assert [len(batch.jobs) for batch in scripted.batches] == [4, 1, 1, 1, 1]
    scripted.engine.stop()
    assert scripted.sample("bank_retried_batches_total") == 1
    assert [cost for cost, _ in scripted.measured] == [1.0, 1.0, 1.0]  # what failed says nothing about the speed
    assert scripted.is_at_rest()


def test_a_domain_error_reaches_its_job_as_it_is(scripted: Scripted) -> None:
    bad = job()
    scripted.script = fail_on(bad, BadQuery("no such word", param="question"))
    result, other = scripted.engine.submit(bad), scripted.engine.submit(job())
    scripted.engine.start()
    with pytest.raises(BadQuery, match="no such word"):
        result.result(WAIT_S)
    other.result(WAIT_S)


def test_running_out_of_memory_is_not_fatal(scripted: Scripted) -> None:
    """Each item fits alone."""

    def script(batch: Batch) -> None:
        if len(batch.jobs) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory; CUDA error")

    scripted.script = script
    results = [scripted.engine.submit(job()) for _ in range(4)]
    scripted.engine.start()
    for result in results:
        result.result(WAIT_S)
    assert scripted.engine.is_alive
    assert not scripted.fatal


def test_items_that_die_while_others_are_retried_are_not_run(scripted: Scripted) -> None:
    jobs = [job() for _ in range(3)]
    results = [scripted.engine.submit(one) for one in jobs]

    def script(batch: Batch) -> None:
        if len(batch.jobs) > 1:
            results[2].cancel()
            raise RuntimeError("oops")

    scripted.script = script
    scripted.engine.start()
    value(results[0])
    value(results[1])
    scripted.engine.stop()
    assert [len(batch.jobs) for batch in scripted.batches] == [3, 1, 1]
    assert scripted.is_at_rest()


def test_an_adapter_that_is_not_on_the_host_fails_its_own_job_alone(scripted: Scripted, world: World) -> None:
    """The pipelines pin what they submit, so this is a bug elsewhere: it must stay one request's problem."""
    (known,) = put_adapters(scripted, world, [4])
    lost = scripted.engine.submit(job("sha256:" + 64 * "e"))
    others = [scripted.engine.submit(job(known)) for _ in range(2)]
    scripted.engine.start()
    with pytest.raises(AdapterNotFound):
        lost.result(WAIT_S)
    for other in others:
        other.result(WAIT_S)
    scripted.engine.stop()
    assert scripted.is_at_rest()


def test_a_slot_that_cannot_be_filled_fails_its_own_job_alone(
    scripted: Scripted, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = put_adapters(scripted, world, [4, 4])
    fill = scripted.bank._fill

    def broken(slot, adapter) -> None:  # type: ignore[no-untyped-def]
        if adapter.digest == bad:
            raise RuntimeError("the copy failed")
        fill(slot, adapter)

    monkeypatch.setattr(scripted.bank, "_fill", broken)
    results = [scripted.engine.submit(job(digest)) for digest in (good, bad, good)]
    scripted.engine.start()
    with pytest.raises(EngineFailed):
        results[1].result(WAIT_S)
    value(results[0])
    value(results[2])
    assert scripted.engine.is_alive
    scripted.engine.stop()
    assert scripted.is_at_rest()


def test_a_lost_device_fails_everybody_and_calls_for_the_end(scripted: Scripted) -> None:
    def script(batch: Batch) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    scripted.script = script
    results = [scripted.engine.submit(job()) for _ in range(9)]
    scripted.engine.start()
    for result in results:
        with pytest.raises(NotReady, match="illegal memory access"):
            result.result(WAIT_S)
    scripted.engine.stop()
    assert len(scripted.fatal) == 1
    assert not scripted.engine.is_alive
    with pytest.raises(NotReady):
        scripted.engine.submit(job())
    assert slot_leases(scripted.bank) == 0
    assert not scripted.engine._results


# --- the end -------------------------------------------------------------------------------------------------


def test_stopping_runs_what_is_queued_and_takes_nothing_new(scripted: Scripted) -> None:
    results = [scripted.engine.submit(job()) for _ in range(9)]
    scripted.engine.start()
    scripted.engine.stop()
    assert [result.done() for result in results] == [True] * 9
    for result in results:
        result.result(0)
    with pytest.raises(NotReady):
        scripted.engine.submit(job())
    scripted.engine.stop()
    assert scripted.is_at_rest()


def test_stopping_an_engine_that_never_started_fails_what_it_was_given(scripted: Scripted) -> None:
    result = scripted.engine.submit(job())
    scripted.engine.stop()
    with pytest.raises(NotReady):
        result.result(0)
    assert not scripted.fatal


def test_stopping_does_not_wait_for_ever_and_tells_who_waits(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward that hangs: the futures fail, and what it gives in the end is nobody's any more."""
    monkeypatch.setattr(engine, "STOP_TIMEOUT_S", 0.05)
    scripted.engine.start()
    has_begun, may_end = threading.Event(), threading.Event()

    def hang(batch: Batch) -> None:
        has_begun.set()
        assert may_end.wait(WAIT_S)

    scripted.script = hang
    running = scripted.engine.submit(job())
    assert has_begun.wait(WAIT_S)
    queued = scripted.engine.submit(job())
    scripted.engine.stop()
    for result in (running, queued):
        with pytest.raises(NotReady):
            result.result(0)
    may_end.set()
    scripted.engine._thread.join(WAIT_S)
    assert not scripted.engine._thread.is_alive()
    assert not scripted.fatal
    assert len(scripted.batches) == 1


def test_a_result_does_not_keep_its_job_alive(scripted: Scripted) -> None:
    """A job holds the pixels of a clip; whoever keeps the answer must not keep them."""
    pixels = torch.zeros(1)
    is_alive = weakref.ref(pixels)
    one = replace(job(), inputs=VisionInput(pixels))
    del pixels
    result = scripted.engine.submit(one)
    del one
    scripted.engine.start()
    result.result(WAIT_S)
    scripted.batches.clear()
    scripted.engine.submit(job()).result(WAIT_S)  # the thread has let go of the batch before
    gc.collect()
    assert is_alive() is None


# --- everything at once --------------------------------------------------------------------------------------


def test_a_job_that_lost_its_request_and_its_adapter_spoils_no_batch(scripted: Scripted, world: World) -> None:
    """Who leaves gives up the pin at once; the job may be met a moment later, when its adapter is gone from the host."""
    (known,) = put_adapters(scripted, world, [4])
    results: list[Future[StageOutput]] = []
    lease = scripted.bank.try_lease

    def leave_then_lease(digest: str) -> object:
        if digest != known:
            results[1].cancel()
        return lease(digest)

    scripted.bank.try_lease = leave_then_lease  # type: ignore[method-assign, assignment]
    results += [scripted.engine.submit(job(digest)) for digest in (known, "sha256:" + 64 * "e", known)]
    scripted.engine.start()
    value(results[0])
    value(results[2])
    scripted.engine.stop()
    assert [len(batch.jobs) for batch in scripted.batches] == [2]
    assert scripted.sample("bank_retried_batches_total") == 0
    assert scripted.is_at_rest()


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_nothing_stays_leased_held_queued_or_unanswered(
    scripted: Scripted, world: World, seed: int
) -> None:
    """Threads submit, cancel and let deadlines pass while batches fail and few slots are shared by many adapters."""
    rng = random.Random(seed)
    digests = [host_adapter(world.backbone, rank, number) for number, rank in enumerate((2, 4, 4, 4, 4, 8, 8))]
    scripted.bank._host_bytes = digests[1].num_bytes  # whatever nobody holds is evicted at once
    bad: set[int] = set()

    def script(batch: Batch) -> None:
        if any(one.number in bad for one in batch.jobs):
            raise RuntimeError("oops")

    scripted.script = script
    outcomes: list[str] = []
    problems: list[BaseException] = []

    def client(seed: int) -> None:
        own = random.Random(seed)
        try:
            for _ in range(40):
                adapter = own.choice(digests)
                digest = own.choice([adapter.digest, adapter.digest, BASE_ADAPTER])
                if digest != BASE_ADAPTER and not scripted.bank.hold(digest):
                    scripted.bank.put(adapter, hold=True)
                one = job(digest, rows=own.choice((1, 1, 2, 9)), timeout_s=own.choice((0.0, 0.002, WAIT_S, WAIT_S)))
                if own.random() < 0.2:
                    bad.add(one.number)
                result = scripted.engine.submit(one)
                if own.random() < 0.3:
                    result.cancel()
                try:
                    output = result.result(WAIT_S)
                    assert isinstance(output, TextOutput)
                    assert int(output.vector) == one.number
                    assert one.number not in bad
                    outcomes.append("answered")
                except (CancelledError, DeadlineExceeded, EngineFailed) as error:
                    outcomes.append(type(error).__name__)
                finally:
                    scripted.bank.release(digest)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=client, args=(rng.random(),)) for _ in range(4)]
    scripted.engine.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    scripted.engine.stop()
    assert not problems
    assert not scripted.fatal
    assert len(outcomes) == 4 * 40
    assert {"answered", "CancelledError", "DeadlineExceeded", "EngineFailed"} <= set(outcomes)
    assert scripted.is_at_rest()
    assert all(entry.num_holders == 0 for entry in scripted.bank._host.values())
    assert scripted.sample("bank_queued_jobs") == 0
