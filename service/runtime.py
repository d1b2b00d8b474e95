"""The service without HTTP: every part built once from the settings, tied together, started, drained, closed."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

import torch

from adapters.artifacts import ArtifactStore, TreeStore, open_store, open_trees
from adapters.errors import MissingPart
from adapters.registry import VersionRecord
from service.admission import Admission
from service.backbone.base import Backbone
from service.backbone.folder import load_backbone
from service.backbones import Backbones, HostedBackbone
from service.bank import AdapterBank, Buckets, default_buckets
from service.config import MIB, Settings
from service.engine import Engine
from service.folders import HomeFolders, open_registry, remove_abandoned_pushes
from service.gallery.store import GalleryStore
from service.gallery.trees import GalleryTrees
from service.lifecycle.deployments import Deployments
from service.lifecycle.events import RegistryEvents
from service.lifecycle.jobs import Jobs
from service.lifecycle.lifecycle import Lifecycle, new_replica_id
from service.lifecycle.rollouts import Rollouts
from service.lifecycle.sweeper import Sweeper
from service.lifecycle.validate import validate
from service.loader import Loader
from service.logs import event
from service.media import MediaLimits, MediaWorkers
from service.metrics import Metrics
from service.pipelines.galleries import Galleries
from service.pipelines.retrieve import RetrievePipeline
from service.pipelines.stage_set import StageSet
from service.pipelines.vqa import VqaPipeline
from service.recordings import CudaGraphs, Recordings
from service.scheduler import BatchLimits, Scheduler

log = logging.getLogger(__name__)

DRAIN_POLL_S = 0.05
EXIT_DEVICE_LOST = 75


def pick_device(name: str) -> torch.device:
    """The device of a setting; `auto` is cuda where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def exit_process(error: BaseException) -> None:
    """End the process: a lost device cannot be mended from inside, and a supervisor starts a fresh one."""
    log.critical("the device is lost, the process ends: %s", error, extra=event("device_lost", reason=str(error)))
    logging.shutdown()
    os._exit(EXIT_DEVICE_LOST)


def open_artifacts(settings: Settings) -> ArtifactStore:
    """The store of packages that the settings name; what is remote is first asked when it is used.

    Raises: InvalidReference, ArtifactUnavailable; see `adapters.artifacts.open_store`.
    """
    folders = HomeFolders(settings.home)
    return open_store(
        settings.artifacts_url or folders.artifacts,
        cache=folders.artifact_cache,
        max_cache_bytes=settings.artifact_cache_mib * MIB,
    )


def open_gallery_trees(settings: Settings) -> TreeStore | None:
    """The store that hosts share galleries by: where packages are kept, if that is said; without it galleries stay at home.

    Raises: as `open_artifacts`.
    """
    return None if settings.artifacts_url is None else open_trees(settings.artifacts_url)


