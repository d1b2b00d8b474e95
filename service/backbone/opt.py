"""The frozen forward of an OPT with perceptual encoders: soft prompts before the text, and one extra token in the layers.

A batch's columns are [extra token | soft prompt | text]. The extra token enters a row at the first layer of the row's
schedule: at the input of each layer that a feature enters, it *is* that feature; at later layers it goes on with what it
became. It sees all of its row, later text included, and all see it. Prompt and text are causal. Neither the extra token
nor the prompt has a position; text positions count from the text's own start. Padding is masked everywhere.
Source: eP-ALM (Shukor et al., 2023), the authors' `models/opt.py` at batch size 1; OPT (Zhang et al., 2022).

Shapes: B rows, P prompt tokens, L text tokens, K columns, D width, E word width, V vocabulary.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.families.base import NOTHING, Adaptation, Injection, Prompt, Schedule
from service.backbone.config import LanguageModelConfig, OptConfig
from service.backbone.decoding import Steps
from service.backbone.encoders import Encoder, make_encoder
from service.backbone.linear import FrozenLinear, WordHead, pack_linears
from service.backbone.rows import KeysValues, join_padded, told
from service.backbone.vit import SelfAttention

FIRST_POSITION = 2  # of OPT's position table, whose first two rows are for padding
EXTRA = 0  # the column of the extra token


class OptLayer(nn.Module):
    """Pre-norm or post-norm transformer layer with ReLU."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.is_pre_norm = config.pre_norm
        self.attn = SelfAttention(config.width, config.heads)
        self.attn_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.fc1 = FrozenLinear(config.width, config.mlp_width)
        self.fc2 = FrozenLinear(config.mlp_width, config.width)
        self.mlp_norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values [3, B, H, L, d] of x [B, L, D]."""
        return self.attn.split(self.attn_norm(x) if self.is_pre_norm else x)

    def finish(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The layer's output [B, L, D] for the positions of x and q, which attend over k and v."""
        x = x + self.attn.attend(q, k, v, mask)
        if not self.is_pre_norm:
            x = self.attn_norm(x)
        x = x + self.fc2(self.fc1(self.mlp_norm(x) if self.is_pre_norm else x, "relu"))
        return x if self.is_pre_norm else self.mlp_norm(x)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.project(x)
        return self.finish(x, q, k, v, mask)


@dataclass(frozen=True)
class ExtraToken:
    """The extra token of a batch's rows, layer by layer.

    values   [B, N, D] what may enter
    feature  [layers, B] which of them enters, or NOTHING
    there    [layers, B] whether the token is there: from the first layer on that one enters
    tails    the first layer of each row from where on its token goes on by itself; the number of layers if none
    """

    values: Tensor
    feature: Tensor
    there: Tensor
    tails: tuple[int, ...]

    @classmethod
    def of(cls, injection: Injection, num_layers: int) -> Self:
        """From what an adaptation injects."""
        absent = Schedule(0, (NOTHING,) * num_layers)
        schedules = [schedule or absent for schedule in injection.schedules]
        device = injection.values.device
        feature = torch.tensor([schedule.layers for schedule in schedules], device=device).t()
        first = torch.tensor([schedule.first for schedule in schedules], device=device)
        there = torch.arange(num_layers, device=device)[:, None] >= first
        return cls(injection.values, feature, there, tuple(schedule.tail for schedule in schedules))

    @classmethod
    def absent(cls, num_rows: int, num_layers: int, like: Tensor) -> Self:
        """Rows that have none; `like` [.., D] has the width and type of values."""
        feature = torch.full((num_layers, num_rows), NOTHING, device=like.device)
        values = like.new_zeros(num_rows, 1, like.shape[-1])
        return cls(values, feature, torch.zeros_like(feature, dtype=torch.bool), (num_layers,) * num_rows)

    @property
    def tail(self) -> int | None:
        """The first layer from where on some row's token goes on by itself; None: no row's ever does."""
        tail = min(self.tails)
        return None if tail == len(self.feature) else tail

    def enter(self, layer: int, token: Tensor) -> Tensor:
        """The token [B, D] as it enters a layer: what is injected, where something is, else as it is."""
        feature = self.feature[layer]
        rows = torch.arange(len(feature), device=feature.device)
        entering = self.values[rows, feature.clamp(min=0)].to(token.dtype)
        return torch.where((feature != NOTHING)[:, None], entering, token)

    def join(self, other: Self) -> Self:
        """These rows' tokens, and another's behind them."""
        most = max(self.values.shape[1], other.values.shape[1])
        return replace(
            self,
            values=join_padded(self.values, other.values, 1, most),
            feature=torch.cat([self.feature, other.feature], dim=1),
            there=torch.cat([self.there, other.there], dim=1),
            tails=(*self.tails, *other.tails),
        )

    def select(self, rows: Sequence[int], index: Tensor) -> Self:
        """The tokens of these rows, in this order; `index` is the same on the device."""
        tails = tuple(self.tails[row] for row in rows)
        return replace(
            self, values=self.values[index], feature=self.feature[:, index], there=self.there[:, index], tails=tails
        )


