"""Other people's BLIP weights -> our backbone folder.

Two sources: Hugging Face folders or hub ids, and checkpoints of the authors' code (`.pth`, read with
`weights_only=True`). Both become one set of canonical names; whatever is neither used nor known to be of no use here
is an error, so that nothing is lost in silence.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.errors import BackboneMismatch, ConversionError
from service.backbone.base import load_tokenizer
from service.backbone.blip import Blip
from service.backbone.blip_backbone import BlipBackbone
from service.backbone.config import BlipConfig, SpecialIds, TextConfig, VisionConfig
from service.backbone.vit import interpolate_positions

Rule = tuple[re.Pattern[str], str]

BERT_SPECIAL_IDS = SpecialIds(pad=0, cls=101, sep=102, bos=30522, enc=30523)
BERT_VOCAB_SIZE = 30524
DECODE_TOKEN, ENCODE_TOKEN = "[DEC]", "[ENC]"

# (pattern of the source's name, canonical name). "qkv" and the like are joined from three maps afterwards.
_VISION_HF = (
    (r"vision_model\.embeddings\.class_embedding", "vision.cls_token"),
    (r"vision_model\.embeddings\.position_embedding", "vision.pos_embed"),
    (r"vision_model\.embeddings\.patch_embedding\.(weight|bias)", r"vision.patch_embed.\1"),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.(weight|bias)", r"vision.blocks.\1.attn.qkv.\2"),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection\.(weight|bias)", r"vision.blocks.\1.attn.proj.\2"),
    (r"vision_model\.encoder\.layers\.(\d+)\.layer_norm([12])\.(weight|bias)", r"vision.blocks.\1.norm\2.\3"),
    (r"vision_model\.encoder\.layers\.(\d+)\.mlp\.(fc[12])\.(weight|bias)", r"vision.blocks.\1.mlp.\2.\3"),
    (r"vision_model\.post_layernorm\.(weight|bias)", r"vision.norm.\1"),
)
_VISION_AUTHORS = (
    (r"visual_encoder\.(cls_token|pos_embed)", r"vision.\1"),
    (r"visual_encoder\.patch_embed\.proj\.(weight|bias)", r"vision.patch_embed.\1"),
    (
        r"visual_encoder\.blocks\.(\d+)\.((?:norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.(?:weight|bias))",
        r"vision.blocks.\1.\2",
    ),
    (r"visual_encoder\.norm\.(weight|bias)", r"vision.norm.\1"),
)
_STACKS = (("text_encoder", "text_encoder"), (r"text_decoder\.bert", "decoder.body"))
_TEXT = (
    (r"embeddings\.word_embeddings\.weight", "embeddings.word.weight"),
    (r"embeddings\.position_embeddings\.weight", "embeddings.position.weight"),
    (r"embeddings\.LayerNorm\.(weight|bias)", r"embeddings.norm.\1"),
    (r"encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)\.(weight|bias)", r"layers.\1.attention.\2.\3"),
    (
        r"encoder\.layer\.(\d+)\.crossattention\.self\.(query|key|value)\.(weight|bias)",
        r"layers.\1.crossattention.\2.\3",
    ),
    (r"encoder\.layer\.(\d+)\.(attention|crossattention)\.output\.dense\.(weight|bias)", r"layers.\1.\2.proj.\3"),
    (r"encoder\.layer\.(\d+)\.(attention|crossattention)\.output\.LayerNorm\.(weight|bias)", r"layers.\1.\2_norm.\3"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(weight|bias)", r"layers.\1.mlp.fc1.\2"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.(weight|bias)", r"layers.\1.mlp.fc2.\2"),
    (r"encoder\.layer\.(\d+)\.output\.LayerNorm\.(weight|bias)", r"layers.\1.mlp_norm.\2"),
)
_HEADS = (
    (r"text_decoder\.cls\.predictions\.bias", "decoder.bias"),
    (r"text_decoder\.cls\.predictions\.transform\.dense\.(weight|bias)", r"decoder.transform.\1"),
    (r"text_decoder\.cls\.predictions\.transform\.LayerNorm\.(weight|bias)", r"decoder.transform_norm.\1"),
    (r"(vision_proj|text_proj|itm_head)\.(weight|bias)", r"\1.\2"),
)
_RULES = [
    (re.compile(source), target)
    for source, target in (
        *_VISION_HF,
        *_VISION_AUTHORS,
        *((f"{stack}\\.{source}", f"{ours}.{target}") for stack, ours in _STACKS for source, target in _TEXT),
        *_HEADS,
    )
]
# Known and of no use to a frozen backbone: adapters, momentum copies, queues, buffers, copies of tied tensors.
_IGNORED = re.compile(
    r"(adapters(_dec|_m)?\.|visual_encoder\.adapters\.|.*\.adapter\.|.*\.video_(key|value)_adapter\."
    r"|\w+_m\.|(image|text|idx|ptr)_queue$|temp$|logit_scale$|.*\.position_ids$|.*\.time_embed$"
    r"|text_decoder\.cls\.predictions\.decoder\.)"
)


@dataclass(frozen=True)
class SourceWeights:
    """Canonical tensors read from one source, with what only its config can tell."""

    origin: str
    tensors: dict[str, Tensor]
    vision_heads: int | None = None
    text_heads: int | None = None
    special_ids: SpecialIds | None = None
    tokenizer: Any | None = None


def canonical(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a BLIP's state dict; query, key and value of self-attention become one `qkv`.

    Raises: ConversionError naming what is neither used nor known to be useless.
    """
    renamed = rename(state, _RULES, _IGNORED)
    _check_tied(state)
    return join_qkv(renamed, "attention")


