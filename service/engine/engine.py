"""The device thread: schedule, run, settle, for ever.

The one thread that touches the model and the slots. Others hand it jobs and wait for futures. Texts are written word by
word between other batches: who comes in joins at the next word, and who is done leaves. While texts are being written, other
batches get half of the device's time.
"""

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch

from adapters.errors import AdapterBankError
from service.backbone.decoding import Writing
from service.backbones import Backbones, HostedBackbone
from service.bank import BatchLeases, batch_leases
from service.engine.ahead import Ahead
from service.engine.blip_stages import medium_of
from service.engine.stages import begin_batch, run_batch
from service.engine.texts import Texts, WritingTurns
from service.errors import DeadlineExceeded, EngineFailed, NotReady
from service.logs import event
from service.metrics import Metrics
from service.scheduler import Scheduler, is_late
from service.types import Batch, Job, Stage, StageOutput

log = logging.getLogger(__name__)

T = TypeVar("T")
Result = Future[StageOutput]
STOP_TIMEOUT_S = 30.0
RETRY_S = 0.01  # when jobs wait and none may run: somebody else holds every slot
SMOOTHING = 0.2  # of what is learnt of a stage's speed
WRITE = "write"  # the stage label of a word of every text that is being written


class Engine:
    """Runs jobs. `submit` from any thread; everything else happens on the device thread.

    Jobs and cancellations arrive in an inbox, so nobody ever waits while the device thread schedules or fills slots.

    `measured(cost, seconds)` is told of every batch; `on_fatal` is called when the device is lost, and is expected to
    end the process so that its supervisor starts a fresh one.
    """

    def __init__(
        self,
        backbones: Backbones,
        scheduler: Scheduler,
        metrics: Metrics,
        *,
        measured: Callable[[float, float], None],
        on_fatal: Callable[[BaseException], None],
        num_threads: int = 0,
        max_wait_s: float = 0.0,
        max_batch_s: float = math.inf,
        prepares_ahead: bool | None = None,
    ) -> None:
        """`max_wait_s`: how long a job may wait for others to share its batch while the device has nothing to do.
        `max_batch_s`: how long a batch of several jobs may take, by their cost and the speed of the stage so far.
        `prepares_ahead`: whether the next batch's slots are filled before this one's end; None: where that runs beside it.
        """
        self.backbones = backbones
        self._scheduler = scheduler
        self._metrics = metrics
        self._measured = measured
        self._on_fatal = on_fatal
        self._num_threads = num_threads
        self._max_wait_s = max_wait_s
        self._max_batch_s = max_batch_s
        self._speeds: dict[Stage, float] = {}  # cost a second, smoothed
        for hosted in backbones:
            hosted.bank.is_wanted = scheduler.is_wanted
        self._texts = WritingTurns(scheduler)
        self._ahead = Ahead(backbones, scheduler)
        self._prepares_ahead = self._ahead.pays if prepares_ahead is None else prepares_ahead
        self._results: dict[int, Result] = {}
        self._inbox: deque[Job] = deque()
        self._cancelled: deque[int] = deque()
        self._wake = threading.Condition()
        self._is_stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, name="device", daemon=True)
        self.last_forward_at: float | None = None

    # --- for other threads -------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the device thread."""
        self._thread.start()

    def submit(self, job: Job) -> Result:
        """Queue a job. Cancelling the future drops the job, if it has not begun.

        Raises: NotReady when the engine is stopping or has failed.
        """
        result: Result = Future()
        number = job.number  # the callback lives as long as the result, and must not keep the job's tensors
        result.add_done_callback(lambda done: self._cancelled.append(number) if done.cancelled() else None)
        with self._wake:
            if self._failure is not None:
                raise NotReady(f"the device thread cannot run this any more: {self._failure}")
            if self._is_stopping:
                raise NotReady("the engine is stopping")
            self._results[job.number] = result
            self._inbox.append(job)
            self._report_queue()
            self._wake.notify()
        return result

    def stop(self) -> None:
        """Run what is queued, then end the device thread. What cannot be run any more fails. May be called twice."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)
        self._fail_all(NotReady("the engine was stopped"))

    @property
    def is_alive(self) -> bool:
        """Whether the device thread can still run jobs."""
        return self._thread.is_alive() and self._failure is None

    def _report_queue(self) -> None:
        self._metrics.queued_jobs.set(len(self._inbox) + len(self._scheduler))

    # --- the device thread -------------------------------------------------------------------------------

    def _loop(self) -> None:
        torch.set_num_threads(self._num_threads or default_threads())
        try:
            while self._failure is None and self._wait_for_work():
                self.step()
        except BaseException as error:
            log.exception("the device thread failed")
            self._fail_all(error)
            self._on_fatal(error)

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not self._has_work and not self._is_stopping:
                self._wake.wait()
            return self._has_work

    @property
    def _has_work(self) -> bool:
        return bool(self._inbox) or len(self._scheduler) > 0 or len(self._texts) > 0

    def step(self) -> None:
        """One round: run a batch, or begin its texts; then write a word of every text."""
        self._read_inbox()
        self._drop_dead()
        if self._wait_for_more():
            return
        has_run = self._run_next()
        for texts in self._texts:
            self._write(texts)
            has_run = True
        if not has_run and len(self._scheduler):
            time.sleep(RETRY_S)

    def _wait_for_more(self) -> bool:
        """Whether the first job still waits for others to share its batch; then some of that time has passed."""
        if not self._max_wait_s or self._texts or self._is_stopping or self._scheduler.has_full_batch:
            return False
        oldest = self._scheduler.oldest_submission
        left_s = 0.0 if oldest is None else oldest + self._max_wait_s - time.monotonic()
        if left_s <= 0:
            return False
        with self._wake:
            if not self._inbox:
                self._wake.wait(left_s)
        return True

    def _run_next(self) -> bool:
        """Take a batch and its slots, run it and settle its futures; False when there is none that may run."""
        self._texts.form_batch(self._is_dead)
        with batch_leases() as leases:
            batch = self._scheduler.next_batch(lambda job: self._join(job, leases), self._max_cost)
            self._report_queue()
            if batch is None:
                return False
            self._texts.formed(batch)
            if batch.stage == "generate":
                self._begin(batch, leases)
                return True
            start = time.perf_counter()
            self._run(batch, leases)
            self._texts.others_ran(time.perf_counter() - start)
            return True

    def _read_inbox(self) -> None:
        while self._inbox:
            job = self._inbox.popleft()
            if self._is_dead(job):
                self._settle_dead(job)
            else:
                self._scheduler.add(job)
                self._texts.arrived(job)

    def _drop_dead(self) -> None:
        """Settle what was cancelled or is late, before it takes a slot."""
        while self._cancelled:
            job = self._scheduler.remove(self._cancelled.popleft())
            if job is not None:
                self._settle_dead(job)
        for job in self._scheduler.remove_late(time.monotonic()):
            self._settle_dead(job)

    def _is_dead(self, job: Job, now: float | None = None) -> bool:
        result = self._results.get(job.number)
        return result is None or result.cancelled() or is_late(job, now)

    def _settle_dead(self, job: Job) -> None:
        result = self._results.pop(job.number, None)
        if result is None:  # the engine was stopped meanwhile
            return
        if result.cancelled():
            self._metrics.dropped_jobs.labels("cancelled").inc()
            return
        self._metrics.dropped_jobs.labels("deadline").inc()
        _set_error(result, DeadlineExceeded("the deadline passed before the request's turn came"))

    def _join(self, job: Job, leases: BatchLeases) -> bool:
        """Whether a job may join the batch: its adapter has a slot, or gets one, and it is its kind's turn."""
        if not self._texts.may_come_in(job):
            return False
        try:
            is_leading = not leases.num_adapters
            has_slot = leases.use(self.backbones.named(job.backbone).bank).add(job.adapter)
            if not has_slot and is_leading:
                self._texts.keep_for(job)
            if has_slot:
                self._texts.came_in(job)
            return has_slot
        except Exception as error:
            if _is_fatal(error):
                raise
            # Alive, it fails alone when it runs, with its own error; dead, it is let go next round.
            return not self._is_dead(job)

    def _max_cost(self, stage: Stage) -> float:
        """What a batch may cost. Texts end one by one and are read in little time, so they have no such limit."""
        if stage == "generate" or stage not in self._speeds:
            return math.inf
        return self._max_batch_s * self._speeds[stage]

    def _observe(self, stage: str, num_jobs: int, num_adapters: int, seconds: float) -> None:
        self._metrics.batch_seconds.labels(stage).observe(seconds)
        self._metrics.batch_jobs.labels(stage).observe(num_jobs)
        self._metrics.batch_adapters.labels(stage).observe(num_adapters)

    def _run(self, batch: Batch, leases: BatchLeases) -> None:
        """Run a batch. Whoever hears of it finds its slots given back and the metrics told."""
        done = self._timed(batch, leases, lambda: self._forward(batch, leases))
        if done is None:
            return
        outputs, seconds = done
        cost = sum(job.cost for job in batch.jobs)
        self._measured(cost, seconds)
        speed = cost / max(seconds, 1e-9)
        self._speeds[batch.stage] = SMOOTHING * speed + (1 - SMOOTHING) * self._speeds.get(batch.stage, speed)
        leases.release()
        for job, output in zip(batch.jobs, outputs, strict=True):
            self._set_output(job, output)

    def _timed(self, batch: Batch, leases: BatchLeases, run: Callable[[], T]) -> tuple[T, float] | None:
        """What came of a batch, and the seconds it took; None when it failed, and was run again item by item."""
        start = time.perf_counter()
        try:
            result = run()
        except Exception as error:
            if _is_fatal(error):
                raise
            _wait_for(self.backbones.named(batch.backbone).backbone.device)  # it may still read the slots
            leases.release()
            self._retry_alone(batch, error)
            return None
        seconds = time.perf_counter() - start
        self.last_forward_at = time.monotonic()
        self._observe(batch.stage, len(batch.jobs), leases.num_adapters, seconds)
        return result, seconds

    def _forward(self, batch: Batch, leases: BatchLeases) -> list[StageOutput]:
        """The outputs of a batch's jobs."""
        hosted, in_order = self._in_slots(batch, leases)
        outputs = self._run_stage(hosted, in_order, leases)
        of_job = {job.number: output for job, output in zip(in_order.jobs, outputs, strict=True)}
        return [of_job[job.number] for job in batch.jobs]

    def _in_slots(self, batch: Batch, leases: BatchLeases) -> tuple[HostedBackbone, Batch]:
        """A batch's backbone, and its jobs in the order of their slots, and of what they look at: neighbours share work."""
        hosted = self.backbones.named(batch.backbone)
        leases.use(hosted.bank)
        for job in batch.jobs:
            if not leases.add(job.adapter):
                raise EngineFailed(f"no slot for {job.adapter} in a batch of its own. This is a bug.")
        in_order = sorted(batch.jobs, key=lambda job: (hosted.bank.place(job.adapter), medium_of(job.inputs)))
        return hosted, Batch(tuple(map(self._ahead.on_device, in_order)))

    def _run_stage(self, hosted: HostedBackbone, batch: Batch, leases: BatchLeases) -> list[StageOutput]:
        def keep_going() -> bool:
            now = time.monotonic()
            return not all(self._is_dead(job, now) for job in batch.jobs)

        with torch.inference_mode():
            outputs = list(run_batch(hosted, batch, leases, keep_going))
            self._prepare_ahead(hosted.bank.transfers.still_busy())
            _wait_for(hosted.backbone.device)
            return outputs

    def _prepare_ahead(self, is_busy: Callable[[], bool]) -> None:
        """While the device runs a batch: bring what the next one needs. A failure is the next one's to meet."""
        if not self._prepares_ahead:
            return
        self._read_inbox()
        try:
            without: tuple[Stage, ...] = ("generate",) if self._texts.are_closed else ()
            self._ahead.prepare(without, is_busy)
        except Exception as error:
            if _is_fatal(error):
                raise
            log.warning("the next batch could not be prepared ahead: %s", error)

    # --- texts, word by word -----------------------------------------------------------------------------

    def _begin(self, batch: Batch, leases: BatchLeases) -> None:
        """Read what texts start from, and let them join those that are being written."""
        start = time.perf_counter()
        done = self._timed(batch, leases, lambda: self._read_texts(batch, leases))
        if done is None:
            return
        begun, seconds = done
        begun.leases.take(leases)
        begun.spent(seconds)
        for texts in self._texts:
            if texts.can_join(begun):
                self._join_texts(texts, begun)
                self._texts.let_in(batch.jobs, time.perf_counter() - start)
                return
        self._texts.add(begun)

    def _read_texts(self, batch: Batch, leases: BatchLeases) -> Texts:
        hosted, in_order = self._in_slots(batch, leases)
        return Texts(hosted, self._begin_stage(hosted, in_order, leases), list(in_order.jobs))

    def _begin_stage(self, hosted: HostedBackbone, batch: Batch, leases: BatchLeases) -> Writing:
        with torch.inference_mode():
            writing = begin_batch(hosted, batch, leases)
            _wait_for(hosted.backbone.device)
            return writing

    def _join_texts(self, texts: Texts, begun: Texts) -> None:
        try:
            with torch.inference_mode():
                texts.join(begun)
        except Exception as error:
            self._write_alone(texts, error, also=begun)

    def _write(self, texts: Texts) -> None:
        """Write a word of every text; settle those that ended by it, and let those go that nobody waits for."""
        start, num_jobs, num_adapters = time.perf_counter(), len(texts.jobs), texts.leases.num_adapters
        try:
            with torch.inference_mode():
                found = texts.writing.choose()
                self._settle_texts(texts, found)
                now = time.monotonic()
                dead = [place for place, job in enumerate(texts.jobs) if self._is_dead(job, now)]
                if dead:
                    texts.writing.let_go(dead)
                    for job, _ in texts.remove(dead):
                        self._settle_dead(job)
                if texts.jobs:
                    texts.writing.step()
        except Exception as error:
            self._write_alone(texts, error)
            return
        seconds = time.perf_counter() - start
        self.last_forward_at = time.monotonic()
        self._observe(WRITE, num_jobs, num_adapters, seconds)
        self._texts.wrote(seconds)
        if texts.jobs:
            texts.spent(seconds)
        else:
            self._texts.remove(texts)

    def _settle_texts(self, texts: Texts, found: Sequence[tuple[int, StageOutput]]) -> None:
        gone = texts.remove([place for place, _ in found])
        self._measured(sum(job.cost for job, _ in gone), sum(seconds for _, seconds in gone))
        for (job, _), (_, output) in zip(gone, found, strict=True):
            self._set_output(job, output)

    def _write_alone(self, texts: Texts, error: Exception, also: Texts | None = None) -> None:
        """A step of texts failed: each is written anew by itself."""
        if _is_fatal(error):
            raise error
        self._texts.remove(texts)
        jobs = list(texts.jobs)
        _wait_for(texts.hosted.backbone.device)  # it may still read the slots
        texts.leases.release()
        if also is not None:
            jobs += [job for job in also.jobs if job not in jobs]
            also.leases.release()
        self._run_each(jobs, error)

    def _retry_alone(self, batch: Batch, error: Exception) -> None:
        """A batch that failed is run again item by item, once; only what fails alone fails."""
        if len(batch.jobs) == 1:
            self._set_job_error(batch.jobs[0], error)
            return
        self._run_each(batch.jobs, error)

    def _run_each(self, jobs: Sequence[Job], error: Exception) -> None:
        log.warning("a %s batch of %d failed and is retried item by item: %s", jobs[0].stage, len(jobs), error)
        self._metrics.retried_batches.inc()
        for job in jobs:
            if self._is_dead(job):
                self._settle_dead(job)
                continue
            with batch_leases() as own:
                self._run(Batch((job,)), own)

    def _set_output(self, job: Job, output: StageOutput) -> None:
        if self._is_dead(job):
            self._settle_dead(job)
            return
        result = self._results.pop(job.number, None)
        if result is not None and result.set_running_or_notify_cancel():
            result.set_result(output)

    def _set_job_error(self, job: Job, error: Exception) -> None:
        if not isinstance(error, AdapterBankError):
            keys = event("job_failed", stage=job.stage, request_id=job.request_id or None)
            log.error("a %s job failed", job.stage, exc_info=error, extra=keys)
            error = EngineFailed(f"the {job.stage} stage failed on this input")
        _set_error(self._results.pop(job.number, None), error)

    def _fail_all(self, error: BaseException) -> None:
        """Nothing runs any more: whoever still waits hears of it."""
        with self._wake:
            self._failure = self._failure or error
            results, self._results = self._results, {}
            self._inbox.clear()
        for result in results.values():
            _set_error(result, NotReady(f"the device thread cannot run this any more: {error}"))


def _set_error(result: Result | None, error: BaseException) -> None:
    if result is not None and result.set_running_or_notify_cancel():
        result.set_exception(error)


def _wait_for(device: torch.device) -> None:
    """Until a device has done what it was told: only then is the time of a batch known, and its errors are its own."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def default_threads() -> int:
    """All processors but one, which is left to the event loop and the media workers: threads that share one stall."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


def _is_fatal(error: Exception) -> bool:
    """Whether the device is lost: CUDA reports these for every later call too."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return False
    accelerator = getattr(torch, "AcceleratorError", None)
    return (accelerator is not None and isinstance(error, accelerator)) or "CUDA error" in str(error)
