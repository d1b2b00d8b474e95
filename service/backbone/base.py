"""The frozen model as the rest of the service sees it: parts, digests, sizes, tokenizer. Loaded once, never written.

`service.backbone.folder` reads and writes one; `blip_backbone` and `opt_backbone` say what each kind can do.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, JsonValue
from torch import Tensor

from adapters.config import Architecture, Strict, Task
from adapters.errors import ConversionError, DigestMismatch, MissingPart
from adapters.families.base import BackboneDims
from adapters.package import tensors_digest
from service.backbone.blip import Blip
from service.backbone.config import BlipConfig, OptConfig
from service.backbone.opt import Opt

TOKENIZER = "tokenizer"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Model = Blip | Opt


class BackboneManifest(Strict):
    """What `backbone.json` says. `resolution` is the native one of a backbone that looks at pictures itself."""

    format_version: int = 1
    config: Annotated[BlipConfig | OptConfig, Field(discriminator="architecture")]
    parts: dict[str, str]
    resolution: int | None = None
    max_text_tokens: int = 35
    provenance: dict[str, JsonValue] = Field(default_factory=dict)


@dataclass(frozen=True)
class TokenizedText:
    """One text as ids, and the words the vocabulary does not know."""

    ids: tuple[int, ...]
    unknown: tuple[str, ...]


class Backbone(ABC):
    """A frozen model with its identity.

    `parts` maps part names to digests. `model` has gradients off and is in eval mode; nothing writes to it.
    """

    def __init__(self, model: Model, manifest: BackboneManifest, tokenizer: Any | None) -> None:
        model.eval().requires_grad_(False)
        self.model: Model = model
        self.manifest = manifest
        self.tokenizer = tokenizer
        self._unknown_id: int | None = None
        if tokenizer is not None:
            self._unknown_id = tokenizer.unk_token_id
            tokenizer.backend_tokenizer.no_truncation()  # how long a text may be is the adapter's to say
            tokenizer.backend_tokenizer.no_padding()

    @property
    def architecture(self) -> Architecture:
        """Which kind it is."""
        return self.manifest.config.architecture

    @property
    def parts(self) -> Mapping[str, str]:
        """Digest of every part it has."""
        return self.manifest.parts

    @property
    def digest(self) -> str:
        """One digest over all parts, for people and logs; adapters name parts instead."""
        return json_digest(dict(self.parts))

    def part_sizes(self) -> dict[str, int]:
        """How many numbers the weights of each part are, packed or not."""
        return {part: sum(t.numel() for t in tensors.values()) for part, tensors in part_tensors(self.model).items()}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of the weights."""
        return self.model.dtype

    @abstractmethod
    def dims(self) -> BackboneDims:
        """The sizes an adapter must fit. Raises: MissingPart when it takes no adapters, with the reason."""

    @abstractmethod
    def head_tensors(self) -> dict[str, Tensor]:
        """The backbone's own heads, by tensor name."""

    @abstractmethod
    def require(self, task: Task, *, heads: Sequence[str] = ()) -> None:
        """Raises: MissingPart naming what this backbone lacks for a task (`heads` are brought by the adapter)."""

    @abstractmethod
    def tokenize(self, text: str) -> TokenizedText:
        """A text as the model reads it. Raises: MissingPart without a tokenizer."""

    @abstractmethod
    def tokenize_answers(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Candidate answers as the model writes them, start and end included. Raises: MissingPart without a tokenizer."""

    @abstractmethod
    def special_tokens(self) -> frozenset[int]:
        """Ids that are no words."""

    def words_of(self, text: str, *, add_special_tokens: bool = True) -> TokenizedText:
        """What the tokenizer makes of a text, and the words it does not know. Raises: MissingPart without one.

        This runs on the event loop, so the library's tokenizer is asked without its Python around it, which takes most of the time.
        """
        encoded = self.require_tokenizer().backend_tokenizer.encode(text, add_special_tokens=add_special_tokens)
        ids = tuple(encoded.ids)
        if self._unknown_id not in ids or self._unknown_id in self.special_tokens():
            return TokenizedText(ids, ())
        pieces = zip(ids, encoded.offsets, strict=True)
        unknown = [text[start:end] for token, (start, end) in pieces if token == self._unknown_id]
        return TokenizedText(ids, tuple(dict.fromkeys(unknown)))

    def require_tokenizer(self) -> Any:
        """The tokenizer. Raises: MissingPart without one."""
        if self.tokenizer is None:
            raise MissingPart("this backbone was imported without a tokenizer and takes token ids only")
        return self.tokenizer

    def detokenize(self, ids: Sequence[int]) -> str:
        """The words of generated ids, special tokens left out; the ids themselves without a tokenizer."""
        special = self.special_tokens()
        words = [token for token in ids if token not in special]
        if self.tokenizer is None:
            return " ".join(map(str, words))
        return str(self.tokenizer.decode(words, skip_special_tokens=True)).strip()

    def pack(self) -> None:
        """Lay the weights out for serving, in the place of how they were. They keep their values; see `adapters.products`."""
        self.model.pack()

    def verify(self) -> None:
        """Recompute every part's digest from the weights in memory (float32 models only).

        Raises: DigestMismatch naming the part that was written to.
        """
        for part, tensors in part_tensors(self.model).items():
            if part_digest(self.manifest.config, part, tensors) != self.parts[part]:
                raise DigestMismatch(f"backbone part {part!r} no longer has the digest it was loaded with")


def part_tensors(model: Model) -> dict[str, dict[str, Tensor]]:
    """The model's tensors by part, names relative to the part."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    return parts


def part_digest(config: BlipConfig | OptConfig, part: str, tensors: Mapping[str, Tensor]) -> str:
    """Digest of one part: its architecture and its stored tensors."""
    own = getattr(config, part, None)
    if own is not None:
        architecture = own.model_dump(mode="json")
    else:
        assert isinstance(config, BlipConfig), "only a BLIP has heads. This is a bug."
        architecture = {"embed_dim": config.embed_dim}
    return json_digest({"part": part, "architecture": architecture, "tensors": tensors_digest(tensors)})


def tokenizer_digest(tokenizer: Any | None, config: BlipConfig | OptConfig) -> str:
    """Digest of the vocabulary, how words are put together, the casing and the special ids."""
    facts: dict[str, JsonValue] = {"special_ids": config.special_ids.model_dump(mode="json")}
    if tokenizer is not None:
        facts["vocabulary"] = dict(sorted(tokenizer.get_vocab().items()))
        facts["lower_case"] = bool(getattr(tokenizer, "do_lower_case", False))
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges")
        if merges:
            facts["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    return json_digest(facts)


def json_digest(document: Mapping[str, JsonValue]) -> str:
    """The digest of a JSON document."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


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