def rename(state: Mapping[str, Tensor], rules: Sequence[Rule], ignored: re.Pattern[str]) -> dict[str, Tensor]:
    """A foreign state dict under our names. Raises: ConversionError naming what no rule knows."""
    renamed: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in state.items():
        target = next((match.expand(to) for pattern, to in rules if (match := pattern.fullmatch(name))), None)
        if target is not None:
            renamed[target] = tensor.detach()
        elif not ignored.match(name):
            unknown.append(name)
    if unknown:
        raise ConversionError(f"{len(unknown)} tensors of no known use: {', '.join(unknown[:5])}")
    return renamed


def _check_tied(state: Mapping[str, Tensor]) -> None:
    """The word head must be tied to the decoder's embeddings, as ours is."""
    head = state.get("text_decoder.cls.predictions.decoder.weight")
    words = state.get("text_decoder.bert.embeddings.word_embeddings.weight")
    if head is not None and words is not None and not torch.equal(head, words):
        raise ConversionError("the decoder's word head is not tied to its word embeddings")


def join_qkv(tensors: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    """`query`, `key` and `value` of every `module` as its `qkv`. Raises: ConversionError when one of them is missing."""
    joined: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        head, separator, tail = name.partition(f".{module}.")
        kind = tail.partition(".")
        if not separator or kind[0] not in ("query", "key", "value"):
            joined[name] = tensor
        elif kind[0] == "query":
            parts = [f"{head}.{module}.{which}.{kind[2]}" for which in ("query", "key", "value")]
            lacking = [part for part in parts if part not in tensors]
            if lacking:
                raise ConversionError(f"no complete model: {lacking[0]} is missing")
            joined[f"{head}.{module}.qkv.{kind[2]}"] = torch.cat([tensors[part] for part in parts])
    return joined


def is_blip(source: str) -> bool:
    """Whether a source is for `read_source`: a checkpoint, or a folder or hub id of a BLIP. Raises: ConversionError."""
    return Path(source).is_file() or library_config(source).model_type == "blip"


def library_config(source: str) -> Any:
    """The config of a Hugging Face folder or hub id. Raises: ConversionError."""
    import transformers  # slow to import, and not needed to serve

    try:
        return transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConversionError(f"no model at {source}: {error}", param="source") from error


def read_source(source: str) -> SourceWeights:
    """Read an authors' checkpoint (a file) or a Hugging Face folder or hub id. Raises: ConversionError."""
    return read_authors(Path(source)) if Path(source).is_file() else read_hugging_face(source)


def read_authors(path: Path) -> SourceWeights:
    """Read a checkpoint of the authors' code. Raises: ConversionError for a pickle that holds more than data."""
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen types for a dozen kinds of bad file
        raise ConversionError(f"cannot read {path.name}: {str(error).splitlines()[0]}") from error
    state = document.get("model", document) if isinstance(document, dict) else document
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ConversionError(f"{path.name} holds no state dict under 'model'")
    return SourceWeights(str(path.name), canonical(state))


def read_hugging_face(source: str) -> SourceWeights:
    """Read a BLIP from a Hugging Face folder or hub id, with its tokenizer if it has one.

    Raises: ConversionError for another architecture.
    """
    import transformers  # slow to import, and not needed to serve

    config = library_config(source)
    architecture = (config.architectures or [""])[0]
    if config.model_type != "blip" or architecture in ("", "BlipModel"):
        raise ConversionError(
            f"{source} is {config.model_type}/{architecture or 'unknown'}; known are BlipForQuestionAnswering, "
            "BlipForImageTextRetrieval and BlipForConditionalGeneration"
        )
    model = getattr(transformers, architecture).from_pretrained(source, dtype="auto")
    state = {_short(name): tensor for name, tensor in model.state_dict().items()}
    text = config.text_config
    ids = SpecialIds(
        pad=text.pad_token_id,
        cls=BERT_SPECIAL_IDS.cls,
        sep=text.sep_token_id,
        bos=text.bos_token_id,
        enc=text.vocab_size - 1,
    )
    try:
        tokenizer = load_tokenizer(source)
    except ConversionError:
        tokenizer = None
    return SourceWeights(
        source, canonical(state), config.vision_config.num_attention_heads, text.num_attention_heads, ids, tokenizer
    )


def _short(name: str) -> str:
    """The library's own wrapper around a text model is not part of anybody's names."""
    return name.removeprefix("model.")


def with_blip_tokens(tokenizer: Any) -> SpecialIds:
    """Put [DEC] and [ENC] into a BERT tokenizer as the authors do; returns the special ids."""
    if tokenizer.bos_token != DECODE_TOKEN:
        tokenizer.add_special_tokens({"bos_token": DECODE_TOKEN})
    if ENCODE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [ENCODE_TOKEN]})
    vocabulary = tokenizer.get_vocab()
    return SpecialIds(
        pad=tokenizer.pad_token_id,
        cls=tokenizer.cls_token_id,
        sep=tokenizer.sep_token_id,
        bos=vocabulary[DECODE_TOKEN],
        enc=vocabulary[ENCODE_TOKEN],
    )


