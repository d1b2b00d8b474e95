"""From a reference to an adapter on the host: alias -> version -> digest -> package -> folded tensors.

Watches the registry; loads run in threads of their own beside the device thread, once per digest however many requests
wait for it. A pin keeps what it resolved to loadable until the reply, whatever happens to the alias meanwhile.
"""

import asyncio
import contextvars
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from adapters.artifacts import ArtifactStore
from adapters.config import BASE_ADAPTER, AdapterConfig, AudioPreprocessing
from adapters.errors import (
    AdapterNotFound,
    ArtifactNotFound,
    BackboneMismatch,
    DigestMismatch,
    InvalidPackage,
    RegistryLost,
    RegistryUnavailable,
)
from adapters.families import epalm, family_of
from adapters.package import CONFIG_FILE, KnownDigests, Package, check_backbone, parse_package
from adapters.registry import (
    AliasReference,
    BaseReference,
    DigestReference,
    Registry,
    Snapshot,
    VersionRecord,
    parse_reference,
)
from adapters.registry.references import AdapterReference
from service.auth import Principal
from service.backbone.base import Backbone
from service.backbone.config import AstConfig, BlipConfig, OptConfig
from service.backbones import DEFAULT, Backbones
from service.bank import AdapterBank, HostAdapter
from service.errors import AdapterDamaged, Forbidden, NotReady
from service.logs import event
from service.metrics import Metrics, Resident
from service.types import BASE_INFO, AdapterInfo
from service.views import Views

log = logging.getLogger(__name__)

Made = TypeVar("Made")

POLL_INTERVAL_S = 1.0
DRAIN_POLL_S = 0.05
TICK_S = 1.0
STOPPED_S = 5.0  # without a tick for so long, this process stood still: others may have moved on without it
NUM_LOAD_THREADS = 2


@dataclass(frozen=True)
class Pin:
    """What one request resolved to. `config` is None for `__base__`; `backbone` is the name of the one it runs on."""

    info: AdapterInfo
    digest: str
    config: AdapterConfig | None
    backbone: str = DEFAULT


@dataclass(frozen=True)
class RegistryState:
    """The snapshot in use, and how the last look at the registry went."""

    snapshot: Snapshot
    error: str | None = None
    is_lost: bool = False


@dataclass
class _Load:
    """A load that requests wait for. What it brought `is_held` until the last of them has a hold of its own."""

    future: Future[None]
    record: VersionRecord
    num_waiting: int = 0
    is_held: bool = False


