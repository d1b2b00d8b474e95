"""UniAdapter: one bottleneck per layer, shared by vision, text and cross-modal.

Source: UniAdapter (Lu et al., 2023), section 3; the authors' `models/vit.py` and `models/med.py`.

With n the LayerNorm before, c the cross-modal LayerNorm (both eps 1e-5), s = 0.1 and z(x) = relu(down(n(x))):

    vision      s * visual_up(z(x))
    text        s * up(z(x))
    query       s * up(z(x)), read before the cross-attention (query residual)
    cross       s * c(multi_up(z(x)) + up(z(x)))       s multiplies after c

Optional key and value adapters, one pair per cross-attending stack: g * up(down(y)), linear, g learnable.
A fresh adapter is *not* the identity: c normalises whatever the up-projections give (see `init_tensors`).
"""

import itertools
import math
from collections.abc import Iterator, Mapping

import torch
from pydantic import Field, ValidationError
from torch import Tensor
from torch.nn import functional

from adapters.config import AdapterConfig, Architecture, Strict, describe
from adapters.errors import BackboneMismatch, InvalidPackage
from adapters.families.base import BackboneDims, BlipDims, Role, Schedule, Site, SlotTensors, Stack
from adapters.families.slots import OneSlot, Slot

SCALE = 0.1
NORM_EPS = 1e-5
FRAME_TEMPERATURE = 4.0
LAYER_MAPS = ("down", "visual", "text", "cross")
SITE_TENSORS: Mapping[Role, tuple[str, ...]] = {  # of a slot
    "mlp": ("down.weight", "down.bias", "visual.weight", "visual.bias"),
    "text": ("down.weight", "down.bias", "text.weight", "text.bias"),
    "cross": (
        *("down.weight", "down.bias", "cross.weight", "cross.bias", "text.weight", "text.bias"),
        *("cross_norm.weight", "cross_norm.bias", "query_gate"),
    ),
}
MEMORY_TERMS = ("video_key_adapter", "video_value_adapter")


class UniAdapterOptions(Strict):
    """Which parts of a UniAdapter are on. Names follow the authors' configuration where there is one."""

    visual: bool = True
    textual: bool = True
    multimodal: bool = True
    query_residual: bool = True
    frame_aware_attention: bool = False
    kv_rank: int | None = Field(default=None, gt=0)


def options_of(config: AdapterConfig) -> UniAdapterOptions:
    """The family's options in `config`. Raises: InvalidPackage naming the option that is wrong."""
    try:
        return UniAdapterOptions.model_validate(config.options)
    except ValidationError as error:
        raise InvalidPackage(f"uniadapter options: {describe(error)}", param="options") from error


