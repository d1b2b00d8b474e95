"""Folding is exact, padding adds nothing, grouped rows equal rows alone. The reference below is the unfolded formula."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import JsonValue
from torch import Tensor
from torch.nn import functional

from adapters import products
from adapters.config import AdapterConfig, BackboneRef, Preprocessing, Task
from adapters.errors import InvalidPackage
from adapters.families import FAMILIES, family_of
from adapters.families import slots as slots_module
from adapters.families.base import (
    BlipDims,
    GroupedAdaptation,
    Role,
    Site,
    SlotView,
    Stack,
    UniformAdaptation,
    adapt_rows,
)
from adapters.families.slots import (
    COPYING_KERNELS,
    DEFAULT_KERNELS,
    GROUPED_KERNELS,
    SINGLES_KERNELS,
    WIDE,
    Kernels,
    OneSlot,
    Place,
    kernels_for,
)
from adapters.families.uniadapter import (
    UniAdapter,
    frame_factors,
    frozen_names,
    init_tensors,
    memory_stacks,
    options_of,
)
from adapters.products import by_inputs

DIMS = BlipDims(width=12, layers=2, embed_dim=5)
UNI = UniAdapter()
SITES = [
    Site(stack, layer, role)
    for layer in range(DIMS.layers)
    for stack, role in [
        ("vision", "mlp"),
        ("text", "text"),
        ("text", "cross"),
        ("decoder", "cross"),
    ]
]
SWITCHES = ("visual", "textual", "multimodal", "query_residual")

AnyOptions = st.fixed_dictionaries(
    {**{name: st.booleans() for name in SWITCHES}, "kv_rank": st.none() | st.integers(1, 6)}
)


def config_of(task: Task = "vqa", rank: int = 3, **options: JsonValue) -> AdapterConfig:
    return AdapterConfig(
        family="uniadapter",
        task=task,
        rank=rank,
        options=options,
        backbone=BackboneRef(architecture="blip", width=DIMS.width, layers=DIMS.layers, parts={}),
        preprocessing=Preprocessing(resolution=32),
    )


def tensors_of(config: AdapterConfig, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in UNI.tensor_shapes(config, DIMS).items()
    }


# --- the formula of the paper, as the package's tensors say it -----------------------------------------------


def reference_delta(config: AdapterConfig, tensors: dict[str, Tensor], site: Site, x: Tensor) -> Tensor:
    """0.1 * up(relu(down(n(x)))), and 0.1 * c(multi_up(z) + up(z)) after a cross-attention."""
    options = options_of(config)
    prefix = f"adapters.{site.layer}"

    def norm(name: str, y: Tensor) -> Tensor:
        gain, shift = tensors[f"{prefix}.{name}.weight"], tensors[f"{prefix}.{name}.bias"]
        return functional.layer_norm(y, (DIMS.width,), gain, shift, 1e-5)

    def linear(name: str, y: Tensor) -> Tensor:
        return functional.linear(y, tensors[f"{prefix}.{name}.weight"], tensors[f"{prefix}.{name}.bias"])

    z = functional.relu(linear("down_proj", norm("adapter_layer_norm_before", x)))
    match site.role:
        case "mlp" if options.visual:
            return 0.1 * linear("visual_up_proj", z)
        case "text" if options.textual:
            return 0.1 * linear("up_proj", z)
        case "cross" if options.multimodal:
            return 0.1 * norm("adapter_layer_norm_cross_modal", linear("multi_up_proj", z) + linear("up_proj", z))
    return torch.zeros_like(x)


def reference_query(config: AdapterConfig, tensors: dict[str, Tensor], site: Site, before: Tensor) -> Tensor:
    """What a cross site adds for what entered the attention: the text term of a layer, where the residual is on."""
    if not options_of(config).query_residual:
        return torch.zeros_like(before)
    return reference_delta(config, tensors, site._replace(role="text"), before)


def reference_memory(config: AdapterConfig, tensors: dict[str, Tensor], stack: Stack, y: Tensor) -> tuple[Tensor, ...]:
    """g * up(down(y)), for keys and for values."""
    terms = []
    for term in ("video_key_adapter", "video_value_adapter"):
        name = f"{stack}.{term}"
        low = functional.linear(y, tensors[f"{name}.down_proj.weight"], tensors[f"{name}.down_proj.bias"])
        up = functional.linear(low, tensors[f"{name}.up_proj.weight"], tensors[f"{name}.up_proj.bias"])
        terms.append(tensors[f"{name}.scale"] * up)
    return tuple(terms)


@settings(max_examples=25, deadline=None)
@given(AnyOptions, st.sampled_from(["vqa", "retrieval"]), st.integers(1, 7))
def test_the_folded_slot_computes_the_unfolded_formula(options: dict[str, JsonValue], task: Task, rank: int) -> None:
    """In float64 to the last digits: folding changes the order of operations and nothing else."""
    config = config_of(task, rank, **options)
    tensors = tensors_of(config)
    slot = OneSlot(UNI.fold(config, tensors, DIMS))
    x, before = torch.randn(2, 2, 4, DIMS.width, dtype=torch.float64)
    for site in SITES:
        expected = reference_delta(config, tensors, site, x)
        torch.testing.assert_close(UNI.delta(site, x, slot), expected, rtol=1e-9, atol=1e-9)
        if site.role == "cross":
            expected = expected + reference_query(config, tensors, site, before)
            torch.testing.assert_close(UNI.delta(site, x, slot, before), expected, rtol=1e-9, atol=1e-9)
    for stack in DIMS.stacks:
        pair = UNI.memory(stack, x, slot)
        if options["kv_rank"] is None or stack not in memory_stacks(config):
            assert pair is None
            continue
        assert pair is not None
        for term, expected in zip(pair, reference_memory(config, tensors, stack, x), strict=True):
            torch.testing.assert_close(term, expected, rtol=1e-9, atol=1e-9)


def test_in_float32_folding_stays_within_rounding() -> None:
    config = config_of(rank=7, kv_rank=3)
    tensors = tensors_of(config)
    slot = OneSlot(UNI.fold(config, {name: tensor.float() for name, tensor in tensors.items()}, DIMS))
    x = torch.randn(3, 5, DIMS.width)
    for site in SITES:
        term = UNI.delta(site, x, slot)
        assert term is not None
        torch.testing.assert_close(
            term.double(), reference_delta(config, tensors, site, x.double()), rtol=1e-4, atol=1e-5
        )


def test_the_scale_of_the_cross_term_cannot_hide_in_what_its_norm_normalises() -> None:
    """A scale put into the up-projections would vanish; this is why it goes into the norm's gain and bias."""
    config = config_of()
    tensors = tensors_of(config)
    loud = dict(tensors)
    for name in tensors:
        if ".up_proj." in name or ".multi_up_proj." in name:
            loud[name] = 1000 * tensors[name]
    x, site = torch.randn(2, 3, DIMS.width, dtype=torch.float64), Site("text", 0, "cross")
    quiet_term, loud_term = (UNI.delta(site, x, OneSlot(UNI.fold(config, t, DIMS))) for t in (tensors, loud))
    assert quiet_term is not None
    assert loud_term is not None
    torch.testing.assert_close(quiet_term, loud_term, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("switched_off", [("visual",), ("textual",), ("multimodal",), ("query_residual",), SWITCHES])
def test_a_part_that_is_off_holds_no_tensors_and_adds_zeros(switched_off: tuple[str, ...]) -> None:
    config = config_of(**{name: name not in switched_off for name in SWITCHES})
    slot = OneSlot(UNI.fold(config, tensors_of(config), DIMS))
    x, before = torch.randn(2, 2, 3, DIMS.width, dtype=torch.float64)
    silent: dict[str, tuple[Role, ...]] = {
        "visual": ("mlp",),
        "textual": ("text",),
        "multimodal": ("cross",),
        "query_residual": (),
    }
    roles = {role for name in switched_off for role in silent[name]}
    for site in SITES:
        term = UNI.delta(site, x, slot)
        assert term is not None
        assert (term.abs().sum() == 0) == (site.role in roles), site
        if site.role == "cross":
            with_query = UNI.delta(site, x, slot, before)
            assert with_query is not None
            is_silent = bool({"textual", "query_residual"} & set(switched_off))
            assert torch.allclose(with_query, term, rtol=0, atol=1e-12) == is_silent, site


def test_folding_lets_gradients_through_to_every_tensor() -> None:
    config = config_of(kv_rank=2)
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors_of(config).items()}
    slot = OneSlot(UNI.fold(config, tensors, DIMS))
    x = torch.randn(2, 3, DIMS.width, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for site in SITES:
        term = UNI.delta(site, x, slot, x if site.role == "cross" else None)
        assert term is not None
        total = total + term.square().sum()
    for stack in DIMS.stacks:
        pair = UNI.memory(stack, x, slot)
        assert pair is not None
        total = total + pair[0].square().sum() + pair[1].square().sum()
    total.backward()
    assert [name for name, tensor in tensors.items() if tensor.grad is None or not tensor.grad.any()] == []


@settings(max_examples=10, deadline=None)
@given(AnyOptions, st.integers(1, 5), st.integers(0, 4))
def test_zero_padding_to_a_wider_bucket_changes_nothing(options: dict[str, JsonValue], rank: int, extra: int) -> None:
    config = config_of(rank=rank, **options)
    slot = UNI.fold(config, tensors_of(config), DIMS)
    shapes = UNI.slot_shapes(DIMS, UNI.slot_rank(config) + extra)
    padded = {}
    for name, tensor in slot.items():
        place = torch.zeros(shapes[name], dtype=tensor.dtype)
        place[tuple(slice(0, size) for size in tensor.shape)] = tensor
        padded[name] = place
    x = torch.randn(2, 3, DIMS.width, dtype=torch.float64)
    wide, own = OneSlot(padded), OneSlot(slot)
    for site in SITES:
        before = x if site.role == "cross" else None
        terms = UNI.delta(site, x, wide, before), UNI.delta(site, x, own, before)
        torch.testing.assert_close(*terms, rtol=1e-12, atol=1e-12)
    for stack in DIMS.stacks:
        torch.testing.assert_close(UNI.memory(stack, x, wide), UNI.memory(stack, x, own), rtol=1e-12, atol=1e-12)


def test_every_folded_tensor_has_a_place_in_its_bucket() -> None:
    for task in ("vqa", "retrieval"):
        config = config_of(task, rank=3, kv_rank=5)
        assert UNI.slot_rank(config) == 5
        shapes = UNI.slot_shapes(DIMS, 5)
        for name, tensor in UNI.fold(config, tensors_of(config), DIMS).items():
            assert all(own <= place for own, place in zip(tensor.shape, shapes[name], strict=True)), name


def test_zeroing_any_group_of_tensors_changes_the_slot() -> None:
    config = config_of(kv_rank=2)
    tensors = tensors_of(config)
    slot = UNI.fold(config, tensors, DIMS)
    groups = UNI.site_groups(config, DIMS)
    assert {"visual", "textual", "multimodal", "text.video_key_adapter", "decoder.video_value_adapter"} <= set(groups)
    for group, names in groups.items():
        assert names, group
        assert set(names) <= set(tensors)
        dead = UNI.fold(config, {n: torch.zeros_like(t) if n in names else t for n, t in tensors.items()}, DIMS)
        assert any(not torch.equal(dead[name], slot[name]) for name in slot), group


# --- rows of many adapters -----------------------------------------------------------------------------------


def heads(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in DIMS.head_shapes().items()}


def folded(config: AdapterConfig, seed: int) -> dict[str, Tensor]:
    return UNI.fold(config, {n: t.float() for n, t in tensors_of(config, seed).items()}, DIMS)


def views() -> list[SlotView]:
    """Seven slots: four sizes, key and value adapters, three side by side in a stack, and one without an adapter.

    The stack's second slot holds an adapter of a smaller rank than the stack has room for.
    """
    slots = [SlotView(UNI, {**heads(0), **folded(config_of(rank=3), 0)})]
    slots.append(SlotView(UNI, {**heads(2), **folded(config_of(rank=2, kv_rank=2), 2)}))
    stacked = [folded(config_of(rank=rank, visual=rank != 4), 10 + index) for index, rank in enumerate((8, 8, 4))]
    shapes = UNI.slot_shapes(DIMS, 8) | DIMS.head_shapes()
    stack = {name: torch.full((3, *shape), float("nan")) for name, shape in shapes.items()}
    stack |= {f"{name}.weight": by_inputs(stack[f"{name}.weight"]) for name in UNI.layer_maps()}
    for index, tensors in enumerate(stacked):
        tensors |= heads(10 + index)
        corners = {n: stack[n][index][tuple(slice(0, size) for size in t.shape)] for n, t in tensors.items()}
        for name, corner in corners.items():
            corner.copy_(tensors[name])
        slots.append(SlotView(UNI, corners, place=Place(stack, index)))
    slots.append(SlotView(UNI, {**heads(20), **folded(config_of(rank=6), 20)}))
    return [*slots, SlotView(None, heads(9))]


NUM_VIEWS = 7
NEVER = 1 << 30
KERNELS = [
    pytest.param(Kernels(segments_from=1), id="slot by slot"),
    pytest.param(
        Kernels(segments_from=NEVER, stacked_up_to=0, gathered_up_to=0, gathered_at_most=0), id="a loop of products"
    ),
    pytest.param(
        Kernels(segments_from=NEVER, stacked_up_to=NEVER, gathered_up_to=0, gathered_at_most=0), id="batched products"
    ),
    pytest.param(Kernels(segments_from=NEVER, stacked_up_to=0, gathered_up_to=NEVER), id="gathered rows"),
    pytest.param(GROUPED_KERNELS, id="grouped products"),
    pytest.param(COPYING_KERNELS, id="copied or batched products"),
    pytest.param(replace(COPYING_KERNELS, stacked_up_to=0), id="copied"),
    pytest.param(
        Kernels(segments_from=NEVER, stacked_up_to=NEVER, gathered_up_to=2), id="gathered rows or batched products"
    ),
]


@pytest.mark.parametrize("kernels", KERNELS)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.integers(0, NUM_VIEWS - 1), min_size=2, max_size=9),
    is_sorted=st.booleans(),
    tokens=st.sampled_from([1, 4]),
)
def test_grouped_rows_equal_each_row_alone(kernels: Kernels, rows: list[int], is_sorted: bool, tokens: int) -> None:
    slot_of_row = sorted(rows) if is_sorted else rows
    slots = views()
    x, before, out = torch.randn(3, len(slot_of_row), tokens, DIMS.width)
    grouped = GroupedAdaptation(slots, tuple(slot_of_row), kernels)
    alone = [UniformAdaptation(slots[slot]) for slot in slot_of_row]
    for site in SITES:
        earlier = before if site.role == "cross" else None
        together = grouped.add(site, x, out.clone(), earlier)
        for row, adaptation in enumerate(alone):
            own = slice(row, row + 1)
            expected = adaptation.add(site, x[own], out[own], None if earlier is None else earlier[own])
            torch.testing.assert_close(together[own], expected, rtol=1e-5, atol=1e-5)
    for stack in DIMS.stacks:
        memory = grouped.memory(stack, x)
        for row, adaptation in enumerate(alone):
            pair = adaptation.memory(stack, x[row : row + 1])
            for term in range(2):
                expected = torch.zeros_like(x[row]) if pair is None else pair[term][0]
                got = torch.zeros_like(x[row]) if memory is None else memory[term][row]
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for head in ("vision_proj", "text_proj", "itm_head"):
        projected = grouped.project(head, x[:, 0])
        for row, adaptation in enumerate(alone):
            torch.testing.assert_close(projected[row], adaptation.project(head, x[row, :1])[0], rtol=1e-5, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, NUM_VIEWS - 1), min_size=2, max_size=5), st.data())
