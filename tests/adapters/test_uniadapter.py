"""Every combination of options, imported and run through a whole model, computes what the plain reference computes."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.families import FAMILIES
from adapters.families.base import SlotView, UniformAdaptation
from adapters.families.uniadapter import frame_factors, options_of
from adapters.importers.uniadapter import import_uniadapter
from service.backbone.blip import Blip
from service.backbone.config import SpecialIds
from service.backbone.convert import SourceWeights, assemble, canonical
from tests.adapters.test_importers import DIMS, PARTS, SIZES
from tests.parity.reference import Ids, Reference, Switches
from tests.parity.synthetic import Maker, Recipe

COMBINATIONS = [
    (visual, textual, multimodal, memory, frames)
    for visual, textual, multimodal, memory, frames in itertools.product((True, False), repeat=5)
    if multimodal or not textual  # text without cross terms ends in an undefined variable in the authors' code
]
NUM_FRAMES = 3


def close(ours: Tensor, plain: Tensor) -> None:
    torch.testing.assert_close(ours, plain, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("visual", "textual", "multimodal", "memory", "frames"), COMBINATIONS)
def test_a_combination_of_options(visual: bool, textual: bool, multimodal: bool, memory: bool, frames: bool) -> None:
    options = {"adapter_visual": visual, "adapter_textual": textual, "adapter_multimodal": multimodal}
    options |= {"video_key_adapter": memory, "frame_aware_attention": frames}
    maker = Maker(SIZES, Recipe("retrieval", 1, NUM_FRAMES, 2, options, momentum=False), 0)
    state, config, inputs = maker.state(), maker.config(), maker.inputs()
    plain = Reference(state, num_heads=SIZES.heads, ids=Ids(**SIZES.special), switches=Switches.of(config))
    model, adaptation = _imported(state, config)
    with torch.no_grad():
        hidden = plain.look(inputs["input.video"][0]).hidden
        close(model.encode_vision(inputs["input.video"][0], adaptation), hidden)
        ids, mask = inputs["input.text_ids"], inputs["input.text_mask"]
        text = plain.bert("text_encoder", ids, mask)[-1]
        close(model.encode_text(ids, mask.bool(), adaptation), text)
        y = hidden.flatten(0, 1)[None].expand(len(ids), -1, -1)
        similarity = plain.text_feature(text) @ plain.frame_features(hidden[:, 0]).t() if frames else None
        factors = frame_factors(similarity, hidden.shape[1]) if similarity is not None else None
        seen = torch.ones(y.shape[:2], dtype=torch.bool)
        ours = model.encode_multimodal(ids, mask.bool(), y, seen, adaptation, factors)
        expected, logits = plain.match(ids, mask, y, similarity)
        close(ours, expected)
        close(model.project("itm_head", ours[:, 0], adaptation), logits)


def _imported(state: dict[str, Tensor], config: dict[str, Any]) -> tuple[Blip, UniformAdaptation]:
    model, _ = assemble(
        SourceWeights("test", canonical(state)), num_heads=SIZES.heads, special_ids=SpecialIds(**SIZES.special)
    )
    imported = import_uniadapter(
        {"model": state, "config": config}, dims=DIMS, parts=PARTS, check_backbone=lambda state: None
    )
    assert options_of(imported.config).frame_aware_attention == config["frame_aware_attention"]
    family = FAMILIES["uniadapter"]
    slot = {name: tensor for name, tensor in imported.tensors.items() if name in DIMS.head_shapes()}
    return model, UniformAdaptation(SlotView(family, slot | family.fold(imported.config, imported.tensors, DIMS)))
