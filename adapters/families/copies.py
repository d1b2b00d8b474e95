"""Slots of a batch's rows, copied to where they always are: for what is recorded once, with the addresses it reads."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapters.families.base import BackboneDims, Family, Role, SlotTerms, SlotView
from adapters.families.slots import OneSlot, SideBySide

SMALLEST_RANK = 16


class Copies:
    """Copies of slots of one family, as far as sites of one role read them, each as wide as the widest of them may be.

    A place holds zeros, which add nothing, where its slot is narrower, and all over for `__base__`.
    """

    def __init__(
        self, family: Family, dims: BackboneDims, role: Role, rank: int, num: int, like: Tensor, device: torch.device
    ) -> None:
        """Room for so many slots of that rank, of the type of `like`."""
        shapes = family.slot_shapes(dims, rank)
        maps = {f"{name}.weight" for name in family.layer_maps()}
        self._tensors = {
            name: _zeros((num, *shapes[name]), like, device, by_inputs=name in maps)
            for name in family.site_tensors(role)
        }
        self._held: list[SlotView | None] = [None] * num
        one = OneSlot({name: tensor[0] for name, tensor in self._tensors.items()})
        self.terms = SlotTerms(family, one if num == 1 else SideBySide(self._tensors))

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Where they are."""
        return tuple(self._tensors.values())

    def load(self, views: Sequence[SlotView]) -> None:
        """Copy slots to the first places; those that are there already stay. What other places hold is of no meaning."""
        stale: list[Tensor] = []
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for place, view in enumerate(views):
            if self._held[place] is view:
                continue
            self._held[place] = view
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


def rank_for(family: Family, dims: BackboneDims, role: Role, views: Sequence[SlotView]) -> int:
    """The rank, a power of two, at which copies have room for all of these slots."""
    rank = SMALLEST_RANK
    while not all(_fits(family.slot_shapes(dims, rank), view, family.site_tensors(role)) for view in views):
        rank *= 2
    return rank


def _fits(shapes: Mapping[str, tuple[int, ...]], view: SlotView, names: Sequence[str]) -> bool:
    own = [(view.tensors[name].shape, shapes[name]) for name in names if name in view.tensors]
    return all(size <= room for shape, rooms in own for size, room in zip(shape, rooms, strict=True))


def _zeros(shape: tuple[int, ...], like: Tensor, device: torch.device, *, by_inputs: bool) -> Tensor:
    if by_inputs:
        *others, outputs, inputs = shape
        return _zeros((*others, inputs, outputs), like, device, by_inputs=False).mT
    return torch.zeros(shape, dtype=like.dtype, device=device)
