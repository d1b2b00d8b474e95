"""The frozen model as the rest of the service sees it: parts, digests, sizes, tokenizer. Loaded once, never written.

A backbone folder holds `backbone.json`, one `<part>.safetensors` per part and, if there is one, `tokenizer/`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, JsonValue, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.config import Strict, Task, describe
from adapters.errors import BackboneNotFound, ConversionError, DigestMismatch, MissingPart
from adapters.families.base import HEADS, BackboneDims, Stack
from adapters.package import tensors_digest
from service.backbone.blip import Blip
from service.backbone.config import BlipConfig

TOKENIZER = "tokenizer"
TOWERS = ("vision", "text_encoder", "decoder")
PARTS = (*TOWERS, *HEADS)
TASK_PARTS: dict[str, tuple[str, ...]] = {
    "retrieval": ("vision", "text_encoder", TOKENIZER),
    "vqa": ("vision", "text_encoder", "decoder", TOKENIZER),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class BackboneManifest(Strict):
    """What `backbone.json` says."""

    format_version: int = 1
    config: BlipConfig
    parts: dict[str, str]
    resolution: int
    max_text_tokens: int = 35
    provenance: dict[str, JsonValue] = Field(default_factory=dict)


@dataclass(frozen=True)
class TokenizedText:
    """One text as ids, and the words the vocabulary does not know."""

    ids: tuple[int, ...]
    unknown: tuple[str, ...]


class Backbone:
    """A frozen model with its identity.

    `parts` maps part names to digests. `model` has gradients off and is in eval mode; nothing writes to it.
    """

    def __init__(self, model: Blip, manifest: BackboneManifest, tokenizer: Any | None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.manifest = manifest
        self.tokenizer = tokenizer

    @property
    def config(self) -> BlipConfig:
        """The architecture."""
        return self.manifest.config

    @property
    def parts(self) -> Mapping[str, str]:
        """Digest of every part it has."""
        return self.manifest.parts

    @property
    def digest(self) -> str:
        """One digest over all parts, for people and logs; adapters name parts instead."""
        return _json_digest(dict(self.parts))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of the weights."""
        return self.model.dtype

    def dims(self) -> BackboneDims:
        """The sizes an adapter must fit.

        Raises: MissingPart when the towers differ in size, so that no adapter can be shared by them.
        """
        if self.config.uneven_towers is not None:
            raise MissingPart(f"this backbone serves __base__ only: {self.config.uneven_towers}")
        stacks: list[Stack] = []
        if self.config.text_encoder is not None:
            stacks.append("text")
        if self.config.decoder is not None:
            stacks.append("decoder")
        vision = self.config.vision
        return BackboneDims(vision.width, vision.layers, self.config.embed_dim or 1, tuple(stacks))

    def head_tensors(self) -> dict[str, Tensor]:
        """The backbone's own heads, by tensor name."""
        tensors: dict[str, Tensor] = {}
        for head in HEADS:
            if head in self.parts:
                linear = self.model.head(head)
                tensors |= {f"{head}.weight": linear.weight.detach(), f"{head}.bias": linear.bias.detach()}
        return tensors

    def require(self, task: Task, *, heads: Sequence[str] = ()) -> None:
        """Raises: MissingPart naming what this backbone lacks for a task (`heads` are brought by the adapter)."""
        needed = list(TASK_PARTS[task])
        if task == "retrieval":
            needed += [head for head in HEADS if head not in heads]
        lacking = [part for part in needed if part not in self.parts]
        if lacking:
            raise MissingPart(f"this backbone has no {', '.join(lacking)}, which {task} needs")

    def tokenize(self, text: str) -> TokenizedText:
        """[CLS] words [SEP] of a text. Raises: MissingPart without a tokenizer."""
        if self.tokenizer is None:
            raise MissingPart("this backbone was imported without a tokenizer and takes token ids only")
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        unknown_id = self.tokenizer.unk_token_id
        unknown = [
            text[start:end]
            for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            if token == unknown_id
        ]
        return TokenizedText(tuple(encoded["input_ids"]), tuple(dict.fromkeys(unknown)))

    def tokenize_answers(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """[DEC] words [SEP] of each candidate answer. Raises: MissingPart without a tokenizer."""
        if self.tokenizer is None:
            raise MissingPart("this backbone was imported without a tokenizer and takes token ids only")
        encoded = self.tokenizer(list(texts))["input_ids"]
        return [(self.config.special_ids.bos, *ids[1:]) for ids in encoded]

    def detokenize(self, ids: Sequence[int]) -> str:
        """The words of generated ids, special tokens left out; the ids themselves without a tokenizer."""
        special = set(self.config.special_ids.model_dump().values())
        words = [token for token in ids if token not in special]
        if self.tokenizer is None:
            return " ".join(map(str, words))
        return str(self.tokenizer.decode(words, skip_special_tokens=True)).strip()

    def verify(self) -> None:
        """Recompute every part's digest from the weights in memory (float32 models only).

        Raises: DigestMismatch naming the part that was written to.
        """
        for part, tensors in part_tensors(self.model).items():
            if part_digest(self.config, part, tensors) != self.parts[part]:
                raise DigestMismatch(f"backbone part {part!r} no longer has the digest it was loaded with")


def part_tensors(model: Blip) -> dict[str, dict[str, Tensor]]:
    """The model's tensors by part, names relative to the part."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    return parts


def part_digest(config: BlipConfig, part: str, tensors: Mapping[str, Tensor]) -> str:
    """Digest of one part: its architecture and its stored tensors."""
    architecture = getattr(config, part).model_dump(mode="json") if part in TOWERS else {"embed_dim": config.embed_dim}
    return _json_digest({"part": part, "architecture": architecture, "tensors": tensors_digest(tensors)})


def tokenizer_digest(tokenizer: Any | None, config: BlipConfig) -> str:
    """Digest of the vocabulary, the casing and the special ids."""
    facts: dict[str, JsonValue] = {"special_ids": config.special_ids.model_dump(mode="json")}
    if tokenizer is not None:
        facts["vocabulary"] = dict(sorted(tokenizer.get_vocab().items()))
        facts["lower_case"] = bool(getattr(tokenizer, "do_lower_case", False))
    return _json_digest(facts)


def _json_digest(document: Mapping[str, JsonValue]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def write_backbone(
    folder: Path,
    model: Blip,
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
    resolution = config.vision.grid * config.vision.patch
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

    Stored values are checked against their digests before they are cast to `dtype`.
    Raises: BackboneNotFound, ConversionError for a broken folder, DigestMismatch naming the changed part.
    """
    manifest = load_manifest(folder)
    state: dict[str, Tensor] = {}
    for part in (name for name in manifest.parts if name != TOKENIZER):
        tensors = _read_part(folder / f"{part}.safetensors")
        if verify and part_digest(manifest.config, part, tensors) != manifest.parts[part]:
            raise DigestMismatch(f"{folder}: part {part!r} does not have the digest that backbone.json names")
        state |= {f"{part}.{name}": tensor for name, tensor in tensors.items()}
    with torch.device("meta"):
        model = Blip(manifest.config)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ConversionError(f"{folder}: {error}") from error
    model = model.to(device=torch.device(device), dtype=DTYPES[dtype])
    tokenizer = load_tokenizer(folder / TOKENIZER) if (folder / TOKENIZER).is_dir() else None
    if verify and tokenizer_digest(tokenizer, manifest.config) != manifest.parts[TOKENIZER]:
        raise DigestMismatch(f"{folder}: the tokenizer does not have the digest that backbone.json names")
    return Backbone(model, manifest, tokenizer)


def load_tokenizer(source: Path | str) -> Any:
    """A tokenizer from a folder or a hub id. Raises: ConversionError."""
    from transformers import AutoTokenizer  # slow to import, and not needed without a tokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        raise ConversionError(f"no tokenizer at {source}: {error}", param="tokenizer") from error
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):  # the library makes one up for a bare model
        raise ConversionError(f"no tokenizer at {source}: it has no vocabulary", param="tokenizer")
    return tokenizer


def _read_part(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"cannot read {path.name}: {error}") from error
