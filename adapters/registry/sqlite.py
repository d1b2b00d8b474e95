"""The registry of one host: a SQLite file on a local disk, shared by any number of processes and threads.

Write-ahead logging lets readers go on while one writer works; writers queue (`BEGIN IMMEDIATE`) up to a timeout. Every
commit is synced, so that a power cut cannot take a generation back. A file that is removed or replaced under a running
process is noticed at the next call, and neither made anew nor opened: a lost registry is not an empty one.
"""

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Literal

from adapters.errors import RegistryUnavailable
from adapters.registry.records import AuditRecord, Replica, Revision
from adapters.registry.store import KEPT_TIPS, Changes, Contents, Write

SCHEMA_VERSION = 2
APPLICATION_ID = 0x41644272  # "AdBr" in the file's header: this SQLite file is a registry
BUSY_TIMEOUT_S = 5.0
POLL_S = 0.25  # how often a waiting reader looks whether the file changed

SCHEMA = (
    """CREATE TABLE meta (
        id INTEGER PRIMARY KEY CHECK (id = 1),
        epoch TEXT NOT NULL,
        generation INTEGER NOT NULL,
        tip TEXT NOT NULL,
        lineage TEXT NOT NULL
    )""",
    "CREATE TABLE tips (generation INTEGER PRIMARY KEY, tip TEXT NOT NULL)",
    # A record that was dropped stays as a row without text, so that readers learn of it.
    """CREATE TABLE records (
        kind TEXT NOT NULL,
        key TEXT NOT NULL,
        text TEXT,
        generation INTEGER NOT NULL,
        PRIMARY KEY (kind, key)
    )""",
    "CREATE INDEX records_by_generation ON records (generation)",
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
    "CREATE INDEX audit_by_generation ON audit (generation)",
    "CREATE TRIGGER audit_kept BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'the audit log only grows'); END",
    "CREATE TRIGGER audit_fixed BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'the audit log only grows'); END",
    """CREATE TABLE replicas (
        id TEXT PRIMARY KEY,
        generation INTEGER NOT NULL,
        is_serving INTEGER NOT NULL,
        details TEXT NOT NULL,
        at REAL NOT NULL
    )""",
)

AUDIT_COLUMNS = 'generation, at, actor, action, subject, "before", "after", reason'


