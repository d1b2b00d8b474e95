"""Sets recorded from eP-ALM: one checkpoint per case, frozen models in folders beside, meanings in the tensors' names.

    s{i}.*       a sample at batch size 1: the truth
    batch.*      the same samples as one batch padded on the right, padding seen by the extra token, as the authors do
    rank.s{i}.*  a sample's ranked candidates, which are one batch padded on the right

Nothing about a set is known beforehand: models, sizes, options and tolerances come from its `cases.json`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.parity.sets import UnknownTensor, find_sets

SYSTEM = "epalm"
IGNORED_LABEL = -100
MAX_LENGTH = 30
Row = tuple[int, ...]

_INPUTS = r"inputs|(s\d+|batch)\.(train_)?(input_ids|attention_mask|labels)|rank\.answer_(ids|atts)"
_KINDS = {
    "cls": r"cls",
    "connector": r"connector",
    "layer_input": r"debug\.layer_input\.(?P<layer>\d+)",
    "logits": r"logits",
    "train_logits": r"train_logits",
    "loss_sum": r"loss_sum",
    "loss_mean": r"loss_mean",
    "sequences": r"(greedy|beam(?P<beams>\d+))",
    "score": r"beam(?P<beams>\d+)_score",
    "rank_ids": r"topk_ids",
    "rank_probs": r"topk_probs",
}


@dataclass(frozen=True)
class Quantity:
    """What a recorded tensor is: a kind with its parameters, of some texts ("s0", "batch")."""

    texts: str
    kind: str
    parameters: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_beams(self) -> int:
        """1 for greedy search."""
        return self.parameters.get("beams", 1)

    @property
    def is_padded(self) -> bool:
        """Whether padding leaked into what was recorded."""
        return self.texts == "batch" or self.kind.startswith("rank_")


def is_input(name: str) -> bool:
    """Whether a tensor is given rather than recorded."""
    return re.fullmatch(_INPUTS, name) is not None


def meaning(name: str) -> Quantity:
    """What a recorded tensor's name says. Raises: UnknownTensor."""
    match = re.fullmatch(r"(?P<rank>rank\.)?(?P<texts>s\d+|batch)\.(?P<what>.+)", name)
    for kind, pattern in _KINDS.items():
        found = match and re.fullmatch(pattern, match["what"])
        if match and found and bool(match["rank"]) == kind.startswith("rank_"):
            parameters = {key: int(value) for key, value in found.groupdict().items() if value is not None}
            return Quantity(match["texts"], kind, parameters)
    raise UnknownTensor(f"no comparison claims {name}; the names known are those of _KINDS in {Path(__file__).name}")


@dataclass(frozen=True)
class Text:
    """Token ids without padding, the sample they are about, and, of a training text, which ids are targets."""

    sample: int
    ids: Row
    labels: Row = ()

    def longer(self) -> "Text":
        """One that ends in its last word twice."""
        return Text(self.sample, (*self.ids, self.ids[-1]), (*self.labels, *self.labels[-1:]))


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

    @property
    def checkpoint(self) -> Path:
        """Where the checkpoint is."""
        return self.folder / str(self.facts["checkpoint"])

    @cached_property
    def document(self) -> dict[str, Any]:
        """The checkpoint."""
        document: dict[str, Any] = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        return document

    @property
    def language_model(self) -> Path:
        """The library's folder of the frozen language model."""
        return self.folder / str(self.facts["lm"])

    @property
    def encoder(self) -> Path:
        """The library's folder of the frozen encoder."""
        return self.folder / str(self.facts["encoder"])

    @property
    def special_ids(self) -> Mapping[str, Any]:
        """Ids of bos, eos, pad and the answer token."""
        ids: Mapping[str, Any] = self.set_facts["special_ids"]
        return ids

    @property
    def max_length(self) -> int:
        """Longest generated sequence, the question included."""
        return int(self.facts.get("generation", {}).get("max_length", MAX_LENGTH))

    @cached_property
    def names(self) -> list[str]:
        """The names of all recorded outputs, by file and by description."""
        return sorted(name for name in {*self.tensors, *self.facts["tensors"]} if not is_input(name))

    @cached_property
    def claimed(self) -> dict[str, Quantity]:
        """What is compared: everything recorded but for names unknown, which fail by themselves."""
        found = {}
        for name in self.names:
            try:
                found[name] = meaning(name)
            except UnknownTensor:
                continue
        return found

    @property
    def samples(self) -> Tensor:
        """What the encoder perceives, [S, ...]."""
        return self.tensors["inputs"]

    @cached_property
    def groups(self) -> list[str]:
        """The texts recorded: "s0", "s1", ..., and perhaps "batch"."""
        return sorted({name.split(".")[0] for name in self.tensors if re.match(r"(s\d+|batch)\.", name)})

    def padded(self, group: str, *, is_training: bool) -> tuple[Tensor, Tensor]:
        """ids and mask [B, T] of a group as they were given to the authors' model."""
        prefix = f"{group}.train_" if is_training else f"{group}."
        return self.tensors[f"{prefix}input_ids"], self.tensors[f"{prefix}attention_mask"]

    def texts(self, group: str, *, is_training: bool = False) -> list[Text]:
        """A group's texts: row i of a batch is about sample i."""
        name = f"{group}.train_input_ids" if is_training else f"{group}.input_ids"
        if name not in self.tensors:
            return []
        ids, mask = self.padded(group, is_training=is_training)
        labels = self.tensors.get(f"{group}.train_labels") if is_training else None
        first = 0 if group == "batch" else int(group[1:])
        found = []
        for row, seen in enumerate(mask.bool()):
            length = int(seen.sum())
            assert seen[:length].all(), f"{name}: only padding on the right is understood"
            own = () if labels is None else tuple(labels[row, :length].tolist())
            found.append(Text(first + row, tuple(ids[row, :length].tolist()), own))
        return found

    @property
    def candidates(self) -> list[Row]:
        """The candidates of rankings, without padding."""
        ids, mask = self.tensors["rank.answer_ids"], self.tensors["rank.answer_atts"].bool()
        return [tuple(row[seen].tolist()) for row, seen in zip(ids, mask, strict=True)]

    def question_of(self, text: Text) -> Row:
        """What is ranked about: without an answer token, the question goes on with the candidates' start."""
        has_token = self.document["config"].get("special_answer_token") is not None
        return text.ids if has_token else (*text.ids, self.candidates[0][0])

    @property
    def num_ranked(self) -> int:
        """How many candidates are kept by their first words."""
        return int(next(self.tensors[name].shape[-1] for name in self.tensors if name.endswith(".topk_ids")))

    def tolerance(self, quantity: Quantity) -> float:
        """The case's own absolute tolerance; 0 for ids."""
        if quantity.kind in ("sequences", "rank_ids"):
            return 0.0
        keys = {"train_logits": "logits_abs", "score": f"beam{quantity.num_beams}_score_abs"}
        return float(self.facts["tolerance"][keys.get(quantity.kind, f"{quantity.kind}_abs")])


def read_set(folder: Path) -> list[Case]:
    """The cases of a set."""
    facts = json.loads((folder / "cases.json").read_text())
    return [Case(folder, name, facts, case) for name, case in facts["cases"].items()]


def read_sets(root: Path | None = None) -> list[Case]:
    """The cases of every set."""
    return [case for folder in find_sets(SYSTEM, root) for case in read_set(folder)]
