"""Recordings on any device: a tape of operations, each with the tensors it read and wrote, played again on the same memory.

What it promises is what a graph of a GPU promises; and what makes the host wait for a GPU it refuses, as far as it is listed
here: to ask what is in a tensor, and operations whose results are as large as their numbers say. So what is right on a tape reads
all that changes from memory that stays where it is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from service.recordings import CudaGraphs, Recorder, Recordings

CPU = torch.device("cpu")
# operations by their names in torch's dispatcher: some ask, some bring numbers of the host, some are as large as numbers say
ASKS = frozenset({"_local_scalar_dense", "is_nonzero", "equal", "lift_fresh", "bincount", "nonzero", "nonzero_static"})
SIZED = frozenset(
    {"masked_select", "unique_dim", "_unique2", "unique_consecutive", "repeat_interleave", "tensor_split"}
)
INDEXED = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})  # by a mask: as large as that says
METHODS = frozenset({"tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"})


class CannotRecord(RuntimeError):
    """An operation that no device records."""


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _memories(values: Any) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in _tensors(values) if not tensor.is_mkldnn}


class Tape(TorchDispatchMode):
    """Records while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._steps: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        by_mask = name in INDEXED and any(tensor.dtype in (torch.bool, torch.uint8) for tensor in _tensors(args[1]))
        if name in ASKS | SIZED or by_mask:
            raise CannotRecord(f"{name} waits for the device, or brings it something")
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            self._steps.append(lambda: func(*args, **kwargs))
        elif not _memories(result) & _memories((args, kwargs)):  # not a view
            self._steps.append(lambda: _again(func, args, kwargs, result))
        return result

    def play(self) -> None:
        """All operations once more."""
        for step in self._steps:
            step()


class NoMethods(TorchFunctionMode):
    """Refuses what asks for a tensor's numbers, of which on a CPU no operation need tell."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in METHODS:
            raise CannotRecord(f"{func.__name__} waits for the device")
        return func(*args, **(kwargs or {}))


def _again(func: Any, args: Any, kwargs: Any, result: Any) -> None:
    for old, new in zip(_tensors(result), _tensors(func(*args, **kwargs)), strict=True):
        old.copy_(new)


class TapeRecorder:
    """Records on tapes. See Recorder."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """See Recorder."""
        with NoMethods(), Tape() as tape:
            run()
        return tape.play


class Counted:
    """A recorder that counts."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.num_recorded = 0
        self.num_played = 0

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """See Recorder."""
        again = self._recorder.record(run)
        self.num_recorded += 1

        def play() -> None:
            self.num_played += 1
            again()

        return play


def make_recordings(device: torch.device = CPU, max_bytes: int = 1 << 30) -> tuple[Recordings, Counted]:
    """Recordings of a device, on tapes where it has no graphs, and who counts them."""
    recorder = Counted(CudaGraphs(device) if device.type == "cuda" else TapeRecorder())
    return Recordings(recorder, max_bytes, share=1.0), recorder