def test_expanded_rows_adapt_like_the_rows_they_come_from(slot_of_row: list[int], data: st.DataObject) -> None:
    origin = data.draw(st.lists(st.integers(0, len(slot_of_row) - 1), min_size=1, max_size=9))
    adaptation = adapt_rows(views(), slot_of_row)
    expanded = adaptation.expand(torch.tensor(origin))
    x = torch.randn(len(slot_of_row), DIMS.width)
    torch.testing.assert_close(
        expanded.project("text_proj", x[origin]), adaptation.project("text_proj", x)[origin], rtol=1e-5, atol=1e-5
    )


def test_rows_of_one_slot_are_not_grouped() -> None:
    slots = views()
    assert isinstance(adapt_rows(slots, [2, 2, 2]), UniformAdaptation)
    assert isinstance(adapt_rows(slots, [2, 0, 2]), GroupedAdaptation)


def test_rows_without_an_adapter_add_nothing_at_all() -> None:
    base = UniformAdaptation(views()[-1])
    x = torch.randn(2, 3, DIMS.width)
    assert base.add(SITES[0], x, x) is x
    assert base.memory("text", x) is None
    assert torch.equal(GroupedAdaptation([views()[-1]], (0, 0)).add(SITES[0], x, x.clone()), x)


def runs_of(kernels: Kernels, rows: list[int], tokens: int = 1) -> list[list[int]]:
    """How many slots share a product, span by span: a span has slots of one size."""
    spans = GroupedAdaptation(views(), tuple(rows), kernels).spans
    return [[len(run.parts) for run in span.slots.runs(tokens)] for span in spans]


