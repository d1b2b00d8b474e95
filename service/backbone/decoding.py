"""Turning what a decoder says next into texts: beam search and greedy search.

The rules of searching are those of transformers 4.15.0 and 4.24, which the authors of UniAdapter and of eP-ALM use: a
hypothesis is normalised by the length of its whole text, the start included and the end token not, and a search is done
when its worst kept hypothesis is at least the best running sum divided by the length *before* this step's token. Rows of
different searches never influence each other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from service.types import GenerateOutput, Hypothesis

UNSTARTED = -1e9  # running sum of the beams that start as copies of the first one
KeepGoing = Callable[[], bool]


class Steps(Protocol):
    """Texts that grow by a token at a time."""

    def logits(self) -> Tensor:
        """Logits [R, V] of what follows each row's text."""

    def step(self, ids: Tensor) -> Tensor:
        """Append a token to every row, ids [R]; logits [R, V] of what follows."""

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order. Each row's successors stay together, and with what it reads."""


@dataclass(frozen=True)
class Start:
    """The text a search starts with, and the length of the longest it may come to."""

    ids: tuple[int, ...]
    max_length: int


@dataclass
class Beams:
    """One search: its finished hypotheses, whether it is done, and whether its texts are as long as they may be."""

    num_beams: int
    kept: list[Hypothesis] = field(default_factory=list)
    is_done: bool = False
    is_full: bool = False
    gap: float = float("inf")

    @property
    def is_over(self) -> bool:
        """Whether it goes no further."""
        return self.is_done or self.is_full

    def keep(self, ids: tuple[int, ...], total: float, length: int) -> None:
        """Offer a finished hypothesis; the pool keeps the best `num_beams`, the earlier one of equals."""
        self.kept.append(Hypothesis(ids, total / length))
        self.kept.sort(key=lambda h: -h.score)  # stable
        del self.kept[self.num_beams :]

    def check_done(self, best_total: float, length: int) -> None:
        """Done when no running beam can still beat the worst kept one."""
        if len(self.kept) == self.num_beams and self.kept[-1].score >= best_total / length:
            self.is_done = True


def generate(
    steps: Steps, starts: Sequence[Start], *, num_beams: int, end: int, keep_going: KeepGoing = lambda: True
) -> list[GenerateOutput]:
    """What follows the starts, of which `steps` has a row each: beam search, or with one beam greedy search.

    `keep_going` is asked before every step; when it says no, the search ends with what it has. Sequences hold their
    start, at most its `max_length` ids in all, and `end` where it was reached.
    """
    if num_beams == 1:
        return _greedy(steps, starts, end=end, keep_going=keep_going)
    num_searches = len(starts)
    log_probs = _log_probs(steps.logits())
    device, vocabulary = steps.logits().device, log_probs.shape[-1]
    steps.select(torch.arange(num_searches, device=device).repeat_interleave(num_beams))
    log_probs = log_probs.repeat_interleave(num_beams, dim=0)
    searches = [Beams(num_beams) for _ in starts]
    sequences = [[start.ids] * num_beams for start in starts]
    totals = torch.full((num_searches, num_beams), UNSTARTED, dtype=torch.float32)
    totals[:, 0] = 0.0
    while True:
        scores = log_probs.unflatten(0, (num_searches, num_beams)) + totals.unsqueeze(-1)  # [Q, beams, V]
        best, flat = _top(scores.flatten(1), 2 * num_beams + 1)
        parents: list[int] = []
        for number, search in enumerate(searches):
            beams = sequences[number]
            if search.is_over:
                parents += [number * num_beams] * num_beams
                continue
            length = len(beams[0])
            chosen = _advance(search, beams, best[number].tolist(), flat[number].tolist(), vocabulary, end)
            sequences[number] = [(*beams[beam], token) for _, beam, token in chosen]
            totals[number] = torch.tensor([total for total, _, _ in chosen])
            parents += [number * num_beams + beam for _, beam, _ in chosen]
            search.check_done(float(best[number, 0]), length)
            search.is_full = length + 1 >= starts[number].max_length
        if all(search.is_over for search in searches) or not keep_going():
            break
        steps.select(torch.tensor(parents, device=device))
        log_probs = _log_probs(steps.step(torch.tensor([b[-1] for own in sequences for b in own], device=device)))
    found = zip(searches, sequences, totals.tolist(), starts, strict=True)
    return [_finish(search, beams, own, start.max_length, end) for search, beams, own, start in found]


