"""Sets of recorded outputs: where they are, what they hold, what their tensor names mean, how near is near enough.

Layout: `<root>/<system>/<any set name>/cases.json` with one checkpoint and one safetensors file per case; the root is the
folder `PARITY_DATA` names, or `data` beside this file. Nothing about a set is known beforehand: sizes, options and
tolerances come from its `cases.json`, meanings from the names of its tensors.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).parent / "data"
UNLISTED = -100.0  # the entry of a score table that was not looked at
ATOL, RTOL = 5e-5, 1e-4  # where an entry names none


def data_root() -> Path:
    """Where the sets are."""
    return Path(os.environ.get("PARITY_DATA") or DATA)


def find_sets(system: str, root: Path | None = None) -> list[Path]:
    """Every set folder of a system."""
    return sorted(path.parent for path in ((root or data_root()) / system).glob("*/cases.json"))


class UnknownTensor(Exception):
    """An expected tensor that no comparison claims."""


@dataclass(frozen=True)
class Variant:
    """Under which options a quantity was recorded. `frozen`: no adapter; `whole`: every mode of the adapter on."""

    frozen: bool = False
    without: frozenset[str] = frozenset()
    whole: bool = False

    @property
    def name(self) -> str:
        """A name fit for an adapter."""
        off = "".join(f"-no-{option.replace('_', '-')}" for option in sorted(self.without))
        return ("frozen" if self.frozen else "whole" if self.whole else "own") + off

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The trainer's configuration with this variant's options."""
        changed = dict(config)
        if self.whole or self.frozen:
            changed |= dict.fromkeys(("adapter_visual", "adapter_textual", "adapter_multimodal"), self.whole)
        if self.frozen:
            changed["video_key_adapter"] = False
        return changed | {_OPTIONS[option]: False for option in self.without}


OWN = Variant()
FROZEN = Variant(frozen=True)
WHOLE = Variant(whole=True)
_OPTIONS = {"kv_adapter": "video_key_adapter", "frame_weight": "frame_aware_attention"}


@dataclass(frozen=True)
class Quantity:
    """What an expected tensor is: a kind with its parameters, under a variant."""

    kind: str
    parameters: dict[str, str] = field(default_factory=dict)
    variant: Variant = OWN

    def number(self, parameter: str) -> int:
        """A parameter that is a number."""
        return int(self.parameters[parameter])


_KINDS = {
    "visual_block": r"visual_block(?P<layer>\d+)_out",
    "vision_hidden": r"(image|frame|video)_hidden",
    "clip_feature": r"(image|video)_(embeds?|feats?)",
    "frame_feature": r"frame_(embeds?|feats?)",
    "text_hidden": r"text_hidden(?P<layer>\d+)",
    "text_feature": r"text_(embeds?|feats?)",
    "similarity": r"similarity_(?P<table>[tiv]2[tiv])",
    "frame_similarity": r"sim_t2f",
    "match_logits": r"itm_logits",
    "match_hidden": r"multimodal_hidden_(?P<side>image|video|text)(?P<index>\d+)",
    "scores": r"score_(?P<table>[tiv]2[tiv])_k(?P<k>\d+)_beta(?P<beta>\d+(\.\d+)?(e-?\d+)?)",
    "question_hidden": r"question_hidden",
    "first_logits": r"first_token_logits",
    "rank_probs": r"rank_first_token_probs",
    "rank_topk": r"rank_topk_ids",
    "rank_scores": r"rank_log_probs_sum",
    "rank_best": r"rank_max_ids",
    "answer_ids": r"generate_(greedy|beam(?P<beams>\d+))_alone",
    "answer_scores": r"generate_(greedy|beam(?P<beams>\d+))_alone_scores",
    "forced_logits": r"teacher_forced_logits",
    "forced_loss": r"teacher_forced_loss",
    "train_loss": r"train_loss",
    "unit_adapter": r"unit_(?P<small>small_)?adapter(?P<layer>\d+)_(?P<mode>text|visual|multimodal)(?P<residual>_residual)?",
    "unit_memory": r"unit_(?P<small>small_)?(?P<stack>text_|decoder_)?video_(?P<which>key|value)_adapter",
    "unit_vision_norm": r"unit_(?P<small>small_)?vit_final_norm",
    "unit_text_norm": r"unit_(?P<small>small_)?text_embedding_norm",
}
_SUFFIX = re.compile(r"(?P<core>.+?)(?P<off>(_no_(kv_adapter|frame_weight))*)")
_DEPENDS_ON_PADDING = re.compile(r"(frozen_)?generate_(greedy|beam\d+)(_scores)?(_no_(kv_adapter|frame_weight))*")


