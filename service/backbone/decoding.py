"""Turning what a decoder says next into texts: beam search and greedy search.

The rules of searching are those of transformers 4.15.0 and 4.24, which the authors of UniAdapter and of eP-ALM use: a
hypothesis is normalised by the length of its whole text, the start included and the end token not, and a search is done
when its worst kept hypothesis is at least the best running sum divided by the length *before* this step's token. Rows of
different searches never influence each other.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from service.backbone.rows import told
from service.types import GenerateOutput, Hypothesis

UNSTARTED = -1e9  # running sum of the beams that start as copies of the first one
KeepGoing = Callable[[], bool]


class Steps(ABC):
    """Texts that grow by a token at a time. Those that can be taken in by others say so."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where they are written."""

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """How many rows there are."""

    @abstractmethod
    def logits(self) -> Tensor:
        """Logits [R, V] of what follows each row's text."""

    @abstractmethod
    def step(self, ids: Tensor) -> Tensor:
        """Append a token to every row, ids [R]; logits [R, V] of what follows."""

    @abstractmethod
    def select(self, rows: Sequence[int], rows_per_text: int) -> None:
        """Keep these rows, in this order: blocks of so many rows, which are of one text each.

        The host knows them: to ask a device what is in a tensor is to wait for it.
        """

    def can_join(self, other: Any) -> bool:
        """Whether another's rows may be taken in."""
        return False

    def join(self, other: Any) -> None:
        """Take another's rows behind one's own, with as many rows a text. The other is of no use then."""
        raise AssertionError("texts joined that cannot. This is a bug.")

    def write(self, rows: Sequence[int], words: Sequence[int], totals: Sequence[Sequence[float]]) -> Tensor:
        """Go on with these rows, each with its next word; what follows best, see `best_next`.

        `totals` has the running sums of each text's beams, words included. What is returned is there until the next call.
        """
        if list(rows) != list(range(self.num_rows)):
            self.select(rows, len(totals[0]))
        return best_next(self.step(told(self.device, words)), told(self.device, totals))


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


