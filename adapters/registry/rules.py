"""How a registry may change: every rule as a function of the state before, whatever stores it.

A rule reads `draft.before`, refuses with a typed error, or notes what to write and what to log. A registry takes the
draft whole or, when the state moved on meanwhile, asks the rule again.
"""

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, replace
from enum import Enum
from typing import Literal

from adapters.config import BASE_ADAPTER, check_name
from adapters.errors import AdapterNotFound, Conflict, InvalidReference, NotFound
from adapters.registry.records import (
    GALLERY_TRANSITIONS,
    TRANSITIONS,
    AliasRecord,
    AuditRecord,
    Canary,
    GalleryHead,
    GalleryMove,
    GalleryRecord,
    GalleryStatus,
    JobAction,
    JobPhase,
    JobRecord,
    LeaseRecord,
    PackageInfo,
    Record,
    RolloutRecord,
    Snapshot,
    Status,
    VersionRecord,
    nearest,
    shortened,
)
from adapters.registry.references import DEFAULT_ALIAS, check_alias, check_digest
from adapters.registry.store import Write

MAX_HISTORY = 32  # versions an alias remembers to have named


class Unset(Enum):
    """The type of UNSET."""

    UNSET = "unset"


UNSET = Unset.UNSET
Expect = int | None | Literal[Unset.UNSET]  # a version; None: nothing may be there yet; UNSET: whatever is there


class Draft:
    """A change in the making, on one snapshot."""

    def __init__(self, before: Snapshot, now: float, actor: str) -> None:
        self.before = before
        self.now = now
        self.actor = actor
        self.writes: list[Write] = []
        self.log: list[AuditRecord] = []

    def put(self, record: Record) -> None:
        """Write a record, unless it is there as it is."""
        if self.before.records.get((record.kind, record.key)) != record:
            self.writes.append(Write(record.kind, record.key, json.dumps(asdict(record), sort_keys=True)))

    def drop(self, record: Record) -> None:
        """Take a record away."""
        self.writes.append(Write(record.kind, record.key, None))

    def note(
        self, action: str, subject: str, before: str | int | None, after: str | int | None, reason: str | None = None
    ) -> None:
        """Add a line to the audit log."""
        old, new = (None if value is None else str(value) for value in (before, after))
        generation = self.before.generation + 1
        self.log.append(AuditRecord(generation, self.now, self.actor, action, subject, old, new, reason))


# --- versions ----------------------------------------------------------------------------------------------


def add_version(draft: Draft, name: str, package: PackageInfo, status: Literal["staged", "ready"]) -> VersionRecord:
    """Number a package. One the name already holds keeps its number, and is staged again when it had failed."""
    check_name(name)
    check_digest(package.package_digest, param="package_digest")
    check_digest(package.weights_digest, param="weights_digest")
    known = _known_version(draft.before, name, package.package_digest)
    if known is not None:
        return known if known.status != "failed" else set_status(draft, name, known.version, "staged", None)
    number = _next_number(record.version for record in draft.before.versions if record.name == name)
    record = VersionRecord(
        name, number, **asdict(package), status=status, reason=None, created_at=draft.now, updated_at=draft.now
    )
    draft.put(record)
    draft.note("add_version", record.key, None, f"{status} {package.package_digest}")
    return record


def set_status(draft: Draft, name: str, version: int, status: Status, reason: str | None) -> VersionRecord:
    """Move a version on."""
    record = draft.before.version(name, version)
    if status not in TRANSITIONS[record.status]:
        raise Conflict(f"{record.reference} is {record.status} and cannot become {status}", param="status")
    _check_unused(draft.before, record, status)
    after = replace(record, status=status, reason=reason, validator=None, updated_at=draft.now)
    draft.put(after)
    draft.note("set_status", record.key, record.status, status, reason)
    return after


def claim_validation(
    draft: Draft, name: str, version: int, replica: str, alive: Collection[str]
) -> VersionRecord | None:
    """Begin to look at a staged version, or at one whose validator died. None when there is nothing to do."""
    record = draft.before.version(name, version)
    is_orphan = record.status == "validating" and record.validator not in alive
    if record.status != "staged" and not is_orphan:
        return None
    after = replace(record, status="validating", reason=None, validator=replica, updated_at=draft.now)
    draft.put(after)
    draft.note("validate", record.key, record.status, "validating", f"by {replica}")
    return after


