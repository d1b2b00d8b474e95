"""Galleries as requests and builds meet them: the live version by name, its media, its embedding key; building one."""

import asyncio
import logging
import os
import shutil
import threading
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import ParamSpec, TypeVar, cast, get_args

import numpy as np
from pydantic import JsonValue
from torch import Tensor

from adapters.config import BASE_ADAPTER, check_name
from adapters.errors import AdapterBankError, NotFound
from adapters.registry import AliasReference, GalleryRecord, Registry, Snapshot, parse_reference
from adapters.registry.rules import check_no_job, check_still, twin
from service.auth import Principal
from service.errors import (
    BadMedia,
    BadQuery,
    DeadlineExceeded,
    Forbidden,
    GalleryNotFound,
    InsufficientRoom,
    MissingMedia,
    NotReady,
    Overloaded,
)
from service.gallery.build import EmbeddedItem, GalleryBuild
from service.gallery.frames import DEFAULT_TAU, Pooling
from service.gallery.index import IndexKind
from service.gallery.manifest import EmbeddedBy, GalleryKind, GalleryManifest, GalleryPlan, embedding_key
from service.gallery.sources import Source
from service.gallery.store import Gallery, GalleryStore
from service.gallery.trees import GalleryTrees
from service.loader import Loader, Pin
from service.pipelines.blip import preprocessing_of, text_limit
from service.pipelines.stage_set import StageSet
from service.pipelines.stages import Medium, tokenize_within
from service.types import MediaKind, RequestContext

log = logging.getLogger(__name__)

BUILD_CONCURRENCY = 8
AHEAD_INTERVAL_S = 60.0  # when fetching ahead of time is tried again, unless something changes
MAX_AHEAD = 2  # versions fetched ahead of time at once: fewer than there are threads, so that requests go first
MAX_MISSING_SHARE = 0.01  # of a gallery's items that may be lost when it is embedded anew
ROOM_FACTOR = 1.2
MAX_KEYS = 4096  # embedding keys that are remembered

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class BuildOptions:
    """How a gallery is made."""

    kind: GalleryKind
    pooling: Pooling = "mean"
    tau: float = DEFAULT_TAU
    index: IndexKind = "flat"
    copy_media: bool = False

    @classmethod
    def checked(cls, *, kind: GalleryKind, pooling: str, index: str, copy_media: bool = False) -> "BuildOptions":
        """Options from words somebody typed. Raises: BadQuery listing what there is."""
        if pooling not in get_args(Pooling):
            raise BadQuery(f"pooling {pooling!r} is none of {', '.join(get_args(Pooling))}", param="pooling")
        if index not in get_args(IndexKind):
            raise BadQuery(f"index {index!r} is none of {', '.join(get_args(IndexKind))}", param="index")
        return cls(kind, cast(Pooling, pooling), index=cast(IndexKind, index), copy_media=copy_media)


@dataclass(frozen=True)
class BuildProgress:
    """One step of a build: sources done, of how many, and how many were left out; earlier attempts count."""

    done: int
    total: int
    quarantined: int


