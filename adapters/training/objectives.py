"""One training step's loss for each task, over a backbone that takes an adaptation.

Pooling and call sites are those of the forward pass the adapter will be served with, so what is trained is what runs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from adapters.families.base import Adaptation
from adapters.families.uniadapter import frame_factors
from adapters.training.data import AnswerBatch, RetrievalBatch, TextBatch
from adapters.training.losses import (
    ContrastiveFeatures,
    answer_loss,
    contrastive_loss,
    hard_negatives,
    matching_loss,
    shifted_nll,
)
from adapters.training.protocols import TrainingBackbone, TrainingLanguageModel

TEXT_LOSS_WEIGHT = 0.1  # the trainers' `lm_loss_weight`
IGNORED = -100  # cross-entropy leaves such targets out


@dataclass(frozen=True)
class RetrievalSettings:
    """Constants of the retrieval objective. `temperature` stays fixed, as the released trainers leave it."""

    temperature: float = 0.07
    alpha: float = 0.4
    frame_aware: bool = False


@dataclass(frozen=True)
class EncodedPairs:
    """Features of a batch: states [B, T, P, D], frames [B, T, E] (unit), clips and texts [B, E] (unit)."""

    states: Tensor
    frames: Tensor
    clips: Tensor
    texts: Tensor


def encode_frames(backbone: TrainingBackbone, pixels: Tensor, adaptation: Adaptation | None) -> Tensor:
    """States [B, T, P, D] of pixels [B, T, 3, R, R]; every frame adapts like its clip."""
    clips, frames = pixels.shape[:2]
    rows = torch.arange(clips, device=pixels.device).repeat_interleave(frames)
    expanded = None if adaptation is None else adaptation.expand(rows)
    states = backbone.encode_vision(pixels.flatten(0, 1), expanded)
    return states.view(clips, frames, *states.shape[1:])


def unit(x: Tensor) -> Tensor:
    """Rows of unit length, float32 even where autocast left x narrower."""
    return functional.normalize(x.float(), dim=-1)


def encode_pairs(backbone: TrainingBackbone, batch: RetrievalBatch, adaptation: Adaptation | None) -> EncodedPairs:
    """Encode both sides of a batch. A clip's feature is the unit projection of its frames' mean CLS."""
    states = encode_frames(backbone, batch.pixels, adaptation)
    cls = states[:, :, 0]  # [B, T, D]
    with torch.no_grad():
        frames = unit(backbone.project("vision_proj", cls.flatten(0, 1), adaptation))
    clips = unit(backbone.project("vision_proj", cls.mean(1), adaptation))
    hidden = backbone.encode_text(batch.ids, batch.mask, adaptation)
    texts = unit(backbone.project("text_proj", hidden[:, 0], adaptation))
    return EncodedPairs(states, frames.unflatten(0, states.shape[:2]), clips, texts)


def retrieval_loss(
    backbone: TrainingBackbone,
    batch: RetrievalBatch,
    adaptation: Adaptation | None,
    momentum: EncodedPairs,
    settings: RetrievalSettings,
    *,
    alpha: float,
    queue: ContrastiveFeatures | None = None,
    queue_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Losses `itc` and `itm` of a batch; `momentum` holds the momentum model's features of the same batch."""
    online = encode_pairs(backbone, batch, adaptation)
    itc = contrastive_loss(
        ContrastiveFeatures(online.clips, online.texts),
        ContrastiveFeatures(momentum.clips, momentum.texts),
        batch.pair_ids,
        queue,
        queue_ids,
        temperature=settings.temperature,
        alpha=alpha,
    )
    itm = matching_loss_of(backbone, batch, adaptation, online, settings, generator)
    return {"itc": itc, "itm": itm}


