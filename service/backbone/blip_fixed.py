"""Words of a BLIP's answers, recorded: caches of fixed shape, at fixed places, and what writes a word in them.

A word of every text is one recording: each row goes on from the row its beam chose, the decoder reads one word, and the best
that follow are found. Texts that come in, and those that leave when half of the places are empty, change places through the
caches that fit them exactly (`blip_answers`), whose rules hold here too; who leaves otherwise just leaves a place that nobody
reads. Numbers are the same up to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.families.base import BackboneDims, Family, SlotView, views_of_rows
from adapters.families.copies import Copies, rank_for
from service.backbone.blip import Cache, Decoder, Memory
from service.backbone.blip_answers import BlipSteps
from service.backbone.decoding import Steps, best_next
from service.backbone.rows import KeysValues, told
from service.recordings import Recording, Recordings

WORDS, STATES = 16, 16  # places for words come in multiples of so many, places for states of a question too


class Shape(NamedTuple):
    """What a recording is made for. `num_slots`: 0 for the frozen backbone, 1 for a slot of all rows, or one for each text."""

    num_texts: int
    num_beams: int
    num_words: int
    num_states: int
    num_slots: int
    rank: int


@dataclass
class FixedCache:
    """A `Cache` whose places are all looked at, those that nobody has written to behind a mask; how many are filled is a tensor."""

    kept: KeysValues
    seen: Tensor
    length: Tensor
    max_positions: int

    @property
    def positions(self) -> Tensor:
        """[B] of each row's next token, which `mask` has told of; rows of no text, which know no end, stay at the last."""
        return (self.seen.sum(dim=1) - 1).clamp(max=self.max_positions - 1)

    def mask(self, tokens: int) -> Tensor:
        """[B, 1, 1, C] True where a row that appends a token looks."""
        assert tokens == 1, "words are written one by one. This is a bug."
        self.seen.index_fill_(1, self.length, True)
        return self.seen[:, None, None]

    def append(self, layer: int, new: Tensor) -> tuple[Tensor, Tensor]:
        """See Cache."""
        own = self.kept.tensor[layer].index_copy_(3, self.length, new)
        keys, values = own
        return keys, values

    def advance(self, tokens: int) -> None:
        """See Cache."""
        self.length.add_(tokens)


