"""A trainer's checkpoint becomes a package: what is taken, what is dropped, what is refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.config import AdapterConfig
from adapters.errors import AdapterBankError, BackboneMismatch, ConversionError, TensorMismatch
from adapters.families.base import BlipDims
from adapters.importers.checkpoint import ImportedAdapter, read_checkpoint
from adapters.importers.uniadapter import import_uniadapter
from adapters.package import read_package, write_package
from tests.parity.synthetic import Maker, Recipe, Sizes

SIZES = Sizes(24, 3, 2, 5, 3, 90, 4, 12, 20, 30, 12, 8, {"pad": 0, "cls": 80, "sep": 81, "bos": 88, "enc": 89})
DIMS = BlipDims(width=24, layers=2, embed_dim=20)
PARTS = {
    part: "sha256:" + letter * 64
    for part, letter in zip(("vision", "text_encoder", "decoder", "tokenizer", "itm_head"), "abcde", strict=True)
}
Document = dict[str, Any]


def document_of(task: str = "vqa", **options: Any) -> Document:
    maker = Maker(SIZES, Recipe(task, 1, None, 1, options), 0)
    return {"model": maker.state(), "config": maker.config(), "epoch": 4, "optimizer": {}}


def imported(document: Document, **more: Any) -> ImportedAdapter:
    return import_uniadapter(document, dims=DIMS, parts=PARTS, check_backbone=lambda state: None, **more)


def test_a_question_adapter() -> None:
    document = document_of("vqa", video_key_adapter=True, k_test=7)
    found = imported(document, answers=("yes", "no"))
    config = found.config
    assert (config.task, config.rank, config.heads) == ("vqa", 5, ())
    assert config.options == {
        "visual": True,
        "textual": True,
        "multimodal": True,
        "query_residual": True,
        "frame_aware_attention": False,
        "kv_rank": 3,
    }
    assert config.preprocessing.resolution == 12
    assert config.decoding is not None
    assert (config.decoding.rank_k, config.decoding.answers, config.decoding.num_beams) == (7, ("yes", "no"), 3)
    assert set(config.backbone.parts) == {"vision", "text_encoder", "decoder", "tokenizer"}
    assert {name.split(".")[0] for name in found.tensors} == {"adapters", "text", "decoder"}


def test_a_retrieval_adapter_brings_its_heads() -> None:
    document = document_of("retrieval", frame_aware_attention=True, adapter_multimodal="after_cross")
    found = imported(document)
    config = found.config
    assert (config.task, config.heads, config.decoding) == ("retrieval", ("vision_proj", "text_proj", "itm_head"), None)
    assert config.options["frame_aware_attention"] is True and config.options["multimodal"] is True
    assert config.options["kv_rank"] is None
    assert "decoder" not in config.backbone.parts
    assert torch.equal(found.tensors["itm_head.weight"], document["model"]["itm_head.weight"])


def test_every_tensor_keeps_its_value() -> None:
    document = document_of("vqa", video_key_adapter=True)
    state, found = document["model"], imported(document)
    for name, tensor in found.tensors.items():
        source = name.replace("text.", "text_encoder.encoder.", 1) if name.startswith("text.") else name
        source = source.replace("decoder.", "text_decoder.bert.encoder.", 1) if name.startswith("decoder.") else source
        assert torch.equal(tensor, state[source]), name
        assert tensor.data_ptr() != state[source].data_ptr(), "a package must not share memory with the checkpoint"


def test_nothing_else_is_taken() -> None:
    """No momentum copy, no queue, no temperature, not the decoder's unused list, and none of the frozen backbone."""
    for task in ("vqa", "retrieval"):
        document = document_of(task)
        found = imported(document)
        plain = {n: t for n, t in document["model"].items() if not re.search(r"_m\.|_queue$|^temp$|adapters_dec", n)}
        again = imported({**document, "model": plain})
        assert found.tensors.keys() == again.tensors.keys() and found.config == again.config
        assert all(torch.equal(found.tensors[name], again.tensors[name]) for name in found.tensors)


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ({"adapter_visual": False}, ("visual_up_proj",)),
        ({"adapter_multimodal": False, "adapter_textual": False}, ("multi_up_proj", ".up_proj", "cross_modal")),
    ],
)
def test_what_is_switched_off_is_left_behind(options: dict[str, Any], gone: tuple[str, ...]) -> None:
    names = imported(document_of("retrieval", **options)).tensors
    assert not [name for name in names if any(part in name for part in gone)]


def test_a_key_adapter_that_is_switched_off_is_left_behind() -> None:
    document = document_of("vqa", video_key_adapter=True)
    found = imported({**document, "config": {**document["config"], "video_key_adapter": False}})
    assert found.config.options["kv_rank"] is None
    assert all(name.startswith("adapters.") for name in found.tensors)


def test_importing_twice_gives_the_same_digests(tmp_path: Path) -> None:
    packages = []
    for name in ("first", "second"):
        found = imported(document_of("retrieval", video_key_adapter=True))
        packages.append(write_package(tmp_path / name, found.config, found.tensors, "# card\n", None))
    first, second = packages
    assert (first.weights_digest, first.package_digest) == (second.weights_digest, second.package_digest)
    assert read_package(tmp_path / "first", dims=DIMS).weights_digest == first.weights_digest


def test_provenance_is_no_number(tmp_path: Path) -> None:
    plain = imported(document_of())
    noted = imported(document_of(), provenance={"file": "checkpoint_09.pth"})
    a = write_package(tmp_path / "a", plain.config, plain.tensors, "", None)
    b = write_package(tmp_path / "b", noted.config, noted.tensors, "", None)
    assert noted.config.provenance["file"] == "checkpoint_09.pth"
    assert a.weights_digest == b.weights_digest and a.package_digest != b.package_digest


