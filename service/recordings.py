"""What a device is told again and again, recorded once and repeated as a whole.

To launch what a word of a few texts takes one by one lasts longer than to compute it. A recording is launched at once. It reads
and writes the memory that it was recorded with, so that whoever uses it brings what changes there, and nobody else may
meanwhile: recordings are taken and given back. On CUDA devices a recording is a graph.
"""

import logging
import time
import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SHARE = 0.05  # of the time, for making recordings: one takes as long as dozens of batches
PAUSE_S = 30.0  # without new recordings when memory ran out
AGREEMENT = 1e-2  # of a recording with what was recorded, at first: far above rounding, far below what a mistake makes


class Recorder(Protocol):
    """A way to record."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """What repeats all that `run` tells the device, on the same memory. Whether `run` has its effect now is not said.

        Raises: any error for what cannot be recorded, such as asking the device what is in a tensor.
        """


class CudaGraphs:
    """Graphs of one device. What they need for themselves they share: only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # a stream of its own: libraries keep memory for each stream, in the pool of its graphs
        self._stream = torch.cuda.Stream(device)
        self._first: torch.cuda.CUDAGraph | None = None  # as long as one graph lives, so does the pool

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """See Recorder. Other threads may use the device meanwhile."""
        if self._first is None:
            self._first = self._capture(lambda: torch.zeros(1, device=self._device).add_(1))
        return self._capture(run).replay

    def _capture(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """By hand: `torch.cuda.graph` empties torch's caches first, and leaves its stream current where capturing fails."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            except BaseException:
                with suppress(Exception):  # of which the first was the cause
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph


class Fixed(Protocol):
    """Work on memory that never moves."""

    @property
    def num_bytes(self) -> int:
        """Bytes of that memory."""

    @property
    def changing(self) -> Sequence[Tensor]:
        """What `run` reads and changes."""

    @property
    def result(self) -> Tensor:
        """What `run` finds out."""

    def run(self) -> None:
        """The work."""


F = TypeVar("F", bound=Fixed)


class Recording(Generic[F]):
    """Some work, which `replay` does again from its first call on."""

    def __init__(self, key: Hashable, fixed: F, recorder: Recorder) -> None:
        self.key = key
        self.fixed = fixed
        self._recorder = recorder
        self._again: Callable[[], None] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether it can be replayed."""
        return self._again is not None

    def prepare(self) -> None:
        """Record the work, if it is not yet, and try it on what the memory holds, which is left as it was.

        Raises: RuntimeError when the recording does not do what was recorded; what the recorder raises.
        """
        if self.is_ready:
            return
        before = [tensor.clone() for tensor in self.fixed.changing]
        self.fixed.run()
        wanted = self.fixed.result.clone()
        again = self._recorder.record(self.fixed.run)
        self._restore(before)
        self.fixed.result.zero_()
        again()
        agrees = torch.allclose(self.fixed.result, wanted, rtol=AGREEMENT, atol=AGREEMENT, equal_nan=True)
        self._restore(before)
        if not agrees:
            raise RuntimeError("a recording does not do what was recorded")
        self._again = again

    def replay(self) -> None:
        """Do the work. After `prepare`."""
        assert self._again is not None, "a recording was replayed before it was made. This is a bug."
        self._again()

    def _restore(self, before: Sequence[Tensor]) -> None:
        for tensor, kept in zip(self.fixed.changing, before, strict=True):
            tensor.copy_(kept)


class Recordings:
    """The recordings of one backbone, each used by one holder at a time. The device thread's own; others may read how it stands.

    Those nobody holds are kept for the next who needs one alike, the least recently used of them dropped when together they
    take more than there is for them. A holder that is gone holds nothing. What goes wrong here is optional work: callers get
    None, and do without.
    """

    def __init__(self, recorder: Recorder, max_bytes: int, *, share: float = SHARE) -> None:
        """`share`: of the time, what making recordings may take; between two of them callers do without new ones."""
        self._recorder = recorder
        self._max_bytes = max_bytes
        self._share = share
        self._all: list[tuple[Recording[Any], Holder]] = []  # least recently used first
        self._sizes: dict[Hashable, int] = {}
        self._paused_until = 0.0
        self.has_failed = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the memory of all."""
        return sum(recording.fixed.num_bytes for recording, _ in self._all)

    @property
    def makes_new(self) -> bool:
        """Whether new ones are made now, where there is room."""
        return not self.has_failed and time.monotonic() >= self._paused_until

    @property
    def num_held(self) -> int:
        """How many somebody holds."""
        return sum(held_by() is not None for _, held_by in self._all)

    def take(
        self, key: Hashable, make: Callable[[torch.device | None], F], load: Callable[[F], None], holder: object
    ) -> Recording[F] | None:
        """One for this key, which is `holder`'s until it is given back, ready to be replayed behind what `load` brings to it.

        None where there is no room or no time for it, or nothing can be recorded. `make` makes its work, on the backbone's
        device (None), or on "meta", which tells how large it is.
        """
        if self.has_failed:
            self._drop_unheld()
            return None
        recording: Recording[F] | None = None
        try:
            recording = self._find(key, make, holder)
            if recording is not None:
                load(recording.fixed)
                self._prepare(recording)
            return recording
        except torch.OutOfMemoryError as error:  # there may be room again later
            self._paused_until = time.monotonic() + PAUSE_S
            log.warning("no memory to record with, for %d s without: %s", PAUSE_S, error)
        except Exception as error:
            self.has_failed = True
            log.warning("nothing more is recorded: %s", error, exc_info=error)
        self._all = [pair for pair in self._all if pair[0] is not recording]
        self._drop_unheld()
        return None

    def run(self, key: Hashable, make: Callable[[torch.device | None], F], load: Callable[[F], None]) -> F | None:
        """Work that is done once; None where it is not recorded. See `take`. What it found is there until the next has it."""
        recording = self.take(key, make, load, self)
        if recording is None:
            return None
        self.give_back(recording)
        recording.replay()
        return recording.fixed

    def give_back(self, recording: Recording[Any]) -> None:
        """End a hold."""
        self._hold(recording, _nobody)
        if self.has_failed:  # nobody takes it any more
            self._drop_unheld()

    def _drop_unheld(self) -> None:
        self._all = [pair for pair in self._all if pair[1]() is not None]

    def _find(self, key: Hashable, make: Callable[[torch.device | None], F], holder: object) -> Recording[F] | None:
        found = next((one for one, held_by in self._all if one.key == key and held_by() is None), None)
        if found is not None:
            self._hold(found, weakref.ref(holder))
            return found
        if not self.makes_new:
            return None
        if key not in self._sizes:
            self._sizes[key] = make(torch.device("meta")).num_bytes
        if not self._make_room(self._sizes[key]):
            return None
        found = Recording(key, make(None), self._recorder)
        self._all.append((found, weakref.ref(holder)))
        return found

    def _prepare(self, recording: Recording[Any]) -> None:
        if recording.is_ready:
            return
        start = time.monotonic()
        recording.prepare()
        end = time.monotonic()
        self._paused_until = end + (end - start) * (1 / self._share - 1)

    def _hold(self, recording: Recording[Any], holder: "Holder") -> None:
        self._all = [pair for pair in self._all if pair[0] is not recording] + [(recording, holder)]

    def _make_room(self, num_bytes: int) -> bool:
        held = sum(recording.fixed.num_bytes for recording, held_by in self._all if held_by() is not None)
        if held + num_bytes > self._max_bytes:
            return False
        while self.num_bytes + num_bytes > self._max_bytes:
            self._all.remove(next(pair for pair in self._all if pair[1]() is None))
        return True


Holder = Callable[[], object]  # who holds a recording: None, nobody any more


def _nobody() -> None:
    return None
