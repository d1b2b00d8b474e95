"""What every registry must do, whatever stores it. A new implementation joins by its entry in BACKENDS."""

import json
import multiprocessing
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import (
    AdapterNotFound,
    Conflict,
    InvalidReference,
    NotFound,
    RegistryLost,
    RegistryUnavailable,
)
from adapters.registry import UNSET, AliasReference, Expect, Memory, PackageInfo, Registry, Replica, VersionReference
from adapters.registry.records import GALLERY_TRANSITIONS, TRANSITIONS, Canary, JobRecord, Status
from adapters.registry.store import Write
from tests.adapters.registry.places import BACKENDS, Place


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
    assert snapshot.revision.epoch
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
        revision = registry.revision()
        assert revision[:2] == (epoch, generation) and revision == registry.snapshot().revision


def test_changes_that_change_nothing_leave_generation_and_audit_alone(registry: Registry) -> None:
    registry.add_version("a", package(1))
    alias = registry.set_alias("a", "prod", 1)
    add_gallery(registry)
    registry.set_live_gallery("clips", 1)
    before = registry.revision(), registry.audit()
    assert registry.set_alias("a", "prod", 1) == alias
    assert registry.set_alias("a", "canary", None) is None
    assert registry.set_live_gallery("clips", 1) is not None
    assert registry.snapshot().live_version("clips") == 1
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
    assert (first.version, second.version, registry.snapshot().head("clips")) == (1, 2, None)
    with pytest.raises(NotFound, match="no live version"):
        registry.snapshot().gallery("clips")
    registry.set_live_gallery("clips", 1, expect=None)
    with pytest.raises(Conflict, match="the live 'clips' is version 1, not no version as expected"):
        registry.set_live_gallery("clips", 2, expect=None)
    moved = registry.set_live_gallery("clips", 2, expect=1)
    assert moved is not None and moved.version == 2
    read = place.open().snapshot()
    assert read.gallery("clips") == moved
    assert read.gallery("clips", 1).embedding_key == "k1"
    assert (first.embedding_key, first.adapter, first.adapter_name) == ("k1", digest(1), "retrieval")


def test_a_gallery_version_remembers_where_its_folder_was_put(registry: Registry, place: Place) -> None:
    registry.add_gallery_version("clips", embedding_key="key", adapter=digest(1), status="building")
    with pytest.raises(InvalidReference, match="no digest"):
        registry.set_gallery_status("clips", 1, "ready", tree="elsewhere")
    assert registry.set_gallery_status("clips", 1, "ready", tree=digest(7)).tree == digest(7)
    registry.set_gallery_status("clips", 1, "deleted")
    (record,) = place.open().snapshot().galleries
    assert (record.status, record.tree) == ("deleted", digest(7))


def test_a_gallery_version_of_before_trees_is_read(registry: Registry, place: Place) -> None:
    add_gallery(registry)
    (record,) = registry.snapshot().galleries
    old = {name: value for name, value in asdict(record).items() if name != "tree"}
    write = Write("gallery", record.key, json.dumps(old))
    assert registry._store.commit(registry.revision(), "before", [write], [])
    assert place.open().snapshot().galleries == (record,) and record.tree is None


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


def race(backend: str, address: str, folder: Path, worker: int, num_packages: int, num_rounds: int) -> list[int]:
    """In a process of its own: add versions, then try to move an alias once per round. The rounds won."""
    registry = Registry(BACKENDS[backend](address))
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
            pool.submit(race, place.backend, place.address, place.folder, worker, num_packages, num_rounds)
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


# --- validation --------------------------------------------------------------------------------------------


