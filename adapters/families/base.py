"""What a family of adapters is, and how adapters meet a frozen forward pass.

A backbone offers *sites*: named places where something may be added. A family says which tensors an adapter of its
kind holds, how they fold into the tensors of a *slot*, and what a slot's tensors add at a site. The maths of a family
is written once, on slot tensors: the bank serves slots filled with folded numbers, training folds its parameters
anew each step and lets gradients flow through the fold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from adapters.config import AdapterConfig

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
class BackboneDims:
    """The sizes a family needs to know of its backbone. `stacks` are the text stacks present beside the vision tower."""

    width: int
    layers: int
    embed_dim: int
    stacks: tuple[Stack, ...] = ("text", "decoder")

    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of every head tensor an adapter may carry, by tensor name."""
        sizes = {"vision_proj": self.embed_dim, "text_proj": self.embed_dim, "itm_head": 2}
        shapes: dict[str, tuple[int, ...]] = {}
        for head, size in sizes.items():
            shapes[f"{head}.weight"] = (size, self.width)
            shapes[f"{head}.bias"] = (size,)
        return shapes


HEADS = ("vision_proj", "text_proj", "itm_head")


class Family(Protocol):
    """The rules of one kind of adapter. Stateless: one instance serves all adapters of the family."""

    name: str

    def tensor_shapes(self, config: AdapterConfig, dims: BackboneDims) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor a package of this config holds, heads aside.

        Raises: InvalidPackage when the options are not this family's.
        """

    def slot_rank(self, config: AdapterConfig) -> int:
        """The smallest bucket rank that holds the adapter."""

    def slot_shapes(self, dims: BackboneDims, rank: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a slot in the bucket of that rank, heads aside."""

    def fold(self, config: AdapterConfig, tensors: SlotTensors, dims: BackboneDims) -> dict[str, Tensor]:
        """Package tensors to slot tensors, exactly equivalent, at the adapter's own rank; differentiable."""

    def site_groups(self, config: AdapterConfig, dims: BackboneDims) -> dict[str, tuple[str, ...]]:
        """Groups of package tensors that, each zeroed as a whole, must change what the adapter computes."""

    def delta(self, site: Site, x: Tensor, slot: SlotTensors) -> Tensor | None:
        """The term one slot adds at a site for its rows x [B, T, D], or None where it never adds one."""

    def memory(self, stack: Stack, y: Tensor, slot: SlotTensors) -> tuple[Tensor, Tensor] | None:
        """Terms [B, M, D] added to the keys and the values projected from y [B, M, D], or None."""


class Adaptation(Protocol):
    """How the rows of one batch adapt the frozen forward. `None` in its place is the plain backbone."""

    def delta(self, site: Site, x: Tensor) -> Tensor | None:
        """Additive term [B, T, D] at a site for x [B, T, D]; None adds nothing."""

    def memory(self, stack: Stack, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """Key and value terms [B, M, D] of a cross-attending stack, asked for once per stack; None adds nothing."""

    def project(self, head: str, x: Tensor) -> Tensor:
        """x [B, D] through each row's own head (tuned, or the backbone's)."""

    def expand(self, row_index: Tensor) -> "Adaptation":
        """The adaptation whose row j adapts like row `row_index[j]` of this one: frames, pairs, beams."""


@dataclass(frozen=True)
class SlotView:
    """One slot as the forward sees it: its family and its tensors, heads included."""

    family: Family | None
    tensors: SlotTensors


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
