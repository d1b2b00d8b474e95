"""Words of texts, recorded: everything at places that stay, and in shapes that do not change.

A word of every text is one recording: each row goes on from the row its beam chose, a word of each is read, and the best that
follow are found. Texts that come in, and those that stay when half of the places are empty, change places by way of the steps
that fit them exactly, whose rules hold here too; who leaves otherwise just leaves a place whose words nobody reads. Numbers are
the same up to rounding.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

import torch
from torch import Tensor

from service.backbone.decoding import Steps, best_next
from service.backbone.rows import told
from service.recordings import Recording, Recordings


class FixedTexts(ABC):
    """The memory of T texts with b beams that are written together, and the work of writing a word of each. See Fixed.

    told  [3, T * b] which row each row goes on from, its next word, and its running sum with it
    best  [2, T, 2 * b + 1] see `best_next`
    """

    def __init__(self, num_texts: int, num_beams: int, device: torch.device) -> None:
        self.num_texts = num_texts
        self.num_beams = num_beams
        self.told = torch.zeros(3, num_texts * num_beams, dtype=torch.float64, device=device)
        self.best = torch.zeros(2, num_texts, 2 * num_beams + 1, dtype=torch.float64, device=device)

    @property
    @abstractmethod
    def changing(self) -> Sequence[Tensor]:
        """What writing a word changes, the bests aside."""

    @property
    @abstractmethod
    def lasting(self) -> Sequence[Tensor]:
        """What else writing a word reads."""

    @abstractmethod
    def write(self, rows: Tensor | None, words: Tensor) -> Tensor:
        """Logits [T * b, V] behind one more word of each row, words [T * b]; `rows`: from which each goes on, if not itself."""

    @property
    def num_bytes(self) -> int:
        """See Fixed."""
        moved = self.changing if self.num_beams > 1 else ()  # rows change places by way of a copy
        tensors = (self.told, self.best, *self.changing, *self.lasting, *moved)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def result(self) -> Tensor:
        """See Fixed: sums alone, as of words that are equally likely either may be the best."""
        return self.best[0]

    def run(self) -> None:
        """Write a word of every text."""
        rows, words = self.told[0].long(), self.told[1].long()
        logits = self.write(rows if self.num_beams > 1 else None, words)
        self.best.copy_(best_next(logits, self.told[2].float().view(-1, self.num_beams)))


F = TypeVar("F", bound=FixedTexts)


@dataclass(frozen=True)
class Plan(Generic[F]):
    """How texts can be written by a recording: which, what makes its work (see `Recordings.take`), and what brings them there."""

    key: Hashable
    make: Callable[[torch.device | None], F]
    load: Callable[[F], None]


class FixedSteps(Steps, ABC, Generic[F]):
    """Texts whose words are recordings', where there is one that fits them; otherwise they are written without."""

    def __init__(self, exact: Steps, recordings: Recordings) -> None:
        """`exact`: the texts before their first word, with a row each."""
        self.exact = exact
        self._recordings = recordings
        self._playing: Recording[F] | None = None
        self._at: list[int] = []  # the place of each text
        self._num_written = 0  # since they were brought there

    @abstractmethod
    def plan(self, num_texts: int, num_beams: int) -> Plan[F] | None:
        """How the texts can be written; there are places for so many. None: not by recordings."""

    @abstractmethod
    def take_back(self, fixed: F, num_written: int) -> None:
        """Let `exact` have, for as many rows as it brought, what was kept since, so many words more.

        It is read where it is, so that it must be copied, as `select` does, before another text writes there.
        """

    @property
    def device(self) -> torch.device:
        """See Steps."""
        return self.exact.device

    @property
    def num_rows(self) -> int:
        """See Steps."""
        return self.exact.num_rows if self._playing is None else len(self._at) * self._playing.fixed.num_beams

    def logits(self) -> Tensor:
        """See Steps. Before the first word is written."""
        return self.exact.logits()

    def step(self, ids: Tensor) -> Tensor:
        """See Steps."""
        self._leave()
        return self.exact.step(ids)

    def select(self, rows: Sequence[int], rows_per_text: int) -> None:
        """See Steps."""
        self._leave()
        self.exact.select(rows, rows_per_text)

    def can_join(self, other: Steps) -> bool:
        """See Steps."""
        return isinstance(other, FixedSteps) and self.exact.can_join(other.exact)

    def join(self, other: "FixedSteps[F]") -> None:
        """See Steps."""
        self._leave()
        other._leave()
        self.exact.join(other.exact)

    def write(self, rows: Sequence[int], words: Sequence[int], totals: Sequence[Sequence[float]]) -> Tensor:
        """See Steps."""
        num_beams, num_texts = len(totals[0]), len(totals)
        if self._playing is None or self._has_too_many_places(num_texts):
            if len(rows) < self.num_rows or self._playing is not None:
                self.select(rows, num_beams)
                rows = range(len(rows))
            self._enter(num_texts, num_beams)
        if self._playing is None:
            return self.exact.write(rows, words, totals)
        fixed = self._playing.fixed
        self._at = [self._at[row // num_beams] for row in rows[::num_beams]]
        fixed.told.copy_(torch.tensor(self._placed(fixed, rows, words, totals)), non_blocking=True)
        self._playing.replay()
        self._num_written += 1
        if self._at == list(range(num_texts)):
            return fixed.best[:, :num_texts]
        return fixed.best.index_select(1, told(self.device, self._at))

    def _has_too_many_places(self, num_texts: int) -> bool:
        """Whether texts should move to a smaller recording: half of the places are empty, and there may be such a one."""
        assert self._playing is not None
        return 2 * num_texts <= self._playing.fixed.num_texts and self._recordings.makes_new

    def _placed(
        self, fixed: F, rows: Sequence[int], words: Sequence[int], totals: Sequence[Sequence[float]]
    ) -> list[list[float]]:
        """What the recording is to be told, of all places: rows of no text go on from themselves."""
        num_beams, num_rows = fixed.num_beams, fixed.told.shape[1]
        from_row, word, total = [float(row) for row in range(num_rows)], [0.0] * num_rows, [0.0] * num_rows
        for number, (row, own_word, own_total) in enumerate(zip(rows, words, chain.from_iterable(totals), strict=True)):
            first, beam = self._at[number // num_beams] * num_beams, number % num_beams
            from_row[first + beam] = first + row % num_beams
            word[first + beam], total[first + beam] = own_word, own_total
        return [from_row, word, total]

    def _enter(self, num_texts: int, num_beams: int) -> None:
        """Take a recording that fits the texts, if there is one, and bring them there."""
        plan = None if self._recordings.has_failed else self.plan(power_of_two(num_texts), num_beams)
        if plan is not None:
            self._playing = self._recordings.take(plan.key, plan.make, plan.load, self)
            self._at, self._num_written = list(range(num_texts)), 0

    def _leave(self) -> None:
        """Go on without a recording, with a copy of what the texts have kept."""
        if self._playing is None:
            return
        recording, self._playing = self._playing, None
        num_beams = recording.fixed.num_beams
        self.take_back(recording.fixed, self._num_written)
        self.exact.select([place * num_beams + beam for place in self._at for beam in range(num_beams)], num_beams)
        self._recordings.give_back(recording)


def power_of_two(number: int) -> int:
    """The next one: batches of few sizes are recorded."""
    return 1 << (number - 1).bit_length()


def rounded_up(number: int, multiple: int) -> int:
    """The next multiple, at least one: sizes that differ little share a recording."""
    return max(1, -(-number // multiple)) * multiple
