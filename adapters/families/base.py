"""What a family of adapters is, and how adapters meet a frozen forward pass.

A backbone offers *sites*: named places where something may be added. A family says which tensors an adapter of its
kind holds, how they fold into the tensors of a *slot*, and what a slot's tensors add at a site. The maths of a family
is written once, on slot tensors: the bank serves slots filled with folded numbers, training folds its parameters
anew each step and lets gradients flow through the fold.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from adapters.config import AdapterConfig, Architecture, BackboneRef
from adapters.families.slots import (
    DEFAULT_KERNELS,
    Kernels,
    ManySlots,
    OneSlot,
    Part,
    Place,
    Slot,
    Weights,
    kernels_for,
)

Stack = Literal["vision", "text", "decoder"]
Role = Literal["mlp", "text", "cross"]
SlotTensors = Mapping[str, Tensor]


class Site(NamedTuple):
    """A place in the frozen forward where a family may add a term.

    stack "vision", role "mlp":   parallel to the block's MLP, reads what enters the second LayerNorm
    stack "text", role "text":    parallel to the feed-forward of a layer run without cross-attention
    role "cross":                 parallel to the feed-forward of a layer with cross-attention, reads what enters the
                                  cross-attention and what leaves it
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
        """Package tensors to slot tensors, exactly equivalent, at the adapter's own rank; differentiable.

        The matrices of `layer_maps` lie by inputs, as a bank's slots have them, unless a gradient is asked for.
        """

    def schedule(self, config: AdapterConfig, dims: BackboneDims) -> Schedule | None:
        """Which feature enters which layer; None for families that inject nothing."""

    def site_groups(self, config: AdapterConfig, dims: BackboneDims) -> dict[str, tuple[str, ...]]:
        """Groups of package tensors that, each zeroed as a whole, must change what the adapter computes."""

    def layer_maps(self) -> tuple[str, ...]:
        """Linear maps of a slot, one a layer: what most of the time goes into, and may be packed (`adapters.products`)."""

    def site_tensors(self, role: Role) -> tuple[str, ...]:
        """The tensors of a slot that `delta` reads at sites of that role."""

    def delta(self, site: Site, x: Tensor, slot: Slot, before: Tensor | None = None) -> Tensor | None:
        """The term a slot adds at a site for its rows x [B, T, D], or None where it never adds one.

        `before` [B, T, D] is what entered the cross-attention that x left, at "cross" sites; without it, what a family makes
        of it is left out.
        """

    def memory(self, stack: Stack, y: Tensor, slot: OneSlot) -> tuple[Tensor, Tensor] | None:
        """Terms [B, M, D] added to the keys and the values projected from y [B, M, D], or None."""

    def prompt(self, slot: OneSlot) -> Tensor | None:
        """The soft prompt [P, E] that stands before every text, or None."""

    def inject(self, features: Tensor, slot: OneSlot, schedule: Schedule) -> Tensor:
        """What enters the layers, [B, N, D], made of an encoder's states [B, L, d] of the first token, all blocks."""


class Terms(Protocol):
    """What the rows of one batch add at the sites of the layers."""

    def add(self, site: Site, x: Tensor, out: Tensor, before: Tensor | None = None) -> Tensor:
        """`out` [B, T, D] and each row's term at a site for x [B, T, D], see `Family.delta`; `out` may be written to."""


