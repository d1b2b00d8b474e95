"""The library's folders of an OPT and of encoders: names of both generations, epsilons, and everything refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.errors import ConversionError
from service.backbone.base import load_tokenizer
from service.backbone.convert_opt import KINDS, OptPart, assemble_opt, read_part
from service.demo.vocabulary import build_tokenizer
from tests.service.backbone.opt_library import (
    BINS,
    IMAGE,
    LAYERS,
    PATCH,
    POSITIONS,
    POST_NORM,
    STEPS,
    VOCABULARY,
    WIDTH,
    rewrite_config,
    write_library_model,
)

PARTS = {"ViT": "vit", "Timesformer": "timesformer", "AST": "ast", "OPT": "language_model"}
ENCODERS = ("ViT", "Timesformer", "AST")


def written(folder: Path, kind: str, **options: Any) -> str:
    write_library_model(folder / kind, kind, **options)
    return str(folder / kind)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sources")
    return {kind: written(folder, kind) for kind in PARTS}


# --- what is read ----------------------------------------------------------------------------------------


def test_sizes(sources: dict[str, str]) -> None:
    config = assemble_opt([read_part(source) for source in sources.values()])[0].config
    own = config.language_model
    assert (own.width, own.layers, own.heads, own.mlp_width) == (WIDTH, LAYERS, 3, 2 * WIDTH)
    assert (own.vocab_size, own.max_positions, own.word_width) == (VOCABULARY, POSITIONS, WIDTH)
    assert own.pre_norm and own.final_norm and not own.has_word_projection and own.norm_eps == 1e-5
    assert config.vit is not None and config.timesformer is not None and config.ast is not None
    assert (config.vit.patch, config.vit.grid) == (PATCH, IMAGE // PATCH)
    assert (config.timesformer.grid, config.timesformer.num_frames) == (IMAGE // PATCH, 3)
    assert (config.ast.num_mel_bins, config.ast.max_steps, config.ast.num_patches) == (BINS, STEPS, 4 * 9)
    assert config.special_ids.model_dump() == {"pad": 1, "bos": 2, "eos": 2}
    assert set(config.encoders) == {"vit", "timesformer", "ast"}


def test_norms_behind_have_none_at_the_end(tmp_path: Path) -> None:
    own = assemble_opt([read_part(written(tmp_path, "OPT", **POST_NORM))])[0].config.language_model
    assert not own.pre_norm and not own.final_norm and own.has_word_projection and own.word_width == 16


@pytest.mark.parametrize("kind", PARTS)
def test_names_on_disk_and_in_memory_mean_the_same(kind: str, sources: dict[str, str], tmp_path: Path) -> None:
    """The library writes older names than its models have; folders of both are read alike."""
    source = Path(sources[kind])
    part = read_part(str(source))
    model = write_library_model(tmp_path / "new", kind)
    in_memory = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(in_memory, tmp_path / "new" / "model.safetensors", metadata={"format": "pt"})
    again = read_part(str(tmp_path / "new"))
    assert part.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(part.tensors[name], again.tensors[name]) for name in part.tensors)
    on_disk = load_file(source / "model.safetensors")
    if kind in ("ViT", "AST"):
        assert on_disk.keys() != in_memory.keys()


@pytest.mark.parametrize("kind", PARTS)
def test_both_generations_of_names_are_known_here_too(kind: str, sources: dict[str, str]) -> None:
    """Whatever the library's models call their weights."""
    from service.backbone.convert import join_qkv, rename
    from service.backbone.convert_opt import _IGNORED

    part = read_part(sources[kind])
    rules = next(known.rules for known in KINDS.values() if known.name == PARTS[kind])
    on_disk = join_qkv(rename(load_file(Path(sources[kind]) / "model.safetensors"), rules, _IGNORED), "attn")
    assert on_disk.keys() == part.tensors.keys()
    assert all(torch.equal(part.tensors[name], on_disk[name]) for name in on_disk)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize(("theirs", "ours"), [(1e-12, 1e-6), (1e-6, 1e-6), (1e-5, 1e-5)])
def test_the_librarys_default_epsilon_gives_way_to_the_authors(
    kind: str, theirs: float, ours: float, tmp_path: Path
) -> None:
    assert read_part(written(tmp_path, kind, layer_norm_eps=theirs)).config.norm_eps == ours


