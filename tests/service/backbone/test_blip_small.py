"""Small batches that are recorded find what they find without, whatever was in their places before."""

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from adapters.families.base import SlotView, adapt_rows
from adapters.families.uniadapter import UniAdapter
from service.backbone.base import Backbone
from service.backbone.blip import Blip
from service.backbone.blip_small import MAX_FRAMES, MAX_TEXTS, MAX_TOKENS, SmallBatches
from service.backbone.folder import load_backbone
from tests.service.worlds import PATCH, adapter_config, random_tensors, write_tiny_backbone
from tests.tape import make_recordings

FAMILY = UniAdapter()
ATOL = 1e-5


WITH_HEADS, WITHOUT = "with heads", "without"


@pytest.fixture(scope="module", params=[WITH_HEADS, WITHOUT])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tmp_path_factory.mktemp("small") / "backbone"
    write_tiny_backbone(folder, with_heads=request.param == WITH_HEADS)
    return load_backbone(folder)


def slots_of(backbone: Backbone) -> list[SlotView]:
    """`__base__`, adapters with the backbone's heads, and where it has heads one with its own."""
    heads = backbone.head_tensors()
    found = [SlotView(None, heads)]
    for seed, rank in enumerate((2, 8, 20)):
        config = adapter_config(
            backbone, "retrieval", rank=rank, heads=("vision_proj", "text_proj") if heads and seed else ()
        )
        tensors = random_tensors(config, backbone.dims(), seed)
        own = {name: tensor for name, tensor in tensors.items() if name in heads}
        found.append(SlotView(FAMILY, heads | FAMILY.fold(config, tensors, backbone.dims()) | own))
    return found


def see(model: Blip, pixels: Tensor, slots: Sequence[SlotView], rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    adaptation = adapt_rows(slots, rows)
    states = model.encode_vision(pixels, adaptation)
    return states, None if model.vision_proj is None else model.project("vision_proj", states[:, 0], adaptation)


def read(model: Blip, ids: Tensor, mask: Tensor, slots: Sequence[SlotView], rows: Sequence[int]) -> Tensor:
    adaptation = adapt_rows(slots, rows)
    hidden = model.encode_text(ids, mask, adaptation)
    return functional.normalize(model.project("text_proj", hidden[:, 0], adaptation), dim=-1)


def test_frames_are_seen_as_without(backbone: Backbone) -> None:
    recordings, recorder = make_recordings()
    model, slots, choice = backbone.model, slots_of(backbone), random.Random(0)
    small = SmallBatches(model, recordings, backbone.dims() if backbone.head_tensors() else None)
    if not backbone.head_tensors():
        slots = slots[:1]  # a backbone without heads takes no adapters
    with torch.inference_mode():
        for number in range(40):
            rows = [choice.randrange(len(slots)) for _ in range(choice.randint(1, MAX_FRAMES))]
            rows = rows[:1] * len(rows) if number % 3 == 0 else rows
            pixels = torch.randn(len(rows), 3, *[PATCH * choice.randint(1, 3)] * 2)
            found = small.see(pixels, [slots[row] for row in rows])
            assert found is not None
            states, projected = see(model, pixels, slots, rows)
            torch.testing.assert_close(found.states[: len(rows)], states, atol=ATOL, rtol=ATOL)
            assert (found.frames is None) == (projected is None)
            if found.frames is not None and projected is not None:
                torch.testing.assert_close(found.frames[: len(rows)], projected, atol=ATOL, rtol=ATOL)
        many = MAX_FRAMES + 1
        assert small.see(torch.randn(many, 3, PATCH, PATCH), [slots[0]] * many) is None
    assert recorder.num_played > recorder.num_recorded > 3 and not recordings.has_failed


@pytest.mark.parametrize("backbone", [WITH_HEADS], indirect=True)  # without, texts have no features
def test_texts_are_read_as_without(backbone: Backbone) -> None:
    recordings, recorder = make_recordings()
    model, slots, choice = backbone.model, slots_of(backbone), random.Random(0)
    small = SmallBatches(model, recordings, backbone.dims())
    with torch.inference_mode():
        for number in range(40):
            rows = [choice.randrange(len(slots)) for _ in range(choice.randint(1, MAX_TEXTS))]
            rows = rows[:1] * len(rows) if number % 3 == 0 else rows
            lengths = torch.tensor([choice.randint(2, 20) for _ in rows])
            ids = torch.randint(5, 40, (len(rows), int(lengths.max())))
            mask = torch.arange(ids.shape[1]) < lengths[:, None]
            found = small.read(ids, mask, [slots[row] for row in rows])
            assert found is not None
            wanted = read(model, ids, mask, slots, rows)
            torch.testing.assert_close(found.result[: len(rows)], wanted, atol=ATOL, rtol=ATOL)
        many = MAX_TEXTS + 1
        assert small.read(ids[:1].expand(many, -1), mask[:1].expand(many, -1), [slots[0]] * many) is None
        long = torch.ones(1, MAX_TOKENS + 1, dtype=torch.long)
        assert small.read(long, long.bool(), slots[:1]) is None
    assert recorder.num_played > recorder.num_recorded > 3 and not recordings.has_failed


def test_what_is_no_number_is_not_met_by_later_batches(backbone: Backbone) -> None:
    recordings, _ = make_recordings()
    small = SmallBatches(backbone.model, recordings, None)
    base, pixels = SlotView(None, backbone.head_tensors()), torch.randn(2, 3, PATCH, PATCH)
    with torch.inference_mode():
        for frames in (torch.full_like(pixels, torch.nan), pixels, pixels[:1]):
            found = small.see(frames, [base] * len(frames))
            assert found is not None
        torch.testing.assert_close(found.states[:1], see(backbone.model, pixels[:1], [base], [0])[0])
    assert not recordings.has_failed
