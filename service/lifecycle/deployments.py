"""What operators do to adapters and galleries: push, promote, roll back, retire, build, delete; and what has become of it.

Works on a registry and an artifact store alone, so the command line does the same to a home without a server as the
HTTP routes do on a running one. Any thread. Long work is an operation: its record is in the registry, its steps are
taken by whichever replicas live, and its id tells of it from any of them.
"""

import hashlib
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adapters.artifacts import ArtifactStore
from adapters.config import BASE_ADAPTER, check_name
from adapters.errors import AdapterNotFound, Conflict, NotFound
from adapters.package import read_package
from adapters.registry import (
    DEFAULT_ALIAS,
    UNSET,
    AliasRecord,
    BaseReference,
    DigestReference,
    Expect,
    GalleryRecord,
    JobRecord,
    PackageInfo,
    Registry,
    Replica,
    RolloutRecord,
    Snapshot,
    VersionRecord,
    parse_reference,
)
from adapters.registry.records import JobAction, nearest
from service.auth import LOCAL, Principal
from service.errors import BadQuery, Forbidden, GalleryNotFound
from service.lifecycle.jobs import JobArguments, embedder_of
from service.lifecycle.lifecycle import EXPIRY_S
from service.pipelines.galleries import forbidden_gallery
from service.views import visible

VALIDATION_PREFIX = "validation-"
DEFAULT_TIMEOUT_S = 600.0

OperationKind = Literal["validation", "rollout", "canary", "rollback", "gallery"]
OperationStatus = Literal["running", "succeeded", "failed"]


@dataclass(frozen=True)
class Operation:
    """Long work, as it stands. `subject` is name@alias, name@version or a gallery; times are seconds since 1970.

    adapter       the name of the adapter it is about
    to_version    None for a gallery whose version is not there yet
    waiting_for   living replicas that are not ready yet
    laggards      living replicas that do not serve the outcome yet
    progress      (done, total) items of the gallery that is being embedded
    """

    id: str
    kind: OperationKind
    adapter: str
    subject: str
    status: OperationStatus
    phase: str
    actor: str
    reason: str | None
    error: str | None
    from_version: int | None
    to_version: int | None
    traffic: float | None
    started_at: float
    updated_at: float
    deadline: float | None
    waiting_for: tuple[str, ...] = ()
    laggards: tuple[str, ...] = ()
    progress: tuple[int, int] | None = None
    galleries: tuple[str, ...] = ()
    pinned_galleries: tuple[str, ...] = ()

    @property
    def is_running(self) -> bool:
        """Whether it still goes on."""
        return self.status == "running"


