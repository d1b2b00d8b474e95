"""The registry: names, versions, aliases, galleries and rollouts, the same over every store.

Reads give immutable snapshots, so one request sees one state. Every change is decided by a rule on the newest snapshot
and taken whole or not at all; when somebody else was quicker, the rule is asked again. A registry that is empty, older
than what was seen, or of another history is *lost*: reads and writes refuse until it is restored.
"""

import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import asdict
from json import dumps
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from adapters.errors import RegistryLost, RegistryUnavailable
from adapters.registry import rules
from adapters.registry.memory import Memory
from adapters.registry.records import (
    RECORD_TYPES,
    AliasRecord,
    AuditRecord,
    GalleryRecord,
    GalleryStatus,
    JobAction,
    JobRecord,
    LeaseRecord,
    PackageInfo,
    Record,
    Replica,
    Revision,
    RolloutRecord,
    Snapshot,
    Status,
    VersionRecord,
)
from adapters.registry.rules import UNSET, Draft, Expect, Unset
from adapters.registry.store import Changes, Contents, Store, Write

CONTENTION_S = 10.0  # how long a change tries to get in between others
ELDER_AGE_S = 10.0  # a replica heard of since then may know more

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Listener = Callable[[Snapshot, Snapshot, tuple[AuditRecord, ...]], None]

_READERS: dict[str, TypeAdapter[Any]] = {kind: TypeAdapter(record_type) for kind, record_type in RECORD_TYPES.items()}


def blank_revision() -> Revision:
    """The revision of a registry that begins now."""
    return Revision(uuid.uuid4().hex, 0, "")