def _log_probs(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).cpu()


def _top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best of each row, descending; of equals the lower index first.

    `topk` promises no order among equals, and sorting all of a vocabulary takes longer than a decoding step: so the least that
    is among the best is found first, and what is at least that is sorted.
    """
    least = scores.topk(count).values[:, -1:]
    rows, columns = (scores >= least).nonzero(as_tuple=True)  # by rows, then by index
    best: list[Tensor] = []
    index: list[Tensor] = []
    for own in columns.split(rows.bincount(minlength=len(scores)).tolist()):
        values, order = scores[len(best), own].sort(descending=True, stable=True)
        best.append(values[:count])
        index.append(own[order[:count]])
    return torch.stack(best), torch.stack(index)


def _advance(
    search: Beams, beams: Sequence[tuple[int, ...]], best: list[float], flat: list[int], vocabulary: int, end: int
) -> list[tuple[float, int, int]]:
    """Walk the candidates of one step: (total, parent beam, token) of the beams that go on.

    The end token among the first `num_beams` ranks finishes a hypothesis; a later one is dropped. The last candidate
    given is the first one passed over, and serves to measure the gap of the decision.
    """
    chosen: list[tuple[float, int, int]] = []
    considered = len(best) - 1
    for rank in range(considered):
        beam, token = divmod(flat[rank], vocabulary)
        search.gap = min(search.gap, best[rank] - best[rank + 1])
        if token == end:
            if rank < search.num_beams:
                search.keep((*beams[beam], end), best[rank], len(beams[beam]))
            continue
        chosen.append((best[rank], beam, token))
        if len(chosen) == search.num_beams:
            break
    return chosen


def _finish(
    search: Beams, beams: Sequence[tuple[int, ...]], totals: Sequence[float], max_length: int, end: int
) -> GenerateOutput:
    """Open beams of a search that is not done join its pool with what they have."""
    if not search.is_done:
        for ids, total in zip(beams, totals, strict=True):
            search.keep(ids, total, len(ids))
    kept = [
        Hypothesis(h.ids if h.ids[-1] == end or len(h.ids) >= max_length else (*h.ids, end), h.score)
        for h in search.kept
    ]
    gap = min(search.gap, kept[0].score - kept[1].score) if len(kept) > 1 else search.gap
    return GenerateOutput(tuple(kept), gap)


def _greedy(steps: Steps, starts: Sequence[Start], *, end: int, keep_going: KeepGoing) -> list[GenerateOutput]:
    """Argmax each step; a text ends at its end token or `max_length`. Scored like a beam, by its mean log-probability."""
    logits = steps.logits()
    sequences = [list(start.ids) for start in starts]
    totals, gaps, done = [0.0] * len(starts), [float("inf")] * len(starts), [False] * len(starts)
    while True:
        best, index = _top(_log_probs(logits), 2)
        for number, sequence in enumerate(sequences):
            if done[number]:
                continue
            token = int(index[number, 0])
            sequence.append(token)
            totals[number] += float(best[number, 0])
            gaps[number] = min(gaps[number], float(best[number, 0] - best[number, 1]))
            done[number] = token == end or len(sequence) >= starts[number].max_length
        if all(done) or not keep_going():
            break
        logits = steps.step(torch.tensor([sequence[-1] for sequence in sequences], device=logits.device))
    outputs = []
    for sequence, total, gap in zip(sequences, totals, gaps, strict=True):
        length = len(sequence) - (sequence[-1] == end)
        outputs.append(GenerateOutput((Hypothesis(tuple(sequence), total / length),), gap))
    return outputs


def pad_ids(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """ids [B, L] and mask [B, L] (True: a token) of rows of different lengths, padded on the right."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows], dtype=torch.long, device=device)
    mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows], device=device)
    return ids, mask


def shortlist(probs: Tensor, candidates: Sequence[tuple[int, ...]], k: int) -> list[int]:
    """Indices of the k candidates whose first words, behind the start token, are likeliest; ties: the lower index."""
    first_words = torch.tensor([candidate[1] for candidate in candidates])
    _, order = probs[first_words].sort(descending=True, stable=True)
    return order[:k].tolist()
