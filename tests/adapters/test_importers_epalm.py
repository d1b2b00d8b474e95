"""A checkpoint of the eP-ALM trainers becomes a package: what is taken, what it means, what is refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.config import AdapterConfig, AudioPreprocessing, Preprocessing
from adapters.errors import (
    AdapterBankError,
    BackboneMismatch,
    ConversionError,
    InvalidPackage,
    NonFiniteTensor,
    TensorMismatch,
)
from adapters.families.base import EncoderDims, OptDims
from adapters.families.epalm import PROMPT, options_of
from adapters.importers.checkpoint import ImportedAdapter, read_checkpoint
from adapters.importers.epalm import import_epalm
from adapters.package import read_package, write_package

DIMS = OptDims(
    width=12,
    layers=8,
    word_width=10,
    encoders={"vit": EncoderDims(6, 7), "timesformer": EncoderDims(5, 4), "ast": EncoderDims(4, 6)},
)
PARTS = {
    part: "sha256:" + letter * 64
    for part, letter in zip(("language_model", "vit", "timesformer", "ast", "tokenizer"), "abcde", strict=True)
}
ENCODERS = {"image": "vit", "video": "timesformer", "audio": "ast"}
Document = dict[str, Any]


def document_of(modality: str = "image", *, num_features: int = 3, **more: Any) -> Document:
    """As the trainers save one, with keys of their settings that mean nothing here."""
    config = {
        "use_vis_prefix": True,
        "start_layer_idx": 3,
        "end_layer_idx": 7,
        "injected_hidden_states": num_features,
        "unfreeze_text_layer_norm": False,
        "unfreeze_vision_layer_norm": False,
        "special_answer_token": "</a>",
        "use_cache": False,
        "text_step": 1,
        "num_beams": 3,
        "prompt_tuning": True,
        "prompt_len": 4,
        "image_res": 384,
        "lm_loss_weight": 0.1,
    } | more
    if modality != "image":
        config["modality"] = modality
    generator = torch.Generator().manual_seed(1)
    width, words = DIMS.encoders[ENCODERS[modality]].width, DIMS.word_width
    state: dict[str, Tensor] = {}
    for k in range(1 if config.get("shared_connector") else num_features):
        state[f"connector.{k}.weight"] = torch.randn(12, width, generator=generator)
        state[f"connector.{k}.bias"] = torch.randn(12, generator=generator)
    if config["prompt_tuning"]:
        state[f"{PROMPT}.0.weight"] = torch.randn(config["prompt_len"], words, generator=generator)
        if config.get("mlp", True):
            for index in (1, 3):
                state[f"{PROMPT}.{index}.weight"] = torch.randn(words, words, generator=generator)
                state[f"{PROMPT}.{index}.bias"] = torch.randn(words, generator=generator)
    rest = {"optimizer": {}, "lr_scheduler": {}, "epoch": 7, "best_valid": 1.5, "best_epoch": 6}
    return {"model": state, "config": config, **rest}


def caption_of(modality: str = "image", **more: Any) -> Document:
    return document_of(modality, special_answer_token=None, append_eos_token=True, **more)


def imported(document: Document, **more: Any) -> ImportedAdapter:
    return import_epalm(document, **({"dims": DIMS, "parts": PARTS, "answer_token_id": 77} | more))


# --- what it becomes -------------------------------------------------------------------------------------


def test_a_question_adapter() -> None:
    config = imported(document_of(), answers=("yes", "no")).config
    assert (config.family, config.task, config.rank, config.heads) == ("epalm", "vqa", 3, ())
    assert config.options == {
        "encoder": "vit",
        "start_layer_idx": 3,
        "end_layer_idx": 7,
        "injected_hidden_states": 3,
        "shared_connector": False,
        "text_step": 1,
        "select_higher_step": False,
        "prompt_len": 4,
        "prompt_mlp": True,
        "answer_token_id": 77,
    }
    assert config.backbone.architecture == "opt" and (config.backbone.width, config.backbone.layers) == (12, 8)
    assert set(config.backbone.parts) == {"language_model", "vit", "tokenizer"}
    assert config.decoding is not None
    assert (config.decoding.num_beams, config.decoding.max_length, config.decoding.answers) == (3, 30, ("yes", "no"))
    assert config.pixels == Preprocessing(resolution=224), "the trainers' vision models are built for 224 pixels"


def test_a_caption_adapter() -> None:
    config = imported(caption_of(), answer_token_id=None).config
    assert config.task == "caption" and config.options["answer_token_id"] is None


def test_what_is_known_better_than_the_settings_do() -> None:
    config = imported(document_of(), task="caption", resolution=32).config
    assert config.task == "caption" and config.pixels.resolution == 32
    assert config.options["answer_token_id"] is None, "a caption has no question"
    document = document_of("video")
    del document["config"]["modality"]
    assert imported(document, encoder="timesformer").config.options["encoder"] == "timesformer"


def test_questions_without_an_answer_token_end_like_texts() -> None:
    config = imported(document_of(special_answer_token=None), answer_token_id=None).config
    assert config.task == "vqa" and config.options["answer_token_id"] is None


def test_a_clip_adapter() -> None:
    config = imported(document_of("video", num_frames=16)).config
    assert config.options["encoder"] == "timesformer" and config.pixels.num_frames == 16
    assert set(config.backbone.parts) == {"language_model", "timesformer", "tokenizer"}


def test_a_sound_adapter() -> None:
    config = imported(caption_of("audio", melbins=64, target_length=512, norm_mean=-4.0, norm_std=3.0)).config
    assert config.options["encoder"] == "ast"
    expected = AudioPreprocessing(num_mel_bins=64, max_steps=512, mean=-4.0, std=3.0)
    assert config.preprocessing == expected and expected.sampling_rate == 16000
    assert imported(caption_of("audio")).config.preprocessing == AudioPreprocessing()
    with pytest.raises(AssertionError):
        _ = config.pixels


def test_sound_that_is_not_normalised_stays_as_it_is() -> None:
    found = imported(caption_of("audio", skip_norm=True, norm_mean=-4.0)).config.preprocessing
    assert isinstance(found, AudioPreprocessing)
    x = torch.randn(5)
    assert torch.equal((x - found.mean) / (2 * found.std), x)


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ({"shared_connector": True}, {"shared_connector": True}),
        ({"mlp": False}, {"prompt_mlp": False}),
        ({"prompt_tuning": False}, {"prompt_len": 0}),
        ({"text_step": 3}, {"text_step": 3}),
        ({"select_higher_step": True}, {"select_higher_step": True}),
        ({"num_features": 1, "shared_connector": False}, {"shared_connector": False}),
    ],
)
def test_options(more: dict[str, Any], options: dict[str, Any]) -> None:
    document = document_of(**more)
    found = imported(document)
    assert options.items() <= found.config.options.items()
    assert found.tensors.keys() == document["model"].keys()
    assert found.config.rank == options_of(found.config).num_connectors


def test_settings_that_are_left_out_have_the_authors_defaults() -> None:
    document = document_of(num_features=1)
    for name in ("text_step", "injected_hidden_states", "use_vis_prefix", "num_beams"):
        del document["config"][name]
    options = options_of(imported(document).config)
    assert (options.text_step, options.injected_hidden_states, options.select_higher_step) == (1, 1, False)


def test_every_tensor_keeps_its_value() -> None:
    document = document_of()
    found = imported(document)
    assert found.tensors.keys() == document["model"].keys()
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor, document["model"][name])
        assert tensor.data_ptr() != document["model"][name].data_ptr(), (
            "a package must not share the checkpoint's memory"
        )


def test_half_precision_is_kept() -> None:
    document = document_of()
    document["model"] = {name: tensor.half() for name, tensor in document["model"].items()}
    assert {tensor.dtype for tensor in imported(document).tensors.values()} == {torch.float16}


def test_the_frozen_models_are_left_behind() -> None:
    """The trainers leave them out; a checkpoint of everything holds them under these names."""
    document = document_of()
    names = ("model_text.model.decoder.embed_tokens.weight", "transformer.0.fc1.bias", "model_vision.cls_token")
    document["model"] |= {name: torch.zeros(2) for name in names}
    assert imported(document).tensors.keys() == document_of()["model"].keys()


# --- packages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modality", ENCODERS)
def test_a_package_is_written_and_read(modality: str, tmp_path: Path) -> None:
    found = imported(document_of(modality))
    written = write_package(tmp_path / "own", found.config, found.tensors, "# card\n", None)
    for dims in (DIMS, None):
        read = read_package(tmp_path / "own", dims=dims)
        assert read.config == found.config
        assert read.weights_digest == written.weights_digest and read.package_digest == written.package_digest
        assert all(torch.equal(read.tensors[name], tensor) for name, tensor in found.tensors.items())


def test_importing_twice_gives_the_same_digests(tmp_path: Path) -> None:
    digests = set()
    for name in ("first", "second"):
        torch.save(document_of(), tmp_path / f"{name}.pth")
        found = imported(read_checkpoint(tmp_path / f"{name}.pth"), provenance={"file": "own"})
        package = write_package(tmp_path / name, found.config, found.tensors, "", None)
        digests.add((package.weights_digest, package.package_digest))
    assert len(digests) == 1


def test_the_digest_covers_options_and_not_provenance(tmp_path: Path) -> None:
    digests = []
    for name, more in (
        ("plain", {}),
        ("noted", {"provenance": {"file": "x.pth"}}),
        ("other token", {"answer_token_id": 78}),
        ("other window", {"document": document_of(end_layer_idx=8)}),
    ):
        arguments = dict(more)
        found = imported(arguments.pop("document", document_of()), **arguments)
        digests.append(write_package(tmp_path / name, found.config, found.tensors, "", None).weights_digest)
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_a_package_for_another_backbone_is_refused(tmp_path: Path) -> None:
    found = imported(document_of())
    write_package(tmp_path / "own", found.config, found.tensors, "", None)
    wider = OptDims(12, 8, 10, {"vit": EncoderDims(9, 7)})
    with pytest.raises(TensorMismatch, match=r"connector\.0\.weight"):
        read_package(tmp_path / "own", dims=wider)
    with pytest.raises(BackboneMismatch):
        read_package(tmp_path / "own", dims=OptDims(12, 9, 10, DIMS.encoders))
    with pytest.raises(BackboneMismatch):
        read_package(tmp_path / "own", dims=OptDims(12, 8, 10, {"ast": EncoderDims(6, 7)}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.pop("connector.2.bias"), TensorMismatch, r"missing.*connector\.2\.bias"),
        (lambda t: t.update(more=torch.zeros(1)), TensorMismatch, "unexpected.*more"),
        (lambda t: t.update({"connector.1.weight": torch.zeros(12, 7)}), TensorMismatch, r"wrong shape.*connector\.1"),
        (lambda t: t["connector.1.weight"].fill_(float("nan")), NonFiniteTensor, r"connector\.1\.weight"),
        (lambda t: t.update({f"{PROMPT}.0.weight": torch.zeros(5, 10)}), TensorMismatch, "wrong shape"),
    ],
)
def test_a_package_that_is_damaged_is_refused(
    change: Callable[[dict[str, Tensor]], object], error: type[InvalidPackage], message: str, tmp_path: Path
) -> None:
    """Without the backbone's sizes too: those that the tensors tell must agree with each other."""
    found = imported(document_of())
    change(found.tensors)
    with pytest.raises(error, match=message):
        write_package(tmp_path / "own", found.config, found.tensors, "", None)


