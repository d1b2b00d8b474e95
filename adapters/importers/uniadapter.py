"""A checkpoint of the UniAdapter trainers -> an adapter package.

Such a file holds the complete model: the frozen backbone, every adapter under four or five names, and for retrieval the
momentum copies and queues. Read with `weights_only=True`. Source: the authors' `train_retrieval.py`, `train_vqa.py`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import JsonValue, ValidationError
from torch import Tensor

from adapters.config import AdapterConfig, AnswerDecoding, Preprocessing, Task, describe
from adapters.errors import ConversionError, TensorMismatch
from adapters.families.base import HEADS, BackboneDims, backbone_ref
from adapters.families.uniadapter import MEMORY_TERMS, UniAdapter, UniAdapterOptions
from adapters.importers.checkpoint import ImportedAdapter, as_json

CheckBackbone = Callable[[Mapping[str, Tensor]], None]

# The same adapter appears under each of these prefixes; {i} is the layer.
_ALIASES = (
    "visual_encoder.adapters.{i}",
    "visual_encoder.blocks.{i}.adapter",
    "text_encoder.encoder.layer.{i}.adapter",
    "text_decoder.bert.encoder.layer.{i}.adapter",
)
_MEMORY_SOURCES = {"text": "text_encoder.encoder", "decoder": "text_decoder.bert.encoder"}
_SWITCHES = ("adapter_visual", "adapter_textual", "adapter_multimodal")


def import_uniadapter(
    document: Mapping[str, Any],
    *,
    dims: BackboneDims,
    parts: Mapping[str, str],
    check_backbone: CheckBackbone,
    answers: tuple[str, ...] = (),
    provenance: Mapping[str, JsonValue] | None = None,
) -> ImportedAdapter:
    """Turn a trainer's checkpoint into a package's config and tensors.

    `check_backbone` gets the state dict and raises BackboneMismatch if its frozen tensors are another backbone's.
    Dropped: momentum copies, queues, the decoder's unused adapter list, the temperature.
    Raises: ConversionError for options nobody can serve; TensorMismatch when the copies of an adapter disagree.
    """
    state: dict[str, Tensor] = dict(document["model"])
    settings: dict[str, Any] = dict(document["config"])
    _refuse_unsupported(settings, state)
    check_backbone(state)
    task: Task = "vqa" if any(name.startswith("text_decoder.") for name in state) else "retrieval"
    options = _options(settings, state)
    rank = state["adapters.0.down_proj.weight"].shape[0]
    heads = tuple(head for head in HEADS if f"{head}.weight" in state)
    used_parts = (
        ("vision", "text_encoder", "decoder", "tokenizer") if task == "vqa" else ("vision", "text_encoder", "tokenizer")
    )
    try:
        config = AdapterConfig(
            family="uniadapter",
            task=task,
            rank=rank,
            options=options.model_dump(mode="json"),
            heads=heads,
            backbone=backbone_ref(dims, parts, used_parts),
            preprocessing=Preprocessing(resolution=settings["image_size"]),
            decoding=_decoding(settings, answers) if task == "vqa" else None,
            provenance={"source": "UniAdapter checkpoint", "settings": as_json(settings), **(provenance or {})},
        )
    except ValidationError as error:
        raise ConversionError(
            f"the checkpoint's config cannot be served: {describe(error)}", param="checkpoint"
        ) from error
    _check_copies(state, dims.layers)
    return ImportedAdapter(config, _tensors(state, config, dims))


def _refuse_unsupported(settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    if "adapters.0.down_proj.weight" not in state:
        raise ConversionError("the checkpoint holds no UniAdapter (no adapters.0.down_proj.weight)")
    if not settings.get("adapter", True):
        raise ConversionError("the checkpoint was trained with `adapter: false`")
    if settings.get("temporal_embed") or any(name.endswith(".time_embed") for name in state):
        raise ConversionError("`temporal_embed` is not supported: no released configuration uses it")
    if not isinstance(settings.get("image_size"), int):
        raise ConversionError("the checkpoint's config lacks image_size, a whole number")


def _options(settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> UniAdapterOptions:
    memory = f"{_MEMORY_SOURCES['text']}.{MEMORY_TERMS[0]}.down_proj.weight"
    has_memory = bool(settings.get("video_key_adapter"))
    if has_memory and memory not in state:
        raise TensorMismatch(f"the checkpoint's config says `video_key_adapter`, but there is no {memory}")
    visual, textual, multimodal = (bool(settings.get(switch, True)) for switch in _SWITCHES)
    return UniAdapterOptions(
        visual=visual,
        textual=textual,
        multimodal=multimodal,
        frame_aware_attention=bool(settings.get("frame_aware_attention", False)),
        kv_rank=state[memory].shape[0] if has_memory else None,
    )


def _decoding(settings: Mapping[str, Any], answers: tuple[str, ...]) -> AnswerDecoding:
    return AnswerDecoding(rank_k=int(settings.get("k_test", 128)), answers=answers)


def _tensors(state: Mapping[str, Tensor], config: AdapterConfig, dims: BackboneDims) -> dict[str, Tensor]:
    """Every tensor the family wants, under the package's name."""
    wanted = UniAdapter().tensor_shapes(config, dims)
    sources = {name: _source_name(name) for name in wanted}
    sources |= {f"{head}.{kind}": f"{head}.{kind}" for head in config.heads for kind in ("weight", "bias")}
    missing = [source for source in sources.values() if source not in state]
    if missing:
        raise TensorMismatch(f"the checkpoint lacks {len(missing)} tensors, first {missing[0]}")
    return {name: state[source].detach().clone().contiguous() for name, source in sources.items()}


def _source_name(name: str) -> str:
    stack, _, rest = name.partition(".")
    return f"{_MEMORY_SOURCES[stack]}.{rest}" if stack in _MEMORY_SOURCES else name


def _check_copies(state: Mapping[str, Tensor], layers: int) -> None:
    """Every name of an adapter must hold the same values: they are one module in the authors' code."""
    pattern = re.compile(r"adapters\.(\d+)\.(.+)")
    for name, tensor in state.items():
        match = pattern.fullmatch(name)
        if match is None:
            continue
        layer, rest = int(match.group(1)), match.group(2)
        if layer >= layers:
            raise TensorMismatch(f"{name}: the backbone has {layers} layers only")
        for alias in (f"{prefix.format(i=layer)}.{rest}" for prefix in _ALIASES):
            if alias in state and not torch.equal(state[alias], tensor):
                raise TensorMismatch(f"{alias} differs from {name}, which it should share its values with")
