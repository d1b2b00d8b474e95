"""The narrow backbone that training is given. Any object of this shape will do; nothing here loads weights."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from adapters.families.base import Adaptation


class TrainingLanguageModel(Protocol):
    """What training an eP-ALM adapter calls: B rows, L tokens, V words."""

    def score(
        self, ids: Tensor, mask: Tensor, features: Sequence[Tensor | None], adaptation: Adaptation | None
    ) -> Tensor:
        """Teacher-forced logits [B, L, V] of texts ids [B, L], mask [B, L] bool, with encoder states [blocks, d] each."""


class TrainingBackbone(Protocol):
    """What the objectives call. Shapes as in the serving backbone: B rows, P tokens of a picture, L text, D width."""

    def encode_vision(self, pixels: Tensor, adaptation: Adaptation | None) -> Tensor:
        """[B, 3, R, R] -> [B, P, D]."""

    def encode_text(self, ids: Tensor, mask: Tensor, adaptation: Adaptation | None) -> Tensor:
        """ids [B, L], mask [B, L] bool -> [B, L, D]."""

    def encode_multimodal(
        self,
        ids: Tensor,
        mask: Tensor,
        y: Tensor,
        y_mask: Tensor,
        adaptation: Adaptation | None,
        factors: Tensor | None,
    ) -> Tensor:
        """Text that looks at y [B, M, D] -> [B, L, D]; puts [ENC] in the first position itself."""

    def score_answers(
        self,
        states: Tensor,
        states_mask: Tensor,
        ids: Tensor,
        mask: Tensor,
        question_of_answer: Tensor,
        adaptation: Adaptation | None,
    ) -> Tensor:
        """Teacher-forced logits [A, L, V] of answers that read question states [Q, K, D]."""

    def project(self, head: str, x: Tensor, adaptation: Adaptation | None) -> Tensor:
        """[B, D] -> [B, size of the head]."""
