"""Words of a BLIP's answers, recorded: see `fixed`. Slots are copied to where the recording reads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.families.base import BackboneDims, SlotView, views_of_rows
from adapters.families.copies import Slots, slots_of
from service.backbone.blip import Cache, Decoder, Memory
from service.backbone.blip_answers import BlipSteps
from service.backbone.fixed import FixedSteps, FixedTexts, Plan, rounded_up
from service.backbone.rows import KeysValues
from service.recordings import Recordings

WORDS, STATES = 16, 16  # places for words, and for states of a question, come in multiples of so many


class Shape(NamedTuple):
    """What a recording is made for."""

    num_texts: int
    num_beams: int
    num_words: int
    num_states: int
    slots: Slots


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
        return self.kept.write_at(layer, self.length, new)

    def advance(self, tokens: int) -> None:
        """See Cache."""
        self.length.add_(tokens)


class FixedAnswers(FixedTexts):
    """Answers of a BLIP's decoder."""

    def __init__(self, decoder: Decoder, shape: Shape, dims: BackboneDims | None, device: torch.device | None) -> None:
        """`device` None: the decoder's."""
        config, weight = decoder.body.config, decoder.bias
        device = device or weight.device
        super().__init__(shape.num_texts, shape.num_beams, device)
        like = torch.empty(0, config.width, dtype=weight.dtype, device=device)
        num_rows = shape.num_texts * shape.num_beams
        self._decoder = decoder
        kept = KeysValues.empty(config.layers, num_rows, config.heads, shape.num_words, like)
        seen = torch.zeros(num_rows, shape.num_words, dtype=torch.bool, device=device)
        length = torch.zeros(1, dtype=torch.long, device=device)
        self._cache = FixedCache(kept, seen, length, config.max_positions)
        self._states = KeysValues.empty(config.layers, shape.num_texts, config.heads, shape.num_states, like)
        self._states_mask = torch.zeros(shape.num_texts, 1, 1, shape.num_states, dtype=torch.bool, device=device)
        keys, values = (list(self._states.tensor[:, part]) for part in (0, 1))
        self._memory = Memory(keys, values, self._states_mask)
        self._copies = shape.slots.make(dims, "cross", like)

    @property
    def changing(self) -> Sequence[Tensor]:
        """See FixedTexts."""
        return self._cache.kept.tensor, self._cache.seen, self._cache.length

    @property
    def lasting(self) -> Sequence[Tensor]:
        """See FixedTexts."""
        copies = () if self._copies is None else self._copies.tensors
        return self._states.tensor, self._states_mask, *copies

    def write(self, rows: Tensor | None, words: Tensor) -> Tensor:
        """See FixedTexts. What a text's rows have seen is the same, whichever goes on."""
        if rows is not None:
            kept = self._cache.kept.tensor
            kept.copy_(kept.index_select(2, rows))
        terms = None if self._copies is None else self._copies.terms
        return self._decoder.step(words, self._cache, self._memory, terms)

    def load(self, cache: Cache, memory: Memory, views: Sequence[SlotView]) -> None:
        """Take texts over, from the first place on: their rows, what they read, and the slots of each text, or of all.

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


class BlipFixedSteps(FixedSteps[FixedAnswers]):
    """Answers of a BLIP whose words are recordings'."""

    exact: BlipSteps

    def __init__(self, exact: BlipSteps, recordings: Recordings, dims: BackboneDims | None) -> None:
        """`dims`: what the backbone's adapters fit; None for one that takes none."""
        super().__init__(exact, recordings)
        self._dims = dims

    def plan(self, num_texts: int, num_beams: int) -> Plan[FixedAnswers] | None:
        """See FixedSteps."""
        exact, dims = self.exact, self._dims
        found = slots_of(views_of_rows(exact.of_text, exact.num_texts), num_texts, dims, "cross")
        if found is None:
            return None
        slots, views = found
        num_words = rounded_up(exact.cache.kept.places, WORDS)
        num_states = rounded_up(exact.memory.mask.shape[-1], STATES)
        shape = Shape(num_texts, num_beams, num_words, num_states, slots)
        make = partial(FixedAnswers, exact.decoder, shape, dims)
        return Plan(shape, make, lambda fixed: fixed.load(exact.cache, exact.memory, views))

    def take_back(self, fixed: FixedAnswers, num_written: int) -> None:
        """See FixedSteps."""
        cache = self.exact.cache
        self.exact.cache = fixed.cache(self.exact.num_rows, cache.length + num_written, cache.kept.places)
