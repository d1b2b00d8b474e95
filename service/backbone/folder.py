"""Backbone folders: `backbone.json`, one `<part>.safetensors` per part and, if there is one, `tokenizer/`."""

from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.config import describe
from adapters.errors import BackboneNotFound, ConversionError, DigestMismatch
from service.backbone.base import (
    DTYPES,
    TOKENIZER,
    Backbone,
    BackboneManifest,
    Model,
    load_tokenizer,
    part_digest,
    part_tensors,
    tokenizer_digest,
)
from service.backbone.blip import Blip
from service.backbone.blip_backbone import BlipBackbone
from service.backbone.config import BlipConfig, OptConfig
from service.backbone.opt import Opt
from service.backbone.opt_backbone import OptBackbone


def write_backbone(
    folder: Path,
    model: Model,
    tokenizer: Any | None,
    provenance: dict[str, JsonValue],
    *,
    max_text_tokens: int = 35,
) -> BackboneManifest:
    """Write a backbone folder; returns its manifest. `max_text_tokens` holds for requests without an adapter.

    Raises: ConversionError if the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConversionError(f"{folder} is not empty", param="out")
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    parts: dict[str, str] = {}
    for part, tensors in part_tensors(model).items():
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
        parts[part] = part_digest(config, part, stored)
        save_file(stored, folder / f"{part}.safetensors")
    parts[TOKENIZER] = tokenizer_digest(tokenizer, config)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / TOKENIZER)
    resolution = config.vision.grid * config.vision.patch if isinstance(config, BlipConfig) else None
    manifest = BackboneManifest(
        config=config,
        parts=parts,
        resolution=resolution,
        max_text_tokens=max_text_tokens,
        provenance=provenance,
    )
    (folder / "backbone.json").write_text(manifest.model_dump_json(indent=2) + "\n")
    return manifest


def load_manifest(folder: Path) -> BackboneManifest:
    """What a backbone folder says about itself. Raises: BackboneNotFound, ConversionError."""
    path = folder / "backbone.json"
    if not path.is_file():
        raise BackboneNotFound(f"no backbone at {folder}: it holds no backbone.json", param="backbone")
    try:
        return BackboneManifest.model_validate_json(path.read_text())
    except ValidationError as error:
        raise ConversionError(f"{path}: {describe(error)}") from error


def load_backbone(folder: Path, *, device: str = "cpu", dtype: str = "float32", verify: bool = True) -> Backbone:
    """Load a backbone folder onto a device.

    Stored values are checked against their digests before they are cast to `dtype`. From then on convolutions of this
    process compute float32 as float32: CUDA's would round to TF32, and answers would depend on their batch.
    Raises: BackboneNotFound, ConversionError for a broken folder, DigestMismatch naming the changed part.
    """
    torch.backends.cudnn.allow_tf32 = False
    manifest = load_manifest(folder)
    state: dict[str, Tensor] = {}
    for part in (name for name in manifest.parts if name != TOKENIZER):
        tensors = _read_part(folder / f"{part}.safetensors")
        if verify and part_digest(manifest.config, part, tensors) != manifest.parts[part]:
            raise DigestMismatch(f"{folder}: part {part!r} does not have the digest that backbone.json names")
        state |= {f"{part}.{name}": tensor for name, tensor in tensors.items()}
    with torch.device("meta"):
        model = _empty_model(manifest.config)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ConversionError(f"{folder}: {error}") from error
    model.to(device=torch.device(device), dtype=DTYPES[dtype])
    tokenizer = load_tokenizer(folder / TOKENIZER) if (folder / TOKENIZER).is_dir() else None
    if verify and tokenizer_digest(tokenizer, manifest.config) != manifest.parts[TOKENIZER]:
        raise DigestMismatch(f"{folder}: the tokenizer does not have the digest that backbone.json names")
    if isinstance(model, Blip):
        return BlipBackbone(model, manifest, tokenizer)
    return OptBackbone(model, manifest, tokenizer)


def _empty_model(config: BlipConfig | OptConfig) -> Model:
    return Blip(config) if isinstance(config, BlipConfig) else Opt(config)


def load_blip(folder: Path, *, device: str = "cpu", dtype: str = "float32", verify: bool = True) -> BlipBackbone:
    """A folder that must hold a BLIP. Raises: ConversionError for another kind; see `load_backbone`."""
    backbone = load_backbone(folder, device=device, dtype=dtype, verify=verify)
    if not isinstance(backbone, BlipBackbone):
        raise ConversionError(
            f"{folder} holds a backbone of kind {backbone.architecture}, not a BLIP", param="backbone"
        )
    return backbone


def _read_part(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"cannot read {path.name}: {error}") from error