@dataclass(frozen=True)
class Columns:
    """What the columns of a batch hold.

    seen   [B, K] True where a column holds a token of its row; column 0 belongs to the extra token and is False
    extra  the extra tokens; None: no row has one
    """

    seen: Tensor
    extra: ExtraToken | None

    def enter(self, layer: int, x: Tensor) -> Tensor:
        """x [B, K, D] with the extra tokens as they enter a layer."""
        if self.extra is None:
            return x
        return torch.cat([self.extra.enter(layer, x[:, EXTRA])[:, None], x[:, 1:]], dim=1)

    def keys_mask(self, layer: int, end: int | None = None) -> Tensor:
        """[B, K] True where a column may be looked at in a layer, of the first `end` columns."""
        if self.extra is None:
            return self.seen[:, :end]
        return torch.cat([self.extra.there[layer][:, None], self.seen[:, 1:end]], dim=1)

    def mask(self, layer: int, end: int | None = None) -> Tensor:
        """[B, 1, K, K] of a whole forward: prompt and text look back, the extra token at everything, all at themselves."""
        keys = self.keys_mask(layer, end)
        size = keys.shape[1]
        causal = torch.ones(size, size, dtype=torch.bool, device=keys.device).tril()
        causal[EXTRA] = True
        itself = torch.eye(size, dtype=torch.bool, device=keys.device)  # so that no row of padding sees nothing
        return ((causal & keys[:, None]) | itself)[:, None]

    def select(self, rows: Sequence[int], index: Tensor) -> Self:
        """The columns of these rows, in this order; `index` is the same on the device."""
        return replace(
            self, seen=self.seen[index], extra=None if self.extra is None else self.extra.select(rows, index)
        )


class LanguageModel(nn.Module):
    """OPT's decoder with its word head, tied to the word embeddings."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.word_width)
        self.positions = nn.Embedding(config.max_positions + FIRST_POSITION, config.width)
        self.head = WordHead()
        self.project_in = self.project_out = None
        if config.has_word_projection:
            self.project_in = FrozenLinear(config.word_width, config.width, bias=False)
            self.project_out = FrozenLinear(config.width, config.word_width, bias=False)
        self.layers = nn.ModuleList(OptLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps) if config.final_norm else None

    def widen(self, words: Tensor) -> Tensor:
        """Word embeddings or soft prompts [B, L, E] in the model's own width [B, L, D]."""
        return words if self.project_in is None else self.project_in(words)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """[B, L, D] of ids [B, L] at positions [B, L] that count from each text's start."""
        return self.widen(self.words(ids)) + self.positions(positions + FIRST_POSITION)  # type: ignore[no-any-return]

    def logits(self, h: Tensor) -> Tensor:
        """Word logits [..., V] of hidden states [..., D]."""
        if self.norm is not None:
            h = self.norm(h)
        if self.project_out is not None:
            h = self.project_out(h)
        return self.head(h, self.words.weight)  # type: ignore[no-any-return]

    def arrange(
        self, ids: Tensor, mask: Tensor, prompt: Prompt | None, injection: Injection | None
    ) -> tuple[Tensor, Columns]:
        """What enters the first layer, [B, 1 + P + L, D], of texts ids [B, L] with mask [B, L] (True: a token).

        Texts are padded on the right.
        """
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        x, seen = self.embed(ids, positions), mask
        if prompt is not None:
            lengths = torch.tensor(prompt.lengths, device=ids.device)
            present = torch.arange(prompt.embeddings.shape[1], device=ids.device)[None] < lengths[:, None]
            x = torch.cat([self.widen(prompt.embeddings.to(x.dtype)), x], dim=1)
            seen = torch.cat([present, seen], dim=1)
        x = functional.pad(x, (0, 0, 1, 0))  # the extra token, nothing before its first layer
        extra = None if injection is None else ExtraToken.of(injection, self.config.layers)
        return x, Columns(functional.pad(seen, (1, 0), value=False), extra)

    def run(self, x: Tensor, columns: Columns, first: int = 0) -> Tensor:
        """Hidden states [B, K, D] behind the layers from `first` on, of x [B, K, D], the first columns of a batch."""
        for index in range(first, len(self.layers)):
            x = self.layers[index](columns.enter(index, x), columns.mask(index, x.shape[1]))
        return x

    def layer(self, index: int) -> OptLayer:
        """One of the layers."""
        layer = self.layers[index]
        assert isinstance(layer, OptLayer)
        return layer


