"""Hugging Face folders or hub ids of an OPT and of perceptual encoders -> our backbone folder."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapters.errors import ConversionError
from service.backbone.base import load_tokenizer
from service.backbone.config import (
    AstConfig,
    LanguageModelConfig,
    OptConfig,
    OptSpecialIds,
    TimesformerConfig,
    VisionConfig,
)
from service.backbone.convert import Rule, join_qkv, library_config, rename
from service.backbone.opt import Opt

LIBRARY_EPS, AUTHORS_EPS = 1e-12, 1e-6


def _rules(*pairs: tuple[str, str]) -> list[Rule]:
    return [(re.compile(source), target) for source, target in pairs]


# The library renamed some modules on the way; both generations of names are known here.
_QKV = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
_BLOCK = r"(?:encoder\.)?layers?\.(\d+)\."
_WB = r"(weight|bias)"
_TOWER = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (rf"embeddings\.patch_embeddings\.projection\.{_WB}", r"patch_embed.\1"),
    (rf"{_BLOCK}layernorm_before\.{_WB}", r"blocks.\1.norm1.\2"),
    (rf"{_BLOCK}layernorm_after\.{_WB}", r"blocks.\1.norm2.\2"),
    (rf"{_BLOCK}(?:intermediate\.dense|mlp\.fc1)\.{_WB}", r"blocks.\1.mlp.fc1.\2"),
    (rf"{_BLOCK}(?:output\.dense|mlp\.fc2)\.{_WB}", r"blocks.\1.mlp.fc2.\2"),
    (rf"layernorm\.{_WB}", r"norm.\1"),
)
_VIT = _rules(
    *_TOWER,
    (r"embeddings\.distillation_token", "dist_token"),
    (rf"{_BLOCK}attention\.attention\.(query|key|value)\.{_WB}", r"blocks.\1.attn.\2.\3"),
    *((rf"{_BLOCK}attention\.{theirs}\.{_WB}", rf"blocks.\1.attn.{ours}.\2") for theirs, ours in _QKV.items()),
    (rf"{_BLOCK}attention\.(?:output\.dense|o_proj)\.{_WB}", r"blocks.\1.attn.proj.\2"),
)
_TIMESFORMER = _rules(
    *_TOWER,
    (r"embeddings\.time_embeddings", "time_embed"),
    (rf"{_BLOCK}attention\.attention\.qkv\.{_WB}", r"blocks.\1.attn.qkv.\2"),
    (rf"{_BLOCK}attention\.output\.dense\.{_WB}", r"blocks.\1.attn.proj.\2"),
    (rf"{_BLOCK}temporal_attention\.attention\.qkv\.{_WB}", r"blocks.\1.temporal_attn.qkv.\2"),
    (rf"{_BLOCK}temporal_attention\.output\.dense\.{_WB}", r"blocks.\1.temporal_attn.proj.\2"),
    (rf"{_BLOCK}temporal_layernorm\.{_WB}", r"blocks.\1.temporal_norm.\2"),
    (rf"{_BLOCK}temporal_dense\.{_WB}", r"blocks.\1.temporal_fc.\2"),
)
_DECODER = r"(?:model\.)?decoder\."
_LAYER = rf"{_DECODER}layers\.(\d+)\."
_OPT = _rules(
    (rf"{_DECODER}embed_tokens\.weight", "words.weight"),
    (rf"{_DECODER}embed_positions\.weight", "positions.weight"),
    (rf"{_DECODER}(project_in|project_out)\.weight", r"\1.weight"),
    (rf"{_DECODER}final_layer_norm\.{_WB}", r"norm.\1"),
    *((rf"{_LAYER}self_attn\.{theirs}\.{_WB}", rf"layers.\1.attn.{ours}.\2") for theirs, ours in _QKV.items()),
    (rf"{_LAYER}self_attn\.out_proj\.{_WB}", r"layers.\1.attn.proj.\2"),
    (rf"{_LAYER}self_attn_layer_norm\.{_WB}", r"layers.\1.attn_norm.\2"),
    (rf"{_LAYER}(fc[12])\.{_WB}", r"layers.\1.\2.\3"),
    (rf"{_LAYER}final_layer_norm\.{_WB}", r"layers.\1.mlp_norm.\2"),
)
_IGNORED = re.compile(r"lm_head\.weight$")


@dataclass(frozen=True)
class OptPart:
    """A language model or an encoder, read from one source."""

    name: str
    origin: str
    config: LanguageModelConfig | VisionConfig | TimesformerConfig | AstConfig
    tensors: dict[str, Tensor]
    special_ids: OptSpecialIds | None = None
    tokenizer: Any | None = None


def _language_model(config: Any) -> LanguageModelConfig:
    if config.activation_function != "relu" or not config.enable_bias or not config.layer_norm_elementwise_affine:
        raise ConversionError("known are OPT models with ReLU, biases and LayerNorms with weights")
    if not config.tie_word_embeddings:
        raise ConversionError("the word head is not tied to the word embeddings")
    return LanguageModelConfig(
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        mlp_width=config.ffn_dim,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        word_width=config.word_embed_proj_dim,
        pre_norm=config.do_layer_norm_before,
        final_norm=config.do_layer_norm_before and not config._remove_final_layer_norm,
    )


def _sizes(config: Any) -> dict[str, Any]:
    """What the encoders' configs share. The authors' towers have an epsilon of 1e-6, whatever the library's default."""
    if config.hidden_act != "gelu" or not config.qkv_bias:
        raise ConversionError(f"known are encoders with the exact GELU and biases, not {config.hidden_act}")
    return {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "mlp_width": config.intermediate_size,
        "patch": config.patch_size,
        "norm_eps": AUTHORS_EPS if config.layer_norm_eps == LIBRARY_EPS else config.layer_norm_eps,
    }


