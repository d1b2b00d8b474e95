"""eP-ALM's family: which feature enters which layer, what a package holds, and that folding changes nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.config import AdapterConfig, BackboneRef, Preprocessing
from adapters.errors import BackboneMismatch, InvalidPackage
from adapters.families import FAMILIES, family_of
from adapters.families.base import (
    NOTHING,
    BlipDims,
    EncoderDims,
    GroupedAdaptation,
    OptDims,
    Schedule,
    Site,
    SlotView,
    UniformAdaptation,
    adapt_rows,
)
from adapters.families.epalm import MAX_PROMPT_LENGTH, PROMPT, EPalm, init_tensors, options_of
from adapters.families.slots import OneSlot
from tests.service.backbone.opt_random import BASE, WIDTH, Mixed, dims_of, random_model, slot_of
from tests.service.backbone.opt_random import config_of as config_for

FAMILY = EPalm()
DIMS = OptDims(width=12, layers=32, word_width=8, encoders={"vit": EncoderDims(6, 12), "ast": EncoderDims(10, 7)})
CPU = torch.device("cpu")


def config_of(*, rank: int | None = None, **options: Any) -> AdapterConfig:
    options = {"encoder": "vit", "start_layer_idx": 19, "end_layer_idx": 31, "injected_hidden_states": 6} | options
    connectors = 1 if options.get("shared_connector") else options["injected_hidden_states"]
    return AdapterConfig(
        family="epalm",
        task="vqa",
        rank=connectors if rank is None else rank,
        options=options,
        backbone=BackboneRef(architecture="opt", width=DIMS.width, layers=DIMS.layers, parts={}),
        preprocessing=Preprocessing(resolution=32),
    )


def entering(**options: Any) -> dict[int, int]:
    """The feature that enters each layer that one enters."""
    schedule = FAMILY.schedule(config_of(**options), DIMS)
    assert len(schedule.layers) == DIMS.layers
    return {layer: feature for layer, feature in enumerate(schedule.layers) if feature != NOTHING}


# --- the schedule ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end", "features", "more", "expected"),
    [
        (19, 31, 6, {}, dict(zip(range(19, 31), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5], strict=True))),  # as released
        (3, 7, 6, {}, {3: 0, 4: 1, 5: 2, 6: 3}),  # fewer layers than features: the shallowest features
        (3, 9, 6, {}, {3: 0, 4: 1, 5: 2, 6: 3, 7: 4, 8: 5}),
        (1, 7, 3, {}, {1: 0, 2: 0, 3: 1, 4: 1, 5: 2, 6: 2}),
        (0, 7, 3, {}, {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2}),  # what is left over goes to the last feature
        (3, 8, 1, {}, dict.fromkeys(range(3, 8), 0)),
        (1, 6, 5, {"text_step": 3}, {3: 2}),  # the layer's own number counts, not its place in the window
        (2, 6, 2, {"select_higher_step": True}, {2: 0, 4: 1}),
        (3, 9, 2, {"select_higher_step": True}, {3: 0, 6: 1}),
        (1, 9, 2, {"select_higher_step": True, "text_step": 6}, {6: 1}),
        (1, 9, 2, {"select_higher_step": True, "text_step": 1}, {4: 0, 8: 1}),
        (4, 10, 6, {"text_step": 2}, {4: 0, 6: 2, 8: 4}),
        (5, 6, 3, {"text_step": 4}, {}),  # a window that no layer of the step falls into
        (0, 32, 12, {}, {layer: min(layer // 2, 11) for layer in range(32)}),
    ],
)
def test_which_feature_enters_which_layer(
    start: int, end: int, features: int, more: dict[str, Any], expected: dict[int, int]
) -> None:
    found = entering(start_layer_idx=start, end_layer_idx=end, injected_hidden_states=features, **more)
    assert found == expected


def authors_schedule(start: int, end: int, features: int, text_step: int, select_higher: bool) -> dict[int, int]:
    """A window layer by layer, as the authors' loop walks it."""
    if features == 1:
        step = 1
    elif end - start > features:
        step = (end - start) // features
    else:
        step = 1
    if select_higher:
        text_step = max(step, text_step)
    found = {}
    for layer in range(DIMS.layers):
        if layer < start or layer >= end or layer % text_step:
            continue
        found[layer] = 0 if features == 1 else min((layer - start) // step, features - 1)
    return found


def test_every_window_is_the_authors() -> None:
    count = 0
    for start in range(0, 9):
        for end in range(start + 1, 12):
            for features in (1, 2, 3, 5, 12):
                for text_step in (1, 2, 3):
                    for select_higher in (False, True):
                        options = {"injected_hidden_states": features, "text_step": text_step}
                        found = entering(
                            start_layer_idx=start, end_layer_idx=end, select_higher_step=select_higher, **options
                        )
                        assert found == authors_schedule(start, end, features, text_step, select_higher)
                        count += 1
    assert count == 63 * 30


@pytest.mark.parametrize(
    ("layers", "first", "tail"),
    [
        ((-1, -1, 0, 1), 2, 4),
        ((0, 1, 2, 2), 0, 4),
        ((-1, 0, 0, -1), 1, 3),
        ((-1, 0, -1, 1), 1, 2),
        ((0, -1, -1, -1), 0, 1),
        ((-1, -1, -1, -1), 4, 4),
    ],
)
def test_where_a_token_enters_first_and_where_it_goes_on_by_itself(layers: Any, first: int, tail: int) -> None:
    schedule = Schedule(3, layers)
    assert (schedule.first, schedule.tail) == (first, tail)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"end_layer_idx": 33}, BackboneMismatch, "ends at layer 33; the language model has 32"),
        ({"injected_hidden_states": 13}, BackboneMismatch, "13 blocks are injected; vit has 12"),
        ({"encoder": "ast", "injected_hidden_states": 8}, BackboneMismatch, "8 blocks are injected; ast has 7"),
        ({"encoder": "timesformer"}, BackboneMismatch, "no timesformer"),
        ({"start_layer_idx": 31}, InvalidPackage, "from layer 31 to 31 is empty"),
        ({"start_layer_idx": 20, "end_layer_idx": 19}, InvalidPackage, "is empty"),
        ({"start_layer_idx": -1}, InvalidPackage, "start_layer_idx"),
        ({"end_layer_idx": 0}, InvalidPackage, "end_layer_idx"),
        ({"injected_hidden_states": 0}, InvalidPackage, "injected_hidden_states"),
        ({"text_step": 0}, InvalidPackage, "text_step"),
        ({"prompt_len": -1}, InvalidPackage, "prompt_len"),
        ({"prompt_len": MAX_PROMPT_LENGTH + 1}, InvalidPackage, "prompt_len"),
        ({"encoder": "clip"}, InvalidPackage, "encoder"),
        ({"colour": "red"}, InvalidPackage, "colour"),
        ({"answer_token_id": -5}, InvalidPackage, "answer_token_id"),
        ({"rank": 5}, InvalidPackage, "rank must be the number of connectors, 6"),
        ({"rank": 6, "shared_connector": True}, InvalidPackage, "rank must be the number of connectors, 1"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    rank = options.get("rank", 0 if "injected_hidden_states" in options else None) or None
    own = {name: value for name, value in options.items() if name != "rank"}
    if own.get("injected_hidden_states") == 0:
        rank = 1
    with pytest.raises(error, match=message):
        FAMILY.tensor_shapes(config_of(rank=rank, **own), DIMS)


def test_another_kind_of_backbone_is_refused() -> None:
    blip = BlipDims(width=12, layers=32, embed_dim=4)
    for ask in (FAMILY.tensor_shapes, FAMILY.schedule, FAMILY.site_groups):
        with pytest.raises(BackboneMismatch, match="needs a language model"):
            ask(config_of(), blip)
    with pytest.raises(BackboneMismatch, match="needs a language model"):
        FAMILY.slot_shapes(blip, 4)


# --- what a package holds --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"injected_hidden_states": 2},
            {f"connector.{k}.{w}": s for k in (0, 1) for w, s in (("weight", (12, 6)), ("bias", (12,)))},
        ),
        ({"shared_connector": True}, {"connector.0.weight": (12, 6), "connector.0.bias": (12,)}),
        (
            {"encoder": "ast", "injected_hidden_states": 1, "prompt_len": 3, "prompt_mlp": False},
            {"connector.0.weight": (12, 10), "connector.0.bias": (12,), f"{PROMPT}.0.weight": (3, 8)},
        ),
        (
            {"shared_connector": True, "prompt_len": 5},
            {
                "connector.0.weight": (12, 6),
                "connector.0.bias": (12,),
                f"{PROMPT}.0.weight": (5, 8),
                f"{PROMPT}.1.weight": (8, 8),
                f"{PROMPT}.1.bias": (8,),
                f"{PROMPT}.3.weight": (8, 8),
                f"{PROMPT}.3.bias": (8,),
            },
        ),
    ],
)
def test_tensors_of_a_package(options: dict[str, Any], expected: dict[str, tuple[int, ...]]) -> None:
    assert FAMILY.tensor_shapes(config_of(**options), DIMS) == expected


