"""The registry of one host: a SQLite file on a local disk, shared by any number of processes and threads.

Write-ahead logging lets readers go on while one writer works; writers queue (`BEGIN IMMEDIATE`) up to a timeout. Every
commit is synced, so that a power cut cannot take a generation back. A file that is removed or replaced under a running
process is noticed at the next call, and neither made anew nor opened: a lost registry is not an empty one.
"""

import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Literal

from adapters.errors import RegistryUnavailable
from adapters.registry.base import (
    UNSET,
    AliasRecord,
    AuditRecord,
    Expect,
    GalleryRecord,
    GalleryStatus,
    PackageInfo,
    Revision,
    Snapshot,
    Status,
    VersionRecord,
    check_alias_step,
    check_gallery_step,
    check_live_step,
    check_status_step,
    checked_gallery,
    checked_version,
    known_version,
    next_version,
)

SCHEMA_VERSION = 1
APPLICATION_ID = 0x41644272  # "AdBr" in the file's header: this SQLite file is a registry
BUSY_TIMEOUT_S = 5.0

SCHEMA = (
    """CREATE TABLE meta (
        id INTEGER PRIMARY KEY CHECK (id = 1),
        epoch TEXT NOT NULL,
        generation INTEGER NOT NULL
    )""",
    """CREATE TABLE versions (
        name TEXT NOT NULL,
        version INTEGER NOT NULL CHECK (version > 0),
        package_digest TEXT NOT NULL,
        weights_digest TEXT NOT NULL,
        family TEXT NOT NULL,
        task TEXT NOT NULL,
        rank INTEGER NOT NULL,
        status TEXT NOT NULL,
        reason TEXT,
        created_at REAL NOT NULL,
        PRIMARY KEY (name, version)
    )""",
    "CREATE UNIQUE INDEX versions_by_package ON versions (name, package_digest) WHERE status != 'deleted'",
    """CREATE TABLE aliases (
        name TEXT NOT NULL,
        alias TEXT NOT NULL,
        version INTEGER NOT NULL,
        updated_at REAL NOT NULL,
        PRIMARY KEY (name, alias),
        FOREIGN KEY (name, version) REFERENCES versions (name, version)
    )""",
    """CREATE TABLE galleries (
        name TEXT NOT NULL,
        version INTEGER NOT NULL CHECK (version > 0),
        embedding_key TEXT NOT NULL,
        adapter TEXT NOT NULL,
        adapter_name TEXT,
        status TEXT NOT NULL,
        reason TEXT,
        created_at REAL NOT NULL,
        PRIMARY KEY (name, version)
    )""",
    """CREATE TABLE live_galleries (
        name TEXT PRIMARY KEY,
        version INTEGER NOT NULL,
        FOREIGN KEY (name, version) REFERENCES galleries (name, version)
    )""",
    """CREATE TABLE audit (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        generation INTEGER NOT NULL,
        at REAL NOT NULL,
        actor TEXT NOT NULL,
        action TEXT NOT NULL,
        subject TEXT NOT NULL,
        "before" TEXT,
        "after" TEXT,
        reason TEXT
    )""",
    "CREATE TRIGGER audit_kept BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'the audit log only grows'); END",
    "CREATE TRIGGER audit_fixed BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'the audit log only grows'); END",
)

# Columns in the order of the records' fields.
READ_VERSIONS = """SELECT name, version, package_digest, weights_digest, family, task, rank, status, reason, created_at
    FROM versions ORDER BY name, version"""
READ_ALIASES = "SELECT name, alias, version, updated_at FROM aliases ORDER BY name, alias"
READ_GALLERIES = """SELECT name, version, embedding_key, adapter, adapter_name, status, reason, created_at,
    EXISTS (SELECT 1 FROM live_galleries AS live WHERE live.name = g.name AND live.version = g.version)
    FROM galleries AS g ORDER BY name, version"""
READ_AUDIT = """SELECT generation, at, actor, action, subject, "before", "after", reason
    FROM audit ORDER BY id DESC LIMIT ?"""


