"""Rows of batches: putting them together, and what is kept of those that grow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional


def join_padded(first: Tensor, second: Tensor, dim: int, size: int) -> Tensor:
    """Rows of two tensors, each padded with zeros (False) to so many places along a dimension."""
    padded = []
    for tensor in (first, second):
        missing = size - tensor.shape[dim]
        padded.append(functional.pad(tensor, (0, 0) * (tensor.ndim - 1 - dim) + (0, missing)) if missing else tensor)
    return torch.cat(padded)


def told(device: torch.device, numbers: Sequence[Any]) -> Tensor:
    """Numbers of the host as a tensor on a device, which is not waited for: to make it there at once would do so."""
    return torch.tensor(numbers).to(device, non_blocking=True)


@dataclass
class KeysValues:
    """What layers attend over, one tensor [layers, 2, B, H, C, d]: keys, then values, of C places.

    How many places are filled its owner knows. All of it in one tensor is one operation to rearrange, not two for each layer.
    """

    tensor: Tensor

    @classmethod
    def empty(cls, layers: int, rows: int, heads: int, places: int, like: Tensor) -> Self:
        """Zeros, for heads that share the width of `like` [.., D] and with its type."""
        return cls(like.new_zeros(layers, 2, rows, heads, places, like.shape[-1] // heads))

    @property
    def places(self) -> int:
        """How many places there are."""
        return self.tensor.shape[4]

    def write(self, layer: int, start: int, new: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values [2, B, H, N, d] from a place on; a layer's keys and values up to behind them."""
        end = start + new.shape[3]
        self.tensor[layer, :, :, :, start:end] = new
        keys, values = self.tensor[layer, :, :, :, :end]
        return keys, values

    def write_at(self, layer: int, place: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values [2, B, H, 1, d] to a place [1] that only the device knows; a layer's, of all places."""
        keys, values = self.tensor[layer].index_copy_(3, place, new)
        return keys, values

    def select(self, rows: Tensor) -> Self:
        """Those of these rows, in this order, some perhaps more than once: a copy."""
        return type(self)(self.tensor.index_select(2, rows))

    def fork(self, rows: Tensor, end: int, more: int) -> Self:
        """Like `select`, of the first `end` places, with so many more."""
        return type(self)(functional.pad(self.tensor[:, :, :, :, :end].index_select(2, rows), (0, 0, 0, more)))

    def keep(self, places: Tensor) -> Self:
        """These places only."""
        return type(self)(self.tensor.index_select(4, places))

    def join(self, other: Self, size: int) -> Self:
        """These rows, and another's behind them, with so many places."""
        own, others = (each.tensor.transpose(0, 2) for each in (self, other))
        return type(self)(join_padded(own, others, 4, size).transpose(0, 2).contiguous())