class UniAdapter:
    """The family `uniadapter`."""

    name = "uniadapter"
    architecture: Architecture = "blip"

    def derived_dims(self, config: AdapterConfig, tensors: SlotTensors) -> BackboneDims:
        """See Family: `embed_dim` is the rows of a projection head the package carries."""
        heads = [tensors[name] for name in ("vision_proj.weight", "text_proj.weight") if name in tensors]
        rows = [head.shape[0] for head in heads if head.ndim == 2]
        return BlipDims(config.backbone.width, config.backbone.layers, embed_dim=max([1, *rows[:1]]))

    def tensor_shapes(self, config: AdapterConfig, dims: BackboneDims) -> dict[str, tuple[int, ...]]:
        """See Family. Parts that are switched off hold no tensors."""
        options = options_of(config)
        rank, width = config.rank, _blip(dims).width
        ups = self._up_projections(options)
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(dims.layers):
            prefix = f"adapters.{layer}"
            for norm in self._norms(options):
                shapes |= {f"{prefix}.{norm}.weight": (width,), f"{prefix}.{norm}.bias": (width,)}
            shapes |= {f"{prefix}.down_proj.weight": (rank, width), f"{prefix}.down_proj.bias": (rank,)}
            for up in ups:
                shapes |= {f"{prefix}.{up}.weight": (width, rank), f"{prefix}.{up}.bias": (width,)}
        if options.kv_rank is not None:
            for stack in memory_stacks(config):
                for term in MEMORY_TERMS:
                    shapes |= _memory_shapes(f"{stack}.{term}", width, options.kv_rank)
        return shapes

    def _up_projections(self, options: UniAdapterOptions) -> list[str]:
        ups = []
        if options.textual or options.multimodal:
            ups.append("up_proj")
        if options.multimodal:
            ups.append("multi_up_proj")
        if options.visual:
            ups.append("visual_up_proj")
        return ups

    def _norms(self, options: UniAdapterOptions) -> list[str]:
        norms = ["adapter_layer_norm_before"]
        return [*norms, "adapter_layer_norm_cross_modal"] if options.multimodal else norms

    def init_tensors(self, config: AdapterConfig, dims: BackboneDims, generator: torch.Generator) -> dict[str, Tensor]:
        """See Family, and `init_tensors`."""
        return init_tensors(config, dims, generator)

    def frozen_names(self, tensors: SlotTensors) -> set[str]:
        """See Family, and `frozen_names`."""
        return frozen_names(tensors)

    def slot_rank(self, config: AdapterConfig) -> int:
        """See Family."""
        return max(config.rank, options_of(config).kv_rank or 0)

    def slot_shapes(self, dims: BackboneDims, rank: int) -> dict[str, tuple[int, ...]]:
        """See Family."""
        own = _blip(dims)
        layers, width = own.layers, own.width
        shapes: dict[str, tuple[int, ...]] = {
            "down.weight": (layers, rank, width),
            "down.bias": (layers, rank),
            "query_gate": (1,),
            "cross_norm.weight": (layers, width),
            "cross_norm.bias": (layers, width),
        }
        for up in ("visual", "text", "cross"):
            shapes |= {f"{up}.weight": (layers, width, rank), f"{up}.bias": (layers, width)}
        for stack in own.stacks:
            for term in ("key", "value"):
                shapes |= {
                    f"{stack}.{term}.down.weight": (rank, width),
                    f"{stack}.{term}.down.bias": (rank,),
                    f"{stack}.{term}.up.weight": (width, rank),
                    f"{stack}.{term}.up.bias": (width,),
                }
        return shapes

    def fold(self, config: AdapterConfig, tensors: SlotTensors, dims: BackboneDims) -> dict[str, Tensor]:
        """See Family. Exact in real numbers:

        n's gain and bias go into `down`; s into the visual and text up-projections, but into the gain and bias of c
        for the cross term, since c would normalise away a scale put before it; `multi_up + up` become one matrix;
        g goes into the up-projection of its key or value adapter. What is switched off becomes zeros.
        """
        options = options_of(config)
        layers = (self._fold_layer(tensors, f"adapters.{layer}", options) for layer in range(dims.layers))
        slot = _join_layers(layers, dims.layers)
        gate = 1.0 if options.query_residual and options.textual else 0.0
        slot["query_gate"] = slot["down.bias"].new_full((1,), gate)
        if options.kv_rank is not None:
            for stack in memory_stacks(config):
                for term, source in zip(("key", "value"), MEMORY_TERMS, strict=True):
                    slot |= _fold_memory(tensors, f"{stack}.{source}", f"{stack}.{term}")
        return slot

    def _fold_layer(self, tensors: SlotTensors, prefix: str, options: UniAdapterOptions) -> dict[str, Tensor]:
        gain, shift = (
            tensors[f"{prefix}.adapter_layer_norm_before.weight"],
            tensors[f"{prefix}.adapter_layer_norm_before.bias"],
        )
        down, down_bias = tensors[f"{prefix}.down_proj.weight"], tensors[f"{prefix}.down_proj.bias"]
        nothing = (torch.zeros_like(down).t(), torch.zeros_like(gain))  # [D, r], [D]

        def up(name: str) -> tuple[Tensor, Tensor]:
            return tensors[f"{prefix}.{name}.weight"], tensors[f"{prefix}.{name}.bias"]

        text = up("up_proj") if options.textual or options.multimodal else nothing
        visual = up("visual_up_proj") if options.visual else nothing
        multi = up("multi_up_proj") if options.multimodal else nothing
        text_scale = SCALE if options.textual else 0.0
        cross_gain, cross_shift = torch.zeros_like(gain), torch.zeros_like(gain)
        if options.multimodal:
            cross_gain = SCALE * tensors[f"{prefix}.adapter_layer_norm_cross_modal.weight"]
            cross_shift = SCALE * tensors[f"{prefix}.adapter_layer_norm_cross_modal.bias"]
        return {
            "down.weight": down * gain,
            "down.bias": down_bias + down @ shift,
            "visual.weight": SCALE * visual[0],
            "visual.bias": SCALE * visual[1],
            "text.weight": text_scale * text[0],
            "text.bias": text_scale * text[1],
            "cross.weight": multi[0] + text[0],
            "cross.bias": multi[1] + text[1],
            "cross_norm.weight": cross_gain,
            "cross_norm.bias": cross_shift,
        }

    def site_groups(self, config: AdapterConfig, dims: BackboneDims) -> dict[str, tuple[str, ...]]:
        """See Family: one group per modality that is on, and one per key/value pair."""
        options = options_of(config)
        names = tuple(self.tensor_shapes(config, dims))
        groups: dict[str, tuple[str, ...]] = {}
        if options.visual:
            groups["visual"] = tuple(n for n in names if ".visual_up_proj." in n)
        if options.textual or options.multimodal:
            groups["textual"] = tuple(n for n in names if ".up_proj." in n and n.startswith("adapters."))
        if options.multimodal:
            groups["multimodal"] = tuple(n for n in names if "cross_modal" in n)
        if options.kv_rank is not None:
            for stack in memory_stacks(config):
                for term in MEMORY_TERMS:
                    groups[f"{stack}.{term}"] = tuple(n for n in names if n.startswith(f"{stack}.{term}.up_proj"))
        return groups

    def layer_maps(self) -> tuple[str, ...]:
        """See Family."""
        return LAYER_MAPS

    def site_tensors(self, role: Role) -> tuple[str, ...]:
        """See Family."""
        return SITE_TENSORS[role]

    def delta(self, site: Site, x: Tensor, slot: Slot, before: Tensor | None = None) -> Tensor | None:
        """See Family. Where a cross site's query term is wanted too, both share one product with `down`."""
        layer, tokens = site.layer, x.shape[1]
        both = x if before is None else torch.cat([x, before], dim=1)
        z = slot.linear(functional.layer_norm(both, both.shape[-1:], eps=NORM_EPS), "down", layer, "relu")
        if site.role == "mlp":
            return slot.linear(z, "visual", layer)
        if site.role == "text":
            return slot.linear(z, "text", layer)
        cross = slot.norm(slot.linear(z[:, :tokens], "cross", layer), "cross_norm", layer, NORM_EPS)
        if before is None:
            return cross
        return cross + slot.scale(slot.linear(z[:, tokens:], "text", layer), "query_gate")

    def memory(self, stack: Stack, y: Tensor, slot: OneSlot) -> tuple[Tensor, Tensor] | None:
        """See Family."""
        if f"{stack}.key.down.weight" not in slot.tensors:
            return None
        return _bottleneck(y, slot, f"{stack}.key"), _bottleneck(y, slot, f"{stack}.value")

    def schedule(self, config: AdapterConfig, dims: BackboneDims) -> Schedule | None:
        """See Family: none."""
        return None

    def prompt(self, slot: OneSlot) -> Tensor | None:
        """See Family: none."""
        return None

    def inject(self, features: Tensor, slot: OneSlot, schedule: Schedule) -> Tensor:
        """See Family: never asked for, as there is no schedule."""
        raise AssertionError("a UniAdapter injects nothing. This is a bug.")


