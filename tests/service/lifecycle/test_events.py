"""What is told and counted of a registry's changes: each once, by whoever learns of it."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters.registry import PackageInfo, Registry, Replica
from adapters.registry.sqlite import SqliteStore
from service.folders import open_registry
from service.lifecycle.events import RegistryEvents
from service.metrics import Metrics
from tests.service.worlds import Service, World, running

WAIT_S = 30.0


class Told:
    """A registry that others change, and what this process tells of it."""

    def __init__(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.others = Registry(SqliteStore(folder / "registry.sqlite"))
        for number in (1, 2, 3):
            digests = (f"sha256:{number:064x}", f"sha256:{number + 10:064x}")
            self.others.add_version("vqa", PackageInfo(*digests, "uniadapter", "vqa", 4))
        self.others.set_alias("vqa", "prod", 1)
        self.registry = Registry(SqliteStore(folder / "registry.sqlite"))
        self.metrics = Metrics()
        self.registry.on_change(RegistryEvents(self.registry.snapshot(), self.metrics).tell)
        self._caplog = caplog

    def look(self, name: str | None = None) -> list[dict[str, Any]]:
        """Look at the registry: the keys of what was told, of one event alone where it is named."""
        self._caplog.clear()
        self.registry.snapshot()
        told = [record.event_keys for record in self._caplog.records]
        return [keys for keys in told if name in (None, keys["event"])]

    def moves(self, action: str) -> float | None:
        labels = {"adapter": "vqa", "alias": "prod", "action": action}
        return self.metrics.registry.get_sample_value("bank_alias_moves_total", labels)

    def ended(self, outcome: str) -> float | None:
        return self.metrics.registry.get_sample_value("bank_rollout_seconds_count", {"outcome": outcome})


@pytest.fixture
def told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Told]:
    caplog.set_level(logging.INFO)
    told = Told(tmp_path, caplog)
    yield told
    told.registry.close()
    told.others.close()


def test_what_led_to_the_beginning_is_not_told(told: Told) -> None:
    assert told.look() == []
    assert [told.moves(action) for action in ("promote", "rollback")] == [0, 0]  # there, to be seen rising
    assert told.moves("set") is None


def test_a_promotion_is_one_move_with_who_and_why(told: Told) -> None:
    told.others.start_rollout(
        "vqa", "prod", 2, rollout_id="op", replicas=["a"], actor="ada", reason="better", timeout_s=60
    )
    (begun,) = told.look()
    assert (begun["event"], begun["phase"], begun["operation"]) == ("rollout", "preparing", "op")
    assert told.moves("promote") == 0
    told.others.acknowledge("op", "a")
    assert told.look() == []
    told.others.commit_rollout("op", {"a"}, actor="a")
    ended, moved = told.look()
    assert (ended["event"], ended["phase"]) == ("rollout", "committed") and ended["seconds"] > 0
    assert moved == {
        "event": "alias_moved",
        "action": "promote",
        "adapter": "vqa",
        "alias": "prod",
        "before": 1,
        "after": 2,
        "actor": "ada",
        "reason": "better",
        "operation": "op",
    }
    assert (told.moves("promote"), told.ended("committed")) == (1, 1)
    assert told.look() == [] and told.moves("promote") == 1


def test_moves_between_two_looks_are_all_told(told: Told) -> None:
    told.others.start_rollout("vqa", "prod", 2, rollout_id="one", actor="ada")
    told.others.roll_back("vqa", "prod", rollout_id="back", actor="bob", reason="worse")
    told.others.start_rollout("vqa", "prod", 3, rollout_id="two", traffic=0.05, actor="ada")
    told.others.end_canary("vqa", "prod", actor="eve", reason="too slow")
    told.others.set_alias("vqa", "prod", 3, actor="cli")
    moves = [(m["action"], m["before"], m["after"], m["actor"], m.get("reason")) for m in told.look("alias_moved")]
    assert sorted(moves) == [
        ("end_canary", 3, 1, "eve", "too slow"),
        ("promote", 1, 2, "ada", None),
        ("rollback", 2, 1, "bob", "worse"),
        ("set", 1, 3, "cli", None),
        ("start_canary", 1, 3, "ada", None),
    ]
    actions = ("promote", "rollback", "start_canary", "end_canary", "set")
    assert [told.moves(action) for action in actions] == [1] * 5
    assert told.ended("committed") == 2  # a rollback is none


def test_a_rollout_that_is_aborted_moves_nothing_and_is_a_warning(told: Told, caplog: pytest.LogCaptureFixture) -> None:
    told.others.start_rollout("vqa", "prod", 2, rollout_id="op", replicas=["a"])
    told.look()
    told.others.abort_rollout("op", "a cannot serve it")
    (aborted,) = told.look()
    assert (aborted["phase"], aborted["reason"]) == ("aborted", "a cannot serve it")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert (told.ended("aborted"), told.moves("promote")) == (1, 0)


def test_validations_galleries_and_aliases_of_new_names_are_told(told: Told, caplog: pytest.LogCaptureFixture) -> None:
    for number, name in ((21, "new"), (22, "bad")):
        digest = f"sha256:{number:064x}"
        told.others.add_version(name, PackageInfo(digest, digest, "uniadapter", "vqa", 4), status="staged", actor="ada")
        told.others.claim_validation(name, 1, "a", {"a"})
        told.others.finish_validation(name, 1, "a", None if name == "new" else "a dead site")
    told.others.add_gallery_version("clips", embedding_key="k", adapter="__base__")
    told.others.set_live_gallery("clips", 1, reason="a build")
    found = told.look()
    changes = {(c["action"], c["subject"]): c for c in found if c["event"] == "registry_changed"}
    assert changes["validated", "new@1"]["after"] == "ready"
    assert changes["validated", "bad@1"]["after"] == "failed"
    assert changes["validated", "bad@1"]["reason"] == "a dead site"
    live = changes["set_live_gallery", "clips"]
    assert (live["after"], live["reason"], live["generation"]) == ("1", "a build", told.registry.revision().generation)
    (moved,) = [keys for keys in found if keys["event"] == "alias_moved"]
    assert (moved["action"], moved["adapter"], moved["after"]) == ("set", "new", 1) and "before" not in moved
    bad = [record.event_keys["subject"] for record in caplog.records if record.levelname == "WARNING"]
    assert bad == ["bad@1"]


def test_a_commit_whose_rollout_is_forgotten_breaks_nothing(told: Told) -> None:
    told.others.start_rollout("vqa", "prod", 2, rollout_id="op", traffic=0.05)
    told.others.drop_operations(time.time() + 60)
    (moved,) = told.look("alias_moved")
    assert (moved["action"], moved["after"]) == ("set", 2)


# --- a server ------------------------------------------------------------------------------------------------


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def sample(service: Service, name: str, **labels: str) -> float | None:
    return service.runtime.metrics.registry.get_sample_value(name, labels)


def test_every_server_counts_a_move_once_and_an_idle_one_knows_who_lags(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = world.copy(tmp_path)
    caplog.set_level(logging.INFO)
    registry = open_registry(world.settings)

    def told(name: str) -> list[dict[str, Any]]:
        keys = [record.event_keys for record in caplog.records if hasattr(record, "event_keys")]
        return [each for each in keys if each["event"] == name]

    with running(world.settings) as one, running(world.settings) as other:
        both = (one, other)
        ids = [service.runtime.replica_id for service in both]
        until(lambda: {r.id for r in registry.replicas()} >= set(ids))
        world.push("ask", seed=95)
        registry.beat(Replica("late", 0, True))
        registry.start_rollout("ask", "prod", 2, rollout_id="op", replicas=[*ids, "late"], actor="ada")
        until(lambda: [sample(service, "bank_rollouts", phase="preparing") for service in both] == [1, 1])
        generation = registry.revision().generation
        until(lambda: (sample(one, "bank_replica_lag_generations") or 0) >= generation)
        assert {"replica": "late", "event": "replica_joined"} in told("replica_joined")
        registry.forget("late")
        move = {"adapter": "ask", "alias": "prod", "action": "promote"}
        until(lambda: [sample(service, "bank_alias_moves_total", **move) for service in both] == [1, 1])
        until(lambda: [sample(service, "bank_rollouts", phase="preparing") for service in both] == [0, 0])
        until(lambda: {"replica": "late", "event": "replica_left"} in told("replica_left"))
        # Nothing is under way any more, and still it is noticed who comes and falls behind.
        until(lambda: sample(one, "bank_replica_lag_generations") == 0)
        registry.beat(Replica("idler", generation - 1, True))
        until(lambda: sample(one, "bank_replica_lag_generations") == registry.revision().generation - generation + 1)
        registry.forget("idler")
        until(lambda: sample(one, "bank_replica_lag_generations") == 0)
    registry.close()