class Loader:
    """Resolves and loads adapters for the backbones of a process. Methods are for the event loop unless they say otherwise."""

    def __init__(self, registry: Registry, artifacts: ArtifactStore, backbones: Backbones, metrics: Metrics) -> None:
        self._registry = registry
        self._artifacts = artifacts
        self._backbones = backbones
        self._metrics = metrics
        self._threads = ThreadPoolExecutor(NUM_LOAD_THREADS, thread_name_prefix="adapter-load")
        self._loads: dict[str, _Load] = {}
        self._lock = threading.Lock()  # over alias resolution and hold, and over _loads
        self._state = _first_state(registry)
        self._views = Views()
        self._known_weights: dict[str, str] = {}  # digests of the weights of packages that were read before
        self._watcher: asyncio.Task[None] | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._looking = asyncio.Lock()
        self._looking_thread = threading.Lock()  # a look that nobody awaits any more ends before the next begins
        self._num_looks = 0  # begun
        self._ticked_at = time.monotonic()
        self._num_stops = 0  # how often this process stood still
        self._num_stops_caught_up = 0
        self._listeners: list[Callable[[], None]] = []
        metrics.registry_up.set(self._state.error is None)
        metrics.registry_generation.set(self.snapshot.generation)
        metrics.residency.source = self.residency

    @property
    def snapshot(self) -> Snapshot:
        """The registry as of the last look."""
        return self._state.snapshot

    def view(self, principal: Principal) -> Snapshot:
        """The registry as of the last look, without what a principal may not see. What answers a request reads this one."""
        return self._views.of(self.snapshot, principal)

    @property
    def registry_error(self) -> str | None:
        """Why the last look at the registry failed; None when it did not."""
        return self._state.error

    @property
    def is_registry_lost(self) -> bool:
        """Whether the last look found a registry that must be restored."""
        return self._state.is_lost

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call this on the event loop whenever a look found something new."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Begin watching the registry."""
        self._watcher = asyncio.create_task(self._watch())
        self._ticker = asyncio.create_task(self._tick_on())

    async def close(self) -> None:
        """Stop watching and loading."""
        tasks = [task for task in (self._watcher, self._ticker) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        self._loads.clear()  # those that never began

    async def _watch(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._registry.wait, POLL_INTERVAL_S)
            except RegistryUnavailable:
                await asyncio.sleep(POLL_INTERVAL_S)  # the look that follows says what is wrong
            try:
                await self.refresh()
            except Exception:
                log.exception("looking at the registry failed")  # and will be tried again: nothing ends the watch
                await asyncio.sleep(POLL_INTERVAL_S)

    async def _tick_on(self) -> None:
        while True:
            self._tick()
            await asyncio.sleep(TICK_S)

    def _tick(self) -> None:
        now = time.monotonic()
        self._num_stops += now - self._ticked_at > STOPPED_S
        self._ticked_at = now

    async def catch_up(self) -> None:
        """Look at the registry if this process stood still since it last did: what it knows may be long over.

        A registry that is away is nothing of the kind: then nobody waits for it, and serving goes on with what is known.
        """
        self._tick()
        while (num_stops := self._num_stops) > self._num_stops_caught_up:
            await self.refresh()
            self._num_stops_caught_up = max(num_stops, self._num_stops_caught_up)
            self._tick()

    async def refresh(self) -> None:
        """Look at the registry now. When it cannot be read, serving goes on with what is known.

        One look is under way at a time, and all who ask meanwhile share the next: where looks take long they hold few
        threads, and what an earlier one saw never replaces what a later one did.
        """
        wanted = self._num_looks + 1
        async with self._looking:
            if self._num_looks >= wanted:
                return
            self._num_looks += 1
            before = self._state
            await asyncio.to_thread(self._refresh)
            if (self._state.snapshot, self._state.is_lost) != (before.snapshot, before.is_lost):
                for listener in self._listeners:
                    listener()

    def _refresh(self) -> None:
        with self._looking_thread:
            try:
                snapshot = self._registry.snapshot()
            except RegistryUnavailable as error:
                self._keep_known(error)
                return
            before, self._state = self._state, RegistryState(snapshot)
            if before.error is not None:
                keys = event("registry_available", generation=snapshot.generation)
                log.info("the registry can be used again, at generation %d", snapshot.generation, extra=keys)
            self._metrics.registry_up.set(1)
            self._metrics.registry_generation.set(snapshot.generation)

    def _keep_known(self, error: RegistryUnavailable) -> None:
        before, self._state = self._state, _state_without(self.snapshot, error)
        if before.error is None or before.is_lost != self._state.is_lost:
            log.warning(
                "the registry cannot be used, serving goes on with generation %d: %s",
                self.snapshot.generation,
                error.message,
                extra=_outage(self._state),
            )
        self._metrics.registry_up.set(0)

    @asynccontextmanager
    async def pin(self, reference: str, principal: Principal, routing_key: str | None = None) -> AsyncIterator[Pin]:
        """Resolve a reference for somebody and hold its adapter on the host until the block ends.

        A cold adapter is loaded meanwhile, and only its requests wait. A reference nobody knows makes the loader look
        at the registry once more before it says so: what was just pushed is found. A digest that several names share
        means a name that the principal may use. `routing_key` decides whether an alias means its canary.
        Raises: InvalidReference, Forbidden, AdapterNotFound, InvalidPackage, BackboneMismatch, MissingPart, RankTooLarge.
        """
        pin = await self._resolve_and_hold(reference, principal, routing_key)
        try:
            yield pin
        finally:
            self._backbones.release(pin.digest)

    async def _resolve_and_hold(self, reference: str, principal: Principal, routing_key: str | None) -> Pin:
        if reference == BASE_ADAPTER:
            principal.check_adapter(BASE_ADAPTER)
            return Pin(BASE_INFO, BASE_ADAPTER, None)
        parsed = parse_reference(reference)
        assert not isinstance(parsed, BaseReference), "__base__ was answered above. This is a bug."
        if not isinstance(parsed, DigestReference):
            principal.check_adapter(parsed.name)  # before looking: nobody learns whether others' names exist
        await self.catch_up()
        try:
            self._resolve(parsed, principal, routing_key)
        except (AdapterNotFound, Forbidden):
            await self.refresh()
        with self._lock:
            record = self._resolve(parsed, principal, routing_key)
            is_canary = self._is_canary(parsed, record)
            load = None if self._backbones.hold(record.weights_digest) else self._join_load(record)
        if load is not None:
            await self._wait(record, load)
        hosted = self._backbones.holding(record.weights_digest)
        config = hosted.bank.adapter(record.weights_digest).config
        alias = parsed.alias if isinstance(parsed, AliasReference) else None
        info = AdapterInfo(record.name, record.version, record.weights_digest, alias, is_canary)
        return Pin(info, record.weights_digest, config, hosted.name)

    def _resolve(self, reference: AdapterReference, principal: Principal, routing_key: str | None) -> VersionRecord:
        """The version a reference means for a principal. Raises: AdapterNotFound, Forbidden; neither names what is hidden."""
        try:
            record = self.view(principal).resolve(reference, routing_key)
        except AdapterNotFound:
            if isinstance(reference, DigestReference) and self.snapshot.with_digest(reference.digest):
                message = f"this key may use none of the adapters with the digest {reference.digest}"
                raise Forbidden(message, reason="pattern", param="adapter") from None
            raise
        principal.check_adapter(record.name)
        return record

    def _is_canary(self, reference: AdapterReference, record: VersionRecord) -> bool:
        if not isinstance(reference, AliasReference):
            return False
        alias = self.snapshot.alias(reference.name, reference.alias)
        return alias is not None and alias.version != record.version

    async def unload(self, digest: str, *, timeout_s: float) -> dict[str, int]:
        """Wait until nobody holds an adapter, then let it go; the bytes freed by tier. Raises: Conflict when it takes longer."""
        end = time.monotonic() + timeout_s
        while self._backbones.num_holders(digest) and time.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_POLL_S)  # holds end on many paths; a poll misses none
        return self._backbones.unload(digest)

    def _join_load(self, record: VersionRecord) -> _Load:
        """The running load of a digest, or a new one. Called under the lock. Raises: NotReady after `close`."""
        load = self._loads.get(record.weights_digest)
        if load is None:
            try:
                context = contextvars.copy_context()  # the load is logged as its first request's
                load = _Load(self._threads.submit(context.run, self._load, record), record)
            except RuntimeError as error:
                raise NotReady("the server is shutting down") from error
            self._loads[record.weights_digest] = load
        load.num_waiting += 1
        return load

    async def _wait(self, record: VersionRecord, load: _Load) -> None:
        """Wait for a load and hold what it brought. Who leaves early leaves the others their load."""
        digest = record.weights_digest
        try:
            await asyncio.shield(asyncio.wrap_future(load.future))
            is_there = self._backbones.hold(digest)
            assert is_there, f"{digest} was loaded and is not there. This is a bug."
        except AdapterDamaged as error:
            if load.record == record:
                raise
            # Those are another name's files, which whoever waits here may not know of.
            message = f"the stored files of {record.reference}'s weights are damaged"
            raise AdapterDamaged(message, param="adapter") from error
        except asyncio.CancelledError:
            if load.future.cancelled():
                raise NotReady("the server is shutting down") from None
            raise
        finally:
            with self._lock:
                load.num_waiting -= 1
                is_last = load.num_waiting == 0 and load.is_held
            if is_last:
                self._backbones.release(digest)

    def _load(self, record: VersionRecord) -> None:
        """Read, check, fold and put one adapter on the host. Runs in a load thread."""
        start = time.perf_counter()
        is_held = False
        try:
            source = "disk" if self._artifacts.is_near(record.package_digest) else "remote"
            self.check(record, hold=True)
            is_held = True
        finally:
            with self._lock:
                load = self._loads.pop(record.weights_digest)
                load.is_held = is_held and load.num_waiting > 0
            if is_held and not load.is_held:  # nobody waits any more
                self._backbones.release(record.weights_digest)
        seconds = time.perf_counter() - start
        self._metrics.adapter_load_seconds.labels(source).observe(seconds)
        keys = event(
            "adapter_loaded",
            tier="host",
            source=source,
            adapter=record.name,
            version=record.version,
            digest=record.weights_digest,
            ms=round(1000 * seconds, 1),
        )
        log.info("loaded %s from %s in %.0f ms", record.reference, source, 1000 * seconds, extra=keys)

    def read(self, record: VersionRecord) -> Package:
        """The stored package of a version. Any thread. Raises: AdapterDamaged, ArtifactUnavailable, BackboneMismatch, MissingPart."""
        return self._make(record, lambda package: package)

    def check(self, record: VersionRecord, *, hold: bool = False) -> None:
        """Bring a version to the host tier, or say why it cannot be served by this process. Any thread.

        Raises: AdapterDamaged, ArtifactUnavailable, BackboneMismatch, MissingPart, RankTooLarge, NonFiniteTensor.
        """
        bank, adapter = self._make(record, self._folded)
        bank.put(adapter, hold=hold)

    def _folded(self, package: Package) -> tuple[AdapterBank, HostAdapter]:
        hosted = self._backbones.hosting(package.config)
        check_servable(package.config, hosted.backbone, hosted.bank)
        return hosted.bank, hosted.bank.fold(package)

    def _make(self, record: VersionRecord, make: Callable[[Package], Made]) -> Made:
        """make(package) of a version. It runs while the files may still turn out to be others: see ArtifactStore.load."""
        known = KnownDigests(record.package_digest, self._known_weights.get(record.package_digest))

        def parse_and_make(files: Mapping[str, bytes]) -> tuple[str, Made]:
            package = self._parsed(record, files, known)
            return package.weights_digest, make(package)

        try:
            digest, made = self._artifacts.load(record.package_digest, parse_and_make)
        except (ArtifactNotFound, DigestMismatch) as error:
            raise _damaged(record, error) from error
        self._known_weights[record.package_digest] = digest
        return made

    def _parsed(self, record: VersionRecord, files: Mapping[str, bytes], known: KnownDigests) -> Package:
        try:
            config = AdapterConfig.parse(files.get(CONFIG_FILE, b""))
            return parse_package(files, dims=self._backbones.hosting(config).dims(), known=known)
        except BackboneMismatch:
            raise
        except InvalidPackage as error:
            raise _damaged(record, error) from error

    def residency(self) -> dict[Resident, int]:
        """Bytes that each adapter takes in each tier, under its registered name; what has none is one sum. Any thread.

        Weights of several versions go by one that is ready: of the first name, the newest.
        """
        snapshot = self.snapshot
        whatever_status = {record.weights_digest: record for record in snapshot.versions}
        found: dict[Resident, int] = {}
        for tier, held in self._backbones.residency().items():
            for digest, num_bytes in held.items():
                record = next(iter(snapshot.with_digest(digest)), whatever_status.get(digest))
                name, version = ("", "") if record is None else (record.name, str(record.version))
                resident = Resident(name, version, tier)
                found[resident] = found.get(resident, 0) + num_bytes
        return found