def merge(sources: Iterable[SourceWeights]) -> SourceWeights:
    """Parts of several sources as one. Raises: ConversionError naming the first shared tensor that differs."""
    first, *others = sources
    tensors = dict(first.tensors)
    facts = first
    for other in others:
        for name, tensor in other.tensors.items():
            if name in tensors and not torch.equal(tensors[name], tensor):
                raise ConversionError(f"{first.origin} and {other.origin} differ in {name}: they are not one backbone")
        tensors |= other.tensors
        facts = SourceWeights(
            f"{facts.origin} + {other.origin}",
            tensors,
            facts.vision_heads or other.vision_heads,
            facts.text_heads or other.text_heads,
            facts.special_ids or other.special_ids,
            facts.tokenizer or other.tokenizer,
        )
    return facts


def assemble(
    source: SourceWeights,
    *,
    num_heads: int | None = None,
    special_ids: SpecialIds | None = None,
    tokenizer: Any | None = None,
) -> tuple[Blip, Any | None]:
    """The model of a source and its tokenizer.

    Sizes are read from shapes. Heads and special ids cannot be: they come from the arguments, the source's config or
    tokenizer, or (heads) from the 64 columns a head has in every published BLIP.
    Raises: ConversionError naming what is missing or does not fit.
    """
    tokenizer = tokenizer or source.tokenizer
    found = with_blip_tokens(tokenizer) if tokenizer is not None else source.special_ids
    tensors = source.tensors
    vision = _vision_config(tensors, num_heads or source.vision_heads)
    stacks = {}
    for part, prefix in (("text_encoder", "text_encoder"), ("decoder", "decoder.body")):
        if f"{prefix}.embeddings.word.weight" in tensors:
            stacks[part] = _text_config(tensors, prefix, num_heads or source.text_heads)
    config = BlipConfig(
        vision=vision,
        text_encoder=stacks.get("text_encoder"),
        decoder=stacks.get("decoder"),
        embed_dim=tensors["vision_proj.weight"].shape[0] if "vision_proj.weight" in tensors else None,
        special_ids=_special_ids(special_ids or found, stacks),
    )
    if tokenizer is not None:
        _check_vocabulary(tokenizer, stacks)
    with torch.device("meta"):
        model = Blip(config)
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise ConversionError(f"{source.origin} is no complete BLIP: {error}") from error
    return model.eval().requires_grad_(False), tokenizer


