"""The bank: adapters on the host and in the device's slots, leased per batch.

Tiers of an adapter, by weights digest:

    absent -> host (folded, cast, checked) -> device (a slot of its rank bucket)

`hold` keeps an adapter on the host for as long as somebody has it (a pin); the least recently used others make room.
Slots are written by the device thread alone, and only those that nobody leases. A lease ends when the device has done what
read the slot: so what is written, perhaps beside a batch that is running, is read by none. Slot tensors are allocated once
and never move: those of a bucket are a *stack*, whose slots one product serves; the matrices of layers are laid out by inputs
there, and on the host alike. Slot 0 is `__base__`: it adds nothing and projects with the backbone's own heads.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from adapters.config import BASE_ADAPTER, AdapterConfig, Architecture
from adapters.errors import AdapterNotFound, Conflict, NonFiniteTensor, RankTooLarge
from adapters.families import families_for, family_of
from adapters.families.base import Adaptation, BackboneDims, Family, Schedule, SlotView, adapt_rows
from adapters.families.slots import Kernels, Place, kernels_for
from adapters.package import Package, is_finite
from service.errors import NoFreeSlot
from service.logs import event
from service.metrics import Metrics
from service.transfers import HERE, Arrival, Transfers

log = logging.getLogger(__name__)

Buckets = tuple[tuple[int, int], ...]
# By the kind of backbone. What counts as an adapter's rank its family says: for eP-ALM the number of its connectors.
DEFAULT_BUCKETS: Mapping[Architecture, Buckets] = {
    "blip": ((64, 24), (128, 6), (512, 2)),
    "opt": ((1, 16), (8, 16), (32, 2)),
}
USUAL_FRACTION = 0.15
TIERS = ("host", "device")


@dataclass(frozen=True)
class HostAdapter:
    """An adapter on the host: folded slot tensors at its own rank, in the serving dtype, heads included."""

    digest: str
    config: AdapterConfig
    family: Family
    slot_rank: int
    tensors: Mapping[str, Tensor]
    schedule: Schedule | None = None

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of its tensors; of those in pinned memory what torch takes for them, which is the next power of two."""
        return sum(_held_bytes(tensor) for tensor in self.tensors.values())


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _held_bytes(tensor: Tensor) -> int:
    num_bytes = _num_bytes(tensor)
    return 1 << (num_bytes - 1).bit_length() if tensor.is_pinned() else num_bytes


def fold_package(package: Package, dims: BackboneDims, dtype: torch.dtype) -> HostAdapter:
    """Fold a package in float32, cast it, and check that the cast kept every number finite.

    Raises: NonFiniteTensor naming a tensor that the serving dtype cannot hold.
    """
    family = family_of(package.config.family)
    floats = {name: tensor.float() for name, tensor in package.tensors.items()}
    folded = family.fold(package.config, floats, dims)
    folded |= {name: tensor for name, tensor in floats.items() if name in dims.head_shapes()}
    cast = {name: tensor.to(dtype) for name, tensor in folded.items()}
    for name, tensor in cast.items():
        if not is_finite(tensor):
            raise NonFiniteTensor(f"{name} does not fit into {dtype} after folding")
    schedule = family.schedule(package.config, dims)
    return HostAdapter(package.weights_digest, package.config, family, family.slot_rank(package.config), cast, schedule)


def _layer_matrices(family: Family) -> frozenset[str]:
    """The names of the matrices that a slot has for each layer, [layers, out, in]."""
    return frozenset(f"{name}.weight" for name in family.layer_maps())


@dataclass
class _HostEntry:
    adapter: HostAdapter
    num_holders: int = 0


@dataclass
class _Slot:
    """One slot: where it is, who is in it, how many batches lease it, when it was last leased."""

    family: str
    rank: int
    index: int
    digest: str | None = None
    num_leases: int = 0
    leased_at: float = 0.0
    view: SlotView | None = None
    arrival: Arrival = HERE
    was_prefetched: bool = False  # and not leased since


