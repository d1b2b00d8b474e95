"""What a registry holds, as values: records, and the snapshot of them all that one request reads.

    a version      staged -> validating -> ready -> retired -> deleted, or failed with a reason   (TRANSITIONS)
    an alias       always names a ready version: what is served cannot leave `ready` behind its back
    a gallery      numbered versions, of which one is live and ready
    a rollout      migrating -> preparing -> committed, or aborted
    a job          running -> succeeded, or failed

Knows nothing of storage: a record has a `kind` and a `key`, and that is all a store needs.
"""

import difflib
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, TypeVar, cast

from adapters.config import check_name
from adapters.errors import AdapterNotFound, NotFound
from adapters.registry.references import (
    AdapterReference,
    AliasReference,
    DigestReference,
    VersionReference,
)

if TYPE_CHECKING:  # a registry is listed and edited without torch
    from adapters.package import Package

MAX_NAMED = 5  # names an error message spells out
MAX_COMPARED = 1000  # names searched for one that is nearly what was asked for

Status = Literal["staged", "validating", "ready", "retired", "failed", "deleted"]
GalleryStatus = Literal["building", "ready", "retired", "failed", "deleted"]
Phase = Literal["migrating", "preparing", "committed", "aborted"]
JobAction = Literal["build", "rebuild"]
JobPhase = Literal["running", "succeeded", "failed"]

# What may follow a status. Nothing follows "deleted"; a failed version may be staged again to be validated anew.
TRANSITIONS: Mapping[Status, frozenset[Status]] = {
    "staged": frozenset({"validating", "failed", "deleted"}),
    "validating": frozenset({"ready", "failed", "staged"}),
    "ready": frozenset({"retired", "failed", "deleted"}),
    "retired": frozenset({"ready", "deleted"}),
    "failed": frozenset({"staged", "deleted"}),
    "deleted": frozenset(),
}
GALLERY_TRANSITIONS: Mapping[GalleryStatus, frozenset[GalleryStatus]] = {
    "building": frozenset({"ready", "failed", "deleted"}),
    "ready": frozenset({"retired", "failed", "deleted"}),
    "retired": frozenset({"ready", "deleted"}),
    "failed": frozenset({"deleted"}),
    "deleted": frozenset(),
}


class Revision(NamedTuple):
    """Which state a registry is in. Another history, or a lower generation than seen before: the registry was lost.

    epoch        the registry's identity, from its creation or its last restoration on
    generation   how many changes led here
    tip          the name of the last change: two histories that part differ in it at the same generation
    """

    epoch: str
    generation: int
    tip: str


@dataclass(frozen=True)
class PackageInfo:
    """What a registry keeps of a package."""

    package_digest: str
    weights_digest: str
    family: str
    task: str
    rank: int

    @classmethod
    def of(cls, package: "Package") -> "PackageInfo":
        """The summary of a package that was read."""
        config = package.config
        return cls(package.package_digest, package.weights_digest, config.family, config.task, config.rank)


@dataclass(frozen=True)
class VersionRecord:
    """One numbered version of an adapter. Versions of a name count 1, 2, 3, ... and no number is used again.

    `validator` is the replica that looks at it while it is `validating`. Times are seconds since 1970.
    """

    kind: ClassVar = "version"

    name: str
    version: int
    package_digest: str
    weights_digest: str
    family: str
    task: str
    rank: int
    status: Status
    reason: str | None
    created_at: float
    updated_at: float
    validator: str | None = None

    @property
    def key(self) -> str:
        """Its key among versions."""
        return f"{self.name}@{self.version}"

    @property
    def reference(self) -> VersionReference:
        """The reference that always means this version."""
        return VersionReference(self.name, self.version)


@dataclass(frozen=True)
class Canary:
    """A version that gets a share of an alias's traffic, 0 < traffic < 1."""

    version: int
    traffic: float