def finish_validation(draft: Draft, name: str, version: int, replica: str, error: str | None) -> VersionRecord:
    """Say what became of it. The first version of a name that is ready becomes `prod`. Conflict: it is somebody else's now."""
    record = draft.before.version(name, version)
    if record.status != "validating" or record.validator != replica:
        raise Conflict(f"{record.reference} is {record.status}, and not for {replica} to decide", param="version")
    status: Status = "ready" if error is None else "failed"
    after = replace(record, status=status, reason=error, validator=None, updated_at=draft.now)
    draft.put(after)
    draft.note("validated", record.key, record.status, status, error)
    if error is None and not draft.before.aliases_of(name):
        draft.put(AliasRecord(name, DEFAULT_ALIAS, version, draft.now))
        draft.note("set_alias", f"{name}@{DEFAULT_ALIAS}", None, version, "the first version that is ready")
    return after


def _check_unused(before: Snapshot, record: VersionRecord, status: str) -> None:
    """Refuse to take a version away that is served or about to be."""
    aliases = before.aliases_serving(record.name, record.version)
    if aliases:
        raise Conflict(
            f"{record.reference} cannot become {status} while {shortened(list(aliases))} names it; move the alias first",
            param="status",
        )
    galleries = [g.key for g in _searched(before) if g.adapter == record.weights_digest]
    if galleries and before.with_digest(record.weights_digest) == (record,):
        raise Conflict(
            f"{record.reference} cannot become {status} while {shortened(galleries)} is searched with it; rebuild or "
            "delete that first",
            param="status",
        )
    for rollout in before.active_rollouts:
        if rollout.name == record.name and rollout.to_version == record.version:
            raise Conflict(
                f"{record.reference} cannot become {status} while operation {rollout.id} rolls it out", param="status"
            )


def _searched(before: Snapshot) -> list[GalleryRecord]:
    """The gallery versions that requests search."""
    numbers = [(head.name, number) for head in before.heads for number in (head.live, head.canary)]
    return [before.gallery(name, number) for name, number in numbers if number is not None]


def _known_version(before: Snapshot, name: str, package_digest: str) -> VersionRecord | None:
    """The version under which a name already holds this package, unless that one was deleted."""
    records = before.adapters.get(name, ())
    return next((record for record in records if record.package_digest == package_digest), None)


def _next_number(numbers: Iterable[int]) -> int:
    """The number after all there ever were."""
    return max(numbers, default=0) + 1


# --- aliases -----------------------------------------------------------------------------------------------


def set_alias(
    draft: Draft, name: str, alias: str, version: int | None, expect: Expect, reason: str | None
) -> AliasRecord | None:
    """Let an alias name a ready version at once, or with None take it away. Galleries stay as they are."""
    before = check_alias_step(draft.before, name, alias, version, expect)
    if (before.version if before else None) == version and (before is None or before.canary is None):
        return before
    _check_no_rollout(draft.before, name, alias)
    draft.note("set_alias", f"{name}@{alias}", before.version if before else None, version, reason)
    if version is None:
        assert before is not None, "an alias that is not there was taken away. This is a bug."
        draft.drop(before)
        for head in draft.before.followers(name, alias):
            draft.put(replace(head, follows=None, canary=None, updated_at=draft.now))
        return None
    after = moved_alias(before, name, alias, version, draft.now)
    draft.put(after)
    return after


def check_alias_step(
    before: Snapshot, name: str, alias: str, version: int | None, expect: Expect
) -> AliasRecord | None:
    """The alias as it is, when it may name `version` instead. Raises: InvalidReference, AdapterNotFound, Conflict."""
    check_name(name)
    check_alias(alias)
    if name not in before.adapters:
        raise AdapterNotFound(f"no adapter {name!r}; {nearest(name, before.adapters)}", param="name")
    record = before.alias(name, alias)
    number = record.version if record else None
    if expect is not UNSET and expect != number:
        raise Conflict(f"{name}@{alias} names {_number(number)}, not {_number(expect)} as expected", param="expect")
    if version is not None:
        wanted = before.version(name, version)
        if wanted.status != "ready":
            raise Conflict(
                f"{wanted.reference} is {wanted.status}; only a ready version can be served", param="version"
            )
    return record