@dataclass
class _Bucket:
    """The slots of one family and rank. `stack` has the tensors [num_slots, ...] of all of them."""

    stack: dict[str, Tensor]
    slots: list[_Slot] = field(default_factory=list)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot, filled or not."""
        return sum(_num_bytes(tensor[0]) for tensor in self.stack.values())


class AdapterBank:
    """Host tier and slots of one backbone. Host methods may be called from any thread, slot methods by the device thread."""

    def __init__(
        self,
        dims: BackboneDims | None,
        heads: Mapping[str, Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
        buckets: Buckets,
        host_bytes: int,
        metrics: Metrics,
        kernels: Kernels | None = None,
    ) -> None:
        """`dims` None: the backbone takes no adapters and the bank holds `__base__` alone.

        `kernels` None: those that serve on this device.
        """
        self.dims = dims
        self.device = device
        self.dtype = dtype
        self.buckets = buckets
        self.transfers = Transfers(device)
        self._kernels = kernels or kernels_for(device, dtype)
        self.is_wanted: Callable[[str], bool] = lambda digest: False  # set by the engine, which knows what waits
        self._heads = dict(heads)
        self._base = SlotView(None, self._heads)
        self._host_bytes = host_bytes
        self._host: OrderedDict[str, _HostEntry] = OrderedDict()
        self._host_used = 0
        self._unwanted: set[str] = set()  # unloaded; their slots count as empty
        self._lock = threading.Lock()
        self._metrics = metrics
        self._buckets = self._allocate() if dims is not None else {}
        self.transfers.follow()  # what the slots begin as must not come behind what they are filled with

    def _allocate(self) -> dict[tuple[str, int], _Bucket]:
        assert self.dims is not None
        allocated: dict[tuple[str, int], _Bucket] = {}
        for family in families_for(self.dims.architecture):
            for rank, num_slots in self.buckets:
                shapes = family.slot_shapes(self.dims, rank) | {n: tuple(t.shape) for n, t in self._heads.items()}
                stack = {
                    name: self._zeros((num_slots, *shape), by_inputs=name in _layer_matrices(family))
                    for name, shape in shapes.items()
                }
                slots = [_Slot(family.name, rank, index) for index in range(num_slots)]
                allocated[family.name, rank] = _Bucket(stack, slots)
        return allocated

    def _zeros(self, shape: tuple[int, ...], *, by_inputs: bool) -> Tensor:
        if by_inputs:
            *others, outputs, inputs = shape
            return self._zeros((*others, inputs, outputs), by_inputs=False).transpose(-1, -2)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    # --- host tier ---------------------------------------------------------------------------------------

    def fold(self, package: Package) -> HostAdapter:
        """A package as this bank holds it, see `fold_package`: where the device can read it by itself. Any thread."""
        assert self.dims is not None, "the caller checked that the backbone takes adapters. This is a bug."
        folded = fold_package(package, self.dims, self.dtype)
        return replace(folded, tensors={name: self.transfers.pinned(own) for name, own in folded.tensors.items()})

    @property
    def max_rank(self) -> int:
        """The largest rank any slot can hold."""
        return max((rank for rank, _ in self.buckets), default=0)

    def check_rank(self, adapter_rank: int) -> None:
        """Raises: RankTooLarge when no bucket is wide enough."""
        if adapter_rank > self.max_rank:
            raise RankTooLarge(f"rank {adapter_rank} is above the largest slot bucket, {self.max_rank}", param="rank")

    def put(self, adapter: HostAdapter, *, hold: bool = False) -> None:
        """Bring an adapter to the host tier, making room among those nobody holds; with `hold`, keep it until `release`."""
        self.check_rank(adapter.slot_rank)
        with self._lock:
            entry = self._host.get(adapter.digest)
            if entry is None:
                entry = self._host[adapter.digest] = _HostEntry(adapter)
                self._host_used += adapter.num_bytes
                self._metrics.adapter_loads.labels("host").inc()
            entry.num_holders += hold
            self._unwanted.discard(adapter.digest)
            self._host.move_to_end(adapter.digest)
            self._make_room(keep=adapter.digest)

    def hold(self, digest: str) -> bool:
        """Keep an adapter on the host until `release`; False when it is not there. `__base__` always is."""
        if digest == BASE_ADAPTER:
            return True
        with self._lock:
            entry = self._host.get(digest)
            if entry is None:
                return False
            entry.num_holders += 1
            self._host.move_to_end(digest)
            return True

    def release(self, digest: str) -> None:
        """Undo one `hold`."""
        if digest == BASE_ADAPTER:
            return
        with self._lock:
            entry = self._host[digest]
            assert entry.num_holders > 0, f"{digest} was released more often than held. This is a bug."
            entry.num_holders -= 1
            self._make_room()

    def has(self, digest: str) -> bool:
        """Whether an adapter is on the host."""
        with self._lock:
            return digest in self._host

    def num_holders(self, digest: str) -> int:
        """How many hold an adapter: requests, and rollouts that prepare it."""
        with self._lock:
            entry = self._host.get(digest)
            return 0 if entry is None else entry.num_holders

    def unload(self, digest: str) -> dict[str, int]:
        """Let an adapter go from every tier; the bytes that became free in each. Raises: Conflict while somebody holds it."""
        with self._lock:
            entry = self._host.get(digest)
            if entry is not None and entry.num_holders:
                raise Conflict(f"{digest} is in use by {entry.num_holders} requests", param="adapter")
            on_device = sum(self._slot_bytes(slot) for slot in self._slots() if slot.digest == digest)
            on_device = 0 if digest in self._unwanted else on_device
            self._unwanted.add(digest)  # the device thread alone writes slots: it takes this one when it needs one
            if entry is not None:
                del self._host[digest]
                self._host_used -= entry.adapter.num_bytes
                self._count_eviction(digest, "host")
        return {"device": on_device, "host": 0 if entry is None else entry.adapter.num_bytes}

    def _make_room(self, keep: str | None = None) -> None:
        """Drop unheld host entries but `keep`, least recently used first, until the budget is kept. Under the lock."""
        if self._host_used <= self._host_bytes:
            return
        for digest, entry in list(self._host.items()):
            if entry.num_holders == 0 and digest != keep:
                self._host_used -= entry.adapter.num_bytes
                del self._host[digest]
                self._count_eviction(digest, "host")
                if self._host_used <= self._host_bytes:
                    return

    def adapter(self, digest: str) -> HostAdapter:
        """The host entry of a digest. Raises: AdapterNotFound when it is not on the host."""
        with self._lock:
            entry = self._host.get(digest)
        if entry is None:
            raise AdapterNotFound(f"{digest} is not on the host")
        return entry.adapter

    # --- slots -------------------------------------------------------------------------------------------

    def try_lease(self, digest: str) -> "SlotLease | None":
        """A lease on the adapter's slot, filling one if need be; None when every fitting slot is leased.

        Raises: AdapterNotFound when it is not on the host either.
        """
        if digest == BASE_ADAPTER:
            return SlotLease(None, self._base)
        slot, tier = self._slot_of(digest), "device"
        if slot is None:
            adapter, tier = self.adapter(digest), "host"
            slot = self._free_slot(adapter)
            if slot is None:
                return None
            self._fill(slot, adapter)
        elif slot.was_prefetched:
            tier = "host"
        slot.was_prefetched = False
        self._metrics.adapter_hits.labels(tier).inc()
        slot.arrival.wait()
        slot.num_leases += 1
        slot.leased_at = time.monotonic()
        assert slot.view is not None
        return SlotLease(slot, slot.view)

    def prefetch(self, digest: str) -> bool:
        """Begin to fill a slot that will be leased soon; whether the adapter has one. None is taken from who waits for it."""
        if digest == BASE_ADAPTER or self._slot_of(digest) is not None:
            return True
        if not self.has(digest):
            return False
        adapter = self.adapter(digest)
        slot = self._free_slot(adapter)
        if slot is None or (slot.digest is not None and self.is_wanted(slot.digest)):
            return False
        self._fill(slot, adapter)
        slot.leased_at = time.monotonic()
        slot.was_prefetched = True
        return True

    def lease(self, digest: str) -> "SlotLease":
        """Like `try_lease`. Raises: NoFreeSlot instead of giving None."""
        lease = self.try_lease(digest)
        if lease is None:
            raise NoFreeSlot(f"every slot that could hold {digest} is leased")
        return lease

    def _slots(self) -> Iterator[_Slot]:
        for bucket in self._buckets.values():
            yield from bucket.slots

    def _slot_of(self, digest: str) -> _Slot | None:
        return next((slot for slot in self._slots() if slot.digest == digest), None)

    def _free_slot(self, adapter: HostAdapter) -> _Slot | None:
        """An empty slot of the narrowest fitting bucket, of a wider one, or of all those the least recently leased.

        One whose adapter a waiting job needs is taken last: it would only have to be filled again.
        """
        fitting = [s for s in self._slots() if s.family == adapter.family.name and s.rank >= adapter.slot_rank]
        if not fitting:
            raise RankTooLarge(
                f"rank {adapter.slot_rank} is above the largest slot bucket, {self.max_rank}", param="rank"
            )
        with self._lock:
            unwanted = set(self._unwanted)
        empty = [s for s in fitting if s.digest is None or (s.digest in unwanted and s.num_leases == 0)]
        if empty:
            return min(empty, key=lambda slot: slot.rank)
        idle = [slot for slot in fitting if slot.num_leases == 0]
        return min(idle, key=lambda slot: (self.is_wanted(slot.digest or ""), slot.leased_at), default=None)

    def _fill(self, slot: _Slot, adapter: HostAdapter) -> None:
        start = time.perf_counter()
        if slot.digest is not None:
            self._empty(slot)
        bucket = self._buckets[slot.family, slot.rank]
        tensors = {**self._heads, **adapter.tensors}
        # a head that this backbone does not have is left out: nothing will project with it
        own = {name: tensor for name, tensor in tensors.items() if name in bucket.stack}
        views, slot.arrival = self.transfers.run(
            lambda: {name: _copy(tensor, bucket.stack[name][slot.index]) for name, tensor in own.items()}
        )
        slot.view = SlotView(adapter.family, views, adapter.schedule, Place(bucket.stack, slot.index))
        slot.digest = adapter.digest
        self._metrics.adapter_loads.labels("device").inc()
        seconds = time.perf_counter() - start
        self._metrics.adapter_load_seconds.labels("host").observe(seconds)
        keys = event("adapter_loaded", tier="device", source="host", digest=adapter.digest, ms=round(1000 * seconds, 1))
        log.debug("put %s into a slot of rank %d", adapter.digest, slot.rank, extra=keys)

    def _empty(self, slot: _Slot) -> None:
        assert slot.num_leases == 0, "a leased slot was emptied. This is a bug."
        digest = slot.digest or ""
        with self._lock:
            self._unwanted.discard(digest)
        slot.digest, slot.view = None, None
        self._count_eviction(digest, "device")

    def _count_eviction(self, digest: str, tier: str) -> None:
        self._metrics.adapter_evictions.labels(tier).inc()
        log.debug("evicted %s from the %s", digest, tier, extra=event("adapter_evicted", tier=tier, digest=digest))

    # --- what is where -----------------------------------------------------------------------------------

    def residency(self) -> dict[str, dict[str, int]]:
        """Bytes held by tier and digest."""
        with self._lock:
            host = {digest: entry.adapter.num_bytes for digest, entry in self._host.items()}
            unwanted = set(self._unwanted)
        slots = [
            (slot.digest, self._slot_bytes(slot)) for slot in self._slots()
        ]  # the device thread may go on meanwhile
        device = {digest: num_bytes for digest, num_bytes in slots if digest is not None and digest not in unwanted}
        return {"device": device, "host": host}

    def _slot_bytes(self, slot: _Slot) -> int:
        return self._buckets[slot.family, slot.rank].slot_bytes

    def place(self, digest: str) -> tuple[str, int, int]:
        """Where an adapter's slot is: sorted by it, rows of neighbouring slots stand next to each other."""
        slot = self._slot_of(digest)
        return ("", 0, 0) if slot is None else (slot.family, slot.rank, slot.index)

    def adapt(self, views: Sequence[SlotView], slot_of_row: Sequence[int]) -> Adaptation:
        """The adaptation of a batch whose row i uses `views[slot_of_row[i]]`."""
        return adapt_rows(views, slot_of_row, self._kernels)