@dataclass(frozen=True)
class AliasRecord:
    """A name for the version of an adapter that is served under it.

    `history` holds the versions it named before, the latest last: what a rollback goes back to.
    """

    kind: ClassVar = "alias"

    name: str
    alias: str
    version: int
    updated_at: float
    history: tuple[int, ...] = ()
    canary: Canary | None = None

    @property
    def key(self) -> str:
        """Its key among aliases."""
        return f"{self.name}@{self.alias}"

    @property
    def versions(self) -> tuple[int, ...]:
        """The versions it serves now: one, or two during a canary."""
        return (self.version,) if self.canary is None else (self.version, self.canary.version)

    def version_for(self, routing_key: str | None) -> int:
        """The version that serves requests with this key, always the same while the canary stays; None: the main one.

        Keys are spread evenly, and anew for each canary: a share is not always the same users.
        """
        if self.canary is None or routing_key is None:
            return self.version
        digest = hashlib.sha256(f"{self.key}\0{self.canary.version}\0{routing_key}".encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        return self.canary.version if share < self.canary.traffic else self.version


@dataclass(frozen=True)
class GalleryRecord:
    """One numbered version of a gallery: a content, embedded with one adapter.

    `content` counts what is in the gallery: versions with equal content hold the same items, embedded differently.
    `tree` is the digest of its folder in the store of trees; None where it was not put there.
    """

    kind: ClassVar = "gallery"

    name: str
    version: int
    content: int
    embedding_key: str
    adapter: str  # weights digest, or __base__
    adapter_name: str | None  # the name and version it was known by when the gallery was embedded
    adapter_version: int | None
    status: GalleryStatus
    reason: str | None
    created_at: float
    updated_at: float
    tree: str | None = None

    @property
    def key(self) -> str:
        """Its key among gallery versions."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class GalleryHead:
    """Which version of a gallery is searched, and which alias it goes with.

    follows   "name@alias": when that alias moves, the gallery is embedded anew and moves with it; None: it stays
    canary    the version embedded with the canary of that alias, while there is one
    """

    kind: ClassVar = "head"

    name: str
    live: int | None
    updated_at: float
    follows: str | None = None
    canary: int | None = None

    @property
    def key(self) -> str:
        """Its key among heads."""
        return self.name


@dataclass(frozen=True)
class GalleryMove:
    """What a rollout does to one gallery. `to_version` is None until a version embedded with the new adapter is ready."""

    gallery: str
    from_version: int | None
    to_version: int | None


@dataclass(frozen=True)
class RolloutRecord:
    """An alias on its way from one version to another, together with the galleries that follow it.

    traffic    the share of a canary; None: all of it
    moves      galleries embedded anew first; pinned: galleries that stop following instead
    required   replicas that must be ready; ready: those that are
    deadline   when anyone may abort it, seconds since 1970
    migrator   the replica that embeds galleries; `token` rises with each new one, and only the latest may write
    """

    kind: ClassVar = "rollout"

    id: str
    name: str
    alias: str
    from_version: int | None
    to_version: int
    traffic: float | None
    phase: Phase
    actor: str
    reason: str | None
    started_at: float
    updated_at: float
    deadline: float
    moves: tuple[GalleryMove, ...] = ()
    pinned: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    ready: tuple[str, ...] = ()
    migrator: str | None = None
    token: int = 0
    error: str | None = None
    is_rollback: bool = False

    @property
    def key(self) -> str:
        """Its key among rollouts."""
        return self.id

    @property
    def is_active(self) -> bool:
        """Whether it still goes on."""
        return self.phase in ("migrating", "preparing")


@dataclass(frozen=True)
class JobRecord:
    """A gallery that is built, or embedded anew, by whichever replica lives.

    adapter        the name of the adapter that embeds it, or `__base__`: whom the job is for
    arguments      what shall be done, as JSON; for those who do it to understand
    from_version   the version that was live when it began, and must still be when it ends
    worker         the replica that does it; `token` rises with each new one, and only the latest may write
    version        the version it made, perhaps before it ended
    """

    kind: ClassVar = "job"

    id: str
    action: JobAction
    gallery: str
    adapter: str
    arguments: str
    from_version: int | None
    phase: JobPhase
    actor: str
    started_at: float
    updated_at: float
    worker: str | None = None
    token: int = 0
    version: int | None = None
    error: str | None = None

    @property
    def key(self) -> str:
        """Its key among jobs."""
        return self.id

    @property
    def is_active(self) -> bool:
        """Whether it still goes on."""
        return self.phase == "running"


@dataclass(frozen=True)
class LeaseRecord:
    """A duty that one replica at a time has. `token` rises with each new holder."""

    kind: ClassVar = "lease"

    duty: str
    holder: str
    token: int
    taken_at: float

    @property
    def key(self) -> str:
        """Its key among leases."""
        return self.duty


Record = VersionRecord | AliasRecord | GalleryRecord | GalleryHead | RolloutRecord | JobRecord | LeaseRecord
RECORD_TYPES: Mapping[str, type[Record]] = {
    record.kind: record
    for record in (VersionRecord, AliasRecord, GalleryRecord, GalleryHead, RolloutRecord, JobRecord, LeaseRecord)
}


@dataclass(frozen=True)
class AuditRecord:
    """One change: who did what, when, from what to what, and why. `generation` is the one the change led to."""

    generation: int
    at: float  # seconds since 1970
    actor: str
    action: str
    subject: str
    before: str | None
    after: str | None
    reason: str | None


@dataclass(frozen=True)
class Replica:
    """A running server, as it described itself `age_s` seconds ago.

    id           new at each start
    generation   of the registry state it serves
    is_serving   whether it takes requests
    details      what a status page shows: address, device, what is resident where, progress of its work
    """

    id: str
    generation: int
    is_serving: bool
    details: Mapping[str, object] = field(default_factory=dict)
    age_s: float = 0.0


@dataclass(frozen=True)
class Snapshot:
    """A whole registry at one revision. Records are sorted by name, then by version or alias."""

    revision: Revision
    versions: tuple[VersionRecord, ...] = ()
    aliases: tuple[AliasRecord, ...] = ()
    galleries: tuple[GalleryRecord, ...] = ()
    heads: tuple[GalleryHead, ...] = ()
    rollouts: tuple[RolloutRecord, ...] = ()
    leases: tuple[LeaseRecord, ...] = ()
    jobs: tuple[JobRecord, ...] = ()

    @classmethod
    def of(cls, revision: Revision, records: Iterable[Record]) -> "Snapshot":
        """The snapshot of these records, in whatever order they come."""
        kinds: dict[str, list[Record]] = {kind: [] for kind in RECORD_TYPES}
        for record in records:
            kinds[record.kind].append(record)
        return cls(
            revision,
            tuple(sorted(cast(list[VersionRecord], kinds["version"]), key=lambda r: (r.name, r.version))),
            tuple(sorted(cast(list[AliasRecord], kinds["alias"]), key=lambda r: (r.name, r.alias))),
            tuple(sorted(cast(list[GalleryRecord], kinds["gallery"]), key=lambda r: (r.name, r.version))),
            tuple(sorted(cast(list[GalleryHead], kinds["head"]), key=lambda r: r.name)),
            tuple(sorted(cast(list[RolloutRecord], kinds["rollout"]), key=lambda r: (r.started_at, r.id))),
            tuple(sorted(cast(list[LeaseRecord], kinds["lease"]), key=lambda r: r.duty)),
            tuple(sorted(cast(list[JobRecord], kinds["job"]), key=lambda r: (r.started_at, r.id))),
        )

    @property
    def generation(self) -> int:
        """How many changes led here."""
        return self.revision.generation

    @cached_property
    def records(self) -> Mapping[tuple[str, str], Record]:
        """Every record by (kind, key)."""
        groups: tuple[tuple[Record, ...], ...] = (
            self.versions,
            self.aliases,
            self.galleries,
            self.heads,
            self.rollouts,
            self.leases,
            self.jobs,
        )
        return {(record.kind, record.key): record for group in groups for record in group}

    # --- adapters ----------------------------------------------------------------------------------------

    def resolve(self, reference: AdapterReference, routing_key: str | None = None) -> VersionRecord:
        """The ready version a request means. A digest that several names share gives the first name's newest version.

        `routing_key` decides whether an alias means its canary; None: it does not.
        Raises: AdapterNotFound saying what there is instead.
        """
        record = self._find(reference, routing_key)
        if record.status != "ready":
            reason = f" ({record.reason})" if record.reason else ""
            raise AdapterNotFound(f"{record.reference} is {record.status}{reason}, not ready", param="adapter")
        return record

    def version(self, name: str, version: int) -> VersionRecord:
        """One version, whatever its status. Raises: AdapterNotFound."""
        record = self.records.get(("version", f"{name}@{version}"))
        if isinstance(record, VersionRecord):
            return record
        if name in self.adapters:
            numbers = [str(record.version) for record in self.adapters[name]]
            raise AdapterNotFound(f"{name!r} has no version {version}; known: {shortened(numbers)}", param="adapter")
        raise AdapterNotFound(f"no adapter {name!r}; {nearest(name, self.adapters)}", param="adapter")

    def alias(self, name: str, alias: str) -> AliasRecord | None:
        """What an alias is at this moment."""
        record = self.records.get(("alias", f"{name}@{alias}"))
        return record if isinstance(record, AliasRecord) else None

    @cached_property
    def adapters(self) -> Mapping[str, tuple[VersionRecord, ...]]:
        """The versions of each name in ascending order; deleted ones are left out, and names that have no others."""
        return _grouped((record.name, record) for record in self.versions if record.status != "deleted")

    def aliases_of(self, name: str) -> dict[str, int]:
        """The version behind each alias of an adapter."""
        return {record.alias: record.version for record in self._aliases_by_name.get(name, ())}

    def aliases_serving(self, name: str, version: int) -> tuple[str, ...]:
        """The aliases under which a version is served, be it as a canary."""
        return tuple(record.alias for record in self._aliases_by_name.get(name, ()) if version in record.versions)

    def with_digest(self, digest: str) -> tuple[VersionRecord, ...]:
        """The ready versions with this package or weights digest: by name, the newest of a name first."""
        return self._ready_by_digest.get(digest, ())

    # --- galleries ---------------------------------------------------------------------------------------

    def gallery(self, name: str, version: int | None = None, routing_key: str | None = None) -> GalleryRecord:
        """One version of a gallery, the live one unless told otherwise; `routing_key` as in `resolve`.

        Raises: NotFound saying which there are.
        """
        records = self.gallery_versions.get(check_name(name, param="gallery"), ())
        if not records:
            raise NotFound(f"no gallery {name!r}; {nearest(name, self.gallery_versions)}", param="gallery")
        number = self.live_version(name, routing_key) if version is None else version
        for record in records:
            if record.version == number:
                return record
        wanted = "live version" if version is None else f"version {version}"
        numbers = [str(record.version) for record in records]
        raise NotFound(f"gallery {name!r} has no {wanted}; known: {shortened(numbers)}", param="gallery")

    def head(self, name: str) -> GalleryHead | None:
        """Which version of a gallery is searched; None for a gallery that never had one."""
        record = self.records.get(("head", name))
        return record if isinstance(record, GalleryHead) else None

    def live_version(self, name: str, routing_key: str | None = None) -> int | None:
        """The number of the version that is searched; for requests of a canary, the one embedded with it."""
        head = self.head(name)
        if head is None:
            return None
        return head.canary if self._goes_with_canary(head, routing_key) else head.live

    def is_canary(self, gallery: GalleryRecord) -> bool:
        """Whether a version is searched by requests of a canary alone."""
        head = self.head(gallery.name)
        return head is not None and gallery.version == head.canary != head.live

    def _goes_with_canary(self, head: GalleryHead, routing_key: str | None) -> bool:
        if head.canary is None or head.follows is None:
            return False
        record = self.records.get(("alias", head.follows))
        if not isinstance(record, AliasRecord) or record.canary is None:
            return False
        return record.version_for(routing_key) == record.canary.version

    def followers(self, name: str, alias: str) -> tuple[GalleryHead, ...]:
        """The galleries that go with an alias."""
        return tuple(head for head in self.heads if head.follows == f"{name}@{alias}")

    @cached_property
    def gallery_versions(self) -> Mapping[str, tuple[GalleryRecord, ...]]:
        """The versions of each gallery in ascending order; deleted ones are left out, and names that have no others."""
        return _grouped((record.name, record) for record in self.galleries if record.status != "deleted")

    # --- rollouts, jobs, duties --------------------------------------------------------------------------

    def rollout(self, rollout_id: str) -> RolloutRecord | None:
        """One rollout, finished or not."""
        record = self.records.get(("rollout", rollout_id))
        return record if isinstance(record, RolloutRecord) else None

    def lease(self, duty: str) -> LeaseRecord | None:
        """Who has a duty."""
        record = self.records.get(("lease", duty))
        return record if isinstance(record, LeaseRecord) else None

    @cached_property
    def active_rollouts(self) -> tuple[RolloutRecord, ...]:
        """The rollouts under way, the oldest first."""
        return tuple(record for record in self.rollouts if record.is_active)

    def job(self, job_id: str) -> JobRecord | None:
        """One job, finished or not."""
        record = self.records.get(("job", job_id))
        return record if isinstance(record, JobRecord) else None

    @cached_property
    def active_jobs(self) -> tuple[JobRecord, ...]:
        """The jobs under way, the oldest first."""
        return tuple(record for record in self.jobs if record.is_active)

    # --- lookups -----------------------------------------------------------------------------------------

    def _find(self, reference: AdapterReference, routing_key: str | None) -> VersionRecord:
        match reference:
            case VersionReference(name, version):
                return self.version(name, version)
            case DigestReference(digest):
                records = self.with_digest(digest)
                if not records:
                    raise AdapterNotFound(f"no ready adapter with the digest {digest}", param="adapter")
                return records[0]
            case AliasReference(name, alias):
                return self.version(name, self._aliased_version(name, alias, routing_key))

    def _aliased_version(self, name: str, alias: str, routing_key: str | None) -> int:
        record = self.alias(name, alias)
        if record is not None:
            return record.version_for(routing_key)
        if name not in self.adapters:
            raise AdapterNotFound(f"no adapter {name!r}; {nearest(name, self.adapters)}", param="adapter")
        known = nearest(alias, self.aliases_of(name))
        raise AdapterNotFound(f"adapter {name!r} has no alias {alias!r}; {known}", param="adapter")

    @cached_property
    def _aliases_by_name(self) -> Mapping[str, tuple[AliasRecord, ...]]:
        return _grouped((record.name, record) for record in self.aliases)

    @cached_property
    def _ready_by_digest(self) -> Mapping[str, tuple[VersionRecord, ...]]:
        ready = sorted((r for r in self.versions if r.status == "ready"), key=lambda r: (r.name, -r.version))
        return _grouped(
            (digest, record) for record in ready for digest in (record.package_digest, record.weights_digest)
        )


_Item = TypeVar("_Item")


def _grouped(pairs: Iterable[tuple[str, _Item]]) -> dict[str, tuple[_Item, ...]]:
    groups: dict[str, list[_Item]] = {}
    for key, record in pairs:
        groups.setdefault(key, []).append(record)
    return {key: tuple(records) for key, records in groups.items()}


def nearest(wanted: str, names: Iterable[str]) -> str:
    """What an error says beside "no such": names much like the wanted one, else the first few."""
    known = list(names)
    near = difflib.get_close_matches(wanted, list(islice(known, MAX_COMPARED)), n=3)
    if near:
        return f"nearest: {', '.join(near)}"
    return f"known: {shortened(known)}" if known else "there are none"


def shortened(names: list[str]) -> str:
    """The first few names, and how many more."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{', '.join(names[:MAX_NAMED])}{more}"
