"""Words of a language model's texts, recorded: see `fixed`.

Adapters have no part in a word: what they bring, a prompt and an extra token, is read with the text and kept. Texts with layers
behind a tail, which are computed anew from all of their columns, are not recorded.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.families.base import NOTHING
from service.backbone.fixed import FixedSteps, FixedTexts, Plan, rounded_up
from service.backbone.opt import Columns, Decoding, ExtraToken, LanguageModel
from service.backbone.rows import KeysValues

COLUMNS, VALUES = 32, 4  # places for columns, and for what enters layers, come in multiples of so many


class Shape(NamedTuple):
    """What a recording is made for. `num_values`: of what enters layers; 0: no text has an extra token."""

    num_texts: int
    num_beams: int
    num_columns: int
    num_values: int
    tail: int | None


class FixedDecoding(Decoding):
    """A `Decoding` that grows by one token at a time, all of whose places are looked at; the next one's number is a tensor."""

    def __init__(self, model: LanguageModel, shape: Shape, device: torch.device) -> None:
        config, num_rows = model.config, shape.num_texts * shape.num_beams
        like = torch.empty(0, config.width, dtype=model.words.weight.dtype, device=device)
        self.model = model
        self.tail = shape.tail
        self._num_kept = config.layers
        self._inputs = None
        self.kept = KeysValues.empty(config.layers, num_rows, config.heads, shape.num_columns, like)
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.place = torch.ones(1, dtype=torch.long, device=device)
        extra = None
        if shape.num_values:
            extra = ExtraToken.absent(num_rows, config.layers, like)
            extra = replace(extra, values=like.new_zeros(num_rows, shape.num_values, config.width))
        self.columns = Columns(torch.zeros(num_rows, shape.num_columns, dtype=torch.bool, device=device), extra)

    def step(self, ids: Tensor) -> Tensor:
        """See Decoding."""
        hidden = self._append(ids[:, None], torch.ones_like(ids, dtype=torch.bool)[:, None], everything=False)
        self.place.add_(1)
        self.lengths.add_(1)
        return self.model.logits(hidden[:, -1])

    def _extend(self, mask: Tensor) -> Tensor:
        """See Decoding. Rows of no text, which know no end, stay at the last position."""
        self.columns.seen.index_fill_(1, self.place, True)
        return self.lengths[:, None].clamp(max=self.model.config.max_positions - 1)

    def _mask(self, index: int, size: int, new: int) -> Tensor:
        """See Decoding."""
        return self.columns.keys_mask(index)[:, None, None]

    def _keep(self, index: int, qkv: Tensor, new: int) -> tuple[Tensor, Tensor]:
        """See Decoding."""
        return self.kept.write_at(index, self.place, qkv[1:, :, :, -1:])


class FixedContinuations(FixedTexts):
    """Texts of a language model."""

    def __init__(self, model: LanguageModel, shape: Shape, device: torch.device | None) -> None:
        """`device` None: the model's."""
        device = device or model.words.weight.device
        super().__init__(shape.num_texts, shape.num_beams, device)
        self.decoding = FixedDecoding(model, shape, device)

    @property
    def changing(self) -> Sequence[Tensor]:
        """See FixedTexts."""
        own = self.decoding
        return own.kept.tensor, own.columns.seen, own.lengths, own.place

    @property
    def lasting(self) -> Sequence[Tensor]:
        """See FixedTexts."""
        extra = self.decoding.columns.extra
        return () if extra is None else (extra.values, extra.feature, extra.there)

    def write(self, rows: Tensor | None, words: Tensor) -> Tensor:
        """See FixedTexts. Of a text's rows all but keys and values is the same, whichever goes on."""
        if rows is not None:
            kept = self.decoding.kept.tensor
            kept.copy_(kept.index_select(2, rows))
        return self.decoding.step(words)

    def load(self, exact: Decoding) -> None:
        """Take texts over, from the first place on. What is in no text's places is set to zero: see `FixedAnswers.load`."""
        kept, seen, lengths, place = self.changing
        num_rows, end = exact.num_rows, exact.end
        kept.zero_()[:, :, :num_rows, :, :end] = exact.kept.tensor[:, :, :, :, :end]
        seen.zero_()[:num_rows, :end] = exact.columns.seen[:, :end]
        lengths[:num_rows] = exact.lengths
        place.fill_(end)
        extra, own = exact.columns.extra, self.decoding.columns.extra
        if own is not None and extra is not None:
            own.values[:num_rows, : extra.values.shape[1]] = extra.values
            own.feature.fill_(NOTHING)[:, :num_rows] = extra.feature
            own.there.zero_()[:, :num_rows] = extra.there


class OptFixedSteps(FixedSteps[FixedContinuations]):
    """Texts of a language model whose words are recordings'."""

    exact: Decoding

    def plan(self, num_texts: int, num_beams: int) -> Plan[FixedContinuations] | None:
        """See FixedSteps."""
        exact = self.exact
        if not exact.keeps_all:
            return None
        extra, num_columns = exact.columns.extra, exact.columns.seen.shape[1]
        num_values = 0 if extra is None else rounded_up(extra.values.shape[1], VALUES)
        shape = Shape(num_texts, num_beams, rounded_up(num_columns, COLUMNS), num_values, exact.tail)
        return Plan(shape, partial(FixedContinuations, exact.model, shape), lambda fixed: fixed.load(exact))

    def take_back(self, fixed: FixedContinuations, num_written: int) -> None:
        """See FixedSteps."""
        exact = self.exact
        num_rows, capacity = exact.num_rows, exact.columns.seen.shape[1]
        kept, seen, lengths, _ = fixed.changing
        exact.kept = KeysValues(kept[:, :, :num_rows, :, :capacity])
        exact.columns = replace(exact.columns, seen=seen[:num_rows, :capacity])
        exact.lengths = lengths[:num_rows]
        exact.end += num_written
