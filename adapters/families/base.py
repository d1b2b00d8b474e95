"""What a family of adapters is, and how adapters meet a frozen forward pass.

A backbone offers *sites*: named places where something may be added. A family says which tensors an adapter of its
kind holds, how they fold into the tensors of a *slot*, and what a slot's tensors add at a site. The maths of a family
is written once, on slot tensors: the bank serves slots filled with folded numbers, training folds its parameters
anew each step and lets gradients flow through the fold.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from adapters.config import AdapterConfig, Architecture, BackboneRef

Stack = Literal["vision", "text", "decoder"]
Role = Literal["mlp", "text", "query", "cross"]
SlotTensors = Mapping[str, Tensor]


class Site(NamedTuple):
    """A place in the frozen forward where a family may add a term.

    stack "vision", role "mlp":   parallel to the block's MLP, reads what enters the second LayerNorm
    stack "text", role "text":    parallel to the feed-forward of a layer run without cross-attention
    role "query":                 read before the cross-attention, added after the feed-forward
    role "cross":                 read after the cross-attention, parallel to the feed-forward
    """

    stack: Stack
    layer: int
    role: Role


@dataclass(frozen=True)
class BlipDims:
    """The sizes a family needs to know of a BLIP. `stacks` are the text stacks present beside the vision tower."""

    width: int
    layers: int
    embed_dim: int
    stacks: tuple[Stack, ...] = ("text", "decoder")
    architecture: ClassVar[Architecture] = "blip"

    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of every head tensor an adapter may carry, by tensor name."""
        sizes = {"vision_proj": self.embed_dim, "text_proj": self.embed_dim, "itm_head": 2}
        shapes: dict[str, tuple[int, ...]] = {}
        for head, size in sizes.items():
            shapes[f"{head}.weight"] = (size, self.width)
            shapes[f"{head}.bias"] = (size,)
        return shapes


class EncoderDims(NamedTuple):
    """The sizes of a perceptual encoder: of its states, and how many blocks give one."""

    width: int
    layers: int


@dataclass(frozen=True)
class OptDims:
    """The sizes a family needs to know of an OPT: `word_width` is that of its word embeddings, `encoders` are by name."""

    width: int
    layers: int
    word_width: int
    encoders: Mapping[str, EncoderDims]
    architecture: ClassVar[Architecture] = "opt"

    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        """None: adapters of a language model carry no heads."""
        return {}


BackboneDims = BlipDims | OptDims


def backbone_ref(dims: BackboneDims, digests: Mapping[str, str], parts: Iterable[str]) -> BackboneRef:
    """What an adapter for these parts of a backbone holds on to; parts that the backbone lacks are left out."""
    own = {part: digests[part] for part in parts if part in digests}
    return BackboneRef(architecture=dims.architecture, width=dims.width, layers=dims.layers, parts=own)


HEADS = ("vision_proj", "text_proj", "itm_head")


@dataclass(frozen=True)
class Schedule:
    """Which feature enters which layer of a language model.

    num_features   how many of the encoder's last blocks give a feature, the shallowest first
    layers         for each layer the feature that enters it, or NOTHING
    """

    num_features: int
    layers: tuple[int, ...]

    @property
    def first(self) -> int:
        """The first layer that a feature enters; the number of layers if there is none."""
        return next((layer for layer, feature in enumerate(self.layers) if feature != NOTHING), len(self.layers))

    @property
    def tail(self) -> int:
        """The first layer after it that none enters, from where on every position may depend on later ones."""
        later = range(self.first, len(self.layers))
        return next((layer for layer in later if self.layers[layer] == NOTHING), len(self.layers))


NOTHING = -1


@dataclass(frozen=True)
class Prompt:
    """Soft prompts before the texts of a batch: embeddings [B, P, E], of which row b has the first lengths[b]."""

    embeddings: Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Injection:
    """What enters the layers of a batch: values [B, N, D], and each row's schedule into its own; None: nothing enters."""

    values: Tensor
    schedules: tuple[Schedule | None, ...]


