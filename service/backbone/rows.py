"""Putting rows of batches together."""

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