def is_exempt(name: str) -> bool:
    """Whether a result depends on the padding of its batch; `generate_*_alone` counts instead of these."""
    return _DEPENDS_ON_PADDING.fullmatch(name) is not None


def is_known(name: str) -> bool:
    """Whether some comparison claims an expected tensor."""
    try:
        meaning(name)
    except UnknownTensor:
        return False
    return True


def meaning(name: str) -> Quantity:
    """What an expected tensor's name says. Raises: UnknownTensor."""
    match = _SUFFIX.fullmatch(name.removeprefix("frozen_"))
    assert match is not None
    without = frozenset(re.findall(r"_no_(kv_adapter|frame_weight)", match["off"]))
    for kind, pattern in _KINDS.items():
        found = re.fullmatch(pattern, match["core"])
        if found is not None:
            parameters = {key: value for key, value in found.groupdict().items() if value is not None}
            whole = kind.startswith("unit_")
            return Quantity(kind, parameters, Variant(name.startswith("frozen_"), without, whole))
    raise UnknownTensor(
        f"no comparison claims expected.{name}; the names known are those of _KINDS in {Path(__file__).name}"
    )


@dataclass(frozen=True, eq=False)
class Case:
    """One checkpoint with its inputs and recorded outputs."""

    folder: Path
    name: str
    set_facts: Mapping[str, Any]
    facts: Mapping[str, Any]

    @property
    def label(self) -> str:
        """System, set and case, as test ids have them."""
        return f"{self.folder.parent.name}-{self.folder.name}-{self.name}"

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Everything the safetensors file holds."""
        return load_file(self.folder / self.facts["tensors_file"])

    @cached_property
    def document(self) -> dict[str, Any]:
        """The checkpoint."""
        document: dict[str, Any] = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        return document

    @property
    def checkpoint(self) -> Path:
        """Where the checkpoint is."""
        return self.folder / str(self.facts["checkpoint"])

    @property
    def config(self) -> dict[str, Any]:
        """The trainer's configuration, as the checkpoint has it."""
        return dict(self.document["config"])

    def settings(self, variant: Variant) -> dict[str, Any]:
        """The trainer's configuration under a variant."""
        settings = variant.settings(self.config)
        has_memory = any(".video_key_adapter." in name for name in self.document["model"])
        return settings | {"video_key_adapter": True} if variant.whole and has_memory else settings

    @property
    def num_heads(self) -> int:
        """Attention heads of every tower."""
        return int(self.facts["num_heads"])

    @property
    def special_ids(self) -> dict[str, int]:
        """Ids of pad, cls, sep, bos and enc."""
        return dict(self.facts.get("special_token_ids") or self.set_facts["special_token_ids"])

    @property
    def max_length(self) -> int:
        """Longest generated sequence, the first id counted."""
        return int(self.set_facts.get("generate", {}).get("max_length", 10))

    def input(self, name: str) -> Tensor:
        """An input tensor."""
        return self.tensors[f"input.{name}"]

    def has(self, name: str) -> bool:
        """Whether there is such an input."""
        return f"input.{name}" in self.tensors

    def expected(self, name: str) -> Tensor:
        """A recorded output."""
        return self.tensors[f"expected.{name}"]

    @property
    def is_video(self) -> bool:
        """Whether its pictures are clips."""
        return self.has("video")

    @property
    def pixels(self) -> Tensor:
        """Clips [B, T, 3, R, R]; a picture has one frame."""
        return self.input("video") if self.is_video else self.input("image")[:, None]

    def rows(self, kind: str) -> list[tuple[int, ...]]:
        """The token ids of `text`, `question`, `answer`, `given_answer` or `train_answer`, without padding."""
        ids, mask = self.input(f"{kind}_ids"), self.input(f"{kind}_mask").bool()
        assert all(not (~row[:-1] & row[1:]).any() for row in mask), f"{kind}: only padding on the right is understood"
        return [tuple(row[seen].tolist()) for row, seen in zip(ids, mask, strict=True)]

    def order_of_ties(self, topk: Tensor) -> Tensor:
        """How to sort each run of equal first words in shortlists [B, k] by index: the authors leave that order open."""
        first = [ids[1] for ids in self.rows("answer")]
        orders = []
        for shortlist in topk.tolist():
            leader = {first[index]: place for place, index in reversed(list(enumerate(shortlist)))}
            orders.append(sorted(range(len(shortlist)), key=lambda p: (leader[first[shortlist[p]]], shortlist[p])))
        return torch.tensor(orders)

    def ordered(self, name: str, quantity: Quantity) -> Tensor:
        """A recorded output, ranks in the order of `order_of_ties`."""
        recorded = self.expected(name)
        topk = name.replace("rank_log_probs_sum", "rank_topk_ids")
        if quantity.kind in ("rank_topk", "rank_scores") and topk in self.names:
            return recorded.gather(1, self.order_of_ties(self.expected(topk)))
        return recorded

    @cached_property
    def names(self) -> list[str]:
        """The names of all recorded outputs, by file and by description."""
        listed = {*self.tensors, *self.facts["tensors"]}
        return sorted(name.removeprefix("expected.") for name in listed if name.startswith("expected."))

    @cached_property
    def claimed(self) -> dict[str, Quantity]:
        """What is compared: everything recorded but for what is exempt, and for names unknown, which fail by themselves."""
        return {name: meaning(name) for name in self.names if not is_exempt(name) and is_known(name)}

    def unit_input(self, name: str, quantity: Quantity) -> Tensor:
        """The input of a module-level output. How much it is scaled stands in its description: `norm(0.1*unit_x_small)`."""
        source = "unit_x_small" if "small" in quantity.parameters else "unit_x"
        described = self.facts["tensors"].get(f"expected.{name}", {}).get("meaning", f"({source})")
        factor = re.search(rf"\(([\d.e-]+)\s*\*\s*{source}\b", described)
        return float(factor[1] if factor else 1.0) * self.input(source)

    def tolerance(self, name: str) -> tuple[float, float]:
        """Absolute and relative tolerance of a recorded output."""
        entry = self.facts["tensors"].get(f"expected.{name}", {})
        return float(entry.get("atol", ATOL)), float(entry.get("rtol", RTOL))