class Family(Protocol):
    """The rules of one kind of adapter. Stateless: one instance serves all adapters of the family."""

    name: str
    architecture: Architecture

    def derived_dims(self, config: AdapterConfig, tensors: SlotTensors) -> BackboneDims:
        """The backbone's sizes as far as a package alone tells them: those that its tensors would fit."""

    def tensor_shapes(self, config: AdapterConfig, dims: BackboneDims) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor a package of this config holds, heads aside.

        Raises: InvalidPackage when the options are not this family's.
        """

    def init_tensors(self, config: AdapterConfig, dims: BackboneDims, generator: torch.Generator) -> dict[str, Tensor]:
        """A fresh adapter's tensors [float32], as its authors' trainers start."""

    def frozen_names(self, tensors: SlotTensors) -> set[str]:
        """Tensors that training leaves as they are."""

    def slot_rank(self, config: AdapterConfig) -> int:
        """The smallest bucket rank that holds the adapter."""

    def slot_shapes(self, dims: BackboneDims, rank: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a slot in the bucket of that rank, heads aside."""

    def fold(self, config: AdapterConfig, tensors: SlotTensors, dims: BackboneDims) -> dict[str, Tensor]:
        """Package tensors to slot tensors, exactly equivalent, at the adapter's own rank; differentiable."""

    def schedule(self, config: AdapterConfig, dims: BackboneDims) -> Schedule | None:
        """Which feature enters which layer; None for families that inject nothing."""

    def site_groups(self, config: AdapterConfig, dims: BackboneDims) -> dict[str, tuple[str, ...]]:
        """Groups of package tensors that, each zeroed as a whole, must change what the adapter computes."""

    def delta(self, site: Site, x: Tensor, slot: SlotTensors) -> Tensor | None:
        """The term one slot adds at a site for its rows x [B, T, D], or None where it never adds one."""

    def memory(self, stack: Stack, y: Tensor, slot: SlotTensors) -> tuple[Tensor, Tensor] | None:
        """Terms [B, M, D] added to the keys and the values projected from y [B, M, D], or None."""

    def prompt(self, slot: SlotTensors) -> Tensor | None:
        """The soft prompt [P, E] that stands before every text, or None."""

    def inject(self, features: Tensor, slot: SlotTensors, schedule: Schedule) -> Tensor:
        """What enters the layers, [B, N, D], made of an encoder's states [B, L, d] of the first token, all blocks."""


