"""The authors' maths once more, as plainly as it can be written: unfolded, with loops, one head and one frame at a time.

What our code must agree with, hence independent of it: imports torch alone and reads the trainers' own tensor names.
Layer numbers, formulas and constants are those of the UniAdapter paper and its released code.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

VISUAL_EPS = 1e-6
TEXT_EPS = 1e-12
ADAPTER_EPS = 1e-5
ADAPTER_SCALE = 0.1
FRAME_TEMPERATURE = 4.0
SMOOTHING = 0.1


@dataclass(frozen=True)
class Switches:
    """Which terms are on; all off is the plain backbone."""

    visual: bool
    textual: bool
    multimodal: bool
    memory: bool
    frames: bool

    @classmethod
    def of(cls, config: Mapping[str, object]) -> "Switches":
        """As a trainer's configuration says."""
        return cls(
            visual=bool(config.get("adapter_visual", True)),
            textual=bool(config.get("adapter_textual", True)),
            multimodal=bool(config.get("adapter_multimodal", True)),
            memory=bool(config.get("video_key_adapter", False)),
            frames=bool(config.get("frame_aware_attention", False)),
        )


@dataclass(frozen=True)
class Ids:
    """Special token ids."""

    pad: int
    cls: int
    sep: int
    bos: int
    enc: int


@dataclass(frozen=True)
class Looks:
    """What the visual encoder made of some pictures: every block's output, and the hidden states after the last norm."""

    blocks: list[Tensor]
    hidden: Tensor


@dataclass(frozen=True)
class Answer:
    """A generated sequence: ids from the first to [SEP] or to the full length, unpadded, and its score."""

    ids: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class Ranking:
    """A ranking of candidates: the shortlist, its scores and the place of the best."""

    topk: list[int]
    scores: Tensor
    best: int


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


