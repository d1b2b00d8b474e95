"""What every registry must do, whatever stores it. A new implementation joins by its entry in BACKENDS."""

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from adapters.errors import AdapterNotFound, Conflict, InvalidReference, NotFound, RegistryUnavailable
from adapters.registry.base import (
    GALLERY_TRANSITIONS,
    TRANSITIONS,
    UNSET,
    AliasReference,
    Expect,
    PackageInfo,
    Registry,
    Status,
    VersionReference,
)
from adapters.registry.sqlite import SqliteRegistry


def open_sqlite(folder: Path) -> Registry:
    return SqliteRegistry(folder / "registry.db", busy_timeout_s=30)


BACKENDS: dict[str, Callable[[Path], Registry]] = {"sqlite": open_sqlite}


@dataclass
class Place:
    """Somewhere a registry lives, that can be opened any number of times, also from other processes."""

    backend: str
    folder: Path
    opened: list[Registry] = field(default_factory=list)

    def open(self) -> Registry:
        registry = BACKENDS[self.backend](self.folder)
        self.opened.append(registry)
        return registry


@pytest.fixture(params=list(BACKENDS))
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    place = Place(request.param, tmp_path)
    yield place
    for registry in place.opened:
        registry.close()


@pytest.fixture
def registry(place: Place) -> Registry:
    return place.open()


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


def package(number: int) -> PackageInfo:
    return PackageInfo(digest(number), digest(1000 + number), "uniadapter", "vqa", 8)


def add_gallery(registry: Registry, name: str = "clips") -> int:
    return registry.add_gallery_version(name, embedding_key="key", adapter=digest(1)).version


def test_starts_empty_at_generation_zero(registry: Registry) -> None:
    snapshot = registry.snapshot()
    assert snapshot.revision == registry.revision()
    assert snapshot.generation == 0
    assert snapshot.epoch
    assert (snapshot.versions, snapshot.aliases, snapshot.galleries, registry.audit()) == ((), (), (), ())


def test_versions_count_per_name(registry: Registry) -> None:
    numbers = [registry.add_version(name, package(i)).version for i, name in enumerate(["a", "a", "b", "a"])]
    assert numbers == [1, 2, 1, 3]
    assert [(r.name, r.version) for r in registry.snapshot().versions] == [("a", 1), ("a", 2), ("a", 3), ("b", 1)]


def test_a_record_reads_back_as_it_was_given(registry: Registry, place: Place) -> None:
    added = registry.add_version("vqa", package(1), status="staged")
    assert added.status == "staged" and added.reason is None
    assert PackageInfo(added.package_digest, added.weights_digest, added.family, added.task, added.rank) == package(1)
    assert place.open().snapshot().versions == (added,)


def test_the_same_package_is_the_same_version(registry: Registry) -> None:
    first = registry.add_version("a", package(1))
    registry.add_version("a", package(2))
    before = registry.revision()
    assert registry.add_version("a", package(1), status="staged") == first
    assert registry.revision() == before
    assert registry.add_version("b", package(1)).version == 1


def test_a_deleted_version_is_not_brought_back_and_its_number_not_used_again(registry: Registry) -> None:
    registry.add_version("a", package(1))
    registry.set_status("a", 1, "deleted")
    assert registry.add_version("a", package(1)).version == 2
    assert [r.status for r in registry.snapshot().versions] == ["deleted", "ready"]


@pytest.mark.parametrize("name", ["", "A", "../a", "a/b", "__base__", "a" * 65, "a..b", "a\n"])
def test_names_of_the_wrong_form_are_refused(registry: Registry, name: str) -> None:
    with pytest.raises(InvalidReference):
        registry.add_version(name, package(1))
    with pytest.raises(InvalidReference):
        registry.add_gallery_version(name, embedding_key="key", adapter=digest(1))
    with pytest.raises(InvalidReference):
        registry.set_alias(name, "prod", 1)
    with pytest.raises(InvalidReference):
        registry.set_live_gallery(name, 1)
    assert registry.revision().generation == 0


