"""Bringing numbers to a device beside what it computes.

On a CUDA device copies run on a stream of their own, out of memory that the device reads by itself (pinned): neither the host
nor what is being computed waits for them. Whoever uses what was copied lets the device wait for its `Arrival` first. On a CPU
host and device are one: a copy is done when it was made, and nothing needs to be brought.

The copy stream waits for nobody by itself. So what is copied over must be read by nobody any more, which is the caller's to know.
"""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

T = TypeVar("T")


class Arrival:
    """When what was copied is there."""

    def __init__(self, stream: "torch.cuda.Stream | None" = None) -> None:
        """When what the stream was told so far is done; None: now."""
        self._event = None if stream is None else stream.record_event()
        self._device = None if stream is None else stream.device

    def wait(self) -> None:
        """Let the device do what it is told from now on after it. The host goes on."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)


HERE = Arrival()


class Transfers:
    """The copies to one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._can_pin = self._stream is not None

    @property
    def run_beside(self) -> bool:
        """Whether copies run beside what the device computes, so that it pays to begin them early."""
        return self._stream is not None

    def pinned(self, tensor: Tensor) -> Tensor:
        """A tensor of the host as the device can read it by itself, with the same strides; as it is where nothing can be pinned."""
        if not self._can_pin or tensor.is_cuda:
            return tensor
        try:
            with torch.cuda.device(self._device):
                return tensor.pin_memory()
        except RuntimeError as error:
            self._can_pin = False
            log.warning("the host has no memory that can be pinned (%s): copies to the device are slower", error)
            return tensor

    def follow(self) -> None:
        """Let what is copied from now on come after what the device was told so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def still_busy(self) -> Callable[[], bool]:
        """Tells, whenever it is asked, whether the device is still at what it was told so far. On a CPU nobody can know."""
        if self._stream is None:
            return lambda: True
        told = torch.cuda.current_stream(self._device).record_event()
        return lambda: not told.query()

    def run(self, copy: Callable[[], T]) -> tuple[T, Arrival]:
        """What `copy` gives, and when it will be there."""
        if self._stream is None:
            return copy(), HERE
        with torch.cuda.stream(self._stream):
            return copy(), Arrival(self._stream)

    def bring(self, tensor: Tensor) -> "Brought":
        """A tensor of the host, on its way to the device."""
        pinned = self.pinned(tensor)
        return Brought(*self.run(lambda: pinned.to(self._device, non_blocking=True)))


class Brought:
    """A tensor that is on its way to the device."""

    def __init__(self, tensor: Tensor, arrival: Arrival) -> None:
        self._tensor = tensor
        self._arrival = arrival

    def take(self) -> Tensor:
        """The tensor, for what the device is told from now on."""
        self._arrival.wait()
        if self._tensor.is_cuda:  # made on the copy stream: its memory is not free before this stream is done with it
            self._tensor.record_stream(torch.cuda.current_stream(self._tensor.device))
        return self._tensor
