"""What a family's maths reads of an adapter: one slot for all rows, or a slot for each row.

The maths is written once, for a `Slot`; whose weights a row meets, and by which kernel, is decided here. Rows that share a
slot stand next to each other. Which kernel is fastest where was measured (docs/benchmarks.md); all give the same numbers.

    rows of a slot x tokens      kernel
    many (`segments_from`)       the maths runs slot by slot on views of the rows: what a slot makes stays in the cache; where
                                 single products win on this machine, fewer of wide matrices (`wide_from`)
    some, slots side by side     *stacked*: one batched product over the bank's stack, no weight is copied
    few, slots anywhere          *gathered*: one weighted sum of the stack's rows
    all others                   a loop of products into one result; all else of the maths once for all rows

On a GPU every product is a launch, so that a loop costs as many as there are slots, and time that its arithmetic does not:

    any, on Hopper               *grouped*: one product for groups of any lengths (bfloat16)
    any, slots side by side      *stacked*
    any, slots anywhere          *copied*: their matrices are copied side by side, which is one launch more

How long those take was not measured; how many launches they are was (docs/benchmarks.md).
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from adapters.products import Activation, activate, can_group, gathered, grouped, linear, singles_win

Weights = Mapping[str, Tensor]  # those of layers: [layers, ...]


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
    """From how many rows x tokens of a slot on the maths runs slot by slot, and up to how many the others are taken.

    The defaults were measured on CPUs. Elsewhere nothing is gathered. With `grouped`, what can be is; what cannot, or all
    without it, is copied up to `copied_up_to`, where it does not lie side by side anyway.
    """

    segments_from: int = 256
    wide_from: int = 256  # the same, where a slot's matrices are wide
    stacked_up_to: int = 64
    gathered_up_to: int = 4
    gathered_at_most: int = 16  # where they cannot be stacked
    grouped: bool = False
    copied_up_to: int = 0

    def slot_by_slot_from(self, size: int) -> int:
        """From how many rows x tokens of a slot on the maths runs slot by slot where matrices have so many numbers."""
        return min(self.segments_from, self.wide_from) if size >= WIDE else self.segments_from


ANY = 1 << 60
WIDE = 300_000  # numbers of a matrix; rank 512 of a width of 768 has 393,216
DEFAULT_KERNELS = Kernels()
SINGLES_KERNELS = replace(DEFAULT_KERNELS, wide_from=16)
COPYING_KERNELS = Kernels(
    segments_from=ANY, wide_from=ANY, stacked_up_to=ANY, gathered_up_to=0, gathered_at_most=0, copied_up_to=ANY
)
GROUPED_KERNELS = replace(COPYING_KERNELS, grouped=True)


def kernels_for(device: torch.device, dtype: torch.dtype) -> Kernels:
    """What serves on a device in a precision; on a CPU by a measurement, once."""
    if device.type == "cpu":
        return SINGLES_KERNELS if singles_win(device, dtype) else DEFAULT_KERNELS
    return GROUPED_KERNELS if can_group(device, dtype) else COPYING_KERNELS


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

    @property
    def is_aligned(self) -> bool:
        """Whether grouped products can read its matrices, and what they make of rows: lines of multiples of 16 bytes."""
        matrices = [tensor for tensor in self.tensors.values() if tensor.ndim == 3]
        return all(
            size * tensor.element_size() % 16 == 0
            for tensor in matrices
            for size in (*tensor.shape[1:], max(tensor.stride()[1:]))
        )

    @property
    def is_on_cpu(self) -> bool:
        """Whether its tensors are."""
        return next(iter(self.tensors.values())).device.type == "cpu"

    def tensor(self, name: str, layer: int | None) -> Tensor:
        """One of its tensors."""
        tensor = self.tensors[name]
        return tensor if layer is None else tensor[layer]


@dataclass(frozen=True)
class SideBySide:
    """Slots [S, ...] of one size, one behind the other, each for as many of the rows: the first B / S have the first."""

    tensors: Weights

    def linear(self, x: Tensor, name: str, layer: int | None = None, activation: Activation = "none") -> Tensor:
        """See Slot."""
        weight, bias = (_of_layer(self.tensors[f"{name}.{kind}"], layer) for kind in ("weight", "bias"))
        return _side_by_side(x, weight, bias, activation)

    def norm(self, x: Tensor, name: str, layer: int, eps: float) -> Tensor:
        """See Slot."""
        gain, shift = (self._vectors(f"{name}.{kind}", layer) for kind in ("weight", "bias"))
        normed = functional.layer_norm(x, x.shape[-1:], eps=eps)
        return torch.addcmul(shift, self._by_slot(normed, shift), gain).view_as(x)

    def scale(self, x: Tensor, name: str) -> Tensor:
        """See Slot."""
        factors = self._vectors(name, None)
        return (self._by_slot(x, factors) * factors).view_as(x)

    def _vectors(self, name: str, layer: int | None) -> Tensor:
        """[S, 1, D]: a vector of each slot."""
        return _of_layer(self.tensors[name], layer)[:, None]

    @staticmethod
    def _by_slot(x: Tensor, vectors: Tensor) -> Tensor:
        """[S, rows, D] of rows x [B, T, D]."""
        return x.reshape(len(vectors), -1, x.shape[-1])


@dataclass(frozen=True)
class Place:
    """Where a slot is in a bank's stack: its index into tensors [num_slots, ...], of which it may use a corner only.

    The stack's matrices of layers, [num_slots, layers, out, in], are laid out by inputs.
    """

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
        if self.place is None or other.place is None or not self.is_beside(other):
            return False
        return other.place.index == self.place.index + 1 and other.num_rows == self.num_rows

    def is_before(self, other: "Part") -> bool:
        """Whether another part's slot is further behind in the same stack."""
        if self.place is None or other.place is None or not self.is_beside(other):
            return False
        return self.place.index < other.place.index

    def is_beside(self, other: "Part") -> bool:
        """Whether another part's slot is in the same stack."""
        return self.place is not None and other.place is not None and self.place.stack is other.place.stack


