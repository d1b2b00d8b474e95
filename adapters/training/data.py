"""What a training step eats: tensors and ids, decoded and tokenised by the caller."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RetrievalBatch:
    """B pairs of a clip (or picture: one frame) and a text.

    pixels [B, T, 3, R, R]; ids [B, L] starting with [CLS]; mask [B, L] bool; pair_ids [B]: equal ids match each other.
    With a queue of earlier features, an id must mean the same clip in every batch.
    """

    pixels: Tensor
    ids: Tensor
    mask: Tensor
    pair_ids: Tensor

    def to(self, device: torch.device) -> "RetrievalBatch":
        """The batch on a device."""
        return RetrievalBatch(**_moved(self, device))


@dataclass(frozen=True)
class AnswerBatch:
    """Q questions about B clips, with A answers.

    pixels [B, T, 3, R, R]; question_ids [Q, L] starting with [CLS], question_mask [Q, L] bool, clip_of_question [Q];
    answer_ids [A, K] starting with [DEC] and ending with [SEP], answer_mask [A, K] bool, question_of_answer [A],
    answer_weights [A].
    """

    pixels: Tensor
    question_ids: Tensor
    question_mask: Tensor
    clip_of_question: Tensor
    answer_ids: Tensor
    answer_mask: Tensor
    question_of_answer: Tensor
    answer_weights: Tensor

    def to(self, device: torch.device) -> "AnswerBatch":
        """The batch on a device."""
        return AnswerBatch(**_moved(self, device))


@dataclass(frozen=True)
class TextBatch:
    """B texts, each about what an encoder perceived.

    states [B, blocks, d], the encoder's first tokens, which no adapter has a part in; ids [B, L] with start and end token,
    the question's and the answer's token in between where there is a question; mask [B, L] bool.
    """

    states: Tensor
    ids: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> "TextBatch":
        """The batch on a device."""
        return TextBatch(**_moved(self, device))


def _moved(batch: RetrievalBatch | AnswerBatch | TextBatch, device: torch.device) -> dict[str, Any]:
    return {field.name: getattr(batch, field.name).to(device) for field in fields(batch)}