def test_one_replica_validates_a_version_and_another_takes_over_when_it_dies(registry: Registry) -> None:
    registry.add_version("a", package(1), status="staged")
    claimed = registry.claim_validation("a", 1, "r1", {"r1", "r2"})
    assert claimed is not None and (claimed.status, claimed.validator) == ("validating", "r1")
    assert registry.claim_validation("a", 1, "r2", {"r1", "r2"}) is None
    taken = registry.claim_validation("a", 1, "r2", {"r2"})
    assert taken is not None and taken.validator == "r2"
    with pytest.raises(Conflict, match="not for r1 to decide"):
        registry.finish_validation("a", 1, "r1", None)
    assert registry.finish_validation("a", 1, "r2", None).status == "ready"
    assert registry.claim_validation("a", 1, "r2", {"r2"}) is None


def test_the_first_version_that_is_ready_becomes_prod(registry: Registry) -> None:
    for number, error in ((1, "its probe differs"), (2, None), (3, None)):
        registry.add_version("a", package(number), status="staged")
        registry.claim_validation("a", number, "r1", {"r1"})
        registry.finish_validation("a", number, "r1", error)
    assert registry.snapshot().version("a", 1).reason == "its probe differs"
    assert registry.snapshot().aliases_of("a") == {"prod": 2}


def test_a_failed_package_that_is_pushed_again_is_validated_again(registry: Registry) -> None:
    registry.add_version("a", package(1), status="staged")
    registry.claim_validation("a", 1, "r1", {"r1"})
    registry.finish_validation("a", 1, "r1", "no")
    again = registry.add_version("a", package(1), status="staged")
    assert (again.version, again.status, again.reason) == (1, "staged", None)


# --- rollouts ----------------------------------------------------------------------------------------------


def ready_versions(registry: Registry, count: int = 3, name: str = "a") -> None:
    """Versions 1, 2, ... of an adapter, all ready, the first of them prod."""
    for number in range(1, count + 1):
        registry.add_version(name, package(number))
    registry.set_alias(name, "prod", 1)


def test_an_alias_moves_when_every_replica_that_lives_is_ready(registry: Registry) -> None:
    ready_versions(registry)
    rollout = registry.start_rollout("a", "prod", 2, rollout_id="op", replicas=["r1", "r2", "r3"], actor="ada")
    assert (rollout.phase, rollout.from_version, rollout.required) == ("preparing", 1, ("r1", "r2", "r3"))
    assert registry.commit_rollout("op", {"r1", "r2", "r3"}, actor="r1") is None
    registry.acknowledge("op", "r1")
    registry.acknowledge("op", "r2")
    assert registry.acknowledge("op", "r2") is None
    assert registry.commit_rollout("op", {"r1", "r2", "r3"}, actor="r1") is None
    assert registry.snapshot().aliases_of("a") == {"prod": 1}
    committed = registry.commit_rollout("op", {"r1", "r2"}, actor="r1")  # r3 died
    assert committed is not None and committed.phase == "committed"
    alias = registry.snapshot().alias("a", "prod")
    assert alias is not None and (alias.version, alias.history) == (2, (1,))
    assert registry.commit_rollout("op", {"r1"}, actor="r2") is None
    with pytest.raises(Conflict, match="is committed; roll back instead"):
        registry.abort_rollout("op", "too late")


def test_without_replicas_or_with_force_an_alias_moves_at_once(registry: Registry) -> None:
    ready_versions(registry)
    assert registry.start_rollout("a", "prod", 2, rollout_id="1").phase == "committed"
    assert registry.start_rollout("a", "prod", 3, rollout_id="2", replicas=["r1"], force=True).phase == "committed"
    assert registry.snapshot().aliases_of("a") == {"prod": 3}


