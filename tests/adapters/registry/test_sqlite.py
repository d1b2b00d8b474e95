import multiprocessing
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from adapters.errors import RegistryUnavailable
from adapters.registry import PackageInfo, Registry, Revision
from adapters.registry.sqlite import SqliteStore


def package(number: int) -> PackageInfo:
    return PackageInfo(f"sha256:{number:064x}", f"sha256:{number + 1000:064x}", "uniadapter", "vqa", 8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sub folder?#%" / "registry.db"


@pytest.fixture
def registry(path: Path) -> Iterator[Registry]:
    with closing(opened(path, busy_timeout_s=0.1, clock=lambda: 12.5)) as registry:
        yield registry


def opened(path: Path, **options: object) -> Registry:
    return Registry(SqliteStore(path, **options))  # type: ignore[arg-type]


def raw(path: Path) -> closing[sqlite3.Connection]:
    return closing(sqlite3.connect(path, isolation_level=None, timeout=0.1))


def test_state_outlives_the_process_and_the_epoch_stays(path: Path) -> None:
    with closing(opened(path)) as registry:
        registry.add_version("a", package(1))
        before = registry.snapshot()
    with closing(opened(path)) as registry:
        assert registry.snapshot() == before


def test_times_come_from_the_clock(registry: Registry) -> None:
    assert registry.add_version("a", package(1)).created_at == pytest.approx(12.5, abs=0.1)
    assert registry.audit()[0].at == pytest.approx(12.5, abs=0.1)


def test_commits_are_synced_and_readers_are_not_blocked_by_a_writer(registry: Registry, path: Path) -> None:
    registry.add_version("a", package(1))
    with raw(path) as other:
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RegistryUnavailable, match="locked"):
            registry.add_version("a", package(2))
        assert registry.revision().generation == 1
        assert len(registry.snapshot().versions) == 1
        other.execute("ROLLBACK")
    assert registry.add_version("a", package(2)).version == 2
    with registry._store._writer.connection() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_change_that_fails_half_way_leaves_nothing(registry: Registry, path: Path) -> None:
    registry.add_version("a", package(1))
    before = registry.snapshot()
    with raw(path) as other:
        other.execute("CREATE TRIGGER no BEFORE UPDATE ON meta BEGIN SELECT RAISE(ABORT, 'disk on fire'); END")
    with pytest.raises(RegistryUnavailable, match="disk on fire"):
        registry.add_version("a", package(2))
    assert registry.snapshot() == before
    assert len(registry.audit()) == 1


def test_the_audit_log_cannot_be_rewritten(registry: Registry, path: Path) -> None:
    registry.add_version("a", package(1))
    with raw(path) as other:
        for statement in ("DELETE FROM audit", "UPDATE audit SET actor = 'nobody'"):
            with pytest.raises(sqlite3.IntegrityError, match="only grows"):
                other.execute(statement)


def test_a_file_that_vanishes_is_a_lost_registry_not_an_empty_one(registry: Registry, path: Path) -> None:
    registry.add_version("a", package(1))
    path.unlink()
    with pytest.raises(RegistryUnavailable):
        registry.revision()
    with pytest.raises(RegistryUnavailable):
        registry.add_version("a", package(2))
    assert not path.exists()


def test_a_file_that_is_replaced_is_refused_until_the_right_one_is_back(
    registry: Registry, path: Path, tmp_path: Path
) -> None:
    registry.add_version("a", package(1))
    before = registry.snapshot()
    with closing(opened(tmp_path / "other.db")) as other:
        other.add_version("b", package(1))
    path.rename(tmp_path / "kept.db")
    (tmp_path / "other.db").rename(path)
    for _ in range(2):
        with pytest.raises(RegistryUnavailable, match="replaced while in use"):
            registry.revision()
        with pytest.raises(RegistryUnavailable, match="replaced while in use"):
            registry.add_version("a", package(2))
    (tmp_path / "kept.db").rename(path)
    assert registry.snapshot() == before
    assert registry.add_version("a", package(2)).version == 2


def test_a_lost_epoch_makes_the_registry_unavailable(registry: Registry, path: Path) -> None:
    with raw(path) as other:
        other.execute("DELETE FROM meta")
    with pytest.raises(RegistryUnavailable, match="lost its epoch"):
        registry.revision()


def test_a_damaged_file_is_unavailable_and_left_as_it_is(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(RegistryUnavailable, match="not a database"):
        opened(path)
    assert path.read_bytes() == b"no database at all" * 100


def test_damage_under_a_running_registry_is_unavailable(registry: Registry, path: Path) -> None:
    registry.add_version("a", package(1))
    registry.close()
    pages = bytearray(path.read_bytes())
    pages[4096:] = b"\xff" * (len(pages) - 4096)  # page 1 holds the schema, all others rows
    path.write_bytes(pages)
    with closing(opened(path)) as damaged:
        with pytest.raises(RegistryUnavailable, match="malformed"):
            damaged.snapshot()
        with pytest.raises(RegistryUnavailable, match="malformed"):
            damaged.add_version("a", package(2))


def test_a_folder_in_the_place_of_the_file_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(RegistryUnavailable):
        opened(tmp_path)


def test_another_programs_database_is_refused_untouched(path: Path) -> None:
    path.parent.mkdir(parents=True)
    with raw(path) as other:
        other.execute("CREATE TABLE recipes (name TEXT)")
    before = path.read_bytes()
    with pytest.raises(RegistryUnavailable, match="holds no registry"):
        opened(path)
    assert path.read_bytes() == before


def test_a_newer_schema_is_refused(registry: Registry, path: Path) -> None:
    with raw(path) as other:
        other.execute("PRAGMA user_version = 3")
    with pytest.raises(RegistryUnavailable, match="schema version 3; this program knows 2"):
        opened(path)


def create(path: Path) -> Revision:
    with closing(opened(path, busy_timeout_s=30)) as registry:
        return registry.revision()


def test_processes_that_create_at_once_share_one_epoch(path: Path) -> None:
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert len(set(pool.map(create, [path] * 12))) == 1