def test_digests_of_the_wrong_form_are_refused(registry: Registry) -> None:
    with pytest.raises(InvalidReference, match="no digest"):
        registry.add_version("a", PackageInfo("md5:0", digest(1), "uniadapter", "vqa", 8))
    with pytest.raises(InvalidReference, match="no digest"):
        registry.add_version("a", PackageInfo(digest(1), "0" * 64, "uniadapter", "vqa", 8))
    with pytest.raises(InvalidReference, match="no digest"):
        registry.add_gallery_version("clips", embedding_key="key", adapter="vqa")
    with pytest.raises(InvalidReference, match="embedding key"):
        registry.add_gallery_version("clips", embedding_key="", adapter=digest(1))


def test_every_change_raises_the_generation_by_one(registry: Registry) -> None:
    steps: list[Callable[[], object]] = [
        lambda: registry.add_version("a", package(1), status="staged"),
        lambda: registry.set_status("a", 1, "validating"),
        lambda: registry.set_status("a", 1, "ready"),
        lambda: registry.set_alias("a", "prod", 1),
        lambda: registry.set_alias("a", "prod", None),
        lambda: add_gallery(registry),
        lambda: registry.set_live_gallery("clips", 1),
        lambda: registry.set_live_gallery("clips", None),
        lambda: registry.set_gallery_status("clips", 1, "retired"),
    ]
    epoch = registry.revision().epoch
    for generation, step in enumerate(steps, start=1):
        step()
        assert registry.revision() == (epoch, generation) == registry.snapshot().revision


def test_changes_that_change_nothing_leave_generation_and_audit_alone(registry: Registry) -> None:
    registry.add_version("a", package(1))
    alias = registry.set_alias("a", "prod", 1)
    add_gallery(registry)
    registry.set_live_gallery("clips", 1)
    before = registry.revision(), registry.audit()
    assert registry.set_alias("a", "prod", 1) == alias
    assert registry.set_alias("a", "canary", None) is None
    live = registry.set_live_gallery("clips", 1)
    assert live is not None and live.live
    with pytest.raises(Conflict):
        registry.set_alias("a", "prod", None, expect=7)
    assert (registry.revision(), registry.audit()) == before


def test_snapshots_do_not_change_and_are_shared_while_nothing_does(registry: Registry) -> None:
    registry.add_version("a", package(1))
    before = registry.snapshot()
    assert registry.snapshot() is before
    registry.add_version("a", package(2))
    assert len(before.versions) == 1
    assert len(registry.snapshot().versions) == 2


def test_what_one_handle_writes_another_reads(registry: Registry, place: Place) -> None:
    other = place.open()
    assert other.revision() == registry.revision()
    other.snapshot()
    registry.add_version("vqa", package(1))
    registry.set_alias("vqa", "prod", 1)
    assert other.revision() == registry.revision()
    assert other.snapshot().resolve(AliasReference("vqa")).version == 1
    assert other.snapshot() == registry.snapshot()


@pytest.mark.parametrize(
    "path",
    [(), ("validating",), ("validating", "ready"), ("validating", "ready", "retired"), ("failed",), ("deleted",)],
)
def test_a_version_takes_only_the_steps_of_its_life(registry: Registry, path: tuple[Status, ...]) -> None:
    status = path[-1] if path else "staged"
    for target in TRANSITIONS:
        registry.add_version(target, package(1), status="staged")
        for step in path:
            registry.set_status(target, 1, step)
        if target in TRANSITIONS[status]:
            assert registry.set_status(target, 1, target, reason="why").status == target
            record = registry.snapshot().version(target, 1)
            assert (record.status, record.reason) == (target, "why")
        else:
            with pytest.raises(Conflict, match=f"{target}@1 is {status} and cannot become {target}"):
                registry.set_status(target, 1, target)
            assert registry.snapshot().version(target, 1).status == status


def test_a_version_an_alias_names_stays_ready(registry: Registry) -> None:
    registry.add_version("a", package(1))
    registry.set_alias("a", "prod", 1)
    registry.set_alias("a", "canary", 1)
    with pytest.raises(Conflict, match="while canary, prod names it"):
        registry.set_status("a", 1, "retired")
    registry.set_alias("a", "prod", None)
    registry.set_alias("a", "canary", None)
    assert registry.set_status("a", 1, "retired").status == "retired"


