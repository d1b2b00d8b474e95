"""Tiny models of the library's BLIP, random everywhere, as folders the library itself wrote."""

from pathlib import Path
from typing import Any

import torch
import transformers

from service.backbone.config import SpecialIds

WIDTH, LAYERS, HEADS, EMBED_DIM = 24, 2, 3, 8
VOCABULARY, POSITIONS = 60, 32
PATCH, IMAGE = 4, 16
IDS = SpecialIds(pad=0, cls=4, sep=5, bos=57, enc=59)
QA, RETRIEVAL, CAPTION = "BlipForQuestionAnswering", "BlipForImageTextRetrieval", "BlipForConditionalGeneration"
EPS = 1e-6  # the authors'; the library's own default is 1e-5


def library_model(architecture: str, seed: int = 0) -> Any:
    """One of the three, with the authors' eps in the vision tower."""
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "encoder_hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "projection_dim": EMBED_DIM,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": IDS.pad,
        "bos_token_id": IDS.bos,
        "sep_token_id": IDS.sep,
        "eos_token_id": IDS.sep,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": IMAGE,
        "patch_size": PATCH,
        "layer_norm_eps": EPS,
    }
    config = transformers.BlipConfig(
        text_config=text, vision_config=vision, projection_dim=EMBED_DIM, image_text_hidden_size=EMBED_DIM
    )
    model = getattr(transformers, architecture)(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        is_gain = "norm" in name.lower() and name.endswith("weight")
        parameter.normal_(1.0 if is_gain else 0.0, 0.2, generator=generator)
    model.tie_weights()
    return model


def write_library_model(folder: Path, architecture: str, seed: int = 0) -> Any:
    """Write it as `save_pretrained` does, without a tokenizer; returns the model."""
    model = library_model(architecture, seed)
    model.save_pretrained(folder)
    return model