class Runtime:
    """One device, one engine, its backbones, and everything around them."""

    def __init__(self, settings: Settings, *, on_fatal: Callable[[BaseException], None] = exit_process) -> None:
        """Load the backbones and build the parts. Blocks for as long as the weights take to load."""
        self.settings = settings
        self.metrics = Metrics()
        folders = HomeFolders(settings.home)
        settings.home.mkdir(parents=True, exist_ok=True)
        remove_abandoned_pushes(settings.home)
        device = pick_device(settings.device)
        hosted = [
            self._host(name, load_backbone(folder, device=str(device), dtype=settings.dtype))
            for name, folder in settings.backbone_folders.items()
        ]
        self.backbones = Backbones(hosted, self.metrics)
        self.registry = open_registry(settings)
        self.artifacts = open_artifacts(settings)
        self.admission = Admission(
            max_queue_seconds=settings.max_queue_seconds,
            max_bytes=settings.admission_mib * MIB,
            metrics=self.metrics,
        )
        self.engine = Engine(
            self.backbones,
            Scheduler(BatchLimits(settings.max_batch_rows, settings.max_batch_tokens)),
            self.metrics,
            measured=self.admission.measured,
            on_fatal=on_fatal,
            num_threads=settings.threads,
            max_wait_s=settings.max_batch_wait_ms / 1000,
            max_batch_s=settings.max_batch_ms / 1000,
        )
        self.media = MediaWorkers(settings.media_workers, _media_limits(settings))
        self.loader = Loader(self.registry, self.artifacts, self.backbones, self.metrics)
        self.registry.on_change(RegistryEvents(self.loader.snapshot, self.metrics).tell)
        self.stages = StageSet(
            self.engine,
            self.backbones,
            self.media,
            self.metrics,
            feature_cache_bytes=settings.feature_cache_mib * MIB,
        )
        trees = open_gallery_trees(settings)
        store = GalleryStore(folders.galleries)
        self.galleries = Galleries(
            store,
            GalleryTrees(store, trees),
            self.registry,
            self.loader,
            self.stages,
            rollback_window_s=settings.rollback_window_s,
        )
        self.vqa = VqaPipeline(
            self.stages, self.loader, self.galleries, self.admission, max_candidates=settings.max_candidates
        )
        self.retrieve = RetrievePipeline(
            self.stages,
            self.loader,
            self.galleries,
            self.admission,
            self.metrics,
            max_k=settings.max_k,
            max_rerank_depth=settings.max_rerank_depth,
        )
        self.replica_id = new_replica_id()
        self._started_at = time.time()
        self.lifecycle = Lifecycle(
            self.replica_id,
            self.registry,
            self.loader,
            Rollouts(self.replica_id, self.registry, self.loader, self.galleries, self.metrics),
            Jobs(self.replica_id, self.registry, self.loader, self.galleries),
            Sweeper(self.replica_id, self.registry, self.artifacts, store, trees),
            self.metrics,
            validate=self._validate,
            describe=self._describe,
        )
        self.deployments = Deployments(self.registry, self.artifacts)
        self._is_started = False
        self._is_draining = False

    @property
    def backbone(self) -> Backbone:
        """The default one."""
        return self.backbones.default.backbone

    @property
    def bank(self) -> AdapterBank:
        """The default backbone's."""
        return self.backbones.default.bank

    def _host(self, name: str, backbone: Backbone) -> HostedBackbone:
        self.metrics.backbone_loads.inc()
        backbone.pack()
        bank = _make_bank(backbone, self.settings, self.metrics)
        return HostedBackbone(name, backbone, bank, _make_recordings(backbone.device, self.settings))

    async def start(self) -> None:
        """Start the device thread, the media workers and the registry's watcher. What cannot start leaves nothing behind."""
        try:
            self.engine.start()
            await asyncio.to_thread(self.media.start)
            self.loader.start()
            self.galleries.start()
            await self.lifecycle.start()
        except BaseException:
            await self.close()
            raise
        self._is_started = True

    async def drain(self, timeout_s: float = 30.0) -> None:
        """Refuse new requests and wait until those that were accepted have finished."""
        self._is_draining = True
        self.admission.close()
        end = time.monotonic() + timeout_s
        while self.admission.num_permits and time.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_POLL_S)  # permits end on many paths; a poll misses none

    async def close(self) -> None:
        """Stop everything, started or not. May be called twice."""
        self._is_draining = True
        async with AsyncExitStack() as stack:  # each whatever becomes of the others, the last one named first
            stack.callback(self.registry.close)
            stack.push_async_callback(asyncio.to_thread, self.media.close)
            stack.push_async_callback(asyncio.to_thread, self.engine.stop)
            stack.push_async_callback(self.loader.close)
            stack.push_async_callback(self.galleries.close)
            stack.push_async_callback(self.lifecycle.close)

    async def _validate(self, version: VersionRecord) -> None:
        """Run a version's probe through the engine. Raises what is wrong with it."""
        package = await asyncio.to_thread(self.loader.read, version)
        await validate(package, self.stages.on(self.backbones.hosting(package.config).name))

    def _describe(self) -> dict[str, object]:
        """What other replicas and status pages are told of this one."""
        return {
            "url": f"http://{self.settings.host}:{self.settings.port}",
            "started_at": self._started_at,
            "device": str(self.backbone.device),
            "backbone": self.backbone.digest,
            "backbones": {one.name: one.backbone.digest for one in self.backbones},
            "resident": {tier: sorted(held) for tier, held in self.backbones.residency().items()},
            "galleries": self.galleries.describe(),
        }

    def status(self) -> dict[str, object]:
        """What health checks and status pages say. `ready` is whether requests should be sent here."""
        reasons = []
        if not self._is_started:
            reasons.append("starting")
        if self._is_draining:
            reasons.append("draining")
        if self._is_started and not self.engine.is_alive:
            reasons.append("the device thread is dead")
        last = self.engine.last_forward_at
        return {
            "ready": not reasons,
            "reasons": reasons,
            "last_forward_age_s": None if last is None else round(time.monotonic() - last, 3),
            "registry_generation": self.loader.snapshot.generation,
            "registry_error": self.loader.registry_error,
            "backbone": {"digest": self.backbone.digest, "parts": dict(self.backbone.parts)},
            "backbones": {
                one.name: {
                    "kind": one.backbone.architecture,
                    "digest": one.backbone.digest,
                    "parts": dict(one.backbone.parts),
                }
                for one in self.backbones
            },
            "device": str(self.backbone.device),
            "resident": self.backbones.residency(),
            "threads": threading.active_count(),
        }


def _make_bank(backbone: Backbone, settings: Settings, metrics: Metrics) -> AdapterBank:
    try:
        dims = backbone.dims()
    except MissingPart as reason:
        log.warning("%s", reason.message)
        dims = None
    buckets: Buckets = ()
    if dims is not None:
        given = settings.slot_buckets(backbone.architecture)
        free_bytes = _free_bytes(backbone.device)
        buckets = given or default_buckets(dims, backbone.dtype, free_bytes, settings.adapter_memory_fraction)
    return AdapterBank(
        dims,
        backbone.head_tensors(),
        device=backbone.device,
        dtype=backbone.dtype,
        buckets=buckets,
        host_bytes=settings.host_cache_mib * MIB,
        metrics=metrics,
    )


def _make_recordings(device: torch.device, settings: Settings) -> Recordings | None:
    """Where words and small batches are recorded: on devices that can launch a recording at once."""
    if device.type != "cuda" or not settings.cuda_graph_mib:
        return None
    return Recordings(CudaGraphs(device), settings.cuda_graph_mib * MIB)


def _free_bytes(device: torch.device) -> int:
    """Free memory of a device; of the host for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _media_limits(settings: Settings) -> MediaLimits:
    return MediaLimits(
        max_bytes=settings.max_request_mib * MIB,
        max_pixels=settings.max_pixels,
        max_duration_s=settings.max_duration_s,
        timeout_s=settings.decode_timeout_s,
    )
