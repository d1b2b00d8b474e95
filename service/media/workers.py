"""A small pool of processes that decode media. Any of them may hang, crash or eat memory: it is killed and replaced.

    submit -> queue -> one thread per worker -> mailbox (shared memory) + pipe -> worker process

A worker serves one call at a time, so ending its process ends that call and no other.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any, ParamSpec, Self, TypeVar

import numpy as np
import numpy.typing as npt

from adapters.errors import AdapterBankError
from service.errors import CorruptMedia, MediaTimeout, MediaTooLarge, NotReady, Overloaded
from service.media.clip import VideoFrames, decode_video
from service.media.mailbox import Mailbox
from service.media.picture import Preprocessing, decode_image
from service.media.sound import Spectrogram, SpectrogramPreprocessing, decode_sound
from service.media.source import DEFAULT_LIMITS, MediaLimits, MediaSource
from service.media.thumbnails import thumbnail
from service.media.worker_main import Call

P = ParamSpec("P")
R = TypeVar("R")

_START_TIMEOUT_S = 60.0
_RETRY_AFTER_S = 1.0
_CLOSING = "the media workers are closed"
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_BOOT = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from service.media.worker_main import main; main(*map(int, sys.argv[2:]))"


@dataclass(frozen=True, eq=False)
class _Task:
    call: Call
    future: "Future[Any]"


class MediaWorkers:
    """Decodes media in `num_workers` processes under `limits`.

    Processes start at the first call, or all together in `start`. `max_queued` calls may wait; one more is refused.
    A call that was cancelled before a worker took it never runs; one that runs is left to end. Use as a context manager, or `close`.
    """

    def __init__(self, num_workers: int, limits: MediaLimits = DEFAULT_LIMITS, *, max_queued: int = 256) -> None:
        if num_workers < 1:
            raise ValueError("num_workers must be at least 1")
        self.limits = limits
        self._max_queued = max_queued
        self._workers = [_Worker(limits) for _ in range(num_workers)]
        self._threads: list[threading.Thread] = []
        self._started: list[Future[None]] = [Future() for _ in range(num_workers)]
        self._queue: deque[_Task] = deque()
        self._changed = threading.Condition()
        self._closed = False

    async def image(self, source: MediaSource, prep: Preprocessing) -> npt.NDArray[np.float32]:
        """`decode_image` in a worker: [3, H, W] float32. Raises as it does, and as `call`."""
        return await self.call(decode_image, source, prep, self.limits)

    async def video(self, source: MediaSource, prep: Preprocessing, num_frames: int) -> VideoFrames:
        """`decode_video` in a worker. Raises as it does, and as `call`."""
        return await self.call(decode_video, source, prep, num_frames, self.limits)

    async def sound(self, source: MediaSource, prep: SpectrogramPreprocessing) -> Spectrogram:
        """`decode_sound` in a worker. Raises as it does, and as `call`."""
        return await self.call(decode_sound, source, prep, self.limits)

    async def thumbnail(self, source: MediaSource, size: int = 160) -> bytes:
        """`thumbnail` in a worker: JPEG bytes. Raises as it does, and as `call`."""
        return await self.call(thumbnail, source, size, self.limits)

    async def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """`submit` and await. Cancelling the awaiting task takes the call out of the queue."""
        import asyncio  # here, where it is loaded anyway: at the top it would cost every worker 60 ms of its start

        return await asyncio.wrap_future(self.submit(function, *args, **kwargs))

    def call_sync(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """`submit` and wait, for callers without an event loop. Raises as `submit`."""
        return self.submit(function, *args, **kwargs).result()

    def submit(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> "Future[R]":
        """Queue `function(*args, **kwargs)` for a worker. It must be importable by name; arguments and result must pickle.

        Raises: `Overloaded` if the queue is full, `NotReady` after `close`. The future raises what the function raised;
        `MediaTimeout` past `limits.timeout_s` in the worker (waiting not counted), `MediaTooLarge` out of memory,
        `CorruptMedia` if the worker crashed (both with `worker_died` where the process came to an end), `NotReady` if no worker can
        be started or the pool was closed meanwhile.
        """
        future: Future[R] = Future()
        with self._changed:
            if self._closed:
                raise NotReady(_CLOSING)
            if len(self._queue) >= self._max_queued:
                self._queue = deque(task for task in self._queue if not task.future.cancelled())
            if len(self._queue) >= self._max_queued:
                raise Overloaded("too many pictures and clips wait to be decoded", retry_after_s=_RETRY_AFTER_S)
            self._queue.append(_Task((function, args, kwargs), future))
            self._start_threads()
            self._changed.notify()
        return future

    def start(self) -> None:
        """Start every worker and wait until each is ready. Raises: `NotReady` if one cannot start."""
        with self._changed:
            if self._closed:
                raise NotReady(_CLOSING)
            self._start_threads()
        for started in self._started:
            started.result()

    def close(self) -> None:
        """End every process; calls that wait or run raise `NotReady`. May be called twice."""
        with self._changed:
            self._closed = True
            waiting, self._queue = list(self._queue), deque()
            self._changed.notify_all()
        for task in waiting:
            if task.future.set_running_or_notify_cancel():
                task.future.set_exception(NotReady(_CLOSING))
        for worker in self._workers:
            worker.close()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _start_threads(self) -> None:
        if self._threads:
            return
        for worker, started in zip(self._workers, self._started, strict=True):
            thread = threading.Thread(target=self._serve, args=(worker, started), name="media-worker", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, worker: "_Worker", started: "Future[None]") -> None:
        """One thread's life: keep its worker alive and feed it. The thread must outlive the worker, which dies with it."""
        try:
            worker.ensure_alive()
            started.set_result(None)
        except NotReady as error:
            started.set_exception(error)
        while self._serve_next(worker):
            worker.replace_if_dead()
        worker.discard()

    def _serve_next(self, worker: "_Worker") -> bool:
        """Settle one task; False once closed. A function of its own, so that no result outlives it here."""
        task = self._next_task()
        if task is None:
            return False
        if task.future.set_running_or_notify_cancel():
            try:
                task.future.set_result(worker.run(task.call))
            except Exception as error:
                task.future.set_exception(error)
                # The error's traceback holds this frame: without a cycle, the media bytes go when the caller is done.
                del task
        return True

    def _next_task(self) -> _Task | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            return None if self._closed else self._queue.popleft()


