"""What a device is told again and again, recorded once and repeated as a whole.

To launch what a word of a few texts takes one by one lasts longer than to compute it. A recording is launched at once. It reads
and writes the memory that it was recorded with, so that whoever uses it brings what changes there, and nobody else may
meanwhile: recordings are taken and given back. On CUDA devices a recording is a graph.
"""

import logging
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

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

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """See Recorder. Other threads may use the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            run()
        return graph.replay


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

    def prepare(self) -> None:
        """Record the work, if it is not yet, and try it on what the memory holds, which is left as it was.

        Raises: RuntimeError when the recording does not do what was recorded; what the recorder raises.
        """
        if self._again is not None:
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
    """The recordings of one backbone, each used by one holder at a time. The device thread's own.

    Those nobody holds are kept for the next who needs one alike, the least recently used of them dropped when together they
    take more than there is for them. A holder that is gone holds nothing.
    """

    def __init__(self, recorder: Recorder, max_bytes: int) -> None:
        self._recorder = recorder
        self._max_bytes = max_bytes
        self._all: list[tuple[Recording[Any], Holder]] = []  # least recently used first
        self.has_failed = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the memory of all."""
        return sum(recording.fixed.num_bytes for recording, _ in self._all)

    def take(self, key: Hashable, make: Callable[[torch.device | None], F], holder: object) -> Recording[F] | None:
        """One for this key, which is `holder`'s until it is given back; None when there is no room for it.

        `make` makes its work, on the backbone's device (None), or on "meta", which tells how large it is.
        """
        found = next((one for one, held_by in self._all if one.key == key and held_by() is None), None)
        if found is not None:
            self._hold(found, weakref.ref(holder))
        elif self._make_room(make(torch.device("meta")).num_bytes):
            found = Recording(key, make(None), self._recorder)
            self._all.append((found, weakref.ref(holder)))
        return found

    def run(self, key: Hashable, make: Callable[[torch.device | None], F], load: Callable[[F], None]) -> F | None:
        """Work that is done once, behind what `load` brings to it; None where it is not recorded. See `take`.

        What it found out is there until somebody takes it.
        """
        recording = None if self.has_failed else self.take(key, make, self)
        if recording is None:
            return None
        load(recording.fixed)
        is_ready = self.prepare(recording)
        self.give_back(recording)
        if not is_ready:
            return None
        recording.replay()
        return recording.fixed

    def prepare(self, recording: Recording[Any]) -> bool:
        """Have a recording that was taken recorded, on what was brought to it; False when that fails: nothing is any more."""
        try:
            recording.prepare()
        except Exception as error:
            self.has_failed = True
            log.warning("nothing is recorded from now on: %s", error)
        return not self.has_failed

    def give_back(self, recording: Recording[Any]) -> None:
        """End a hold."""
        self._hold(recording, _nobody)

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
