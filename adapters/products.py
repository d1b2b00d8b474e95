"""Products of rows with matrices, by the fastest way there is for where they are.

On a CPU a matrix can be *packed*: laid out for oneDNN, which then multiplies hundreds of rows 1.2 times, and 4 to 16 rows
3 times, as fast as torch multiplies by a plain one, and applies an activation on the way (two cores with AVX-512, BLIP's
shapes; docs/benchmarks.md). A packed matrix holds the same numbers in as many bytes, and gives them back exactly.
"""

from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Activation = Literal["none", "relu", "gelu"]

PACKED_ROWS = 256  # the layout that oneDNN picks for so many rows serves fewer and more of them well
_PACKED_DTYPES = (torch.float32, torch.bfloat16)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation = "none") -> Tensor:
    """activation(x @ weight.T + bias), [..., out] of x [..., in]; `weight` [out, in] may be packed. GELU is the exact one.

    Raises: RuntimeError where a gradient would have to flow through a packed matrix.
    """
    if not weight.is_mkldnn:
        return activate(functional.linear(x, weight, bias), activation)
    if x.requires_grad and torch.is_grad_enabled():  # torch would only warn, and go on without it
        raise RuntimeError("no gradient flows through a packed matrix: train on a model that is not packed")
    algorithm = "none" if activation == "gelu" else ""  # of GELU: not the tanh approximation
    product = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)
    assert isinstance(product, Tensor)
    return product


def activate(x: Tensor, activation: Activation) -> Tensor:
    """x through an activation."""
    if activation == "none":
        return x
    return functional.relu(x) if activation == "relu" else functional.gelu(x)


def pack(weight: Tensor) -> Tensor:
    """A matrix [out, in] laid out for this machine; the matrix itself where there is nothing to gain."""
    if weight.is_mkldnn or not can_pack(weight.device, weight.dtype):
        return weight
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), PACKED_ROWS)
    assert isinstance(packed, Tensor)
    return packed


def unpack(weight: Tensor) -> Tensor:
    """The plain matrix of one that may be packed."""
    return weight.to_dense() if weight.is_mkldnn else weight


@cache
def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matrices can be packed here. The operations are torch's own but not public: they are tried before they are used."""
    if device.type != "cpu" or dtype not in _PACKED_DTYPES or not torch.backends.mkldnn.is_available():
        return False
    weight, bias, x = (torch.linspace(-1, 1, size).to(dtype) for size in (6 * 5, 6, 3 * 5))
    weight, x = weight.view(6, 5), x.view(3, 5)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        ways = [linear(x, packed, bias, activation) for activation in ("none", "relu", "gelu")]
        wanted = [linear(x, weight, bias, activation) for activation in ("none", "relu", "gelu")]
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    tolerance = 16 * torch.finfo(dtype).eps
    return torch.equal(packed.to_dense(), weight) and all(
        torch.allclose(way, want, rtol=tolerance, atol=tolerance) for way, want in zip(ways, wanted, strict=True)
    )