def test_the_settings_are_kept_as_json() -> None:
    document = document_of(train_files=("a", "b"), path=Path("x"), nested={"k": [1, None]})
    settings = imported(document).config.provenance["settings"]
    assert isinstance(settings, dict)
    assert (settings["train_files"], settings["path"], settings["nested"]) == (["a", "b"], "x", {"k": [1, None]})
    assert AdapterConfig.parse(imported(document).config.model_dump_json())


# --- what is refused -------------------------------------------------------------------------------------


def test_the_backbone_is_checked_with_the_whole_checkpoint() -> None:
    document = document_of()
    asked: list[Any] = []

    def refuse(state: Any) -> None:
        asked.append(state)
        raise BackboneMismatch("another one")

    with pytest.raises(BackboneMismatch):
        import_uniadapter(document, dims=DIMS, parts=PARTS, check_backbone=refuse)
    assert asked[0].keys() == document["model"].keys()


@pytest.mark.parametrize(
    "alias",
    [
        "visual_encoder.adapters.1",
        "visual_encoder.blocks.1.adapter",
        "text_encoder.encoder.layer.1.adapter",
        "text_decoder.bert.encoder.layer.1.adapter",
    ],
)
def test_copies_that_disagree_are_refused(alias: str) -> None:
    document = document_of()
    name = f"{alias}.up_proj.bias"
    document["model"][name] = document["model"][name] + 1e-6
    with pytest.raises(TensorMismatch, match=re.escape(f"{name} differs from adapters.1.up_proj.bias")):
        imported(document)


def test_the_unused_list_may_disagree() -> None:
    document = document_of()
    name = "adapters_dec.0.up_proj.bias"
    assert not torch.equal(document["model"][name], document["model"]["adapters.0.up_proj.bias"])
    imported(document)


def _without(name: str) -> Callable[[Document], None]:
    return lambda document: document["model"].pop(name)


def _with(**settings: Any) -> Callable[[Document], None]:
    return lambda document: document["config"].update(settings)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_without("adapters.0.down_proj.weight"), ConversionError, "holds no UniAdapter"),
        (
            _without("adapters.1.multi_up_proj.bias"),
            TensorMismatch,
            r"lacks 1 tensors, first adapters\.1\.multi_up_proj\.bias",
        ),
        (
            _without("text_encoder.encoder.video_key_adapter.down_proj.weight"),
            TensorMismatch,
            "says `video_key_adapter`",
        ),
        (_without("text_encoder.encoder.video_value_adapter.scale"), TensorMismatch, "lacks 1 tensors"),
        (_without("text_decoder.bert.encoder.video_key_adapter.up_proj.bias"), TensorMismatch, "lacks 1 tensors"),
        (_with(adapter=False), ConversionError, "adapter: false"),
        (_with(temporal_embed=True), ConversionError, "temporal_embed"),
        (_with(image_size=None), ConversionError, "image_size"),
        (_with(image_size=4096), ConversionError, "resolution"),
        (_with(k_test=0), ConversionError, "rank_k"),
    ],
)
def test_what_cannot_be_served_is_refused(
    change: Callable[[Document], None], error: type[AdapterBankError], message: str
) -> None:
    document = document_of("vqa", video_key_adapter=True)
    change(document)
    with pytest.raises(error, match=message):
        imported(document)


def test_more_layers_than_the_backbone_has_are_refused() -> None:
    with pytest.raises(TensorMismatch, match=r"adapters\.1\.\S+ the backbone has 1 layers only"):
        import_uniadapter(document_of(), dims=BlipDims(24, 1, 20), parts=PARTS, check_backbone=lambda state: None)


def test_a_time_embedding_is_refused_even_where_the_settings_forget_it() -> None:
    document = document_of()
    document["model"]["text_encoder.encoder.time_embed"] = torch.zeros(1, 8, 24)
    with pytest.raises(ConversionError, match="temporal_embed"):
        imported(document)


# --- reading ---------------------------------------------------------------------------------------------


def test_a_checkpoint_is_read(tmp_path: Path) -> None:
    document = document_of()
    torch.save(document, tmp_path / "checkpoint_04.pth")
    read = read_checkpoint(tmp_path / "checkpoint_04.pth")
    assert read["config"] == document["config"]
    assert read["model"].keys() == document["model"].keys()


class _Opaque:
    """Something only code could make sense of."""


@pytest.mark.parametrize(
    "document",
    [
        {"model": {}},
        {"config": {}},
        [1, 2],
        {"model": {"a": 1}, "config": {}},
        {"model": {"a": torch.zeros(1)}, "config": None},
        {"model": None, "config": {}},
        {"model": {}, "config": {}, "extra": _Opaque()},
    ],
)
def test_what_is_no_trainers_checkpoint_is_refused(tmp_path: Path, document: Any) -> None:
    torch.save(document, tmp_path / "bad.pth")
    with pytest.raises(ConversionError, match=r"bad\.pth"):
        read_checkpoint(tmp_path / "bad.pth")


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.pth").write_bytes(b"PK\x03\x04 torn")
    for name in ("bad.pth", "missing.pth"):
        with pytest.raises(ConversionError, match=re.escape(f"cannot read {name}")):
            read_checkpoint(tmp_path / name)


def test_stored_tensors_stay_as_they_are(tmp_path: Path) -> None:
    """Half precision is kept: folding casts, importing does not."""
    document = document_of()
    half: dict[str, Tensor] = {n: t.half() if "adapter" in n else t for n, t in document["model"].items()}
    found = imported({**document, "model": half})
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float16}
    write_package(tmp_path / "half", found.config, found.tensors, "", None)
