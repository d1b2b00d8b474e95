"""Galleries as requests and builds meet them: the live version by name, its media, its embedding key; building one."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar, cast, get_args

import numpy as np
from pydantic import JsonValue
from torch import Tensor

from adapters.config import BASE_ADAPTER
from adapters.errors import AdapterBankError, NotFound
from adapters.registry import GalleryRecord, Registry
from service.errors import BadMedia, BadQuery, DeadlineExceeded, GalleryNotFound, NotReady, Overloaded
from service.gallery.build import EmbeddedItem, GalleryBuild
from service.gallery.frames import DEFAULT_TAU, Pooling
from service.gallery.index import IndexKind
from service.gallery.manifest import EmbeddedBy, GalleryKind, GalleryPlan, embedding_key
from service.gallery.sources import Source
from service.gallery.store import Gallery, GalleryStore
from service.loader import Loader, Pin
from service.pipelines.stages import Medium, StageRunner, preprocessing_of, text_limit, tokenize_within
from service.types import MediaKind, RequestContext

BUILD_CONCURRENCY = 8

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

    def __init__(self, store: GalleryStore, registry: Registry, loader: Loader, stages: StageRunner) -> None:
        self.store = store
        self._registry = registry
        self._loader = loader
        self._stages = stages

    # --- reading -----------------------------------------------------------------------------------------

    async def live(self, name: str) -> tuple[GalleryRecord, Gallery]:
        """The live version of a gallery, open. A name nobody knows makes the loader look at the registry once more.

        Raises: GalleryNotFound listing the galleries there are.
        """
        try:
            record = self._loader.snapshot.gallery(name)
        except NotFound:
            await self._loader.refresh()
            try:
                record = self._loader.snapshot.gallery(name)
            except NotFound as error:
                raise GalleryNotFound(error.message, param="gallery") from error
        gallery = await self.version(name, record.version)
        self._stages.metrics.gallery_items.labels(name).set(len(gallery))
        return record, gallery

    async def version(self, name: str, version: int) -> Gallery:
        """One version, open."""
        return await asyncio.to_thread(self.store.open, name, version)

    async def medium(self, name: str, item_id: str) -> Medium:
        """The picture or clip behind a gallery's item. Raises: GalleryNotFound, MissingMedia, BadQuery for a text."""
        _, gallery = await self.live(name)
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
        backbone = self._stages.backbone
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

        A source that cannot be decoded is quarantined and the build goes on.
        Raises: BadQuery for an adapter that does not retrieve, GalleryBusy, ConversionError when nothing is left.
        """
        async with self._loader.pin(adapter) as pin:
            if pin.config is not None and pin.config.task != "retrieval":
                raise BadQuery(f"{pin.info.name} was made for {pin.config.task}, not for retrieval", param="adapter")
            self._stages.backbone.require("retrieval", heads=pin.config.heads if pin.config else ())
            plan = self._plan(name, pin, options)
            with await asyncio.to_thread(self.store.build, plan, sources) as build:
                await self._embed_all(build, pin, len(sources), context, report)
                return await to_thread_whole(self._publish, build, pin)

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
            preprocessing=preprocessing_of(pin.config, self._stages.backbone),
            pooling=options.pooling,
            tau=options.tau,
            index=options.index,
            copy_media=options.copy_media,
        )

    def _publish(self, build: GalleryBuild, pin: Pin) -> GalleryRecord:
        """Take a number from the registry, write that version, make it live. A crash in between costs a number, no more."""
        plan, registry = build.plan, self._registry
        record = registry.add_gallery_version(
            plan.name,
            embedding_key=plan.embedding_key,
            adapter=pin.digest,
            adapter_name=None if pin.digest == BASE_ADAPTER else pin.info.name,
            adapter_version=pin.info.version,
            status="building",
        )
        try:
            build.finish(record.version)
        except BaseException as error:
            registry.set_gallery_status(
                plan.name, record.version, "deleted", reason=f"it could not be written: {error}"
            )
            raise
        registry.set_gallery_status(plan.name, record.version, "ready")
        follows = None if pin.info.alias is None else f"{pin.info.name}@{pin.info.alias}"
        live = registry.set_live_gallery(plan.name, record.version, follows=follows)
        assert live is not None
        return live

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
        stages = self._stages
        if source.kind == "text":
            limit = text_limit(pin.config, stages.backbone)
            tokens = tokenize_within(stages.backbone, source.text or "", limit, param="text")
            vector = (await stages.text(tokens.ids, pin, context)).vector
            return EmbeddedItem(source.id, vector=vector.numpy())
        assert source.file is not None
        kind: MediaKind = source.kind
        seen = await stages.see(Medium(kind, source.file), pin, context)
        frames = frame_features(seen.output.frames)
        thumbnail = await stages.media.thumbnail(source.file)
        times = seen.times_s if kind == "video" else ()
        return EmbeddedItem(
            source.id, frames=frames, frame_times_s=times, duration_s=seen.duration_s, thumbnail=thumbnail
        )


async def to_thread_whole(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Like `asyncio.to_thread`, but a cancellation waits until the thread is through with it."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        raise


def frame_features(frames: Tensor | None) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """[F, E] float32 of a vision output; the pipeline made sure there is a projection."""
    assert frames is not None, "retrieval without a vision projection. This is a bug."
    return np.asarray(frames.numpy(), np.float32)


def _store(build: GalleryBuild, source: Source, result: EmbeddedItem | AdapterBankError) -> None:
    """Add, or quarantine what cannot be added."""
    if isinstance(result, EmbeddedItem):
        try:
            return build.add(result)
        except AdapterBankError as error:
            result = error
    build.quarantine(source.id, result)