class Deployments:
    """The verbs of an operator on one registry."""

    def __init__(self, registry: Registry, artifacts: ArtifactStore) -> None:
        self._registry = registry
        self._artifacts = artifacts

    # --- versions ----------------------------------------------------------------------------------------

    def push(self, package: Path, name: str, *, actor: str) -> VersionRecord:
        """Keep a package and stage it for validation. The same package again is the same version.

        Raises: InvalidPackage and its kinds, InvalidReference, ArtifactUnavailable, RegistryUnavailable.
        """
        check_name(name)
        info = PackageInfo.of(read_package(package))
        digest = self._artifacts.put(package)
        if digest != info.package_digest:
            raise Conflict("the package changed while it was read", param="package")
        record = self._registry.add_version(name, info, status="staged", actor=actor)
        if not self._artifacts.has(digest):  # swept as nobody's between the two
            self._artifacts.put(package)
        return record

    def retire(self, name: str, version: int, *, reason: str | None = None, actor: str) -> VersionRecord:
        """Take a version out of service; it may come back. Raises: AdapterNotFound, Conflict while an alias names it."""
        record = self._registry.snapshot().version(name, version)
        if record.status == "retired":
            return record
        return self._registry.set_status(name, version, "retired", reason=reason, actor=actor)

    def reinstate(self, name: str, version: int, *, reason: str | None = None, actor: str) -> VersionRecord:
        """Bring a retired version back. Raises: AdapterNotFound, Conflict."""
        record = self._registry.snapshot().version(name, version)
        if record.status == "ready":
            return record
        return self._registry.set_status(name, version, "ready", reason=reason, actor=actor)

    def delete(self, name: str, version: int, *, reason: str | None = None, actor: str) -> VersionRecord:
        """Give a version up for good; its files go after a day. Raises: AdapterNotFound, Conflict while an alias names it."""
        record = self._registry.snapshot().version(name, version)
        if record.status == "deleted":
            return record
        return self._registry.set_status(name, version, "deleted", reason=reason, actor=actor)

    # --- aliases -----------------------------------------------------------------------------------------

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
        timeout_s: float = DEFAULT_TIMEOUT_S,
        reason: str | None = None,
        actor: str,
        key: str | None = None,
    ) -> Operation:
        """Let an alias serve a version: all of its traffic, or a share as a canary.

        `key` names the request: asked again with it, the same operation is answered. Raises: as `Registry.start_rollout`.
        """
        rollout = self._registry.start_rollout(
            name,
            alias,
            version,
            rollout_id=operation_id(actor, key),
            expect=expect,
            traffic=traffic,
            migrate=migrate,
            force=force,
            replicas=[replica.id for replica in self.living() if replica.is_serving],
            timeout_s=timeout_s,
            reason=reason,
            actor=actor,
        )
        return self._of_rollout(rollout)

    def roll_back(
        self,
        name: str,
        *,
        alias: str = DEFAULT_ALIAS,
        expect: Expect = UNSET,
        reason: str | None = None,
        actor: str,
        key: str | None = None,
    ) -> Operation:
        """Leave the version an alias names for the one before, at once. Raises: as `Registry.roll_back`."""
        rollout = self._registry.roll_back(
            name, alias, rollout_id=operation_id(actor, key), expect=expect, reason=reason, actor=actor
        )
        return self._of_rollout(rollout)

    def end_canary(
        self, name: str, *, alias: str = DEFAULT_ALIAS, expect: Expect = UNSET, reason: str | None = None, actor: str
    ) -> AliasRecord:
        """Take a canary's share back. Raises: AdapterNotFound, Conflict when there is none."""
        return self._registry.end_canary(name, alias, expect=expect, reason=reason, actor=actor)

    # --- galleries ---------------------------------------------------------------------------------------

    def build_gallery(
        self, name: str, wanted: JobArguments, *, principal: Principal = LOCAL, actor: str, key: str | None = None
    ) -> Operation:
        """Let a gallery be built, by a server that lives; `wanted` says from what, and with which adapter.

        The same work that is under way already is joined, unless `key` names another request.
        Raises: Forbidden, AdapterNotFound, BadQuery for an adapter that does not retrieve, Conflict; UnsafePath and
        ConversionError for a source that may not be read, or is none.
        """
        assert wanted.adapter is not None and wanted.source is not None, "a build from nothing. This is a bug."
        snapshot = self._registry.snapshot()
        check_owner(snapshot, name, principal)
        adapter = embedder_name(snapshot, wanted.adapter, principal)
        return self._start_job("build", name, adapter, wanted.located(), principal, actor, key)

    def rebuild_gallery(
        self,
        name: str,
        adapter: str | None = None,
        *,
        principal: Principal = LOCAL,
        actor: str,
        key: str | None = None,
    ) -> Operation:
        """Let the live content of a gallery be embedded anew: with an adapter, by default the one it goes with.

        Raises: GalleryNotFound, Forbidden, AdapterNotFound, BadQuery for an adapter that does not retrieve, Conflict.
        """
        snapshot = self._registry.snapshot()
        check_owner(snapshot, name, principal)
        embedder = embedder_name(snapshot, adapter or self._embedder(snapshot, name, principal), principal)
        return self._start_job("rebuild", name, embedder, JobArguments(adapter=adapter), principal, actor, key)

    def _embedder(self, snapshot: Snapshot, name: str, principal: Principal) -> str:
        try:
            visible(snapshot, principal).gallery(name)  # whose message lists what may be seen
            return embedder_of(snapshot, name)
        except NotFound as error:
            raise GalleryNotFound(error.message, param="gallery") from error

    def _start_job(
        self,
        action: JobAction,
        name: str,
        adapter: str,
        wanted: JobArguments,
        principal: Principal,
        actor: str,
        key: str | None,
    ) -> Operation:
        arguments = wanted.model_copy(update={"principal": principal.id, "adapters": principal.adapters})
        job = self._registry.start_job(
            action,
            name,
            job_id=operation_id(actor, key),
            adapter=adapter,
            arguments=arguments.text(),
            join=key is None,
            actor=actor,
        )
        return self._of_job(job)

    def delete_gallery(
        self,
        name: str,
        *,
        expect: Expect = UNSET,
        reason: str | None = None,
        principal: Principal = LOCAL,
        actor: str,
    ) -> tuple[GalleryRecord, ...]:
        """Give a gallery up with all its versions; files go after a day. Searches under way finish.

        Raises: GalleryNotFound, Forbidden, Conflict while something works on it or when `expect` is not live.
        """
        snapshot = self._registry.snapshot()
        check_owner(snapshot, name, principal)
        known = visible(snapshot, principal).gallery_versions
        if name not in known:
            raise GalleryNotFound(f"no gallery {name!r}; {nearest(name, known)}", param="gallery")
        return self._registry.delete_gallery(name, expect=expect, reason=reason, actor=actor)

    def delete_gallery_version(
        self,
        name: str,
        version: int,
        *,
        reason: str | None = None,
        principal: Principal = LOCAL,
        actor: str,
    ) -> GalleryRecord:
        """Give one version up that is not live. Raises: GalleryNotFound, Forbidden, Conflict while it is searched."""
        snapshot = self._registry.snapshot()
        view = visible(snapshot, principal)
        if name in snapshot.gallery_versions and name not in view.gallery_versions:
            raise forbidden_gallery(name)
        try:
            view.gallery(name, version)
        except NotFound as error:
            if any(record.version == version for record in snapshot.gallery_versions.get(name, ())):
                raise forbidden_gallery(name) from None
            raise GalleryNotFound(error.message, param="version") from error
        return self._registry.set_gallery_status(name, version, "deleted", reason=reason, actor=actor)

    # --- operations --------------------------------------------------------------------------------------

    def operation(self, wanted: str) -> Operation:
        """How an operation stands. Raises: NotFound."""
        snapshot = self._registry.snapshot()
        if wanted.startswith(VALIDATION_PREFIX):
            name, _, version = wanted.removeprefix(VALIDATION_PREFIX).partition("@")
            if version.isdecimal():
                return self.of_version(snapshot.version(check_name(name), int(version)))
        rollout = snapshot.rollout(wanted)
        if rollout is not None:
            return self._of_rollout(rollout)
        job = snapshot.job(wanted)
        if job is None:
            raise NotFound(f"no operation {wanted[:64]!r}", param="operation")
        return self._of_job(job)

    def operations(self) -> list[Operation]:
        """Every operation that is remembered, the latest first."""
        snapshot = self._registry.snapshot()
        rollouts = [self._of_rollout(rollout) for rollout in snapshot.rollouts]
        jobs = [self._of_job(job) for job in snapshot.jobs]
        staged = [self.of_version(v) for v in snapshot.versions if v.status in ("staged", "validating")]
        return sorted([*rollouts, *jobs, *staged], key=lambda operation: operation.started_at, reverse=True)

    def abort(self, wanted: str, *, reason: str | None = None, actor: str) -> Operation:
        """End a rollout before its commit, or a job before its end. Raises: NotFound; Conflict once it has succeeded."""
        snapshot = self._registry.snapshot()
        if snapshot.rollout(wanted) is None and snapshot.job(wanted) is not None:
            return self._of_job(self._registry.abort_job(wanted, reason or f"aborted by {actor}", actor=actor))
        aborted = self._registry.abort_rollout(wanted, reason or f"aborted by {actor}", actor=actor)
        assert aborted is not None, "only what waits for its deadline stays. This is a bug."
        return self._of_rollout(aborted)

    def living(self) -> tuple[Replica, ...]:
        """The replicas heard of lately."""
        return tuple(replica for replica in self._registry.replicas() if replica.age_s < EXPIRY_S)

    def of_version(self, record: VersionRecord) -> Operation:
        """A version's validation as an operation."""
        states: dict[str, OperationStatus] = {"staged": "running", "validating": "running", "failed": "failed"}
        return Operation(
            f"{VALIDATION_PREFIX}{record.key}",
            "validation",
            record.name,
            record.key,
            states.get(record.status, "succeeded"),
            record.status,
            record.validator or "",
            None,
            record.reason if record.status == "failed" else None,
            None,
            record.version,
            None,
            record.created_at,
            record.updated_at,
            None,
        )

    def _of_rollout(self, rollout: RolloutRecord) -> Operation:
        status: OperationStatus = {"committed": "succeeded", "aborted": "failed"}.get(rollout.phase, "running")  # type: ignore[assignment]
        living = self.living()
        generation = self._registry.revision().generation
        waiting = {replica.id for replica in living} & set(rollout.required) - set(rollout.ready)
        behind = tuple(r.id for r in living if r.generation < generation) if rollout.phase == "committed" else ()
        return Operation(
            rollout.id,
            "rollback" if rollout.is_rollback else "canary" if rollout.traffic is not None else "rollout",
            rollout.name,
            f"{rollout.name}@{rollout.alias}",
            status,
            rollout.phase,
            rollout.actor,
            rollout.reason,
            rollout.error,
            rollout.from_version,
            rollout.to_version,
            rollout.traffic,
            rollout.started_at,
            rollout.updated_at,
            rollout.deadline,
            tuple(sorted(waiting)) if status == "running" else (),
            behind,
            _progress_of(rollout.id, living),
            tuple(move.gallery for move in rollout.moves),
            rollout.pinned,
        )

    def _of_job(self, job: JobRecord) -> Operation:
        living = self.living()
        generation = self._registry.revision().generation
        behind = tuple(r.id for r in living if r.generation < generation) if job.phase == "succeeded" else ()
        return Operation(
            job.id,
            "gallery",
            job.adapter,
            job.gallery,
            job.phase,
            "waiting" if job.is_active and job.worker is None else job.phase,
            job.actor,
            None,
            job.error,
            job.from_version,
            job.version,
            None,
            job.started_at,
            job.updated_at,
            None,
            laggards=behind,
            progress=_progress_of(job.id, living) if job.is_active else None,
            galleries=(job.gallery,),
        )