@dataclass
class Search:
    """One text's search: its beams, or with one beam the greedy text.

    `chosen` are the beams that go on, each as (running sum, the beam it continues, its new word).
    """

    start: Start
    state: Beams
    beams: list[tuple[int, ...]]
    totals: list[float]
    chosen: list[tuple[float, int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, start: Start, num_beams: int) -> "Search":
        """Before its first word."""
        return cls(start, Beams(num_beams), [start.ids] * num_beams, [0.0] + [UNSTARTED] * (num_beams - 1))

    def take(self, best: list[float], flat: list[int], vocabulary: int, end: int) -> None:
        """Go on with the best continuations [2 * beams + 1]: running sums, and beam * vocabulary + word."""
        state, length = self.state, len(self.beams[0])
        if state.num_beams == 1:  # greedy: the best word, whatever it is
            state.gap = min(state.gap, best[0] - best[1])
            self.chosen = [(best[0], *divmod(flat[0], vocabulary))]
            state.is_done = self.chosen[0][2] == end
        else:
            self.chosen = _advance(state, self.beams, best, flat, vocabulary, end)
            state.check_done(best[0], length)
        self.beams = [(*self.beams[beam], word) for _, beam, word in self.chosen]
        self.totals = [total for total, _, _ in self.chosen]
        state.is_full = length + 1 >= self.start.max_length

    def finish(self, end: int) -> GenerateOutput:
        """What it found, ended where it is."""
        if self.state.num_beams > 1:
            return _finish(self.state, self.beams, self.totals, self.start.max_length, end)
        (text,), (total,) = self.beams, self.totals
        return GenerateOutput((Hypothesis(text, total / (len(text) - (text[-1] == end))),), self.state.gap)


class Writing:
    """Texts that are written together, a word of each at a time. They may come in and end at any word.

    A round is `choose`, which picks every text's next words and tells which texts ended, then `step`, which writes them.
    Between rounds others may `join`.
    """

    def __init__(self, steps: Steps, starts: Sequence[Start], *, num_beams: int, end: int) -> None:
        """`steps` has a row for each start. With one beam the search is greedy."""
        self.num_beams = num_beams
        self._end = end
        self._steps = steps
        self._searches = [Search.of(start, num_beams) for start in starts]
        self._places: list[int] = []  # where the texts that go on stood before this round
        logits = steps.logits()
        self._vocabulary = logits.shape[-1]
        self._best = best_next(logits, told(steps.device, self._totals))  # of each text
        if num_beams > 1:
            steps.select([row for row in range(len(starts)) for _ in range(num_beams)], num_beams)

    def __len__(self) -> int:
        return len(self._searches)

    def choose(self) -> list[tuple[int, GenerateOutput]]:
        """Pick every text's next words. Those that ended by it, by their place before, are let go with what they found."""
        best, flat = self._best.tolist()
        for search, own_best, own_flat in zip(self._searches, best, flat, strict=True):
            search.take(own_best, [int(number) for number in own_flat], self._vocabulary, self._end)
        self._places = list(range(len(self)))
        over = [place for place, search in enumerate(self._searches) if search.state.is_over]
        return self.let_go(over)

    def let_go(self, places: Sequence[int]) -> list[tuple[int, GenerateOutput]]:
        """End these texts where they are: what each found, by its place. After `choose`, before `step`."""
        found = [(place, self._searches[place].finish(self._end)) for place in places]
        left = [place for place in range(len(self)) if place not in set(places)]
        self._places = [self._places[place] for place in left]
        self._searches = [self._searches[place] for place in left]
        return found

    def step(self) -> None:
        """Write the words that were chosen."""
        placed = zip(self._places, self._searches, strict=True)
        rows = [place * self.num_beams + beam for place, search in placed for _, beam, _ in search.chosen]
        words = [text[-1] for search in self._searches for text in search.beams]
        self._best = self._steps.write(rows, words, self._totals)

    @property
    def _totals(self) -> list[list[float]]:
        return [search.totals for search in self._searches]

    def can_join(self, other: "Writing") -> bool:
        """Whether another's texts may be written with these."""
        return other.num_beams == self.num_beams and self._steps.can_join(other._steps)

    def join(self, other: "Writing") -> None:
        """Take another's texts in, behind one's own. Between rounds; the other is of no use then."""
        self._steps.join(other._steps)
        self._searches += other._searches
        self._best = torch.cat([self._best, other._best], dim=1)

    def reorder(self, places: Sequence[int]) -> None:
        """Put the texts in another order. Between rounds."""
        rows = [place * self.num_beams + beam for place in places for beam in range(self.num_beams)]
        self._steps.select(rows, self.num_beams)
        self._searches = [self._searches[place] for place in places]
        self._best = self._best[:, told(self._best.device, places)]


def write_all(writing: Writing, keep_going: KeepGoing = lambda: True) -> list[GenerateOutput]:
    """Texts from their first word to their last: beam search, or with one beam greedy search.

    `keep_going` is asked before every step; when it says no, the search ends with what it has. Sequences hold their
    start, at most its `max_length` ids in all, and `end` where it was reached.
    """
    num_texts = len(writing)
    numbers, found = list(range(num_texts)), dict[int, GenerateOutput]()
    while True:
        found |= {numbers[place]: output for place, output in writing.choose()}
        numbers = [number for number in numbers if number not in found]
        if not numbers or not keep_going():
            break
        writing.step()
    found |= {numbers[place]: output for place, output in writing.let_go(range(len(numbers)))}
    return [found[number] for number in range(num_texts)]


def best_next(logits: Tensor, totals: Tensor) -> Tensor:
    """The 2 * b + 1 best continuations of T texts, [2, T, 2 * b + 1]: running sums, descending, and beam * V + word.

    `logits` [T * b, V] of what follows each text's beams, or [T, V] where its beams are alike, `totals` [T, b]. Both parts are
    numbers of 64 bits, which hold them exactly, so that one question to the device answers both.
    """
    log_probs = logits.float().log_softmax(-1).unflatten(0, (len(totals), -1))
    best, flat = best_of((log_probs + totals.unsqueeze(-1)).flatten(1), 2 * totals.shape[1] + 1)
    return torch.stack([best.double(), flat.double()])


def best_of(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best of each row, descending; of equals the lower index first.

    `topk` promises no order among equals, and sorting all of a vocabulary takes longer than a decoding step. So the row is cut
    into chunks, and only the `count` chunks with the greatest maxima are sorted: whatever is in another has as many before it.
    Chunks are of the size at which least is sorted, maxima and chosen chunks together. Shapes depend on nothing that is in the
    scores: no device is waited for.
    """
    size = max(1, round(math.sqrt(scores.shape[1] / count)))
    chunks = functional.pad(scores, (0, -scores.shape[1] % size), value=-torch.inf).unflatten(1, (-1, size))
    _, by_maximum = chunks.amax(dim=2).sort(descending=True, stable=True)
    best = by_maximum[:, :count].sort().values  # back in the order of the row
    own = chunks.gather(1, best[:, :, None].expand(-1, -1, size)).flatten(1)
    values, order = own.sort(descending=True, stable=True)
    values, order = values[:, :count], order[:, :count]
    return values, size * best.gather(1, order // size) + order % size


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


def pad_ids(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """ids [B, L] and mask [B, L] (True: a token) of rows of different lengths, padded on the right."""
    length = max(len(row) for row in rows)
    ids = told(device, [[*row, *[pad] * (length - len(row))] for row in rows]).long()
    mask = told(device, [[True] * len(row) + [False] * (length - len(row)) for row in rows]).bool()
    return ids, mask


def shortlist(probs: Tensor, candidates: Sequence[tuple[int, ...]], k: int) -> list[int]:
    """Indices of the k candidates whose first words, behind the start token, are likeliest; ties: the lower index."""
    first_words = torch.tensor([candidate[1] for candidate in candidates])
    _, order = probs[first_words].sort(descending=True, stable=True)
    return order[:k].tolist()