def test_a_released_size() -> None:
    """OPT with 2.7 billion parameters and a base ViT: the counts of the paper's code."""
    dims = OptDims(2560, 32, 2560, {"vit": EncoderDims(768, 12)})
    shapes = FAMILY.tensor_shapes(config_of(prompt_len=10), dims)
    counts = {name: int(torch.Size(shape).numel()) for name, shape in shapes.items()}
    assert sum(count for name, count in counts.items() if name.startswith("connector")) == 11_811_840
    assert sum(count for name, count in counts.items() if name.startswith(PROMPT)) == 13_137_920


def test_slots_hold_every_encoder_and_prompt() -> None:
    for options in (
        {},
        {"encoder": "ast", "prompt_len": 9},
        {"shared_connector": True, "prompt_len": MAX_PROMPT_LENGTH},
    ):
        config = config_of(**options)
        shapes = FAMILY.slot_shapes(DIMS, FAMILY.slot_rank(config) + 2)
        folded = FAMILY.fold(config, init_tensors(config, DIMS, torch.Generator()), DIMS)
        assert folded.keys() <= shapes.keys()
        for name, tensor in folded.items():
            assert all(own <= room for own, room in zip(tensor.shape, shapes[name], strict=True)), name


def test_dims_follow_from_the_tensors() -> None:
    for options in ({}, {"encoder": "ast", "prompt_len": 9}, {"shared_connector": True}):
        config = config_of(**options)
        tensors = init_tensors(config, DIMS, torch.Generator())
        derived = FAMILY.derived_dims(config, tensors)
        assert FAMILY.tensor_shapes(config, derived) == {name: tuple(t.shape) for name, t in tensors.items()}
    assert isinstance(FAMILY.derived_dims(config_of(), {}), OptDims)
    assert isinstance(FAMILY.derived_dims(config_of(), {"connector.0.weight": torch.zeros(3)}), OptDims)