def _check_vocabulary(tokenizer: Any, stacks: Mapping[str, TextConfig]) -> None:
    """Every word of the tokenizer needs an embedding; embeddings without a word do no harm."""
    for part, stack in stacks.items():
        if len(tokenizer) > stack.vocab_size:
            raise ConversionError(
                f"the tokenizer has {len(tokenizer)} words, the {part} only {stack.vocab_size}", param="tokenizer"
            )


def _special_ids(ids: SpecialIds | None, stacks: Mapping[str, TextConfig]) -> SpecialIds:
    vocab_size = min((stack.vocab_size for stack in stacks.values()), default=BERT_VOCAB_SIZE)
    if ids is None and vocab_size == BERT_VOCAB_SIZE:
        ids = BERT_SPECIAL_IDS
    if ids is None:
        raise ConversionError(
            f"special token ids of a vocabulary of {vocab_size} words cannot be guessed: give --special-ids or --tokenizer",
            param="special_ids",
        )
    outside = [name for name, value in ids.model_dump().items() if value >= vocab_size]
    if outside:
        raise ConversionError(f"special ids {', '.join(outside)} are outside the vocabulary of {vocab_size} words")
    return ids


def _heads(width: int, given: int | None) -> int:
    if given is not None and width % given:
        raise ConversionError(f"{given} heads do not divide width {width}", param="num_heads")
    if given is None and width % 64:
        raise ConversionError(
            f"the number of heads cannot be read from width {width}: give --num-heads", param="num_heads"
        )
    return given or width // 64


def _vision_config(tensors: Mapping[str, Tensor], heads: int | None) -> VisionConfig:
    try:
        patch, positions = tensors["vision.patch_embed.weight"], tensors["vision.pos_embed"]
        mlp_width = tensors["vision.blocks.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise ConversionError(f"no vision tower: {error.args[0]} is missing") from error
    width, grid = patch.shape[0], round((positions.shape[1] - 1) ** 0.5)
    if grid * grid + 1 != positions.shape[1]:
        raise ConversionError(f"{positions.shape[1]} positions are no square grid plus CLS")
    layers = _count_layers(tensors, "vision.blocks")
    return VisionConfig(
        width=width, layers=layers, heads=_heads(width, heads), mlp_width=mlp_width, patch=patch.shape[-1], grid=grid
    )


def _text_config(tensors: Mapping[str, Tensor], prefix: str, heads: int | None) -> TextConfig:
    words = tensors[f"{prefix}.embeddings.word.weight"]
    try:
        positions = tensors[f"{prefix}.embeddings.position.weight"]
        memory_width = tensors[f"{prefix}.layers.0.crossattention.key.weight"].shape[1]
        mlp_width = tensors[f"{prefix}.layers.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise ConversionError(f"{prefix}: {error.args[0]} is missing") from error
    return TextConfig(
        width=words.shape[1],
        layers=_count_layers(tensors, f"{prefix}.layers"),
        heads=_heads(words.shape[1], heads),
        mlp_width=mlp_width,
        vocab_size=words.shape[0],
        max_positions=positions.shape[0],
        memory_width=memory_width,
    )


def _count_layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    found = {int(m.group(1)) for name in tensors if (m := re.match(re.escape(prefix) + r"\.(\d+)\.", name))}
    return max(found, default=-1) + 1


def check_same_backbone(state: Mapping[str, Tensor], backbone: BlipBackbone) -> None:
    """Compare a checkpoint's frozen towers with a backbone, value by value; heads may be tuned and are left out.

    Positions are compared after interpolation to the checkpoint's grid, which the trainers change.
    Raises: BackboneMismatch naming the first tensor that differs, or that one of them lacks.
    """
    ours = dict(backbone.model.state_dict())
    for name, tensor in canonical(state).items():
        if name.split(".")[0] in ("vision_proj", "text_proj", "itm_head"):
            continue
        if name not in ours:
            raise BackboneMismatch(f"the checkpoint has {name}, which the backbone lacks")
        mine = ours[name]
        if name == "vision.pos_embed" and mine.shape != tensor.shape:
            side = round((tensor.shape[1] - 1) ** 0.5)
            if not torch.allclose(interpolate_positions(mine, side, side), tensor, atol=1e-5):
                raise BackboneMismatch(f"the checkpoint was trained on another backbone: {name} differs")
        elif mine.shape != tensor.shape or not torch.equal(mine, tensor.to(mine.dtype)):
            raise BackboneMismatch(f"the checkpoint was trained on another backbone: {name} differs")