def test_of_two_operators_one_promotes_and_the_other_is_told_what_is_there(registry: Registry) -> None:
    ready_versions(registry)
    registry.start_rollout("a", "prod", 2, rollout_id="op", expect=1, replicas=["r1"])
    with pytest.raises(Conflict, match=r"a@prod is on its way to version 2 \(operation op, preparing\)"):
        registry.start_rollout("a", "prod", 3, rollout_id="other", expect=1, replicas=["r1"])
    with pytest.raises(Conflict, match="operation op"):
        registry.set_alias("a", "prod", 3)
    with pytest.raises(Conflict, match="operation op rolls it out"):
        registry.set_status("a", 2, "retired")
    registry.acknowledge("op", "r1")
    registry.commit_rollout("op", {"r1"}, actor="r1")
    with pytest.raises(Conflict, match="a@prod names version 2, not version 1 as expected"):
        registry.start_rollout("a", "prod", 3, rollout_id="other", expect=1, replicas=["r1"])


def test_the_same_operation_asked_for_again_is_the_same(registry: Registry) -> None:
    ready_versions(registry)
    first = registry.start_rollout("a", "prod", 2, rollout_id="op", expect=1, replicas=["r1"])
    before = registry.revision()
    assert registry.start_rollout("a", "prod", 2, rollout_id="op", expect=1, replicas=["r1"]) == first
    assert registry.revision() == before
    with pytest.raises(Conflict, match="operation op is another one"):
        registry.start_rollout("a", "prod", 3, rollout_id="op", replicas=["r1"])


def test_a_rollout_that_is_late_may_be_aborted_by_anyone_and_changed_nothing(registry: Registry) -> None:
    ready_versions(registry)
    registry.start_rollout("a", "prod", 2, rollout_id="op", replicas=["r1"], timeout_s=60)
    assert registry.abort_rollout("op", "nobody answered", only_late=True) is None
    registry.abort_rollout("op", "changed my mind")
    registry.start_rollout("a", "prod", 2, rollout_id="late", replicas=["r1"], timeout_s=-1)
    late = registry.abort_rollout("late", "nobody answered", only_late=True)
    assert late is not None and (late.phase, late.error) == ("aborted", "nobody answered")
    assert registry.acknowledge("late", "r1") is None
    assert registry.commit_rollout("late", {"r1"}, actor="r1") is None
    assert registry.abort_rollout("late", "again") == late
    assert registry.snapshot().aliases_of("a") == {"prod": 1}
    with pytest.raises(NotFound):
        registry.abort_rollout("nothing", "")


def test_nothing_a_rollout_stands_on_can_be_moved_meanwhile(registry: Registry) -> None:
    ready_versions(registry)
    add_gallery(registry)
    registry.set_live_gallery("clips", 1, follows="a@prod")
    registry.add_gallery_version("clips", embedding_key="k2", adapter=digest(1002), content=1)
    registry.start_rollout("a", "prod", 2, rollout_id="op", replicas=["r1"])
    for attempt in (
        lambda: registry.set_live_gallery("clips", None),
        lambda: registry.set_gallery_status("clips", 2, "retired"),
        lambda: registry.set_status("a", 2, "retired"),
        lambda: registry.set_alias("a", "prod", 3),
        lambda: registry.start_rollout("a", "prod", 3, rollout_id="2", force=True),
    ):
        with pytest.raises(Conflict, match="operation op"):
            attempt()
    registry.abort_rollout("op", "enough")
    assert registry.set_gallery_status("clips", 2, "retired").status == "retired"


def test_rolling_back_goes_back_and_never_forth(registry: Registry) -> None:
    ready_versions(registry)
    registry.start_rollout("a", "prod", 2, rollout_id="1")
    registry.start_rollout("a", "prod", 3, rollout_id="2")
    back = registry.roll_back("a", "prod", rollout_id="3", expect=3, reason="worse", actor="ada")
    assert (back.phase, back.from_version, back.to_version, back.is_rollback) == ("committed", 3, 2, True)
    assert registry.roll_back("a", "prod", rollout_id="3", expect=3) == back
    with pytest.raises(Conflict, match="names version 2, not version 3 as expected"):
        registry.roll_back("a", "prod", rollout_id="4", expect=3)
    assert registry.roll_back("a", "prod", rollout_id="5").to_version == 1
    with pytest.raises(Conflict, match="no earlier one that is still ready"):
        registry.roll_back("a", "prod", rollout_id="6")
    assert registry.snapshot().aliases_of("a") == {"prod": 1}
    line = next(line for line in registry.audit() if line.action == "roll_back" and line.actor == "ada")
    assert (line.subject, line.before, line.after, line.reason) == ("a@prod", "3", "2", "worse")


