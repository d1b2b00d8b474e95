"""eP-ALM: a linear connector for the first token of a perceptual encoder's last blocks, and a soft prompt.

Source: eP-ALM (Shukor et al., 2023), section 3; the authors' `models/epalm.py` and `models/opt.py`.

With f_k the first token after the encoder's final LayerNorm, k counting its last n blocks from the shallowest:

    injected     W_k f_k + b_k, one map for each k or one for all, as the one extra token of the language model
    prompt       P, or W_3 tanh(W_1 P + b_1) + b_3, before the embeddings of the text

Tensor names are the authors': `connector.{k}` and `prompt_module.prefix_embedding`.
"""

from typing import Literal

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from adapters.config import AdapterConfig, Architecture, Strict, describe
from adapters.errors import BackboneMismatch, InvalidPackage
from adapters.families.base import (
    NOTHING,
    BackboneDims,
    EncoderDims,
    OptDims,
    Role,
    Schedule,
    Site,
    SlotTensors,
    Stack,
    columns_of,
)
from adapters.families.slots import OneSlot, Slot

EncoderName = Literal["vit", "timesformer", "ast"]
PROMPT = "prompt_module.prefix_embedding"
MAX_PROMPT_LENGTH = 128


class EPalmOptions(Strict):
    """What is injected where, and how a question is put. Names follow the authors' configuration where there is one.

    encoder                 the frozen part that perceives: one per adapter
    start_layer_idx         the first layer of the window, counted from 0
    end_layer_idx           the layer behind its last one
    injected_hidden_states  how many of the encoder's last blocks give a token
    shared_connector        one linear map for all of them
    text_step               of the window's layers, those whose number it divides get a token
    select_higher_step      take the layers each feature lasts for, where that is more than `text_step`
    prompt_len, prompt_mlp  tokens of the soft prompt, and whether it goes through the small network
    answer_token_id         the token between a question and its answer; None: the text's own end
    """

    encoder: EncoderName
    start_layer_idx: int = Field(ge=0)
    end_layer_idx: int = Field(gt=0)
    injected_hidden_states: int = Field(gt=0, le=1024)
    shared_connector: bool = False
    text_step: int = Field(default=1, gt=0)
    select_higher_step: bool = False
    prompt_len: int = Field(default=0, ge=0, le=MAX_PROMPT_LENGTH)
    prompt_mlp: bool = True
    answer_token_id: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _window_is_not_empty(self) -> "EPalmOptions":
        if self.start_layer_idx >= self.end_layer_idx:
            raise ValueError(f"the window from layer {self.start_layer_idx} to {self.end_layer_idx} is empty")
        return self

    @property
    def num_connectors(self) -> int:
        """How many linear maps there are."""
        return 1 if self.shared_connector else self.injected_hidden_states


def options_of(config: AdapterConfig) -> EPalmOptions:
    """The family's options in `config`. Raises: InvalidPackage naming the option that is wrong."""
    try:
        options = EPalmOptions.model_validate(config.options)
    except ValidationError as error:
        raise InvalidPackage(f"epalm options: {describe(error)}", param="options") from error
    if config.rank != options.num_connectors:
        raise InvalidPackage(f"rank must be the number of connectors, {options.num_connectors}", param="rank")
    return options