def moved_alias(before: AliasRecord | None, name: str, alias: str, version: int, now: float) -> AliasRecord:
    """The alias after it moved to `version`, remembering where it was."""
    if before is None:
        return AliasRecord(name, alias, version, now)
    history = before.history if before.version == version else (*before.history, before.version)
    return AliasRecord(name, alias, version, now, history[-MAX_HISTORY:])


def _check_no_rollout(before: Snapshot, name: str, alias: str) -> None:
    for rollout in before.active_rollouts:
        if (rollout.name, rollout.alias) == (name, alias):
            raise Conflict(
                f"{name}@{alias} is on its way to version {rollout.to_version} (operation {rollout.id}, "
                f"{rollout.phase}); abort that first",
                param="alias",
            )


# --- galleries ---------------------------------------------------------------------------------------------


def add_gallery_version(
    draft: Draft,
    name: str,
    *,
    embedding_key: str,
    adapter: str,
    adapter_name: str | None,
    adapter_version: int | None,
    content: int | None,
    status: Literal["building", "ready"],
) -> GalleryRecord:
    """Number a new version of a gallery: of a known content, or with None of a new one."""
    check_name(name)
    if not embedding_key:
        raise InvalidReference("a gallery version needs an embedding key", param="embedding_key")
    if adapter != BASE_ADAPTER:
        check_digest(adapter, param="adapter")
    if adapter_name is not None:
        check_name(adapter_name, param="adapter_name")
    known = [record for record in draft.before.galleries if record.name == name]
    record = GalleryRecord(
        name,
        _next_number(record.version for record in known),
        _next_number(record.content for record in known) if content is None else content,
        embedding_key,
        adapter,
        adapter_name,
        adapter_version,
        status,
        None,
        draft.now,
        draft.now,
    )
    draft.put(record)
    draft.note("add_gallery_version", record.key, None, f"{status} {adapter}")
    return record


def set_gallery_status(
    draft: Draft, name: str, version: int, status: GalleryStatus, reason: str | None, tree: str | None = None
) -> GalleryRecord:
    """Move a gallery version on; `tree` is where its folder was put, if it was."""
    if tree is not None:
        check_digest(tree, param="tree")
    record = draft.before.gallery(name, version)
    if status not in GALLERY_TRANSITIONS[record.status]:
        raise Conflict(f"gallery {name}@{version} is {record.status} and cannot become {status}", param="status")
    head = draft.before.head(name)
    if head is not None and version in (head.live, head.canary):
        raise Conflict(f"gallery {name}@{version} cannot become {status} while it is live", param="status")
    for rollout in draft.before.active_rollouts:
        if any((move.gallery, move.to_version) == (name, version) for move in rollout.moves):
            raise Conflict(
                f"gallery {name}@{version} cannot become {status} while operation {rollout.id} rolls it out",
                param="status",
            )
    for job in draft.before.active_jobs:
        if (job.gallery, job.version) == (name, version):
            raise Conflict(
                f"gallery {name}@{version} cannot become {status} while operation {job.id} makes it live",
                param="status",
            )
    after = replace(record, status=status, reason=reason, updated_at=draft.now, tree=tree or record.tree)
    draft.put(after)
    draft.note("set_gallery_status", record.key, record.status, status, reason)
    return after


def set_live_gallery(
    draft: Draft, name: str, version: int | None, expect: Expect, follows: str | Unset | None, reason: str | None
) -> GalleryRecord | None:
    """Make a ready version the one that is searched, or with None make none. UNSET `follows`: as before."""
    check_name(name)
    before = draft.before
    record = before.gallery(name, version) if version is not None else None
    if name not in before.gallery_versions:
        raise NotFound(f"no gallery {name!r}; {nearest(name, before.gallery_versions)}", param="name")
    head = before.head(name)
    live = head.live if head else None
    if expect is not UNSET and expect != live:
        raise Conflict(f"the live {name!r} is {_number(live)}, not {_number(expect)} as expected", param="expect")
    if record is not None and record.status != "ready":
        raise Conflict(
            f"gallery {name}@{version} is {record.status}; only a ready version can be live", param="version"
        )
    followed = (head.follows if head else None) if isinstance(follows, Unset) else follows
    check_still(before, name)
    if live == version and followed == (head.follows if head else None):
        return record
    draft.put(GalleryHead(name, version, draft.now, followed, _canary_of(before, record, followed)))
    _touch_gallery(draft, name, live)
    draft.note("set_live_gallery", name, live, version, reason)
    return record