def check_owner(snapshot: Snapshot, gallery: str, principal: Principal) -> None:
    """Nobody touches a gallery of which a version belongs to an adapter they may not use. Raises: Forbidden."""
    records = snapshot.gallery_versions.get(check_name(gallery, param="gallery"), ())
    if len(visible(snapshot, principal).gallery_versions.get(gallery, ())) < len(records):
        raise forbidden_gallery(gallery)


def embedder_name(snapshot: Snapshot, reference: str, principal: Principal) -> str:
    """The name of the adapter that a gallery shall be embedded with.

    Raises: InvalidReference, Forbidden, AdapterNotFound, BadQuery for one that does not retrieve.
    """
    parsed = parse_reference(reference)
    if isinstance(parsed, BaseReference):
        principal.check_adapter(BASE_ADAPTER)
        return BASE_ADAPTER
    if not isinstance(parsed, DigestReference):
        principal.check_adapter(parsed.name)  # before looking: nobody learns whether others' names exist
    try:
        record = visible(snapshot, principal).resolve(parsed)
    except AdapterNotFound:
        if isinstance(parsed, DigestReference) and snapshot.with_digest(parsed.digest):
            message = f"this key may use none of the adapters with the digest {parsed.digest}"
            raise Forbidden(message, reason="pattern", param="adapter") from None
        raise
    if record.task != "retrieval":
        raise BadQuery(f"{record.reference} was made for {record.task}, not for retrieval", param="adapter")
    return record.name


def operation_id(actor: str, key: str | None) -> str:
    """The id of a new operation; of the same one again for the same actor and key."""
    if key is None:
        return uuid.uuid4().hex[:16]
    return hashlib.sha256(f"{actor}\0{key}".encode()).hexdigest()[:16]


def _progress_of(operation: str, replicas: Iterable[Replica]) -> tuple[int, int] | None:
    """What the replica that embeds for it last said."""
    for replica in replicas:
        progress = replica.details.get("progress")
        found = progress.get(operation) if isinstance(progress, dict) else None
        if isinstance(found, list) and len(found) == 2:
            return int(found[0]), int(found[1])
    return None
