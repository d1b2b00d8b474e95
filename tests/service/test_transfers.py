"""Copies to the device that the tests run on: what arrives is what was sent, laid out as it was."""

import pytest
import torch

from adapters.products import by_inputs
from service.transfers import Transfers
from tests.devices import DEVICE

TENSORS = {
    "plain": torch.randn(3, 5),
    "by inputs": by_inputs(torch.randn(2, 3, 5)),
    "part of a wider one": torch.randn(4, 7)[:, :5],
    "numbers": torch.arange(6),
}


@pytest.mark.parametrize("name", TENSORS)
def test_what_is_brought_is_there_when_it_is_taken(name: str) -> None:
    tensor = TENSORS[name]
    brought = Transfers(DEVICE).bring(tensor)
    assert torch.equal(brought.take().cpu(), tensor)
    assert brought.take().device.type == DEVICE.type


@pytest.mark.parametrize("name", ["plain", "by inputs"])
def test_pinned_memory_keeps_its_layout(name: str) -> None:
    tensor = TENSORS[name]
    pinned = Transfers(DEVICE).pinned(tensor)
    assert pinned.is_pinned() == (DEVICE.type == "cuda")
    assert pinned.stride() == tensor.stride() and torch.equal(pinned, tensor)


def test_a_copy_into_a_place_has_arrived_for_what_follows() -> None:
    place, source = torch.zeros(64, 64, device=DEVICE), torch.randn(64, 64)
    transfers = Transfers(DEVICE)
    transfers.follow()
    view, arrival = transfers.run(lambda: place.copy_(transfers.pinned(source), non_blocking=True))
    arrival.wait()
    assert torch.equal((view + 1).cpu(), source + 1) and view.data_ptr() == place.data_ptr()


def test_copies_run_beside_the_device_where_it_is_another() -> None:
    assert Transfers(DEVICE).run_beside == (DEVICE.type == "cuda")