def _canary_of(before: Snapshot, live: GalleryRecord | None, follows: str | None) -> int | None:
    """The version with the same content that requests of a canary search: embedded with the canary of the alias."""
    alias = before.records.get(("alias", follows or ""))
    if live is None or not isinstance(alias, AliasRecord) or alias.canary is None:
        return None
    there = twin(before, live, before.version(alias.name, alias.canary.version).weights_digest)
    return None if there is None else there.version


def delete_gallery(draft: Draft, name: str, expect: Expect, reason: str | None) -> tuple[GalleryRecord, ...]:
    """Give a gallery up, every version of it, the live one too. Raises: NotFound, Conflict while something works on it."""
    before = draft.before
    records = before.gallery_versions.get(check_name(name, param="gallery"), ())
    if not records:
        raise NotFound(f"no gallery {name!r}; {nearest(name, before.gallery_versions)}", param="gallery")
    head = before.head(name)
    live = head.live if head else None
    if expect is not UNSET and expect != live:
        raise Conflict(f"the live {name!r} is {_number(live)}, not {_number(expect)} as expected", param="expect")
    check_still(before, name)
    check_no_job(before, name)
    if head is not None:
        draft.drop(head)
    deleted = tuple(replace(record, status="deleted", reason=reason, updated_at=draft.now) for record in records)
    for record in deleted:
        draft.put(record)
    draft.note("delete_gallery", name, live, None, reason)
    return deleted


def _touch_gallery(draft: Draft, name: str, version: int | None) -> None:
    """Note when a version stopped being live: from then on counts how long it is kept."""
    record = draft.before.records.get(("gallery", f"{name}@{version}"))
    if isinstance(record, GalleryRecord):
        draft.put(replace(record, updated_at=draft.now))


def check_still(before: Snapshot, name: str) -> None:
    """Refuse to change a gallery that a rollout is about to move. Raises: Conflict naming the operation."""
    for rollout in before.active_rollouts:
        if any(move.gallery == name for move in rollout.moves):
            raise Conflict(
                f"gallery {name!r} is being embedded anew for {rollout.name}@{rollout.alias} (operation {rollout.id}); "
                "wait for it, or abort it",
                param="gallery",
            )


def check_no_job(before: Snapshot, name: str) -> None:
    """Refuse what must not happen while a gallery is built. Raises: Conflict naming the operation."""
    for job in before.active_jobs:
        if job.gallery == name:
            raise Conflict(
                f"a {job.action} of gallery {name!r} is under way (operation {job.id}); wait for it, or abort it",
                param="gallery",
            )


# --- jobs --------------------------------------------------------------------------------------------------


def start_job(
    draft: Draft, job_id: str, action: JobAction, gallery: str, *, adapter: str, arguments: str, join: bool
) -> JobRecord:
    """Let a gallery be built, or its live content be embedded anew. The same id again gives the same job.

    With `join`, so does the same work that is under way by another id: whoever was interrupted goes on with it.
    Raises: NotFound for a rebuild of what is not live, Conflict while a rollout or another job works on the gallery.
    """
    check_name(gallery, param="gallery")
    known = draft.before.job(job_id)
    if known is not None:
        if (known.action, known.gallery, known.arguments) != (action, gallery, arguments):
            raise Conflict(
                f"operation {job_id} is another one: a {known.action} of {known.gallery!r}", param="idempotency_key"
            )
        return known
    if draft.before.rollout(job_id) is not None:
        raise Conflict(f"operation {job_id} is another one: a rollout", param="idempotency_key")
    for job in draft.before.active_jobs if join else ():
        if (job.action, job.gallery, job.arguments) == (action, gallery, arguments):
            return job
    check_still(draft.before, gallery)
    check_no_job(draft.before, gallery)
    if action == "rebuild":
        draft.before.gallery(gallery)
    live = draft.before.live_version(gallery)
    job = JobRecord(job_id, action, gallery, adapter, arguments, live, "running", draft.actor, draft.now, draft.now)
    draft.put(job)
    draft.note(f"start_{action}", gallery, live, None, f"operation {job_id}, with {adapter}")
    return job