class Galleries:
    """The galleries of one service."""

    def __init__(
        self,
        store: GalleryStore,
        trees: GalleryTrees,
        registry: Registry,
        loader: Loader,
        stages: StageSet,
        *,
        rollback_window_s: float = 0.0,
    ) -> None:
        """`rollback_window_s`: how long after an alias moved its galleries are kept ready for a rollback."""
        self.store = store
        self._trees = trees
        self._ahead: asyncio.Task[None] | None = None
        self._ahead_slots = asyncio.Semaphore(MAX_AHEAD)
        self._changed = asyncio.Event()
        self._looked_at = 0  # the registry's generation as of the last look at what is missing
        self._lacking: set[str] = set()  # keys of what is
        self._rollback_window_s = rollback_window_s
        self._registry = registry
        self._loader = loader
        self._stages = stages
        self._keys: dict[tuple[str, str, GalleryKind, Pooling, float], str] = {}

    def start(self) -> None:
        """Begin to fetch what is searched, or about to be, and not here; and go on doing so."""
        self._loader.on_change(self._changed.set)
        self._ahead = asyncio.create_task(self._fetch_ahead_on())

    async def close(self) -> None:
        """Stop fetching; who waits for it gets NotReady."""
        if self._ahead is not None:
            self._ahead.cancel()
            await asyncio.gather(self._ahead, return_exceptions=True)
        await asyncio.to_thread(self._trees.close)

    # --- reading -----------------------------------------------------------------------------------------

    async def live(
        self, name: str, principal: Principal, routing_key: str | None = None
    ) -> tuple[GalleryRecord, Gallery]:
        """The live version of a gallery, open. A name nobody knows makes the loader look at the registry once more.

        Raises: GalleryNotFound listing the galleries that the principal may see, Forbidden; what `version` raises.
        """
        record = await self._record(name, None, principal, routing_key)
        gallery = await self.version(name, record.version, principal)
        self._stages.metrics.gallery_items.labels(name).set(len(gallery))
        return record, gallery

    async def version(self, name: str, version: int, principal: Principal) -> Gallery:
        """One version, open. One that another host made is fetched first, once for all who wait.

        Raises: GalleryNotFound, Forbidden when it belongs to an adapter that may not be used, GalleryDamaged,
        ArtifactUnavailable, InsufficientRoom.
        """
        record = await self._record(name, version, principal)  # a deleted version's folder stays for a while
        gallery = self._trees.if_open(record)
        if gallery is None:
            if not self.store.is_open(name, version):
                await self._fetch(record)
            gallery = await asyncio.to_thread(self._trees.open, record)
        if not principal.allows(gallery.manifest.adapter.name):
            raise forbidden_gallery(name)
        return gallery

    async def manifest(self, name: str, version: int | None, principal: Principal) -> GalleryManifest:
        """What a version is, by default the live one. It is opened where it is here, and not fetched where it is not.

        Raises: as `version`.
        """
        record = await self._record(name, version, principal)
        if not await asyncio.to_thread(self._trees.is_missing, record):
            return (await self.version(name, record.version, principal)).manifest
        manifest = await asyncio.to_thread(self._trees.manifest, record)
        if not principal.allows(manifest.adapter.name):
            raise forbidden_gallery(name)
        return manifest

    async def versions(self, name: str, principal: Principal) -> list[int]:
        """The numbers of the versions that can be opened, be it after fetching them."""
        records = self._loader.view(principal).gallery_versions.get(name, ())
        return await asyncio.to_thread(self._trees.openable, name, records)

    async def _fetch(self, record: GalleryRecord) -> None:
        """Bring a version here that is not, once for all who wait; who leaves early leaves the others their fetch."""
        if not await asyncio.to_thread(self._trees.is_missing, record):
            return
        fetch = self._trees.fetch(record)
        fetched = asyncio.wrap_future(fetch)
        fetched.add_done_callback(lambda done: done.cancelled() or done.exception())  # who leaves early does not look
        try:
            await asyncio.shield(fetched)
        except asyncio.CancelledError:
            if fetch.cancelled():
                raise NotReady("the server is shutting down") from None
            raise

    def describe(self) -> dict[str, object]:
        """What other replicas are told: which versions are missing here, as of which generation of the registry."""
        return {"generation": self._looked_at, "missing": sorted(self._lacking)}

    async def _fetch_ahead_on(self) -> None:
        running: set[str] = set()
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._changed.clear()
                try:
                    for record in await self._look():
                        if record.key not in running:
                            running.add(record.key)
                            tasks.create_task(self._fetch_ahead(record, running))
                except OSError:
                    log.exception("what galleries are missing cannot be seen")  # and will be looked at again
                with suppress(TimeoutError):
                    async with asyncio.timeout(AHEAD_INTERVAL_S):
                        await self._changed.wait()

    async def _look(self) -> list[GalleryRecord]:
        """What is missing here now. Raises: OSError."""
        snapshot = self._loader.snapshot
        missing = await asyncio.to_thread(self._missing, snapshot)
        self._looked_at, self._lacking = snapshot.generation, {record.key for record in missing}
        return missing

    def _missing(self, snapshot: Snapshot) -> list[GalleryRecord]:
        """What requests search, or will when a job ends, and is not here though it could be."""
        wanted = {(head.name, number) for head in snapshot.heads for number in (head.live, head.canary)}
        wanted |= {(job.gallery, job.version) for job in snapshot.active_jobs}
        return [r for r in snapshot.galleries if (r.name, r.version) in wanted and self._trees.is_missing(r)]

    async def _fetch_ahead(self, record: GalleryRecord, running: set[str]) -> None:
        try:
            async with self._ahead_slots:
                await self._fetch(record)
            self._lacking.discard(record.key)
        except AdapterBankError as error:
            log.warning("gallery %s was not fetched ahead of time: %s", record.key, error.message)
        except Exception:
            log.exception("gallery %s was not fetched ahead of time", record.key)  # and no other is kept from it
        finally:
            running.discard(record.key)

    async def _record(
        self, name: str, version: int | None, principal: Principal, routing_key: str | None = None
    ) -> GalleryRecord:
        """What the registry knows of a version, by default the live one; it is looked at once more for what is new."""
        await self._loader.catch_up()
        try:
            return self._find(name, version, principal, routing_key)
        except (GalleryNotFound, Forbidden):
            await self._loader.refresh()
            return self._find(name, version, principal, routing_key)

    def _find(self, name: str, version: int | None, principal: Principal, routing_key: str | None) -> GalleryRecord:
        """Raises: GalleryNotFound, Forbidden; neither names what is hidden."""
        try:
            return self._loader.view(principal).gallery(name, version, routing_key)
        except NotFound as error:
            if _has_gallery(self._loader.snapshot, name, version):
                raise forbidden_gallery(name) from None
            raise GalleryNotFound(error.message, param="gallery") from error

    async def medium(self, name: str, item_id: str, principal: Principal) -> Medium:
        """The picture or clip behind a gallery's item. Raises: GalleryNotFound, Forbidden, MissingMedia, BadQuery for a text."""
        _, gallery = await self.live(name, principal)
        return await self.medium_at(gallery, gallery.position_of(item_id))

    async def medium_at(self, gallery: Gallery, position: int) -> Medium:
        """The medium at a position, after its digest was checked."""
        kind = gallery.manifest.kind
        if kind == "text":
            raise BadQuery(f"gallery {gallery.manifest.name!r} holds texts, not pictures or clips", param="gallery")
        path = await asyncio.to_thread(gallery.media_path, position)
        media = gallery.item(position).media
        assert media is not None
        return Medium(kind, path, media.sha256)

    def key(self, pin: Pin, kind: GalleryKind, pooling: Pooling, tau: float) -> str:
        """The embedding key of vectors made with an adapter now: what a gallery's must equal to be comparable."""
        asked = (pin.backbone, pin.digest, kind, pooling, tau)  # an adapter's digest covers its preprocessing
        if asked not in self._keys:
            if len(self._keys) >= MAX_KEYS:
                self._keys.clear()
            self._keys[asked] = self._make_key(pin, kind, pooling, tau)
        return self._keys[asked]

    def _make_key(self, pin: Pin, kind: GalleryKind, pooling: Pooling, tau: float) -> str:
        backbone = self._stages.blip(pin).backbone
        preprocessing = preprocessing_of(pin.config, backbone)
        used = ("vision", "text_encoder", "vision_proj", "text_proj", "tokenizer")
        facts = preprocessing.model_dump(mode="json")
        sampling = facts.pop("frame_sampling")
        if kind != "video":
            facts.pop("num_frames")
        pooled: dict[str, JsonValue] = (
            {"kind": pooling, "tau": tau} if kind == "video" and pooling != "mean" else {"kind": "mean"}
        )
        parts = {part: digest for part, digest in backbone.parts.items() if part in used}
        return embedding_key(parts, pin.digest, facts, sampling, pooled)

    # --- building ----------------------------------------------------------------------------------------

    async def build(
        self,
        name: str,
        adapter: str,
        sources: list[Source],
        options: BuildOptions,
        context: RequestContext,
        report: Callable[[BuildProgress], None] | None = None,
    ) -> GalleryRecord:
        """Embed sources with an adapter, write a version, make it live. Goes on where an earlier attempt stopped.

        The gallery follows the alias the adapter was named by. Versions of the adapter that a rollback or a canary may
        need get the same content, so that neither loses an item.
        A source that cannot be decoded is quarantined and the build goes on.
        Raises: BadQuery for an adapter that does not retrieve, Forbidden for an adapter that may not be used and for a
        gallery that belongs to one, GalleryBusy, Conflict when a rollout embeds the gallery at the same time,
        ConversionError when nothing is left.
        """
        await self._loader.refresh()
        check_no_job(self._loader.snapshot, name)
        live = self._loader.snapshot.live_version(check_name(name, param="gallery"))
        record = await self.embed(name, adapter, sources, options, context, report)
        went_live = await asyncio.to_thread(
            self._registry.set_live_gallery, name, record.version, expect=live, follows=follows_of(adapter)
        )
        assert went_live is not None
        return went_live

    async def embed(
        self,
        name: str,
        adapter: str,
        sources: list[Source],
        options: BuildOptions,
        context: RequestContext,
        report: Callable[[BuildProgress], None] | None = None,
        *,
        made: int | None = None,
        keep: Callable[[GalleryRecord], Awaitable[None]] | None = None,
    ) -> GalleryRecord:
        """The first part of `build`: the new versions are ready, and none is live.

        `keep` is told of the version as soon as it is there; `made` is the version that it told an earlier attempt of.
        Raises: as `build`.
        """
        await self._loader.refresh()
        self._check_takeover(name, context.principal)
        check_still(self._loader.snapshot, name)
        if made is None:
            async with self._loader.pin(adapter, context.principal) as pin:
                record = await self._embed_version(name, pin, sources, options, context, report, content=None)
            if keep is not None:
                await keep(record)
            await self._loader.refresh()
        else:
            record = self._loader.snapshot.gallery(name, made)
        since = self._registry.now() - self._rollback_window_s
        for reference in standby_versions(self._loader.snapshot, follows_of(adapter), since):
            async with self._loader.pin(reference, context.principal) as pin:
                if twin(self._loader.snapshot, record, pin.digest) is None:
                    await self._embed_version(name, pin, sources, options, context, None, content=record.content)
        return record

    async def rebuild(
        self,
        name: str,
        version: int,
        adapter: str,
        context: RequestContext,
        report: Callable[[BuildProgress], None] | None = None,
    ) -> GalleryRecord:
        """Embed the content of a version anew, with another adapter. The new version is ready, and not live.

        An item whose file is not the one that was embedded counts as gone.
        Raises: as `build` and `version`; MissingMedia when more than MAX_MISSING_SHARE of the items are gone.
        """
        gallery = await self.version(name, version, context.principal)
        await asyncio.to_thread(check_room, gallery)
        manifest = gallery.manifest
        options = BuildOptions(manifest.kind, manifest.pooling, manifest.tau, manifest.index, manifest.copy_media)
        sources = await asyncio.to_thread(gallery.sources)
        record = self._loader.snapshot.gallery(name, version)
        limit = int(MAX_MISSING_SHARE * len(sources))
        async with self._loader.pin(adapter, context.principal) as pin:
            return await self._embed_version(
                name, pin, sources, options, context, report, content=record.content, max_quarantined=limit
            )

    async def _embed_version(
        self,
        name: str,
        pin: Pin,
        sources: list[Source],
        options: BuildOptions,
        context: RequestContext,
        report: Callable[[BuildProgress], None] | None,
        *,
        content: int | None,
        max_quarantined: int | None = None,
    ) -> GalleryRecord:
        """A new version, ready. Raises: MissingMedia when more sources than allowed cannot be embedded."""
        if pin.config is not None and pin.config.task != "retrieval":
            raise BadQuery(f"{pin.info.name} was made for {pin.config.task}, not for retrieval", param="adapter")
        self._stages.blip(pin).backbone.require("retrieval", heads=pin.config.heads if pin.config else ())
        await asyncio.to_thread(self._trees.check)
        plan = self._plan(name, pin, options)
        with ExitStack() as stack:  # which closes the build also when the wait for it is cancelled
            build = await to_thread_whole(lambda: stack.enter_context(self.store.build(plan, sources)))
            await self._embed_all(build, pin, len(sources), context, report)
            if max_quarantined is not None and build.num_quarantined > max_quarantined:
                raise MissingMedia(
                    f"{build.num_quarantined} of {len(sources)} items of gallery {name!r} cannot be embedded any more; "
                    f"at most {max_quarantined} may be left out",
                    param="gallery",
                )
            stop = threading.Event()
            publish = asyncio.to_thread(self._publish, build, pin, content, context.deadline, stop)
            return await through(publish, stop)

    def _check_takeover(self, name: str, principal: Principal) -> None:
        """Nobody puts a version of their own in the place of one they may not see. Raises: Forbidden."""
        versions = self._loader.snapshot.gallery_versions.get(name, ())
        if len(versions) > len(self._loader.view(principal).gallery_versions.get(name, ())):
            raise forbidden_gallery(name)

    def _plan(self, name: str, pin: Pin, options: BuildOptions) -> GalleryPlan:
        is_base = pin.digest == BASE_ADAPTER
        embedded_by = EmbeddedBy(
            name=pin.info.name, version=pin.info.version, weights_digest=None if is_base else pin.digest
        )
        return GalleryPlan(
            name=name,
            kind=options.kind,
            embedding_key=self.key(pin, options.kind, options.pooling, options.tau),
            adapter=embedded_by,
            preprocessing=preprocessing_of(pin.config, self._stages.blip(pin).backbone),
            pooling=options.pooling,
            tau=options.tau,
            index=options.index,
            copy_media=options.copy_media,
        )

    def _publish(
        self, build: GalleryBuild, pin: Pin, content: int | None, deadline: float, stop: threading.Event
    ) -> GalleryRecord:
        """Take a number from the registry, write that version, and put it where other hosts find it; then it is ready.

        What was embedded is kept until everybody can find the version: a crash before that costs a number, no more, which
        the sweeper gives up. Raises: as `GalleryTrees.put`.
        """
        plan, registry = build.plan, self._registry
        record = registry.add_gallery_version(
            plan.name,
            embedding_key=plan.embedding_key,
            adapter=pin.digest,
            adapter_name=None if pin.digest == BASE_ADAPTER else pin.info.name,
            adapter_version=pin.info.version,
            content=content,
            status="building",
        )
        try:
            folder = build.write(record.version)
            tree = self._trees.put(record, folder, deadline=deadline, stop=stop)
            build.publish()
        except BaseException as error:
            registry.set_gallery_status(
                plan.name, record.version, "deleted", reason=f"it could not be written: {error}"
            )
            raise
        return registry.set_gallery_status(plan.name, record.version, "ready", tree=tree)

    async def _embed_all(
        self,
        build: GalleryBuild,
        pin: Pin,
        total: int,
        context: RequestContext,
        report: Callable[[BuildProgress], None] | None,
    ) -> None:
        """Embed what is pending, several at a time; results are added in the order they come."""
        sources = build.pending()
        pending = iter(sources)
        running: set[asyncio.Task[tuple[Source, EmbeddedItem | AdapterBankError]]] = set()
        done = total - len(sources)
        try:
            while True:
                while len(running) < BUILD_CONCURRENCY and (source := next(pending, None)) is not None:
                    running.add(asyncio.create_task(self._embed(source, pin, context)))
                if not running:
                    return
                finished, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in finished:
                    await to_thread_whole(_store, build, *task.result())
                    done += 1
                if report is not None:
                    report(BuildProgress(done, total, build.num_quarantined))
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _embed(
        self, source: Source, pin: Pin, context: RequestContext
    ) -> tuple[Source, EmbeddedItem | AdapterBankError]:
        """A source embedded, or what is wrong with it. One whose media worker died is tried once more: somebody else may have killed it.

        Raises: NotReady, DeadlineExceeded, which say nothing about the source.
        """
        may_retry = True
        while True:
            try:
                return source, await self._embedded(source, pin, context)
            except Overloaded as error:  # the media queue is full of others' work
                await asyncio.sleep(error.retry_after_s)
            except (NotReady, DeadlineExceeded):
                raise
            except AdapterBankError as error:
                if not (may_retry and isinstance(error, BadMedia) and error.worker_died):
                    return source, error
                may_retry = False

    async def _embedded(self, source: Source, pin: Pin, context: RequestContext) -> EmbeddedItem:
        stages = self._stages.blip(pin)
        if source.kind == "text":
            limit = text_limit(pin.config, stages.backbone)
            tokens = tokenize_within(stages.backbone, source.text or "", limit, param="text")
            vector = (await stages.text(tokens.ids, pin, context)).vector
            return EmbeddedItem(source.id, vector=vector.numpy())
        assert source.file is not None
        kind: MediaKind = source.kind
        seen = await stages.see(Medium(kind, source.file), pin, context)
        frames = frame_features(seen.output.frames)
        thumbnail = await self._stages.media.thumbnail(source.file)
        times = seen.times_s if kind == "video" else ()
        return EmbeddedItem(
            source.id, frames=frames, frame_times_s=times, duration_s=seen.duration_s, thumbnail=thumbnail
        )