class FixedAnswers:
    """The memory of texts that are written together, and the work of writing a word of each.

    told  [3, T * b] which row each row goes on from, its next word, and its running sum with it
    best  [2, T, 2 * b + 1] see `best_next`
    """

    def __init__(
        self,
        decoder: Decoder,
        shape: Shape,
        family: Family | None,
        dims: BackboneDims | None,
        device: torch.device | None,
    ) -> None:
        """Without a family no slot adds anything. `device` None: the decoder's."""
        config, weight = decoder.body.config, decoder.bias
        device = device or weight.device
        like = torch.empty(0, config.width, dtype=weight.dtype, device=device)
        num_rows = shape.num_texts * shape.num_beams
        self._decoder = decoder
        self._shape = shape
        self.told = torch.zeros(3, num_rows, dtype=torch.float64, device=device)
        self.best = torch.zeros(2, shape.num_texts, 2 * shape.num_beams + 1, dtype=torch.float64, device=device)
        kept = KeysValues.empty(config.layers, num_rows, config.heads, shape.num_words, like)
        seen = torch.zeros(num_rows, shape.num_words, dtype=torch.bool, device=device)
        length = torch.zeros(1, dtype=torch.long, device=device)
        self._cache = FixedCache(kept, seen, length, config.max_positions)
        self._states = KeysValues.empty(config.layers, shape.num_texts, config.heads, shape.num_states, like)
        self._states_mask = torch.zeros(shape.num_texts, 1, 1, shape.num_states, dtype=torch.bool, device=device)
        keys, values = (list(self._states.tensor[:, part]) for part in (0, 1))
        self._memory = Memory(keys, values, self._states_mask)
        self._copies = None
        if family is not None and dims is not None:
            self._copies = Copies(family, dims, "cross", shape.rank, shape.num_slots, like, device)

    @property
    def num_bytes(self) -> int:
        """See Fixed."""
        tensors = (self.told, self.best, self._states.tensor, self._states_mask, *self.changing)
        own = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return own + (0 if self._copies is None else self._copies.num_bytes)

    @property
    def changing(self) -> Sequence[Tensor]:
        """See Fixed."""
        return self._cache.kept.tensor, self._cache.seen, self._cache.length

    @property
    def result(self) -> Tensor:
        """See Fixed: sums alone, as of words that are equally likely either may be the best."""
        return self.best[0]

    def run(self) -> None:
        """Write a word of every text."""
        rows, words = self.told[0].long(), self.told[1].long()
        if self._shape.num_beams > 1:
            for tensor, dim in ((self._cache.kept.tensor, 2), (self._cache.seen, 0)):
                tensor.copy_(tensor.index_select(dim, rows))
        terms = None if self._copies is None else self._copies.terms
        logits = self._decoder.step(words, self._cache, self._memory, terms)
        self.best.copy_(best_next(logits, self.told[2].float().view(-1, self._shape.num_beams)))

    def load(self, cache: Cache, memory: Memory, views: Sequence[SlotView]) -> None:
        """Take texts over, from the first place on: their rows, what they read, and the slots of each text.

        What is in no text's places is set to zero: behind a mask too, what is no number would make others none.
        """
        num_rows, num_texts, num_states = len(cache.seen), len(memory.mask), memory.mask.shape[-1]
        kept, seen, length = self.changing
        kept.zero_()[:, :, :num_rows, :, : cache.length] = cache.kept.tensor[:, :, :, :, : cache.length]
        seen.zero_()[:num_rows, : cache.length] = cache.seen[:, : cache.length]
        length.fill_(cache.length)
        self._states.tensor.zero_()
        own = self._states.tensor[:, :, :num_texts, :, :num_states]
        pairs = zip(memory.keys, memory.values, strict=True)
        torch._foreach_copy_(list(own.flatten(0, 1)), list(chain.from_iterable(pairs)))
        self._states_mask.zero_()[:num_texts, ..., :num_states] = memory.mask
        if self._copies is not None:
            self._copies.load(views)

    def cache(self, num_rows: int, length: int, capacity: int) -> Cache:
        """What the first rows have kept so far, as a cache with so many places. It is read where it is."""
        kept, seen, _ = self.changing
        own = KeysValues(kept[:, :, :num_rows, :, :capacity])
        return Cache(own, seen[:num_rows, :capacity], length, is_even=False)