def read_set(folder: Path) -> list[Case]:
    """The cases of a set."""
    facts = json.loads((folder / "cases.json").read_text())
    return [Case(folder, name, facts, case) for name, case in facts["cases"].items()]


@dataclass(frozen=True)
class Comparison:
    """Ours beside theirs. `excess` is how far the worst element is beyond its tolerance; at most 0 is near enough.

    `is_exact`: ids and choices, of which no difference is small. `is_recorded`: not a row that only the reference judges.
    """

    name: str
    max_difference: float
    excess: float
    is_exact: bool = False
    is_recorded: bool = True

    @property
    def holds(self) -> bool:
        """Whether it is near enough."""
        return self.excess <= 0.0

    def __str__(self) -> str:
        verdict = "near enough" if self.holds else f"beyond its tolerance by {self.excess:.2e}"
        return f"{self.name}: differs by at most {self.max_difference:.2e}, {verdict}"


def compare(name: str, got: Tensor, expected: Tensor, atol: float, rtol: float) -> Comparison:
    """|got - expected| <= atol + rtol * |expected|; whole numbers and entries of a table not looked at exactly."""
    got, expected = got.detach().cpu(), expected.detach().cpu()
    is_exact = not expected.is_floating_point()
    if got.shape != expected.shape:
        name = f"{name} (shape {list(got.shape)}, not {list(expected.shape)})"
        return Comparison(name, float("inf"), float("inf"), is_exact)
    difference = (got.double() - expected.double()).abs()
    allowed = torch.zeros_like(difference)
    if not is_exact:
        allowed = torch.where(expected == UNLISTED, 0.0, atol + rtol * expected.double().abs())
    difference = difference.nan_to_num(nan=float("inf"))
    return Comparison(name, float(difference.max()), float((difference - allowed).max()), is_exact)