def _first_state(registry: Registry) -> RegistryState:
    """The registry's state; what was remembered of it where it cannot be read. Raises: RegistryUnavailable for neither."""
    try:
        return RegistryState(registry.snapshot())
    except RegistryUnavailable as error:
        if registry.known is None:
            raise
        state = _state_without(registry.known, error)
        log.warning(
            "starting from what is remembered of the registry, generation %d: %s",
            registry.known.generation,
            error.message,
            extra=_outage(state),
        )
        return state


def _state_without(known: Snapshot, error: RegistryUnavailable) -> RegistryState:
    return RegistryState(known, error.message, isinstance(error, RegistryLost))


def _outage(state: RegistryState) -> dict[str, object]:
    return event(
        "registry_lost" if state.is_lost else "registry_unavailable",
        generation=state.snapshot.generation,
        reason=state.error,
    )


def _damaged(record: VersionRecord, error: ArtifactNotFound | InvalidPackage) -> AdapterDamaged:
    return AdapterDamaged(f"the stored package of {record.reference} is damaged: {error.message}", param="adapter")


def check_servable(config: AdapterConfig, backbone: Backbone, bank: AdapterBank) -> None:
    """Refuse an adapter that this backbone and these slots cannot serve.

    Raises: BackboneMismatch, MissingPart, InvalidPackage, RankTooLarge.
    """
    check_backbone(config, backbone.parts)
    check_fit(config, backbone.manifest.config)
    backbone.require(config.task, heads=config.heads)
    bank.check_rank(family_of(config.family).slot_rank(config))