def claim_job(draft: Draft, job_id: str, replica: str, alive: Collection[str]) -> JobRecord | None:
    """Become the one that does a job, unless somebody alive is. None when there is nothing to do."""
    job = draft.before.job(job_id)
    if job is None or not job.is_active or job.worker in alive:
        return None
    after = replace(job, worker=replica, token=job.token + 1, updated_at=draft.now)
    draft.put(after)
    return after


def keep_job(draft: Draft, job_id: str, token: int, version: int) -> JobRecord:
    """The version is made, though not live: whoever takes over need not make it again. Raises: Conflict as `finish_job`."""
    after = replace(_running_job(draft.before, job_id, token), version=version, updated_at=draft.now)
    draft.put(after)
    return after


def finish_job(draft: Draft, job_id: str, token: int, version: int, follows: str | Unset | None) -> JobRecord:
    """Make what a job made live, and the job succeeded, in this one change.

    Raises: Conflict when the token is not the latest, the job is over, or another version went live meanwhile.
    """
    job = _running_job(draft.before, job_id, token)
    set_live_gallery(draft, job.gallery, version, job.from_version, follows, f"operation {job_id}")
    return _end_job(draft, replace(job, version=version), "succeeded", None)


def fail_job(draft: Draft, job_id: str, token: int, error: str) -> JobRecord:
    """Nothing came of a job. Raises: Conflict when the token is not the latest, or the job is over."""
    return _end_job(draft, _running_job(draft.before, job_id, token), "failed", error)


def abort_job(draft: Draft, job_id: str, error: str) -> JobRecord:
    """End a job before what it makes is live: nothing has changed. Once it is over it stays what it became."""
    job = draft.before.job(job_id)
    if job is None:
        raise NotFound(f"no operation {job_id!r}", param="operation")
    if job.phase == "succeeded":
        raise Conflict(f"operation {job_id} has succeeded: gallery {job.gallery}@{job.version}", param="operation")
    return job if job.phase == "failed" else _end_job(draft, job, "failed", error)


def _running_job(before: Snapshot, job_id: str, token: int) -> JobRecord:
    job = before.job(job_id)
    if job is None or not job.is_active or job.token != token:
        raise Conflict(f"operation {job_id} is over, or another replica does it", param="operation")
    return job


def _end_job(draft: Draft, job: JobRecord, phase: JobPhase, error: str | None) -> JobRecord:
    after = replace(job, phase=phase, error=error, updated_at=draft.now)
    draft.put(after)
    draft.note(f"{job.action}_{phase}", job.gallery, job.from_version, after.version, error or f"operation {job.id}")
    return after


# --- rollouts ----------------------------------------------------------------------------------------------


