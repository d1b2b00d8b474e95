"""However a matrix is laid out, it holds the same numbers and multiplies alike."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from adapters import products
from adapters.products import (
    Activation,
    _suits_onednn,
    by_inputs,
    can_group,
    gathered,
    groups_right,
    has_onednn,
    linear,
    pack,
    unpack,
)

CPU = torch.device("cpu")
ACTIVATIONS: tuple[Activation, ...] = ("none", "relu", "gelu")


@pytest.fixture
def small_for_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it could multiply by, it does, however little that is."""
    monkeypatch.setattr(products, "_ONEDNN_FROM", 0)


@pytest.mark.usefixtures("small_for_onednn")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 70),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    activation=st.sampled_from(ACTIVATIONS),
    has_bias=st.booleans(),
)
def test_matrices_multiply_alike_in_every_layout(
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
    corner = torch.full((inputs + 3, outputs + 2), float("nan"), dtype=dtype)[:inputs, :outputs].t()
    corner.copy_(weight)
    for matrix in (packed, weight, by_inputs(weight), corner):
        with torch.no_grad():
            got = linear(x, matrix, bias, activation)
        assert got.dtype == dtype and got.shape == (2, rows, outputs)
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_rows_of_any_layout_are_multiplied() -> None:
    weight, bias = torch.randn(6, 5), torch.randn(6)
    every_other, turned = torch.randn(8, 5)[::2], torch.randn(5, 4).t()
    for x in (every_other, turned, torch.randn(2, 3, 4, 5)[:, :, -1]):
        torch.testing.assert_close(linear(x, pack(weight), bias), functional.linear(x, weight, bias))


def test_what_cannot_be_packed_stays_plain() -> None:
    assert has_onednn(CPU, torch.float32), "oneDNN is part of every build of torch for a CPU"
    for dtype in (torch.float64, torch.float16):
        weight = torch.randn(3, 2).to(dtype)
        assert pack(weight) is weight
    assert not has_onednn(torch.device("meta"), torch.float32)
    packed = pack(torch.randn(3, 2))
    assert pack(packed) is packed


def test_operations_that_do_not_work_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are torch's own but not public: another version may lack them, or give other numbers."""
    lacking = type("Lacking", (), {})()
    monkeypatch.setattr(torch.ops, "mkldnn", lacking)
    assert not has_onednn.__wrapped__(CPU, torch.float32)
    monkeypatch.undo()
    monkeypatch.setattr(products, "_by_onednn", lambda x, weight, bias, activation: torch.zeros(3, 6))
    assert not has_onednn.__wrapped__(CPU, torch.float32)


def test_a_gradient_that_a_packed_matrix_cannot_give_is_refused() -> None:
    weight, x = torch.randn(6, 5), torch.randn(2, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="not packed"):
        linear(x, pack(weight), None)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, pack(weight), None), functional.linear(x, weight))


def test_a_part_of_a_wider_matrix_is_not_for_onednn() -> None:
    """Its numbers would be right, and a hundred times slower to come by."""
    x, wide = torch.randn(640, 128), by_inputs(torch.randn(64, 128))
    with torch.no_grad():
        assert _suits_onednn(x, wide)
        assert not _suits_onednn(x, wide[:40])
        assert _suits_onednn(x[:, :100].contiguous(), wide[:, :100]), "fewer inputs are the same memory, only shorter"
        assert not _suits_onednn(x[:64], wide), "the call would take longer than torch does"
    assert not _suits_onednn(x, wide)


def test_a_gradient_flows_through_many_rows_of_a_matrix_by_inputs() -> None:
    """oneDNN would be faster, and give none: it is for serving."""
    weight, x = by_inputs(torch.randn(64, 128)).requires_grad_(), torch.randn(640, 128)
    linear(x, weight, None).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(64, 128), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=30, deadline=None)
@given(
    places=st.lists(st.integers(0, 3), min_size=1, max_size=9), inputs=st.integers(1, 40), outputs=st.integers(1, 40)
)
def test_gathered_rows_meet_their_own_matrices(
    dtype: torch.dtype, places: list[int], inputs: int, outputs: int
) -> None:
    matrices = torch.randn(4, inputs, outputs).to(dtype)
    x, table = torch.randn(len(places), inputs).to(dtype), matrices.view(-1, outputs)
    rows = inputs * torch.tensor(places, dtype=torch.int32)[:, None] + torch.arange(inputs, dtype=torch.int32)
    starts = torch.arange(0, rows.numel(), inputs, dtype=torch.int32)
    got = gathered(x, table, rows.flatten(), starts)
    assert got.dtype == dtype
    expected = torch.einsum("bi,bio->bo", x.double(), matrices[places].double())
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    alone = [gathered(own, table, own_rows, starts[:1]) for own, own_rows in zip(x.split(1), rows, strict=True)]
    assert torch.equal(got, torch.cat(alone)), "a row's sum must not depend on the rows beside it"


def test_grouped_products_are_right_where_they_are_tried_and_serve_on_hopper_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert groups_right(CPU, dtype)
        assert not can_group(CPU, dtype), "there torch loops over the groups itself"
    monkeypatch.setattr(products, "grouped", lambda x, matrices, ends: torch.zeros(len(x), matrices.shape[2]))
    assert not groups_right(CPU, torch.float32)
