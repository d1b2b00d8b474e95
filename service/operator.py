"""An operator's verbs on a home folder: the same as `service.client.Client` has for a running service, and the same answers.

Where servers run on the home's registry, they do the work. Where none does, long work is done here, by the parts that serve,
for as long as it takes.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from adapters.artifacts import fetch_package
from adapters.config import check_name
from adapters.errors import AdapterBankError, AdapterNotFound, NotFound
from adapters.registry import DEFAULT_ALIAS, UNSET, Expect, Snapshot
from adapters.registry.references import AliasReference
from service.config import MIB, Settings
from service.errors import GalleryNotFound
from service.folders import HomeFolders, open_registry, push_folder
from service.gallery.sources import read_sources
from service.gallery.store import GalleryStore
from service.gallery.trees import GalleryTrees
from service.http.operator_schemas import (
    AliasReply,
    AuditLine,
    DeletedGalleryReply,
    OperationReply,
    ReplicaReply,
    ReplicasReply,
    UnloadReply,
)
from service.http.schemas import AdapterDetails, AdapterVersionReply, GalleryDetails
from service.lifecycle.deployments import DEFAULT_TIMEOUT_S, Deployments
from service.lifecycle.jobs import JobArguments
from service.lifecycle.lifecycle import EXPIRY_S
from service.pipelines.galleries import BuildOptions
from service.runtime import Runtime, open_artifacts, open_gallery_trees

log = logging.getLogger(__name__)

ACTOR = "cli"
POLL_S = 0.2

Report = Callable[[OperationReply], None]


class LocalOperator:
    """Use as a context manager, or `close`. Raises the domain's errors."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._registry = open_registry(settings)
        self._deployments = Deployments(self._registry, open_artifacts(settings))
        store = GalleryStore(HomeFolders(settings.home).galleries)
        self._trees = GalleryTrees(store, open_gallery_trees(settings))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the registry."""
        self._registry.close()

    # --- the verbs, as `Client` has them -----------------------------------------------------------------

    def adapters(self) -> list[AdapterDetails]:
        """All registered adapters."""
        snapshot = self._registry.snapshot()
        return [AdapterDetails.of(name, snapshot, lambda digest: "disk") for name in sorted(snapshot.adapters)]

    def adapter(self, name: str) -> AdapterDetails:
        """One adapter. Raises: AdapterNotFound."""
        snapshot = self._registry.snapshot()
        if name not in snapshot.adapters:
            snapshot.resolve(AliasReference(check_name(name)))  # says which names there are
            raise AdapterNotFound(f"no adapter {name!r}", param="adapter")
        return AdapterDetails.of(name, snapshot, lambda digest: "disk")

    def push(self, package: str | os.PathLike[str], name: str) -> OperationReply:
        """Store the package in a folder or at a URL, and stage it. The operation is its validation."""
        with push_folder(self._settings.home) as scratch:
            folder = Path(package)
            if "://" in str(package):
                folder = scratch / "package"
                fetch_package(str(package), folder, max_bytes=self._settings.max_package_mib * MIB)
            record = self._deployments.push(folder, name, actor=ACTOR)
        return OperationReply.of(self._deployments.of_version(record))

    def promote(
        self,
        name: str,
        version: int,
        *,
        alias: str = DEFAULT_ALIAS,
        expect: Expect = UNSET,
        traffic: float | None = None,
        migrate: bool = True,
        force: bool = False,
        timeout_s: float | None = None,
        reason: str | None = None,
        key: str | None = None,
    ) -> OperationReply:
        """Let an alias serve a version, or a share of it."""
        operation = self._deployments.promote(
            name,
            version,
            alias=alias,
            expect=expect,
            traffic=traffic,
            migrate=migrate,
            force=force,
            timeout_s=timeout_s or DEFAULT_TIMEOUT_S,
            reason=reason,
            actor=ACTOR,
            key=key,
        )
        return OperationReply.of(operation)

    def roll_back(
        self,
        name: str,
        *,
        alias: str = DEFAULT_ALIAS,
        expect: Expect = UNSET,
        reason: str | None = None,
        key: str | None = None,
    ) -> OperationReply:
        """Leave the version an alias names for the one before."""
        operation = self._deployments.roll_back(name, alias=alias, expect=expect, reason=reason, actor=ACTOR, key=key)
        return OperationReply.of(operation)

    def end_canary(
        self, name: str, *, alias: str = DEFAULT_ALIAS, expect: int | None = None, reason: str | None = None
    ) -> AliasReply:
        """Take a canary's share back."""
        wanted: Expect = UNSET if expect is None else expect
        return AliasReply.of(self._deployments.end_canary(name, alias=alias, expect=wanted, reason=reason, actor=ACTOR))

    def retire(self, name: str, version: int, *, reason: str | None = None) -> AdapterVersionReply:
        """Take a version out of service."""
        return AdapterVersionReply.of(self._deployments.retire(name, version, reason=reason, actor=ACTOR), "disk")

    def reinstate(self, name: str, version: int, *, reason: str | None = None) -> AdapterVersionReply:
        """Bring a retired version back."""
        return AdapterVersionReply.of(self._deployments.reinstate(name, version, reason=reason, actor=ACTOR), "disk")

    def delete(self, name: str, version: int, *, reason: str | None = None) -> UnloadReply:
        """Give a version up for good. Nothing is resident here, so nothing becomes free; servers free what they hold."""
        self._deployments.delete(name, version, reason=reason, actor=ACTOR)
        return UnloadReply(freed_bytes={"device": 0, "host": 0})

    def galleries(self) -> list[GalleryDetails]:
        """All galleries that can be searched. One that cannot be opened is left out, and the log says why."""
        snapshot = self._registry.snapshot()
        found = []
        for name in sorted(snapshot.gallery_versions):
            try:
                found.append(self._details(name, snapshot))
            except AdapterBankError as error:
                log.warning("gallery %s is not listed: %s", name, error.message)
        return found

    def gallery(self, name: str) -> GalleryDetails:
        """One gallery. Raises: GalleryNotFound."""
        return self._details(name, self._registry.snapshot())

    def _details(self, name: str, snapshot: Snapshot) -> GalleryDetails:
        try:
            live = snapshot.gallery(name)
        except NotFound as error:
            raise GalleryNotFound(error.message, param="gallery") from error
        versions = self._trees.openable(name, snapshot.gallery_versions[name])
        return GalleryDetails.of(self._trees.manifest(live), snapshot, versions)

    def build_gallery(
        self,
        name: str,
        source: str | os.PathLike[str],
        adapter: str,
        *,
        pooling: str = "mean",
        index: str = "flat",
        copy_media: bool = False,
        key: str | None = None,
    ) -> OperationReply:
        """Let a gallery be built from a folder or manifest, and go live. Raises: ConversionError for a source that is none."""
        kind = read_sources(Path(source))[0].kind
        options = BuildOptions.checked(kind=kind, pooling=pooling, index=index, copy_media=copy_media)
        wanted = JobArguments(
            adapter=adapter,
            source=os.fspath(source),
            pooling=options.pooling,
            index=options.index,
            copy_media=copy_media,
        )
        return OperationReply.of(self._deployments.build_gallery(name, wanted, actor=ACTOR, key=key))

    def rebuild_gallery(self, name: str, *, adapter: str | None = None, key: str | None = None) -> OperationReply:
        """Let what a gallery holds be embedded anew, and go live."""
        return OperationReply.of(self._deployments.rebuild_gallery(name, adapter, actor=ACTOR, key=key))

    def delete_gallery(self, name: str, *, expect: int | None = None, reason: str | None = None) -> DeletedGalleryReply:
        """Give a gallery up with all its versions."""
        wanted: Expect = UNSET if expect is None else expect
        records = self._deployments.delete_gallery(name, expect=wanted, reason=reason, actor=ACTOR)
        return DeletedGalleryReply(name=name, versions=[record.version for record in records])

    def delete_gallery_version(self, name: str, version: int, *, reason: str | None = None) -> DeletedGalleryReply:
        """Give one version up that is not live."""
        self._deployments.delete_gallery_version(name, version, reason=reason, actor=ACTOR)
        return DeletedGalleryReply(name=name, versions=[version])

    def operations(self) -> list[OperationReply]:
        """Operations under way and lately ended."""
        return [OperationReply.of(operation) for operation in self._deployments.operations()]

    def operation(self, operation_id: str) -> OperationReply:
        """How an operation stands. Raises: NotFound."""
        return OperationReply.of(self._deployments.operation(operation_id))

    def abort(self, operation_id: str, *, reason: str | None = None) -> OperationReply:
        """End a rollout before its commit."""
        return OperationReply.of(self._deployments.abort(operation_id, reason=reason, actor=ACTOR))

    def audit(self, *, limit: int = 100) -> list[AuditLine]:
        """Who changed what, when and why."""
        return [AuditLine.of(line) for line in self._registry.audit(limit=limit)]

    def replicas(self) -> ReplicasReply:
        """The servers of the registry."""
        return ReplicasReply(
            generation=self._registry.revision().generation,
            replicas=[ReplicaReply.of(r, is_alive=r.age_s < EXPIRY_S) for r in self._registry.replicas()],
        )

    def wait(self, operation_id: str, *, timeout_s: float = 3600.0, report: Report | None = None) -> OperationReply:
        """Wait until an operation ended; do its work here where no server lives. Raises: TimeoutError."""
        operation = self.operation(operation_id)
        end = time.monotonic() + timeout_s
        while operation.status == "running":
            if not self._deployments.living():  # none was there, or the last one died
                return asyncio.run(self._work(operation_id, end - time.monotonic(), report))
            if time.monotonic() > end:
                raise TimeoutError(f"operation {operation_id} still runs after {timeout_s:g} s")
            time.sleep(POLL_S)
            operation = self.operation(operation_id)
            if report is not None:
                report(operation)
        return operation

    async def _work(self, operation_id: str, timeout_s: float, report: Report | None) -> OperationReply:
        """Be a replica until an operation ended."""
        runtime = await asyncio.to_thread(Runtime, self._settings)
        try:
            await runtime.start()
            end = time.monotonic() + timeout_s
            while True:
                operation = await asyncio.to_thread(self.operation, operation_id)
                if report is not None:
                    report(operation)
                if operation.status != "running":
                    return operation
                if time.monotonic() > end:
                    raise TimeoutError(f"operation {operation_id} still runs after {timeout_s:g} s")
                await asyncio.sleep(POLL_S)
        finally:
            await runtime.close()