def _copy(tensor: Tensor, place: Tensor) -> Tensor:
    """Copy a tensor into the corner of a slot that it fills, and return that corner."""
    view = place[tuple(slice(0, size) for size in tensor.shape)]
    is_by_inputs = tensor.ndim > 1 and tensor.mT.is_contiguous()
    # In the order of memory: where the corner has gaps, torch would turn it on the host before it goes.
    if is_by_inputs:
        view.mT.copy_(tensor.mT, non_blocking=True)
    else:
        view.copy_(tensor, non_blocking=True)
    return view


class SlotLease:
    """A slot that stays as it is until `release`, which must come exactly once."""

    def __init__(self, slot: _Slot | None, view: SlotView) -> None:
        self._slot = slot
        self._is_open = True
        self.view = view

    def release(self) -> None:
        """Give the slot back."""
        assert self._is_open, "a slot lease was released twice. This is a bug."
        self._is_open = False
        if self._slot is not None:
            self._slot.num_leases -= 1


class BatchLeases:
    """The leases of one batch: one per distinct adapter, all of one bank and released together."""

    def __init__(self, bank: AdapterBank | None = None) -> None:
        self._bank = bank
        self._leases: dict[str, SlotLease] = {}

    def use(self, bank: AdapterBank) -> "BatchLeases":
        """Lease from this bank from now on; before the first lease."""
        assert bank is self._bank or not self._leases, "a batch leases from two banks. This is a bug."
        self._bank = bank
        return self

    @property
    def _lender(self) -> AdapterBank:
        assert self._bank is not None, "a batch leases from no bank. This is a bug."
        return self._bank

    def add(self, digest: str) -> bool:
        """Lease an adapter unless the batch has it already; False when no slot is free for it."""
        if digest in self._leases:
            return True
        lease = self._lender.try_lease(digest)
        if lease is not None:
            self._leases[digest] = lease
        return lease is not None

    def take(self, other: "BatchLeases") -> None:
        """Take another's leases over; of an adapter that both have, one is released."""
        assert other._bank is self._bank or not self._leases, "a batch leases from two banks. This is a bug."
        self._bank = other._bank
        leases, other._leases = other._leases, {}
        for digest, lease in leases.items():
            if digest in self._leases:
                lease.release()
            else:
                self._leases[digest] = lease

    def keep(self, digests: Iterable[str]) -> None:
        """Release the leases of all other adapters."""
        kept = set(digests)
        for digest in [digest for digest in self._leases if digest not in kept]:
            self._leases.pop(digest).release()

    @property
    def num_adapters(self) -> int:
        """Distinct adapters leased, `__base__` included."""
        return len(self._leases)

    @property
    def dims(self) -> BackboneDims | None:
        """What the adapters of the bank fit; None for a backbone that takes none."""
        return self._lender.dims

    def views(self, digest_of_row: Sequence[str]) -> list[SlotView]:
        """The slots of rows with these adapters."""
        return [self._leases[digest].view for digest in digest_of_row]

    def adaptation(self, digest_of_row: Sequence[str]) -> Adaptation | None:
        """The adaptation of rows with these adapters; None when all are the plain backbone."""
        if set(digest_of_row) == {BASE_ADAPTER}:
            return None
        order = {digest: index for index, digest in enumerate(self._leases)}
        views = [lease.view for lease in self._leases.values()]
        return self._lender.adapt(views, [order[digest] for digest in digest_of_row])

    def release(self) -> None:
        """Release every lease."""
        leases, self._leases = self._leases, {}
        for lease in leases.values():
            lease.release()


@contextmanager
def batch_leases(bank: AdapterBank | None = None) -> Iterator[BatchLeases]:
    """Leases that end with the block, whatever happens in it."""
    leases = BatchLeases(bank)
    try:
        yield leases
    finally:
        leases.release()


def default_buckets(dims: BackboneDims, dtype: torch.dtype, free_bytes: int, fraction: float | None = None) -> Buckets:
    """The default buckets, scaled together to a fraction of the free memory (at least 1 slot each).

    None: as they are, or fewer where they would take more than `USUAL_FRACTION`.
    """
    size = torch.empty((), dtype=dtype).element_size()

    def total(buckets: Buckets) -> int:
        return sum(
            num_slots * size * sum(torch.Size(shape).numel() for shape in family.slot_shapes(dims, rank).values())
            for family in families_for(dims.architecture)
            for rank, num_slots in buckets
        )

    buckets = DEFAULT_BUCKETS[dims.architecture]
    scale = (fraction or USUAL_FRACTION) * free_bytes / max(1, total(buckets))
    if fraction is None:
        scale = min(1.0, scale)
    return tuple((rank, max(1, int(num_slots * scale))) for rank, num_slots in buckets)
