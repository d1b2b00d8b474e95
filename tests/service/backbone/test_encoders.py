"""Perceptual encoders give what the library's give: the first token after every block, through the final LayerNorm."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from service.backbone.convert_opt import assemble_opt, read_part
from service.backbone.opt import Opt
from tests.service.backbone.opt_library import BINS, FRAMES, IMAGE, LAYERS, STEPS, WIDTH, write_library_model

NAMES = {"ViT": "vit", "Timesformer": "timesformer", "AST": "ast"}
SHAPES = {"ViT": (3, IMAGE, IMAGE), "Timesformer": (FRAMES, 3, IMAGE, IMAGE), "AST": (STEPS, BINS)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("encoders")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> dict[str, Any]:
    return {kind: write_library_model(folder / kind, kind, seed=seed) for seed, kind in enumerate(NAMES)}


@pytest.fixture(scope="module")
def ours(folder: Path, theirs: dict[str, Any]) -> Opt:
    write_library_model(folder / "OPT", "OPT")
    model, tokenizer = assemble_opt([read_part(str(folder / kind)) for kind in ("OPT", *NAMES)])
    assert tokenizer is None
    return model


def expected(model: Any, inputs: Tensor, **options: Any) -> Tensor:
    """[B, blocks, D], every block through the final norm."""
    states = model(inputs, output_hidden_states=True, **options).hidden_states
    assert len(states) == LAYERS + 1
    return torch.stack([model.layernorm(state)[:, 0] for state in states[1:]], dim=1)


def inputs_of(*shape: int) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))


def near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", NAMES)
def test_every_block(kind: str, ours: Opt, theirs: dict[str, Any]) -> None:
    inputs = inputs_of(*SHAPES[kind])
    found = ours.perceive(NAMES[kind], inputs)
    assert found.shape == (2, LAYERS, WIDTH)
    near(found, expected(theirs[kind], inputs))
    near(found[:, -1], theirs[kind](inputs).last_hidden_state[:, 0])
    raw = theirs[kind](inputs, output_hidden_states=True).hidden_states[-1][:, 0]
    assert not torch.allclose(found[:, -1], raw, atol=1e-2), "the library's own states are before the final norm"


@pytest.mark.parametrize("kind", NAMES)
def test_rows_do_not_depend_on_each_other(kind: str, ours: Opt) -> None:
    inputs = inputs_of(*SHAPES[kind])
    together = ours.perceive(NAMES[kind], inputs)
    for row in range(len(inputs)):
        near(ours.perceive(NAMES[kind], inputs[row : row + 1])[0], together[row])


@pytest.mark.parametrize("side", [8, 12, 24, 36])
def test_pictures_of_another_size(side: int, ours: Opt, theirs: dict[str, Any]) -> None:
    pictures = inputs_of(3, side, side)
    near(ours.perceive("vit", pictures), expected(theirs["ViT"], pictures, interpolate_pos_encoding=True))


@pytest.mark.parametrize("num_frames", [1, 2, 5, 8])
def test_clips_of_another_number_of_frames(num_frames: int, ours: Opt, theirs: dict[str, Any]) -> None:
    """The library's blocks take the number from the config, its time embeddings from the clip."""
    model = theirs["Timesformer"]
    clips = inputs_of(num_frames, 3, IMAGE, IMAGE)
    own = model.config.num_frames
    model.config.num_frames = num_frames
    try:
        near(ours.perceive("timesformer", clips), expected(model, clips))
    finally:
        model.config.num_frames = own


@pytest.mark.parametrize("side", [8, 24])
def test_clips_of_another_size_take_the_nearest_positions(side: int, ours: Opt, theirs: dict[str, Any]) -> None:
    """As TimeSformer's authors do, and unlike a ViT."""
    clips = inputs_of(FRAMES, 3, side, side)
    near(ours.perceive("timesformer", clips), by_nearest(theirs["Timesformer"], clips))


def by_nearest(model: Any, clips: Tensor) -> Tensor:
    """The library's model with its positions resized by hand: row r of the new grid is row r * old // new of the old one."""
    old, new = IMAGE // 4, clips.shape[-1] // 4
    table = model.embeddings.position_embeddings
    chosen = [1 + (r * old // new) * old + c * old // new for r in range(new) for c in range(new)]
    resized = torch.cat([table[:, :1], table[:, chosen]], dim=1)
    try:
        model.embeddings.position_embeddings = torch.nn.Parameter(resized, requires_grad=False)
        return expected(model, clips)
    finally:
        model.embeddings.position_embeddings = table


def test_the_order_of_frames_matters(ours: Opt) -> None:
    clips = inputs_of(FRAMES, 3, IMAGE, IMAGE)
    assert not torch.allclose(
        ours.perceive("timesformer", clips), ours.perceive("timesformer", clips.flip(1)), atol=1e-3
    )


def test_the_distillation_token_is_not_read_but_seen(ours: Opt, theirs: dict[str, Any]) -> None:
    sounds = inputs_of(STEPS, BINS)
    states = theirs["AST"](sounds).last_hidden_state
    near(ours.perceive("ast", sounds)[:, -1], states[:, 0])
    assert not torch.allclose(states[:, 0], states[:, 1], atol=1e-2)


@pytest.mark.parametrize("kind", NAMES)
def test_backbones_of_any_float_cast_what_they_perceive(kind: str, folder: Path, ours: Opt) -> None:
    model, _ = assemble_opt([read_part(str(folder / name)) for name in ("OPT", kind)])
    half = model.to(torch.bfloat16)
    inputs = inputs_of(*SHAPES[kind])
    found = half.perceive(NAMES[kind], inputs)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), ours.perceive(NAMES[kind], inputs), atol=0.2, rtol=0.1)