def start_rollout(
    draft: Draft,
    rollout_id: str,
    name: str,
    alias: str,
    version: int,
    *,
    expect: Expect,
    traffic: float | None,
    migrate: bool,
    force: bool,
    replicas: Collection[str],
    deadline: float,
    reason: str | None,
) -> RolloutRecord:
    """Set an alias on its way to a version: galleries that follow it first, then the replicas, then the alias.

    With `force`, or when nobody needs to prepare, it is committed at once. The same id again gives the same rollout.
    Raises: Conflict when `expect` is not what is there, another rollout is under way, or a gallery cannot follow at once.
    """
    known = draft.before.rollout(rollout_id)
    if known is not None:
        asked = (name, alias, version, traffic, False)
        if (known.name, known.alias, known.to_version, known.traffic, known.is_rollback) != asked:
            raise Conflict(
                f"operation {rollout_id} is another one: {known.name}@{known.alias}", param="idempotency_key"
            )
        return known
    if traffic is not None and not 0 < traffic < 1:
        raise InvalidReference(f"traffic must lie between 0 and 1, not {traffic}", param="traffic")
    before = check_alias_step(draft.before, name, alias, version, expect)
    _check_no_rollout(draft.before, name, alias)
    if traffic is not None and before is None:
        raise Conflict(
            f"{name}@{alias} names no version yet: there is nothing a canary could be compared with", param="traffic"
        )
    if traffic is not None and before is not None and before.version == version:
        raise Conflict(f"{name}@{alias} names version {version} already", param="version")
    moves, pinned = _gallery_moves(draft.before, name, alias, version, migrate=migrate)
    for gallery in (*(move.gallery for move in moves), *pinned):
        check_no_job(draft.before, gallery)
    if force and any(move.to_version is None for move in moves):
        names = shortened([move.gallery for move in moves if move.to_version is None])
        raise Conflict(f"{names} must be embedded anew first; without that, say so (migrate: false)", param="force")
    rollout = RolloutRecord(
        rollout_id,
        name,
        alias,
        before.version if before else None,
        version,
        traffic,
        "migrating" if any(move.to_version is None for move in moves) else "preparing",
        draft.actor,
        reason,
        draft.now,
        draft.now,
        deadline,
        moves,
        pinned,
        tuple(sorted(replicas)),
    )
    draft.note("start_rollout", f"{name}@{alias}", rollout.from_version, version, reason)
    if force or (rollout.phase == "preparing" and not rollout.required):
        return _commit(draft, rollout)
    draft.put(rollout)
    return rollout


def _gallery_moves(
    before: Snapshot, name: str, alias: str, version: int, *, migrate: bool
) -> tuple[tuple[GalleryMove, ...], tuple[str, ...]]:
    """What following galleries have to do: (moves, names that stay behind instead)."""
    target = before.version(name, version)
    moves: list[GalleryMove] = []
    pinned: list[str] = []
    for head in before.followers(name, alias):
        if head.live is None:
            continue
        live = before.gallery(head.name, head.live)
        if live.adapter == target.weights_digest:
            moves.append(GalleryMove(head.name, head.live, head.live))
        elif migrate:
            there = twin(before, live, target.weights_digest)
            moves.append(GalleryMove(head.name, head.live, there.version if there else None))
        else:
            pinned.append(head.name)
    return tuple(moves), tuple(pinned)


def twin(before: Snapshot, gallery: GalleryRecord, weights_digest: str) -> GalleryRecord | None:
    """The ready version of the same content embedded with other weights, the newest of them."""
    twins = [
        record
        for record in before.gallery_versions.get(gallery.name, ())
        if record.content == gallery.content and record.adapter == weights_digest and record.status == "ready"
    ]
    return twins[-1] if twins else None


def claim_migration(draft: Draft, rollout_id: str, replica: str, alive: Collection[str]) -> RolloutRecord | None:
    """Become the one that embeds a rollout's galleries, unless somebody alive is. None when there is nothing to do."""
    rollout = draft.before.rollout(rollout_id)
    if rollout is None or rollout.phase != "migrating" or rollout.migrator in alive:
        return None
    after = replace(rollout, migrator=replica, token=rollout.token + 1, updated_at=draft.now)
    draft.put(after)
    return after


def finish_migration(draft: Draft, rollout_id: str, token: int, gallery: str, version: int) -> RolloutRecord:
    """A gallery is embedded anew. Raises: Conflict when the token is not the latest, or the rollout is over."""
    rollout = _migrating(draft.before, rollout_id, token)
    record = draft.before.gallery(gallery, version)
    if record.status != "ready":
        raise Conflict(f"gallery {record.key} is {record.status}; only a ready version can be live", param="version")
    moves = tuple(replace(move, to_version=version) if move.gallery == gallery else move for move in rollout.moves)
    is_through = all(move.to_version is not None for move in moves)
    after = replace(
        rollout, moves=moves, phase="preparing" if is_through else "migrating", ready=(), updated_at=draft.now
    )
    draft.put(after)
    draft.note("migrated", f"{rollout.name}@{rollout.alias}", None, record.key, f"operation {rollout.id}")
    return after


