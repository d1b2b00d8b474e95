"""Adapters that nobody recorded, to fill the batches of those that somebody did.

A companion is a checkpoint over the same frozen backbone, imported like any other, that differs in rank, heads,
key/value adapter and frame weighting; or only in its numbers, and is asked what the case is. The plain reference says
what its rows must give.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from tests.parity.reference import Answer, Ids, Ranking, Reference, Switches
from tests.parity.sets import FROZEN, Case

HEADS = ("vision_proj", "text_proj", "itm_head")
TWIN = "twin"
ADAPTER_NAMES = ("adapters.", "adapters_m.", "adapters_dec.")
UPS = ("up_proj", "multi_up_proj", "visual_up_proj")


@dataclass(frozen=True, eq=False, repr=False)
class Companion:
    """A checkpoint, what the reference makes of it, and the rows it puts beside a case's.

    `document` None is `__base__`. Clips are [B, T, 3, R, R] with a number of frames of its own; text i asks about clip i.
    `is_twin`: of the case's size and options, and asked all that the case is, so that whatever serves slots of one size
    together serves these two.
    """

    name: str
    document: dict[str, Any] | None
    reference: Reference
    clips: Tensor
    texts: list[tuple[int, ...]]
    answers: list[tuple[int, ...]]
    is_twin: bool = False

    @cached_property
    def hidden(self) -> list[Tensor]:
        """[T, P, D] of every clip."""
        return [self.reference.look(clip).hidden for clip in self.clips]

    @cached_property
    def features(self) -> list[Tensor]:
        """[E] of every text."""
        found = []
        for ids in self.texts:
            tokens, mask = as_row(ids)
            found.append(self.reference.text_feature(self.reference.bert("text_encoder", tokens, mask)[-1])[0])
        return found

    @cached_property
    def frames(self) -> list[Tensor]:
        """Unnormalised frame features [T, E] of every clip."""
        return [self.reference.linear(hidden[:, 0], "vision_proj") for hidden in self.hidden]

    @cached_property
    def matches(self) -> list[list[Tensor]]:
        """Matching logits [2] of every text with every clip."""
        return [[self._match(text, clip) for clip in range(len(self.clips))] for text in range(len(self.texts))]

    def _match(self, text: int, clip: int) -> Tensor:
        tokens, mask = as_row(self.texts[text])
        hidden = self.hidden[clip]
        similarity = None
        if self.reference.on.frames:
            similarity = (self.reference.frame_features(hidden[:, 0]) @ self.features[text])[None]
        return self.reference.match(tokens, mask, hidden.flatten(0, 1)[None], similarity)[1][0]

    @cached_property
    def questions(self) -> list[Tensor]:
        """States [L, D] of every text asked about its clip."""
        return [
            self.reference.question(*as_row(ids), hidden.flatten(0, 1)[None])[0]
            for ids, hidden in zip(self.texts, self.hidden, strict=True)
        ]

    @cached_property
    def rankings(self) -> list[Ranking]:
        """All answers ranked, for every text."""
        length = max(len(answer) for answer in self.answers)
        pad = self.reference.ids.pad
        ids = torch.tensor([[*answer, *[pad] * (length - len(answer))] for answer in self.answers])
        mask = torch.tensor([[int(place < len(answer)) for place in range(length)] for answer in self.answers])
        return [self.reference.rank(q, torch.ones(len(q)), ids, mask, len(ids)) for q in self.questions]

    @cache  # noqa: B019 - companions live as long as their case
    def generated(self, num_beams: int, max_length: int) -> list[Answer]:
        """The answer to every text."""
        search = self.reference.greedy if num_beams == 1 else self.reference.beams
        sizes = (max_length,) if num_beams == 1 else (num_beams, max_length)
        return [search(q, torch.ones(len(q)), *sizes) for q in self.questions]


def as_row(ids: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A batch of one: ids and mask [1, L]."""
    return torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)


@cache
def make_companions(case: Case) -> list[Companion]:
    """Four for a case: its twin, a wide adapter, one as fresh from its initialisation, and no adapter at all."""
    generator = torch.Generator().manual_seed(7)
    state, config = case.document["model"], case.config
    rank = state["adapters.0.down_proj.weight"].shape[0]
    has_memory = Switches.of(config).memory
    num_frames = case.pixels.shape[1]
    wide = {
        "adapter_visual": True,
        "adapter_textual": True,
        "adapter_multimodal": True,
        "video_key_adapter": not has_memory,
        "frame_aware_attention": not config.get("frame_aware_attention", False),
    }
    fresh = {**wide, "video_key_adapter": True, "frame_aware_attention": True}
    twin = _twin(case, rank, torch.Generator().manual_seed(11))
    return [
        twin,
        _companion(case, "wide", config | wide, 2 * rank + 3, 1.0, num_frames + 1, generator, own_heads=True),
        _companion(
            case, "fresh", config | fresh, rank // 2 or 2, 0.02, max(1, num_frames - 1), generator, own_heads=False
        ),
        Companion(
            "base",
            None,
            _reference(case, state, case.settings(FROZEN) | {"frame_aware_attention": False}),
            *_rows(case, num_frames + 2, generator),
        ),
    ]


