"""The device thread: schedule, run, settle, for ever.

The one thread that touches the model and the slots. Others hand it jobs and wait for futures.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import torch

from adapters.errors import AdapterBankError
from service.backbones import Backbones, HostedBackbone
from service.bank import BatchLeases, batch_leases
from service.engine.stages import run_batch
from service.errors import DeadlineExceeded, EngineFailed, NotReady
from service.logs import event
from service.metrics import Metrics
from service.scheduler import Scheduler, is_late
from service.types import Batch, Job, StageOutput

log = logging.getLogger(__name__)

Result = Future[StageOutput]
STOP_TIMEOUT_S = 30.0
RETRY_S = 0.01  # when jobs wait and none may run: somebody else holds every slot


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
    ) -> None:
        self.backbones = backbones
        self._scheduler = scheduler
        self._metrics = metrics
        self._measured = measured
        self._on_fatal = on_fatal
        self._num_threads = num_threads
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
            while not self._inbox and not len(self._scheduler) and not self._is_stopping:
                self._wake.wait()
            return bool(self._inbox) or len(self._scheduler) > 0

    def step(self) -> None:
        """One round: take a batch and its slots, run it, settle its futures."""
        self._read_inbox()
        self._drop_dead()
        with batch_leases() as leases:
            batch = self._scheduler.next_batch(lambda job: self._join(job, leases))
            self._report_queue()
            if batch is not None:
                self._run(batch, leases)
                return
        if len(self._scheduler):
            time.sleep(RETRY_S)

    def _read_inbox(self) -> None:
        while self._inbox:
            job = self._inbox.popleft()
            if self._is_dead(job):
                self._settle_dead(job)
            else:
                self._scheduler.add(job)

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
        """Whether a job may join the batch: its adapter has a slot, or gets one."""
        try:
            return leases.use(self.backbones.named(job.backbone).bank).add(job.adapter)
        except Exception as error:
            if _is_fatal(error):
                raise
            # Alive, it fails alone when it runs, with its own error; dead, it is let go next round.
            return not self._is_dead(job)

    def _observe(self, batch: Batch, num_adapters: int, seconds: float) -> None:
        self._metrics.batch_seconds.labels(batch.stage).observe(seconds)
        self._metrics.batch_jobs.labels(batch.stage).observe(len(batch.jobs))
        self._metrics.batch_adapters.labels(batch.stage).observe(num_adapters)
        self._measured(sum(job.cost for job in batch.jobs), seconds)

    def _run(self, batch: Batch, leases: BatchLeases) -> None:
        """Run a batch. Whoever hears of it finds its slots given back and the metrics told."""
        start = time.perf_counter()
        try:
            outputs = self._forward(batch, leases)
        except Exception as error:
            if _is_fatal(error):
                raise
            leases.release()
            self._retry_alone(batch, error)
            return
        self._observe(batch, leases.num_adapters, time.perf_counter() - start)
        leases.release()
        for job, output in zip(batch.jobs, outputs, strict=True):
            self._set_output(job, output)

    def _forward(self, batch: Batch, leases: BatchLeases) -> list[StageOutput]:
        """The outputs of a batch's jobs, which run in the order of their slots: neighbours share kernels."""
        hosted = self.backbones.named(batch.backbone)
        leases.use(hosted.bank)
        for job in batch.jobs:
            if not leases.add(job.adapter):
                raise EngineFailed(f"no slot for {job.adapter} in a batch of its own. This is a bug.")
        jobs = sorted(batch.jobs, key=lambda job: hosted.bank.place(job.adapter))
        outputs = self._run_stage(hosted, Batch(tuple(jobs)), leases)
        self.last_forward_at = time.monotonic()
        of_job = {job.number: output for job, output in zip(jobs, outputs, strict=True)}
        return [of_job[job.number] for job in batch.jobs]

    def _run_stage(self, hosted: HostedBackbone, batch: Batch, leases: BatchLeases) -> list[StageOutput]:
        def keep_going() -> bool:
            now = time.monotonic()
            return not all(self._is_dead(job, now) for job in batch.jobs)

        with torch.inference_mode():
            return list(run_batch(hosted.backbone.model, batch, leases, keep_going))

    def _retry_alone(self, batch: Batch, error: Exception) -> None:
        """A batch that failed is run again item by item, once; only what fails alone fails."""
        if len(batch.jobs) == 1:
            self._set_job_error(batch.jobs[0], error)
            return
        log.warning("a %s batch of %d failed and is retried item by item: %s", batch.stage, len(batch.jobs), error)
        self._metrics.retried_batches.inc()
        for job in batch.jobs:
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


def default_threads() -> int:
    """All processors but one, which is left to the event loop and the media workers: threads that share one stall."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


def _is_fatal(error: Exception) -> bool:
    """Whether the device is lost: CUDA reports these for every later call too."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return False
    accelerator = getattr(torch, "AcceleratorError", None)
    return (accelerator is not None and isinstance(error, accelerator)) or "CUDA error" in str(error)