def test_slots_that_lie_side_by_side_share_a_product() -> None:
    """Two of equal rank; the third has another, and a row more would make the batch ragged."""
    kernels = Kernels(stacked_up_to=4, gathered_up_to=0, gathered_at_most=0)
    assert runs_of(kernels, [0, 1, 2, 3, 4]) == [[1], [1], [2], [1]]
    assert runs_of(kernels, [2, 2, 3, 3]) == [[2]]
    assert runs_of(kernels, [2, 2, 3]) == [[1, 1]]
    assert runs_of(kernels, [3, 2]) == [[1, 1]]
    assert runs_of(kernels, [2, 3], tokens=5) == [[1, 1]]


def test_few_rows_of_slots_anywhere_in_a_stack_are_gathered() -> None:
    kernels = Kernels(stacked_up_to=4, gathered_up_to=2, gathered_at_most=0)
    assert runs_of(kernels, [0, 1, 2, 3, 4]) == [[1], [1], [2], [1]]
    assert runs_of(kernels, [3, 2, 2, 3]) == [[3]]
    assert runs_of(kernels, [3, 2, 2], tokens=2) == [[1, 1]]
    assert runs_of(kernels, [2, 3], tokens=2) == [[2]]
    spans = GroupedAdaptation(views(), (3, 2, 2, 2, 3, 2), kernels).spans
    assert [[run.kernel for run in span.slots.runs(1)] for span in spans] == [["one", "one", "gathered"]]


