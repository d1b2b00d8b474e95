"""Slots of a batch's rows, copied to where they always are: for what is recorded once, with the addresses it reads."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.families.base import BackboneDims, Family, Role, SlotTerms, SlotView
from adapters.families.slots import OneSlot, SideBySide, Slot

SMALLEST_RANK = 16


class Copies:
    """Copies of slots of one family, as far as sites of one role and heads read them, each as wide as the widest of them may be.

    A place holds zeros, which add nothing, where its slot is narrower, and for `__base__` all over but in the heads.
    """

    def __init__(
        self,
        family: Family,
        dims: BackboneDims,
        role: Role,
        rank: int,
        num: int,
        like: Tensor,
        heads: Sequence[str] = (),
    ) -> None:
        """Room for so many slots of that rank and their heads of these names, of the type and on the device of `like`."""
        shapes = family.slot_shapes(dims, rank) | dims.head_shapes()
        names = (*family.site_tensors(role), *(f"{head}.{kind}" for head in heads for kind in ("weight", "bias")))
        maps = {f"{name}.weight" for name in family.layer_maps()}
        self._tensors = {name: _zeros((num, *shapes[name]), like, by_inputs=name in maps) for name in names}
        self._held: list[SlotView | None] = [None] * num
        one = OneSlot({name: tensor[0] for name, tensor in self._tensors.items()})
        self._slot: Slot = one if num == 1 else SideBySide(self._tensors)
        self.terms = SlotTerms(family, self._slot)

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Where they are."""
        return tuple(self._tensors.values())

    def project(self, head: str, x: Tensor) -> Tensor:
        """x [B, D] through each row's own head."""
        return self._slot.linear(x[:, None], head)[:, 0]

    def load(self, views: Sequence[SlotView]) -> None:
        """Copy slots to the first places; those that are there already stay. What other places hold is of no meaning."""
        stale: list[Tensor] = []
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for place, view in enumerate(views):
            if self._held[place] is view:
                continue
            self._held[place] = None  # until it is there
            for name, tensors in self._tensors.items():
                own, source = tensors[place], view.tensors.get(name)
                if source is None or source.shape != own.shape:
                    stale.append(own)
                if source is not None:
                    targets.append(own[tuple(slice(0, size) for size in source.shape)])
                    sources.append(source)
        if stale:
            torch._foreach_zero_(stale)
        if targets:
            torch._foreach_copy_(targets, sources, non_blocking=True)
        self._held[: len(views)] = views


class Slots(NamedTuple):
    """Copies of whose slots some work reads, one for all of its rows or one for each; no family: of none."""

    family: Family | None
    num: int
    rank: int

    def make(self, dims: BackboneDims | None, role: Role, like: Tensor, heads: Sequence[str] = ()) -> Copies | None:
        """Room for them; see Copies."""
        if self.family is None or dims is None:
            return None
        return Copies(self.family, dims, role, self.rank, self.num, like, heads)


def slots_of(
    views: Sequence[SlotView], num: int, dims: BackboneDims | None, role: Role
) -> tuple[Slots, Sequence[SlotView]] | None:
    """What rows with these slots need, where there are so many places, and what is to be copied; None where families mix."""
    families = {view.family for view in views if view.family is not None}
    if len(families) > 1:
        return None
    own = views[:1] if all(view is views[0] for view in views) else views
    if not families or dims is None:
        return Slots(None, 0, 0), own
    (family,) = families
    return Slots(family, 1 if len(own) == 1 else num, _rank_for(family, dims, role, own)), own


def _rank_for(family: Family, dims: BackboneDims, role: Role, views: Sequence[SlotView]) -> int:
    """The rank, a power of two, at which copies have room for all of these slots: few sizes are recorded."""
    rank = SMALLEST_RANK
    while not all(_fits(family.slot_shapes(dims, rank), view, family.site_tensors(role)) for view in views):
        rank *= 2
    return rank


def _fits(shapes: Mapping[str, tuple[int, ...]], view: SlotView, names: Sequence[str]) -> bool:
    own = [(view.tensors[name].shape, shapes[name]) for name in names if name in view.tensors]
    return all(size <= room for shape, rooms in own for size, room in zip(shape, rooms, strict=True))


def _zeros(shape: tuple[int, ...], like: Tensor, *, by_inputs: bool) -> Tensor:
    if by_inputs:
        *others, outputs, inputs = shape
        return _zeros((*others, inputs, outputs), like, by_inputs=False).mT
    return like.new_zeros(shape)
