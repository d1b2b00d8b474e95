"""Packing changes how a model's weights lie, and nothing that can be seen of them."""

from pathlib import Path

import pytest
import torch

from service.backbone.base import Backbone
from service.backbone.blip import Blip
from service.backbone.folder import load_backbone
from service.backbone.linear import FrozenLinear, WordHead
from service.backbone.opt import Opt
from tests.service.opt_worlds import write_tiny_opt
from tests.service.worlds import write_tiny_backbone


@pytest.fixture(scope="module", params=["blip", "opt"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "backbone"
    if request.param == "blip":
        write_tiny_backbone(path)
    else:
        write_tiny_opt(path)
    return path


def packed_of(folder: Path, dtype: str = "float32") -> Backbone:
    backbone = load_backbone(folder, dtype=dtype)
    backbone.pack()
    return backbone


def test_a_packed_model_has_the_same_state_and_digests(folder: Path) -> None:
    plain, packed = load_backbone(folder), packed_of(folder)
    packed.verify()
    state = packed.model.state_dict()
    assert list(state) == list(plain.model.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.model.state_dict().items())


def test_packing_twice_and_packing_what_cannot_be_change_nothing(folder: Path) -> None:
    packed = packed_of(folder)
    packed.pack()
    packed.verify()
    half = packed_of(folder, "float16")
    assert all(module.packed is None for module in half.model.modules() if isinstance(module, FrozenLinear | WordHead))


def test_the_plain_matrices_are_given_up(folder: Path) -> None:
    linears = [module for module in packed_of(folder).model.modules() if isinstance(module, FrozenLinear)]
    assert linears and all(module.packed is not None and module.weight.numel() == 0 for module in linears)


def test_every_linear_map_but_the_heads_of_an_adapter_is_packed(folder: Path) -> None:
    model = packed_of(folder).model
    plain = {
        name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not isinstance(m, FrozenLinear)
    }
    assert plain == ({"vision_proj", "text_proj", "itm_head"} if isinstance(model, Blip) else set())


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.1)])
def test_a_packed_model_computes_the_same(folder: Path, dtype: str, tolerance: float) -> None:
    torch.manual_seed(0)
    outputs = []
    for backbone in (load_backbone(folder, dtype=dtype), packed_of(folder, dtype)):
        model, generator = backbone.model, torch.Generator().manual_seed(0)
        ids = torch.randint(5, 20, (3, 6), generator=generator)
        mask = torch.ones_like(ids, dtype=torch.bool)
        with torch.inference_mode():
            if isinstance(model, Opt):
                outputs.append(model.score(ids, mask, [None] * 3, None))
                continue
            states = model.encode_vision(torch.randn(3, 3, 16, 16, generator=generator), None)
            seen = torch.ones(states.shape[:2], dtype=torch.bool)
            asked = model.encode_multimodal(ids, mask, states, seen, None)
            answers = model.score_answers(asked, mask, ids, mask, torch.arange(3), None)
            outputs.append(torch.cat([answers.flatten(), model.encode_text(ids, mask, None).flatten()]))
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)