def test_slots_in_the_order_of_their_stack_share_a_grouped_product() -> None:
    """However many rows each has. Matrices whose lines are no multiples of 16 bytes are left out, and nothing is copied here."""
    kernels = replace(GROUPED_KERNELS, copied_up_to=0)
    assert runs_of(kernels, [0, 2, 2, 2, 3, 4], tokens=99) == [[1], [2], [1]]
    assert runs_of(kernels, [3, 2]) == [[1, 1]]
    spans = GroupedAdaptation(views(), (2, 2, 3), kernels).spans
    assert [[run.kernel for run in span.slots.runs(5)] for span in spans] == [["grouped"]]
    odd = [
        replace(view, tensors={n: t[:, :, :7] if n == "visual.weight" else t for n, t in view.tensors.items()})
        for view in views()
    ]
    spans = GroupedAdaptation(odd, (2, 2, 3), kernels).spans
    assert [[run.kernel for run in span.slots.runs(5)] for span in spans] == [["one", "one"]]


def kernels_of(kernels: Kernels, slots: list[SlotView], rows: list[int], tokens: int) -> list[tuple[str, int]]:
    """The kernel of each product of a batch whose slots are all of one size, and how many parts go through it."""
    (span,) = GroupedAdaptation(slots, tuple(rows), kernels).spans
    return [(run.kernel, len(run.parts)) for run in span.slots.runs(tokens)]


