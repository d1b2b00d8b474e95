"""A frozen BLIP as the service uses it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adapters.config import Task
from adapters.errors import MissingPart
from adapters.families.base import HEADS, BlipDims, Stack
from service.backbone.base import TOKENIZER, Backbone, BackboneManifest, TokenizedText
from service.backbone.blip import Blip
from service.backbone.config import BlipConfig

TASK_PARTS: dict[Task, tuple[str, ...]] = {
    "retrieval": ("vision", "text_encoder", TOKENIZER),
    "vqa": ("vision", "text_encoder", "decoder", TOKENIZER),
}


class BlipBackbone(Backbone):
    """Retrieves, and answers questions."""

    model: Blip

    def __init__(self, model: Blip, manifest: BackboneManifest, tokenizer: Any | None) -> None:
        super().__init__(model, manifest, tokenizer)
        self.config: BlipConfig = model.config

    @property
    def resolution(self) -> int:
        """The native one of its vision tower."""
        return self.config.vision.grid * self.config.vision.patch

    def dims(self) -> BlipDims:
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
        return BlipDims(vision.width, vision.layers, self.config.embed_dim or 1, tuple(stacks))

    def head_tensors(self) -> dict[str, Tensor]:
        """The backbone's own heads, by tensor name."""
        tensors: dict[str, Tensor] = {}
        for head in HEADS:
            if head in self.parts:
                linear = self.model.head(head)
                tensors |= {f"{head}.weight": linear.weight.detach(), f"{head}.bias": linear.bias.detach()}
        return tensors

    def require(self, task: Task, *, heads: Sequence[str] = ()) -> None:
        """See Backbone."""
        if task not in TASK_PARTS:
            raise MissingPart(f"a BLIP is not served for {task}")
        needed = list(TASK_PARTS[task])
        if task == "retrieval":
            needed += [head for head in HEADS if head not in heads]
        lacking = [part for part in needed if part not in self.parts]
        if lacking:
            raise MissingPart(f"this backbone has no {', '.join(lacking)}, which {task} needs")

    def tokenize(self, text: str) -> TokenizedText:
        """[CLS] words [SEP] of a text. Raises: MissingPart without a tokenizer."""
        return self.words_of(text)

    def tokenize_answers(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """[DEC] words [SEP] of each candidate answer. Raises: MissingPart without a tokenizer."""
        encoded = self.require_tokenizer()(list(texts))["input_ids"]
        return [(self.config.special_ids.bos, *ids[1:]) for ids in encoded]

    def special_tokens(self) -> frozenset[int]:
        """See Backbone."""
        return frozenset(self.config.special_ids.model_dump().values())