def _grid(config: Any) -> int:
    if not isinstance(config.image_size, int) or config.num_channels != 3:
        raise ConversionError("known are encoders of square pictures with three channels")
    return int(config.image_size // config.patch_size)


def _vit(config: Any) -> VisionConfig:
    return VisionConfig(**_sizes(config), grid=_grid(config))


def _timesformer(config: Any) -> TimesformerConfig:
    if config.attention_type != "divided_space_time":
        raise ConversionError(f"known are TimeSformers with divided_space_time attention, not {config.attention_type}")
    return TimesformerConfig(**_sizes(config), grid=_grid(config), num_frames=config.num_frames)


def _ast(config: Any) -> AstConfig:
    return AstConfig(
        **_sizes(config),
        frequency_stride=config.frequency_stride,
        time_stride=config.time_stride,
        num_mel_bins=config.num_mel_bins,
        max_steps=config.max_length,
    )


@dataclass(frozen=True)
class _Kind:
    """How one of the library's models becomes a part."""

    name: str
    library_class: str
    config: Callable[[Any], LanguageModelConfig | VisionConfig | TimesformerConfig | AstConfig]
    rules: list[Rule]
    arguments: dict[str, Any]


KINDS = {
    "opt": _Kind("language_model", "OPTForCausalLM", _language_model, _OPT, {}),
    "vit": _Kind("vit", "ViTModel", _vit, _VIT, {"add_pooling_layer": False}),
    "timesformer": _Kind("timesformer", "TimesformerModel", _timesformer, _TIMESFORMER, {}),
    "audio-spectrogram-transformer": _Kind("ast", "ASTModel", _ast, _VIT, {}),
}


def read_part(source: str) -> OptPart:
    """A part from a Hugging Face folder or hub id, and an OPT's tokenizer if it has one.

    Raises: ConversionError for another architecture, or a variant of one that is not known here.
    """
    config = library_config(source)
    kind = KINDS.get(config.model_type)
    if kind is None:
        raise ConversionError(f"{source} is {config.model_type}; known are {', '.join(KINDS)}", param="source")
    ours = kind.config(config)
    tensors = join_qkv(rename(_weights(source, kind), kind.rules, _IGNORED), "attn")
    if kind.name != "language_model":
        return OptPart(kind.name, source, ours, tensors)
    ids = OptSpecialIds(pad=config.pad_token_id, bos=config.bos_token_id, eos=config.eos_token_id)
    try:
        tokenizer = load_tokenizer(source)
    except ConversionError:
        tokenizer = None
    return OptPart(kind.name, source, ours, tensors, ids, tokenizer)


def _weights(source: str, kind: _Kind) -> dict[str, Tensor]:
    """A source's weights by the library's names. Raises: ConversionError for one that the library would make up."""
    import transformers  # slow to import, and not needed to serve

    library_class = getattr(transformers, kind.library_class)
    try:
        model, report = library_class.from_pretrained(source, dtype="auto", output_loading_info=True, **kind.arguments)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConversionError(f"cannot read the weights of {source}: {error}", param="source") from error
    if report["missing_keys"]:
        raise ConversionError(f"{source} lacks {min(report['missing_keys'])}", param="source")
    state: dict[str, Tensor] = model.state_dict()
    return state


def assemble_opt(parts: Sequence[OptPart], *, tokenizer: Any | None = None) -> tuple[Opt, Any | None]:
    """The model of these parts, exactly one of which is the language model, and its tokenizer.

    Raises: ConversionError for a part given twice or missing, and for a tokenizer with more words than there are.
    """
    by_name: dict[str, OptPart] = {}
    for part in parts:
        if part.name in by_name:
            raise ConversionError(
                f"{by_name[part.name].origin} and {part.origin} are both a {part.name}", param="source"
            )
        by_name[part.name] = part
    language_model = by_name.get("language_model")
    if language_model is None:
        raise ConversionError("perceptual encoders need a language model: give an OPT too", param="source")
    assert language_model.special_ids is not None, "a language model is read with its special ids. This is a bug."
    config = OptConfig.model_validate(
        {name: part.config for name, part in by_name.items()} | {"special_ids": language_model.special_ids}
    )
    tokenizer = tokenizer or language_model.tokenizer
    if tokenizer is not None and len(tokenizer) > config.language_model.vocab_size:
        raise ConversionError(
            f"the tokenizer has {len(tokenizer)} words, the language model only {config.language_model.vocab_size}",
            param="tokenizer",
        )
    with torch.device("meta"):
        model = Opt(config)
    tensors = {f"{name}.{own}": tensor for name, part in by_name.items() for own, tensor in part.tensors.items()}
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise ConversionError(f"no complete model: {error}") from error
    return model.eval().requires_grad_(False), tokenizer