def test_rolling_back_skips_what_cannot_be_served_and_ends_a_rollout_under_way(registry: Registry) -> None:
    ready_versions(registry, 4)
    for version in (2, 3):
        registry.start_rollout("a", "prod", version, rollout_id=str(version))
    registry.set_status("a", 2, "retired")
    registry.start_rollout("a", "prod", 4, rollout_id="4", replicas=["r1"])
    assert registry.roll_back("a", "prod", rollout_id="back", expect=3).to_version == 1
    rollout = registry.snapshot().rollout("4")
    assert rollout is not None and rollout.phase == "aborted"


def test_a_canary_takes_a_share_until_it_is_promoted_or_ended(registry: Registry) -> None:
    ready_versions(registry)
    with pytest.raises(InvalidReference, match="between 0 and 1"):
        registry.start_rollout("a", "prod", 2, rollout_id="x", traffic=1.5)
    registry.start_rollout("a", "prod", 2, rollout_id="1", traffic=0.05)
    alias = registry.snapshot().alias("a", "prod")
    assert alias is not None and (alias.version, alias.canary) == (1, Canary(2, 0.05))
    with pytest.raises(Conflict, match="while prod names it"):
        registry.set_status("a", 2, "retired")
    with pytest.raises(Conflict, match="version 2 as its canary"):
        registry.end_canary("a", "prod", expect=3)
    assert registry.end_canary("a", "prod", expect=2).canary is None
    with pytest.raises(Conflict, match="no canary"):
        registry.end_canary("a", "prod")
    registry.start_rollout("a", "prod", 2, rollout_id="2", traffic=0.5)
    registry.start_rollout("a", "prod", 2, rollout_id="3")
    alias = registry.snapshot().alias("a", "prod")
    assert alias is not None and (alias.version, alias.canary, alias.history) == (2, None, (1,))


# --- galleries follow --------------------------------------------------------------------------------------


def test_galleries_are_embedded_anew_first_and_flip_with_the_alias(registry: Registry) -> None:
    ready_versions(registry)
    first = registry.add_gallery_version("clips", embedding_key="k1", adapter=digest(1001))
    registry.set_live_gallery("clips", 1, follows="a@prod")
    rollout = registry.start_rollout("a", "prod", 2, rollout_id="op", replicas=["r1"])
    assert rollout.phase == "migrating"
    claimed = registry.claim_migration("op", "r1", {"r1", "r2"})
    assert claimed is not None and (claimed.migrator, claimed.token) == ("r1", 1)
    assert registry.claim_migration("op", "r2", {"r1", "r2"}) is None
    taken = registry.claim_migration("op", "r2", {"r2"})
    assert taken is not None and taken.token == 2
    new = registry.add_gallery_version("clips", embedding_key="k2", adapter=digest(1002), content=first.content)
    with pytest.raises(Conflict, match="another replica migrates"):
        registry.finish_migration("op", 1, "clips", new.version, actor="r1")
    assert registry.finish_migration("op", 2, "clips", new.version, actor="r2").phase == "preparing"
    registry.acknowledge("op", "r1")
    before = registry.revision().generation
    registry.commit_rollout("op", {"r1"}, actor="r1")
    snapshot = registry.snapshot()
    assert snapshot.generation == before + 1  # alias and gallery in one change
    assert (snapshot.aliases_of("a"), snapshot.live_version("clips")) == ({"prod": 2}, 2)
    registry.roll_back("a", "prod", rollout_id="back")
    snapshot = registry.snapshot()
    assert (snapshot.aliases_of("a"), snapshot.live_version("clips")) == ({"prod": 1}, 1)
    assert registry.start_rollout("a", "prod", 2, rollout_id="again", replicas=["r1"]).phase == "preparing"