def unit(x: Tensor) -> Tensor:
    return x / x.pow(2).sum(-1, keepdim=True).sqrt()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, num_heads: int) -> Tensor:
    """q [B, L, D] over k, v [B, M, D]; `mask` [B, L or 1, M] is added to the scores. Head after head."""
    size = q.shape[-1] // num_heads
    out = []
    for head in range(num_heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
        if mask is not None:
            scores = scores + mask
        out.append(torch.softmax(scores, -1) @ v[..., part])
    return torch.cat(out, -1)


def smoothed_loss(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Per row: the label-smoothed loss of each next token, summed. logits [B, L, V], targets and mask [B, L]."""
    losses = []
    for row in range(len(targets)):
        total = logits.new_zeros(())
        for place in range(1, targets.shape[1]):
            if mask[row, place]:
                log_probs = torch.log_softmax(logits[row, place - 1], -1)
                total = total - (1 - SMOOTHING) * log_probs[targets[row, place]] - SMOOTHING * log_probs.mean()
        losses.append(total)
    return torch.stack(losses)


class Reference:
    """One checkpoint, as the authors' evaluation code would run it."""

    def __init__(
        self,
        state: Mapping[str, Tensor],
        *,
        num_heads: int,
        ids: Ids,
        switches: Switches,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
        self.num_heads = num_heads
        self.ids = ids
        self.on = switches
        self.dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        return self.state[name]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self[f"{name}.weight"].t() + self[f"{name}.bias"]

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.pow(2).mean(-1, keepdim=True)
        return centred / (variance + eps).sqrt() * self[f"{name}.weight"] + self[f"{name}.bias"]

    def num_layers(self, prefix: str) -> int:
        numbers = [
            name.removeprefix(f"{prefix}.").partition(".")[0] for name in self.state if name.startswith(f"{prefix}.")
        ]
        return 1 + max(map(int, numbers))

    # --- adapters ----------------------------------------------------------------------------------------

    def adapter(self, layer: int, x: Tensor, mode: str) -> Tensor:
        """`adapters[layer]` without residual."""
        name = f"adapters.{layer}"
        z = relu(self.linear(self.norm(x, f"{name}.adapter_layer_norm_before", ADAPTER_EPS), f"{name}.down_proj"))
        if mode == "visual":
            return ADAPTER_SCALE * self.linear(z, f"{name}.visual_up_proj")
        if mode == "text":
            return ADAPTER_SCALE * self.linear(z, f"{name}.up_proj")
        mixed = self.linear(z, f"{name}.multi_up_proj") + self.linear(z, f"{name}.up_proj")
        return ADAPTER_SCALE * self.norm(mixed, f"{name}.adapter_layer_norm_cross_modal", ADAPTER_EPS)

    def memory_adapter(self, encoder: str, which: str, y: Tensor) -> Tensor:
        """The key or value adapter of `text_encoder` or `text_decoder.bert`."""
        name = f"{encoder}.encoder.video_{which}_adapter"
        return self[f"{name}.scale"] * self.linear(self.linear(y, f"{name}.down_proj"), f"{name}.up_proj")

    # --- visual encoder ----------------------------------------------------------------------------------

    def look(self, pixels: Tensor) -> Looks:
        """pixels [B, 3, R, R]."""
        pixels = pixels.to(self.dtype)
        weight, bias = self["visual_encoder.patch_embed.proj.weight"], self["visual_encoder.patch_embed.proj.bias"]
        size = weight.shape[-1]
        tokens = [self["visual_encoder.cls_token"][:, 0].expand(len(pixels), -1)]
        for row in range(pixels.shape[-2] // size):
            for column in range(pixels.shape[-1] // size):
                patch = pixels[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size]
                tokens.append(patch.flatten(1) @ weight.flatten(1).t() + bias)
        x = torch.stack(tokens, 1) + self["visual_encoder.pos_embed"]
        blocks = []
        for layer in range(self.num_layers("visual_encoder.blocks")):
            x = self._block(layer, x)
            blocks.append(x)
        return Looks(blocks, self.norm(x, "visual_encoder.norm", VISUAL_EPS))

    def _block(self, layer: int, x: Tensor) -> Tensor:
        name = f"visual_encoder.blocks.{layer}"
        q, k, v = self.linear(self.norm(x, f"{name}.norm1", VISUAL_EPS), f"{name}.attn.qkv").chunk(3, -1)
        x = x + self.linear(attend(q, k, v, None, self.num_heads), f"{name}.attn.proj")
        inner = gelu(self.linear(self.norm(x, f"{name}.norm2", VISUAL_EPS), f"{name}.mlp.fc1"))
        out = x + self.linear(inner, f"{name}.mlp.fc2")
        return out + self.adapter(layer, x, "visual") if self.on.visual else out

    # --- BERT stacks -------------------------------------------------------------------------------------

    def bert(
        self,
        encoder: str,
        ids: Tensor,
        mask: Tensor,
        *,
        y: Tensor | None = None,
        y_mask: Tensor | None = None,
        frame_similarity: Tensor | None = None,
        causal: bool = False,
    ) -> list[Tensor]:
        """Hidden states [B, L, D] of the embeddings and of every layer; with y [B, M, D] in mode multimodal."""
        length = ids.shape[1]
        embedded = self[f"{encoder}.embeddings.word_embeddings.weight"][ids]
        embedded = embedded + self[f"{encoder}.embeddings.position_embeddings.weight"][:length]
        hidden = [self.norm(embedded, f"{encoder}.embeddings.LayerNorm", TEXT_EPS)]
        self_mask = ((1 - mask.to(self.dtype)) * -10000.0)[:, None, :].expand(-1, length, -1)
        if causal:
            allowed = mask[:, None, :].bool() & torch.ones(length, length, dtype=torch.bool).tril()
            self_mask = (~allowed).to(self.dtype) * -10000.0
        cross_mask = None
        if y is not None and y_mask is not None:
            cross_mask = ((1 - y_mask.to(self.dtype)) * -1e9)[:, None, :]
        terms = None
        if y is not None and self.on.memory:
            terms = self.memory_adapter(encoder, "key", y), self.memory_adapter(encoder, "value", y)
        for layer in range(self.num_layers(f"{encoder}.encoder.layer")):
            name = f"{encoder}.encoder.layer.{layer}"
            hidden.append(self._layer(layer, name, hidden[-1], self_mask, y, cross_mask, terms, frame_similarity))
        return hidden

    def _layer(
        self,
        layer: int,
        name: str,
        h: Tensor,
        self_mask: Tensor,
        y: Tensor | None,
        cross_mask: Tensor | None,
        terms: tuple[Tensor, Tensor] | None,
        frame_similarity: Tensor | None,
    ) -> Tensor:
        q, k, v = (self.linear(h, f"{name}.attention.self.{which}") for which in ("query", "key", "value"))
        u = self._attention_output(attend(q, k, v, self_mask, self.num_heads), h, f"{name}.attention.output")
        if y is None:
            out = self._feed_forward(u, name)
            return out + self.adapter(layer, u, "text") if self.on.textual else out
        q, k, v = (
            self.linear(x, f"{name}.crossattention.self.{which}")
            for x, which in ((u, "query"), (y, "key"), (y, "value"))
        )
        if terms is not None:
            k, v = k + terms[0], v + terms[1]
        if frame_similarity is not None:
            k = self._weigh_frames(k, frame_similarity)
        read = attend(q, k, v, cross_mask, self.num_heads)
        w = self._attention_output(read, u, f"{name}.crossattention.output")
        out = self._feed_forward(w, name)
        if self.on.textual:
            out = out + self.adapter(layer, u, "text")
        return out + self.adapter(layer, w, "multimodal") if self.on.multimodal else out

    def _attention_output(self, x: Tensor, residual: Tensor, name: str) -> Tensor:
        return self.norm(self.linear(x, f"{name}.dense") + residual, f"{name}.LayerNorm", TEXT_EPS)

    def _feed_forward(self, u: Tensor, name: str) -> Tensor:
        inner = gelu(self.linear(u, f"{name}.intermediate.dense"))
        return self.norm(self.linear(inner, f"{name}.output.dense") + u, f"{name}.output.LayerNorm", TEXT_EPS)

    def _weigh_frames(self, k: Tensor, similarity: Tensor) -> Tensor:
        """Scale the keys of every frame's patches; its CLS key stays."""
        num_frames = similarity.shape[1]
        tokens = k.shape[1] // num_frames
        weights = num_frames * torch.softmax(similarity.to(self.dtype) / FRAME_TEMPERATURE, 1)
        k = k.clone()
        for frame in range(num_frames):
            patches = slice(frame * tokens + 1, (frame + 1) * tokens)
            k[:, patches] = weights[:, frame, None, None] * k[:, patches]
        return k

    # --- retrieval ---------------------------------------------------------------------------------------

    def clip_feature(self, cls: Tensor) -> Tensor:
        """[E] of a clip's CLS tokens [T, D]: mean, projection, norm."""
        return unit(self.linear(cls.mean(0), "vision_proj"))

    def frame_features(self, cls: Tensor) -> Tensor:
        """[T, E] of a clip's CLS tokens [T, D]."""
        return unit(self.linear(cls, "vision_proj"))

    def text_feature(self, hidden: Tensor) -> Tensor:
        """[E] of hidden states [..., L, D] in mode text."""
        return unit(self.linear(hidden[..., 0, :], "text_proj"))

    def match(self, ids: Tensor, mask: Tensor, y: Tensor, similarity: Tensor | None) -> tuple[Tensor, Tensor]:
        """Hidden states [B, L, D] and logits [B, 2] of texts ids [B, L] about y [B, M, D]."""
        ids = ids.clone()
        ids[:, 0] = self.ids.enc
        seen = torch.ones(y.shape[:2], dtype=torch.long)
        hidden = self.bert("text_encoder", ids, mask, y=y, y_mask=seen, frame_similarity=similarity)[-1]
        return hidden, self.linear(hidden[:, 0], "itm_head")

    # --- questions ---------------------------------------------------------------------------------------

    def question(self, ids: Tensor, mask: Tensor, y: Tensor) -> Tensor:
        """Hidden states [B, L, D] of questions about y [B, M, D]; frames are never weighed here."""
        ids = ids.clone()
        ids[:, 0] = self.ids.enc
        seen = torch.ones(y.shape[:2], dtype=torch.long)
        return self.bert("text_encoder", ids, mask, y=y, y_mask=seen)[-1]

    def decode(self, ids: Tensor, mask: Tensor, states: Tensor, states_mask: Tensor) -> Tensor:
        """Word logits [B, L, V] of ids [B, L] that read question states [B, K, D]."""
        h = self.bert("text_decoder.bert", ids, mask, y=states, y_mask=states_mask, causal=True)[-1]
        head = "text_decoder.cls.predictions"
        h = self.norm(gelu(self.linear(h, f"{head}.transform.dense")), f"{head}.transform.LayerNorm", TEXT_EPS)
        return h @ self["text_decoder.bert.embeddings.word_embeddings.weight"].t() + self[f"{head}.bias"]

    def next_words(self, sequences: Sequence[tuple[int, ...]], states: Tensor, mask: Tensor) -> Tensor:
        """Logits [B, V] behind sequences of one length, all about one question: states [K, D], mask [K]."""
        ids = torch.tensor(sequences)
        rows = len(sequences)
        logits = self.decode(ids, torch.ones_like(ids), states.expand(rows, -1, -1), mask.expand(rows, -1))
        return logits[:, -1]

    def greedy(self, states: Tensor, mask: Tensor, max_length: int) -> Answer:
        """The likeliest word each step. The score is the mean log-probability, lengths counted as for beams."""
        ids: tuple[int, ...] = (self.ids.bos,)
        total = 0.0
        while len(ids) < max_length and ids[-1] != self.ids.sep:
            log_probs = torch.log_softmax(self.next_words([ids], states, mask)[0], -1)
            word = int(log_probs.argmax())
            ids, total = (*ids, word), total + float(log_probs[word])
        return Answer(ids, total / (len(ids) - (ids[-1] == self.ids.sep)))

    def beams(self, states: Tensor, mask: Tensor, num_beams: int, max_length: int) -> Answer:
        """Beam search by the rules of transformers 4.15.0, for one question."""
        live: list[tuple[tuple[int, ...], float]] = [((self.ids.bos,), 0.0)] + [((self.ids.bos,), -1e9)] * (
            num_beams - 1
        )
        pool: list[tuple[float, tuple[int, ...]]] = []
        is_done = False
        length = 1
        while length < max_length and not is_done:
            log_probs = torch.log_softmax(self.next_words([ids for ids, _ in live], states, mask), -1)
            totals = log_probs + torch.tensor([total for _, total in live], dtype=self.dtype)[:, None]
            best, places = totals.flatten().sort(descending=True, stable=True)
            following = []
            for rank in range(2 * num_beams):
                beam, word = divmod(int(places[rank]), totals.shape[1])
                if word != self.ids.sep:
                    following.append(((*live[beam][0], word), float(best[rank])))
                elif rank < num_beams:
                    pool.append((float(best[rank]) / length, live[beam][0]))
                    pool = sorted(pool, key=lambda entry: -entry[0])[:num_beams]
                if len(following) == num_beams:
                    break
            is_done = len(pool) == num_beams and pool[-1][0] >= float(best[0]) / length
            live, length = following, length + 1
        if not is_done:
            pool += [(total / len(ids), ids) for ids, total in live]
        score, ids = max(pool, key=lambda entry: entry[0])
        return Answer(ids if len(ids) >= max_length else (*ids, self.ids.sep), score)

    def first_words(self, states: Tensor, mask: Tensor) -> Tensor:
        """Logits [V] of the first word."""
        return self.next_words([(self.ids.bos,)], states, mask)[0]

    def answer_losses(self, states: Tensor, mask: Tensor, ids: Tensor, answer_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [A, L, V] and losses [A] of answers ids [A, L] to one question: states [K, D], mask [K]."""
        rows = len(ids)
        logits = self.decode(ids, answer_mask, states.expand(rows, -1, -1), mask.expand(rows, -1))
        return logits, smoothed_loss(logits, ids, answer_mask)

    def rank(self, states: Tensor, mask: Tensor, ids: Tensor, answer_mask: Tensor, k: int) -> Ranking:
        """The best of candidates ids [N, L]; of equal first words the lower index first."""
        probs = torch.softmax(self.first_words(states, mask), -1)[ids[:, 1]]
        topk = sorted(range(len(ids)), key=lambda index: (-float(probs[index]), index))[:k]
        _, losses = self.answer_losses(states, mask, ids[topk], answer_mask[topk])
        return Ranking(topk, -losses, int((-losses).argmax()))