class SqliteStore:
    """See Store. `path` is made when there is no file; its folder must be on a local disk, as locks need one."""

    is_shared = False

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
        self._seen_version = 0

    def create(self, revision: Revision) -> None:
        """See Store."""
        self._writer.create(lambda connection: _begin(connection, Contents(revision, (), (), ())))

    def revision(self) -> Revision | None:
        """See Store."""
        if not self.path.exists():
            return None
        with self._reader.connection() as connection:
            return _read_meta(connection)[0]

    def changes(self, since: Revision | None) -> Changes | None:
        """See Store."""
        if not self.path.exists():
            return None
        with self._reader.connection() as connection, _transaction(connection, "DEFERRED"):
            revision, lineage = _read_meta(connection)
            continues = since is not None and _is_ancestor(connection, since, revision)
            after = since.generation if since is not None and continues else -1
            if since == revision:
                return Changes(revision, lineage, True, (), (), self._clock())
            rows = connection.execute("SELECT kind, key, text FROM records WHERE generation > ?", (after,))
            writes = tuple(Write(*row) for row in rows if continues or row[2] is not None)
            log = connection.execute(f"SELECT {AUDIT_COLUMNS} FROM audit WHERE generation > ? ORDER BY id", (after,))
            return Changes(revision, lineage, continues, writes, tuple(AuditRecord(*row) for row in log), self._clock())

    def commit(self, base: Revision, tip: str, writes: Sequence[Write], log: Sequence[AuditRecord]) -> bool:
        """See Store."""
        with self._writer.connection() as connection, _transaction(connection, "IMMEDIATE"):
            revision, _ = _read_meta(connection)
            if revision.tip == tip:
                return True
            if revision != base:
                return False
            generation = revision.generation + 1
            connection.execute("UPDATE meta SET generation = ?, tip = ?", (generation, tip))
            connection.execute("INSERT INTO tips VALUES (?, ?)", (generation, tip))
            connection.execute("DELETE FROM tips WHERE generation <= ?", (generation - KEPT_TIPS,))
            _write(connection, generation, writes, log)
            return True

    def replace(self, expect: Revision | None, contents: Contents) -> bool:
        """See Store. Only where there is no file: one that is there is the operator's to move away."""
        if self.path.exists() or expect is not None:
            return False
        return self._writer.create(lambda connection: _begin(connection, contents))

    def audit(self, limit: int) -> tuple[AuditRecord, ...]:
        """See Store."""
        with self._reader.connection() as connection:
            rows = connection.execute(f"SELECT {AUDIT_COLUMNS} FROM audit ORDER BY id DESC LIMIT ?", (limit,))
            return tuple(AuditRecord(*row) for row in rows)

    def beat(self, replica: Replica) -> None:
        """See Store."""
        row = (replica.id, replica.generation, replica.is_serving, json.dumps(dict(replica.details)), self._clock())
        with self._writer.connection() as connection:
            connection.execute("INSERT OR REPLACE INTO replicas VALUES (?, ?, ?, ?, ?)", row)

    def replicas(self) -> tuple[Replica, ...]:
        """See Store."""
        now = self._clock()
        with self._reader.connection() as connection:
            rows = connection.execute("SELECT id, generation, is_serving, details, at FROM replicas ORDER BY id")
            return tuple(
                Replica(name, generation, bool(serving), json.loads(details), max(0.0, now - at))
                for name, generation, serving, details, at in rows
            )

    def forget(self, replica_id: str) -> None:
        """See Store."""
        with self._writer.connection() as connection:
            connection.execute("DELETE FROM replicas WHERE id = ?", (replica_id,))

    def wait(self, timeout_s: float) -> None:
        """See Store. Looks a few times a second: a change of the file costs a look at one number."""
        end = time.monotonic() + timeout_s
        while True:
            with self._reader.connection() as connection:
                version = int(connection.execute("PRAGMA data_version").fetchone()[0])
            if version != self._seen_version:
                self._seen_version = version
                return
            left = end - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(POLL_S, left))

    def close(self) -> None:
        """See Store."""
        self._reader.close()
        self._writer.close()


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

    def create(self, fill: Callable[[sqlite3.Connection], None]) -> bool:
        """Make the file and its tables, and fill them, where there are none yet; whether this call did.

        Raises: RegistryUnavailable.
        """
        with self._lock, self._translated():
            is_mine = False
            self._path.parent.mkdir(parents=True, exist_ok=True)
            connection = self._connection = self._connect("rwc")
            if _is_blank(connection):
                _set_write_ahead(connection, self._busy_timeout_s)
                with _transaction(connection, "IMMEDIATE"):
                    if _is_blank(connection):  # nobody else was quicker
                        fill(connection)
                        is_mine = True
            _check_schema(connection)
            self._identity = self._find_identity()
            return is_mine

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


def _read_meta(connection: sqlite3.Connection) -> tuple[Revision, tuple[str, ...]]:
    """(revision, lineage)."""
    row = connection.execute("SELECT epoch, generation, tip, lineage FROM meta").fetchone()
    if row is None:
        raise RegistryUnavailable("the registry has lost its epoch")
    return Revision(*row[:3]), tuple(json.loads(row[3]))


def _is_ancestor(connection: sqlite3.Connection, since: Revision, now: Revision) -> bool:
    """Whether the history that is at `now` went through `since`; so long ago that nobody knows counts as yes."""
    if since.epoch != now.epoch or since.generation > now.generation:
        return False
    row = connection.execute("SELECT tip FROM tips WHERE generation = ?", (since.generation,)).fetchone()
    return row is None or row[0] == since.tip


def _write(
    connection: sqlite3.Connection, generation: int, writes: Sequence[Write], log: Sequence[AuditRecord]
) -> None:
    connection.executemany(
        "INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)", [(*write, generation) for write in writes]
    )
    connection.executemany(
        f"INSERT INTO audit ({AUDIT_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", [astuple(record) for record in log]
    )


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


def _begin(connection: sqlite3.Connection, contents: Contents) -> None:
    """Tables, and what is in them to begin with."""
    for statement in SCHEMA:
        connection.execute(statement)
    epoch, generation, tip = contents.revision
    connection.execute(
        "INSERT INTO meta VALUES (1, ?, ?, ?, ?)", (epoch, generation, tip, json.dumps(contents.lineage))
    )
    connection.execute("INSERT INTO tips VALUES (?, ?)", (generation, tip))
    _write(connection, generation, contents.writes, contents.log)
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