def test_a_version_a_gallery_is_searched_with_stays_ready(registry: Registry) -> None:
    ready_versions(registry, 2)
    registry.add_gallery_version("clips", embedding_key="k1", adapter=digest(1001))
    registry.set_live_gallery("clips", 1, follows="a@prod")
    registry.start_rollout("a", "prod", 2, rollout_id="op", migrate=False)
    with pytest.raises(Conflict, match="clips@1 is searched with it"):
        registry.set_status("a", 1, "retired")
    registry.add_version("b", package(1))  # the same weights by another name
    assert registry.set_status("a", 1, "retired").status == "retired"


def test_a_gallery_may_stay_behind_when_that_is_said(registry: Registry) -> None:
    ready_versions(registry)
    registry.add_gallery_version("clips", embedding_key="k1", adapter=digest(1001))
    registry.set_live_gallery("clips", 1, follows="a@prod")
    with pytest.raises(Conflict, match="clips must be embedded anew first"):
        registry.start_rollout("a", "prod", 2, rollout_id="1", replicas=["r1"], force=True)
    registry.start_rollout("a", "prod", 2, rollout_id="2", migrate=False)
    head = registry.snapshot().head("clips")
    assert head is not None and (head.live, head.follows) == (1, None)


# --- jobs --------------------------------------------------------------------------------------------------


def start_job(registry: Registry, job_id: str = "job", gallery: str = "clips", **wanted: Any) -> JobRecord:
    fields: dict[str, Any] = {"action": "build", "adapter": "a", "arguments": "{}"} | wanted
    action = fields.pop("action")
    return registry.start_job(action, gallery, job_id=job_id, actor="ada", **fields)


def test_one_replica_does_a_job_and_another_goes_on_when_it_dies(registry: Registry, place: Place) -> None:
    add_gallery(registry)
    registry.set_live_gallery("clips", 1)
    job = start_job(registry)
    assert (job.phase, job.worker, job.token, job.from_version, job.version) == ("running", None, 0, 1, None)
    first = registry.claim_job("job", "r1", {"r1", "r2"})
    assert first is not None and (first.worker, first.token) == ("r1", 1)
    assert registry.claim_job("job", "r2", {"r1", "r2"}) is None
    add_gallery(registry)
    registry.keep_job("job", 1, 2, actor="r1")
    second = registry.claim_job("job", "r2", {"r2"})
    assert second is not None and (second.worker, second.token, second.version) == ("r2", 2, 2)
    late: list[Callable[[], object]] = [
        lambda: registry.keep_job("job", 1, 2, actor="r1"),
        lambda: registry.finish_job("job", 1, 2, actor="r1"),
        lambda: registry.fail_job("job", 1, "no", actor="r1"),
    ]
    for step in late:
        with pytest.raises(Conflict, match="another replica does it"):
            step()
    assert registry.snapshot().live_version("clips") == 1
    before = registry.revision().generation
    done = registry.finish_job("job", 2, 2, follows="a@prod", actor="r2")
    assert (done.phase, done.version, registry.revision().generation) == ("succeeded", 2, before + 1)
    head = place.open().snapshot().head("clips")
    assert head is not None and (head.live, head.follows) == (2, "a@prod")
    assert place.open().snapshot().job("job") == done
    assert registry.claim_job("job", "r1", {"r1"}) is None
    with pytest.raises(Conflict, match="is over"):
        registry.finish_job("job", 2, 2, actor="r2")