class SqliteRegistry:
    """See Registry. `path` is made when there is no file; its folder must be on a local disk, as locks need one."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        busy_timeout_s: float = BUSY_TIMEOUT_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = Path(path).absolute()
        self._clock = clock
        # Two connections: a thread that waits for its turn to write holds up no reader.
        self._reader = _Database(self.path, busy_timeout_s)
        self._writer = _Database(self.path, busy_timeout_s)
        self._cached: Snapshot | None = None
        self._writer.create()

    def revision(self) -> Revision:
        """See Registry."""
        with self._reader.connection() as connection:
            return _read_revision(connection)

    def snapshot(self) -> Snapshot:
        """See Registry."""
        with self._reader.connection() as connection, _transaction(connection, "DEFERRED"):
            return self._read_snapshot(connection)

    def add_version(
        self, name: str, package: PackageInfo, *, status: Literal["staged", "ready"] = "ready", actor: str = "system"
    ) -> VersionRecord:
        """See Registry."""
        checked_version(name, package)
        with self._changing(actor) as change:
            return change.add_version(name, package, status)

    def set_status(
        self, name: str, version: int, status: Status, *, reason: str | None = None, actor: str = "system"
    ) -> VersionRecord:
        """See Registry."""
        with self._changing(actor) as change:
            return change.set_status(name, version, status, reason)

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
        """See Registry."""
        with self._changing(actor) as change:
            return change.set_alias(name, alias, version, expect, reason)

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
        """See Registry."""
        checked_gallery(name, embedding_key, adapter, adapter_name)
        with self._changing(actor) as change:
            return change.add_gallery_version(name, embedding_key, adapter, adapter_name, status)

    def set_gallery_status(
        self, name: str, version: int, status: GalleryStatus, *, reason: str | None = None, actor: str = "system"
    ) -> GalleryRecord:
        """See Registry."""
        with self._changing(actor) as change:
            return change.set_gallery_status(name, version, status, reason)

    def set_live_gallery(
        self,
        name: str,
        version: int | None,
        *,
        expect: Expect = UNSET,
        reason: str | None = None,
        actor: str = "system",
    ) -> GalleryRecord | None:
        """See Registry."""
        with self._changing(actor) as change:
            return change.set_live_gallery(name, version, expect, reason)

    def audit(self, *, limit: int = 100) -> tuple[AuditRecord, ...]:
        """See Registry."""
        with self._reader.connection() as connection:
            return tuple(AuditRecord(*row) for row in connection.execute(READ_AUDIT, (max(0, limit),)))

    def close(self) -> None:
        """See Registry."""
        self._reader.close()
        self._writer.close()

    @contextmanager
    def _changing(self, actor: str) -> Iterator["_Change"]:
        with self._writer.connection() as connection, _transaction(connection, "IMMEDIATE"):
            change = _Change(connection, self._read_snapshot(connection), actor, self._clock())
            yield change
            change.finish()

    def _read_snapshot(self, connection: sqlite3.Connection) -> Snapshot:
        revision, cached = _read_revision(connection), self._cached
        if cached is not None and cached.revision == revision:
            return cached
        snapshot = Snapshot(
            revision.epoch,
            revision.generation,
            tuple(VersionRecord(*row) for row in connection.execute(READ_VERSIONS)),
            tuple(AliasRecord(*row) for row in connection.execute(READ_ALIASES)),
            tuple(GalleryRecord(*(*row[:-1], bool(row[-1]))) for row in connection.execute(READ_GALLERIES)),
        )
        self._cached = snapshot  # read before this transaction wrote anything, so it holds for everybody
        return snapshot


class _Change:
    """One write transaction: steps that happen together, each decided on the state `before` all of them."""

    def __init__(self, connection: sqlite3.Connection, before: Snapshot, actor: str, at: float) -> None:
        self.connection = connection
        self.before = before
        self.actor = actor
        self.at = at
        self.generation = before.generation + 1
        self.is_empty = True

    def finish(self) -> None:
        """Raise the generation, unless nothing was changed."""
        if not self.is_empty:
            self.connection.execute("UPDATE meta SET generation = ?", (self.generation,))

    def add_version(self, name: str, package: PackageInfo, status: Status) -> VersionRecord:
        known = known_version(self.before, name, package.package_digest)
        if known is not None:
            return known
        number = next_version(self.before.versions, name)
        record = VersionRecord(name, number, **asdict(package), status=status, reason=None, created_at=self.at)
        self.connection.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", astuple(record))
        self._log("add_version", f"{name}@{number}", None, f"{status} {package.package_digest}", None)
        return record

    def set_status(self, name: str, version: int, status: Status, reason: str | None) -> VersionRecord:
        record = check_status_step(self.before, name, version, status)
        self.connection.execute(
            "UPDATE versions SET status = ?, reason = ? WHERE name = ? AND version = ?", (status, reason, name, version)
        )
        self._log("set_status", f"{name}@{version}", record.status, status, reason)
        return replace(record, status=status, reason=reason)

    def set_alias(
        self, name: str, alias: str, version: int | None, expect: Expect, reason: str | None
    ) -> AliasRecord | None:
        before = check_alias_step(self.before, name, alias, version, expect)
        if before == version:
            return next((r for r in self.before.aliases if (r.name, r.alias) == (name, alias)), None)
        self._log("set_alias", f"{name}@{alias}", before, version, reason)
        if version is None:
            self.connection.execute("DELETE FROM aliases WHERE name = ? AND alias = ?", (name, alias))
            return None
        self.connection.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?, ?, ?)", (name, alias, version, self.at))
        return AliasRecord(name, alias, version, self.at)

    def add_gallery_version(
        self, name: str, embedding_key: str, adapter: str, adapter_name: str | None, status: GalleryStatus
    ) -> GalleryRecord:
        number = next_version(self.before.galleries, name)
        self.connection.execute(
            "INSERT INTO galleries VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (name, number, embedding_key, adapter, adapter_name, status, None, self.at),
        )
        self._log("add_gallery_version", f"{name}@{number}", None, f"{status} {adapter}", None)
        return GalleryRecord(name, number, embedding_key, adapter, adapter_name, status, None, self.at, live=False)

    def set_gallery_status(self, name: str, version: int, status: GalleryStatus, reason: str | None) -> GalleryRecord:
        record = check_gallery_step(self.before, name, version, status)
        self.connection.execute(
            "UPDATE galleries SET status = ?, reason = ? WHERE name = ? AND version = ?",
            (status, reason, name, version),
        )
        self._log("set_gallery_status", f"{name}@{version}", record.status, status, reason)
        return replace(record, status=status, reason=reason)

    def set_live_gallery(
        self, name: str, version: int | None, expect: Expect, reason: str | None
    ) -> GalleryRecord | None:
        before, after = check_live_step(self.before, name, version, expect)
        if before == after:
            return after
        self._log("set_live_gallery", name, before.version if before else None, version, reason)
        if after is None:
            self.connection.execute("DELETE FROM live_galleries WHERE name = ?", (name,))
            return None
        self.connection.execute("INSERT OR REPLACE INTO live_galleries VALUES (?, ?)", (name, version))
        return replace(after, live=True)

    def _log(
        self, action: str, subject: str, before: str | int | None, after: str | int | None, reason: str | None
    ) -> None:
        self.is_empty = False
        self.connection.execute(
            "INSERT INTO audit VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?)",
            (self.generation, self.at, self.actor, action, subject, before, after, reason),
        )


class _Database:
    """One connection, for one thread at a time, that notices when the file it stands on is gone."""

    def __init__(self, path: Path, busy_timeout_s: float) -> None:
        self._path = path
        self._busy_timeout_s = busy_timeout_s
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._closed = False

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """The connection, for the length of the block. Raises: RegistryUnavailable for whatever goes wrong in SQLite."""
        with self._lock, self._translated():
            yield self._current()

    def create(self) -> None:
        """Make the file and its tables where there are none yet. Raises: RegistryUnavailable."""
        with self._lock, self._translated():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            connection = self._connection = self._connect("rwc")
            if _is_blank(connection):
                _set_write_ahead(connection, self._busy_timeout_s)
                with _transaction(connection, "IMMEDIATE"):
                    if _is_blank(connection):  # nobody else was quicker
                        _create_schema(connection)
            _check_schema(connection)
            self._identity = self._find_identity()

    def close(self) -> None:
        """Close for good."""
        with self._lock:
            self._drop()
            self._closed = True

    def _current(self) -> sqlite3.Connection:
        if self._closed:
            raise RegistryUnavailable("the registry is closed")
        identity = self._find_identity()
        if self._identity not in (None, identity):
            # Opening the new file would replay the old one's write-ahead log over it.
            raise RegistryUnavailable(
                f"{self._path.name} was replaced while in use: stop every process, remove its -wal and -shm files, restart"
            )
        if self._connection is None:
            self._connection = self._connect("rw")
            _check_schema(self._connection)
            self._identity = identity
        return self._connection

    def _find_identity(self) -> tuple[int, int]:
        status = os.stat(self._path)
        return status.st_dev, status.st_ino

    def _connect(self, mode: Literal["rw", "rwc"]) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self._path.as_uri()}?mode={mode}",
            uri=True,
            timeout=self._busy_timeout_s,
            isolation_level=None,  # transactions begin where we say so
            check_same_thread=False,  # the lock sees to that
        )
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except RegistryUnavailable:
            self._drop()
            raise
        except (sqlite3.Error, OSError) as error:
            self._drop()  # the next call starts afresh
            raise RegistryUnavailable(f"registry {self._path.name}: {error}") from error


@contextmanager
def _transaction(connection: sqlite3.Connection, kind: Literal["DEFERRED", "IMMEDIATE"]) -> Iterator[None]:
    connection.execute(f"BEGIN {kind}")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _read_revision(connection: sqlite3.Connection) -> Revision:
    row = connection.execute("SELECT epoch, generation FROM meta").fetchone()
    if row is None:
        raise RegistryUnavailable("the registry has lost its epoch")
    return Revision(*row)


def _set_write_ahead(connection: sqlite3.Connection, timeout_s: float) -> None:
    """Switch the file to write-ahead logging. Waits by itself: SQLite does not when several switch at once."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        except sqlite3.OperationalError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.01)
            continue
        if mode != "wal":
            raise RegistryUnavailable(f"the registry needs write-ahead logging, which its file system refuses ({mode})")
        return


def _is_blank(connection: sqlite3.Connection) -> bool:
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    return bool(tables == 0 and _pragma(connection, "user_version") == 0)


def _create_schema(connection: sqlite3.Connection) -> None:
    for statement in SCHEMA:
        connection.execute(statement)
    connection.execute("INSERT INTO meta VALUES (1, ?, 0)", (uuid.uuid4().hex,))
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _check_schema(connection: sqlite3.Connection) -> None:
    if _pragma(connection, "application_id") != APPLICATION_ID:
        raise RegistryUnavailable("the registry file holds no registry")
    version = _pragma(connection, "user_version")
    if version != SCHEMA_VERSION:
        raise RegistryUnavailable(f"the registry has schema version {version}; this program knows {SCHEMA_VERSION}")


def _pragma(connection: sqlite3.Connection, name: Literal["application_id", "user_version"]) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])
