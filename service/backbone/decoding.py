"""Turning question states into answers: beam search, greedy search, ranking of given answers.

The rules are UniAdapter's reference's, which are transformers 4.15.0's: a hypothesis is normalised by its length with
[DEC] counted and [SEP] not, and a question is done when its worst kept hypothesis is at least the best running sum
divided by the length *before* this step's token. Rows of different questions never influence each other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapters.families.base import Adaptation
from adapters.training.losses import shifted_nll
from service.backbone.blip import Blip, Decoder, Memory
from service.types import GenerateOutput, Hypothesis, RankOutput

UNSTARTED = -1e9  # running sum of the beams that start as copies of the first one
MAX_CANDIDATE_ROWS = 256


@dataclass
class Beams:
    """One question's search: its finished hypotheses and whether it is done."""

    num_beams: int
    kept: list[Hypothesis] = field(default_factory=list)
    is_done: bool = False
    gap: float = float("inf")

    def keep(self, ids: tuple[int, ...], total: float, length: int) -> None:
        """Offer a finished hypothesis; the pool keeps the best `num_beams`, the earlier one of equals."""
        self.kept.append(Hypothesis(ids, total / length))
        self.kept.sort(key=lambda h: -h.score)  # stable
        del self.kept[self.num_beams :]

    def check_done(self, best_total: float, length: int) -> None:
        """Done when no running beam can still beat the worst kept one."""
        if len(self.kept) == self.num_beams and self.kept[-1].score >= best_total / length:
            self.is_done = True


def _decoder(model: Blip) -> Decoder:
    assert model.decoder is not None, "the caller checked that there is a decoder. This is a bug."
    return model.decoder


def beam_search(
    model: Blip,
    memory: Memory,
    num_questions: int,
    adaptation: Adaptation | None,
    *,
    num_beams: int,
    max_length: int,
    keep_going: Callable[[], bool] = lambda: True,
) -> list[GenerateOutput]:
    """Answers of `num_questions` questions whose states are in `memory`; `adaptation` has one row per question.

    One beam is greedy search. `keep_going` is asked before every step; when it says no, the search ends with what it
    has. Sequences hold [DEC], at most `max_length` ids in all, and [SEP] where it was reached.
    """
    if num_beams == 1:
        return _greedy(model, memory, num_questions, adaptation, max_length=max_length, keep_going=keep_going)
    decoder, special = _decoder(model), model.config.special_ids
    device, size = model.device, num_questions * num_beams
    origin = torch.arange(num_questions, device=device).repeat_interleave(num_beams)
    rows = None if adaptation is None else adaptation.expand(origin)
    cache = decoder.body.new_cache(size, max_length)
    searches = [Beams(num_beams) for _ in range(num_questions)]
    sequences: list[list[tuple[int, ...]]] = [[(special.bos,)] * num_beams for _ in range(num_questions)]
    totals = torch.full((num_questions, num_beams), UNSTARTED, dtype=torch.float32)
    totals[:, 0] = 0.0
    ids = torch.full((size,), special.bos, dtype=torch.long, device=device)
    for length in range(1, max_length):
        if not keep_going():
            break
        log_probs = decoder.step(ids, cache, memory, rows).float().log_softmax(-1).cpu()
        scores = log_probs.unflatten(0, (num_questions, num_beams)) + totals.unsqueeze(-1)  # [Q, beams, V]
        best, flat = _top(scores.flatten(1), 2 * num_beams + 1)
        parents: list[int] = []
        for question, search in enumerate(searches):
            if search.is_done:
                parents += [question * num_beams] * num_beams
                sequences[question] = [(*sequences[question][0], special.pad)] * num_beams
                continue
            chosen = _advance(
                search,
                sequences[question],
                best[question].tolist(),
                flat[question].tolist(),
                log_probs.shape[-1],
                special.sep,
            )
            sequences[question] = [(*sequences[question][beam], token) for _, beam, token in chosen]
            totals[question] = torch.tensor([total for total, _, _ in chosen])
            parents += [question * num_beams + beam for _, beam, _ in chosen]
            search.check_done(float(best[question, 0]), length)
        if all(search.is_done for search in searches):
            break
        cache.select(torch.tensor(parents, device=device))
        ids = torch.tensor([beam[-1] for beams in sequences for beam in beams], device=device)
    return [
        _finish(*found, max_length, special.sep) for found in zip(searches, sequences, totals.tolist(), strict=True)
    ]