def test_the_same_job_asked_for_again_is_the_same(registry: Registry) -> None:
    job = start_job(registry)
    assert start_job(registry) == job
    assert start_job(registry, "other", join=True) == job
    with pytest.raises(Conflict, match="operation job"):
        start_job(registry, "other")
    with pytest.raises(Conflict, match="operation job"):
        start_job(registry, "other", join=True, arguments='{"source": "elsewhere"}')
    for changes in ({"arguments": '{"source": "elsewhere"}'}, {"gallery": "songs"}, {"action": "rebuild"}):
        with pytest.raises(Conflict, match="another one"):
            start_job(registry, **changes)
    assert start_job(registry, "songs", "songs").gallery == "songs"


def test_a_job_that_failed_or_was_aborted_changed_nothing(registry: Registry) -> None:
    add_gallery(registry)
    registry.set_live_gallery("clips", 1)
    start_job(registry, "1")
    registry.claim_job("1", "r1", {"r1"})
    add_gallery(registry)
    registry.keep_job("1", 1, 2, actor="r1")
    with pytest.raises(Conflict, match="while operation 1 makes it live"):
        registry.set_gallery_status("clips", 2, "deleted")
    failed = registry.fail_job("1", 1, "no room", actor="r1")
    assert (failed.phase, failed.error) == ("failed", "no room")
    assert registry.abort_job("1", "too late") == failed
    start_job(registry, "2")
    registry.claim_job("2", "r1", {"r1"})
    assert registry.abort_job("2", "enough", actor="ada").error == "enough"
    with pytest.raises(Conflict, match="is over"):
        registry.finish_job("2", 1, 2, actor="r1")
    with pytest.raises(NotFound):
        registry.abort_job("3", "enough")
    assert registry.snapshot().live_version("clips") == 1
    assert registry.snapshot().active_jobs == ()
    assert registry.drop_operations(registry.now() - 60) == 0
    assert registry.drop_operations(registry.now() + 60) == 2 and registry.snapshot().jobs == ()


def test_a_job_does_not_undo_what_went_live_meanwhile(registry: Registry) -> None:
    for _ in range(3):
        add_gallery(registry)
    registry.set_live_gallery("clips", 1)
    start_job(registry)
    registry.claim_job("job", "r1", {"r1"})
    registry.set_live_gallery("clips", 2)
    with pytest.raises(Conflict, match="is version 2, not version 1 as expected"):
        registry.finish_job("job", 1, 3, actor="r1")
    assert registry.snapshot().live_version("clips") == 2


def test_jobs_and_rollouts_keep_out_of_each_others_galleries(registry: Registry) -> None:
    ready_versions(registry, 2)
    registry.add_gallery_version("clips", embedding_key="k1", adapter=digest(1001))
    registry.set_live_gallery("clips", 1, follows="a@prod")
    start_job(registry)
    with pytest.raises(Conflict, match="a build of gallery 'clips' is under way"):
        registry.start_rollout("a", "prod", 2, rollout_id="op", replicas=["r1"])
    registry.abort_job("job", "enough")
    registry.start_rollout("a", "prod", 2, rollout_id="op", replicas=["r1"])
    with pytest.raises(Conflict, match="operation op"):
        start_job(registry, "again")
    with pytest.raises(Conflict, match="a rollout"):
        start_job(registry, "op")


def test_a_rebuild_needs_something_that_is_live(registry: Registry) -> None:
    with pytest.raises(NotFound, match="no gallery 'clips'"):
        start_job(registry, action="rebuild")
    add_gallery(registry)
    with pytest.raises(NotFound, match="no live version"):
        start_job(registry, action="rebuild")
    registry.set_live_gallery("clips", 1)
    assert start_job(registry, action="rebuild").from_version == 1


