"""What a registry needs of its storage: a map of records, a log that only grows, a revision, and who is alive.

Storage knows no rules. It takes a change whole when nothing else happened since the state it was decided on, and says
so when something did; `adapters.registry.registry` decides and tries again. Every method may raise RegistryUnavailable.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from adapters.registry.records import AuditRecord, Replica, Revision

KEPT_TIPS = 10_000  # changes after which a store forgets whether a reader's history is its own


class Write(NamedTuple):
    """A record to be kept as text, or with None to be dropped."""

    kind: str
    key: str
    text: str | None


@dataclass(frozen=True)
class Changes:
    """What a store holds, or what changed there since a revision.

    revision    where it stands now
    lineage     epochs this one was restored from, the oldest first
    continues   whether the revision asked about belongs to this history; if not, `writes` and `log` are everything
    now         seconds since 1970 by the store's clock, the one all replicas share
    """

    revision: Revision
    lineage: tuple[str, ...]
    continues: bool
    writes: tuple[Write, ...]
    log: tuple[AuditRecord, ...]
    now: float


@dataclass(frozen=True)
class Contents:
    """A whole registry, to be put where it was lost."""

    revision: Revision
    lineage: tuple[str, ...]
    writes: tuple[Write, ...]
    log: tuple[AuditRecord, ...]


class Store(Protocol):
    """Where the records of a registry are. Shared by threads and processes.

    `is_shared`: a server that replicas of several hosts share, rather than a file of one host.
    """

    is_shared: bool

    def create(self, revision: Revision) -> None:
        """Begin an empty registry at this revision, unless there is one."""

    def revision(self) -> Revision | None:
        """Where it stands: cheap enough to ask every second. None: it holds nothing, not even an empty registry."""

    def changes(self, since: Revision | None) -> Changes | None:
        """What changed since a revision; everything when there is none, or when it is of another history."""

    def commit(self, base: Revision, tip: str, writes: Sequence[Write], log: Sequence[AuditRecord]) -> bool:
        """Take a change that was decided on `base`: all of it as generation + 1, or, when the store moved on, nothing.

        Safe to call again with the same `tip` when it is not known whether the first call arrived.
        """

    def replace(self, expect: Revision | None, contents: Contents) -> bool:
        """Put a whole registry in place of what is there, when that is still at `expect`."""

    def audit(self, limit: int) -> tuple[AuditRecord, ...]:
        """The latest changes, newest first."""

    def beat(self, replica: Replica) -> None:
        """A sign of life. Raises no generation."""

    def replicas(self) -> tuple[Replica, ...]:
        """The last sign of life of each replica and its age, by id."""

    def forget(self, replica_id: str) -> None:
        """A replica that left, or is long gone."""

    def wait(self, timeout_s: float) -> None:
        """Return when something may have changed, after `timeout_s` at the latest."""

    def close(self) -> None:
        """Let go of files and connections. Calling it twice is fine."""