Kernel = Literal["one", "stacked", "gathered", "grouped", "copied"]


class Run(NamedTuple):
    """Parts that follow one another and go through one product: `one` is a part by itself."""

    kernel: Kernel
    parts: tuple[Part, ...]

    @property
    def place(self) -> Place:
        """Where the first part's slot is."""
        place = self.parts[0].place
        assert place is not None, "a run of slots is in no stack. This is a bug."
        return place

    @property
    def places(self) -> list[int]:
        """Where in the stack the parts' slots are."""
        return [part.place.index for part in self.parts if part.place is not None]

    @property
    def rows(self) -> slice:
        """The rows of the batch."""
        return slice(self.parts[0].start, self.parts[-1].stop)

    @property
    def extent(self) -> tuple[int, int]:
        """The first of its rows, and the one behind the last."""
        return self.parts[0].start, self.parts[-1].stop

    @property
    def is_side_by_side(self) -> bool:
        """Whether its slots are neighbours, in their order, with as many rows each."""
        return all(part.is_followed_by(after) for part, after in itertools.pairwise(self.parts))


@dataclass(frozen=True)
class ManySlots:
    """A slot for each of the rows from `parts[0].start` on, all of one size; parts follow one another without a gap."""

    parts: Sequence[Part]
    kernels: Kernels
    _known_runs: dict[int, list[Run]] = field(default_factory=dict)
    _vectors: dict[tuple[str, int | None], Tensor] = field(default_factory=dict)
    _known_plans: dict[tuple[str | int, ...], tuple[Tensor, ...]] = field(default_factory=dict)

    def linear(self, x: Tensor, name: str, layer: int | None = None, activation: Activation = "none") -> Tensor:
        """See Slot."""
        first = self.parts[0].start
        products = []
        for run in self.runs(x.shape[1]):
            rows = x[run.rows.start - first : run.rows.stop - first]
            products.append(self._product(rows, run, name, layer, activation))
        return products[0] if len(products) == 1 else torch.cat(products)

    def _product(self, x: Tensor, run: Run, name: str, layer: int | None, activation: Activation) -> Tensor:
        match run.kernel:
            case "one":
                return run.parts[0].slot.linear(x, name, layer, activation)
            case "stacked":
                return _stacked(x, run, name, layer, activation)
            case "grouped":
                return self._grouped(x, run, name, layer, activation)
            case "gathered":
                return self._gathered(x, run, name, layer, activation)
            case "copied":
                return self._copied(x, run, name, layer, activation)

    def runs(self, tokens: int) -> list[Run]:
        """Parts that go through one product; found once."""
        if tokens not in self._known_runs:
            self._known_runs[tokens] = self._find_runs(tokens)
        return self._known_runs[tokens]

    def _find_runs(self, tokens: int) -> list[Run]:
        runs: list[Run] = []
        for part in self.parts:
            kernel = self._kernel_of_both(runs[-1], part, tokens) if runs else None
            if kernel is None:
                runs.append(Run("one", (part,)))
            else:
                runs[-1] = Run(kernel, (*runs[-1].parts, part))
        return [self._in_place(run, tokens) for run in runs]

    def _in_place(self, run: Run, tokens: int) -> Run:
        """A run that would be copied as it is, where its slots lie as the copies would."""
        fits = run.parts[0].num_rows * tokens <= self.kernels.stacked_up_to
        return run._replace(kernel="stacked") if run.kernel == "copied" and fits and run.is_side_by_side else run

    def _kernel_of_both(self, run: Run, part: Part, tokens: int) -> Kernel | None:
        """The kernel by which a run and the part behind it go through one product; None: by none."""
        last, kernels = run.parts[-1], self.kernels
        if kernels.grouped and last.is_before(part) and last.slot.is_aligned and part.slot.is_aligned:
            return "grouped" if run.kernel != "copied" else None
        most = max(last.num_rows, part.num_rows) * tokens
        if last.is_beside(part) and most <= kernels.copied_up_to:
            return "copied" if run.kernel != "grouped" else None
        can_gather = run.kernel != "stacked" and last.is_beside(part) and last.slot.is_on_cpu
        if can_gather and most <= kernels.gathered_up_to:
            return "gathered"
        if run.kernel != "gathered" and last.is_followed_by(part) and most <= kernels.stacked_up_to:
            return "stacked"
        return "gathered" if can_gather and most <= kernels.gathered_at_most else None

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

    def _gathered(self, x: Tensor, run: Run, name: str, layer: int | None, activation: Activation) -> Tensor:
        """Each row's token of x [B, T, in] times its slot's matrix, wherever in the stack it is."""
        outputs, inputs = run.parts[0].slot.tensor(f"{name}.weight", layer).shape
        matrices = run.place.stack[f"{name}.weight"].transpose(-1, -2)  # [num_slots, layers, in, out], the stack's rank
        height, width = matrices.shape[-2:]
        table = matrices.view(-1, width)[height * (layer or 0) :]
        size = (x.shape[1], matrices[0].numel() // width, inputs)
        rows, starts = self._plan(("rows", *run.extent, *size), lambda: _rows_of_table(run, *size), x.device)
        product = gathered(x, table, rows, starts)[:, :outputs].view(*x.shape[:-1], outputs)
        return activate(product + self._bias(run, name, layer), activation)

    def _grouped(self, x: Tensor, run: Run, name: str, layer: int | None, activation: Activation) -> Tensor:
        """Rows x [B, T, in] times their slots' matrices, those of slots between them that no row has included."""
        outputs, inputs = run.parts[0].slot.tensor(f"{name}.weight", layer).shape
        first, *_, last = run.places
        matrices = _of_layer(run.place.stack[f"{name}.weight"][first : last + 1], layer)
        (ends,) = self._plan(("ends", *run.extent, x.shape[1]), lambda: (_ends(run, x.shape[1]),), x.device)
        product = grouped(x.reshape(-1, inputs), matrices[:, :outputs, :inputs].transpose(1, 2), ends)
        return activate(product.view(*x.shape[:-1], outputs) + self._bias(run, name, layer), activation)

    def _copied(self, x: Tensor, run: Run, name: str, layer: int | None, activation: Activation) -> Tensor:
        """One batched product of rows x [B, T, in] with copies of their slots' matrices, wherever in the stack these are."""
        outputs, inputs = run.parts[0].slot.tensor(f"{name}.weight", layer).shape
        shared = math.gcd(*(part.num_rows for part in run.parts))  # rows that follow one another and share a slot
        (places,) = self._plan(("places", *run.extent), lambda: (_places(run, shared),), x.device)
        matrices = _of_layer(run.place.stack[f"{name}.weight"], layer)[:, :outputs, :inputs].transpose(1, 2)
        bias = self._bias(run, name, layer)[::shared]
        product = torch.baddbmm(bias, x.reshape(len(places), -1, inputs), matrices.index_select(0, places))
        return activate(product, activation).view(*x.shape[:-1], outputs)

    def _plan(
        self, key: tuple[str | int, ...], make: Callable[[], tuple[Tensor, ...]], device: torch.device
    ) -> tuple[Tensor, ...]:
        """What a kernel must know of a run, on the device; made once."""
        if key not in self._known_plans:
            self._known_plans[key] = tuple(tensor.to(device, non_blocking=True) for tensor in make())
        return self._known_plans[key]

    def _bias(self, run: Run, name: str, layer: int | None) -> Tensor:
        """[B, 1, out]: the bias of each row of a run."""
        first = self.parts[0].start
        return self._vector(f"{name}.bias", layer)[run.rows.start - first : run.rows.stop - first]


def _of_layer(tensors: Tensor, layer: int | None) -> Tensor:
    """Of slots' tensors [S, layers, ...] those of a layer, [S, ...]; themselves where they have no layers."""
    return tensors if layer is None else tensors[:, layer]


def _ends(run: Run, tokens: int) -> Tensor:
    """[G] before which row the group of each slot from a run's first to its last ends."""
    places = run.places
    lengths = [0] * (places[-1] - places[0] + 1)
    for part, place in zip(run.parts, places, strict=True):
        lengths[place - places[0]] = part.num_rows * tokens
    return torch.tensor(list(itertools.accumulate(lengths)), dtype=torch.int32)


def _places(run: Run, shared: int) -> Tensor:
    """[B / shared] which slot of the stack so many rows of a run, one after another, share."""
    return torch.tensor(
        [place for part, place in zip(run.parts, run.places, strict=True) for _ in range(part.num_rows // shared)]
    )


def _rows_of_table(run: Run, tokens: int, slot_height: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Which rows of a table the tokens of a run need, and where in that list those of each begin."""
    tops = slot_height * _places(run, 1).int().repeat_interleave(tokens)
    rows = (tops[:, None] + torch.arange(inputs, dtype=torch.int32)).flatten()
    return rows, torch.arange(0, len(rows), inputs, dtype=torch.int32)


def _stacked(x: Tensor, run: Run, name: str, layer: int | None, activation: Activation) -> Tensor:
    """One batched product of the rows x [B, T, in] of slots that lie side by side."""
    place = run.place
    slots = slice(place.index, place.index + len(run.parts))
    outputs, inputs = run.parts[0].slot.tensor(f"{name}.weight", layer).shape
    weight, bias = (_of_layer(place.stack[f"{name}.{kind}"][slots], layer) for kind in ("weight", "bias"))
    return _side_by_side(x, weight[:, :outputs, :inputs], bias[:, :outputs], activation)


def _side_by_side(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation) -> Tensor:
    """Rows x [B, T, in] times matrices [S, out, in], the first of them with the first B / S rows and so on, and bias [S, out]."""
    product = torch.baddbmm(bias[:, None], x.reshape(len(weight), -1, x.shape[-1]), weight.transpose(1, 2))
    return activate(product, activation).view(*x.shape[:-1], weight.shape[1])
