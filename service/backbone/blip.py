"""The frozen forward of a BLIP: vision tower, text encoder, text decoder, projections and matching head.

Weights come from elsewhere; the computation is here: scaled-dot-product attention, true masks everywhere, any
resolution, and an `Adaptation` as an argument of every forward. Nothing here holds state between calls.
Source: BLIP (Li et al., 2022), the authors' `vit.py` and `med.py` with UniAdapter's call sites.

Shapes: B rows, F frames, P tokens of a picture (CLS first), L text tokens, M memory tokens, D width, H heads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.families.base import Adaptation, Site, Stack, Terms
from service.backbone.config import BlipConfig, TextConfig
from service.backbone.linear import FrozenLinear, WordHead, pack_linears
from service.backbone.rows import KeysValues, join_padded
from service.backbone.vit import Mlp, SelfAttention, VisionTower, merge_heads, split_heads


class CrossAttention(nn.Module):
    """Attention of text positions over a memory of another width."""

    def __init__(self, width: int, memory_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = FrozenLinear(width, width)
        self.key = FrozenLinear(memory_width, width)
        self.value = FrozenLinear(memory_width, width)
        self.proj = FrozenLinear(width, width)

    def remember(self, y: Tensor, terms: tuple[Tensor, Tensor] | None, factors: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, M, d] of memory y [B, M, D].

        `terms` are added before the split into heads, then `factors` [B, M] scale the complete keys.
        """
        k, v = self.key(y), self.value(y)
        if terms is not None:
            k, v = k + terms[0], v + terms[1]
        if factors is not None:  # these keys are nobody else's, so they are scaled where they are; gradients need both
            k = k * factors.unsqueeze(-1) if torch.is_grad_enabled() else k.mul_(factors.unsqueeze(-1))
        return split_heads(k, self.heads), split_heads(v, self.heads)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor, readers: Sequence[int] | None) -> Tensor:
        """x [R, L, D] over B memories, the first read by the first `readers[0]` rows and so on; None: by equally many."""
        q = split_heads(self.query(x), self.heads)  # [R, H, L, d]
        if readers is None or len(set(readers)) == 1:
            out = _attend_shared(q, k, v, mask)
        else:
            own = zip(q.split(list(readers)), k.split(1), v.split(1), mask.split(1), strict=True)
            out = torch.cat([_attend_shared(*one) for one in own])
        return self.proj(merge_heads(out))  # type: ignore[no-any-return]