class EPalm:
    """The family `epalm`. Its "rank", which buckets its slots, is the number of connectors."""

    name = "epalm"
    architecture: Architecture = "opt"

    def derived_dims(self, config: AdapterConfig, tensors: SlotTensors) -> BackboneDims:
        """See Family: the widths are the columns of the first connector and of the prompt's table."""
        width, options = config.backbone.width, options_of(config)
        encoder = EncoderDims(columns_of(tensors, "connector.0.weight", 1), options.injected_hidden_states)
        words = columns_of(tensors, f"{PROMPT}.0.weight", width)
        return OptDims(width, config.backbone.layers, words, {options.encoder: encoder})

    def tensor_shapes(self, config: AdapterConfig, dims: BackboneDims) -> dict[str, tuple[int, ...]]:
        """See Family."""
        options = options_of(config)
        own = _opt(dims)
        self.schedule(config, dims)  # which is refused where the backbone is too small for it
        encoder = _encoder_width(own, options)
        shapes: dict[str, tuple[int, ...]] = {}
        for index in range(options.num_connectors):
            shapes |= {f"connector.{index}.weight": (own.width, encoder), f"connector.{index}.bias": (own.width,)}
        if options.prompt_len:
            words = own.word_width
            shapes[f"{PROMPT}.0.weight"] = (options.prompt_len, words)
            if options.prompt_mlp:
                for index in (1, 3):
                    shapes |= {f"{PROMPT}.{index}.weight": (words, words), f"{PROMPT}.{index}.bias": (words,)}
        return shapes

    def init_tensors(self, config: AdapterConfig, dims: BackboneDims, generator: torch.Generator) -> dict[str, Tensor]:
        """See Family, and `init_tensors`."""
        return init_tensors(config, dims, generator)

    def frozen_names(self, tensors: SlotTensors) -> set[str]:
        """See Family: none."""
        return set()

    def slot_rank(self, config: AdapterConfig) -> int:
        """See Family."""
        return config.rank

    def slot_shapes(self, dims: BackboneDims, rank: int) -> dict[str, tuple[int, ...]]:
        """See Family. Wide enough for each of the backbone's encoders."""
        own = _opt(dims)
        widest = max((encoder.width for encoder in own.encoders.values()), default=1)
        return {
            "connector.weight": (rank, own.width, widest),
            "connector.bias": (rank, own.width),
            "prompt": (MAX_PROMPT_LENGTH, own.word_width),
        }

    def fold(self, config: AdapterConfig, tensors: SlotTensors, dims: BackboneDims) -> dict[str, Tensor]:
        """See Family: the connectors stacked, the prompt taken through its network."""
        options = options_of(config)
        numbers = range(options.num_connectors)
        slot = {
            "connector.weight": torch.stack([tensors[f"connector.{index}.weight"] for index in numbers]),
            "connector.bias": torch.stack([tensors[f"connector.{index}.bias"] for index in numbers]),
        }
        if options.prompt_len:
            prompt = tensors[f"{PROMPT}.0.weight"]
            if options.prompt_mlp:
                hidden = torch.tanh(
                    torch.nn.functional.linear(prompt, tensors[f"{PROMPT}.1.weight"], tensors[f"{PROMPT}.1.bias"])
                )
                prompt = torch.nn.functional.linear(hidden, tensors[f"{PROMPT}.3.weight"], tensors[f"{PROMPT}.3.bias"])
            slot["prompt"] = prompt
        return slot

    def schedule(self, config: AdapterConfig, dims: BackboneDims) -> Schedule:
        """See Family. Source: the authors' `models/opt.py`; semantics of its quirks are kept.

        Each of the n features lasts for floor(N / n) layers of a window of N; where N is at most n only the first N,
        the shallowest, are used. `text_step` looks at a layer's number in the model, not in the window.
        Raises: BackboneMismatch for a window, or more features, than the backbone has.
        """
        options = options_of(config)
        own = _opt(dims)
        if options.end_layer_idx > own.layers:
            raise BackboneMismatch(
                f"the window ends at layer {options.end_layer_idx}; the language model has {own.layers}",
                param="options",
            )
        encoder = own.encoders.get(options.encoder)
        features = options.injected_hidden_states
        if encoder is not None and features > encoder.layers:
            raise BackboneMismatch(
                f"{features} blocks are injected; {options.encoder} has {encoder.layers}", param="options"
            )
        window = options.end_layer_idx - options.start_layer_idx
        step = window // features if features > 1 and window > features else 1
        text_step = max(step, options.text_step) if options.select_higher_step else options.text_step
        layers = [NOTHING] * own.layers
        for layer in range(options.start_layer_idx, options.end_layer_idx):
            if layer % text_step == 0:
                layers[layer] = min((layer - options.start_layer_idx) // step, features - 1) if features > 1 else 0
        return Schedule(features, tuple(layers))

    def site_groups(self, config: AdapterConfig, dims: BackboneDims) -> dict[str, tuple[str, ...]]:
        """See Family: each connector that the schedule uses, and the prompt."""
        options = options_of(config)
        used = {feature for feature in self.schedule(config, dims).layers if feature != NOTHING}
        numbers = {0} if options.shared_connector and used else used
        groups: dict[str, tuple[str, ...]] = {
            f"connector.{k}": (f"connector.{k}.weight", f"connector.{k}.bias") for k in sorted(numbers)
        }
        if options.prompt_len:
            groups["prompt"] = tuple(name for name in self.tensor_shapes(config, dims) if name.startswith(PROMPT))
        return groups

    def layer_maps(self) -> tuple[str, ...]:
        """See Family: none; connectors run once a request."""
        return ()

    def site_tensors(self, role: Role) -> tuple[str, ...]:
        """See Family: none."""
        return ()

    def delta(self, site: Site, x: Tensor, slot: Slot, before: Tensor | None = None) -> Tensor | None:
        """See Family: none."""
        return None

    def memory(self, stack: Stack, y: Tensor, slot: OneSlot) -> tuple[Tensor, Tensor] | None:
        """See Family: none."""
        return None

    def prompt(self, slot: OneSlot) -> Tensor | None:
        """See Family."""
        return slot.tensor("prompt", None) if "prompt" in slot.tensors else None

    def inject(self, features: Tensor, slot: OneSlot, schedule: Schedule) -> Tensor:
        """See Family."""
        last = features[:, features.shape[1] - schedule.num_features :]  # [B, n, d]
        weight, bias = slot.tensor("connector.weight", None), slot.tensor("connector.bias", None)
        if len(weight) == 1:
            return torch.nn.functional.linear(last, weight[0], bias[0])
        return torch.einsum("bnd,nwd->bnw", last, weight) + bias


def _opt(dims: BackboneDims) -> OptDims:
    if not isinstance(dims, OptDims):
        raise BackboneMismatch("an eP-ALM adapter needs a language model, and this backbone is none", param="family")
    return dims


def _encoder_width(dims: OptDims, options: EPalmOptions) -> int:
    encoder = dims.encoders.get(options.encoder)
    if encoder is None:
        raise BackboneMismatch(f"this backbone has no {options.encoder}", param="options")
    return encoder.width


def init_tensors(config: AdapterConfig, dims: BackboneDims, generator: torch.Generator) -> dict[str, Tensor]:
    """Fresh tensors [float32] as PyTorch leaves the authors' layers.

    Linear maps are uniform within 1/sqrt(inputs), biases too; the prompt's table is standard normal.
    Source: the authors' `models/epalm.py`, `models/prompt_tuning.py`.
    """
    shapes = EPalm().tensor_shapes(config, dims)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name == f"{PROMPT}.0.weight":
            tensors[name] = torch.empty(shape).normal_(generator=generator)
            continue
        inputs = shapes[name.removesuffix("bias") + "weight" if name.endswith(".bias") else name][1]
        bound = inputs**-0.5
        tensors[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return tensors