class Decoding(Steps):
    """Texts that grow by a token at a time, or by a text, with what does not change kept.

    Where a row's extra token goes on by itself it changes with every new token, as it sees them all: from the first such
    layer on, the *tail*, it is computed anew each step. Keys and values of prompt and text are kept up to and including
    that layer, since what enters it is causal; from the layer behind it on every position may have changed, and is
    computed anew too. Without a tail every layer is kept.

    kept     keys and values of the layers, as far as they are
    columns  what the columns hold; the first `end` are in use
    lengths  [B] tokens of each text
    """

    def __init__(
        self,
        model: LanguageModel,
        ids: Tensor,
        mask: Tensor,
        prompt: Prompt | None,
        injection: Injection | None,
        *,
        max_new_tokens: int,
    ) -> None:
        """Reads texts ids [B, L] with mask [B, L] (True: a token, at least one in each row), padded on the right."""
        self.model = model
        x, columns = model.arrange(ids, mask, prompt, injection)
        self.tail = None if columns.extra is None else columns.extra.tail
        self._num_kept = model.config.layers if self.tail is None else self.tail + 1
        self.columns = replace(columns, seen=functional.pad(columns.seen, (0, max_new_tokens), value=False))
        self.end = x.shape[1]  # of the columns in use
        self.lengths = mask.sum(dim=1)
        places = self.columns.seen.shape[1]
        self.kept = KeysValues.empty(self._num_kept, len(x), model.config.heads, places, x)
        self._inputs: Tensor | None = None  # what entered the tail
        self.as_read = self._read(x)[:, -ids.shape[1] :]  # hidden states [B, L, D] of the texts given, `select` aside
        self._last = _last_of(self.as_read, self.lengths)

    @property
    def device(self) -> torch.device:
        """See Steps."""
        return self._last.device

    @property
    def num_rows(self) -> int:
        """See Steps."""
        return len(self._last)

    @property
    def rereads(self) -> bool:
        """Whether what is appended changes the hidden states of what was there."""
        return self.tail is not None

    def logits(self) -> Tensor:
        """Logits [B, V] of what follows the texts as they are now."""
        return self.model.logits(self._last)

    def step(self, ids: Tensor) -> Tensor:
        """Append a token to every row, ids [B]; logits [B, V] of what follows."""
        is_token = torch.ones_like(ids, dtype=torch.bool)[:, None]
        self._last = self._append(ids[:, None], is_token, everything=not self.keeps_all)[:, -1]
        return self.logits()

    @property
    def keeps_all(self) -> bool:
        """Whether all that a token's step reads is kept: no layer is behind a tail."""
        return self._num_kept == self.model.config.layers

    def append(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Append a text to every row, ids [B, L] with mask [B, L] (True: a token, at least one), padded on the right.

        Hidden states [B, L, D] of the new columns; with those of all columns before them, where it `rereads`.
        """
        hidden = self._append(ids, mask, everything=True)
        self._last = _last_of(hidden[:, -ids.shape[1] :], mask.sum(dim=1))
        return hidden

    def fork(self, rows: Sequence[int], tokens: int) -> Self:
        """A decoding of these rows, each perhaps many times, with room for so many tokens; this one stays as it is."""
        fork, end = copy(self), self.end
        fork.kept = self.kept.fork(fork._select_columns(rows), end, tokens)
        seen = functional.pad(fork.columns.seen[:, :end], (0, tokens))
        fork.columns = replace(fork.columns, seen=seen)
        if fork._inputs is not None:
            fork._inputs = functional.pad(fork._inputs[:, :end], (0, 0, 0, tokens))
        return fork

    def select(self, rows: Sequence[int], rows_per_text: int = 1) -> None:
        """Keep these rows, in this order, some perhaps more than once (beams that continue others)."""
        self.kept = self.kept.select(self._select_columns(rows))

    def _select_columns(self, rows: Sequence[int]) -> Tensor:
        """Keep these rows of all but keys and values; the rows on the device."""
        index = told(self._last.device, rows)
        self.columns = self.columns.select(rows, index)
        self.lengths, self._last = self.lengths[index], self._last[index]
        if self._inputs is not None:
            self._inputs = self._inputs.index_select(0, index)
        return index

    def can_join(self, other: Self) -> bool:
        """Whether another's rows may be taken in: as much of them is kept."""
        return other.model is self.model and other.tail == self.tail

    def join(self, other: Self) -> None:
        """Take another's rows behind one's own. Columns that hold no token of any row are given up."""
        for own in (self, other):
            own._close_up()
        end = max(self.end, other.end)
        size = end + max(own.columns.seen.shape[1] - own.end for own in (self, other))
        self.columns = Columns(join_padded(self.columns.seen, other.columns.seen, 1, size), self._join_extra(other))
        self.kept = self.kept.join(other.kept, size)
        if self._inputs is not None and other._inputs is not None:
            self._inputs = join_padded(self._inputs, other._inputs, 1, size)
        self.lengths, self._last = torch.cat([self.lengths, other.lengths]), torch.cat([self._last, other._last])
        self.end = end

    def _join_extra(self, other: Self) -> ExtraToken | None:
        pair = (self.columns.extra, other.columns.extra)
        if all(extra is None for extra in pair):
            return None
        num_layers = self.model.config.layers
        first, second = (
            ExtraToken.absent(len(own.lengths), num_layers, own._last) if extra is None else extra
            for own, extra in zip((self, other), pair, strict=True)
        )
        return first.join(second)

    def _close_up(self) -> None:
        """Give up the columns in use that hold no token of any row."""
        used = self.columns.seen.any(dim=0)
        used[EXTRA] = True
        used[self.end :] = True
        if bool(used.all()):
            return
        columns = used.nonzero()[:, 0]
        self.end -= len(used) - len(columns)
        self.columns = replace(self.columns, seen=self.columns.seen[:, columns])
        self.kept = self.kept.keep(columns)
        if self._inputs is not None:
            self._inputs = self._inputs.index_select(1, columns)

    # --- the texts as they are given ---------------------------------------------------------------------

    def _read(self, x: Tensor) -> Tensor:
        """Run all layers once and keep what does not change; hidden states [B, K, D]."""
        model, columns, end = self.model, self.columns, self.end
        room = (0, 0, 0, columns.seen.shape[1] - end)
        for index in range(model.config.layers):
            layer, x = model.layer(index), columns.enter(index, x)
            q, k, v = qkv = layer.project(x)
            if index < self._num_kept:
                self.kept.write(index, 0, qkv[1:])
            if index == self.tail:
                self._inputs = functional.pad(x, room)
            x = layer.finish(x, q, k, v, columns.mask(index, end))
        return x

    # --- more tokens -------------------------------------------------------------------------------------

    def _append(self, ids: Tensor, mask: Tensor, *, everything: bool) -> Tensor:
        """Hidden states [B, L, D] of new tokens ids [B, L], mask [B, L]; from a tail on, if wanted, of all columns."""
        model, new, tail = self.model, ids.shape[1], self.tail
        x = model.embed(ids, self._extend(mask))
        for index in range(self._num_kept if tail is None else tail - 1):
            x = self._append_layer(index, x, new)
        return x if tail is None else self._append_tail(tail, x, new, everything=everything)

    def _extend(self, mask: Tensor) -> Tensor:
        """Make columns of new tokens, mask [B, L]; their positions [B, L], any where there is no token."""
        new = mask.shape[1]
        start, self.end = self.end, self.end + new
        self.columns.seen[:, start : self.end] = mask
        positions = self.lengths[:, None] + torch.arange(new, device=mask.device)
        self.lengths = self.lengths + mask.sum(dim=1)
        return positions * mask  # padding may stand where there is no position any more

    def _mask(self, index: int, size: int, new: int) -> Tensor:
        """[B, 1, size, K] of the newest columns and, if that is one more, of the extra token before them."""
        keys = self.columns.keys_mask(index, self.end)[:, None, None]
        if new == 1:
            return keys
        back = torch.ones(size, self.end, dtype=torch.bool, device=keys.device).tril(self.end - size)
        back[: size - new] = True
        return back & keys

    def _keep(self, index: int, qkv: Tensor, new: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, all so far, after adding those of the newest columns."""
        return self.kept.write(index, self.end - new, qkv[1:, :, :, -new:])

    def _append_layer(self, index: int, x: Tensor, new: int) -> Tensor:
        """A layer for the newest tokens, or for these with the extra token before them, x [B, new or 1 + new, D]."""
        layer = self.model.layer(index)
        qkv = layer.project(x)
        return layer.finish(x, qkv[0], *self._keep(index, qkv, new), self._mask(index, x.shape[1], new))

    def _append_tail(self, tail: int, x: Tensor, new: int, *, everything: bool) -> Tensor:
        """The layer before the tail, with the extra token; the tail; and whatever is behind it."""
        model, columns = self.model, self.columns
        x = columns.enter(tail - 1, functional.pad(x, (0, 0, 1, 0)))
        x = columns.enter(tail, self._append_layer(tail - 1, x, new))
        layer = model.layer(tail)
        qkv = layer.project(x)
        self.kept.write(tail, EXTRA, qkv[1:, :, :, :1])
        q, (keys, values) = qkv[0], self._keep(tail, qkv, new)
        if self._inputs is not None:
            self._inputs[:, EXTRA], self._inputs[:, self.end - new : self.end] = x[:, EXTRA], x[:, 1:]
        if not everything:
            return layer.finish(x[:, 1:], q[:, :, 1:], keys, values, self._mask(tail, new, new))
        assert self._inputs is not None, "a tail's inputs are kept where they are read. This is a bug."
        end = self.end
        whole = self._inputs[:, :end]
        return model.run(
            layer.finish(whole, layer.project(whole)[0], keys, values, columns.mask(tail, end)), columns, tail + 1
        )


def _last_of(hidden: Tensor, lengths: Tensor) -> Tensor:
    """[B, D] of the last token of each text, hidden [B, L, D] with lengths [B]."""
    return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]


class Opt(nn.Module):
    """One frozen OPT and its encoders. One that its config does not name is None.

    Part names, which are also the names of their files and digests: language_model, vit, timesformer, ast.
    """

    def __init__(self, config: OptConfig) -> None:
        super().__init__()
        self.config = config
        self.language_model = LanguageModel(config.language_model)
        for name, encoder in config.encoders.items():
            self.add_module(name, make_encoder(encoder))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.language_model.words.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of the weights, hence of every hidden state."""
        return self.language_model.words.weight.dtype

    def pack(self) -> None:
        """Lay the weights out for serving on this machine; see `adapters.products`. They keep their values."""
        pack_linears(self)
        self.language_model.head.pack(self.language_model.words.weight)

    def encoder(self, name: str) -> Encoder:
        """An encoder by name."""
        encoder = getattr(self, name, None)
        assert isinstance(encoder, Encoder), f"the caller checked that the backbone has {name}. This is a bug."
        return encoder

    def perceive(self, encoder: str, inputs: Tensor) -> Tensor:
        """An encoder's first token after each of its blocks, [B, blocks, d], of pictures, clips or spectrograms."""
        return self.encoder(encoder).first_tokens(inputs.to(self.dtype))

    def score(
        self, ids: Tensor, mask: Tensor, features: Sequence[Tensor | None], adaptation: Adaptation | None
    ) -> Tensor:
        """Teacher forcing: logits [B, L, V] of texts ids [B, L], mask [B, L] (True: a token), padded on the right.

        `features` holds each row's encoder states [blocks, d], or None.
        """
        prompt = None if adaptation is None else adaptation.prompt(len(ids))
        injection = None if adaptation is None else adaptation.inject(features)
        x, columns = self.language_model.arrange(ids, mask, prompt, injection)
        hidden = self.language_model.run(x, columns)
        return self.language_model.logits(hidden[:, -ids.shape[1] :])

    def decode(
        self,
        ids: Tensor,
        mask: Tensor,
        features: Sequence[Tensor | None],
        adaptation: Adaptation | None,
        *,
        max_new_tokens: int,
    ) -> Decoding:
        """Texts as for `score`, ready to grow by at most so many tokens."""
        prompt = None if adaptation is None else adaptation.prompt(len(ids))
        injection = None if adaptation is None else adaptation.inject(features)
        return Decoding(self.language_model, ids, mask, prompt, injection, max_new_tokens=max_new_tokens)