class Registry:
    """Shared by threads; processes open one each. Every method may raise RegistryUnavailable; then nothing was changed.

    RegistryLost is the kind of it that a retry does not mend. `actor` and `reason` of the writing methods go into the
    audit log.
    """

    def __init__(self, store: Store, *, memory: Memory | None = None) -> None:
        """Open, and begin an empty registry where there is none and none is remembered."""
        self._store = store
        self._memory = memory
        self._lock = threading.Lock()
        self._snapshot: Snapshot | None = None
        self._lineage: tuple[str, ...] = ()
        self._log: list[AuditRecord] = []  # seen, and not remembered yet
        self._clock_offset_s = 0.0
        self._listeners: list[Listener] = []
        recalled = memory.recall() if memory is not None else None
        if recalled is not None:
            self._snapshot = _snapshot_of(recalled)
            self._lineage = recalled.lineage
        else:
            store.create(blank_revision())

    @property
    def is_shared(self) -> bool:
        """Whether its store is a server, which may come back empty; a file only vanishes by somebody's hand."""
        return self._store.is_shared

    def on_change(self, listener: Listener) -> None:
        """Tell of every change that is seen from now on: the state before and after, and the lines that the log grew by.

        Called once for each step from state to state, in the thread that looked; it must neither wait nor raise.
        """
        self._listeners.append(listener)

    # --- reading -----------------------------------------------------------------------------------------

    @property
    def known(self) -> Snapshot | None:
        """The last state seen, without asking the store; what was remembered, before the first look."""
        return self._snapshot

    def revision(self) -> Revision:
        """Where it stands: cheap enough to ask every second. Raises: RegistryLost for an empty store."""
        revision = self._store.revision()
        if revision is None:
            raise RegistryLost("the registry is gone: its store is empty")
        return revision

    def snapshot(self) -> Snapshot:
        """Everything, consistent; the same object again while nothing has changed. Raises: RegistryLost."""
        with self._lock:
            known = self._snapshot
            changes = self._store.changes(known.revision if known is not None else None)
            if changes is None:
                raise RegistryLost("the registry is gone: its store is empty")
            self._clock_offset_s = changes.now - time.time()
            if known is not None and changes.continues and changes.revision == known.revision:
                return known
            self._check_history(known, changes)
            keeps = known is not None and changes.continues
            records = dict(known.records) if known is not None and keeps else {}
            _apply(records, changes.writes)
            snapshot = self._snapshot = Snapshot.of(changes.revision, records.values())
            self._lineage = changes.lineage
            if self._memory is not None:
                self._log.extend(changes.log)
        if known is not None:
            lines = tuple(line for line in changes.log if line.generation > known.generation)
            for listener in self._listeners:
                listener(known, snapshot, lines)
        return snapshot

    def _check_history(self, known: Snapshot | None, changes: Changes) -> None:
        if known is None or changes.continues or known.revision.epoch in changes.lineage:
            return
        found, seen = changes.revision, known.revision
        if found.epoch != seen.epoch:
            raise RegistryLost(
                f"it was lost: generation {found.generation} of another history is there, {seen.generation} was known"
            )
        if found.generation < seen.generation:
            raise RegistryLost(f"it was lost: it went back from generation {seen.generation} to {found.generation}")
        log.warning("the registry went back and on again: some changes up to generation %d are lost", seen.generation)

    def audit(self, *, limit: int = 100) -> tuple[AuditRecord, ...]:
        """The latest changes, newest first."""
        return self._store.audit(max(0, limit))

    def now(self) -> float:
        """Seconds since 1970 by the clock that all replicas share, as of the last look."""
        return time.time() + self._clock_offset_s

    def wait(self, timeout_s: float) -> None:
        """Return when something may have changed, after `timeout_s` at the latest."""
        self._store.wait(timeout_s)

    def close(self) -> None:
        """Let go of files and connections. Calling it twice is fine."""
        self._store.close()

    # --- versions and aliases ----------------------------------------------------------------------------

    def add_version(
        self, name: str, package: PackageInfo, *, status: Literal["staged", "ready"] = "ready", actor: str = "system"
    ) -> VersionRecord:
        """Number a package under a name. The same package under the same name gives the version it already has.

        Raises: InvalidReference for a name or digest of the wrong form.
        """
        return self._change(actor, lambda draft: rules.add_version(draft, name, package, status))

    def set_status(
        self, name: str, version: int, status: Status, *, reason: str | None = None, actor: str = "system"
    ) -> VersionRecord:
        """Move a version on. Of several callers that ask for the same step one succeeds.

        Raises: AdapterNotFound; Conflict when TRANSITIONS has no such step, or an alias still names the version.
        """
        return self._change(actor, lambda draft: rules.set_status(draft, name, version, status, reason))

    def claim_validation(self, name: str, version: int, replica: str, alive: Collection[str]) -> VersionRecord | None:
        """Begin to validate a staged version, or one whose validator is not among the living. None: somebody else does."""
        return self._change(replica, lambda draft: rules.claim_validation(draft, name, version, replica, alive))

    def finish_validation(self, name: str, version: int, replica: str, error: str | None) -> VersionRecord:
        """Make a version `ready`, or `failed` with the reason. A name's first ready version becomes `prod`.

        Raises: Conflict when it is no longer this replica's to decide.
        """
        return self._change(replica, lambda draft: rules.finish_validation(draft, name, version, replica, error))

    def set_alias(
        self,
        name: str,
        alias: str,
        version: int | None,
        *,
        expect: Expect = UNSET,
        reason: str | None = None,
        actor: str = "system",
    ) -> AliasRecord | None:
        """Let an alias name a ready version at once, or with None take it away. Compare-and-swap where `expect` is given.

        Raises: InvalidReference; AdapterNotFound; Conflict when `expect` is not what is there, the version is not ready,
        or a rollout of this alias is under way.
        """
        return self._change(actor, lambda draft: rules.set_alias(draft, name, alias, version, expect, reason))

    # --- galleries ---------------------------------------------------------------------------------------

    def add_gallery_version(
        self,
        name: str,
        *,
        embedding_key: str,
        adapter: str,
        adapter_name: str | None = None,
        adapter_version: int | None = None,
        content: int | None = None,
        status: Literal["building", "ready"] = "ready",
        actor: str = "system",
    ) -> GalleryRecord:
        """Number a new version of a gallery. `adapter` is a weights digest or `__base__`; `content` None: a new one.

        Raises: InvalidReference.
        """
        return self._change(
            actor,
            lambda draft: rules.add_gallery_version(
                draft,
                name,
                embedding_key=embedding_key,
                adapter=adapter,
                adapter_name=adapter_name,
                adapter_version=adapter_version,
                content=content,
                status=status,
            ),
        )

    def set_gallery_status(
        self,
        name: str,
        version: int,
        status: GalleryStatus,
        *,
        reason: str | None = None,
        tree: str | None = None,
        actor: str = "system",
    ) -> GalleryRecord:
        """Move a gallery version on. `tree` is the digest of its folder, where that was put into the store of trees.

        Raises: NotFound; Conflict when there is no such step, or the version is live; InvalidReference for no digest.
        """
        return self._change(actor, lambda draft: rules.set_gallery_status(draft, name, version, status, reason, tree))

    def set_live_gallery(
        self,
        name: str,
        version: int | None,
        *,
        expect: Expect = UNSET,
        follows: str | Unset | None = UNSET,
        reason: str | None = None,
        actor: str = "system",
    ) -> GalleryRecord | None:
        """Make a ready version the live one, or with None make none live. Compare-and-swap where `expect` is given.

        `follows` is the "name@alias" the gallery goes with from now on; None: with none.
        Raises: NotFound; Conflict when `expect` is not the live version, or the version is not ready.
        """
        return self._change(actor, lambda draft: rules.set_live_gallery(draft, name, version, expect, follows, reason))

    def delete_gallery(
        self, name: str, *, expect: Expect = UNSET, reason: str | None = None, actor: str = "system"
    ) -> tuple[GalleryRecord, ...]:
        """Give a gallery up, every version of it. `expect`: the version that must be live.

        Raises: NotFound; Conflict while a rollout or a job works on it, or when another version is live.
        """
        return self._change(actor, lambda draft: rules.delete_gallery(draft, name, expect, reason))

    # --- jobs --------------------------------------------------------------------------------------------

    def start_job(
        self,
        action: JobAction,
        gallery: str,
        *,
        job_id: str,
        adapter: str,
        arguments: str,
        join: bool = False,
        actor: str = "system",
    ) -> JobRecord:
        """Let a gallery be built or embedded anew by whichever replica lives. See `rules.start_job`."""
        return self._change(
            actor,
            lambda draft: rules.start_job(
                draft, job_id, action, gallery, adapter=adapter, arguments=arguments, join=join
            ),
        )

    def claim_job(self, job_id: str, replica: str, alive: Collection[str]) -> JobRecord | None:
        """Become the one that does a job. None: somebody else who lives does, or it is over."""
        return self._change(replica, lambda draft: rules.claim_job(draft, job_id, replica, alive))

    def keep_job(self, job_id: str, token: int, version: int, *, actor: str) -> JobRecord:
        """Note the version that a job made. Raises: Conflict for a token that is not the latest."""
        return self._change(actor, lambda draft: rules.keep_job(draft, job_id, token, version))

    def finish_job(
        self, job_id: str, token: int, version: int, *, follows: str | Unset | None = UNSET, actor: str
    ) -> JobRecord:
        """Make what a job made live, in one change with its end. `follows` as in `set_live_gallery`.

        Raises: Conflict for a token that is not the latest, or when another version went live since it began.
        """
        return self._change(actor, lambda draft: rules.finish_job(draft, job_id, token, version, follows))

    def fail_job(self, job_id: str, token: int, error: str, *, actor: str) -> JobRecord:
        """Nothing came of a job. Raises: Conflict for a token that is not the latest."""
        return self._change(actor, lambda draft: rules.fail_job(draft, job_id, token, error))

    def abort_job(self, job_id: str, error: str, *, actor: str = "system") -> JobRecord:
        """End a job: nothing has changed. Raises: NotFound; Conflict once it has succeeded."""
        return self._change(actor, lambda draft: rules.abort_job(draft, job_id, error))

    # --- rollouts ----------------------------------------------------------------------------------------

    def start_rollout(
        self,
        name: str,
        alias: str,
        version: int,
        *,
        rollout_id: str,
        expect: Expect = UNSET,
        traffic: float | None = None,
        migrate: bool = True,
        force: bool = False,
        replicas: Collection[str] = (),
        timeout_s: float = 300.0,
        reason: str | None = None,
        actor: str = "system",
    ) -> RolloutRecord:
        """Set an alias on its way to a version. See `rules.start_rollout`."""
        return self._change(
            actor,
            lambda draft: rules.start_rollout(
                draft,
                rollout_id,
                name,
                alias,
                version,
                expect=expect,
                traffic=traffic,
                migrate=migrate,
                force=force,
                replicas=replicas,
                deadline=draft.now + timeout_s,
                reason=reason,
            ),
        )

    def claim_migration(self, rollout_id: str, replica: str, alive: Collection[str]) -> RolloutRecord | None:
        """Become the one that embeds a rollout's galleries. None: somebody else is, or there is nothing to embed."""
        return self._change(replica, lambda draft: rules.claim_migration(draft, rollout_id, replica, alive))

    def finish_migration(self, rollout_id: str, token: int, gallery: str, version: int, *, actor: str) -> RolloutRecord:
        """A gallery of a rollout is embedded anew. Raises: Conflict for a token that is not the latest."""
        return self._change(actor, lambda draft: rules.finish_migration(draft, rollout_id, token, gallery, version))

    def acknowledge(self, rollout_id: str, replica: str) -> RolloutRecord | None:
        """This replica holds everything the rollout needs."""
        return self._change(replica, lambda draft: rules.acknowledge(draft, rollout_id, replica))

    def commit_rollout(self, rollout_id: str, alive: Collection[str], *, actor: str) -> RolloutRecord | None:
        """Move alias and galleries in one change, once every required replica that lives is ready. None: not yet."""
        return self._change(actor, lambda draft: rules.commit_rollout(draft, rollout_id, alive))

    def abort_rollout(
        self, rollout_id: str, error: str, *, only_late: bool = False, actor: str = "system"
    ) -> RolloutRecord | None:
        """End a rollout before its commit. Raises: NotFound; Conflict once it is committed."""
        return self._change(actor, lambda draft: rules.abort_rollout(draft, rollout_id, error, only_late=only_late))

    def end_canary(
        self, name: str, alias: str, *, expect: Expect = UNSET, reason: str | None = None, actor: str = "system"
    ) -> AliasRecord:
        """Take a canary's share back. Raises: Conflict when there is none, or not the expected one."""
        return self._change(actor, lambda draft: rules.end_canary(draft, name, alias, expect, reason))

    def roll_back(
        self,
        name: str,
        alias: str,
        *,
        rollout_id: str,
        expect: Expect = UNSET,
        reason: str | None = None,
        actor: str = "system",
    ) -> RolloutRecord:
        """Move an alias back to the version before, galleries with it, at once. See `rules.roll_back`."""
        return self._change(
            actor, lambda draft: rules.roll_back(draft, rollout_id, name, alias, expect=expect, reason=reason)
        )

    def drop_operations(self, older_than: float) -> int:
        """Forget rollouts and jobs that ended before a time (seconds since 1970); how many."""
        return self._change("system", lambda draft: rules.drop_operations(draft, older_than))

    # --- replicas and duties -----------------------------------------------------------------------------

    def beat(self, replica: Replica) -> None:
        """A sign of life of this replica."""
        self._store.beat(replica)

    def replicas(self) -> tuple[Replica, ...]:
        """The last sign of life of every replica, by id."""
        return self._store.replicas()

    def forget(self, replica_id: str) -> None:
        """A replica that left."""
        self._store.forget(replica_id)

    def take_lease(self, duty: str, replica: str, alive: Collection[str]) -> LeaseRecord | None:
        """Have a duty that one replica at a time has. None: somebody else who lives has it."""
        return self._change(replica, lambda draft: rules.take_lease(draft, duty, replica, alive))

    # --- loss and restoration ----------------------------------------------------------------------------

    def remember(self) -> None:
        """Keep the last state seen on this process's own disk. Raises: OSError."""
        memory = self._memory
        if memory is None:
            return
        with self._lock:
            if self._snapshot is None:
                return
            snapshot, lines = self._snapshot, tuple(self._log)
            contents = Contents(snapshot.revision, self._lineage, _writes_of(snapshot), lines)
        memory.remember(contents)
        with self._lock:
            del self._log[: len(lines)]

    def restore(self, *, actor: str, force: bool = False) -> Snapshot:
        """Put the last state this process knows back into a store that lost it, as a new epoch.

        What others wrote after that state is lost, and what is there now is replaced. Another registry that was ever
        written to is not, unless `force` says so: the address may be wrong.
        Raises: RegistryUnavailable when the registry is not lost, or must not be replaced.
        """
        try:
            snapshot = self.snapshot()
        except RegistryLost:
            pass
        else:
            raise RegistryUnavailable(f"the registry is not lost: it is at generation {snapshot.generation}")
        with self._lock:
            known = self._snapshot
            assert known is not None, "a registry was lost that nobody knew. This is a bug."
            found = self._store.revision()
            if found is not None and found.epoch != known.revision.epoch and found.generation > 0 and not force:
                raise RegistryUnavailable(
                    f"another registry is there, at generation {found.generation}: check the address, or force it"
                )
            recalled, lines, lineage = self._recall_history(known), self._log, self._lineage
            if recalled is not None:
                lines = [*recalled.log, *lines]
                if recalled.revision.generation > known.generation:  # another process of this host saw more
                    known, lineage = _snapshot_of(recalled), recalled.lineage
            lines = _without_repeats(line for line in lines if line.generation <= known.generation)
            revision = Revision(uuid.uuid4().hex, known.generation + 1, uuid.uuid4().hex)
            before = "nothing" if found is None else f"generation {found.generation}"
            note = AuditRecord(
                revision.generation,
                self.now(),
                actor,
                "restore",
                "registry",
                before,
                f"generation {known.generation}",
                None,
            )
            lineage = (*lineage, known.revision.epoch)
            is_done = self._store.replace(found, Contents(revision, lineage, _writes_of(known), (*lines, note)))
        if not is_done:
            raise RegistryUnavailable("somebody else changed the registry at the same moment; look again")
        return self.snapshot()

    def _recall_history(self, known: Snapshot) -> Contents | None:
        """What is remembered, when it is of the history of a snapshot."""
        recalled = self._memory.recall() if self._memory is not None else None
        if recalled is None:
            return None
        one, other = known.revision.epoch, recalled.revision.epoch
        return recalled if one == other or one in recalled.lineage or other in self._lineage else None

    # --- changing ----------------------------------------------------------------------------------------

    def _change(self, actor: str, rule: Callable[[Draft], Result]) -> Result:
        """Ask a rule about the newest state until its change gets in. Raises: RegistryUnavailable, whatever the rule does."""
        end = time.monotonic() + CONTENTION_S
        while True:
            draft = Draft(self.snapshot(), self.now(), actor)
            if draft.before.generation == 0:
                self._check_no_elders()
            result = rule(draft)
            if not draft.writes and not draft.log:
                return result
            if self._store.commit(draft.before.revision, uuid.uuid4().hex, draft.writes, draft.log):
                with suppress(RegistryUnavailable):  # what was acknowledged is known here, whatever the store forgets
                    self.snapshot()
                return result
            if time.monotonic() > end:
                raise RegistryUnavailable("the registry changes faster than this change could be made; try again")
            time.sleep(random.uniform(0, 0.01))

    def _check_no_elders(self) -> None:
        """Refuse to write the first change of a registry whose servers know an earlier life of it: they will restore it."""
        if any(replica.generation > 0 and replica.age_s < ELDER_AGE_S for replica in self._store.replicas()):
            raise RegistryLost("the registry is empty and its replicas know it was not: wait until it is restored")