def test_the_settings_are_kept_as_json() -> None:
    found = imported(document_of(train_files=("a", "b"), path=Path("x")))
    settings = found.config.provenance["settings"]
    assert isinstance(settings, dict) and (settings["train_files"], settings["path"]) == (["a", "b"], "x")
    assert AdapterConfig.parse(found.config.model_dump_json()) == found.config


# --- what is refused -------------------------------------------------------------------------------------


def _with(**settings: Any) -> Callable[[Document], None]:
    return lambda document: document["config"].update(settings)


def _without(name: str) -> Callable[[Document], None]:
    return lambda document: document["config"].pop(name)


def _lost(name: str) -> Callable[[Document], None]:
    return lambda document: document["model"].pop(name)


def _held(name: str, *shape: int, fill: float = 0.0) -> Callable[[Document], None]:
    return lambda document: document["model"].update({name: torch.full(shape, fill)})


def _renamed(document: Document) -> None:
    document["model"] = {f"module.{name}": tensor for name, tensor in document["model"].items()}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_lost("connector.0.weight"), ConversionError, "holds no eP-ALM adapter"),
        (_renamed, ConversionError, "holds no eP-ALM adapter"),
        (_with(unfreeze_text_layer_norm=True), ConversionError, "unfreeze_text_layer_norm"),
        (_with(unfreeze_vision_layer_norm=True), ConversionError, "unfreeze_vision_layer_norm"),
        (_with(use_adapters=True), ConversionError, "adapters inside the language model"),
        (_held("model_text.layers.0.adapter.down.weight", 2, 2), ConversionError, "adapters inside the language model"),
        (_with(deep=True), ConversionError, "deep"),
        (_with(use_vis_prefix=False), ConversionError, "use_vis_prefix"),
        (_with(shared_connector=False), ConversionError, "shared_connector: false"),
        (_with(modality="smell"), ConversionError, "'smell' is not known"),
        (_without("start_layer_idx"), ConversionError, "lacks start_layer_idx"),
        (_without("end_layer_idx"), ConversionError, "lacks end_layer_idx"),
        (_without("prompt_len"), ConversionError, "lacks prompt_len"),
        (_with(start_layer_idx=7), ConversionError, "is empty"),
        (_with(start_layer_idx="three"), ConversionError, "start_layer_idx"),
        (_with(text_step=0), ConversionError, "text_step"),
        (_with(prompt_len=1000), ConversionError, "prompt_len"),
        (_with(num_frames=0), ConversionError, "num_frames"),
        (_with(end_layer_idx=9), BackboneMismatch, "ends at layer 9"),
        (_with(injected_hidden_states=8), BackboneMismatch, "8 blocks are injected"),
        (_with(injected_hidden_states=4), TensorMismatch, r"lacks 2 tensors, first connector\.3\.weight"),
        (_with(injected_hidden_states=2), TensorMismatch, r"holds connector\.2\.weight"),
        (_with(shared_connector=True), TensorMismatch, r"holds connector\.1\.weight"),
        (_with(mlp=False), TensorMismatch, rf"holds {re.escape(PROMPT)}\.1\.weight"),
        (_with(prompt_tuning=False), TensorMismatch, rf"holds {re.escape(PROMPT)}\.0\.weight"),
        (_lost("connector.1.bias"), TensorMismatch, r"lacks 1 tensors, first connector\.1\.bias"),
        (_lost(f"{PROMPT}.3.bias"), TensorMismatch, "lacks 1 tensors"),
        (_held("module.connector.1.weight", 12, 6), TensorMismatch, r"holds module\.connector\.1\.weight"),
        (_held("something.new", 1), TensorMismatch, r"holds something\.new"),
        (_held("connector.1.weight", 12, 5), TensorMismatch, r"connector\.1\.weight \S+ instead of"),
        (_held("connector.1.weight", 12, 6, fill=float("nan")), NonFiniteTensor, r"connector\.1\.weight"),
        (_held("connector.1.bias", 12, fill=float("inf")), NonFiniteTensor, r"connector\.1\.bias"),
        (_with(prompt_len=5), TensorMismatch, "instead of"),
    ],
)
def test_what_cannot_be_served_is_refused(
    change: Callable[[Document], None], error: type[AdapterBankError], message: str
) -> None:
    document = document_of()
    change(document)
    with pytest.raises(error, match=message):
        imported(document)