def test_fresh_tensors_are_the_authors() -> None:
    config = config_of(prompt_len=40)
    tensors = init_tensors(config, DIMS, torch.Generator().manual_seed(3))
    again = init_tensors(config, DIMS, torch.Generator().manual_seed(3))
    assert {name: tuple(t.shape) for name, t in tensors.items()} == FAMILY.tensor_shapes(config, DIMS)
    assert all(torch.equal(tensor, again[name]) and tensor.dtype == torch.float32 for name, tensor in tensors.items())
    for name, tensor in tensors.items():
        if name == f"{PROMPT}.0.weight":
            assert abs(float(tensor.mean())) < 0.2 and 0.8 < float(tensor.std()) < 1.2
            continue
        bound = (6 if name.startswith("connector") else 8) ** -0.5
        assert 0.8 * bound < float(tensor.abs().max()) <= bound, name
        assert tensor.min() < 0 < tensor.max()
    theirs = torch.nn.Linear(6, 2000)
    assert 0.99 * 6**-0.5 < float(theirs.weight.detach().abs().max()) <= 6**-0.5, "the bound is PyTorch's own"


# --- folding ---------------------------------------------------------------------------------------------

FOLDED: tuple[dict[str, Any], ...] = (
    {},
    {"prompt_len": 4},
    {"prompt_len": 4, "prompt_mlp": False},
    {"shared_connector": True, "prompt_len": 2},
    {"injected_hidden_states": 1, "encoder": "ast"},
)


