"""The authors' maths once more, as plainly as it can be written: uncached, whole texts each time, one head at a time.

What our code must agree with, hence independent of it. Frozen weights come from the library's own folders; encoders are
the library's own models. Formulas and quirks are those of eP-ALM's released code (`models/epalm.py`, `models/opt.py`).
`leaks_padding`: the extra token sees padding, as theirs does; without it a padded row gives what it gives alone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

ENCODER_EPS = 1e-6  # always, whatever the library's default
NORM_EPS = 1e-5
FIRST_POSITION = 2
NEVER = -1e9


@dataclass(frozen=True)
class Read:
    """What a language model made of some texts: what entered each layer, and all logits [B, (1 +) P + T, V]."""

    inputs: list[Tensor]
    logits: Tensor


@dataclass(frozen=True)
class Written:
    """A generated text with its question, and the mean log-probability that beams are ranked by."""

    ids: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class Ranking:
    """Candidates that were looked at, the likeliest first."""

    indices: list[int]
    probs: Tensor


@cache
def perceiving(folder: Path) -> Any:
    """An encoder of the library."""
    kinds = {"vit": "ViTModel", "timesformer": "TimesformerModel", "audio-spectrogram-transformer": "ASTModel"}
    kind = kinds[transformers.AutoConfig.from_pretrained(folder).model_type]
    more = {"add_pooling_layer": False} if kind == "ViTModel" else {}
    model = getattr(transformers, kind).from_pretrained(folder, **more).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = ENCODER_EPS
    return model


@cache
def speaking(folder: Path) -> Any:
    """A language model of the library."""
    return transformers.OPTForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


@torch.no_grad()
def first_tokens(folder: Path, samples: Tensor) -> Tensor:
    """[blocks, S, d]: the first token after each block, through the final norm."""
    model = perceiving(folder)
    if model.config.model_type == "timesformer":
        model.config.num_frames = samples.shape[1]  # its blocks do not look at the clip
    states = model(samples, output_hidden_states=True).hidden_states[1:]
    return torch.stack([model.layernorm(state)[:, 0] for state in states])


class Reference:
    """One adapter on one language model. `state` and `settings` are a trainer's; None: no adapter."""

    def __init__(
        self,
        language_model: Path,
        state: Mapping[str, Tensor] | None,
        settings: Mapping[str, Any] | None,
        *,
        pad: int,
        eos: int,
        leaks_padding: bool,
    ) -> None:
        model = speaking(language_model)
        self.config = model.config
        self.w = {name.removeprefix("model.decoder."): tensor for name, tensor in model.state_dict().items()}
        self.state = state or {}
        self.settings = settings or {}
        self.pad, self.eos, self.leaks_padding = pad, eos, leaks_padding

    # --- the adapter -------------------------------------------------------------------------------------

    def perceived(self, tokens: Tensor) -> Tensor:
        """The features [n, S, d] that are injected, of all blocks' first tokens."""
        return tokens[len(tokens) - self.num_features :]

    @property
    def num_features(self) -> int:
        return int(self.settings.get("injected_hidden_states", 1))

    def connected(self, features: Tensor) -> Tensor:
        """[n, S, D] of features [n, S, d]."""
        out = []
        for k, feature in enumerate(features):
            number = 0 if self.settings.get("shared_connector") else k
            weight, bias = self.state[f"connector.{number}.weight"], self.state[f"connector.{number}.bias"]
            out.append(feature @ weight.t() + bias)
        return torch.stack(out)

    def prompt(self) -> Tensor | None:
        """[P, E]."""
        if not self.settings.get("prompt_tuning"):
            return None
        name = "prompt_module.prefix_embedding"
        table = self.state[f"{name}.0.weight"]
        if not self.settings.get("mlp", True):
            return table
        hidden = torch.tanh(table @ self.state[f"{name}.1.weight"].t() + self.state[f"{name}.1.bias"])
        return hidden @ self.state[f"{name}.3.weight"].t() + self.state[f"{name}.3.bias"]

    def feature_of_layer(self) -> dict[int, int]:
        """The feature that enters each layer of the window that one enters."""
        start, end, n = self.settings["start_layer_idx"], self.settings["end_layer_idx"], self.num_features
        step = 1
        if n > 1 and end - start > n:
            step = (end - start) // n
        text_step = self.settings.get("text_step", 1)
        if self.settings.get("select_higher_step"):
            text_step = max(step, text_step)
        found = {}
        for layer in range(self.config.num_hidden_layers):
            if start <= layer < end and layer % text_step == 0:
                found[layer] = 0 if n == 1 else min((layer - start) // step, n - 1)
        return found

    # --- the language model ------------------------------------------------------------------------------

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + NORM_EPS) * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.w[f"{name}.weight"].t() + self.w[f"{name}.bias"]

    def attend(self, x: Tensor, mask: Tensor, layer: str) -> Tensor:
        """`mask` [B, K, K] is added to the scores."""
        q, k, v = (self.linear(x, f"{layer}.self_attn.{which}_proj") for which in "qkv")
        size = q.shape[-1] // self.config.num_attention_heads
        heads = []
        for first in range(0, q.shape[-1], size):
            part = slice(first, first + size)
            scores = (q[..., part] / math.sqrt(size)) @ k[..., part].transpose(1, 2)
            heads.append(torch.softmax(scores + mask, dim=-1) @ v[..., part])
        return self.linear(torch.cat(heads, dim=-1), f"{layer}.self_attn.out_proj")

    def layer(self, x: Tensor, mask: Tensor, name: str) -> Tensor:
        before = self.config.do_layer_norm_before
        attended = self.attend(self.norm(x, f"{name}.self_attn_layer_norm") if before else x, mask, name)
        x = x + attended
        if not before:
            x = self.norm(x, f"{name}.self_attn_layer_norm")
        hidden = self.linear(self.norm(x, f"{name}.final_layer_norm") if before else x, f"{name}.fc1")
        x = x + self.linear(hidden.clamp(min=0), f"{name}.fc2")
        return x if before else self.norm(x, f"{name}.final_layer_norm")

    @torch.no_grad()
    def read(self, ids: Tensor, mask: Tensor, values: Tensor | None) -> Read:
        """Texts ids [B, T] with mask [B, T], padded on the right; values [n, B, D] may be injected."""
        prompt, lowest = self.prompt(), torch.finfo(torch.float32).min
        x, seen = self.w["embed_tokens.weight"][ids], mask
        if prompt is not None:
            x = torch.cat([prompt.expand(len(ids), -1, -1), x], dim=1)
            seen = torch.cat([torch.ones(len(ids), len(prompt), dtype=mask.dtype), mask], dim=1)
        if "project_in.weight" in self.w:
            x = x @ self.w["project_in.weight"].t()
        positions = mask.cumsum(1) * mask - 1 + FIRST_POSITION
        text = slice(x.shape[1] - ids.shape[1], None)
        x[:, text] = x[:, text] + self.w["embed_positions.weight"][positions]
        allowed = torch.zeros(len(ids), x.shape[1], x.shape[1])
        for row in range(x.shape[1]):
            allowed[:, row, row + 1 :] = lowest
        for row in range(len(ids)):
            allowed[row, :, seen[row] == 0] = lowest
        enters = {} if values is None else self.feature_of_layer()
        has_extra, inputs = False, []
        for number in range(self.config.num_hidden_layers):
            if number in enters:
                assert values is not None
                value = values[enters[number]][:, None]
                if not has_extra:
                    x, has_extra = torch.cat([value, x], dim=1), True
                    allowed = torch.nn.functional.pad(allowed, (1, 0, 1, 0))
                    if not self.leaks_padding:
                        for row in range(len(ids)):
                            allowed[row, 0, 1:][seen[row] == 0] = lowest
                x = torch.cat([value, x[:, 1:]], dim=1)
            inputs.append(x)
            x = self.layer(x, allowed, f"layers.{number}")
        if "final_layer_norm.weight" in self.w:
            x = self.norm(x, "final_layer_norm")
        if "project_out.weight" in self.w:
            x = x @ self.w["project_out.weight"].t()
        return Read(inputs, x @ self.w["embed_tokens.weight"].t())

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Per-token losses [B, T - 1] of logits [B, (1 +) P + T, V]: those of targets left out are 0."""
        length = labels.shape[1]
        log_probs = torch.log_softmax(logits[:, -length:], dim=-1)
        losses = torch.zeros(len(labels), length - 1)
        for row, own in enumerate(labels.tolist()):
            for place, target in enumerate(own[1:]):
                if target >= 0:
                    losses[row, place] = -log_probs[row, place, target]
        return losses

    # --- texts that go on --------------------------------------------------------------------------------

    def _next(self, beams: list[list[int]], mask: Tensor, values: Tensor | None) -> Tensor:
        """Log-probabilities [beams, V] of what follows; all that was appended is seen."""
        ids = torch.tensor(beams)
        seen = torch.cat([mask, mask.new_ones(ids.shape[1] - len(mask))]).expand(len(ids), -1)
        repeated = None if values is None else values[:, None].expand(-1, len(ids), -1)
        return torch.log_softmax(self.read(ids, seen, repeated).logits[:, -1], dim=-1)

    def greedy(self, ids: Tensor, mask: Tensor, values: Tensor | None, max_length: int) -> Written:
        """One text ids [T], perhaps padded, with values [n, D]."""
        text, total = ids.tolist(), 0.0
        while True:
            log_probs = self._next([text], mask, values)[0]
            token = int(log_probs.argmax())
            total += float(log_probs[token])
            text = [*text, token]
            if token == self.eos or len(text) >= max_length:
                return Written(tuple(text), total / (len(text) - (token == self.eos)))

    def beams(self, ids: Tensor, mask: Tensor, values: Tensor | None, num_beams: int, max_length: int) -> Written:
        """By the rule of transformers 4.24: lengths are those of the whole text before the end token."""
        running = [(ids.tolist(), 0.0 if beam == 0 else NEVER) for beam in range(num_beams)]
        kept: list[Written] = []

        def keep(text: list[int], total: float) -> None:
            score = total / len(text)
            if len(kept) < num_beams or score > min(other.score for other in kept):
                kept.append(Written(tuple(text), score))
                if len(kept) > num_beams:
                    kept.remove(min(kept, key=lambda other: other.score))

        while True:
            length = len(running[0][0])
            log_probs = self._next([text for text, _ in running], mask, values)
            totals = log_probs + torch.tensor([total for _, total in running])[:, None]
            best, places = totals.flatten().topk(2 * num_beams)
            going: list[tuple[list[int], float]] = []
            for rank, (total, place) in enumerate(zip(best.tolist(), places.tolist(), strict=True)):
                beam, token = divmod(place, totals.shape[1])
                if token == self.eos:
                    if rank < num_beams:
                        keep(running[beam][0], total)
                elif len(going) < num_beams:
                    going.append(([*running[beam][0], token], total))
            running = going
            done = len(kept) == num_beams and min(other.score for other in kept) >= float(best[0]) / length
            if done or length + 1 >= max_length:
                break
        if not done:
            for text, total in running:
                keep(text, total)
        first = max(kept, key=lambda other: other.score)
        end = () if len(first.ids) >= max_length else (self.eos,)
        return Written((*first.ids, *end), first.score)

    def rank(
        self, question: tuple[int, ...], values: Tensor | None, answers: list[tuple[int, ...]], k: int, *, width: int
    ) -> Ranking:
        """Candidates by the first word's probability and the whole text's, question and candidate, padded to `width`."""
        ids = torch.tensor(question)
        first = self._next([list(question)], torch.ones_like(ids), values)[0]
        priors = torch.tensor([float(first[answer[1]]) for answer in answers])
        chosen = priors.sort(descending=True, stable=True).indices[:k].tolist()
        texts = [[*question, *answers[index]] for index in chosen]
        length = len(question) + width
        padded = torch.tensor([[*text, *[self.pad] * (length - len(text))] for text in texts])
        mask = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts])
        repeated = None if values is None else values[:, None].expand(-1, len(texts), -1)
        labels = torch.where(mask == 1, padded, -100)
        losses = self.losses(self.read(padded, mask, repeated).logits, labels).sum(dim=1)
        probs = torch.softmax(priors[chosen] - losses, dim=0)
        order = probs.sort(descending=True, stable=True).indices
        return Ranking([chosen[place] for place in order.tolist()], probs[order])