def test_a_gallery_is_deleted_whole_and_its_numbers_are_not_used_again(registry: Registry) -> None:
    for _ in range(2):
        add_gallery(registry)
    registry.set_live_gallery("clips", 1, follows="a@prod")
    with pytest.raises(NotFound, match="no gallery 'clip'; nearest: clips"):
        registry.delete_gallery("clip")
    with pytest.raises(Conflict, match="while it is live"):
        registry.set_gallery_status("clips", 1, "deleted")
    with pytest.raises(Conflict, match="is version 1, not version 2 as expected"):
        registry.delete_gallery("clips", expect=2)
    start_job(registry)
    with pytest.raises(Conflict, match="operation job"):
        registry.delete_gallery("clips")
    registry.abort_job("job", "enough")
    deleted = registry.delete_gallery("clips", expect=1, reason="old", actor="ada")
    assert [(r.version, r.status, r.reason) for r in deleted] == [(1, "deleted", "old"), (2, "deleted", "old")]
    snapshot = registry.snapshot()
    assert (snapshot.head("clips"), dict(snapshot.gallery_versions), snapshot.followers("a", "prod")) == (None, {}, ())
    line = registry.audit(limit=1)[0]
    assert (line.actor, line.action, line.subject, line.before) == ("ada", "delete_gallery", "clips", "1")
    with pytest.raises(NotFound):
        registry.delete_gallery("clips")
    assert add_gallery(registry) == 3


def test_a_build_during_a_canary_keeps_the_canary_s_gallery(registry: Registry) -> None:
    ready_versions(registry, 2)
    for key in (1001, 1002):
        registry.add_gallery_version("clips", embedding_key=str(key), adapter=digest(key), content=1)
    registry.set_live_gallery("clips", 1, follows="a@prod")
    registry.start_rollout("a", "prod", 2, rollout_id="op", traffic=0.5)
    for key in (1001, 1002):
        registry.add_gallery_version("clips", embedding_key=str(key), adapter=digest(key), content=2)
    start_job(registry)
    registry.claim_job("job", "r1", {"r1"})
    registry.finish_job("job", 1, 3, follows="a@prod", actor="r1")
    head = registry.snapshot().head("clips")
    assert head is not None and (head.live, head.canary) == (3, 4)


# --- replicas, duties, loss --------------------------------------------------------------------------------


def test_replicas_are_known_by_their_signs_of_life(registry: Registry, place: Place) -> None:
    before = registry.revision()
    registry.beat(Replica("r2", 7, True, {"url": "http://b"}))
    registry.beat(Replica("r1", 6, False))
    first, second = place.open().replicas()
    assert (first.id, first.generation, first.is_serving, dict(first.details)) == ("r1", 6, False, {})
    assert (second.id, dict(second.details)) == ("r2", {"url": "http://b"})
    assert 0 <= first.age_s < 5
    registry.forget("r1")
    registry.forget("r1")
    assert [replica.id for replica in registry.replicas()] == ["r2"]
    assert registry.revision() == before


def test_one_replica_at_a_time_has_a_duty(registry: Registry) -> None:
    first = registry.take_lease("sweep", "r1", {"r1", "r2"})
    assert first is not None and first.token == 1
    assert registry.take_lease("sweep", "r2", {"r1", "r2"}) is None
    assert registry.take_lease("sweep", "r1", {"r1", "r2"}) == first
    second = registry.take_lease("sweep", "r2", {"r2"})
    assert second is not None and (second.holder, second.token) == ("r2", 2)


def test_a_change_wakes_those_who_wait(registry: Registry, place: Place) -> None:
    other = place.open()
    other.wait(0.3)  # what happened so far is old
    woken = threading.Event()

    def wait() -> None:
        other.wait(30)
        woken.set()

    thread = threading.Thread(target=wait)
    thread.start()
    end = time.monotonic() + 20
    number = 0
    while not woken.is_set() and time.monotonic() < end:
        number += 1
        registry.add_version("a", package(number))
        woken.wait(0.5)
    thread.join(30)
    assert woken.is_set()