def test_half_precision_stays(tmp_path: Path) -> None:
    write_library_model(tmp_path, "OPT").half().save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in read_part(str(tmp_path)).tensors.values()} == {torch.float16}


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("OPT", {"activation_function": "gelu"}, "ReLU, biases and LayerNorms"),
        ("OPT", {"enable_bias": False}, "ReLU, biases and LayerNorms"),
        ("OPT", {"layer_norm_elementwise_affine": False}, "ReLU, biases and LayerNorms"),
        ("OPT", {"tie_word_embeddings": False}, "not tied"),
        *((kind, {"hidden_act": "gelu_new"}, "not gelu_new") for kind in ENCODERS),
        *((kind, {"qkv_bias": False}, "biases") for kind in ENCODERS),
        *((kind, {"num_channels": 1}, "three channels") for kind in ("ViT", "Timesformer")),
        *((kind, {"image_size": [16, 20]}, "square pictures") for kind in ("ViT", "Timesformer")),
        ("Timesformer", {"attention_type": "space_only"}, "not space_only"),
        ("Timesformer", {"attention_type": "joint_space_time"}, "not joint_space_time"),
    ],
)
def test_another_variant_is_refused(kind: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = written(tmp_path, kind)
    rewrite_config(Path(source), **options)
    with pytest.raises(ConversionError, match=message):
        read_part(source)


def test_another_architecture_is_refused(sources: dict[str, str], tmp_path: Path) -> None:
    source = written(tmp_path, "ViT")
    rewrite_config(Path(source), model_type="deit")
    with pytest.raises(
        ConversionError, match="is deit; known are opt, vit, timesformer, audio-spectrogram-transformer"
    ):
        read_part(source)


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_no_model_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match=r"no model at"):
        read_part(str(tmp_path / name))


def changed(source: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = Path(source) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", PARTS)
def test_weights_that_are_missing_are_not_made_up(kind: str, tmp_path: Path) -> None:
    """The library would draw them at random and say so in its log."""
    source = written(tmp_path, kind)
    names = load_file(Path(source) / "model.safetensors")
    lost = next(name for name in names if re.search(r"layernorm_after\.weight|fc1\.weight", name))
    changed(source, lambda tensors: tensors.pop(lost))
    with pytest.raises(ConversionError, match="lacks"):
        read_part(source)


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    source = written(tmp_path, "ViT")
    (Path(source) / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match="cannot read the weights"):
        read_part(source)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    source = written(tmp_path, "ViT")
    rewrite_config(Path(source), image_size=32)
    with pytest.raises(ConversionError, match="cannot read the weights"):
        read_part(source)


def test_two_of_a_kind_are_refused(sources: dict[str, str], tmp_path: Path) -> None:
    other = written(tmp_path, "OPT", seed=1)
    with pytest.raises(ConversionError, match=re.escape(f"{sources['OPT']} and {other} are both a language_model")):
        assemble_opt([read_part(sources["OPT"]), read_part(other)])
    with pytest.raises(ConversionError, match="are both a vit"):
        assemble_opt([read_part(sources["OPT"]), read_part(sources["ViT"]), read_part(sources["ViT"])])


@pytest.mark.parametrize("kinds", [(), ("ViT",), ENCODERS])
def test_encoders_alone_are_refused(kinds: tuple[str, ...], sources: dict[str, str]) -> None:
    with pytest.raises(ConversionError, match="need a language model"):
        assemble_opt([read_part(sources[kind]) for kind in kinds])


def tokenizer_in(folder: Path) -> Any:
    build_tokenizer(folder)
    return load_tokenizer(folder)


def test_a_tokenizer_with_too_many_words_is_refused(sources: dict[str, str], tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path)
    assert len(tokenizer) > VOCABULARY
    with pytest.raises(ConversionError, match=f"has {len(tokenizer)} words, the language model only {VOCABULARY}"):
        assemble_opt([read_part(sources["OPT"])], tokenizer=tokenizer)


def test_a_tokenizer_beside_the_weights_is_taken(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path / "words")
    source = written(tmp_path, "OPT", vocab_size=len(tokenizer) + 5)
    tokenizer.save_pretrained(source)
    _, found = assemble_opt([read_part(source)])
    assert found is not None and found.get_vocab() == tokenizer.get_vocab()


def test_an_incomplete_part_is_refused(sources: dict[str, str]) -> None:
    part = read_part(sources["OPT"])
    for name in ("layers.1.fc1.weight", "layers.0.attn.qkv.weight", "words.weight"):
        cut = {own: tensor for own, tensor in part.tensors.items() if own != name}
        with pytest.raises(ConversionError, match="no complete model"):
            assemble_opt([OptPart(part.name, part.origin, part.config, cut, part.special_ids)])


def test_heads_that_do_not_divide_the_width_are_refused(sources: dict[str, str]) -> None:
    part = read_part(sources["OPT"])
    config = part.config.model_copy(update={"heads": 5})
    with pytest.raises((ConversionError, ValueError), match="5 heads do not divide width"):
        assemble_opt([OptPart(part.name, part.origin, config, part.tensors, part.special_ids)])