def _top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best of each row, descending; of equals the lower index first."""
    best, index = scores.sort(dim=-1, descending=True, stable=True)
    return best[:, :count], index[:, :count]


def _advance(
    search: Beams, beams: Sequence[tuple[int, ...]], best: list[float], flat: list[int], vocabulary: int, sep: int
) -> list[tuple[float, int, int]]:
    """Walk the candidates of one step: (total, parent beam, token) of the beams that go on.

    [SEP] among the first `num_beams` ranks finishes a hypothesis; a later one is dropped. The last candidate given
    is the first one passed over, and serves to measure the gap of the decision.
    """
    chosen: list[tuple[float, int, int]] = []
    considered = len(best) - 1
    for rank in range(considered):
        beam, token = divmod(flat[rank], vocabulary)
        search.gap = min(search.gap, best[rank] - best[rank + 1])
        if token == sep:
            if rank < search.num_beams:
                search.keep((*beams[beam], sep), best[rank], len(beams[beam]))
            continue
        chosen.append((best[rank], beam, token))
        if len(chosen) == search.num_beams:
            break
    return chosen


def _finish(
    search: Beams, beams: Sequence[tuple[int, ...]], totals: Sequence[float], max_length: int, sep: int
) -> GenerateOutput:
    """Open beams of a search that is not done join its pool with what they have."""
    if not search.is_done:
        for ids, total in zip(beams, totals, strict=True):
            search.keep(ids, total, len(ids))
    kept = [
        Hypothesis(h.ids if h.ids[-1] == sep or len(h.ids) >= max_length else (*h.ids, sep), h.score)
        for h in search.kept
    ]
    gap = min(search.gap, kept[0].score - kept[1].score) if len(kept) > 1 else search.gap
    return GenerateOutput(tuple(kept), gap)


def _greedy(
    model: Blip,
    memory: Memory,
    num_questions: int,
    adaptation: Adaptation | None,
    *,
    max_length: int,
    keep_going: Callable[[], bool],
) -> list[GenerateOutput]:
    """Argmax each step; a question ends at [SEP] or `max_length`. Scored like a beam, by its mean log-probability."""
    decoder, special = _decoder(model), model.config.special_ids
    cache = decoder.body.new_cache(num_questions, max_length)
    ids = torch.full((num_questions,), special.bos, dtype=torch.long, device=model.device)
    sequences: list[list[int]] = [[special.bos] for _ in range(num_questions)]
    totals, gaps = [0.0] * num_questions, [float("inf")] * num_questions
    done = [False] * num_questions
    for _ in range(1, max_length):
        if all(done) or not keep_going():
            break
        log_probs = decoder.step(ids, cache, memory, adaptation).float().log_softmax(-1).cpu()
        best, index = _top(log_probs, 2)
        for question in range(num_questions):
            if done[question]:
                continue
            token = int(index[question, 0])
            sequences[question].append(token)
            totals[question] += float(best[question, 0])
            gaps[question] = min(gaps[question], float(best[question, 0] - best[question, 1]))
            done[question] = token == special.sep
        ids = torch.tensor([sequence[-1] for sequence in sequences], device=model.device)
    outputs = []
    for sequence, total, gap in zip(sequences, totals, gaps, strict=True):
        length = len(sequence) - (sequence[-1] == special.sep)
        outputs.append(GenerateOutput((Hypothesis(tuple(sequence), total / length),), gap))
    return outputs


def pad_ids(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """ids [B, L] and mask [B, L] (True: a token) of rows of different lengths, padded on the right."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows], dtype=torch.long, device=device)
    mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows], device=device)
    return ids, mask


def rank_answers(
    model: Blip,
    memory: Memory,
    adaptation: Adaptation | None,
    candidates: Sequence[Sequence[tuple[int, ...]]],
    ks: Sequence[int],
    *,
    keep_going: Callable[[], bool] = lambda: True,
) -> list[RankOutput]:
    """The best of each question's candidates ([DEC] words [SEP]).

    A candidate's first word decides whether it is among the k looked at (ties: the lower index); those are scored by
    minus their label-smoothed loss, without length normalisation. `memory` and `adaptation` have a row per question.
    Once nobody wants to `keep_going`, what was not scored gets minus infinity.
    """
    decoder, special = _decoder(model), model.config.special_ids
    num_questions = len(candidates)
    start = torch.full((num_questions,), special.bos, dtype=torch.long, device=model.device)
    cache = decoder.body.new_cache(num_questions, 1)
    probs = decoder.step(start, cache, memory, adaptation).float().softmax(-1).cpu()  # [Q, V]
    shortlists = [_shortlist(probs[q], candidates[q], ks[q]) for q in range(num_questions)]
    pairs = [(q, index) for q in range(num_questions) for index in shortlists[q]]
    scores: list[float] = []
    for first in range(0, len(pairs), MAX_CANDIDATE_ROWS):
        if not keep_going():
            scores += [float("-inf")] * (len(pairs) - first)
            break
        part = pairs[first : first + MAX_CANDIDATE_ROWS]
        ids, mask = pad_ids([candidates[q][index] for q, index in part], special.pad, model.device)
        questions = torch.tensor([q for q, _ in part], device=model.device)
        rows = None if adaptation is None else adaptation.expand(questions)
        logits = decoder.score(ids, mask, memory.select(questions), rows)
        scores += (-shifted_nll(logits, ids, mask)).tolist()
    outputs = []
    for q, shortlist in enumerate(shortlists):
        own, scores = scores[: len(shortlist)], scores[len(shortlist) :]
        first_probs = tuple(float(probs[q, candidates[q][index][1]]) for index in shortlist)
        best = max(range(len(own)), key=lambda place: (own[place], -shortlist[place]))
        outputs.append(RankOutput(tuple(shortlist), tuple(own), first_probs, best))
    return outputs


def _shortlist(probs: Tensor, candidates: Sequence[tuple[int, ...]], k: int) -> list[int]:
    first_words = torch.tensor([candidate[1] for candidate in candidates])
    _, order = probs[first_words].sort(descending=True, stable=True)
    return order[:k].tolist()
