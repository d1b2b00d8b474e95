"""Training batches of the drawn worlds: pixels as the service would preprocess them, ids as it would tokenise them.

A batch depends on (world, seed, step) alone, so any run can be resumed or repeated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.config import CLIP_MEAN, CLIP_STD
from adapters.training.data import AnswerBatch, RetrievalBatch
from service.demo.wording import DESCRIBE
from service.demo.world import Item, sample


@dataclass(frozen=True)
class Texts:
    """The demo's tokenizer with the special ids of its backbone."""

    tokenizer: Any
    bos: int

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids [B, L] and mask [B, L] (bool), padded to the longest: [CLS] words [SEP]."""
        encoded = self.tokenizer(list(texts), padding="longest", return_tensors="pt")
        return encoded["input_ids"], encoded["attention_mask"].bool()

    def encode_answers(self, answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The same with [DEC] in the first place: [DEC] words [SEP]."""
        ids, mask = self.encode(answers)
        ids[:, 0] = self.bos
        return ids, mask


def pixels_of(media: Sequence[np.ndarray]) -> Tensor:
    """Normalised pixels [B, T, 3, H, W] of pictures [H, W, 3] or clips [T, H, W, 3], all of one kind."""
    stacked = np.stack([m if m.ndim == 4 else m[None] for m in media])  # [B, T, H, W, 3]
    scaled = torch.from_numpy(stacked).permute(0, 1, 4, 2, 3).float() / 255.0
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    return (scaled - mean) / std


def draw_items(world: str, seed: int, step: int, size: int, max_objects: int | None = None) -> list[Item]:
    """The `size` training items of a step."""
    first = step * size
    return [sample(world, "train", seed, first + i, max_objects) for i in range(size)]


def retrieval_batch(items: Sequence[Item], texts: Texts) -> RetrievalBatch:
    """Pairs of media and caption; items of the same content count as matching each other."""
    ids, mask = texts.encode([item.caption or "" for item in items])
    keys = {key: number for number, key in enumerate(dict.fromkeys(item.key for item in items))}
    return RetrievalBatch(pixels_of([i.media for i in items]), ids, mask, torch.tensor([keys[i.key] for i in items]))


def answer_batch(items: Sequence[Item], texts: Texts, num_questions: int, rng: Random) -> AnswerBatch:
    """Up to `num_questions` questions of every item, one answer each; weighted so that the loss is a mean over answers."""
    asked, clips = [], []
    for clip, item in enumerate(items):
        chosen = rng.sample(item.questions, min(num_questions, len(item.questions)))
        asked += [(qa.question, qa.answer) for qa in chosen]
        clips += [clip] * len(chosen)
    return _questions(items, asked, clips, texts)


def description_batch(items: Sequence[Item], texts: Texts) -> AnswerBatch:
    """Every item asked what is in it, answered by its caption; weighted so that the loss is a mean over captions' words."""
    batch = _questions(items, [(DESCRIBE, item.caption or "") for item in items], list(range(len(items))), texts)
    num_words = batch.answer_mask[:, 1:].sum().float() / len(items)
    return replace(batch, answer_weights=batch.answer_weights / num_words)


def _questions(
    items: Sequence[Item], asked: Sequence[tuple[str, str]], clips: Sequence[int], texts: Texts
) -> AnswerBatch:
    """Questions with one answer each, about items by number."""
    question_ids, question_mask = texts.encode([question for question, _ in asked])
    answer_ids, answer_mask = texts.encode_answers([answer for _, answer in asked])
    pixels = pixels_of([item.media for item in items])
    num_pictures = pixels.shape[0] * pixels.shape[1]  # what the loss divides by
    return AnswerBatch(
        pixels,
        question_ids,
        question_mask,
        torch.tensor(clips),
        answer_ids,
        answer_mask,
        torch.arange(len(asked)),
        torch.full((len(asked),), num_pictures / len(asked)),
    )