def _attend_shared(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [B*G, H, L, d] over k and v [B, H, M, d], each shared by the G rows that follow one another."""
    length, shared = q.shape[2], len(q) // len(k)
    if shared == 1:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    q = q.unflatten(0, (-1, shared)).transpose(1, 2).flatten(2, 3)  # [B, H, G*L, d]: further query positions
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    rows: Tensor = out.unflatten(2, (shared, length)).transpose(1, 2).flatten(0, 1)  # [B*G, H, L, d]
    return rows


@dataclass
class Memory:
    """What a stack's cross-attention reads, projected once: keys and values [B, H, M, d] per layer, mask [B, 1, 1, M].

    `readers` tells how many rows, which follow one another, read each memory; None: equally many.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor
    readers: tuple[int, ...] | None = None

    def select(self, rows: Tensor) -> "Memory":
        """The memories of these rows, in this order, each with as many readers as another."""
        return Memory([k[rows] for k in self.keys], [v[rows] for v in self.values], self.mask[rows])

    def join(self, other: "Memory") -> "Memory":
        """These memories, and another's behind them."""
        length = max(self.mask.shape[-1], other.mask.shape[-1])
        pairs = (zip(self.keys, other.keys, strict=True), zip(self.values, other.values, strict=True))
        keys, values = ([join_padded(a, b, 2, length) for a, b in own] for own in pairs)
        return Memory(keys, values, join_padded(self.mask, other.mask, 3, length))


@dataclass
class Cache:
    """Self-attention keys and values of B rows, of whose places the first `length` are filled.

    `seen` [B, capacity] tells where a row has written; rows that came in later have places of others' before them.
    """

    kept: KeysValues
    seen: Tensor
    length: int = 0
    is_even: bool = True  # every row has written to every place so far

    @property
    def positions(self) -> Tensor:
        """[B] of each row's next token: how many it has written."""
        return self.seen[:, : self.length].sum(dim=1)

    def mask(self, tokens: int) -> Tensor | None:
        """[B, 1, 1, length + tokens] True where a row that appends so many tokens looks; None: everywhere."""
        self.seen[:, self.length : self.length + tokens] = True
        return None if self.is_even else self.seen[:, None, None, : self.length + tokens]

    def text_mask(self, written: Tensor) -> Tensor:
        """[B, 1, L, length + L] True where each token of a text looks that is appended, written [B, L] (True: a token)."""
        tokens = written.shape[1]
        end = self.length + tokens
        self.seen[:, self.length : end] = written
        self.is_even = False
        back = torch.ones(tokens, end, dtype=torch.bool, device=written.device).tril(self.length)
        return back & self.seen[:, None, None, :end]

    def append(self, layer: int, new: Tensor) -> tuple[Tensor, Tensor]:
        """Write this step's keys and values [2, B, H, L, d] behind the filled part; all so far. `advance` ends the step."""
        return self.kept.write(layer, self.length, new)

    def advance(self, tokens: int) -> None:
        """End a step that appended so many tokens to every layer."""
        self.length += tokens

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order (beams that continue others)."""
        self.kept = self.kept.select(rows)
        self.seen = self.seen[rows]

    def fork(self, rows: Tensor, tokens: int) -> "Cache":
        """A cache of these rows, each perhaps many times, with room for so many more tokens; this one stays as it is."""
        seen = functional.pad(self.seen[rows, : self.length], (0, tokens))
        return Cache(self.kept.fork(rows, self.length, tokens), seen, self.length, self.is_even)

    def join(self, other: "Cache") -> None:
        """Take another's rows behind one's own. Places that nobody has written to are given up."""
        for cache in (self, other):
            cache._close_up()
        length = max(self.length, other.length)
        capacity = length + max(cache.seen.shape[1] - cache.length for cache in (self, other))
        self.is_even = self.is_even and other.is_even and self.length == other.length
        self.kept = self.kept.join(other.kept, capacity)
        self.seen = join_padded(self.seen, other.seen, 1, capacity)
        self.length = length

    def _close_up(self) -> None:
        """Give up the filled places that no row here has written to."""
        used = self.seen.any(dim=0)
        used[self.length :] = True
        if bool(used.all()):
            return
        places = used.nonzero()[:, 0]
        self.length -= self.seen.shape[1] - len(places)
        self.kept = self.kept.keep(places)
        self.seen = self.seen[:, places]


class WordCache(Protocol):
    """Where a text stack keeps what it has read: a `Cache`, or one of fixed shape."""

    @property
    def positions(self) -> Tensor:
        """[B] of each row's next token."""

    def mask(self, tokens: int) -> Tensor | None:
        """[B, 1, 1, C] True where a row that appends so many tokens looks; None: everywhere. Asked for before they are read."""

    def append(self, layer: int, new: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a layer's new keys and values [2, B, H, L, d]; all so far, as far as the mask goes."""

    def advance(self, tokens: int) -> None:
        """End a step that appended so many tokens to every layer."""


class TextLayer(nn.Module):
    """Post-norm BERT layer. With a memory it cross-attends and adds the cross site's terms; without, the text site's."""

    def __init__(self, config: TextConfig, stack: Stack, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.sites = {role: Site(stack, layer, role) for role in ("text", "cross")}
        eps = config.norm_eps
        self.attention = SelfAttention(config.width, config.heads)
        self.attention_norm = nn.LayerNorm(config.width, eps=eps)
        self.crossattention = CrossAttention(config.width, config.memory_width, config.heads)
        self.crossattention_norm = nn.LayerNorm(config.width, eps=eps)
        self.mlp = Mlp(config.width, config.mlp_width)
        self.mlp_norm = nn.LayerNorm(config.width, eps=eps)

    def forward(
        self, h: Tensor, mask: Tensor | None, adaptation: Terms | None, memory: Memory | None, cache: WordCache | None
    ) -> Tensor:
        q, k, v = qkv = self.attention.split(h)
        if cache is not None:
            k, v = cache.append(self.layer, qkv[1:])
        u = self.attention_norm(self.attention.attend(q, k, v, mask) + h)
        if memory is None:
            out = self._feed_forward(u)
            return out if adaptation is None else adaptation.add(self.sites["text"], u, out)
        keys, values = memory.keys[self.layer], memory.values[self.layer]
        read = self.crossattention(u, keys, values, memory.mask, memory.readers)
        w = self.crossattention_norm(read + u)
        out = self._feed_forward(w)
        return out if adaptation is None else adaptation.add(self.sites["cross"], w, out, before=u)

    def _feed_forward(self, u: Tensor) -> Tensor:
        return self.mlp_norm(self.mlp(u) + u)  # type: ignore[no-any-return]


class TextEmbeddings(nn.Module):
    """Words and absolute positions, then LayerNorm; no token types."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.max_positions, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, ids: Tensor, start: Tensor | None = None) -> Tensor:
        """[B, L, D] of ids [B, L] whose first tokens stand at positions `start` [B]; None: at 0."""
        if start is None:
            return self.norm(self.word(ids) + self.position.weight[: ids.shape[1]])  # type: ignore[no-any-return]
        positions = start[:, None] + torch.arange(ids.shape[1], device=ids.device)
        return self.norm(self.word(ids) + self.position(positions))  # type: ignore[no-any-return]


class TextStack(nn.Module):
    """The text encoder, with or without cross-attention, and the body of the decoder."""

    def __init__(self, config: TextConfig, stack: Stack) -> None:
        super().__init__()
        self.config = config
        self.stack: Stack = stack
        self.embeddings = TextEmbeddings(config)
        self.layers = nn.ModuleList(TextLayer(config, stack, layer) for layer in range(config.layers))

    def remember(
        self, y: Tensor, y_mask: Tensor, adaptation: Adaptation | None, factors: Tensor | None = None
    ) -> Memory:
        """Project a memory y [B, M, D] with mask [B, M] (True: seen) for every layer.

        `factors` [B, M] scale the keys (frame-aware attention); 1 leaves a token as it is.
        """
        terms = None if adaptation is None else adaptation.memory(self.stack, y)
        pairs = [layer.crossattention.remember(y, terms, factors) for layer in self.text_layers()]
        return Memory([k for k, _ in pairs], [v for _, v in pairs], y_mask[:, None, None, :])

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None,
        adaptation: Terms | None = None,
        memory: Memory | None = None,
        cache: WordCache | None = None,
    ) -> Tensor:
        """Hidden states [B, L, D] of ids [B, L]; `mask` broadcasts to [B, 1, L, K], True where a key is seen."""
        h = self.embeddings(ids, None if cache is None else cache.positions)
        for layer in self.layers:
            h = layer(h, mask, adaptation, memory, cache)
        if cache is not None:
            cache.advance(ids.shape[1])
        return h  # type: ignore[no-any-return]

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache for so many rows and tokens."""
        weight = self.embeddings.word.weight
        seen = torch.zeros(rows, capacity, dtype=torch.bool, device=weight.device)
        return Cache(KeysValues.empty(self.config.layers, rows, self.config.heads, capacity, weight), seen)

    def text_layers(self) -> Iterator[TextLayer]:
        """The layers, in order."""
        for layer in self.layers:
            assert isinstance(layer, TextLayer)
            yield layer


class Decoder(nn.Module):
    """A causal TextStack with a word head tied to its embeddings."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.body = TextStack(config, "decoder")
        self.transform = FrozenLinear(config.width, config.width)
        self.transform_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.words = WordHead()

    def logits(self, h: Tensor) -> Tensor:
        """Word logits [..., V] of hidden states [..., D]."""
        h = self.transform_norm(self.transform(h, "gelu"))
        return self.words(h, self.body.embeddings.word.weight, self.bias)  # type: ignore[no-any-return]

    def pack(self) -> None:
        """See `Blip.pack`."""
        self.words.pack(self.body.embeddings.word.weight)

    def score(self, ids: Tensor, mask: Tensor, memory: Memory, adaptation: Adaptation | None) -> Tensor:
        """Teacher forcing: logits [B, L, V] of ids [B, L] with padding mask [B, L] (True: a token)."""
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        seen = causal[None, None] & mask[:, None, None, :]
        return self.logits(self.body(ids, seen, adaptation, memory))

    def step(self, ids: Tensor, cache: WordCache, memory: Memory, adaptation: Terms | None) -> Tensor:
        """Next-word logits [B, V] after appending one token per row, ids [B], to the cache."""
        h = self.body(ids[:, None], cache.mask(1), adaptation, memory, cache)
        return self.logits(h[:, -1])

    def append(self, ids: Tensor, mask: Tensor, cache: Cache, memory: Memory, adaptation: Adaptation | None) -> Tensor:
        """Next-word logits [N, V] behind every token, row by row, of texts that are appended to the cache's rows.

        ids [B, L] with mask [B, L] (True: a token), padded on the right.
        """
        return self.logits(self.body(ids, cache.text_mask(mask), adaptation, memory, cache)[mask])


class Blip(nn.Module):
    """One frozen BLIP. A part its config does not name is None.

    Part names, which are also the names of their files and digests: vision, text_encoder, decoder, vision_proj,
    text_proj, itm_head.
    """

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.text_encoder = TextStack(config.text_encoder, "text") if config.text_encoder else None
        self.decoder = Decoder(config.decoder) if config.decoder else None
        self.vision_proj = self.text_proj = self.itm_head = None
        if config.embed_dim is not None and config.text_encoder is not None:
            self.vision_proj = nn.Linear(config.vision.width, config.embed_dim)
            self.text_proj = nn.Linear(config.text_encoder.width, config.embed_dim)
            self.itm_head = nn.Linear(config.text_encoder.width, 2)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vision.cls_token.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of the weights, hence of every hidden state."""
        return self.vision.cls_token.dtype

    def pack(self) -> None:
        """Lay the weights out for serving on this machine; see `adapters.products`. They keep their values."""
        pack_linears(self)
        if self.decoder is not None:
            self.decoder.pack()

    def head(self, name: str) -> nn.Linear:
        """The backbone's own head of that name."""
        head = getattr(self, name)
        assert isinstance(head, nn.Linear), f"the caller checked that the backbone has {name}. This is a bug."
        return head

    def project(self, head: str, x: Tensor, adaptation: Adaptation | None) -> Tensor:
        """x [B, D] through the head each row uses."""
        return self.head(head)(x) if adaptation is None else adaptation.project(head, x)

    def encode_vision(self, pixels: Tensor, adaptation: Terms | None) -> Tensor:
        """Hidden states [B, P, D] of pixels [B, 3, R, R]."""
        return self.vision(pixels.to(self.dtype), adaptation)  # type: ignore[no-any-return]

    def encode_text(self, ids: Tensor, mask: Tensor, adaptation: Terms | None) -> Tensor:
        """Text-only hidden states [B, L, D] of ids [B, L], mask [B, L] (True: a token)."""
        return self._text_encoder()(ids, mask[:, None, None, :], adaptation)  # type: ignore[no-any-return]

    def encode_multimodal(
        self,
        ids: Tensor,
        mask: Tensor,
        y: Tensor,
        y_mask: Tensor,
        adaptation: Adaptation | None,
        factors: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, L, D] of text that looks at y [B, M, D]; the first id becomes [ENC].

        `factors` [B, M] scale the cross-attention's keys (frame-aware attention).
        """
        return self.read(ids, mask, self._text_encoder().remember(y, y_mask, adaptation, factors), adaptation)

    def read(self, ids: Tensor, mask: Tensor, memory: Memory, adaptation: Adaptation | None) -> Tensor:
        """`encode_multimodal` of rows whose memories, of the text encoder, are there already."""
        ids = torch.cat([torch.full_like(ids[:, :1], self.config.special_ids.enc), ids[:, 1:]], dim=1)
        return self._text_encoder()(ids, mask[:, None, None, :], adaptation, memory)  # type: ignore[no-any-return]

    def score_answers(
        self,
        states: Tensor,
        states_mask: Tensor,
        ids: Tensor,
        mask: Tensor,
        question_of_answer: Tensor,
        adaptation: Adaptation | None,
    ) -> Tensor:
        """Teacher-forced logits [A, L, V] of answers ids [A, L] that read question states [Q, K, D].

        `question_of_answer` [A] names each answer's question; `adaptation` has one row per question.
        """
        assert self.decoder is not None, "the caller checked that there is a decoder. This is a bug."
        memory = self.decoder.body.remember(states, states_mask, adaptation).select(question_of_answer)
        rows = None if adaptation is None else adaptation.expand(question_of_answer)
        return self.decoder.score(ids, mask, memory, rows)

    def _text_encoder(self) -> TextStack:
        assert self.text_encoder is not None, "the caller checked that there is a text encoder. This is a bug."
        return self.text_encoder
