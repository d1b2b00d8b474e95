"""Products of rows with matrices, by the fastest way there is for where they are.

On a CPU a matrix can be *packed*: laid out for oneDNN, which then multiplies hundreds of rows 1.2 times, and 4 to 16 rows
3 times, as fast as torch multiplies by a plain one, and applies an activation on the way (two cores with AVX-512, BLIP's
shapes; docs/benchmarks.md). A packed matrix holds the same numbers in as many bytes, and gives them back exactly.

A matrix *by inputs* has the weights of one input side by side, not those of one output. Many such matrices in one tensor
are a table, of which `gathered` sums the rows that each row of a batch needs, weighted by its numbers; and oneDNN
multiplies many rows by such a matrix about as fast as by a packed one.
"""

import math
import time
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Activation = Literal["none", "relu", "gelu"]

PACKED_ROWS = 256  # the layout that oneDNN picks for so many rows serves fewer and more of them well
_ONEDNN_DTYPES = (torch.float32, torch.bfloat16)
WIDE_TRIAL = (24, 35, 512, 768)  # matrices, rows of each, outputs, inputs
CLEARLY = 1.2
_ONEDNN_FROM = 3_000_000  # multiplications from which oneDNN's dearer call pays with a matrix that is not packed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation = "none") -> Tensor:
    """activation(x @ weight.T + bias), [..., out] of x [..., in]; `weight` [out, in] may be packed. GELU is the exact one.

    Raises: RuntimeError where a gradient would have to flow through a packed matrix.
    """
    if weight.is_mkldnn:
        if x.requires_grad and torch.is_grad_enabled():  # torch would only warn, and go on without it
            raise RuntimeError("no gradient flows through a packed matrix: train on a model that is not packed")
        return _by_onednn(x, weight, bias, activation)
    if _suits_onednn(x, weight):
        return _by_onednn(x, weight, bias, activation)
    return activate(functional.linear(x, weight, bias), activation)


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN multiplies faster than torch by a matrix that is not packed: by inputs, much to do, no gradient.

    By a part of a wider matrix it multiplies number by number, a hundred times slower.
    """
    outputs = weight.shape[0]
    return (
        x.numel() * outputs >= _ONEDNN_FROM
        and weight.stride() == (1, outputs)
        and not torch.is_grad_enabled()
        and has_onednn(weight.device, weight.dtype)
    )


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
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
    if weight.is_mkldnn or not has_onednn(weight.device, weight.dtype):
        return weight
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), PACKED_ROWS)
    assert isinstance(packed, Tensor)
    return packed


def unpack(weight: Tensor) -> Tensor:
    """The plain matrix of one that may be packed."""
    return weight.to_dense() if weight.is_mkldnn else weight


def by_inputs(weight: Tensor) -> Tensor:
    """Matrices [..., out, in] with the same numbers, laid out by inputs; themselves where they are so already."""
    return weight.mT.contiguous().mT


def gathered(x: Tensor, table: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    """Single rows x [B, in], each times a matrix of its own, [B, out].

    `table` [N, out] holds matrices by inputs, and `rows` [B * in] lists those of its rows that are the matrices of x's rows;
    `starts` [B] says where in the list each begins. Nothing is copied, and what one row gets does not depend on the others.
    On a CPU torch's weighted bags of embeddings read at the rate of memory, where its batched products of single rows come
    to two thirds of that in float32 and to a third in bfloat16 (docs/benchmarks.md).
    """
    product = torch.embedding_bag(table, rows, starts, mode=0, per_sample_weights=x.flatten())[0]
    assert isinstance(product, Tensor)
    return product


def grouped(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Rows x [N, in] times the matrices [G, in, out] of their groups, [N, out]: one product for groups of any lengths.

    `ends` [G] (int32) says before which row each group ends. Strides of rows must be multiples of 16 bytes.
    """
    return functional.grouped_mm(x, matrices, offs=ends)


@cache
def can_group(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether grouped products run here as one kernel: on CUDA devices from Hopper on, in bfloat16.

    Elsewhere torch loops over the groups itself, and waits for the device to learn their lengths. Tried before it is used.
    """
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return groups_right(device, dtype)


def groups_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether grouped products give what they should: an empty group, rows of a larger tensor, a layer of a stack."""
    x = torch.linspace(-1, 1, 7 * 16, device=device).to(dtype).view(7, 16)
    stack = torch.linspace(-1, 1, 3 * 2 * 16 * 24, device=device).to(dtype).view(3, 2, 16, 24)[:, 1, :, :16]
    ends = torch.tensor([3, 3, 7], dtype=torch.int32, device=device)
    try:
        got = grouped(x, stack, ends)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    tolerance = 16 * torch.finfo(dtype).eps
    return torch.allclose(got, torch.cat([x[:3] @ stack[0], x[3:] @ stack[2]]), rtol=tolerance, atol=tolerance)


@cache
def singles_win(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether rows are multiplied by wide matrices faster one matrix at a time, by oneDNN, than in one batched product of torch's.

    That depends on the machine: on one AMD EPYC it took 1.2 times as long, on the next generation of it 0.6 times, for oneDNN
    uses the wider registers there and the library behind torch's batched products does not. So it is measured once, in 0.06
    to 0.1 s, on more matrices than caches hold, and must be clear.
    """
    if not has_onednn(device, dtype):
        return False
    count, rows, outputs, inputs = WIDE_TRIAL
    x, bias = torch.full((count, rows, inputs), 0.01, dtype=dtype), torch.zeros(count, 1, outputs, dtype=dtype)
    matrices = torch.full((count, inputs, outputs), 0.01, dtype=dtype)

    def singly() -> None:
        for one, matrix, own in zip(x, matrices, bias, strict=True):
            linear(one, matrix.mT, own[0])

    def together() -> None:
        torch.baddbmm(bias, x, matrices)

    best = {singly: math.inf, together: math.inf}
    with torch.inference_mode():
        for _ in range(6):
            for run in best:
                start = time.perf_counter()
                run()
                best[run] = min(best[run], time.perf_counter() - start)
    return CLEARLY * best[singly] < best[together]


@cache
def has_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN serves here. The operations are torch's own but not public: they are tried before they are used."""
    if device.type != "cpu" or dtype not in _ONEDNN_DTYPES or not torch.backends.mkldnn.is_available():
        return False
    weight, bias, x = (torch.linspace(-1, 1, size).to(dtype) for size in (6 * 5, 6, 3 * 5))
    weight, x = weight.view(6, 5), x.view(3, 5)
    activations: tuple[Activation, ...] = ("none", "relu", "gelu")
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        ways = [_by_onednn(x, matrix, bias, way) for matrix in (packed, by_inputs(weight)) for way in activations]
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    wanted = 2 * [activate(functional.linear(x, weight, bias), way) for way in activations]
    tolerance = 16 * torch.finfo(dtype).eps
    return torch.equal(packed.to_dense(), weight) and all(
        torch.allclose(way, want, rtol=tolerance, atol=tolerance) for way, want in zip(ways, wanted, strict=True)
    )
