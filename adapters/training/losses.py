"""The losses of the released trainers, as functions of logits and features. Source: the authors' BLIP fork."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

LABEL_SMOOTHING = 0.1


def word_nll(logits: Tensor, words: Tensor, smoothing: float = LABEL_SMOOTHING) -> Tensor:
    """Label-smoothed negative log-likelihood [..., N] of words [..., N], each as the one that follows: logits [..., V].

    For word y with log-probabilities l: (1 - s) * -l_y + s * mean(-l).
    """
    log_probs = logits.float().log_softmax(-1)
    target = -log_probs.gather(-1, words)
    uniform = -log_probs.mean(-1, keepdim=True)
    return (1.0 - smoothing) * target + smoothing * uniform


def smoothed_nll(logits: Tensor, targets: Tensor, mask: Tensor, smoothing: float = LABEL_SMOOTHING) -> Tensor:
    """`word_nll` summed over each row's targets [B, L]: [B] from logits [B, L, V].

    Positions where mask [B, L] is False give 0.
    """
    return (word_nll(logits, targets.unsqueeze(-1), smoothing).squeeze(-1) * mask).sum(-1)


def shifted_nll(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """`smoothed_nll` [B] of every token given those before it: logits [B, L, V] and ids [B, L] of the same text."""
    return smoothed_nll(logits[:, :-1], ids[:, 1:], mask[:, 1:])


def answer_loss(per_answer: Tensor, weights: Tensor, num_pictures: int) -> Tensor:
    """sum(weights * per_answer) / pictures, a scalar; a clip of T frames counts as T pictures, as the authors do."""
    return (weights * per_answer).sum() / num_pictures


class ContrastiveFeatures(NamedTuple):
    """Unit features of one batch: texts [B, E], clips [B, E]."""

    clips: Tensor
    texts: Tensor


def contrastive_loss(
    online: ContrastiveFeatures,
    momentum: ContrastiveFeatures,
    pair_ids: Tensor,
    queue: ContrastiveFeatures | None,
    queue_ids: Tensor | None,
    *,
    temperature: float,
    alpha: float,
) -> Tensor:
    """Image-text contrastive loss with soft targets, a scalar.

    For each row i of one side, against the momentum features m of the other (the batch's, then the queue's):

        target_ij = alpha * softmax_j(momentum_i . m_j / temperature) + (1 - alpha) * [i matches j] / matches of i
        loss      = -mean_i sum_j target_ij * log softmax_j(online_i . m_j / temperature)

    averaged over both sides. Rows match where pair ids are equal. Products are float32 under autocast too: divided by a
    temperature of 0.07, bfloat16's rounding would move a logit by 0.05. Source: the authors' `blip_retrieval.py`.
    """
    momentum = ContrastiveFeatures(momentum.clips.float(), momentum.texts.float())
    clips_m, texts_m, ids = momentum.clips, momentum.texts, pair_ids
    if queue is not None and queue_ids is not None:
        clips_m = torch.cat([clips_m, queue.clips])
        texts_m = torch.cat([texts_m, queue.texts])
        ids = torch.cat([pair_ids, queue_ids])
    same = (pair_ids[:, None] == ids[None, :]).float()
    hard = same / same.sum(1, keepdim=True)
    sides = ((online.clips, momentum.clips, texts_m), (online.texts, momentum.texts, clips_m))
    total = hard.new_zeros(())
    with torch.autocast(hard.device.type, enabled=False):
        for features, features_m, others in sides:
            with torch.no_grad():
                soft = (features_m @ others.t() / temperature).softmax(1)
                targets = alpha * soft + (1.0 - alpha) * hard
            log_probs = functional.log_softmax(features.float() @ others.t() / temperature, dim=1)
            total = total - (targets * log_probs).sum(1).mean()
    return total / 2


def hard_negatives(
    similarity: Tensor, pair_ids: Tensor, temperature: float, generator: torch.Generator | None
) -> Tensor:
    """For each row of similarity [B, B] the index [B] of a non-matching column, drawn by softmax(similarity / temperature).

    The softmax is taken over the non-matching columns alone, of which every row must have one: the same distribution as
    taking it over all and striking the matches out, but it cannot underflow where a match outweighs everything else.
    """
    logits = similarity.float() / temperature
    weights = logits.masked_fill(pair_ids[:, None] == pair_ids[None, :], float("-inf")).softmax(1)
    return torch.multinomial(weights, 1, generator=generator).squeeze(1)


def matching_loss(logits: Tensor, matches: Tensor) -> Tensor:
    """Cross-entropy of matching logits [N, 2] against matches [N] (1: the pair belongs together)."""
    return functional.cross_entropy(logits.float(), matches)
