"""A backbone folder: its parts, their digests, and what it refuses."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.errors import BackboneNotFound, ConversionError, DigestMismatch, MissingPart
from service.backbone.base import Backbone
from service.backbone.blip import Blip
from service.backbone.config import BlipConfig, TextConfig, VisionConfig
from service.backbone.folder import load_backbone, write_backbone
from tests.service.worlds import random_blip, write_tiny_backbone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read it, never write to it."""
    folder = tmp_path_factory.mktemp("backbone") / "backbone"
    write_tiny_backbone(folder)
    return folder


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return load_backbone(folder)


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    (target / "tokenizer").mkdir()
    for path in (folder / "tokenizer").iterdir():
        (target / "tokenizer" / path.name).write_bytes(path.read_bytes())
    return target


def test_writing_what_was_loaded_gives_the_same_digests(backbone: Backbone, tmp_path: Path) -> None:
    again = write_backbone(tmp_path / "again", backbone.model, backbone.tokenizer, {"note": "provenance is no number"})
    assert again.parts == backbone.parts
    assert load_backbone(tmp_path / "again").digest == backbone.digest


def test_digests_do_not_depend_on_the_serving_dtype(folder: Path, backbone: Backbone) -> None:
    half = load_backbone(folder, dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and half.parts == backbone.parts


def test_a_part_has_its_own_digest(backbone: Backbone, tmp_path: Path) -> None:
    changed = Blip(backbone.config)
    changed.load_state_dict(backbone.model.state_dict())
    with torch.no_grad():
        changed.vision_proj.bias[0] += 1  # type: ignore[union-attr]
    parts = write_backbone(tmp_path / "changed", changed, backbone.tokenizer, {}).parts
    assert {part for part in parts if parts[part] != backbone.parts[part]} == {"vision_proj"}


def test_eps_is_part_of_the_digest(backbone: Backbone, tmp_path: Path) -> None:
    """The same weights with another LayerNorm eps compute other numbers."""
    vision = backbone.config.vision.model_copy(update={"norm_eps": 1e-5})
    changed = Blip(backbone.config.model_copy(update={"vision": vision}))
    changed.load_state_dict(backbone.model.state_dict())
    parts = write_backbone(tmp_path / "changed", changed, backbone.tokenizer, {}).parts
    assert {part for part in parts if parts[part] != backbone.parts[part]} == {"vision"}


def test_the_tokenizer_has_a_digest_too(backbone: Backbone, tmp_path: Path) -> None:
    parts = write_backbone(tmp_path / "without", backbone.model, None, {}).parts
    assert {part for part in parts if parts[part] != backbone.parts[part]} == {"tokenizer"}


def test_a_changed_file_is_noticed(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path / "copy")
    tensors = load_file(copy / "itm_head.safetensors")
    save_file({name: tensor + 1e-6 for name, tensor in tensors.items()}, copy / "itm_head.safetensors")
    with pytest.raises(DigestMismatch, match="part 'itm_head'"):
        load_backbone(copy)
    load_backbone(copy, verify=False)


def test_a_changed_weight_in_memory_is_noticed(folder: Path) -> None:
    backbone = load_backbone(folder)
    backbone.verify()
    backbone.model.vision.cls_token[0, 0, 0] += 1
    with pytest.raises(DigestMismatch, match="'vision'"):
        backbone.verify()


def test_a_changed_tokenizer_is_noticed(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path / "copy")
    text = (copy / "tokenizer" / "tokenizer.json").read_text()
    assert '"red"' in text
    (copy / "tokenizer" / "tokenizer.json").write_text(text.replace('"red"', '"crimson"', 1))
    with pytest.raises(DigestMismatch, match="tokenizer"):
        load_backbone(copy)


def test_broken_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneNotFound):
        load_backbone(tmp_path)
    copy = copy_of(folder, tmp_path / "copy")
    (copy / "vision.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ConversionError, match=r"vision\.safetensors"):
        load_backbone(copy)
    manifest = json.loads((copy / "backbone.json").read_text())
    (copy / "backbone.json").write_text(json.dumps({**manifest, "surprise": 1}))
    with pytest.raises(ConversionError, match="surprise"):
        load_backbone(copy)


def test_a_folder_in_use_is_not_written_to(folder: Path, backbone: Backbone) -> None:
    with pytest.raises(ConversionError, match="is not empty"):
        write_backbone(folder, backbone.model, None, {})


def test_tasks_name_what_they_miss(tmp_path: Path, backbone: Backbone) -> None:
    backbone.require("retrieval")
    backbone.require("vqa")
    write_tiny_backbone(tmp_path / "bare", with_decoder=False, with_heads=False)
    bare = load_backbone(tmp_path / "bare")
    with pytest.raises(MissingPart, match="no decoder, which vqa needs"):
        bare.require("vqa")
    with pytest.raises(MissingPart, match="no itm_head, which retrieval needs"):
        bare.require("retrieval", heads=("vision_proj", "text_proj"))
    bare.require("retrieval", heads=("vision_proj", "text_proj", "itm_head"))
    assert bare.dims().stacks == ("text",)


def test_uneven_towers_take_no_adapters(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path / "uneven", text_layers=3)
    with pytest.raises(MissingPart, match="differ in size"):
        load_backbone(tmp_path / "uneven").dims()


def test_nothing_gets_gradients(backbone: Backbone) -> None:
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not backbone.model.training


def test_texts(backbone: Backbone) -> None:
    special = backbone.config.special_ids
    found = backbone.tokenize("a red zeppelin")
    assert found.ids[0] == special.cls and found.ids[-1] == special.sep
    assert found.unknown == ("zeppelin",)
    answer = backbone.tokenize_answers(["red"])[0]
    assert answer[0] == special.bos and answer[-1] == special.sep and len(answer) == 3
    assert backbone.detokenize((*answer, special.pad)) == "red"


@pytest.mark.parametrize(
    "text", ["a red zeppelin", "", "Red, RED; red?!", "zeppelin zeppelin ünï \u4e2d\u6587", "[SEP] red [PAD]"]
)
def test_a_text_has_the_ids_that_the_librarys_tokenizer_gives(backbone: Backbone, text: str) -> None:
    assert list(backbone.tokenize(text).ids) == backbone.require_tokenizer()(text)["input_ids"]


def test_a_tokenizer_neither_cuts_nor_pads_whatever_its_file_says(backbone: Backbone, tmp_path: Path) -> None:
    tokenizer = deepcopy(backbone.require_tokenizer())
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=20)
    write_backbone(tmp_path / "cuts", backbone.model, tokenizer, {})
    for text in ("red", "a red red red red red zeppelin"):
        assert load_backbone(tmp_path / "cuts").tokenize(text) == backbone.tokenize(text)


def test_without_a_tokenizer_only_ids_are_understood(tmp_path: Path, backbone: Backbone) -> None:
    write_backbone(tmp_path / "ids", backbone.model, None, {})
    plain = load_backbone(tmp_path / "ids")
    with pytest.raises(MissingPart):
        plain.tokenize("red")
    assert plain.detokenize((7, 8)) == "7 8"


def test_heads_must_divide_widths() -> None:
    text = TextConfig(width=16, layers=1, heads=3, mlp_width=8, vocab_size=9, max_positions=8, memory_width=16)
    vision = VisionConfig(width=16, layers=1, heads=2, mlp_width=8, patch=4, grid=2)
    special = {"pad": 0, "cls": 1, "sep": 2, "bos": 3, "enc": 4}
    with pytest.raises(ValueError, match="3 heads do not divide width 16"):
        BlipConfig(vision=vision, text_encoder=text, special_ids=special)
    random_blip(BlipConfig(vision=vision, special_ids=special))


def test_convolutions_of_a_loaded_backbone_compute_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA they would otherwise round to TF32, which is beyond what batches may differ by."""
    write_tiny_backbone(tmp_path / "backbone")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    load_backbone(tmp_path / "backbone")
    assert not torch.backends.cudnn.allow_tf32
