"""A small world with a language model in it: a random OPT with a ViT, a TimeSformer and an AST, and random eP-ALM adapters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from adapters.config import AdapterConfig, AnswerDecoding, AudioPreprocessing, BackboneRef, Preprocessing, Task
from adapters.families.epalm import EncoderName, init_tensors
from adapters.package import Package, write_package
from service.backbone.base import load_tokenizer
from service.backbone.config import (
    AstConfig,
    LanguageModelConfig,
    OptConfig,
    OptSpecialIds,
    TimesformerConfig,
    VisionConfig,
)
from service.backbone.folder import load_backbone, write_backbone
from service.backbone.opt import Opt
from service.backbone.opt_backbone import OptBackbone
from service.demo.vocabulary import build_tokenizer
from service.lifecycle.writing import write_probed_package

WIDTH, LAYERS, HEADS, PATCH, RESOLUTION = 24, 4, 3, 8, 16
ENCODER_WIDTH, BLOCKS = 12, 3
NUM_MEL_BINS, MAX_STEPS = 24, 40
ANSWERS = ("red", "green", "blue", "a big circle")


def opt_config(ids: OptSpecialIds, vocab_size: int, *, pre_norm: bool = True, word_width: int = WIDTH) -> OptConfig:
    """The smallest model with every kind of encoder."""
    sizes: dict[str, Any] = {"width": ENCODER_WIDTH, "layers": BLOCKS, "heads": 2, "mlp_width": 16, "patch": PATCH}
    grid = RESOLUTION // PATCH
    return OptConfig(
        language_model=LanguageModelConfig(
            width=WIDTH,
            layers=LAYERS,
            heads=HEADS,
            mlp_width=32,
            vocab_size=vocab_size,
            max_positions=64,
            word_width=word_width,
            pre_norm=pre_norm,
            final_norm=pre_norm,
        ),
        vit=VisionConfig(**sizes, grid=grid),
        timesformer=TimesformerConfig(**sizes, grid=grid, num_frames=3),
        ast=AstConfig(**sizes, frequency_stride=5, time_stride=5, num_mel_bins=NUM_MEL_BINS, max_steps=MAX_STEPS),
        special_ids=ids,
    )


def random_opt(config: OptConfig, seed: int = 0) -> Opt:
    """A model whose every tensor is random: gains around 1, all else around 0."""
    generator = torch.Generator().manual_seed(seed)
    model = Opt(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = "norm" in name and name.endswith("weight")
            parameter.normal_(1.0 if is_gain else 0.0, 0.1 if is_gain else 0.3, generator=generator)
    return model


def write_tiny_opt(folder: Path) -> OptBackbone:
    """A backbone folder, loaded. The demo's tokenizer has no word for "</a>": its [DEC] stands in."""
    build_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    tokenizer = load_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    ids = OptSpecialIds(pad=tokenizer.pad_token_id, bos=tokenizer.cls_token_id, eos=tokenizer.sep_token_id)
    config = opt_config(ids, len(tokenizer) + 1)
    write_backbone(folder, random_opt(config), tokenizer, {})
    backbone = load_backbone(folder)
    assert isinstance(backbone, OptBackbone)
    return backbone


def opt_adapter_config(
    backbone: OptBackbone,
    task: Task = "vqa",
    encoder: EncoderName = "vit",
    *,
    answers: tuple[str, ...] = ANSWERS,
    **options: JsonValue,
) -> AdapterConfig:
    """The config of an adapter for this backbone; `options` are the family's."""
    wanted: dict[str, JsonValue] = {
        "encoder": encoder,
        "start_layer_idx": 1,
        "end_layer_idx": 3,
        "injected_hidden_states": 2,
        "prompt_len": 3,
        "answer_token_id": backbone.answer_token("</a>") if task == "vqa" else None,
    }
    wanted |= options
    features = wanted["injected_hidden_states"]
    assert isinstance(features, int)
    hears = encoder == "ast"
    return AdapterConfig(
        family="epalm",
        task=task,
        rank=1 if wanted.get("shared_connector") else features,
        options=wanted,
        backbone=BackboneRef(
            architecture="opt",
            width=WIDTH,
            layers=LAYERS,
            parts={part: backbone.parts[part] for part in ("language_model", encoder, "tokenizer")},
        ),
        preprocessing=AudioPreprocessing(num_mel_bins=NUM_MEL_BINS, max_steps=MAX_STEPS)
        if hears
        else Preprocessing(resolution=RESOLUTION, num_frames=3),
        max_text_tokens=24,
        decoding=AnswerDecoding(num_beams=2, max_length=16, answers=answers if task == "vqa" else (), rank_k=3),
    )


def random_opt_tensors(config: AdapterConfig, backbone: OptBackbone, seed: int) -> dict[str, Tensor]:
    """Every tensor of an adapter, far enough from zero for each to matter."""
    tensors = init_tensors(config, backbone.dims(), torch.Generator().manual_seed(seed))
    return {name: 3.0 * tensor for name, tensor in tensors.items()}


def make_opt_package(
    folder: Path,
    backbone: OptBackbone,
    task: Task = "vqa",
    encoder: EncoderName = "vit",
    *,
    seed: int,
    probed: bool = False,
    options: Mapping[str, JsonValue] | None = None,
) -> Package:
    """A random package on disk."""
    config = opt_adapter_config(backbone, task, encoder, **(options or {}))
    tensors = random_opt_tensors(config, backbone, seed)
    if probed:
        return write_probed_package(folder, config, tensors, f"# {folder.name}\n", backbone)
    return write_package(folder, config, tensors, f"# {folder.name}\n", None)
