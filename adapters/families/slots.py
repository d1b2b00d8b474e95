"""What a family's maths reads of an adapter: one slot for all rows, or a slot for each row.

The maths is written once, for a `Slot`; whose weights a row meets, and by which kernel, is decided here. Rows that share a
slot stand next to each other. Which kernel is fastest where was measured (docs/benchmarks.md); all give the same numbers.

    rows of a slot x tokens      kernel
    many (`segments_from`)       the maths runs slot by slot on views of the rows: what a slot makes stays in the cache
    few, slots side by side      one batched product over the bank's stack, no weight is copied
    few, slots anywhere          a loop of products into one result; all else of the maths once for all rows
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from adapters.products import Activation, activate, linear

Layered = Tensor | tuple[Tensor, ...]  # [layers, ...], or one packed matrix a layer
Weights = Mapping[str, Layered]


class Slot(Protocol):
    """Where a family's maths finds the weights of its rows. `layer` None: the tensor has no layers."""

    def linear(self, x: Tensor, name: str, layer: int | None = None, activation: Activation = "none") -> Tensor:
        """activation of x [B, T, in] through a linear map of each row's slot, [B, T, out]."""

    def norm(self, x: Tensor, name: str, layer: int, eps: float) -> Tensor:
        """x [B, T, D] through a LayerNorm of each row's slot."""

    def scale(self, x: Tensor, name: str) -> Tensor:
        """x [B, T, D] times a number of each row's slot."""


@dataclass(frozen=True)
class Kernels:
    """From how many rows x tokens of a slot on the maths runs slot by slot, and up to how many products are batched."""

    segments_from: int = 256
    stacked_up_to: int = 64


DEFAULT_KERNELS = Kernels()


def of_layer(tensor: Layered, layer: int | None) -> Tensor:
    """The tensor of a layer."""
    if layer is not None:
        return tensor[layer]
    assert isinstance(tensor, Tensor), "a tensor without layers was packed by layers. This is a bug."
    return tensor


@dataclass(frozen=True)
class OneSlot:
    """The same slot for every row."""

    tensors: Weights

    def linear(self, x: Tensor, name: str, layer: int | None = None, activation: Activation = "none") -> Tensor:
        """See Slot."""
        return linear(x, self.tensor(f"{name}.weight", layer), self.tensor(f"{name}.bias", layer), activation)

    def norm(self, x: Tensor, name: str, layer: int, eps: float) -> Tensor:
        """See Slot."""
        gain, shift = self.tensor(f"{name}.weight", layer), self.tensor(f"{name}.bias", layer)
        return functional.layer_norm(x, x.shape[-1:], gain, shift, eps)

    def scale(self, x: Tensor, name: str) -> Tensor:
        """See Slot."""
        return x * self.tensor(name, None)

    def tensor(self, name: str, layer: int | None) -> Tensor:
        """One of its tensors."""
        return of_layer(self.tensors[name], layer)


@dataclass(frozen=True)
class Place:
    """Where a slot is in a bank's stack: its index into tensors [num_slots, ...], of which it may use a corner only."""

    stack: Mapping[str, Tensor]
    index: int


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of a batch, which share a slot; `place` None: it is in no stack."""

    start: int
    stop: int
    slot: OneSlot
    place: Place | None = None

    @property
    def num_rows(self) -> int:
        """How many rows they are."""
        return self.stop - self.start

    def is_followed_by(self, other: "Part") -> bool:
        """Whether another part's slot is the next one of the same stack, with as many rows."""
        if self.place is None or other.place is None or self.place.stack is not other.place.stack:
            return False
        return other.place.index == self.place.index + 1 and other.num_rows == self.num_rows


@dataclass(frozen=True)
class ManySlots:
    """A slot for each of the rows from `parts[0].start` on, all of one size; parts follow one another without a gap."""

    parts: Sequence[Part]
    kernels: Kernels
    _vectors: dict[tuple[str, int | None], Tensor] = field(default_factory=dict)
    _known_runs: dict[int, list[list[Part]]] = field(default_factory=dict)

    def linear(self, x: Tensor, name: str, layer: int | None = None, activation: Activation = "none") -> Tensor:
        """See Slot."""
        first, tokens = self.parts[0].start, x.shape[1]
        products = []
        for run in self.runs(tokens):
            rows = x[run[0].start - first : run[-1].stop - first]
            if len(run) == 1:
                products.append(run[0].slot.linear(rows, name, layer, activation))
            else:
                products.append(_stacked(rows, run, name, layer, activation))
        return products[0] if len(products) == 1 else torch.cat(products)

    def runs(self, tokens: int) -> list[list[Part]]:
        """Parts whose slots lie side by side in a stack, where one batched product for them pays; found once."""
        if tokens not in self._known_runs:
            self._known_runs[tokens] = self._find_runs(tokens)
        return self._known_runs[tokens]

    def _find_runs(self, tokens: int) -> list[list[Part]]:
        runs = [[self.parts[0]]]
        for part in self.parts[1:]:
            if part.num_rows * tokens <= self.kernels.stacked_up_to and runs[-1][-1].is_followed_by(part):
                runs[-1].append(part)
            else:
                runs.append([part])
        return runs

    def norm(self, x: Tensor, name: str, layer: int, eps: float) -> Tensor:
        """See Slot."""
        normed = functional.layer_norm(x, x.shape[-1:], eps=eps)
        return torch.addcmul(self._vector(f"{name}.bias", layer), normed, self._vector(f"{name}.weight", layer))

    def scale(self, x: Tensor, name: str) -> Tensor:
        """See Slot."""
        return x * self._vector(name, None)

    def _vector(self, name: str, layer: int | None) -> Tensor:
        """[B, 1, D]: a vector of each row's slot; made once."""
        key = (name, layer)
        if key not in self._vectors:
            own = [part.slot.tensor(name, layer).expand(part.num_rows, 1, -1) for part in self.parts]
            self._vectors[key] = torch.cat(own)
        return self._vectors[key]


def _stacked(x: Tensor, run: Sequence[Part], name: str, layer: int | None, activation: Activation) -> Tensor:
    """One batched product of the rows x [B, T, in] of slots that lie side by side."""
    place = run[0].place
    assert place is not None, "a run of slots is in no stack. This is a bug."
    slots = slice(place.index, place.index + len(run))
    outputs, inputs = run[0].slot.tensor(f"{name}.weight", layer).shape
    weight, bias = place.stack[f"{name}.weight"][slots], place.stack[f"{name}.bias"][slots]
    if layer is not None:
        weight, bias = weight[:, layer], bias[:, layer]
    weight, bias = weight[:, :outputs, :inputs], bias[:, None, :outputs]
    product = torch.baddbmm(bias, x.reshape(len(run), -1, inputs), weight.transpose(1, 2))
    return activate(product, activation).view(*x.shape[:-1], outputs)