def follows_of(adapter: str) -> str | None:
    """The "name@alias" that a gallery embedded with this reference goes with; None for a fixed version."""
    reference = parse_reference(adapter)
    return f"{reference.name}@{reference.alias}" if isinstance(reference, AliasReference) else None


def _has_gallery(snapshot: Snapshot, name: str, version: int | None) -> bool:
    try:
        snapshot.gallery(name, version)
    except NotFound:
        return False
    return True


def forbidden_gallery(name: str) -> Forbidden:
    """What a key is told that may not use a gallery."""
    return Forbidden(f"this key may not use the gallery {name!r}", reason="pattern", param="gallery")


def standby_versions(snapshot: Snapshot, follows: str | None, since: float) -> list[str]:
    """References of the other versions a follower of this alias may be searched with: a canary, and what it named before.

    The latter only where the alias moved after `since`, seconds since 1970.
    """
    if follows is None:
        return []
    name, _, alias = follows.partition("@")
    record = snapshot.alias(name, alias)
    if record is None:
        return []
    before = record.history[-1:] if record.updated_at >= since else ()
    numbers = [*before, *([record.canary.version] if record.canary else [])]
    digest = snapshot.version(name, record.version).weights_digest
    versions = [snapshot.version(name, number) for number in dict.fromkeys(numbers) if number != record.version]
    return [str(v.reference) for v in versions if v.status == "ready" and v.weights_digest != digest]