def test_an_alias_moves_only_from_where_it_is_expected(registry: Registry) -> None:
    for number in (1, 2, 3):
        registry.add_version("a", package(number))
    with pytest.raises(Conflict, match="a@prod names no version, not version 1 as expected"):
        registry.set_alias("a", "prod", 1, expect=1)
    registry.set_alias("a", "prod", 1, expect=None)
    with pytest.raises(Conflict, match="a@prod names version 1, not no version as expected"):
        registry.set_alias("a", "prod", 2, expect=None)
    with pytest.raises(Conflict):
        registry.set_alias("a", "prod", 3, expect=2)
    moved = registry.set_alias("a", "prod", 2, expect=1)
    assert moved is not None and moved.version == 2
    registry.set_alias("a", "prod", 3)
    assert registry.snapshot().aliases_of("a") == {"prod": 3}


def test_an_alias_names_a_ready_version_of_its_own_name(registry: Registry) -> None:
    registry.add_version("a", package(1), status="staged")
    registry.add_version("b", package(1))
    with pytest.raises(Conflict, match="a@1 is staged; only a ready version can be served"):
        registry.set_alias("a", "prod", 1)
    with pytest.raises(AdapterNotFound, match="'a' has no version 2"):
        registry.set_alias("a", "prod", 2)
    with pytest.raises(AdapterNotFound, match="no adapter 'c'"):
        registry.set_alias("c", "prod", None)
    with pytest.raises(AdapterNotFound, match="no adapter 'c'"):
        registry.set_status("c", 1, "retired")
    for alias in ("7", "Prod", "", "a b", "prod\n"):
        with pytest.raises(InvalidReference, match="no valid alias"):
            registry.set_alias("b", alias, 1)
    assert registry.snapshot().aliases == ()


def test_gallery_versions_and_the_live_one(registry: Registry, place: Place) -> None:
    first = registry.add_gallery_version("clips", embedding_key="k1", adapter=digest(1), adapter_name="retrieval")
    second = registry.add_gallery_version("clips", embedding_key="k2", adapter="__base__")
    assert (first.version, second.version, first.live) == (1, 2, False)
    with pytest.raises(NotFound, match="no live version"):
        registry.snapshot().gallery("clips")
    registry.set_live_gallery("clips", 1, expect=None)
    with pytest.raises(Conflict, match="the live 'clips' is version 1, not no version as expected"):
        registry.set_live_gallery("clips", 2, expect=None)
    moved = registry.set_live_gallery("clips", 2, expect=1)
    assert moved is not None and (moved.version, moved.live) == (2, True)
    read = place.open().snapshot()
    assert read.gallery("clips") == moved
    assert read.gallery("clips", 1) == first
    assert (first.embedding_key, first.adapter, first.adapter_name) == ("k1", digest(1), "retrieval")


def test_a_gallery_version_takes_only_the_steps_of_its_life(registry: Registry) -> None:
    registry.add_gallery_version("clips", embedding_key="k", adapter=digest(1), status="building")
    with pytest.raises(Conflict, match="clips@1 is building; only a ready version can be live"):
        registry.set_live_gallery("clips", 1)
    with pytest.raises(Conflict, match="cannot become retired"):
        registry.set_gallery_status("clips", 1, "retired")
    registry.set_gallery_status("clips", 1, "ready")
    registry.set_live_gallery("clips", 1)
    with pytest.raises(Conflict, match="while it is live"):
        registry.set_gallery_status("clips", 1, "deleted")
    registry.set_live_gallery("clips", None, expect=1)
    assert registry.set_gallery_status("clips", 1, "deleted").status == "deleted"
    assert not GALLERY_TRANSITIONS["deleted"]
    with pytest.raises(NotFound):
        registry.set_live_gallery("clips", 1)
    assert add_gallery(registry) == 2


