"""From a reference to an adapter on the host: alias -> version -> digest -> package -> folded tensors.

Watches the registry; loads run in threads of their own beside the device thread, once per digest however many requests
wait for it. A pin keeps what it resolved to loadable until the reply, whatever happens to the alias meanwhile.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from adapters.artifacts import ArtifactStore
from adapters.config import BASE_ADAPTER, AdapterConfig
from adapters.errors import (
    AdapterNotFound,
    ArtifactNotFound,
    BackboneMismatch,
    InvalidPackage,
    MissingPart,
    RegistryUnavailable,
)
from adapters.families import family_of
from adapters.families.base import BackboneDims
from adapters.package import Package, check_backbone, read_package
from adapters.registry import AliasReference, BaseReference, Registry, Snapshot, VersionRecord, parse_reference
from service.backbone.base import Backbone
from service.backbone.config import BlipConfig
from service.bank import AdapterBank, fold_package
from service.errors import AdapterDamaged, NotReady
from service.metrics import Metrics
from service.types import BASE_INFO, AdapterInfo

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 1.0
NUM_LOAD_THREADS = 2


@dataclass(frozen=True)
class Pin:
    """What one request resolved to. `config` is None for `__base__`."""

    info: AdapterInfo
    digest: str
    config: AdapterConfig | None


@dataclass(frozen=True)
class RegistryState:
    """The snapshot in use, and how the last look at the registry went."""

    snapshot: Snapshot
    checked_at: float
    error: str | None = None


@dataclass
class _Load:
    """A load that requests wait for. What it brought `is_held` until the last of them has a hold of its own."""

    future: Future[None]
    num_waiting: int = 0
    is_held: bool = False


class Loader:
    """Resolves and loads adapters for one backbone. Methods are for the event loop unless they say otherwise."""

    def __init__(
        self, registry: Registry, artifacts: ArtifactStore, backbone: Backbone, bank: AdapterBank, metrics: Metrics
    ) -> None:
        self._registry = registry
        self._artifacts = artifacts
        self._backbone = backbone
        self._bank = bank
        self._metrics = metrics
        self._threads = ThreadPoolExecutor(NUM_LOAD_THREADS, thread_name_prefix="adapter-load")
        self._loads: dict[str, _Load] = {}
        self._lock = threading.Lock()  # over alias resolution and hold, and over _loads
        self._state = RegistryState(registry.snapshot(), time.monotonic())
        self._watcher: asyncio.Task[None] | None = None
        metrics.registry_generation.set(self.snapshot.generation)

    @property
    def snapshot(self) -> Snapshot:
        """The registry as of the last look."""
        return self._state.snapshot

    @property
    def registry_error(self) -> str | None:
        """Why the last look at the registry failed; None when it did not."""
        return self._state.error

    def start(self) -> None:
        """Begin watching the registry."""
        self._watcher = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Stop watching and loading."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        self._loads.clear()  # those that never began

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            try:
                await self.refresh()
            except Exception:
                log.exception("looking at the registry failed")  # and will be tried again: nothing ends the watch

    async def refresh(self) -> None:
        """Look at the registry now. When it cannot be read, serving goes on with what is known."""
        await asyncio.to_thread(self._refresh)

    def _refresh(self) -> None:
        now = time.monotonic()
        try:
            snapshot = self._registry.snapshot()
        except RegistryUnavailable as error:
            self._keep_known(now, error.message)
            return
        self._state = RegistryState(snapshot, now)
        self._metrics.registry_generation.set(snapshot.generation)

    def _keep_known(self, now: float, error: str) -> None:
        if self._state.error is None:
            generation = self.snapshot.generation
            log.warning("the registry cannot be used, serving goes on with generation %d: %s", generation, error)
        self._state = RegistryState(self.snapshot, now, error)

    @asynccontextmanager
    async def pin(self, reference: str) -> AsyncIterator[Pin]:
        """Resolve a reference and hold its adapter on the host until the block ends.

        A cold adapter is loaded meanwhile, and only its requests wait. A reference nobody knows makes the loader look
        at the registry once more before it says so: what was just pushed is found.
        Raises: InvalidReference, AdapterNotFound, InvalidPackage, BackboneMismatch, MissingPart, RankTooLarge.
        """
        pin = await self._resolve_and_hold(reference)
        try:
            yield pin
        finally:
            self._bank.release(pin.digest)

    async def _resolve_and_hold(self, reference: str) -> Pin:
        if reference == BASE_ADAPTER:
            return Pin(BASE_INFO, BASE_ADAPTER, None)
        parsed = parse_reference(reference)
        assert not isinstance(parsed, BaseReference), "__base__ was answered above. This is a bug."
        try:
            self.snapshot.resolve(parsed)
        except AdapterNotFound:
            await self.refresh()
        with self._lock:
            record = self.snapshot.resolve(parsed)
            load = None if self._bank.hold(record.weights_digest) else self._join_load(record)
        if load is not None:
            await self._wait(record.weights_digest, load)
        config = self._bank.adapter(record.weights_digest).config
        alias = parsed.alias if isinstance(parsed, AliasReference) else None
        info = AdapterInfo(record.name, record.version, record.weights_digest, alias)
        return Pin(info, record.weights_digest, config)

    def _join_load(self, record: VersionRecord) -> _Load:
        """The running load of a digest, or a new one. Called under the lock. Raises: NotReady after `close`."""
        load = self._loads.get(record.weights_digest)
        if load is None:
            try:
                load = _Load(self._threads.submit(self._load, record))
            except RuntimeError as error:
                raise NotReady("the server is shutting down") from error
            self._loads[record.weights_digest] = load
        load.num_waiting += 1
        return load

    async def _wait(self, digest: str, load: _Load) -> None:
        """Wait for a load and hold what it brought. Who leaves early leaves the others their load."""
        try:
            await asyncio.shield(asyncio.wrap_future(load.future))
            is_there = self._bank.hold(digest)
            assert is_there, f"{digest} was loaded and is not there. This is a bug."
        except asyncio.CancelledError:
            if load.future.cancelled():
                raise NotReady("the server is shutting down") from None
            raise
        finally:
            with self._lock:
                load.num_waiting -= 1
                is_last = load.num_waiting == 0 and load.is_held
            if is_last:
                self._bank.release(digest)

    def _load(self, record: VersionRecord) -> None:
        """Read, check, fold and put one adapter on the host. Runs in a load thread."""
        start = time.perf_counter()
        is_held = False
        try:
            self.check(record, hold=True)
            is_held = True
        finally:
            with self._lock:
                load = self._loads.pop(record.weights_digest)
                load.is_held = is_held and load.num_waiting > 0
            if is_held and not load.is_held:  # nobody waits any more
                self._bank.release(record.weights_digest)
        seconds = time.perf_counter() - start
        self._metrics.adapter_load_seconds.labels("disk").observe(seconds)
        log.info("loaded %s@%d in %.0f ms", record.name, record.version, 1000 * seconds)

    def _read(self, record: VersionRecord, dims: BackboneDims) -> Package:
        """The stored package of a version. Raises: AdapterDamaged, BackboneMismatch."""
        try:
            package = read_package(self._artifacts.path(record.package_digest), dims=dims)
        except BackboneMismatch:
            raise
        except (ArtifactNotFound, InvalidPackage) as error:
            message = f"the stored package of {record.reference} is damaged: {error.message}"
            raise AdapterDamaged(message, param="adapter") from error
        if package.package_digest != record.package_digest:
            raise AdapterDamaged(f"the stored package of {record.reference} is damaged: other bytes", param="adapter")
        return package

    def check(self, record: VersionRecord, *, hold: bool = False) -> None:
        """Bring a version to the host tier, or say why it cannot be served by this process. Any thread.

        Raises: AdapterDamaged, BackboneMismatch, MissingPart, RankTooLarge, NonFiniteTensor.
        """
        if self._bank.dims is None:
            raise MissingPart(f"this backbone serves {BASE_ADAPTER} only: {self._backbone.config.uneven_towers}")
        package = self._read(record, self._bank.dims)
        check_backbone(package.config, self._backbone.parts)
        check_fit(package.config, self._backbone.config)
        self._backbone.require(package.config.task, heads=package.config.heads)
        self._bank.check_rank(family_of(package.config.family).slot_rank(package.config))
        self._bank.put(fold_package(package, self._bank.dims, self._bank.dtype), hold=hold)


def check_fit(config: AdapterConfig, backbone: BlipConfig) -> None:
    """Refuse a config that its own parts could not run: a bad token id would cost a CUDA device. Raises: InvalidPackage."""
    needed = {"vision", "text_encoder"} | ({"decoder"} if config.task == "vqa" else set())
    if unnamed := sorted(needed - config.backbone.parts.keys()):
        raise InvalidPackage(f"backbone.parts has no digest of {', '.join(unnamed)}", param="backbone.parts")
    resolution, patch = config.preprocessing.resolution, backbone.vision.patch
    if resolution % patch:
        raise InvalidPackage(f"resolution {resolution} is no multiple of the patch, {patch}", param="preprocessing")
    stack = backbone.decoder
    for index, ids in enumerate(config.decoding.answer_ids if config.decoding and stack else ()):
        assert stack is not None
        if not 2 <= len(ids) <= stack.max_positions or not all(0 <= word < stack.vocab_size for word in ids):
            raise InvalidPackage(f"answer_ids[{index}] is not one this backbone can decode", param="decoding")