def unfolded(config: AdapterConfig, tensors: dict[str, Tensor], features: Tensor) -> tuple[Tensor, Tensor | None]:
    """The authors' modules: a list of linear layers, and an embedding with a small network behind it."""
    options = options_of(config)
    n = options.injected_hidden_states
    values = []
    for k, feature in enumerate(features[:, -n:].unbind(dim=1)):
        number = 0 if options.shared_connector else k
        values.append(feature @ tensors[f"connector.{number}.weight"].t() + tensors[f"connector.{number}.bias"])
    prompt = None
    if options.prompt_len:
        prompt = tensors[f"{PROMPT}.0.weight"]
        if options.prompt_mlp:
            hidden = (prompt @ tensors[f"{PROMPT}.1.weight"].t() + tensors[f"{PROMPT}.1.bias"]).tanh()
            prompt = hidden @ tensors[f"{PROMPT}.3.weight"].t() + tensors[f"{PROMPT}.3.bias"]
    return torch.stack(values, dim=1), prompt


@pytest.mark.parametrize("options", FOLDED, ids=str)
def test_folding_is_exact_and_lets_gradients_through(options: dict[str, Any]) -> None:
    config = config_of(**options)
    fresh = init_tensors(config, DIMS, torch.Generator().manual_seed(1))
    encoder = DIMS.encoders[str(config.options["encoder"])]
    features = torch.randn(3, encoder.layers, encoder.width, generator=torch.Generator().manual_seed(2))
    grads = []
    for folds in (True, False):
        tensors = {name: tensor.clone().requires_grad_() for name, tensor in fresh.items()}
        if folds:
            slot = OneSlot(FAMILY.fold(config, tensors, DIMS))
            values = FAMILY.inject(features, slot, FAMILY.schedule(config, DIMS))
            prompt = FAMILY.prompt(slot)
        else:
            values, prompt = unfolded(config, tensors, features)
        total = (values**3).sum() + (0.0 if prompt is None else (prompt**3).sum())
        total.backward()
        grads.append((values, prompt, {name: tensor.grad for name, tensor in tensors.items()}))
    (values, prompt, own), (plain_values, plain_prompt, plain) = grads
    torch.testing.assert_close(values, plain_values, atol=1e-6, rtol=1e-5)
    assert (prompt is None) == (plain_prompt is None)
    if prompt is not None and plain_prompt is not None:
        torch.testing.assert_close(prompt, plain_prompt, atol=1e-6, rtol=1e-5)
    for name, grad in own.items():
        assert grad is not None and grad.abs().max() > 0, name
        torch.testing.assert_close(grad, plain[name], atol=1e-4, rtol=1e-4)


def test_the_prompt_network_takes_tanh_once() -> None:
    config = config_of(prompt_len=2)
    tensors = {name: torch.zeros(shape) for name, shape in FAMILY.tensor_shapes(config, DIMS).items()}
    tensors[f"{PROMPT}.0.weight"] += 3.0
    for index in (1, 3):
        tensors[f"{PROMPT}.{index}.weight"] = torch.eye(DIMS.word_width)
    prompt = FAMILY.fold(config, tensors, DIMS)["prompt"]
    torch.testing.assert_close(prompt, torch.full((2, 8), 3.0).tanh())