def _blip(dims: BackboneDims) -> BlipDims:
    if not isinstance(dims, BlipDims):
        raise BackboneMismatch("a UniAdapter needs a BLIP, and this backbone is none", param="family")
    return dims


def frame_factors(similarity: Tensor, tokens_per_frame: int) -> Tensor:
    """Key factors [B, T*P] of frame-aware attention from text-frame similarities [B, T].

    p_t = T * softmax_t(f_t / 4) for the patch tokens of frame t; its CLS token keeps 1. One frame gives ones.
    Source: UniAdapter, frame-aware attention; the authors' `med.py`.
    """
    weights = similarity.shape[1] * torch.softmax(similarity.float() / FRAME_TEMPERATURE, dim=1)
    factors = weights[:, :, None].repeat(1, 1, tokens_per_frame)
    factors[:, :, 0] = 1.0
    return factors.flatten(1).to(similarity.dtype)


def _join_layers(layers: Iterator[SlotTensors], count: int) -> dict[str, Tensor]:
    """The tensors of `count` layers, [layers, ...] each, matrices laid out by inputs.

    Where no gradient is asked for, a layer is put in its place while it is in the processor's cache.
    """
    first = next(layers)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in first.values()):
        made = [first, *layers]
        return {name: torch.stack([layer[name] for layer in made]) for name in first}
    turned = {name: tensor.new_empty((count, *_turned(tensor).shape)) for name, tensor in first.items()}
    for index, layer in enumerate(itertools.chain([first], layers)):
        for name, tensor in layer.items():
            turned[name][index] = _turned(tensor)  # torch turns a matrix fast that is written as it will lie
    return {name: tensor.mT if tensor.ndim == 3 else tensor for name, tensor in turned.items()}