def _migrating(before: Snapshot, rollout_id: str, token: int) -> RolloutRecord:
    rollout = before.rollout(rollout_id)
    if rollout is None or rollout.phase != "migrating" or rollout.token != token:
        raise Conflict(f"operation {rollout_id} is over, or another replica migrates its galleries", param="operation")
    return rollout


def acknowledge(draft: Draft, rollout_id: str, replica: str) -> RolloutRecord | None:
    """A replica holds everything a rollout needs. None when that is of no use any more."""
    rollout = draft.before.rollout(rollout_id)
    if rollout is None or rollout.phase != "preparing" or replica in rollout.ready:
        return None
    after = replace(rollout, ready=tuple(sorted({*rollout.ready, replica})), updated_at=draft.now)
    draft.put(after)
    return after


def commit_rollout(draft: Draft, rollout_id: str, alive: Collection[str]) -> RolloutRecord | None:
    """Move alias and galleries, all in this one change, when every required replica that lives is ready. None: not yet."""
    rollout = draft.before.rollout(rollout_id)
    if rollout is None or rollout.phase != "preparing":
        return None
    if any(replica in alive and replica not in rollout.ready for replica in rollout.required):
        return None
    return _commit(draft, rollout)


def abort_rollout(draft: Draft, rollout_id: str, error: str, *, only_late: bool = False) -> RolloutRecord | None:
    """End a rollout before its commit: nothing has changed. Once it is over it stays what it became. None: not late yet."""
    rollout = draft.before.rollout(rollout_id)
    if rollout is None:
        raise NotFound(f"no operation {rollout_id!r}", param="operation")
    if rollout.phase == "committed":
        raise Conflict(f"operation {rollout_id} is committed; roll back instead", param="operation")
    if rollout.phase == "aborted":
        return rollout
    if only_late and draft.now < rollout.deadline:
        return None
    return _abort(draft, rollout, error)


def end_canary(draft: Draft, name: str, alias: str, expect: Expect, reason: str | None) -> AliasRecord:
    """Take a canary's share back; `expect` is the canary's version. Raises: Conflict when there is none."""
    record = draft.before.alias(name, alias)
    if record is None:
        check_alias_step(draft.before, name, alias, None, UNSET)
        raise AdapterNotFound(f"adapter {name!r} has no alias {alias!r}", param="alias")
    canary = record.canary
    if canary is None or (expect is not UNSET and expect != canary.version):
        there = "no canary" if canary is None else f"version {canary.version} as its canary"
        raise Conflict(f"{name}@{alias} has {there}", param="expect")
    _check_no_rollout(draft.before, name, alias)
    after = replace(record, canary=None, updated_at=draft.now)
    draft.put(after)
    for head in draft.before.followers(name, alias):
        draft.put(replace(head, canary=None, updated_at=draft.now))
    draft.note("end_canary", f"{name}@{alias}", canary.version, record.version, reason)
    return after


def roll_back(
    draft: Draft, rollout_id: str, name: str, alias: str, *, expect: Expect, reason: str | None
) -> RolloutRecord:
    """Move an alias back to the version before, and its galleries with it, at once.

    A canary ends with it, and so does a rollout under way. The same id again gives the same rollout.
    Raises: Conflict when `expect` is not what is there, or there is nothing before.
    """
    known = draft.before.rollout(rollout_id)
    if known is not None:
        if (known.name, known.alias, known.is_rollback) != (name, alias, True):
            raise Conflict(
                f"operation {rollout_id} is another one: {known.name}@{known.alias}", param="idempotency_key"
            )
        return known
    before = check_alias_step(draft.before, name, alias, None, expect)
    if before is None:
        raise AdapterNotFound(f"adapter {name!r} has no alias {alias!r}", param="alias")
    target = _rollback_target(draft.before, before)
    for rollout in draft.before.active_rollouts:
        if (rollout.name, rollout.alias) == (name, alias):
            _abort(draft, rollout, f"{name}@{alias} was rolled back")
    moves, pinned = _gallery_moves(draft.before, name, alias, target, migrate=True)
    behind = tuple(move.gallery for move in moves if move.to_version is None)
    rollout = RolloutRecord(
        rollout_id,
        name,
        alias,
        before.version,
        target,
        None,
        "committed",
        draft.actor,
        reason,
        draft.now,
        draft.now,
        draft.now,
        tuple(move for move in moves if move.to_version is not None),
        (*pinned, *behind),
        is_rollback=True,
    )
    history = before.history[: _last_index(before.history, target)]
    draft.put(AliasRecord(name, alias, target, draft.now, history))
    _move_galleries(draft, rollout)
    draft.put(rollout)
    draft.note("roll_back", f"{name}@{alias}", before.version, target, reason)
    return rollout


