"""Tiny models of the library's OPT and of its perceptual encoders, random everywhere, as folders the library wrote."""

from pathlib import Path
from typing import Any

import torch
import transformers

WIDTH, LAYERS, HEADS, VOCABULARY, POSITIONS = 24, 3, 3, 60, 40
IMAGE, PATCH, FRAMES = 16, 4, 3
STEPS, BINS = 20, 13
EPS = 1e-6  # the authors', of the encoders
PAD, BOS = 1, 2

_BLOCKS = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * WIDTH,
    "layer_norm_eps": EPS,
}
_PICTURES = {"image_size": IMAGE, "patch_size": PATCH}
_SOUND = {"patch_size": 4, "frequency_stride": 3, "time_stride": 2, "max_length": STEPS, "num_mel_bins": BINS}
_DEFAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ViTModel", _BLOCKS | _PICTURES),
    "Timesformer": ("TimesformerModel", _BLOCKS | _PICTURES | {"num_frames": FRAMES}),
    "AST": ("ASTModel", _BLOCKS | _SOUND),
    "OPT": (
        "OPTForCausalLM",
        {
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "ffn_dim": 2 * WIDTH,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": POSITIONS,
            "word_embed_proj_dim": WIDTH,
            "dropout": 0.0,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": BOS,
        },
    ),
}
POST_NORM = {"do_layer_norm_before": False, "word_embed_proj_dim": 16}  # as the model with 350 million parameters


def library_model(kind: str, *, seed: int = 0, **options: Any) -> Any:
    """One of "ViT", "Timesformer", "AST" and "OPT"."""
    architecture, defaults = _DEFAULTS[kind]
    config = getattr(transformers, f"{kind}Config")(**(defaults | options))
    more = {"add_pooling_layer": False} if kind == "ViT" else {}
    model = getattr(transformers, architecture)(config, **more).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        is_gain = "norm" in name.lower() and name.endswith("weight")
        parameter.normal_(1.0 if is_gain else 0.0, 0.25, generator=generator)
    model.tie_weights()
    return model


def write_library_model(folder: Path, kind: str, *, seed: int = 0, **options: Any) -> Any:
    """Write it as `save_pretrained` does, without a tokenizer; returns the model."""
    model = library_model(kind, seed=seed, **options)
    model.save_pretrained(folder)
    return model


def rewrite_config(folder: Path, **options: Any) -> None:
    """Change the config of a folder and leave its weights alone."""
    import json

    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