def test_a_lost_registry_is_refused_and_restored_from_what_is_remembered(place: Place, tmp_path: Path) -> None:
    registry = place.open(tmp_path / "memory")
    ready_versions(registry)
    registry.start_rollout("a", "prod", 2, rollout_id="op")
    known = registry.snapshot()
    registry.remember()
    log = registry.audit(limit=1000)
    place.lose()
    for attempt in (registry.snapshot, lambda: registry.add_version("b", package(1))):
        with pytest.raises(RegistryUnavailable):
            attempt()
    registry.close()

    late = place.open(tmp_path / "memory")  # a process that starts now knows it was not empty
    with pytest.raises(RegistryLost):
        late.snapshot()
    restored = late.restore(actor="r1")
    assert (restored.versions, restored.aliases, restored.rollouts) == (known.versions, known.aliases, known.rollouts)
    assert restored.generation == known.generation + 1 and restored.revision.epoch != known.revision.epoch
    assert late.audit(limit=1000)[1:] == log
    assert (late.audit()[0].action, late.audit()[0].actor) == ("restore", "r1")
    with pytest.raises(RegistryUnavailable, match="not lost"):
        late.restore(actor="r1")
    assert late.add_version("b", package(1)).version == 1


def test_a_new_registry_whose_replicas_knew_an_older_one_is_not_written_to(place: Place, tmp_path: Path) -> None:
    newcomer = place.open()
    newcomer.beat(Replica("elder", 12, True))
    with pytest.raises(RegistryLost, match="wait until it is restored"):
        newcomer.add_version("a", package(1))
    newcomer.forget("elder")
    assert newcomer.add_version("a", package(1)).version == 1


def test_memory_keeps_the_longest_history_and_survives_a_torn_line(place: Place, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    ahead, behind = place.open(memory), place.open(memory)
    behind.snapshot()
    ready_versions(ahead)
    ahead.snapshot()
    ahead.remember()
    behind.remember()
    with (memory / "audit.jsonl").open("a") as file:
        file.write('{"generation": 4, "at"')
    recalled = Memory(memory).recall()
    assert recalled is not None and recalled.revision == ahead.snapshot().revision
    assert tuple(reversed(recalled.log)) == ahead.audit(limit=100)
    assert Memory(tmp_path / "nothing").recall() is None
    ahead.add_version("b", package(9))
    ahead.remember()
    recalled = Memory(memory).recall()
    assert recalled is not None and tuple(reversed(recalled.log)) == ahead.audit(limit=100)


def test_the_key_of_a_rollback_is_no_promotion_s(place: Place) -> None:
    registry = place.open()
    ready_versions(registry)
    registry.start_rollout("a", "prod", 2, rollout_id="there")
    assert registry.roll_back("a", "prod", rollout_id="back").to_version == 1
    with pytest.raises(Conflict, match="operation back is another one"):
        registry.start_rollout("a", "prod", 1, rollout_id="back")


def test_processes_that_share_a_memory_restore_every_line_once(place: Place, tmp_path: Path) -> None:
    first, second = place.open(tmp_path / "memory"), place.open(tmp_path / "memory")
    ready_versions(first)
    second.snapshot()
    first.remember()
    lines = first.audit(limit=1000)
    place.lose()
    second.close()
    lost = Registry(place.store(), memory=Memory(tmp_path / "memory"))
    lost._log = list(reversed(lines))  # seen, and not remembered by this one yet
    lost.restore(actor="r1")
    assert lost.audit(limit=1000)[1:] == lines
    lost.close()


def test_a_process_that_is_late_does_not_make_its_host_forget_what_was_restored(place: Place, tmp_path: Path) -> None:
    ready_versions(place.open(tmp_path / "memory"))
    late = place.open(tmp_path / "memory")
    late.snapshot()
    late.remember()
    place.lose()
    restorer = place.open(tmp_path / "memory")
    restored = restorer.restore(actor="r1")
    restorer.remember()
    late.remember()
    recalled = Memory(tmp_path / "memory").recall()
    assert recalled is not None and recalled.revision == restored.revision
    assert tuple(reversed(recalled.log)) == restorer.audit(limit=1000)
