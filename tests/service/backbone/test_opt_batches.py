"""A row gives alone what it gives in any mix: of adapters, modalities, prompts, lengths, and rows without a medium.

Logits within ATOL + RTOL |b|. Logits here reach 40, where float32 rounds by 4e-6; sums in another order, over padded
columns, differ by several of those. `OPT_RANDOM_CASES=1000` runs more cases than the suite does.
"""

import os
from collections import Counter

import pytest
import torch
from torch import Tensor

from service.backbone.opt_answers import generate_texts, rank_texts
from tests.service.backbone.opt_random import IDS, VOCABULARY, Mixed, random_batch

NUM_CASES = int(os.environ.get("OPT_RANDOM_CASES", "60"))
ATOL, RTOL = 5e-5, 1e-5
NEAR_TIE = 1e-4


def test_logits(capsys: pytest.CaptureFixture[str]) -> None:
    worst, largest, beyond, compared = 0.0, 0.0, 0, 0
    with torch.inference_mode():
        for seed in range(5000, 5000 + NUM_CASES):
            batch = random_batch(seed, max_rows=6)
            ids, mask = batch.padded
            together = batch.model.score(ids, mask, batch.features, batch.adaptation)
            for number in range(len(ids)):
                alone = batch.row(number)
                (expected,) = alone.model.score(*alone.padded, alone.features, alone.adaptation)
                found = together[number, mask[number]]
                difference = (found - expected).abs()
                worst, largest = max(worst, float(difference.max())), max(largest, float(expected.abs().max()))
                compared += difference.numel()
                beyond += int((difference > 1e-5 + 1e-5 * expected.abs()).sum())
                assert (difference <= ATOL + RTOL * expected.abs()).all(), (
                    f"case {seed}, row {number}: {batch.describe()}"
                )
    with capsys.disabled():
        print(f"\nalone against mixed: {compared} logits up to {largest:.1f} differ by at most {worst:.1e}", end="; ")
        print(f"beyond 1e-5 + 1e-5 |b|: {beyond}")


@pytest.mark.parametrize("num_beams", [1, 3])
def test_sequences(num_beams: int, capsys: pytest.CaptureFixture[str]) -> None:
    counts: Counter[str] = Counter()
    with torch.inference_mode():
        for seed in range(6000, 6000 + NUM_CASES // 2):
            batch = random_batch(seed, max_rows=6)
            together = _generate(batch, num_beams)
            for number, found in enumerate(together):
                (expected,) = _generate(batch.row(number), num_beams)
                counts["sequences"] += 1
                if found.hypotheses[0].ids != expected.hypotheses[0].ids:
                    assert expected.gap < NEAR_TIE, f"case {seed}, row {number}: {batch.describe()}"
                    counts["near ties that fell otherwise"] += 1
                    continue
                assert found.hypotheses[0].score == pytest.approx(expected.hypotheses[0].score, abs=1e-4)
    with capsys.disabled():
        print(f"\nalone against mixed, {num_beams} beams:", dict(counts))
    assert counts["sequences"] > NUM_CASES / 2


def _generate(batch: Mixed, num_beams: int):  # type: ignore[no-untyped-def]
    return generate_texts(batch.model, batch.starts, batch.features, batch.adaptation, num_beams=num_beams)


def test_rankings() -> None:
    """Each row with its own candidates and shortlist."""
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        for seed in range(7000, 7000 + NUM_CASES // 4):
            batch = random_batch(seed, max_rows=5)
            sizes = torch.randint(2, 6, (len(batch.starts),), generator=generator).tolist()
            candidates = [
                [
                    (IDS.bos, *torch.randint(3, VOCABULARY, (1 + place % 3,), generator=generator).tolist(), IDS.eos)
                    for place in range(size)
                ]
                for size in sizes
            ]
            ks = [max(1, size - 1) for size in sizes]
            questions = [start.ids for start in batch.starts]
            together = rank_texts(batch.model, questions, batch.features, batch.adaptation, candidates, ks)
            for number, found in enumerate(together):
                own = batch.row(number)
                arguments = own.features, own.adaptation, [candidates[number]], [ks[number]]
                (expected,) = rank_texts(own.model, [questions[number]], *arguments)
                assert found.indices == expected.indices
                assert found.scores == pytest.approx(expected.scores, abs=2e-4, rel=1e-5)
                assert found.first_token_probs == pytest.approx(expected.first_token_probs, abs=1e-5)
                gaps = sorted(expected.scores)[-2:]
                assert found.best == expected.best or gaps[-1] - gaps[0] < NEAR_TIE


def test_rankings_score_whole_texts() -> None:
    """Whatever is kept of a question: the first word's log-probability and that of the whole text by a forward of its own."""
    generator, rereads = torch.Generator().manual_seed(2), Counter[bool]()
    with torch.inference_mode():
        for seed in range(8000, 8000 + NUM_CASES // 2):
            batch = random_batch(seed, max_rows=4)
            ids, mask = batch.padded
            rereads[batch.model.decode(ids, mask, batch.features, batch.adaptation, max_new_tokens=0).rereads] += 1
            lengths = torch.randint(1, 6, (len(ids), 5), generator=generator).tolist()
            candidates = [
                [(IDS.bos, *torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()) for n in own]
                for own in lengths
            ]
            questions = [start.ids for start in batch.starts]
            ks = [5] * len(ids)
            for number, found in enumerate(
                rank_texts(batch.model, questions, batch.features, batch.adaptation, candidates, ks)
            ):
                for index, score in zip(found.indices, found.scores, strict=True):
                    candidate = candidates[number][index]
                    expected = _whole_score(batch.row(number), questions[number], candidate)
                    assert score == pytest.approx(expected, abs=2e-4, rel=1e-5), f"case {seed}: {batch.describe()}"
    assert min(rereads[False], rereads[True]) >= 3


def _whole_score(row: Mixed, question: tuple[int, ...], candidate: tuple[int, ...]) -> float:
    def log_probs(text: tuple[int, ...]) -> Tensor:
        ids = torch.tensor([text])
        logits = row.model.score(ids, torch.ones_like(ids, dtype=torch.bool), row.features, row.adaptation)
        return logits[0].log_softmax(-1)

    whole = (*question, *candidate)
    likelihood = log_probs(whole)[:-1].gather(1, torch.tensor(whole[1:])[:, None]).sum()
    return float(log_probs(question)[-1, candidate[1]] + likelihood)