def _twin(case: Case, rank: int, generator: torch.Generator) -> Companion:
    """The case with other numbers."""
    adapter = _companion(case, TWIN, case.config, rank, 1.0, 1, generator, own_heads=True)
    kind = "text" if case.has("text_ids") else "question"
    answers = case.rows("answer") if case.has("answer_ids") else []
    return replace(adapter, clips=case.pixels, texts=case.rows(kind), answers=answers, is_twin=True)


def _companion(
    case: Case,
    name: str,
    config: dict[str, Any],
    rank: int,
    size: float,
    num_frames: int,
    generator: torch.Generator,
    *,
    own_heads: bool,
) -> Companion:
    state = _frozen(case.document["model"])
    heads = {n: t for n, t in state.items() if n.split(".")[0] in HEADS}
    for layer in range(_num_layers(state)):
        state |= _adapter(f"adapters.{layer}", state["visual_encoder.norm.weight"].shape[0], rank, size, generator)
    if Switches.of(config).memory:
        for encoder in ("text_encoder", "text_decoder.bert"):
            if f"{encoder}.embeddings.word_embeddings.weight" in state:
                for which in ("key", "value"):
                    name_of = f"{encoder}.encoder.video_{which}_adapter"
                    state |= _memory_adapter(name_of, state["visual_encoder.norm.weight"].shape[0], rank + 1, generator)
    if own_heads:
        state |= {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in heads.items()}
    reference = _reference(case, state, config)
    if not own_heads:  # such a checkpoint brings none; its rows use the backbone's
        state = {n: t for n, t in state.items() if n not in heads}
    document = {"model": state, "config": config}
    return Companion(name, document, reference, *_rows(case, num_frames, generator))


def _frozen(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith(ADAPTER_NAMES)
        and "adapter" not in name
        and "_m." not in name
        and not name.endswith("_queue")
    }


def _reference(case: Case, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Reference:
    return Reference(state, num_heads=case.num_heads, ids=Ids(**case.special_ids), switches=Switches.of(config))


def _num_layers(state: Mapping[str, Tensor]) -> int:
    return 1 + max(int(name.split(".")[2]) for name in state if name.startswith("visual_encoder.blocks."))


def _adapter(prefix: str, width: int, rank: int, size: float, generator: torch.Generator) -> dict[str, Tensor]:
    """One UniAdapter; `size` is that of what the up-projections give."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors: dict[str, Tensor] = {}
    for norm in ("adapter_layer_norm_before", "adapter_layer_norm_cross_modal"):
        tensors |= {f"{prefix}.{norm}.weight": 1 + 0.2 * normal(width), f"{prefix}.{norm}.bias": 0.2 * normal(width)}
    tensors |= {
        f"{prefix}.down_proj.weight": normal(rank, width) / width**0.5,
        f"{prefix}.down_proj.bias": 0.1 * normal(rank),
    }
    for up in UPS:
        tensors |= {
            f"{prefix}.{up}.weight": size * 2 * normal(width, rank) / rank**0.5,
            f"{prefix}.{up}.bias": size * 0.2 * normal(width),
        }
    return tensors


def _memory_adapter(prefix: str, width: int, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        f"{prefix}.scale": 1 + 0.5 * normal(1),
        f"{prefix}.down_proj.weight": normal(rank, width) / width**0.5,
        f"{prefix}.down_proj.bias": 0.1 * normal(rank),
        f"{prefix}.up_proj.weight": normal(width, rank) / rank**0.5,
        f"{prefix}.up_proj.bias": 0.1 * normal(width),
    }


def _rows(
    case: Case, num_frames: int, generator: torch.Generator
) -> tuple[Tensor, list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Clips, texts and answers. The longest text and answer are as long as the case's padded rows, so that those get padding."""
    clips = torch.randn((2, num_frames, *case.pixels.shape[2:]), generator=generator)
    kind = "text" if case.has("text_ids") else "question"
    longest = case.input(f"{kind}_ids").shape[1]
    answers = []
    if case.has("answer_ids"):
        full = max(case.input(f"{name}_ids").shape[1] for name in ("answer", "given_answer") if case.has(f"{name}_ids"))
        answers = [_words(case, "bos", length, generator) for length in (full, 3, max(3, full - 1))]
    return clips, [_words(case, "cls", longest, generator), _words(case, "cls", 3, generator)], answers


def _words(case: Case, first: str, length: int, generator: torch.Generator) -> tuple[int, ...]:
    special = case.special_ids
    words = case.document["model"]["text_encoder.embeddings.word_embeddings.weight"].shape[0]
    allowed = torch.tensor([word for word in range(words) if word not in special.values()])
    chosen = allowed[torch.randint(len(allowed), (length - 2,), generator=generator)].tolist()
    return (special[first], *chosen, special["sep"])
