"""Which examples a step sees, and their tensors; one batch is made ahead of the device and no more."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

B = TypeVar("B")


@dataclass(frozen=True)
class Plan:
    """Which examples a step sees: epochs of all of them, each in an order of its own, cut into batches without gaps."""

    num_examples: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every example was seen."""
        return -(-self.num_examples // self.batch_size)

    def rows(self, step: int) -> list[int]:
        """The `batch_size` examples of a step."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [
            epoch_order(self.num_examples, self.seed, p // self.num_examples)[p % self.num_examples] for p in places
        ]


@lru_cache(maxsize=2)
def epoch_order(num_examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation of the examples."""
    order = list(range(num_examples))
    Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


class Ahead(Generic[B]):
    """Calls `make(step)` in a thread, for the step asked for and then for the next: one batch ahead and no more."""

    def __init__(self, make: Callable[[int], B], num_steps: int) -> None:
        self._make = make
        self._num_steps = num_steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[B]] | None = None

    def __call__(self, step: int) -> B:
        """The batch of a step. Raises what making it raised."""
        waiting, self._next = self._next, None
        future = waiting[1] if waiting is not None and waiting[0] == step else self._thread.submit(self._make, step)
        batch = future.result()
        if step + 1 < self._num_steps:
            self._next = (step + 1, self._thread.submit(self._make, step + 1))
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def padded(texts: Sequence[tuple[int, ...]], pad: int) -> tuple[Tensor, Tensor]:
    """ids [B, L], filled up to the longest, and mask [B, L] bool."""
    longest = max(len(ids) for ids in texts)
    ids = torch.tensor([[*text, *([pad] * (longest - len(text)))] for text in texts])
    lengths = torch.tensor([len(text) for text in texts])
    return ids, torch.arange(longest) < lengths[:, None]