def test_slots_anywhere_are_copied_side_by_side_and_those_that_lie_so_are_not() -> None:
    assert kernels_of(COPYING_KERNELS, views(), [2, 2, 3, 3], 577) == [("stacked", 2)]
    assert kernels_of(COPYING_KERNELS, views(), [3, 3, 2], 577) == [("copied", 2)]
    assert kernels_of(COPYING_KERNELS, views(), [2, 3, 2, 3, 3], 1) == [("copied", 4)]
    assert kernels_of(replace(COPYING_KERNELS, copied_up_to=8), views(), [3, 3, 2], 5) == [("one", 1), ("one", 1)]
    assert kernels_of(replace(COPYING_KERNELS, stacked_up_to=8), views(), [2, 2, 3, 3], 5) == [("copied", 2)]


def test_runs_of_any_length_have_plans_of_their_own() -> None:
    """By tokens a batch's runs begin at the same row and end at another."""
    x, kernels = torch.randn(5, 4, DIMS.width), replace(COPYING_KERNELS, stacked_up_to=0, copied_up_to=8)
    batch, alone = GroupedAdaptation(views(), (2, 3, 2, 2, 2), kernels), adapt_rows(views(), [2])
    for tokens in (1, 4):
        own = batch.add(SITES[0], x[:, :tokens], torch.zeros(5, tokens, DIMS.width))
        expected = alone.add(SITES[0], x[:1, :tokens], torch.zeros(1, tokens, DIMS.width))
        torch.testing.assert_close(own[:1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wins", [True, False])
def test_wide_matrices_are_multiplied_singly_where_that_wins(wins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "singles_win", lambda device, dtype: wins)
    kernels = kernels_for(torch.device("cpu"), torch.float32)
    assert kernels.slot_by_slot_from(WIDE - 1) == DEFAULT_KERNELS.segments_from
    assert (kernels.slot_by_slot_from(WIDE) < DEFAULT_KERNELS.segments_from) == wins


def test_a_machine_says_once_which_way_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock, which runs as it is told here."""
    now, took = [0.0], {"singly": 1.0, "together": 1.0}
    monkeypatch.setattr(products.time, "perf_counter", lambda: now[0])

    def counted(way: str) -> None:
        now[0] += took[way]

    monkeypatch.setattr(products, "linear", lambda *_: counted("singly"))
    monkeypatch.setattr(products.torch, "baddbmm", lambda *_: counted("together"))
    monkeypatch.setattr(products, "has_onednn", lambda device, dtype: device.type == "cpu")
    device, matrices = torch.device("cpu"), products.WIDE_TRIAL[0]
    for singly, together, wins in ((1.0, 1.1, False), (1.0, 1.3, True), (2.0, 1.0, False)):
        took |= {"singly": singly / matrices, "together": together}
        assert products.singles_win.__wrapped__(device, torch.float32) == wins
    assert not products.singles_win.__wrapped__(torch.device("meta"), torch.float32)


def test_what_cannot_be_grouped_is_copied() -> None:
    assert kernels_of(GROUPED_KERNELS, views(), [2, 2, 3], 577) == [("grouped", 2)]
    assert kernels_of(GROUPED_KERNELS, views(), [3, 2, 2], 577) == [("copied", 2)]
    assert kernels_of(GROUPED_KERNELS, views(), [2, 3, 2], 577) == [("grouped", 2), ("one", 1)]


def test_a_device_that_is_no_cpu_takes_the_same_launches_for_any_slots() -> None:
    assert kernels_for(torch.device("cpu"), torch.float32) in (DEFAULT_KERNELS, SINGLES_KERNELS)
    assert kernels_for(torch.device("meta"), torch.float32) == COPYING_KERNELS


def test_more_rows_are_gathered_where_they_cannot_be_stacked() -> None:
    """A loop costs a call for each adapter."""
    kernels = Kernels(stacked_up_to=100, gathered_up_to=0, gathered_at_most=3)
    assert runs_of(kernels, [2, 3]) == [[2]]
    spans = GroupedAdaptation(views(), (2, 2, 3, 3, 2, 2, 2, 3, 3, 3, 3), kernels).spans
    (found,) = [[(run.kernel, len(run.parts)) for run in span.slots.runs(1)] for span in spans]
    assert found == [("stacked", 2), ("one", 1), ("one", 1)], "three rows can be gathered, four are too many"
    spans = GroupedAdaptation(views(), (2, 3, 3, 2, 2, 2), kernels).spans
    (found,) = [[(run.kernel, len(run.parts)) for run in span.slots.runs(1)] for span in spans]
    assert found == [("gathered", 3)]


# --- what a package holds ------------------------------------------------------------------------------------


def test_key_and_value_adapters_exist_for_the_stacks_of_the_task() -> None:
    def stacks(task: Task) -> set[str]:
        shapes = UNI.tensor_shapes(config_of(task, kv_rank=2), DIMS)
        return {name.split(".")[0] for name in shapes if "video_" in name}

    assert stacks("vqa") == {"text", "decoder"}
    assert stacks("retrieval") == {"text"}


def test_options_that_are_none_are_refused_by_name() -> None:
    with pytest.raises(InvalidPackage, match="colour"):
        UNI.tensor_shapes(config_of(colour="red"), DIMS)
    with pytest.raises(InvalidPackage, match="kv_rank"):
        UNI.tensor_shapes(config_of(kv_rank=0), DIMS)
    with pytest.raises(InvalidPackage, match="visual"):
        options_of(config_of(visual=[]))


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    assert family_of("uniadapter") is FAMILIES["uniadapter"]
    with pytest.raises(InvalidPackage, match=r"'nonsense'; known: .*uniadapter"):
        family_of("nonsense")


def test_head_shapes_name_every_head_with_weight_and_bias() -> None:
    assert replace(DIMS, embed_dim=7).head_shapes() == {
        "vision_proj.weight": (7, 12),
        "vision_proj.bias": (7,),
        "text_proj.weight": (7, 12),
        "text_proj.bias": (7,),
        "itm_head.weight": (2, 12),
        "itm_head.bias": (2,),
    }


def test_fresh_tensors_are_the_released_trainers() -> None:
    def fresh(task: Task) -> dict[str, Tensor]:
        return init_tensors(config_of(task, kv_rank=2), DIMS, torch.Generator().manual_seed(3))

    for task in ("vqa", "retrieval"):
        tensors = fresh(task)
        assert {name: tuple(t.shape) for name, t in tensors.items()} == UNI.tensor_shapes(
            config_of(task, kv_rank=2), DIMS
        )
        assert all((t == 0).all() for name, t in tensors.items() if name.endswith(".bias"))
        assert all((t == 1).all() for name, t in tensors.items() if name.endswith(("norm_before.weight", ".scale")))
        assert all(torch.equal(t, fresh(task)[name]) for name, t in tensors.items())
    assert not fresh("retrieval")["adapters.0.up_proj.weight"].any()
    assert fresh("vqa")["adapters.0.up_proj.weight"].any()
    assert frozen_names(fresh("vqa")) == {n for n in fresh("vqa") if "cross_modal" in n}


# --- frame factors -------------------------------------------------------------------------------------------


def test_frame_factors_weigh_patches_by_frame_and_leave_cls_alone() -> None:
    similarity = torch.tensor([[0.3, -0.2, 0.9]])
    factors = frame_factors(similarity, tokens_per_frame=4).view(3, 4)
    weights = 3 * torch.softmax(similarity[0] / 4.0, dim=0)
    torch.testing.assert_close(factors[:, 0], torch.ones(3))
    torch.testing.assert_close(factors[:, 1:], weights[:, None].expand(3, 3))
    torch.testing.assert_close(frame_factors(torch.tensor([[0.7]]), 5), torch.ones(1, 5))
