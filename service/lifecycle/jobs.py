"""A replica's part in jobs: galleries that are built, or embedded anew, while the service runs.

A job's record says what shall be done; any replica that lives does it, and another goes on when that one dies: what was
embedded is durable, a version that was made is noted, and only the latest worker's token makes one live.
"""

import asyncio
import logging
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from adapters.config import Strict, describe
from adapters.errors import AdapterBankError, Conflict, InvalidReference, NotFound
from adapters.registry import GalleryRecord, JobRecord, Registry, Replica, Snapshot
from adapters.registry.rules import UNSET, Unset
from service.auth import EVERY_ADAPTER, Principal
from service.errors import BadQuery
from service.gallery.frames import Pooling
from service.gallery.index import IndexKind
from service.gallery.sources import Source, allowed_path, confined, read_sources
from service.lifecycle.rollouts import TRANSIENT
from service.loader import Loader
from service.pipelines.galleries import BuildOptions, BuildProgress, Galleries, follows_of
from service.types import RequestContext

log = logging.getLogger(__name__)

MAX_RUNNING = 2  # jobs that one replica does at a time
JOB_TIMEOUT_S = 7 * 24 * 3600.0
RETRY_S = 2.0
SPREAD_TIMEOUT_S = 600.0  # how long a version that was made waits for other servers to fetch it
SPREAD_POLL_S = 0.5


