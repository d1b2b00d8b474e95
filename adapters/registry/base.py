"""What a registry holds and promises; the storage behind it is another module's affair.

A registry maps names to numbered versions (each the digest of a package), aliases to versions, and galleries to
numbered gallery versions of which one is live. Readers work on immutable snapshots, so one request sees one state.

    a version      staged -> validating -> ready -> retired -> deleted, or failed with a reason   (TRANSITIONS)
    an alias       always names a ready version: what is served cannot leave `ready` behind its back
    a live gallery is always a ready gallery version
    a change       happens whole or not at all, is audited, and raises the generation by one; a no-op does none of it
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeVar

from adapters.config import ALIAS_PATTERN, BASE_ADAPTER, DIGEST_PATTERN, check_name
from adapters.errors import AdapterNotFound, Conflict, InvalidReference, NotFound

if TYPE_CHECKING:  # a registry is listed and edited without torch
    from adapters.package import Package

DEFAULT_ALIAS = "prod"
VERSION_PATTERN = r"[1-9][0-9]{0,8}"
MAX_REFERENCE_CHARS = 128  # longer than any valid one
MAX_NAMED = 5  # names an error message spells out
MAX_COMPARED = 1000  # names searched for one that is nearly what was asked for

Status = Literal["staged", "validating", "ready", "retired", "failed", "deleted"]
GalleryStatus = Literal["building", "ready", "retired", "failed", "deleted"]

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


class Unset(Enum):
    """The type of UNSET."""

    UNSET = "unset"


UNSET = Unset.UNSET
Expect = int | None | Literal[Unset.UNSET]  # a version; None: nothing may be there yet; UNSET: whatever is there


@dataclass(frozen=True)
class BaseReference:
    """`__base__`: the backbone without an adapter."""

    def __str__(self) -> str:
        return BASE_ADAPTER


@dataclass(frozen=True)
class AliasReference:
    """`name@alias`: the version an alias names at this moment."""

    name: str
    alias: str = DEFAULT_ALIAS

    def __str__(self) -> str:
        return f"{self.name}@{self.alias}"


@dataclass(frozen=True)
class VersionReference:
    """`name@7`: one version."""

    name: str
    version: int

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class DigestReference:
    """`sha256:...`: the version with this package digest or weights digest."""

    digest: str

    def __str__(self) -> str:
        return self.digest


AdapterReference = AliasReference | VersionReference | DigestReference
Reference = BaseReference | AdapterReference


def parse_reference(text: str) -> Reference:
    """Read `name`, `name@alias`, `name@7`, `sha256:<64 hex>` or `__base__`; `name` alone is `name@prod`.

    Raises: InvalidReference for anything else.
    """
    if text == BASE_ADAPTER:
        return BaseReference()
    if re.fullmatch(DIGEST_PATTERN, text):
        return DigestReference(text)
    if len(text) > MAX_REFERENCE_CHARS:
        raise InvalidReference(f"a reference has at most {MAX_REFERENCE_CHARS} characters", param="adapter")
    name, at, selector = text.partition("@")
    check_name(name, param="adapter")
    if not at:
        return AliasReference(name)
    if re.fullmatch(VERSION_PATTERN, selector):
        return VersionReference(name, int(selector))
    if re.fullmatch(ALIAS_PATTERN, selector):
        return AliasReference(name, selector)
    raise InvalidReference(
        f"{text!r} is no valid reference: {name}, {name}@alias or {name}@7, sha256:<64 hex digits> or {BASE_ADAPTER}",
        param="adapter",
    )


def check_alias(alias: str) -> str:
    """Return `alias` when it may be one. Raises: InvalidReference."""
    if not re.fullmatch(ALIAS_PATTERN, alias):
        raise InvalidReference(
            f"{alias[:MAX_REFERENCE_CHARS]!r} is no valid alias: 1 to 32 of a-z, 0-9, '_', '-', starting with a letter",
            param="alias",
        )
    return alias


def check_digest(digest: str, *, param: str = "digest") -> str:
    """Return `digest` when it is one. Raises: InvalidReference."""
    if not re.fullmatch(DIGEST_PATTERN, digest):
        raise InvalidReference(f"{digest[:MAX_REFERENCE_CHARS]!r} is no digest: sha256: and 64 hex digits", param=param)
    return digest


class Revision(NamedTuple):
    """Which state a registry is in. Another epoch or a lower generation than seen before: the registry was lost."""

    epoch: str
    generation: int


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
    """One numbered version of an adapter. Versions of a name count 1, 2, 3, ... and no number is used again."""

    name: str
    version: int
    package_digest: str
    weights_digest: str
    family: str
    task: str
    rank: int
    status: Status
    reason: str | None
    created_at: float  # seconds since 1970

    @property
    def reference(self) -> VersionReference:
        """The reference that always means this version."""
        return VersionReference(self.name, self.version)


@dataclass(frozen=True)
class AliasRecord:
    """A name for the version of an adapter that is served under it."""

    name: str
    alias: str
    version: int
    updated_at: float  # seconds since 1970


@dataclass(frozen=True)
class GalleryRecord:
    """One numbered version of a gallery, embedded with one adapter. `live` marks the one that is searched by default."""

    name: str
    version: int
    embedding_key: str
    adapter: str  # weights digest, or __base__
    adapter_name: str | None  # the name it was known by when the gallery was embedded
    status: GalleryStatus
    reason: str | None
    created_at: float  # seconds since 1970
    live: bool


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
class Snapshot:
    """A whole registry at one generation. Records are sorted by name, then by version or alias."""

    epoch: str
    generation: int
    versions: tuple[VersionRecord, ...]
    aliases: tuple[AliasRecord, ...]
    galleries: tuple[GalleryRecord, ...]

    @property
    def revision(self) -> Revision:
        """To be compared with `Registry.revision()`."""
        return Revision(self.epoch, self.generation)

    def resolve(self, reference: AdapterReference) -> VersionRecord:
        """The ready version a request means. A digest that several names share gives the first name's newest version.

        Raises: AdapterNotFound saying what there is instead.
        """
        record = self._find(reference)
        if record.status != "ready":
            reason = f" ({record.reason})" if record.reason else ""
            raise AdapterNotFound(f"{record.reference} is {record.status}{reason}, not ready", param="adapter")
        return record

    def version(self, name: str, version: int) -> VersionRecord:
        """One version, whatever its status. Raises: AdapterNotFound."""
        record = self._versions_by_number.get((name, version))
        if record is not None:
            return record
        if name in self.adapters:
            numbers = [str(record.version) for record in self.adapters[name]]
            raise AdapterNotFound(f"{name!r} has no version {version}; known: {_shortened(numbers)}", param="adapter")
        raise AdapterNotFound(f"no adapter {name!r}; {_known(name, self.adapters)}", param="adapter")

    @cached_property
    def adapters(self) -> Mapping[str, tuple[VersionRecord, ...]]:
        """The versions of each name in ascending order; deleted ones are left out, and names that have no others."""
        return _grouped((record.name, record) for record in self.versions if record.status != "deleted")

    def aliases_of(self, name: str) -> dict[str, int]:
        """The version behind each alias of an adapter."""
        return {record.alias: record.version for record in self.aliases if record.name == name}

    def with_digest(self, digest: str) -> tuple[VersionRecord, ...]:
        """The ready versions with this package or weights digest: by name, the newest of a name first."""
        return self._ready_by_digest.get(digest, ())

    def gallery(self, name: str, version: int | None = None) -> GalleryRecord:
        """One version of a gallery, the live one unless told otherwise. Raises: NotFound saying which there are."""
        records = self.gallery_versions.get(check_name(name, param="gallery"), ())
        if not records:
            raise NotFound(f"no gallery {name!r}; {_known(name, self.gallery_versions)}", param="gallery")
        for record in records:
            if record.live if version is None else record.version == version:
                return record
        wanted = "live version" if version is None else f"version {version}"
        numbers = [str(record.version) for record in records]
        raise NotFound(f"gallery {name!r} has no {wanted}; known: {_shortened(numbers)}", param="gallery")

    @cached_property
    def gallery_versions(self) -> Mapping[str, tuple[GalleryRecord, ...]]:
        """The versions of each gallery in ascending order; deleted ones are left out, and names that have no others."""
        return _grouped((record.name, record) for record in self.galleries if record.status != "deleted")

    def _find(self, reference: AdapterReference) -> VersionRecord:
        match reference:
            case VersionReference(name, version):
                return self.version(name, version)
            case DigestReference(digest):
                records = self.with_digest(digest)
                if not records:
                    raise AdapterNotFound(f"no ready adapter with the digest {digest}", param="adapter")
                return records[0]
            case AliasReference(name, alias):
                return self.version(name, self._aliased_version(name, alias))

    def _aliased_version(self, name: str, alias: str) -> int:
        version = self._version_by_alias.get((name, alias))
        if version is not None:
            return version
        if name not in self.adapters:
            raise AdapterNotFound(f"no adapter {name!r}; {_known(name, self.adapters)}", param="adapter")
        known = _known(alias, self.aliases_of(name))
        raise AdapterNotFound(f"adapter {name!r} has no alias {alias!r}; {known}", param="adapter")

    @cached_property
    def _versions_by_number(self) -> dict[tuple[str, int], VersionRecord]:
        return {(record.name, record.version): record for record in self.versions}

    @cached_property
    def _version_by_alias(self) -> dict[tuple[str, str], int]:
        return {(record.name, record.alias): record.version for record in self.aliases}

    @cached_property
    def _ready_by_digest(self) -> Mapping[str, tuple[VersionRecord, ...]]:
        ready = sorted((r for r in self.versions if r.status == "ready"), key=lambda r: (r.name, -r.version))
        return _grouped(
            (digest, record) for record in ready for digest in (record.package_digest, record.weights_digest)
        )


class Registry(Protocol):
    """Shared by threads and processes. Every method may raise RegistryUnavailable; then nothing was changed.

    `actor` and `reason` of the writing methods go into the audit log.
    """

    def revision(self) -> Revision:
        """Epoch and generation: cheap enough to ask every second."""

    def snapshot(self) -> Snapshot:
        """Everything, consistent; the same object again while nothing has changed."""

    def add_version(
        self, name: str, package: PackageInfo, *, status: Literal["staged", "ready"] = "ready", actor: str = "system"
    ) -> VersionRecord:
        """Number a package under a name. The same package under the same name gives the version it already has.

        Raises: InvalidReference for a name or digest of the wrong form.
        """

    def set_status(
        self, name: str, version: int, status: Status, *, reason: str | None = None, actor: str = "system"
    ) -> VersionRecord:
        """Move a version on. Of several callers that ask for the same step one succeeds.

        Raises: AdapterNotFound; Conflict when TRANSITIONS has no such step, or an alias still names the version.
        """

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
        """Let an alias name a ready version, or with None take it away. Compare-and-swap where `expect` is given.

        Raises: InvalidReference; AdapterNotFound; Conflict when `expect` is not what is there, or the version is not ready.
        """

    def add_gallery_version(
        self,
        name: str,
        *,
        embedding_key: str,
        adapter: str,
        adapter_name: str | None = None,
        status: Literal["building", "ready"] = "ready",
        actor: str = "system",
    ) -> GalleryRecord:
        """Number a new version of a gallery. `adapter` is a weights digest or `__base__`. Raises: InvalidReference."""

    def set_gallery_status(
        self, name: str, version: int, status: GalleryStatus, *, reason: str | None = None, actor: str = "system"
    ) -> GalleryRecord:
        """Move a gallery version on. Raises: NotFound; Conflict when there is no such step, or the version is live."""

    def set_live_gallery(
        self,
        name: str,
        version: int | None,
        *,
        expect: Expect = UNSET,
        reason: str | None = None,
        actor: str = "system",
    ) -> GalleryRecord | None:
        """Make a ready version the live one, or with None make none live. Compare-and-swap where `expect` is given.

        Raises: NotFound; Conflict when `expect` is not the live version, or the version is not ready.
        """

    def audit(self, *, limit: int = 100) -> tuple[AuditRecord, ...]:
        """The latest changes, newest first."""

    def close(self) -> None:
        """Let go of files and connections. Calling it twice is fine."""


# The rules of writing, as functions of the state before. Every implementation asks them inside its transaction.


def checked_version(name: str, package: PackageInfo) -> None:
    """Refuse a name or digests of the wrong form. Raises: InvalidReference."""
    check_name(name)
    check_digest(package.package_digest, param="package_digest")
    check_digest(package.weights_digest, param="weights_digest")


def known_version(snapshot: Snapshot, name: str, package_digest: str) -> VersionRecord | None:
    """The version under which a name already holds this package, unless that one was deleted."""
    records = snapshot.adapters.get(name, ())
    return next((record for record in records if record.package_digest == package_digest), None)


def next_version(records: Iterable[VersionRecord] | Iterable[GalleryRecord], name: str) -> int:
    """The number after all that a name ever had; `records` include the deleted ones."""
    return max((record.version for record in records if record.name == name), default=0) + 1


def check_status_step(snapshot: Snapshot, name: str, version: int, status: Status) -> VersionRecord:
    """The version as it is, when it may move on to `status`. Raises: AdapterNotFound, Conflict."""
    record = snapshot.version(name, version)
    if status not in TRANSITIONS[record.status]:
        raise Conflict(f"{record.reference} is {record.status} and cannot become {status}", param="status")
    aliases = [alias for alias, number in snapshot.aliases_of(name).items() if number == version]
    if aliases:
        raise Conflict(
            f"{record.reference} cannot become {status} while {_shortened(aliases)} names it; move the alias first",
            param="status",
        )
    return record


def check_alias_step(snapshot: Snapshot, name: str, alias: str, version: int | None, expect: Expect) -> int | None:
    """The version an alias names now, when it may name `version` instead. Raises: see `Registry.set_alias`."""
    check_name(name)
    check_alias(alias)
    if name not in snapshot.adapters:
        raise AdapterNotFound(f"no adapter {name!r}; {_known(name, snapshot.adapters)}", param="name")
    before = snapshot.aliases_of(name).get(alias)
    if expect is not UNSET and expect != before:
        raise Conflict(f"{name}@{alias} names {_number(before)}, not {_number(expect)} as expected", param="expect")
    if version is not None:
        record = snapshot.version(name, version)
        if record.status != "ready":
            raise Conflict(
                f"{record.reference} is {record.status}; only a ready version can be served", param="version"
            )
    return before


def checked_gallery(name: str, embedding_key: str, adapter: str, adapter_name: str | None) -> None:
    """Refuse a gallery version whose names or digests have the wrong form. Raises: InvalidReference."""
    check_name(name)
    if not embedding_key:
        raise InvalidReference("a gallery version needs an embedding key", param="embedding_key")
    if adapter != BASE_ADAPTER:
        check_digest(adapter, param="adapter")
    if adapter_name is not None:
        check_name(adapter_name, param="adapter_name")


def check_gallery_step(snapshot: Snapshot, name: str, version: int, status: GalleryStatus) -> GalleryRecord:
    """The gallery version as it is, when it may move on to `status`. Raises: NotFound, Conflict."""
    record = snapshot.gallery(name, version)
    if status not in GALLERY_TRANSITIONS[record.status]:
        raise Conflict(f"gallery {name}@{version} is {record.status} and cannot become {status}", param="status")
    if record.live:
        raise Conflict(f"gallery {name}@{version} cannot become {status} while it is live", param="status")
    return record


def check_live_step(
    snapshot: Snapshot, name: str, version: int | None, expect: Expect
) -> tuple[GalleryRecord | None, GalleryRecord | None]:
    """The live version now and the one to be, when the step may be taken. Raises: see `Registry.set_live_gallery`."""
    check_name(name)
    after = snapshot.gallery(name, version) if version is not None else None
    if name not in snapshot.gallery_versions:
        raise NotFound(f"no gallery {name!r}; {_known(name, snapshot.gallery_versions)}", param="name")
    before = next((record for record in snapshot.gallery_versions[name] if record.live), None)
    number = before.version if before else None
    if expect is not UNSET and expect != number:
        raise Conflict(f"the live {name!r} is {_number(number)}, not {_number(expect)} as expected", param="expect")
    if after is not None and after.status != "ready":
        raise Conflict(f"gallery {name}@{version} is {after.status}; only a ready version can be live", param="version")
    return before, after


_Record = TypeVar("_Record")


def _grouped(pairs: Iterable[tuple[str, _Record]]) -> dict[str, tuple[_Record, ...]]:
    groups: dict[str, list[_Record]] = {}
    for key, record in pairs:
        groups.setdefault(key, []).append(record)
    return {key: tuple(records) for key, records in groups.items()}


def _known(wanted: str, names: Iterable[str]) -> str:
    """What an error says beside "no such": names much like the wanted one, else the first few."""
    known = list(names)
    near = difflib.get_close_matches(wanted, list(islice(known, MAX_COMPARED)), n=3)
    if near:
        return f"nearest: {', '.join(near)}"
    return f"known: {_shortened(known)}" if known else "there are none"


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{', '.join(names[:MAX_NAMED])}{more}"


def _number(version: int | None) -> str:
    return "no version" if version is None else f"version {version}"
