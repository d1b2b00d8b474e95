"""Other people's weights: names, sizes, special ids, merging; and everything that must be refused."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.errors import BackboneMismatch, ConversionError
from service.backbone.base import Backbone, load_tokenizer
from service.backbone.config import SpecialIds
from service.backbone.convert import (
    SourceWeights,
    assemble,
    canonical,
    check_same_backbone,
    merge,
    read_authors,
    read_hugging_face,
    read_source,
    with_blip_tokens,
)
from service.backbone.folder import load_backbone, write_backbone
from service.backbone.vit import interpolate_positions
from service.demo.vocabulary import build_tokenizer
from tests.parity.synthetic import Maker, Recipe, Sizes
from tests.service.backbone.library import CAPTION, HEADS, IDS, LAYERS, QA, RETRIEVAL, WIDTH, write_library_model

SPECIAL = {"pad": 0, "cls": 80, "sep": 81, "bos": 88, "enc": 89}
SIZES = Sizes(24, 3, 2, 5, 3, 90, 4, 12, 20, 30, 12, 8, SPECIAL)
NUM_HEADS = SIZES.heads
SPECIAL_IDS = SpecialIds(**SPECIAL)


@pytest.fixture(scope="module")
def vqa_state() -> dict[str, Tensor]:
    return Maker(SIZES, Recipe("vqa", 1, None, 1), 0).state()


@pytest.fixture(scope="module")
def retrieval_state() -> dict[str, Tensor]:
    return Maker(SIZES, Recipe("retrieval", 1, None, 1, {"video_key_adapter": True}), 0).state()


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any], Path]:
    def saved(document: Any) -> Path:
        torch.save(document, tmp_path / "checkpoint.pth")
        return tmp_path / "checkpoint.pth"

    return saved


def backbone_of(state: dict[str, Tensor], folder: Path) -> Backbone:
    model, _ = assemble(SourceWeights("test", canonical(state)), num_heads=NUM_HEADS, special_ids=SPECIAL_IDS)
    write_backbone(folder, model, None, {})
    return load_backbone(folder)


# --- the authors' checkpoints ----------------------------------------------------------------------------


def test_sizes_are_read_from_shapes(save: Callable[[Any], Path], vqa_state: dict[str, Tensor]) -> None:
    model, tokenizer = assemble(read_authors(save({"model": vqa_state})), num_heads=NUM_HEADS, special_ids=SPECIAL_IDS)
    config = model.config
    assert tokenizer is None and config.embed_dim is None
    assert (config.vision.width, config.vision.layers, config.vision.patch, config.vision.grid) == (24, 2, 4, 3)
    assert config.vision.norm_eps == 1e-6
    assert config.decoder is not None and config.text_encoder is not None
    assert (config.decoder.vocab_size, config.decoder.max_positions, config.decoder.memory_width) == (90, 30, 24)
    assert config.text_encoder.norm_eps == config.decoder.norm_eps == 1e-12


def test_a_bare_state_dict_will_do(save: Callable[[Any], Path], vqa_state: dict[str, Tensor]) -> None:
    whole, bare = read_authors(save({"model": vqa_state})), read_authors(save(vqa_state))
    assert whole.tensors.keys() == bare.tensors.keys()


def test_self_attention_becomes_one_map(vqa_state: dict[str, Tensor]) -> None:
    tensors = canonical(vqa_state)
    source = "text_encoder.encoder.layer.1.attention.self"
    parts = [vqa_state[f"{source}.{which}.weight"] for which in ("query", "key", "value")]
    assert torch.equal(tensors["text_encoder.layers.1.attention.qkv.weight"], torch.cat(parts))
    assert "text_encoder.layers.1.attention.query.weight" not in tensors
    assert "text_encoder.layers.1.crossattention.query.weight" in tensors


def test_only_the_frozen_part_is_taken(retrieval_state: dict[str, Tensor]) -> None:
    """Momentum copies, queues, adapters and the temperature leave no trace."""
    assert {name.split(".")[0] for name in canonical(retrieval_state)} == {
        "vision",
        "text_encoder",
        "vision_proj",
        "text_proj",
        "itm_head",
    }
    assert not [name for name in canonical(retrieval_state) if "adapter" in name or "_m." in name]


def test_a_tensor_of_no_known_use_is_refused(vqa_state: dict[str, Tensor]) -> None:
    with pytest.raises(ConversionError, match=r"1 tensors of no known use: visual_encoder\.register_token"):
        canonical({**vqa_state, "visual_encoder.register_token": torch.zeros(1)})


def test_a_pickle_with_more_than_data_is_refused(save: Callable[[Any], Path], vqa_state: dict[str, Tensor]) -> None:
    with pytest.raises(ConversionError, match=r"cannot read checkpoint\.pth"):
        read_authors(save({"model": vqa_state, "hook": re.compile}))


def test_no_pickle_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.pth").write_text("not a checkpoint")
    with pytest.raises(ConversionError, match=r"cannot read notes\.pth"):
        read_authors(tmp_path / "notes.pth")
    with pytest.raises(ConversionError, match=r"cannot read nowhere\.pth"):
        read_authors(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("document", [{"model": [1, 2]}, {"model": {"a": 1}}, [1], {"model": None}])
def test_no_state_dict_is_refused(save: Callable[[Any], Path], document: Any) -> None:
    with pytest.raises(ConversionError, match="holds no state dict"):
        read_authors(save(document))


@pytest.mark.parametrize(
    "name",
    [
        "visual_encoder.cls_token",
        "visual_encoder.pos_embed",
        "visual_encoder.blocks.0.mlp.fc1.weight",
        "visual_encoder.blocks.1.attn.qkv.bias",
        "text_encoder.embeddings.position_embeddings.weight",
        "text_encoder.encoder.layer.0.attention.self.query.weight",
        "text_encoder.encoder.layer.1.attention.self.key.weight",
        "text_encoder.encoder.layer.0.crossattention.self.key.weight",
        "text_decoder.cls.predictions.transform.dense.weight",
        "text_decoder.cls.predictions.bias",
    ],
)
def test_an_incomplete_model_is_refused(vqa_state: dict[str, Tensor], name: str) -> None:
    state = {n: t for n, t in vqa_state.items() if n != name}
    with pytest.raises(ConversionError):
        assemble(SourceWeights("cut", canonical(state)), num_heads=NUM_HEADS, special_ids=SPECIAL_IDS)


def test_an_untied_word_head_is_refused(vqa_state: dict[str, Tensor]) -> None:
    name = "text_decoder.cls.predictions.decoder.weight"
    with pytest.raises(ConversionError, match="not tied"):
        canonical({**vqa_state, name: vqa_state[name] + 1})


def test_positions_of_no_square_grid_are_refused(vqa_state: dict[str, Tensor]) -> None:
    state = {**vqa_state, "visual_encoder.pos_embed": torch.zeros(1, 9, 24)}
    with pytest.raises(ConversionError, match="9 positions are no square grid"):
        assemble(SourceWeights("odd", canonical(state)), num_heads=NUM_HEADS, special_ids=SPECIAL_IDS)


# --- heads, special ids, tokenizers ----------------------------------------------------------------------


def test_heads_must_be_told_and_must_fit(vqa_state: dict[str, Tensor]) -> None:
    source = SourceWeights("test", canonical(vqa_state))
    with pytest.raises(ConversionError, match="give --num-heads"):
        assemble(source, special_ids=SPECIAL_IDS)
    with pytest.raises(ConversionError, match="5 heads do not divide width 24"):
        assemble(source, num_heads=5, special_ids=SPECIAL_IDS)
    assert assemble(replace(source, vision_heads=2, text_heads=4), special_ids=SPECIAL_IDS)[0].config.vision.heads == 2


def test_special_ids_must_be_told_and_must_fit(vqa_state: dict[str, Tensor]) -> None:
    source = SourceWeights("test", canonical(vqa_state))
    with pytest.raises(ConversionError, match="cannot be guessed"):
        assemble(source, num_heads=NUM_HEADS)
    with pytest.raises(ConversionError, match="special ids enc are outside the vocabulary of 90 words"):
        assemble(source, num_heads=NUM_HEADS, special_ids=SPECIAL_IDS.model_copy(update={"enc": 90}))


def test_a_tokenizer_tells_the_special_ids_and_must_fit(tmp_path: Path, vqa_state: dict[str, Tensor]) -> None:
    build_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    ids = with_blip_tokens(tokenizer)
    assert ids == with_blip_tokens(tokenizer), "twice adds nothing"
    assert tokenizer.convert_ids_to_tokens([ids.bos, ids.enc]) == ["[DEC]", "[ENC]"]
    source = SourceWeights("test", canonical(vqa_state))
    with pytest.raises(ConversionError, match=f"{len(tokenizer)} words, the text_encoder only 90"):
        assemble(source, num_heads=NUM_HEADS, special_ids=SPECIAL_IDS, tokenizer=tokenizer)


def test_a_model_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    """The library makes up a tokenizer of special tokens alone for it, whose ids would be wrong."""
    write_library_model(tmp_path, QA)
    with pytest.raises(ConversionError, match="no vocabulary"):
        load_tokenizer(tmp_path)
    source = read_hugging_face(str(tmp_path))
    assert source.tokenizer is None
    assert source.special_ids is not None
    assert (source.special_ids.bos, source.special_ids.sep, source.special_ids.enc) == (IDS.bos, IDS.sep, IDS.enc)
    with pytest.raises(ConversionError, match="special ids cls are outside"):
        assemble(source)
    assert assemble(source, special_ids=IDS)[0].config.special_ids == IDS


# --- the library's folders -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "parts"),
    [
        (QA, {"vision", "text_encoder", "decoder"}),
        (RETRIEVAL, {"vision", "text_encoder", "vision_proj", "text_proj", "itm_head"}),
        (CAPTION, {"vision", "decoder"}),
    ],
)
def test_a_folder_of_the_library(tmp_path: Path, architecture: str, parts: set[str]) -> None:
    write_library_model(tmp_path / "hub", architecture)
    model, _ = assemble(read_source(str(tmp_path / "hub")), special_ids=IDS)
    assert (model.config.vision.heads, model.config.vision.width, model.config.vision.layers) == (HEADS, WIDTH, LAYERS)
    assert set(write_backbone(tmp_path / "ours", model, None, {}).parts) == parts | {"tokenizer"}


def test_what_is_no_blip_is_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="is bert/BertModel"):
        read_hugging_face(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match="no model at"):
        read_hugging_face(str(tmp_path / "empty"))


# --- several sources -------------------------------------------------------------------------------------


def test_parts_of_equal_sources_merge(vqa_state: dict[str, Tensor]) -> None:
    whole = SourceWeights("whole", canonical(vqa_state), special_ids=SPECIAL_IDS)
    half = SourceWeights("half", {n: t for n, t in whole.tensors.items() if not n.startswith("decoder")}, 3, 3)
    merged = merge([half, whole])
    assert merged.tensors.keys() == whole.tensors.keys()
    assert (merged.origin, merged.vision_heads, merged.special_ids) == ("half + whole", 3, SPECIAL_IDS)
    assert assemble(merged)[0].decoder is not None


@pytest.mark.parametrize("change", [lambda t: t + 1e-6, lambda t: t[..., :-1]])
def test_sources_that_differ_do_not(vqa_state: dict[str, Tensor], change: Callable[[Tensor], Tensor]) -> None:
    tensors = canonical(vqa_state)
    name = "vision.blocks.0.norm1.weight"
    other = SourceWeights("other", {**tensors, name: change(tensors[name])})
    with pytest.raises(ConversionError, match=re.escape(f"one and other differ in {name}")):
        merge([SourceWeights("one", tensors), other])


def test_folders_of_the_library_merge_where_they_agree(tmp_path: Path) -> None:
    """A question model and a retrieval model over one vision tower and text encoder make one backbone for both."""
    for name, architecture, seed in (("qa", QA, 0), ("retrieval", RETRIEVAL, 0), ("other", RETRIEVAL, 1)):
        write_library_model(tmp_path / name, architecture, seed)
    qa, retrieval, other = (read_hugging_face(str(tmp_path / name)) for name in ("qa", "retrieval", "other"))
    model, _ = assemble(merge([qa, retrieval]), special_ids=IDS)
    assert model.decoder is not None and model.itm_head is not None
    with pytest.raises(ConversionError, match=r"differ in vision\.\S+: they are not one backbone"):
        merge([qa, other])


# --- the same backbone -----------------------------------------------------------------------------------


def test_the_same_backbone_passes(tmp_path: Path, retrieval_state: dict[str, Tensor]) -> None:
    backbone = backbone_of(retrieval_state, tmp_path / "backbone")
    check_same_backbone(retrieval_state, backbone)
    tuned = {n: t + 1 if n.startswith(("vision_proj.", "itm_head.")) else t for n, t in retrieval_state.items()}
    check_same_backbone(tuned, backbone)  # heads may be tuned


def test_a_backbone_with_more_parts_passes(tmp_path: Path, vqa_state: dict[str, Tensor]) -> None:
    check_same_backbone(
        {n: t for n, t in vqa_state.items() if not n.startswith("text_decoder.")},
        backbone_of(vqa_state, tmp_path / "b"),
    )


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("visual_encoder.blocks.1.mlp.fc2.bias", "vision.blocks.1.mlp.fc2.bias"),
        ("text_encoder.encoder.layer.0.attention.self.value.weight", "text_encoder.layers.0.attention.qkv.weight"),
        ("visual_encoder.pos_embed", "vision.pos_embed"),
    ],
)
def test_another_backbone_is_named(tmp_path: Path, retrieval_state: dict[str, Tensor], name: str, ours: str) -> None:
    backbone = backbone_of(retrieval_state, tmp_path / "backbone")
    changed = retrieval_state[name].clone()
    changed.view(-1)[0] += 1e-3
    with pytest.raises(BackboneMismatch, match=f"{re.escape(ours)} differs"):
        check_same_backbone({**retrieval_state, name: changed}, backbone)


def test_a_part_the_backbone_lacks_is_named(tmp_path: Path, vqa_state: dict[str, Tensor]) -> None:
    half = {n: t for n, t in vqa_state.items() if not n.startswith("text_decoder.")}
    with pytest.raises(BackboneMismatch, match=r"has decoder\.\S+, which the backbone lacks"):
        check_same_backbone(vqa_state, backbone_of(half, tmp_path / "backbone"))


def test_positions_are_compared_on_the_checkpoints_grid(tmp_path: Path, retrieval_state: dict[str, Tensor]) -> None:
    """The trainers resize them to their resolution."""
    backbone = backbone_of(retrieval_state, tmp_path / "backbone")
    name = "visual_encoder.pos_embed"
    resized = interpolate_positions(retrieval_state[name], 5, 5)
    check_same_backbone({**retrieval_state, name: resized}, backbone)
    with pytest.raises(BackboneMismatch, match=r"vision\.pos_embed differs"):
        check_same_backbone({**retrieval_state, name: resized + 1e-3}, backbone)