def test_it_adds_nothing_anywhere_else() -> None:
    config = config_of()
    slot = OneSlot(FAMILY.fold(config, init_tensors(config, DIMS, torch.Generator()), DIMS))
    x = torch.randn(2, 3, DIMS.width)
    assert FAMILY.delta(Site("text", 0, "text"), x, slot) is None
    assert FAMILY.memory("text", x, slot) is None
    assert FAMILY.prompt(slot) is None
    assert family_of("epalm") is FAMILIES["epalm"] and DIMS.head_shapes() == {}


# --- rows of a batch -------------------------------------------------------------------------------------


def view(seed: int, **options: Any) -> SlotView:
    config = config_of(**options)
    folded = FAMILY.fold(config, init_tensors(config, DIMS, torch.Generator().manual_seed(seed)), DIMS)
    return SlotView(FAMILY, folded, FAMILY.schedule(config, DIMS))


SLOTS = (
    view(0, prompt_len=3),
    view(1, encoder="ast", injected_hidden_states=2, start_layer_idx=0),
    view(2, shared_connector=True, prompt_len=5, prompt_mlp=False),
    SlotView(None, {}),
)


def states(row: int, slot: int) -> Tensor:
    encoder = DIMS.encoders["ast" if slot == 1 else "vit"]
    return torch.randn(encoder.layers, encoder.width, generator=torch.Generator().manual_seed(row))


def test_rows_of_a_mix_are_each_their_own() -> None:
    slot_of_row = (0, 1, 3, 2, 0, 1)
    features = [None if row == 4 else states(row, slot) for row, slot in enumerate(slot_of_row)]
    grouped = adapt_rows(SLOTS, slot_of_row)
    assert isinstance(grouped, GroupedAdaptation)
    prompt, injection = grouped.prompt(6), grouped.inject(features)
    assert prompt is not None and injection is not None
    assert prompt.lengths == (3, 0, 0, 5, 3, 0) and prompt.embeddings.shape == (6, 5, 8)
    assert injection.values.shape == (6, 6, 12)
    for row, slot in enumerate(slot_of_row):
        alone = UniformAdaptation(SLOTS[slot])
        own = alone.prompt(1)
        expected = torch.zeros(0, 8) if own is None else own.embeddings[0]
        torch.testing.assert_close(prompt.embeddings[row, : prompt.lengths[row]], expected)
        assert not prompt.embeddings[row, prompt.lengths[row] :].any()
        entering = alone.inject([features[row]])
        if entering is None:
            assert injection.schedules[row] is None and not injection.values[row].any()
            assert slot == 3 or row == 4
            continue
        assert injection.schedules[row] == SLOTS[slot].schedule == entering.schedules[0]
        torch.testing.assert_close(injection.values[row, : entering.values.shape[1]], entering.values[0])


def test_nothing_is_none() -> None:
    base = adapt_rows(SLOTS, (3, 3))
    assert base.prompt(2) is None and base.inject([states(0, 0), states(1, 0)]) is None
    blind = adapt_rows(SLOTS, (0, 2))
    assert blind.inject([None, None]) is None and blind.prompt(2) is not None
    assert adapt_rows(SLOTS, (1, 3)).prompt(2) is None


def test_expanded_rows_are_those_they_come_from() -> None:
    slot_of_row = (2, 0, 1)
    origin = [1, 1, 2, 0, 0]
    features = [states(row, slot) for row, slot in enumerate(slot_of_row)]
    adaptation = adapt_rows(SLOTS, slot_of_row)
    expanded = adaptation.expand(torch.tensor(origin))
    before, after = adaptation.inject(features), expanded.inject([features[row] for row in origin])
    assert before is not None and after is not None
    torch.testing.assert_close(after.values, before.values[origin])
    assert after.schedules == tuple(before.schedules[row] for row in origin)
    whole, more = adaptation.prompt(3), expanded.prompt(5)
    assert whole is not None and more is not None
    assert more.lengths == tuple(whole.lengths[row] for row in origin)
    torch.testing.assert_close(more.embeddings, whole.embeddings[origin])