class _Worker:
    """The pool's side of one process. Only its own thread calls it, except `close`."""

    def __init__(self, limits: MediaLimits) -> None:
        self._limits = limits
        self._link: _Link | None = None
        self._closed = False
        self._lock = threading.Lock()  # between starting a process and `close`

    def run(self, call: Call) -> Any:
        """Make `call` in the process; whatever goes wrong ends this call only."""
        link = self.ensure_alive()
        try:
            link.pipe.send(link.mailbox.put(call))
            if not link.pipe.poll(self._limits.timeout_s):
                self.discard()
                raise MediaTimeout(f"decoding took longer than {self._limits.timeout_s:g} s")
            outcome, sizes = link.pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise self._cause_of_death() from error
        answer = link.mailbox.take(sizes)
        if outcome == "error":
            raise answer
        return answer

    def ensure_alive(self) -> "_Link":
        """The link to a live process, started if need be. Raises: `NotReady`."""
        if self._link is not None and self._link.process.poll() is None:
            return self._link
        self.discard()
        with self._lock:
            if self._closed:
                raise NotReady(_CLOSING)
            self._link = link = _Link.start(self._limits.memory_bytes)
        try:
            if link.pipe.poll(_START_TIMEOUT_S):
                link.pipe.recv()
                return link
        except (EOFError, ConnectionError):
            pass
        self.discard()
        raise NotReady(_CLOSING if self._closed else "a media worker cannot be started")

    def replace_if_dead(self) -> None:
        """Start the next process before the next call needs it; a failure is reported by that call."""
        try:
            self.ensure_alive()
        except NotReady:
            return

    def close(self) -> None:
        """Kill the process; its thread notices, and cleans up. No other is started."""
        with self._lock:
            self._closed = True
            if self._link is not None:
                self._link.process.kill()

    def discard(self) -> int:
        """End the process, if any, and free what it held. Returns its exit status (negative: the signal)."""
        with self._lock:
            link, self._link = self._link, None
        return link.end() if link is not None else 0

    def _cause_of_death(self) -> AdapterBankError:
        status = self.discard()
        if self._closed:
            return NotReady(_CLOSING)
        if status == -signal.SIGKILL:  # not by us: most likely the system was out of memory
            reason = "decoding was killed by the system, which is what happens when memory runs out"
            return MediaTooLarge(reason, worker_died=True)
        return CorruptMedia(f"decoding crashed its worker (exit status {status})", worker_died=True)


@dataclass(frozen=True, eq=False)
class _Link:
    process: "subprocess.Popen[bytes]"
    pipe: "Connection[Any, Any]"
    mailbox: Mailbox

    @classmethod
    def start(cls, memory_bytes: int) -> "_Link":
        """A process that is on its way to say that it is ready. Raises: `NotReady`."""
        try:
            return cls._start(memory_bytes)
        except OSError as error:  # no more processes, files or memory
            raise NotReady(f"a media worker cannot be started: {error}") from error

    @classmethod
    def _start(cls, memory_bytes: int) -> "_Link":
        """A fresh interpreter, unlike a `multiprocessing` child: that would import the parent's main module, and with it torch."""
        with ExitStack() as undo:
            mailbox = Mailbox.create()
            undo.callback(mailbox.close)
            pipe, far_end = Pipe()
            undo.callback(pipe.close)
            with far_end:
                fds = (far_end.fileno(), mailbox.fd)
                numbers = map(str, (*fds, os.getpid(), memory_bytes))
                process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _BOOT, json.dumps(sys.path), *numbers],
                    pass_fds=fds,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, **_ONE_THREAD},
                )
            undo.pop_all()
        return cls(process, pipe, mailbox)

    def end(self) -> int:
        """Kill the process and free what connected us. Returns its exit status."""
        self.process.kill()
        status = self.process.wait()
        self.pipe.close()
        self.mailbox.close()
        return status
