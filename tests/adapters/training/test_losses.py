"""Losses against plain loops in float64, written from the formulas."""

import math

import pytest
import torch
from torch import Tensor

from adapters.training.losses import (
    ContrastiveFeatures,
    answer_loss,
    contrastive_loss,
    hard_negatives,
    matching_loss,
    shifted_nll,
    smoothed_nll,
    word_nll,
)


def unit(*shape: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def plain_smoothed_nll(logits: Tensor, targets: Tensor, mask: Tensor, smoothing: float) -> list[float]:
    sums = []
    for row in range(len(logits)):
        total = 0.0
        for position in range(logits.shape[1]):
            if mask[row, position]:
                scores = [float(v) for v in logits[row, position].double()]
                log_sum = math.log(sum(math.exp(s) for s in scores))
                log_probs = [s - log_sum for s in scores]
                target = -log_probs[int(targets[row, position])]
                total += (1 - smoothing) * target + smoothing * -sum(log_probs) / len(log_probs)
        sums.append(total)
    return sums


def test_smoothed_nll_is_the_formula_and_ignores_masked_positions() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(3, 4, 7, generator=generator)
    targets = torch.randint(7, (3, 4), generator=generator)
    mask = torch.tensor([[True] * 4, [True, True, False, False], [True, False, True, False]])
    for smoothing in (0.0, 0.1):
        expected = torch.tensor(plain_smoothed_nll(logits, targets, mask, smoothing))
        torch.testing.assert_close(smoothed_nll(logits, targets, mask, smoothing), expected, rtol=1e-5, atol=1e-5)
    changed = logits.masked_fill(~mask.unsqueeze(-1), 99.0)
    assert torch.equal(smoothed_nll(changed, targets, mask), smoothed_nll(logits, targets, mask))


def test_many_words_at_one_position() -> None:
    generator = torch.Generator().manual_seed(3)
    logits, words = 3 * torch.randn(2, 7, generator=generator), torch.tensor([[1, 5, 1], [0, 6, 3]])
    one_by_one = logits[:, None].expand(-1, 3, -1)
    for row, losses in enumerate(word_nll(logits, words)):
        expected = [
            plain_smoothed_nll(one_by_one[row : row + 1, :1], words[row : row + 1, n : n + 1], torch.ones(1, 1), 0.1)[0]
            for n in range(3)
        ]
        torch.testing.assert_close(losses, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_every_token_but_the_first_is_a_target_of_the_one_before_it() -> None:
    logits = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([[1, 5, 6, 2], [1, 4, 2, 0]])
    mask = ids > 0
    expected = torch.tensor(plain_smoothed_nll(logits[:, :3], ids[:, 1:], mask[:, 1:], 0.1))
    torch.testing.assert_close(shifted_nll(logits, ids, mask), expected, rtol=1e-5, atol=1e-5)


def test_answers_are_weighted_and_divided_by_pictures() -> None:
    loss = answer_loss(torch.tensor([2.0, 3.0, 5.0]), torch.tensor([1.0, 0.25, 0.75]), 4)
    assert loss.item() == pytest.approx((2.0 + 0.75 + 3.75) / 4)


def plain_contrastive(
    online: ContrastiveFeatures,
    momentum: ContrastiveFeatures,
    pair_ids: list[int],
    queue: ContrastiveFeatures,
    queue_ids: list[int],
    temperature: float,
    alpha: float,
) -> float:
    """One row, one column at a time."""
    ids = pair_ids + queue_ids
    total = 0.0
    for rows, rows_m, columns in (
        (online.clips, momentum.clips, torch.cat([momentum.texts, queue.texts])),
        (online.texts, momentum.texts, torch.cat([momentum.clips, queue.clips])),
    ):
        for i in range(len(pair_ids)):
            logits = [float(rows[i].double() @ c.double()) / temperature for c in columns]
            soft = [math.exp(float(rows_m[i].double() @ c.double()) / temperature) for c in columns]
            matches = [id_ == pair_ids[i] for id_ in ids]
            log_sum = math.log(sum(math.exp(v) for v in logits))
            for j in range(len(ids)):
                target = alpha * soft[j] / sum(soft) + (1 - alpha) * matches[j] / sum(matches)
                total -= target * (logits[j] - log_sum) / len(pair_ids)
    return total / 2


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("queued", [0, 5])
def test_contrastive_loss_with_soft_targets_queue_and_equal_ids(alpha: float, queued: int) -> None:
    online = ContrastiveFeatures(unit(4, 6, seed=1), unit(4, 6, seed=2))
    momentum = ContrastiveFeatures(unit(4, 6, seed=3), unit(4, 6, seed=4))
    queue = ContrastiveFeatures(unit(5, 6, seed=5)[:queued], unit(5, 6, seed=6)[:queued])
    ids, queue_ids = [7, 3, 7, 1], [3, 7, 9, 9, 1][:queued]
    expected = plain_contrastive(online, momentum, ids, queue, queue_ids, 0.07, alpha)
    given = (queue, torch.tensor(queue_ids)) if queued else (None, None)
    loss = contrastive_loss(online, momentum, torch.tensor(ids), *given, temperature=0.07, alpha=alpha)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_contrastive_loss_is_float32_under_autocast() -> None:
    online = ContrastiveFeatures(unit(4, 6, seed=1), unit(4, 6, seed=2))
    momentum = ContrastiveFeatures(unit(4, 6, seed=3), unit(4, 6, seed=4))
    ids = torch.arange(4)
    plain = contrastive_loss(online, momentum, ids, None, None, temperature=0.07, alpha=0.4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(online, momentum, ids, None, None, temperature=0.07, alpha=0.4)
    assert loss.dtype == torch.float32 and torch.equal(loss, plain)


def test_hard_negatives_never_match_and_follow_the_softmax_of_the_others() -> None:
    temperature, draws = 0.5, 1500
    similarity = torch.tensor(
        [[0.9, 0.5, 0.1, -0.3], [0.2, 0.9, 0.4, 0.0], [0.1, 0.1, 0.9, 0.6], [0.3, -0.1, 0.2, 0.9]]
    )
    ids = torch.tensor([5, 6, 5, 8])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([hard_negatives(similarity, ids, temperature, generator) for _ in range(draws)])
    assert not bool((ids[drawn] == ids).any())
    for row in range(4):
        weights = [math.exp(float(similarity[row, j]) / temperature) * (ids[j] != ids[row]) for j in range(4)]
        for column in range(4):
            share = (drawn[:, row] == column).float().mean().item()
            assert share == pytest.approx(float(weights[column] / sum(weights)), abs=0.05)


def test_hard_negatives_stay_apart_where_the_match_outweighs_everything() -> None:
    similarity = torch.tensor([[1.0, -1.0, -0.9], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([hard_negatives(similarity, torch.arange(3), 0.001, generator) for _ in range(200)])
    assert bool((drawn[:, 0] == 2).all())  # e^100 times likelier than column 1, however small both are


def test_matching_loss_is_the_cross_entropy_with_1_for_a_match() -> None:
    logits = torch.tensor([[0.0, 2.0], [1.0, -1.0]])
    expected = (math.log(1 + math.exp(-2.0)) + math.log(1 + math.exp(2.0))) / 2
    assert matching_loss(logits, torch.tensor([1, 1])).item() == pytest.approx(expected, rel=1e-6)