class FixedSteps(Steps):
    """Answers whose words are recordings', where there is one that fits them; otherwise they are written without."""

    def __init__(self, exact: BlipSteps, recordings: Recordings, dims: BackboneDims | None) -> None:
        """`dims`: what the backbone's adapters fit; None for one that takes none."""
        self._exact = exact
        self._recordings = recordings
        self._dims = dims
        self._playing: Recording[FixedAnswers] | None = None
        self._at: list[int] = []  # the place of each text
        self._length = self._capacity = 0  # of what is kept: places that are filled, and places to be had

    @property
    def device(self) -> torch.device:
        """See Steps."""
        return self._exact.device

    @property
    def num_rows(self) -> int:
        """See Steps."""
        return self._exact.num_rows if self._playing is None else len(self._at) * self._exact.rows_per_text

    def logits(self) -> Tensor:
        """See Steps. Before the first word is written."""
        return self._exact.logits()

    def step(self, ids: Tensor) -> Tensor:
        """See Steps."""
        self._leave()
        return self._exact.step(ids)

    def select(self, rows: Sequence[int], rows_per_text: int) -> None:
        """See Steps."""
        self._leave()
        self._exact.select(rows, rows_per_text)

    def can_join(self, other: Steps) -> bool:
        """See Steps."""
        return isinstance(other, FixedSteps) and self._exact.can_join(other._exact)

    def join(self, other: "FixedSteps") -> None:
        """See Steps."""
        self._leave()
        other._leave()
        self._exact.join(other._exact)

    def write(self, rows: Sequence[int], words: Sequence[int], totals: Sequence[Sequence[float]]) -> Tensor:
        """See Steps."""
        num_beams, num_texts = len(totals[0]), len(totals)
        if self._playing is None or 2 * num_texts <= self._playing.fixed.best.shape[1]:
            if len(rows) < self.num_rows or self._playing is not None:
                self.select(rows, num_beams)
                rows = range(len(rows))
            self._enter()
        if self._playing is None:
            return self._exact.write(rows, words, totals)
        fixed = self._playing.fixed
        self._at = [self._at[row // num_beams] for row in rows[::num_beams]]
        fixed.told.copy_(torch.tensor(self._placed(rows, words, totals), dtype=torch.float64), non_blocking=True)
        self._playing.replay()
        self._length += 1
        if self._at == list(range(num_texts)):
            return fixed.best[:, :num_texts]
        return fixed.best.index_select(1, told(self.device, self._at))

    def _placed(
        self, rows: Sequence[int], words: Sequence[int], totals: Sequence[Sequence[float]]
    ) -> tuple[Sequence[float], ...]:
        """What the recording is to be told, of all places: rows of no text go on from themselves."""
        assert self._playing is not None
        num_beams, all_rows = len(totals[0]), self._playing.fixed.told.shape[1]
        from_row, word, total = list[float](range(all_rows)), [0.0] * all_rows, [0.0] * all_rows
        running = chain.from_iterable(totals)
        for number, (row, own_word, own_total) in enumerate(zip(rows, words, running, strict=True)):
            first, beam = self._at[number // num_beams] * num_beams, number % num_beams
            from_row[first + beam] = first + row % num_beams
            word[first + beam], total[first + beam] = own_word, own_total
        return from_row, word, total

    def _enter(self) -> None:
        """Take a recording that fits the texts, if there is one."""
        if self._recordings.has_failed:
            return
        exact = self._exact
        views = views_of_rows(exact.of_text, exact.num_texts)
        family = next((view.family for view in views if view.family is not None), None)
        if any(view.family not in (None, family) for view in views):
            return
        shared = all(view is views[0] for view in views)
        views = views[:1] if shared else views
        num_texts = 1 << (exact.num_texts - 1).bit_length()
        rank = 0
        if family is not None and self._dims is not None:
            rank = rank_for(family, self._dims, "cross", views)
        shape = Shape(
            num_texts,
            exact.rows_per_text,
            _up(exact.cache.kept.places, WORDS),
            _up(exact.memory.mask.shape[-1], STATES),
            0 if family is None else 1 if shared else num_texts,
            rank,
        )
        make = partial(FixedAnswers, exact.decoder, shape, family, self._dims)
        recording = self._recordings.take(shape, make, self)
        if recording is None:
            return
        recording.fixed.load(exact.cache, exact.memory, views)
        try:
            recording.prepare()
        except Exception as error:
            self._recordings.give_back(recording)
            self._recordings.failed(error)
            return
        self._playing, self._at = recording, list(range(exact.num_texts))
        self._length, self._capacity = exact.cache.length, exact.cache.kept.places
        exact.cache = self._kept()

    def _leave(self) -> None:
        """Go on without a recording, with a copy of what the texts have kept."""
        if self._playing is None:
            return
        exact, num_beams = self._exact, self._exact.rows_per_text
        rows = [place * num_beams + beam for place in self._at for beam in range(num_beams)]
        exact.cache = self._kept()
        exact.select(rows, num_beams)
        self._recordings.give_back(self._playing)
        self._playing = None

    def _kept(self) -> Cache:
        """What all rows that were brought have kept so far, where it is."""
        assert self._playing is not None
        return self._playing.fixed.cache(self._exact.num_rows, self._length, self._capacity)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