class JobArguments(Strict):
    """What a job shall do.

    adapter      the reference to embed with; None for a rebuild: the version that the gallery goes with
    source       the folder or manifest of a build; an absolute path
    within       folders that the source's files must lie in; None: anywhere
    principal, adapters   who asked, and the patterns of adapters they may use
    """

    adapter: str | None = None
    source: str | None = None
    within: tuple[str, ...] | None = None
    pooling: Pooling = "mean"
    index: IndexKind = "flat"
    copy_media: bool = False
    principal: str = "(local)"
    adapters: tuple[str, ...] = (EVERY_ADAPTER,)

    @classmethod
    def parse(cls, text: str) -> Self:
        """From a record. Raises: InvalidReference for what this program does not understand."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise InvalidReference(f"the job cannot be understood: {describe(error)}", param="arguments") from error

    def text(self) -> str:
        """For a record: equal arguments give equal texts."""
        return self.model_dump_json()

    def asker(self) -> Principal:
        """Who asked, with what they were allowed to do then."""
        return Principal(self.principal, frozenset({"deploy"}), self.adapters)

    def located(self) -> Self:
        """With the source where it is, after making sure that it may be read.

        Raises: BadQuery, UnsafePath, ConversionError, all for a source that must lie `within` folders.
        """
        assert self.source is not None, "a build without a source. This is a bug."
        if self.within is None:
            return self.model_copy(update={"source": os.path.abspath(self.source)})
        if not self.within:
            raise BadQuery(
                "this server builds no galleries from its files: BANK_GALLERY_SOURCES names no folder", param="source"
            )
        found = allowed_path(self.source, [Path(folder) for folder in self.within])
        return self.model_copy(update={"source": str(found)})

    def read_sources(self) -> list[Source]:
        """What shall be embedded. Blocks. Raises: ConversionError, UnsafePath."""
        assert self.source is not None, "a build without a source. This is a bug."
        if self.within is None:
            return read_sources(Path(self.source))
        folders = [Path(folder) for folder in self.within]
        return confined(read_sources(allowed_path(self.source, folders)), folders)


class Jobs:
    """Does the jobs that nobody else does, as this replica. For the event loop."""

    def __init__(self, replica_id: str, registry: Registry, loader: Loader, galleries: Galleries) -> None:
        self._replica_id = replica_id
        self._registry = registry
        self._loader = loader
        self._galleries = galleries
        self._running: dict[str, asyncio.Task[None]] = {}
        self._tokens: dict[str, int] = {}  # of those that run
        self._others: set[str] = set()  # replicas that live, as of the last `advance`
        self.progress: dict[str, BuildProgress] = {}

    async def advance(self, snapshot: Snapshot, alive: Collection[str]) -> None:
        """Take up what nobody alive does, and stop what is over or somebody else's. Raises: RegistryUnavailable."""
        self._let_go_of_deleted(snapshot)
        active = {job.id: job for job in snapshot.active_jobs}
        for job_id, task in self._running.items():
            if job_id not in active or active[job_id].token > self._tokens[job_id]:
                task.cancel()
        others = self._others = set(alive) - {self._replica_id}  # a claim of our own is from before we lost it
        for job in active.values():
            if len(self._running) >= MAX_RUNNING:
                return
            if job.id not in self._running and job.worker not in others:
                claimed = await asyncio.to_thread(self._registry.claim_job, job.id, self._replica_id, others)
                if claimed is not None:
                    self._tokens[job.id] = claimed.token
                    self._running[job.id] = asyncio.create_task(self._run(claimed))

    async def close(self) -> None:
        """Stop; what was embedded so far is kept, and another replica goes on with it."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _let_go_of_deleted(self, snapshot: Snapshot) -> None:
        """Free what deleted galleries take; who searches one at this moment may go on."""
        for name, version in self._galleries.store.opened():
            record = snapshot.records.get(("gallery", f"{name}@{version}"))
            if isinstance(record, GalleryRecord) and record.status == "deleted":
                self._galleries.store.release(name, version)

    # --- one job -----------------------------------------------------------------------------------------

    async def _run(self, job: JobRecord) -> None:
        """Do a job to its end, well or not. Ends early when it is over, or somebody else's."""
        try:
            is_over = await self._try(job)
            while not is_over:
                await asyncio.sleep(RETRY_S)
                is_over = await self._try(job)
        except Conflict as error:
            log.info("operation %s: %s", job.id, error.message)
        finally:
            self.progress.pop(job.id, None)
            self._running.pop(job.id, None)
            self._tokens.pop(job.id, None)
        await self._loader.refresh()

    async def _try(self, job: JobRecord) -> bool:
        """Whether it came to an end; if not, it may at another try. Raises: Conflict when it is not ours to end."""
        try:
            record, follows = await self._work(job)
            await self._spread(job, record)
            finish = self._registry.finish_job
            await asyncio.to_thread(finish, job.id, job.token, record.version, follows=follows, actor=self._replica_id)
            log.info("operation %s: gallery %s is live", job.id, record.key)
            return True
        except TRANSIENT as error:
            log.warning("operation %s cannot go on yet: %s", job.id, error.message)
            return False
        except AdapterBankError as error:
            return await self._fail(job, error.message)
        except OSError as error:
            return await self._fail(job, f"replica {self._replica_id}: {error}")
        except Exception:
            log.exception("operation %s failed", job.id)
            return await self._fail(job, f"replica {self._replica_id} failed; its log has the reason")

    async def _spread(self, job: JobRecord, record: GalleryRecord) -> None:
        """Wait until the others that serve have the version, if they have to fetch it: their searches would. Not for ever."""
        if record.tree is None:
            return
        generation = (await asyncio.to_thread(self._registry.revision)).generation
        end = time.monotonic() + SPREAD_TIMEOUT_S
        while lacking := await asyncio.to_thread(self._lacking, record, generation):
            if time.monotonic() > end:
                log.warning("operation %s does not wait for %s to fetch %s", job.id, ", ".join(lacking), record.key)
                return
            await asyncio.sleep(SPREAD_POLL_S)

    def _lacking(self, record: GalleryRecord, generation: int) -> list[str]:
        """The others that serve and have not said, with the registry seen at a generation, that the version is there."""
        replicas = [replica for replica in self._registry.replicas() if replica.id in self._others]
        return [r.id for r in replicas if r.is_serving and not _has(r, record.key, generation)]

    async def _fail(self, job: JobRecord, error: str) -> bool:
        try:
            await asyncio.to_thread(self._registry.fail_job, job.id, job.token, error, actor=self._replica_id)
        except TRANSIENT:
            return False
        log.warning("operation %s, a %s of gallery %s, failed: %s", job.id, job.action, job.gallery, error)
        return True

    async def _work(self, job: JobRecord) -> tuple[GalleryRecord, str | Unset | None]:
        """The version a job is about, ready, and what it follows. Raises whatever is in the way."""
        arguments = JobArguments.parse(job.arguments)
        context = RequestContext(
            deadline=time.monotonic() + JOB_TIMEOUT_S,
            client=self._replica_id,
            background=True,
            principal=arguments.asker(),
        )
        await self._loader.refresh()
        known = self._loader.snapshot.job(job.id)
        made = None if known is None else known.version

        def report(progress: BuildProgress) -> None:
            self.progress[job.id] = progress

        async def keep(record: GalleryRecord) -> None:
            await asyncio.to_thread(self._registry.keep_job, job.id, job.token, record.version, actor=self._replica_id)

        if job.action == "build":
            assert arguments.adapter is not None, "a build without an adapter. This is a bug."
            sources = await asyncio.to_thread(arguments.read_sources)
            options = BuildOptions(
                sources[0].kind, arguments.pooling, index=arguments.index, copy_media=arguments.copy_media
            )
            record = await self._galleries.embed(
                job.gallery, arguments.adapter, sources, options, context, report, made=made, keep=keep
            )
            return record, follows_of(arguments.adapter)
        follows = UNSET if arguments.adapter is None else follows_of(arguments.adapter)
        if made is not None:
            return self._loader.snapshot.gallery(job.gallery, made), follows
        if job.from_version is None:
            raise NotFound(f"gallery {job.gallery!r} had no live version", param="gallery")
        reference = arguments.adapter or embedder_of(self._loader.snapshot, job.gallery, job.from_version)
        record = await self._galleries.rebuild(job.gallery, job.from_version, reference, context, report)
        await keep(record)
        return record, follows


def _has(replica: Replica, gallery: str, generation: int) -> bool:
    """Whether a replica said that it has a version, or is of a program that does not say such things."""
    said = replica.details.get("galleries")
    if not isinstance(said, dict):
        return True
    seen, missing = said.get("generation"), said.get("missing")
    return isinstance(seen, int) and seen >= generation and isinstance(missing, list) and gallery not in missing


def embedder_of(snapshot: Snapshot, gallery: str, version: int | None = None) -> str:
    """What embeds a gallery when nothing else is said: the alias it follows, else what embedded this version of it.

    Raises: NotFound when there is no such version.
    """
    record = snapshot.gallery(gallery, version)
    head = snapshot.head(gallery)
    if head is not None and head.follows is not None:
        return head.follows
    if record.adapter_name is not None and record.adapter_version is not None:
        return f"{record.adapter_name}@{record.adapter_version}"
    return record.adapter