# --- every group of tensors counts -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"start_layer_idx": 2, "end_layer_idx": 5, "injected_hidden_states": 5, "prompt_len": 2},  # three of five used
        {"start_layer_idx": 0, "end_layer_idx": 6, "injected_hidden_states": 3, "prompt_len": 3, "prompt_mlp": False},
        {"start_layer_idx": 1, "end_layer_idx": 6, "injected_hidden_states": 4, "shared_connector": True},
        {"start_layer_idx": 1, "end_layer_idx": 6, "injected_hidden_states": 5, "text_step": 3},  # one of five used
        {"start_layer_idx": 1, "end_layer_idx": 2, "injected_hidden_states": 2, "text_step": 5, "prompt_len": 1},
    ],
    ids=str,
)
def test_a_group_that_is_zeroed_is_missed(options: dict[str, Any]) -> None:
    """And a tensor of no group is not."""
    model = random_model(0)
    dims = dims_of(model)
    assert (dims.width, dims.layers) == (WIDTH, 6)
    config = config_for(dims, encoder="vit", **options)
    tensors = init_tensors(config, dims, torch.Generator().manual_seed(4))
    groups = FAMILY.site_groups(config, dims)
    features = 2.0 * torch.randn(5, 10, generator=torch.Generator().manual_seed(5))

    def logits(changed: dict[str, Tensor]) -> Tensor:
        slot = SlotView(FAMILY, FAMILY.fold(config, changed, dims), FAMILY.schedule(config, dims))
        ids = torch.tensor([[2, 5, 9, 13]])
        with torch.inference_mode():
            return model.score(ids, torch.ones_like(ids, dtype=torch.bool), [features], UniformAdaptation(slot))

    plain = logits(tensors)
    for group, names in groups.items():
        zeroed = logits(tensors | {name: torch.zeros_like(tensors[name]) for name in names})
        assert (plain - zeroed).abs().max() > 1e-2, group
    grouped = [name for names in groups.values() for name in names]
    assert len(set(grouped)) == len(grouped) and set(grouped) <= tensors.keys()
    others = {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if name not in grouped}
    assert torch.equal(plain, logits(tensors | others))
    used = {feature for feature in FAMILY.schedule(config, dims).layers if feature != NOTHING}
    connectors = {int(name.split(".")[1]) for name in grouped if name.startswith("connector")}
    assert connectors == ({0} if options.get("shared_connector") else used)
    assert ("prompt" in groups) == bool(options.get("prompt_len"))


def test_gradients_reach_every_group_through_a_whole_model() -> None:
    """Also where rows of two adapters share a batch, as a service would put them together."""
    model = random_model(2)
    dims = dims_of(model)
    config = config_for(dims, encoder="vit", start_layer_idx=1, end_layer_idx=3, injected_hidden_states=2, prompt_len=2)
    other = slot_of(
        config_for(dims, encoder="ast", start_layer_idx=0, end_layer_idx=2, injected_hidden_states=1), dims, 1
    )
    fresh = init_tensors(config, dims, torch.Generator().manual_seed(4))
    tensors = {name: tensor.requires_grad_() for name, tensor in fresh.items()}
    slot = SlotView(FAMILY, FAMILY.fold(config, tensors, dims), FAMILY.schedule(config, dims))
    batch = Mixed(model, [slot, other, BASE], (0, 1, 2, 0), (), ())
    ids = torch.tensor([[2, 5, 9, 13]]).expand(4, -1)
    features = [torch.randn(5, 10), torch.randn(6, 12), None, torch.randn(5, 10)]
    logits = model.score(ids, torch.ones_like(ids, dtype=torch.bool), features, batch.adaptation)
    logits.logsumexp(-1).sum().backward()
    for name, tensor in tensors.items():
        assert tensor.grad is not None and tensor.grad.abs().max() > 0, name