def check_room(gallery: Gallery) -> None:
    """Refuse to make a second version of a gallery where there is no room for it. Raises: InsufficientRoom."""
    num_bytes = sum(path.stat().st_size for path in gallery.path.rglob("*") if path.is_file())
    free_disk = shutil.disk_usage(gallery.path).free
    if free_disk < ROOM_FACTOR * num_bytes:
        raise InsufficientRoom(
            f"a second version of {gallery.manifest.name!r} takes {num_bytes:,} bytes of disk; {free_disk:,} are free"
        )
    in_memory = gallery.vectors.nbytes + gallery.frames.nbytes
    free_memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free_memory < ROOM_FACTOR * in_memory:
        raise InsufficientRoom(
            f"a second version of {gallery.manifest.name!r} takes {in_memory:,} bytes of memory; {free_memory:,} are free"
        )


async def to_thread_whole(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Like `asyncio.to_thread`, but a cancellation waits until the thread is through with it."""
    return await through(asyncio.to_thread(function, *args, **kwargs), threading.Event())


async def through(work: Awaitable[T], stop: threading.Event) -> T:
    """Wait for work; a cancellation sets `stop`, and waits until the work is through."""
    future = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait({future})
        if not future.cancelled():
            future.exception()  # nobody else will look at it
        raise


def frame_features(frames: Tensor | None) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """[F, E] float32 of a vision output, to be read only; the pipeline made sure there is a projection."""
    assert frames is not None, "retrieval without a vision projection. This is a bug."
    view = np.asarray(frames.numpy(), np.float32)
    view.setflags(write=False)  # others may look at the same medium
    return view


def _store(build: GalleryBuild, source: Source, result: EmbeddedItem | AdapterBankError) -> None:
    """Add, or quarantine what cannot be added."""
    if isinstance(result, EmbeddedItem):
        try:
            return build.add(result)
        except AdapterBankError as error:
            result = error
    build.quarantine(source.id, result)
