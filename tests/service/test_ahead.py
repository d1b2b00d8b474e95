"""What is brought ahead: the inputs and slots of the next batch, of no more, and nothing that is not wanted any more."""

import time

import pytest
import torch

from adapters.config import BASE_ADAPTER
from service.backbones import Backbones
from service.bank import AdapterBank
from service.engine.ahead import Ahead
from service.metrics import Metrics
from service.scheduler import BatchLimits, Scheduler
from service.transfers import Transfers
from service.types import Job, PerceiveInput, StageInput, TextInput, VisionInput
from tests.service.test_bank import host_adapter
from tests.service.worlds import World, make_bank


def picture_job(number: int, adapter: str = BASE_ADAPTER) -> Job:
    pixels = torch.full((1, 3, 4, 4), float(number))
    return Job("vision", adapter, VisionInput(pixels), (), 1, 1, 1.0, time.monotonic() + 60)


@pytest.fixture
def bank(world: World) -> AdapterBank:
    return make_bank(world.backbone, ((4, 2), (8, 1)))


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(BatchLimits(max_rows=3, max_tokens=100))


@pytest.fixture
def ahead(world: World, bank: AdapterBank, scheduler: Scheduler) -> Ahead:
    return Ahead(Backbones.of_one(world.backbone, bank, Metrics()), scheduler)


def test_one_batch_is_brought_and_what_has_left_the_queue_is_forgotten(ahead: Ahead, scheduler: Scheduler) -> None:
    jobs = [picture_job(number) for number in range(5)]
    for job in jobs:
        scheduler.add(job)
    ahead.prepare()
    assert list(ahead._brought) == [job.number for job in jobs[:3]]
    kept = ahead._brought[jobs[1].number]
    scheduler.remove(jobs[0].number)
    ahead.prepare()
    assert list(ahead._brought) == [job.number for job in jobs[1:4]]
    assert ahead._brought[jobs[1].number] is kept, "nothing is brought twice"
    ahead.prepare(without=["vision"])
    assert not ahead._brought


def test_bringing_ends_when_the_device_has_nothing_to_do(
    ahead: Ahead, scheduler: Scheduler, bank: AdapterBank, world: World
) -> None:
    adapters = [host_adapter(world.backbone, 4, seed) for seed in range(2)]
    for adapter in adapters:
        bank.put(adapter, hold=True)
        scheduler.add(picture_job(0, adapter.digest))
    answers = iter([True, False])
    ahead.prepare(go_on=lambda: next(answers))
    assert len(ahead._brought) == 1 and list(bank.residency()["device"]) == [adapters[0].digest]
    ahead.prepare(go_on=lambda: False)
    assert len(ahead._brought) == 1, "what was brought is still of use"


@pytest.mark.parametrize(
    "inputs", [VisionInput(torch.rand(2, 3, 4, 4)), PerceiveInput("vit", torch.rand(3, 4, 4)), TextInput((2, 5, 3))]
)
def test_a_job_runs_with_what_was_brought_and_else_with_what_is_brought_now(
    ahead: Ahead, scheduler: Scheduler, inputs: StageInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job("vision", BASE_ADAPTER, inputs, (), 1, 1, 1.0, time.monotonic() + 60)
    assert ahead.on_device(job) is job, "where device and host are one"
    monkeypatch.setattr(Transfers, "run_beside", True)
    scheduler.add(job)
    for _ in range(2):
        own = ahead.on_device(job)
        assert own.number == job.number and type(own.inputs) is type(inputs)
        for field in ("pixels", "values", "ids"):
            if hasattr(inputs, field):
                assert torch.equal(torch.as_tensor(getattr(own.inputs, field)), torch.as_tensor(getattr(inputs, field)))
        assert not ahead._brought, "what was taken is not kept"
        ahead.prepare()
        assert list(ahead._brought) == ([] if isinstance(inputs, TextInput) else [job.number])