def test_audio_settings_out_of_range_are_refused() -> None:
    for settings in ({"norm_std": 0.0}, {"melbins": 0}, {"target_length": 10**6}):
        with pytest.raises(ConversionError, match=r"cannot be served: (std|num_mel_bins|max_steps)"):
            imported(caption_of("audio", **settings))


def test_an_unknown_answer_token_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"'</a>' is not known: give --answer-token-id"):
        imported(document_of(), answer_token_id=None)


@pytest.mark.parametrize("task", ["retrieval"])
def test_another_task_is_refused(task: Any) -> None:
    with pytest.raises(ConversionError, match="retrieval is neither"):
        imported(document_of(), task=task)


def test_a_backbone_without_the_encoder_is_refused() -> None:
    dims = OptDims(12, 8, 10, {"vit": EncoderDims(6, 7)})
    with pytest.raises(BackboneMismatch, match="needs timesformer"):
        imported(document_of("video"), dims=dims)


@pytest.mark.parametrize("name", ["language_model", "vit"])
def test_connectors_of_another_width_are_refused(name: str) -> None:
    """A checkpoint trained on a larger model of the same depth."""
    dims = (
        OptDims(24, 8, 10, DIMS.encoders)
        if name == "language_model"
        else OptDims(12, 8, 10, {"vit": EncoderDims(8, 7)})
    )
    with pytest.raises(TensorMismatch, match=r"connector\.0\.weight"):
        imported(document_of(), dims=dims)


class _Opaque:
    """Something only code could make sense of."""


def test_a_pickle_with_more_than_data_is_refused(tmp_path: Path) -> None:
    for place in ("extra", "config"):
        document = document_of()
        document[place] = {**document["config"], "hook": _Opaque()}
        torch.save(document, tmp_path / "bad.pth")
        with pytest.raises(ConversionError, match=r"cannot read bad\.pth"):
            read_checkpoint(tmp_path / "bad.pth")