def _turned(tensor: Tensor) -> Tensor:
    return tensor.mT if tensor.ndim == 2 else tensor


def memory_stacks(config: AdapterConfig) -> tuple[Stack, ...]:
    """The cross-attending stacks an adapter of this task runs through, hence may hold key/value adapters for."""
    return ("text", "decoder") if config.task == "vqa" else ("text",)


def _memory_shapes(prefix: str, width: int, rank: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.scale": (1,),
        f"{prefix}.down_proj.weight": (rank, width),
        f"{prefix}.down_proj.bias": (rank,),
        f"{prefix}.up_proj.weight": (width, rank),
        f"{prefix}.up_proj.bias": (width,),
    }


def _fold_memory(tensors: SlotTensors, source: str, target: str) -> dict[str, Tensor]:
    scale = tensors[f"{source}.scale"]
    return {
        f"{target}.down.weight": tensors[f"{source}.down_proj.weight"],
        f"{target}.down.bias": tensors[f"{source}.down_proj.bias"],
        f"{target}.up.weight": scale * tensors[f"{source}.up_proj.weight"],
        f"{target}.up.bias": scale * tensors[f"{source}.up_proj.bias"],
    }


def _bottleneck(y: Tensor, slot: OneSlot, prefix: str) -> Tensor:
    return slot.linear(slot.linear(y, f"{prefix}.down"), f"{prefix}.up")


def init_tensors(config: AdapterConfig, dims: BackboneDims, generator: torch.Generator) -> dict[str, Tensor]:
    """Fresh tensors [float32] as the released trainers leave them.

    Every linear map starts normal(0, 0.02) with zero bias and every LayerNorm at (1, 0); the retrieval trainer then
    redraws `down` (Kaiming uniform, a = sqrt(5)) and zeroes `up`. A fresh adapter therefore differs from the backbone:
    the cross term is a LayerNorm's output, of magnitude about 0.1. Source: the authors' `train_*.py`.
    """
    shapes = UniAdapter().tensor_shapes(config, dims)
    return {name: _initial(name, shape, config, generator) for name, shape in shapes.items()}


def _initial(name: str, shape: tuple[int, ...], config: AdapterConfig, generator: torch.Generator) -> Tensor:
    if name.endswith(".scale") or (".adapter_layer_norm_" in name and name.endswith(".weight")):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    bottleneck = name.startswith("adapters.")
    if config.task == "retrieval" and bottleneck and ".down_proj." in name:
        bound = 1.0 / math.sqrt(shape[1])  # Kaiming uniform with a = sqrt(5)
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if config.task == "retrieval" and bottleneck and name.split(".")[2] == "up_proj":
        return torch.zeros(shape)
    return torch.empty(shape).normal_(0.0, 0.02, generator=generator)


def frozen_names(tensors: Mapping[str, Tensor]) -> set[str]:
    """Tensors the released trainers never train: a name rule meant for momentum copies also hits the cross-modal norm."""
    return {name for name in tensors if "adapter_layer_norm_cross_modal" in name}