def _rollback_target(before: Snapshot, alias: AliasRecord) -> int:
    """The latest version the alias named before that can still be served."""
    for version in reversed(alias.history):
        record = before.records.get(("version", f"{alias.name}@{version}"))
        if version != alias.version and isinstance(record, VersionRecord) and record.status == "ready":
            return version
    raise Conflict(
        f"{alias.key} names version {alias.version} and no earlier one that is still ready; promote one instead",
        param="alias",
    )


def _last_index(history: Sequence[int], version: int) -> int:
    return len(history) - 1 - list(reversed(history)).index(version)


def _commit(draft: Draft, rollout: RolloutRecord) -> RolloutRecord:
    before = draft.before.alias(rollout.name, rollout.alias)
    if rollout.traffic is None:
        draft.put(moved_alias(before, rollout.name, rollout.alias, rollout.to_version, draft.now))
    else:
        assert before is not None, "a canary without an alias. This is a bug."
        draft.put(replace(before, canary=Canary(rollout.to_version, rollout.traffic), updated_at=draft.now))
    _move_galleries(draft, rollout)
    after = replace(rollout, phase="committed", updated_at=draft.now)
    draft.put(after)
    share = "" if rollout.traffic is None else f" for {100 * rollout.traffic:g} % of the traffic"
    subject = f"{rollout.name}@{rollout.alias}"
    draft.note("set_alias", subject, rollout.from_version, f"{rollout.to_version}{share}", rollout.reason)
    return after


def _move_galleries(draft: Draft, rollout: RolloutRecord) -> None:
    for move in rollout.moves:
        head = draft.before.head(move.gallery)
        assert head is not None and move.to_version is not None, "a gallery moves nowhere. This is a bug."
        if rollout.traffic is None:
            draft.put(replace(head, live=move.to_version, canary=None, updated_at=draft.now))
            if head.live != move.to_version:
                _touch_gallery(draft, head.name, head.live)
                draft.note("set_live_gallery", head.name, head.live, move.to_version, f"operation {rollout.id}")
        else:
            draft.put(replace(head, canary=move.to_version, updated_at=draft.now))
    for name in rollout.pinned:
        head = draft.before.head(name)
        if head is not None and head.follows is not None:
            draft.put(replace(head, follows=None, canary=None, updated_at=draft.now))
            draft.note("pin_gallery", name, head.follows, None, f"operation {rollout.id}")


def _abort(draft: Draft, rollout: RolloutRecord, error: str) -> RolloutRecord:
    after = replace(rollout, phase="aborted", error=error, updated_at=draft.now)
    draft.put(after)
    draft.note("abort_rollout", f"{rollout.name}@{rollout.alias}", rollout.to_version, rollout.from_version, error)
    return after


# --- duties ------------------------------------------------------------------------------------------------


def take_lease(draft: Draft, duty: str, replica: str, alive: Collection[str]) -> LeaseRecord | None:
    """Have a duty, unless somebody else who lives has it (None)."""
    known = draft.before.lease(duty)
    if known is not None and known.holder == replica:
        return known
    if known is not None and known.holder in alive:
        return None
    lease = LeaseRecord(duty, replica, known.token + 1 if known else 1, draft.now)
    draft.put(lease)
    return lease


def drop_operations(draft: Draft, older_than: float) -> int:
    """Forget rollouts and jobs that ended before a time; how many."""
    known: tuple[RolloutRecord | JobRecord, ...] = (*draft.before.rollouts, *draft.before.jobs)
    old = [record for record in known if not record.is_active and record.updated_at < older_than]
    for record in old:
        draft.drop(record)
    return len(old)


def _number(version: int | None) -> str:
    return "no version" if version is None else f"version {version}"