class Adaptation(Protocol):
    """How the rows of one batch adapt the frozen forward. `None` in its place is the plain backbone."""

    def delta(self, site: Site, x: Tensor) -> Tensor | None:
        """Additive term [B, T, D] at a site for x [B, T, D]; None adds nothing."""

    def memory(self, stack: Stack, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """Key and value terms [B, M, D] of a cross-attending stack, asked for once per stack; None adds nothing."""

    def project(self, head: str, x: Tensor) -> Tensor:
        """x [B, D] through each row's own head (tuned, or the backbone's)."""

    def prompt(self, num_rows: int) -> Prompt | None:
        """The soft prompts of the batch's rows; None when no row has one."""

    def inject(self, features: Sequence[Tensor | None]) -> Injection | None:
        """What enters the layers of each row, made of its encoder's states [L, d]; None where a row has no medium."""

    def expand(self, row_index: Tensor) -> "Adaptation":
        """The adaptation whose row j adapts like row `row_index[j]` of this one: frames, pairs, beams."""


@dataclass(frozen=True)
class SlotView:
    """One slot as the forward sees it: its family and its tensors, heads included, and what enters which layer."""

    family: Family | None
    tensors: SlotTensors
    schedule: Schedule | None = None

    def prompt(self) -> Tensor | None:
        """Its soft prompt [P, E]."""
        return None if self.family is None else self.family.prompt(self.tensors)

    def inject(self, features: Sequence[Tensor]) -> tuple[Tensor, Schedule] | None:
        """What enters the layers of rows with these encoder states [L, d] each, [B, N, D], and where."""
        if self.family is None or self.schedule is None or not features:
            return None
        return self.family.inject(torch.stack(list(features)), self.tensors, self.schedule), self.schedule


@dataclass(frozen=True)
class UniformAdaptation:
    """One slot for every row, however many: training, and batches of a single adapter."""

    slot: SlotView

    def delta(self, site: Site, x: Tensor) -> Tensor | None:
        """See Adaptation.delta."""
        return None if self.slot.family is None else self.slot.family.delta(site, x, self.slot.tensors)

    def memory(self, stack: Stack, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """See Adaptation.memory."""
        return None if self.slot.family is None else self.slot.family.memory(stack, y, self.slot.tensors)

    def project(self, head: str, x: Tensor) -> Tensor:
        """See Adaptation.project."""
        return functional.linear(x, self.slot.tensors[f"{head}.weight"], self.slot.tensors[f"{head}.bias"])

    def prompt(self, num_rows: int) -> Prompt | None:
        """See Adaptation.prompt."""
        return _join_prompts([(range(num_rows), self.slot.prompt())], num_rows)

    def inject(self, features: Sequence[Tensor | None]) -> Injection | None:
        """See Adaptation.inject."""
        return _join_injections([(range(len(features)), self.slot)], features)

    def expand(self, row_index: Tensor) -> "UniformAdaptation":
        """See Adaptation.expand."""
        return self


@dataclass(frozen=True)
class RowGroup:
    """The rows [number of rows] of a batch that share a slot."""

    slot: UniformAdaptation
    rows: Tensor


@dataclass(frozen=True)
class GroupedAdaptation:
    """Rows grouped by slot, made before the launch: each group runs its family's maths on its own rows.

    `slot_of_row` lists the index into `slots` of every row. A slot without a family adds nothing and only projects.
    """

    slots: Sequence[SlotView]
    slot_of_row: tuple[int, ...]
    device: torch.device
    groups: tuple[RowGroup, ...] = field(init=False)

    def __post_init__(self) -> None:
        rows_of: dict[int, list[int]] = {}
        for row, slot in enumerate(self.slot_of_row):
            rows_of.setdefault(slot, []).append(row)
        groups = tuple(
            RowGroup(UniformAdaptation(self.slots[slot]), torch.tensor(rows, dtype=torch.long, device=self.device))
            for slot, rows in rows_of.items()
        )
        object.__setattr__(self, "groups", groups)

    def delta(self, site: Site, x: Tensor) -> Tensor | None:
        """See Adaptation.delta."""
        parts = [(group.rows, group.slot.delta(site, x.index_select(0, group.rows))) for group in self.groups]
        return _assemble(x, parts)

    def memory(self, stack: Stack, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """See Adaptation.memory."""
        pairs = [(group.rows, group.slot.memory(stack, y.index_select(0, group.rows))) for group in self.groups]
        keys = _assemble(y, [(rows, pair and pair[0]) for rows, pair in pairs])
        values = _assemble(y, [(rows, pair and pair[1]) for rows, pair in pairs])
        return None if keys is None or values is None else (keys, values)

    def project(self, head: str, x: Tensor) -> Tensor:
        """See Adaptation.project."""
        parts = [(group.rows, group.slot.project(head, x.index_select(0, group.rows))) for group in self.groups]
        out = x.new_zeros(*x.shape[:-1], parts[0][1].shape[-1])
        return _scatter(out, parts)

    def prompt(self, num_rows: int) -> Prompt | None:
        """See Adaptation.prompt."""
        return _join_prompts([(group.rows.tolist(), group.slot.slot.prompt()) for group in self.groups], num_rows)

    def inject(self, features: Sequence[Tensor | None]) -> Injection | None:
        """See Adaptation.inject."""
        return _join_injections([(group.rows.tolist(), group.slot.slot) for group in self.groups], features)

    def expand(self, row_index: Tensor) -> "GroupedAdaptation":
        """See Adaptation.expand."""
        rows = tuple(self.slot_of_row[index] for index in row_index.tolist())
        return GroupedAdaptation(self.slots, rows, self.device)


def adapt_rows(slots: Sequence[SlotView], slot_of_row: Sequence[int], device: torch.device) -> Adaptation:
    """The adaptation of a batch whose row i uses `slots[slot_of_row[i]]`."""
    if len(set(slot_of_row)) == 1:
        return UniformAdaptation(slots[slot_of_row[0]])
    return GroupedAdaptation(slots, tuple(slot_of_row), device)


def _assemble(like: Tensor, parts: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor | None:
    present = [(rows, part) for rows, part in parts if part is not None]
    return _scatter(torch.zeros_like(like), present) if present else None


def _scatter(out: Tensor, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    for rows, part in parts:
        out.index_copy_(0, rows, part)
    return out


def columns_of(tensors: SlotTensors, name: str, default: int) -> int:
    """The columns of a matrix; `default` where there is no such matrix."""
    return tensors[name].shape[1] if name in tensors and tensors[name].ndim == 2 else default


def _join_prompts(groups: Sequence[tuple[Sequence[int], Tensor | None]], num_rows: int) -> Prompt | None:
    """The prompts of groups of rows, the shorter ones padded with zeros behind."""
    present = [(list(rows), prompt) for rows, prompt in groups if prompt is not None]
    if not present:
        return None
    longest = max(len(prompt) for _, prompt in present)
    embeddings = present[0][1].new_zeros(num_rows, longest, present[0][1].shape[1])
    lengths = [0] * num_rows
    for rows, prompt in present:
        own = functional.pad(prompt, (0, 0, 0, longest - len(prompt))).expand(len(rows), -1, -1)
        embeddings = embeddings.index_copy(0, torch.tensor(rows, device=prompt.device), own)
        for row in rows:
            lengths[row] = len(prompt)
    return Prompt(embeddings, tuple(lengths))


def _join_injections(
    groups: Sequence[tuple[Sequence[int], SlotView]], features: Sequence[Tensor | None]
) -> Injection | None:
    """What enters the layers of groups of rows, the fewer values padded with zeros behind."""
    present: list[tuple[list[int], Tensor]] = []
    schedules: list[Schedule | None] = [None] * len(features)
    for rows, slot in groups:
        seeing = [(row, states) for row in rows if (states := features[row]) is not None]
        injected = slot.inject([states for _, states in seeing])
        if injected is not None:
            present.append(([row for row, _ in seeing], injected[0]))
            for row, _ in seeing:
                schedules[row] = injected[1]
    if not present:
        return None
    most = max(values.shape[1] for _, values in present)
    joined = present[0][1].new_zeros(len(features), most, present[0][1].shape[2])
    for rows, values in present:
        own = functional.pad(values, (0, 0, 0, most - values.shape[1]))
        joined = joined.index_copy(0, torch.tensor(rows, device=values.device), own)
    return Injection(joined, tuple(schedules))