def test_the_audit_log_tells_who_did_what_and_why(registry: Registry) -> None:
    registry.add_version("vqa", package(1), actor="importer")
    registry.add_version("vqa", package(2))
    registry.set_alias("vqa", "prod", 1, actor="ada")
    registry.set_alias("vqa", "prod", 2, actor="bob", reason="better on colours")
    last, *_, first = registry.audit()
    assert (last.actor, last.action, last.subject) == ("bob", "set_alias", "vqa@prod")
    assert (last.before, last.after, last.reason, last.generation) == ("1", "2", "better on colours", 4)
    assert (first.actor, first.action, first.subject, first.before) == ("importer", "add_version", "vqa@1", None)
    assert [record.generation for record in registry.audit()] == [4, 3, 2, 1]
    assert [record.generation for record in registry.audit(limit=2)] == [4, 3]
    assert registry.audit(limit=0) == ()


def test_one_handle_serves_many_threads(registry: Registry) -> None:
    start = threading.Barrier(8)

    def work(thread: int) -> None:
        start.wait()
        for index in range(5):
            registry.add_version("a", package(10 * thread + index))
            snapshot = registry.snapshot()
            assert len(snapshot.versions) == snapshot.generation

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert [r.version for r in registry.snapshot().versions] == list(range(1, 41))
    assert registry.revision().generation == 40


NUM_WORKERS = 4  # processes that start together


def race(backend: str, folder: Path, worker: int, num_packages: int, num_rounds: int) -> list[int]:
    """In a process of its own: add versions, then try to move an alias once per round. The rounds won."""
    registry = BACKENDS[backend](folder)
    (folder / f"ready-{worker}").touch()
    deadline = time.monotonic() + 60
    while len(list(folder.glob("ready-*"))) < NUM_WORKERS and time.monotonic() < deadline:
        time.sleep(0.001)
    try:
        for index in range(num_packages):
            registry.add_version("shared", package(worker * num_packages + index))
            registry.add_version("same", package(index))
        won = []
        for version in range(1, num_rounds + 1):
            expect: Expect = version - 1 or None
            try:
                registry.set_alias("shared", "prod", version, expect=expect, actor=str(worker))
            except Conflict:
                continue
            won.append(version)
        return won
    finally:
        registry.close()


def test_processes_race_and_exactly_one_wins_each_step(place: Place) -> None:
    num_packages, num_rounds = 6, 6
    with ProcessPoolExecutor(NUM_WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [
            pool.submit(race, place.backend, place.folder, worker, num_packages, num_rounds)
            for worker in range(NUM_WORKERS)
        ]
        wins = {worker: future.result(timeout=60) for worker, future in enumerate(futures)}
    registry = place.open()
    snapshot = registry.snapshot()
    assert [r.version for r in snapshot.adapters["shared"]] == list(range(1, NUM_WORKERS * num_packages + 1))
    assert {r.package_digest for r in snapshot.adapters["shared"]} == {
        digest(i) for i in range(NUM_WORKERS * num_packages)
    }
    assert [r.version for r in snapshot.adapters["same"]] == list(range(1, num_packages + 1))
    assert sorted(version for won in wins.values() for version in won) == list(range(1, num_rounds + 1))
    assert snapshot.aliases_of("shared") == {"prod": num_rounds}
    moves = {int(r.after or 0): int(r.actor) for r in registry.audit(limit=1000) if r.action == "set_alias"}
    assert moves == {version: worker for worker, won in wins.items() for version in won}
    assert snapshot.generation == NUM_WORKERS * num_packages + num_packages + num_rounds


def test_a_closed_registry_is_unavailable(registry: Registry) -> None:
    registry.close()
    registry.close()
    with pytest.raises(RegistryUnavailable):
        registry.revision()
    with pytest.raises(RegistryUnavailable):
        registry.snapshot()
    with pytest.raises(RegistryUnavailable):
        registry.add_version("a", package(1))


def test_unset_differs_from_none(registry: Registry) -> None:
    registry.add_version("a", package(1))
    registry.set_alias("a", "prod", 1, expect=UNSET)
    registry.set_alias("a", "prod", 1)
    assert registry.snapshot().resolve(VersionReference("a", 1)).version == 1