def _snapshot_of(contents: Contents) -> Snapshot:
    records: dict[tuple[str, str], Record] = {}
    _apply(records, contents.writes)
    return Snapshot.of(contents.revision, records.values())


def _without_repeats(lines: Iterable[AuditRecord]) -> list[AuditRecord]:
    """Each line once, by rising generation: processes that share a memory saw the same."""
    return sorted({(line.generation, line.action, line.subject): line for line in lines}.values(), key=_generation_of)


def _generation_of(line: AuditRecord) -> int:
    return line.generation


def _writes_of(snapshot: Snapshot) -> tuple[Write, ...]:
    return tuple(
        Write(kind, key, dumps(asdict(record), sort_keys=True)) for (kind, key), record in snapshot.records.items()
    )


def _apply(records: dict[tuple[str, str], Record], writes: Collection[Write]) -> None:
    """Bring records up to date. Raises: RegistryUnavailable for one that cannot be read."""
    for kind, key, text in writes:
        if text is None:
            records.pop((kind, key), None)
        elif (reader := _READERS.get(kind)) is not None:  # kinds of a newer program are none of our business
            try:
                records[kind, key] = reader.validate_json(text)
            except ValidationError as error:
                raise RegistryUnavailable(f"the registry holds a {kind} {key!r} that cannot be read") from error