def matching_loss_of(
    backbone: TrainingBackbone,
    batch: RetrievalBatch,
    adaptation: Adaptation | None,
    online: EncodedPairs,
    settings: RetrievalSettings,
    generator: torch.Generator | None,
) -> Tensor:
    """Matching loss, a scalar, of the pairs, each text with a hard negative clip, each clip with a hard negative text.

    A batch whose pairs all match each other has no negatives: its loss is that of the pairs alone.
    """
    size = len(batch.pair_ids)
    texts = clips = own = torch.arange(size, device=batch.ids.device)
    if bool((batch.pair_ids != batch.pair_ids[0]).any()):
        similarity = (online.texts @ online.clips.t()).detach()  # [text, clip]
        wrong_clips = hard_negatives(similarity, batch.pair_ids, settings.temperature, generator)
        wrong_texts = hard_negatives(similarity.t(), batch.pair_ids, settings.temperature, generator)
        texts, clips = torch.cat([own, own, wrong_texts]), torch.cat([own, wrong_clips, own])
    logits = match_logits(backbone, batch.ids, batch.mask, online, texts, clips, adaptation, settings.frame_aware)
    matches = torch.zeros(len(texts), dtype=torch.long, device=batch.ids.device)
    matches[:size] = 1
    return matching_loss(logits, matches)


def match_logits(
    backbone: TrainingBackbone,
    ids: Tensor,
    mask: Tensor,
    encoded: EncodedPairs,
    texts: Tensor,
    clips: Tensor,
    adaptation: Adaptation | None,
    frame_aware: bool,
) -> Tensor:
    """Matching logits [N, 2] of the pairs (texts[n], clips[n]); one adapter for the whole batch."""
    y = encoded.states.flatten(1, 2)[clips]  # [N, T*P, D]
    seen = torch.ones(y.shape[:2], dtype=torch.bool, device=y.device)
    factors = None
    if frame_aware:
        similarity = (encoded.frames[clips] @ encoded.texts[texts].unsqueeze(-1)).squeeze(-1).detach()  # [N, T]
        factors = frame_factors(similarity, encoded.states.shape[2])
    rows = None if adaptation is None else adaptation.expand(texts)
    hidden = backbone.encode_multimodal(ids[texts], mask[texts], y, seen, rows, factors)
    return backbone.project("itm_head", hidden[:, 0], rows)


def question_states(backbone: TrainingBackbone, batch: AnswerBatch, adaptation: Adaptation | None) -> Tensor:
    """States [Q, L, D] of the questions, each looking at every frame of its clip; no frame weights, as the authors."""
    y = encode_frames(backbone, batch.pixels, adaptation).flatten(1, 2)[batch.clip_of_question]
    seen = torch.ones(y.shape[:2], dtype=torch.bool, device=y.device)
    return backbone.encode_multimodal(batch.question_ids, batch.question_mask, y, seen, adaptation, None)


def vqa_loss(backbone: TrainingBackbone, batch: AnswerBatch, adaptation: Adaptation | None) -> Tensor:
    """Weighted, label-smoothed loss of the answers, a scalar. One adapter for the whole batch."""
    states = question_states(backbone, batch, adaptation)
    logits = backbone.score_answers(
        states, batch.question_mask, batch.answer_ids, batch.answer_mask, batch.question_of_answer, adaptation
    )
    per_answer = shifted_nll(logits, batch.answer_ids, batch.answer_mask)
    return answer_loss(per_answer, batch.answer_weights, batch.pixels.shape[0] * batch.pixels.shape[1])


def text_losses(model: TrainingLanguageModel, batch: TextBatch, adaptation: Adaptation | None) -> Tensor:
    """The summed negative log-likelihood [B] of each text's tokens, all but the first: the question's too.

    Source: eP-ALM's `models/epalm.py`, `reduction="none"`.
    """
    logits = model.score(batch.ids, batch.mask, list(batch.states), adaptation)[:, :-1].float()
    targets = batch.ids[:, 1:].masked_fill(~batch.mask[:, 1:], IGNORED)
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(targets).sum(dim=1)


def text_loss(model: TrainingLanguageModel, batch: TextBatch, adaptation: Adaptation | None) -> Tensor:
    """What the trainers minimise, a scalar: a tenth of the mean of `text_losses`."""
    return TEXT_LOSS_WEIGHT * text_losses(model, batch, adaptation).mean()
