"""What the next batch needs, brought to the device while it runs this one: slots and inputs, of one batch and no more."""

from collections.abc import Callable, Collection
from dataclasses import replace

from torch import Tensor

from service.backbones import Backbones
from service.scheduler import Scheduler
from service.transfers import Brought
from service.types import Job, PerceiveInput, Stage, StageInput, VisionInput


class Ahead:
    """The device thread's own. What was brought for a job that is then not among the next is forgotten."""

    def __init__(self, backbones: Backbones, scheduler: Scheduler) -> None:
        self._backbones = backbones
        self._scheduler = scheduler
        self._brought: dict[int, Brought] = {}

    @property
    def pays(self) -> bool:
        """Whether copies run beside the device's work anywhere."""
        return any(hosted.bank.transfers.run_beside for hosted in self._backbones)

    def prepare(self, without: Collection[Stage] = (), go_on: Callable[[], bool] = lambda: True) -> None:
        """Begin to bring what the jobs need that are next in the queue, some stages left out, for as long as it is to `go_on`."""
        upcoming = self._scheduler.upcoming(without)
        self._brought = {job.number: self._brought[job.number] for job in upcoming if job.number in self._brought}
        for job in upcoming:
            if not go_on():
                return
            bank = self._backbones.named(job.backbone).bank
            bank.prefetch(job.adapter)
            tensor = _on_host(job.inputs)
            if tensor is not None and job.number not in self._brought:
                self._brought[job.number] = bank.transfers.bring(tensor)

    def on_device(self, job: Job) -> Job:
        """A job of the batch that is about to run, its inputs on the device."""
        tensor = _on_host(job.inputs)
        transfers = self._backbones.named(job.backbone).bank.transfers
        if tensor is None or not transfers.run_beside:
            return job
        brought = self._brought.pop(job.number, None) or transfers.bring(tensor)
        return replace(job, inputs=_with(job.inputs, brought.take()))


def _on_host(inputs: StageInput) -> Tensor | None:
    """What media workers made: all else that is large is on the device already."""
    match inputs:
        case VisionInput(pixels):
            return pixels
        case PerceiveInput(_, values):
            return values
    return None


def _with(inputs: StageInput, tensor: Tensor) -> StageInput:
    match inputs:
        case VisionInput():
            return VisionInput(tensor)
        case PerceiveInput(encoder, _):
            return PerceiveInput(encoder, tensor)
    raise AssertionError("inputs without a tensor were brought one. This is a bug.")