class Adaptation(Terms, Protocol):
    """How the rows of one batch adapt the frozen forward. `None` in its place is the plain backbone."""

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
    """One slot as the forward sees it: its family and its tensors, heads included, and what enters which layer.

    `place` is where it lies beside other slots, if it does.
    """

    family: Family | None
    tensors: Weights
    schedule: Schedule | None = None
    place: Place | None = None

    @property
    def slot(self) -> OneSlot:
        """The slot as a family's maths reads it."""
        return OneSlot(self.tensors)

    @cached_property
    def sizes(self) -> tuple[torch.Size, ...]:
        """Shapes of the matrices of its layers' maps. Slots of equal sizes can be one `ManySlots`."""
        maps = () if self.family is None else self.family.layer_maps()
        return tuple(self.slot.tensor(f"{name}.weight", 0).shape for name in maps)

    @cached_property
    def widest(self) -> int:
        """Numbers of the largest of those matrices."""
        return max((size.numel() for size in self.sizes), default=0)

    def memory(self, stack: Stack, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """See Family.memory."""
        return None if self.family is None else self.family.memory(stack, y, self.slot)

    def prompt(self) -> Tensor | None:
        """Its soft prompt [P, E]."""
        return None if self.family is None else self.family.prompt(self.slot)

    def inject(self, features: Sequence[Tensor]) -> tuple[Tensor, Schedule] | None:
        """What enters the layers of rows with these encoder states [L, d] each, [B, N, D], and where."""
        if self.family is None or self.schedule is None or not features:
            return None
        return self.family.inject(torch.stack(list(features)), self.slot, self.schedule), self.schedule


NO_ADAPTER = SlotView(None, {})


@dataclass(frozen=True)
class SlotTerms:
    """The terms of one family's slots, of which each row has its own as the slot says."""

    family: Family
    slot: Slot

    def add(self, site: Site, x: Tensor, out: Tensor, before: Tensor | None = None) -> Tensor:
        """See Terms.add. Nothing is written to: gradients may flow."""
        term = self.family.delta(site, x, self.slot, before)
        return out if term is None else out + term


@dataclass(frozen=True)
class UniformAdaptation:
    """One slot for every row, however many: training, and batches of a single adapter.

    `kernels` serve when rows of other slots join them; None: what serves where the slots are.
    """

    view: SlotView
    kernels: Kernels | None = None

    def add(self, site: Site, x: Tensor, out: Tensor, before: Tensor | None = None) -> Tensor:
        """See Adaptation.add. Nothing is written to: gradients may flow."""
        return (
            out if self.view.family is None else SlotTerms(self.view.family, self.view.slot).add(site, x, out, before)
        )

    def memory(self, stack: Stack, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """See Adaptation.memory."""
        return self.view.memory(stack, y)

    def project(self, head: str, x: Tensor) -> Tensor:
        """See Adaptation.project."""
        return self.view.slot.linear(x, head)

    def prompt(self, num_rows: int) -> Prompt | None:
        """See Adaptation.prompt."""
        return _join_prompts([(range(num_rows), self.view.prompt())], num_rows)

    def inject(self, features: Sequence[Tensor | None]) -> Injection | None:
        """See Adaptation.inject."""
        return _join_injections([(range(len(features)), self.view)], features)

    def expand(self, row_index: Tensor) -> "UniformAdaptation":
        """See Adaptation.expand."""
        return self


class RowGroup(NamedTuple):
    """Rows `start` to `stop` of a batch, which share a slot."""

    view: SlotView
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        """The rows."""
        return slice(self.start, self.stop)

    @property
    def part(self) -> Part:
        """The rows as the kernels see them."""
        return Part(self.start, self.stop, self.view.slot, self.view.place)


class Span(NamedTuple):
    """Rows of one family and size that follow one another, slot by slot, and all their slots as one."""

    family: Family
    groups: tuple[RowGroup, ...]
    slots: ManySlots

    @property
    def rows(self) -> slice:
        """The rows."""
        return slice(self.groups[0].start, self.groups[-1].stop)


@dataclass(frozen=True)
class GroupedAdaptation:
    """Rows with slots of their own, grouped before the launch.

    `slot_of_row` lists the index into `slots` of every row. Any order gives the same numbers; rows that share a slot are
    served best side by side, and slots that lie side by side in a bank in that order. A slot without a family adds nothing
    and only projects.
    """

    slots: Sequence[SlotView]
    slot_of_row: tuple[int, ...]
    kernels: Kernels = DEFAULT_KERNELS
    groups: tuple[RowGroup, ...] = field(init=False)
    spans: tuple[Span, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self._group()))
        object.__setattr__(self, "spans", tuple(self._span()))

    def _group(self) -> Iterator[RowGroup]:
        start = 0
        for slot, rows in groupby(self.slot_of_row):
            stop = start + len(list(rows))
            yield RowGroup(self.slots[slot], start, stop)
            start = stop

    def _span(self) -> Iterator[Span]:
        for (family, _), groups in groupby(self.groups, key=lambda group: (group.view.family, group.view.sizes)):
            if family is not None:
                own = tuple(groups)
                yield Span(family, own, ManySlots([group.part for group in own], self.kernels))

    def add(self, site: Site, x: Tensor, out: Tensor, before: Tensor | None = None) -> Tensor:
        """See Adaptation.add."""
        for family, groups, slots in self.spans:
            num_rows = x.shape[1] * max(group.stop - group.start for group in groups)
            if num_rows >= self.kernels.slot_by_slot_from(groups[0].view.widest):
                for group in groups:
                    _add_term(family, site, x, out, before, group.rows, group.view.slot)
            else:
                _add_term(family, site, x, out, before, slice(groups[0].start, groups[-1].stop), slots)
        return out

    def memory(self, stack: Stack, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """See Adaptation.memory."""
        terms = [(group.rows, group.view.memory(stack, y[group.rows])) for group in self.groups]
        if all(pair is None for _, pair in terms):
            return None
        keys, values = torch.zeros_like(y), torch.zeros_like(y)
        for rows, pair in terms:
            if pair is not None:
                keys[rows], values[rows] = pair
        return keys, values

    def project(self, head: str, x: Tensor) -> Tensor:
        """See Adaptation.project."""
        return torch.cat([group.view.slot.linear(x[group.rows], head) for group in self.groups])

    def prompt(self, num_rows: int) -> Prompt | None:
        """See Adaptation.prompt."""
        own = [(range(group.start, group.stop), group.view.prompt()) for group in self.groups]
        return _join_prompts(own, num_rows)

    def inject(self, features: Sequence[Tensor | None]) -> Injection | None:
        """See Adaptation.inject."""
        return _join_injections([(range(group.start, group.stop), group.view) for group in self.groups], features)

    def expand(self, row_index: Tensor) -> "GroupedAdaptation":
        """See Adaptation.expand."""
        rows = tuple(self.slot_of_row[index] for index in row_index.tolist())
        return GroupedAdaptation(self.slots, rows, self.kernels)


def _add_term(
    family: Family, site: Site, x: Tensor, out: Tensor, before: Tensor | None, rows: slice, slot: Slot
) -> None:
    term = family.delta(site, x[rows], slot, None if before is None else before[rows])
    if term is not None:
        out[rows].add_(term)


def adapt_rows(slots: Sequence[SlotView], slot_of_row: Sequence[int], kernels: Kernels | None = None) -> Adaptation:
    """The adaptation of a batch whose row i uses `slots[slot_of_row[i]]`. `kernels` None: what serves where the slots are."""
    if len(set(slot_of_row)) == 1:
        return UniformAdaptation(slots[slot_of_row[0]], kernels)
    return GroupedAdaptation(slots, tuple(slot_of_row), kernels or _kernels_of(slots))


def _kernels_of(slots: Sequence[SlotView]) -> Kernels:
    tensors = [next(iter(slot.tensors.values())) for slot in slots if slot.family is not None]
    return kernels_for(tensors[0].device, tensors[0].dtype) if tensors else DEFAULT_KERNELS


def join_adaptations(
    first: Adaptation | None, num_first: int, second: Adaptation | None, num_second: int
) -> Adaptation | None:
    """The adaptation of a batch's rows with another's behind them."""
    if first is None and second is None:
        return None
    views: list[SlotView] = []
    rows: list[int] = []
    kernels: Kernels | None = None
    for adaptation, num_rows in ((first, num_first), (second, num_second)):
        own, of_row = _slots_of(adaptation, num_rows)
        rows += [_place(views, own[slot]) for slot in of_row]
        if isinstance(adaptation, UniformAdaptation | GroupedAdaptation):
            kernels = kernels or adaptation.kernels
    return adapt_rows(views, rows, kernels)


def views_of_rows(adaptation: Adaptation | None, num_rows: int) -> list[SlotView]:
    """The slot of each of so many rows."""
    views, rows = _slots_of(adaptation, num_rows)
    return [views[slot] for slot in rows]


def _slots_of(adaptation: Adaptation | None, num_rows: int) -> tuple[Sequence[SlotView], Sequence[int]]:
    match adaptation:
        case None:
            return [NO_ADAPTER], [0] * num_rows
        case UniformAdaptation(view):
            return [view], [0] * num_rows
        case GroupedAdaptation(slots, slot_of_row):
            return slots, slot_of_row
    raise AssertionError("an adaptation that knows no slots was joined. This is a bug.")


def _place(views: list[SlotView], view: SlotView) -> int:
    """Where a view is in the list, which it is added to if need be. A slot has one view while it is leased."""
    for place, known in enumerate(views):
        if known is view:
            return place
    views.append(view)
    return len(views) - 1


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
