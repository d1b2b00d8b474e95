"""Packed matrices hold what they were packed from, and multiply like plain ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from adapters import products
from adapters.products import Activation, can_pack, linear, pack, unpack

CPU = torch.device("cpu")
ACTIVATIONS: tuple[Activation, ...] = ("none", "relu", "gelu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 70),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    activation=st.sampled_from(ACTIVATIONS),
    has_bias=st.booleans(),
)
def test_a_packed_matrix_multiplies_like_the_plain_one(
    dtype: torch.dtype, rows: int, inputs: int, outputs: int, activation: Activation, has_bias: bool
) -> None:
    weight, x = torch.randn(outputs, inputs).to(dtype), torch.randn(2, rows, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) if has_bias else None
    packed = pack(weight)
    assert torch.equal(unpack(packed), weight)
    expected = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if activation != "none":
        expected = (functional.relu if activation == "relu" else functional.gelu)(expected)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for matrix in (packed, weight):
        got = linear(x, matrix, bias, activation)
        assert got.dtype == dtype and got.shape == (2, rows, outputs)
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_rows_of_any_layout_are_multiplied() -> None:
    weight, bias = torch.randn(6, 5), torch.randn(6)
    every_other, turned = torch.randn(8, 5)[::2], torch.randn(5, 4).t()
    for x in (every_other, turned, torch.randn(2, 3, 4, 5)[:, :, -1]):
        torch.testing.assert_close(linear(x, pack(weight), bias), functional.linear(x, weight, bias))


def test_what_cannot_be_packed_stays_plain() -> None:
    assert can_pack(CPU, torch.float32), "oneDNN is part of every build of torch for a CPU"
    for dtype in (torch.float64, torch.float16):
        weight = torch.randn(3, 2).to(dtype)
        assert pack(weight) is weight
    assert not can_pack(torch.device("meta"), torch.float32)
    packed = pack(torch.randn(3, 2))
    assert pack(packed) is packed


def test_operations_that_do_not_work_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are torch's own but not public: another version may lack them, or give other numbers."""
    lacking = type("Lacking", (), {})()
    monkeypatch.setattr(torch.ops, "mkldnn", lacking)
    assert not can_pack.__wrapped__(CPU, torch.float32)
    monkeypatch.undo()
    monkeypatch.setattr(
        products, "linear", lambda x, weight, bias, activation: torch.full((3, 6), float(weight.is_mkldnn))
    )
    assert not can_pack.__wrapped__(CPU, torch.float32)


def test_a_gradient_that_a_packed_matrix_cannot_give_is_refused() -> None:
    weight, x = torch.randn(6, 5), torch.randn(2, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="not packed"):
        linear(x, pack(weight), None)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, pack(weight), None), functional.linear(x, weight))