def check_fit(config: AdapterConfig, backbone: BlipConfig | OptConfig) -> None:
    """Refuse a config that its own parts could not run: a bad token id would cost a CUDA device. Raises: InvalidPackage."""
    if isinstance(backbone, OptConfig):
        _check_fits_opt(config, backbone)
    else:
        _check_fits_blip(config, backbone)


def _check_parts(config: AdapterConfig, needed: set[str]) -> None:
    if unnamed := sorted(needed - config.backbone.parts.keys()):
        raise InvalidPackage(f"backbone.parts has no digest of {', '.join(unnamed)}", param="backbone.parts")


def _check_answer_ids(config: AdapterConfig, max_positions: int, vocab_size: int) -> None:
    for index, ids in enumerate(config.decoding.answer_ids if config.decoding else ()):
        if not 2 <= len(ids) <= max_positions or not all(0 <= word < vocab_size for word in ids):
            raise InvalidPackage(f"answer_ids[{index}] is not one this backbone can decode", param="decoding")


def _check_fits_opt(config: AdapterConfig, backbone: OptConfig) -> None:
    options, words = epalm.options_of(config), backbone.language_model
    _check_parts(config, {"language_model", options.encoder})
    if options.answer_token_id is not None and options.answer_token_id >= words.vocab_size:
        raise InvalidPackage(f"answer_token_id {options.answer_token_id} is no word of this backbone", param="options")
    encoder, preprocessing = backbone.encoders[options.encoder], config.preprocessing
    hears = isinstance(encoder, AstConfig)
    if hears != isinstance(preprocessing, AudioPreprocessing):
        raise InvalidPackage(f"this is no preprocessing for {options.encoder}", param="preprocessing")
    if isinstance(encoder, AstConfig) and isinstance(preprocessing, AudioPreprocessing):
        sizes = (preprocessing.num_mel_bins, preprocessing.max_steps)
        if sizes != (encoder.num_mel_bins, encoder.max_steps):
            raise InvalidPackage(
                f"spectrograms of {sizes[0]} bins and {sizes[1]} steps; this backbone's have {encoder.num_mel_bins} and "
                f"{encoder.max_steps}",
                param="preprocessing",
            )
    elif config.pixels.resolution % encoder.patch:
        raise InvalidPackage(
            f"resolution {config.pixels.resolution} is no multiple of the patch, {encoder.patch}", param="preprocessing"
        )
    _check_answer_ids(config, words.max_positions, words.vocab_size)


def _check_fits_blip(config: AdapterConfig, backbone: BlipConfig) -> None:
    needed = {"vision", "text_encoder"} | ({"decoder"} if config.task == "vqa" else set())
    _check_parts(config, needed)
    resolution, patch = config.pixels.resolution, backbone.vision.patch
    if resolution % patch:
        raise InvalidPackage(f"resolution {resolution} is no multiple of the patch, {patch}", param="preprocessing")
    if backbone.decoder is not None:
        _check_answer_ids(config, backbone.decoder.max_positions, backbone.decoder.vocab_size)
