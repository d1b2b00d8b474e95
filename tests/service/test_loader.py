"""References to adapters on the host: loads happen once, failures reach who waits, and the registry may come and go."""

import asyncio
import logging
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest

from adapters.artifacts import LocalArtifactStore
from adapters.artifacts.base import Made
from adapters.config import BASE_ADAPTER
from adapters.errors import (
    AdapterNotFound,
    BackboneMismatch,
    InvalidReference,
    MissingPart,
    RankTooLarge,
    RegistryUnavailable,
)
from adapters.package import CONFIG_FILE, WEIGHTS_FILE
from adapters.registry import Registry, Snapshot
from adapters.registry.registry import blank_revision
from adapters.registry.sqlite import SqliteStore
from service.auth import LOCAL, Principal
from service.backbone.folder import load_backbone
from service.backbones import Backbones
from service.bank import AdapterBank, Buckets
from service.errors import AdapterDamaged, Forbidden, NotReady
from service.folders import HomeFolders
from service.loader import Loader, Pin
from service.metrics import Metrics
from tests.service.test_bank import holders
from tests.service.worlds import World, make_bank, write_tiny_backbone

WAIT_S = 30.0


class Artifacts(LocalArtifactStore):
    """A store that counts, and can keep its callers waiting or send them away."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: Counter[str] = Counter()
        self.is_open = threading.Event()
        self.is_open.set()
        self.has_begun = threading.Event()
        self.error: Exception | None = None

    def load(self, digest: str, make: Callable[[Mapping[str, bytes]], Made]) -> Made:
        self.asked[digest] += 1
        self.has_begun.set()
        assert self.is_open.wait(WAIT_S)
        if self.error is not None:
            raise self.error
        return super().load(digest, make)


class Watched(Registry):
    """A registry that counts how often it is looked at, and can be away."""

    num_looks = 0
    is_away = False
    is_slow: threading.Event | None = None  # what a look saw arrives when this is set

    def snapshot(self) -> Snapshot:
        self.num_looks += 1
        if self.is_away:
            raise RegistryUnavailable("it is away")
        seen = super().snapshot()
        if (slow := self.is_slow) is not None:
            assert slow.wait(WAIT_S)
        return seen


class Bench:
    """A loader with everything around it."""

    def __init__(self, world: World, *, buckets: Buckets, host_bytes: int) -> None:
        folders = HomeFolders(world.settings.home)
        self.world = world
        self.registry = Watched(SqliteStore(folders.registry))
        self.artifacts = Artifacts(folders.artifacts)
        self.bank: AdapterBank = make_bank(world.backbone, buckets, host_bytes)
        self.metrics = Metrics()
        self.loader = Loader(
            self.registry, self.artifacts, Backbones.of_one(world.backbone, self.bank, self.metrics), self.metrics
        )

    def num_loads(self) -> int:
        return sum(self.artifacts.asked.values())

    async def pinned(self, reference: str, until: asyncio.Event | None = None, *, principal: Principal = LOCAL) -> Pin:
        async with self.loader.pin(reference, principal) as pin:
            assert pin.digest == BASE_ADAPTER or self.bank.adapter(pin.digest)
            if until is not None:
                await until.wait()
            return pin


@pytest.fixture
def copied(world: World, tmp_path: Path) -> World:
    return world.copy(tmp_path)


Story = Callable[[Bench], Coroutine[Any, Any, None]]


class Run(Protocol):
    """What the fixture `run` gives."""

    def __call__(self, story: Story, *, buckets: Buckets = ((4, 2), (8, 1)), host_bytes: int = 1 << 30) -> Bench: ...


@pytest.fixture
def run(copied: World) -> Run:
    """Run a story with a bench of its own; afterwards nothing may be held."""

    def runner(story: Story, *, buckets: Buckets = ((4, 2), (8, 1)), host_bytes: int = 1 << 30) -> Bench:
        bench = Bench(copied, buckets=buckets, host_bytes=host_bytes)
        asyncio.run(_told(story, bench))
        assert holders(bench.bank) == 0
        assert bench.loader._loads == {}
        return bench

    return runner


async def _told(story: Story, bench: Bench) -> None:
    async with closing(bench):
        await story(bench)


@asynccontextmanager
async def closing(bench: Bench) -> AsyncIterator[None]:
    try:
        yield
    finally:
        bench.artifacts.is_open.set()
        await bench.loader.close()
        bench.registry.close()


# --- what a reference means ----------------------------------------------------------------------------------


def test_every_kind_of_reference_finds_its_version(run: Run) -> None:
    async def story(bench: Bench) -> None:
        second = bench.world.push("ask", seed=50)
        by_name = await bench.pinned("ask")
        assert (by_name.info.version, by_name.info.alias) == (1, "prod")
        by_number = await bench.pinned("ask@2")
        assert (by_number.info.version, by_number.info.alias, by_number.digest) == (2, None, second.weights_digest)
        for digest in (second.weights_digest, second.package_digest):
            found = await bench.pinned(digest)
            assert (found.info.name, found.info.version, found.digest) == ("ask", 2, second.weights_digest)
        assert by_name.config is not None
        assert by_name.config.task == "vqa"
        base = await bench.pinned(BASE_ADAPTER)
        assert (base.digest, base.config, base.info.name) == (BASE_ADAPTER, None, BASE_ADAPTER)

    assert run(story).num_loads() == 2


def test_names_nobody_knows_are_looked_up_once_more_and_then_refused(run: Run) -> None:
    async def story(bench: Bench) -> None:
        looks = bench.registry.num_looks
        with pytest.raises(AdapterNotFound, match="nearest: ask"):
            await bench.pinned("aks")
        assert bench.registry.num_looks == looks + 1
        for wrong in ("../etc", "ask@", "Ask", "ask@0"):
            with pytest.raises(InvalidReference):
                await bench.pinned(wrong)
        assert bench.registry.num_looks == looks + 1

    assert run(story).num_loads() == 0


def test_what_was_pushed_a_moment_ago_is_found(run: Run) -> None:
    async def story(bench: Bench) -> None:
        bench.world.push("brand-new", seed=51)
        assert (await bench.pinned("brand-new")).info.version == 1

    run(story)


# --- for somebody --------------------------------------------------------------------------------------------

SOMEBODY = Principal("x", frozenset({"infer"}), ("t*",))


def test_a_digest_means_a_name_that_may_be_used(run: Run) -> None:
    async def story(bench: Bench) -> None:
        with pytest.raises(Forbidden, match="none of the adapters"):
            await bench.pinned(bench.loader.snapshot.version("ask", 1).weights_digest, principal=SOMEBODY)
        twin = bench.world.push("twin", seed=1)  # the weights of `ask`
        assert (
            await bench.pinned(twin.weights_digest, principal=SOMEBODY)
        ).info.name == "twin"  # it was looked once more
        assert (await bench.pinned(twin.weights_digest)).info.name == "ask"
        assert (await bench.pinned("tell", principal=SOMEBODY)).info.name == "tell"

    run(story)


@pytest.mark.parametrize("reference", ["ask", "ask@1", "ask@7", "nobody", BASE_ADAPTER])
def test_names_beyond_the_patterns_are_refused_without_looking(run: Run, reference: str) -> None:
    async def story(bench: Bench) -> None:
        looks = bench.registry.num_looks
        with pytest.raises(Forbidden):
            await bench.pinned(reference, principal=SOMEBODY)
        assert bench.registry.num_looks == looks

    assert run(story).num_loads() == 0


def test_a_load_begun_under_a_hidden_name_fails_without_naming_it(run: Run) -> None:
    async def story(bench: Bench) -> None:
        bench.world.push("twin", seed=1)
        await bench.loader.refresh()
        bench.artifacts.delete(bench.loader.snapshot.version("ask", 1).package_digest)
        bench.artifacts.is_open.clear()
        first = asyncio.create_task(bench.pinned("ask"))
        await asyncio.to_thread(bench.artifacts.has_begun.wait, WAIT_S)
        second = asyncio.create_task(bench.pinned("twin", principal=SOMEBODY))
        await asyncio.sleep(0.1)
        bench.artifacts.is_open.set()
        with pytest.raises(AdapterDamaged, match="twin@1") as caught:
            await second
        assert "ask" not in caught.value.message
        with pytest.raises(AdapterDamaged, match="ask@1"):
            await first
        assert (await bench.pinned("twin", principal=SOMEBODY)).info.name == "twin"  # whose own files are whole

    run(story)


# --- loading -------------------------------------------------------------------------------------------------


def test_concurrent_cold_requests_load_once(run: Run) -> None:
    async def story(bench: Bench) -> None:
        bench.artifacts.is_open.clear()
        tasks = [asyncio.create_task(bench.pinned("ask")) for _ in range(20)]
        await asyncio.to_thread(bench.artifacts.has_begun.wait, WAIT_S)
        bench.artifacts.is_open.set()
        pins = await asyncio.gather(*tasks)
        assert len({pin.digest for pin in pins}) == 1
        assert bench.num_loads() == 1
        await bench.pinned("ask")
        assert bench.num_loads() == 1

    bench = run(story)
    assert bench.metrics.registry.get_sample_value("bank_adapter_load_seconds_count", {"source": "disk"}) == 1


def test_two_names_of_the_same_weights_load_once(run: Run) -> None:
    async def story(bench: Bench) -> None:
        bench.world.push("twin", seed=1)  # the weights of `ask`
        await asyncio.gather(bench.pinned("ask"), bench.pinned("twin"))
        assert bench.num_loads() == 1

    run(story)


def test_a_failed_load_reaches_everybody_who_waits_and_the_next_request_tries_again(run: Run) -> None:
    async def story(bench: Bench) -> None:
        bench.artifacts.error = OSError("the disk is gone")
        bench.artifacts.is_open.clear()
        tasks = [asyncio.create_task(bench.pinned("ask")) for _ in range(5)]
        await asyncio.to_thread(bench.artifacts.has_begun.wait, WAIT_S)
        bench.artifacts.is_open.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [OSError] * 5
        assert bench.num_loads() == 1
        bench.artifacts.error = None
        assert (await bench.pinned("ask")).info.name == "ask"
        assert bench.num_loads() == 2

    run(story)


def test_one_who_stops_waiting_takes_the_load_from_nobody(run: Run) -> None:
    async def story(bench: Bench) -> None:
        bench.artifacts.is_open.clear()
        impatient, patient = (asyncio.create_task(bench.pinned("ask")) for _ in range(2))
        await asyncio.to_thread(bench.artifacts.has_begun.wait, WAIT_S)
        impatient.cancel()
        assert isinstance((await asyncio.gather(impatient, return_exceptions=True))[0], asyncio.CancelledError)
        bench.artifacts.is_open.set()
        assert (await patient).info.name == "ask"
        assert bench.num_loads() == 1

    run(story)


def test_a_load_that_everybody_left_ends_quietly_and_is_there_for_the_next(run: Run) -> None:
    async def story(bench: Bench) -> None:
        bench.artifacts.is_open.clear()
        waiting = [asyncio.create_task(bench.pinned("ask")) for _ in range(3)]
        await asyncio.to_thread(bench.artifacts.has_begun.wait, WAIT_S)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        load = next(iter(bench.loader._loads.values()))
        bench.artifacts.is_open.set()
        await asyncio.wrap_future(load.future)
        await bench.pinned("ask")
        assert bench.num_loads() == 1

    run(story)


def test_a_load_that_fails_after_everybody_left_disturbs_nobody(run: Run) -> None:
    async def story(bench: Bench) -> None:
        bench.artifacts.is_open.clear()
        bench.artifacts.error = OSError("the disk is gone")
        waiting = asyncio.create_task(bench.pinned("ask"))
        await asyncio.to_thread(bench.artifacts.has_begun.wait, WAIT_S)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    run(story)


def test_a_host_cache_smaller_than_one_adapter_still_serves_everybody(run: Run) -> None:
    """Each cold request must get the hold it waited for, although every other load evicts what nobody holds."""

    async def story(bench: Bench) -> None:
        names = ("ask", "tell", "look", "find", "frames", "heads")
        pins = await asyncio.gather(*[bench.pinned(name) for name in names * 5])
        assert [pin.info.name for pin in pins] == [*names * 5]
        assert bench.bank.residency()["host"] == {}

    run(story, host_bytes=1)


def test_loads_of_many_adapters_end_however_their_requests_end(run: Run) -> None:
    async def story(bench: Bench) -> None:
        names = ("ask", "tell", "look", "find", "frames", "heads", "nobody")
        tasks = [asyncio.create_task(bench.pinned(names[i % 7])) for i in range(70)]
        for i, task in enumerate(tasks):
            if i % 3 == 0:
                await asyncio.sleep(0)
                task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        kinds = {type(outcome) for outcome in outcomes}
        assert kinds <= {Pin, asyncio.CancelledError, AdapterNotFound}
        assert Pin in kinds

    run(story, host_bytes=1)


# --- what must not be loaded ---------------------------------------------------------------------------------


def test_an_artifact_that_is_gone_says_so(run: Run) -> None:
    async def story(bench: Bench) -> None:
        bench.artifacts.delete(bench.loader.snapshot.version("ask", 1).package_digest)
        with pytest.raises(AdapterDamaged, match="ask@1"):
            await bench.pinned("ask")

    run(story)


def test_a_package_that_changed_on_disk_is_refused_instead_of_loaded_again_and_again(run: Run) -> None:
    """Valid in itself, but not what the digest names: another adapter's files in its place."""

    async def story(bench: Bench) -> None:
        ask, find = (bench.loader.snapshot.version(name, 1).package_digest for name in ("ask", "find"))
        for file in bench.artifacts.path(ask).iterdir():
            file.write_bytes((bench.artifacts.path(find) / file.name).read_bytes())
        with pytest.raises(AdapterDamaged, match="ask@1 is damaged"):
            await bench.pinned("ask")

    run(story)


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_weights_that_changed_on_disk_reach_nobody_whatever_they_fold_to(run: Run, value: float) -> None:
    """They are folded while they are still being compared: also what cannot be folded is told as damage."""

    async def story(bench: Bench) -> None:
        record = bench.loader.snapshot.version("ask", 1)
        for is_known in (False, True):
            weights = bench.artifacts.path(record.package_digest) / WEIGHTS_FILE
            whole = weights.read_bytes()
            weights.write_bytes(whole[:-4] + struct.pack("<f", value))
            with pytest.raises(AdapterDamaged, match=r"ask@1 is damaged: artifact .* its files have the digest"):
                await bench.pinned("ask")
            assert not bench.bank.has(record.weights_digest)
            assert is_known == (record.package_digest in bench.loader._known_weights)
            assert bench.bank.residency() == {"device": {}, "host": {}}
            weights.write_bytes(whole)
            await bench.pinned("ask")
            bench.bank.unload(record.weights_digest)

    run(story)


def test_a_config_that_changed_on_disk_is_damage_and_not_another_backbones(run: Run) -> None:
    async def story(bench: Bench) -> None:
        config = bench.artifacts.path(bench.loader.snapshot.version("ask", 1).package_digest) / CONFIG_FILE
        text = config.read_text()
        for changed in (text.replace('"width": ', '"width": 1'), text.replace('"rank": ', '"rank": 9999'), "{}"):
            assert changed != text
            config.write_text(changed)
            with pytest.raises(AdapterDamaged, match="its files have the digest"):
                await bench.pinned("ask")

    run(story)


def test_a_rank_that_no_slot_holds_is_refused(run: Run) -> None:
    async def story(bench: Bench) -> None:
        with pytest.raises(RankTooLarge, match="rank 8"):
            await bench.pinned("look")
        assert (await bench.pinned("ask")).info.name == "ask"

    run(story, buckets=((4, 1),))


def test_adapters_of_another_backbone_or_of_missing_parts_are_refused(world: World, tmp_path: Path) -> None:
    copied = world.copy(tmp_path)
    write_tiny_backbone(tmp_path / "other", with_decoder=False)
    other = World(copied.settings, load_backbone(tmp_path / "other"), world.packages)
    bench = Bench(other, buckets=((8, 1),), host_bytes=1 << 30)

    async def story(bench: Bench) -> None:
        with pytest.raises((MissingPart, BackboneMismatch)):
            await bench.pinned("ask")
        with pytest.raises((MissingPart, BackboneMismatch)):
            await bench.pinned("find")

    asyncio.run(_told(story, bench))
    assert bench.bank.residency()["host"] == {}


def test_a_backbone_with_uneven_towers_serves_base_alone(world: World, tmp_path: Path) -> None:
    copied = world.copy(tmp_path)
    write_tiny_backbone(tmp_path / "uneven", text_layers=1)
    bench = Bench(copied, buckets=((8, 1),), host_bytes=1 << 30)
    uneven = load_backbone(tmp_path / "uneven")
    bench.loader._backbones = Backbones.of_one(uneven, bench.bank, bench.metrics)

    async def story(bench: Bench) -> None:
        with pytest.raises(MissingPart, match="__base__ only"):
            await bench.pinned("ask")
        await bench.pinned(BASE_ADAPTER)

    asyncio.run(_told(story, bench))


# --- the registry comes and goes -----------------------------------------------------------------------------


def test_an_alias_that_moves_leaves_pinned_requests_on_what_they_resolved_to(run: Run) -> None:
    async def story(bench: Bench) -> None:
        done = asyncio.Event()
        old = asyncio.create_task(bench.pinned("ask", until=done))
        while not holders(bench.bank):
            await asyncio.sleep(0)
        second = bench.world.push("ask", seed=52)
        bench.registry.set_alias("ask", "prod", 2)
        bench.registry.set_status("ask", 1, "retired")
        await bench.loader.refresh()
        new = await bench.pinned("ask")
        assert (new.info.version, new.digest) == (2, second.weights_digest)
        assert bench.bank.adapter(bench.registry.snapshot().version("ask", 1).weights_digest)
        done.set()
        assert (await old).info.version == 1
        with pytest.raises(AdapterNotFound, match="retired"):
            await bench.pinned("ask@1")

    run(story, host_bytes=1)


def test_residency_goes_by_registered_names_and_what_has_none_is_one_series(run: Run) -> None:
    async def story(bench: Bench) -> None:
        def resident() -> dict[tuple[str, str], float]:
            (family,) = bench.metrics.residency.collect()
            assert all(sample.labels["tier"] == "host" for sample in family.samples)
            return {(s.labels["adapter"], s.labels["version"]): s.value for s in family.samples}

        assert resident() == {}
        for reference in ("ask", "tell", "look"):
            await bench.pinned(reference)
        sizes = {name: bench.bank.adapter(digest_of(bench, name)).num_bytes for name in ("ask", "tell", "look")}
        assert resident() == {(name, "1"): size for name, size in sizes.items()}
        bench.world.push("ask", seed=56)
        await bench.pinned("ask@2")
        assert resident().keys() == {("ask", "1"), ("ask", "2"), ("tell", "1"), ("look", "1")}
        bench.registry.set_status("ask", 2, "retired")
        await bench.loader.refresh()
        assert ("ask", "2") in resident()
        nameless = [replace(bench.bank.adapter(digest_of(bench, "ask")), digest=f"sha256:{n:064x}") for n in range(5)]
        for adapter in nameless:
            bench.bank.put(adapter)
        assert len(resident()) == 5
        assert resident()["", ""] == 5 * nameless[0].num_bytes
        bench.bank.unload(digest_of(bench, "tell"))
        assert ("tell", "1") not in resident()

    run(story)


def digest_of(bench: Bench, name: str) -> str:
    return bench.registry.snapshot().adapters[name][0].weights_digest


def test_a_start_without_the_registry_is_told_as_such(world: World, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def story(bench: Bench) -> None:
        bench.registry.is_away = True
        late = Loader(
            bench.registry, bench.artifacts, Backbones.of_one(world.backbone, bench.bank, Metrics()), Metrics()
        )
        assert late.registry_error == "it is away"
        assert late._metrics.registry.get_sample_value("bank_registry_up") == 0
        caplog.clear()
        await late.refresh()
        assert told(caplog) == []  # that is known
        bench.registry.is_away = False
        await late.refresh()
        assert late._metrics.registry.get_sample_value("bank_registry_up") == 1
        assert told(caplog) == ["registry_available"]
        await late.close()

    run(story)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Names of the events that were logged."""
    return [record.event_keys["event"] for record in caplog.records if hasattr(record, "event_keys")]


def test_serving_goes_on_while_the_registry_is_away(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def story(bench: Bench) -> None:
        known = bench.loader.snapshot
        bench.registry.is_away = True
        for _ in range(3):
            await bench.loader.refresh()
        assert bench.loader.registry_error == "it is away"
        assert bench.loader.snapshot is known
        assert (await bench.pinned("ask")).info.name == "ask"
        with pytest.raises(AdapterNotFound):
            await bench.pinned("nobody")
        bench.registry.is_away = False
        await bench.loader.refresh()
        assert bench.loader.registry_error is None

    run(story)
    assert len([record for record in caplog.records if "serving goes on" in record.message]) == 1
    assert "registry_unavailable" in told(caplog) and "registry_lost" not in told(caplog)


def test_a_registry_with_another_history_or_an_older_state_is_lost_and_not_empty(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def story(bench: Bench) -> None:
        known = bench.loader.snapshot
        store, empty = bench.registry._store, SqliteStore(tmp_path / "another.sqlite")
        empty.create(blank_revision())
        bench.registry._store = empty
        await bench.loader.refresh()
        assert bench.loader.snapshot is known
        assert bench.loader.registry_error is not None and "another history" in bench.loader.registry_error
        assert (await bench.pinned("ask")).info.name == "ask"
        empty.close()
        bench.registry._store = store
        await bench.loader.refresh()
        assert bench.loader.registry_error is None
        assert [name for name in told(caplog) if name.startswith("registry")] == [
            "registry_lost",
            "registry_available",
        ]

    run(story)


def test_the_watcher_sees_changes_and_survives_whatever_a_look_throws(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("service.loader.POLL_INTERVAL_S", 0.001)

    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await asyncio.sleep(0.001)

    async def story(bench: Bench) -> None:
        bench.loader.start()
        bench.world.push("later", seed=53)
        await until(lambda: "later" in bench.loader.snapshot.adapters)
        good = bench.loader._registry
        bench.loader._registry = None  # type: ignore[assignment]
        await until(lambda: "looking at the registry failed" in caplog.text)
        bench.loader._registry = good
        bench.world.push("latest", seed=54)
        await until(lambda: "latest" in bench.loader.snapshot.adapters)

    bench = run(story)
    sample = bench.metrics.registry.get_sample_value("bank_registry_generation")
    assert sample == bench.loader.snapshot.generation > 0


def test_looking_again_at_an_unchanged_registry_reads_no_records(run: Run) -> None:
    async def story(bench: Bench) -> None:
        before = bench.loader.snapshot
        for _ in range(3):
            await bench.loader.refresh()
        assert bench.loader.snapshot is before

    run(story)


async def looks(bench: Bench, number: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while bench.registry.num_looks < number:
            await asyncio.sleep(0.001)


def test_all_who_ask_during_a_look_share_the_next_one(run: Run) -> None:
    async def story(bench: Bench) -> None:
        before = bench.registry.num_looks
        bench.registry.is_slow = threading.Event()
        first = asyncio.create_task(bench.loader.refresh())
        await looks(bench, before + 1)
        others = [asyncio.create_task(bench.loader.refresh()) for _ in range(20)]
        bench.world.push("later", seed=55)
        await asyncio.sleep(0)
        bench.registry.is_slow.set()
        await asyncio.gather(first, *others)
        assert bench.registry.num_looks == before + 2
        assert "later" in bench.loader.snapshot.adapters

    run(story)


def test_what_an_older_look_saw_does_not_replace_what_a_newer_one_did(run: Run) -> None:
    async def story(bench: Bench) -> None:
        before = bench.registry.num_looks
        bench.registry.is_slow = slow = threading.Event()
        older = asyncio.create_task(bench.loader.refresh())
        await looks(bench, before + 1)
        older.cancel()  # whoever asked left; the look goes on
        bench.registry.is_slow = None
        bench.world.push("later", seed=56)
        newer = asyncio.create_task(bench.loader.refresh())
        await asyncio.sleep(0.05)
        slow.set()
        await newer
        assert "later" in bench.loader.snapshot.adapters
        await asyncio.sleep(0.05)
        assert "later" in bench.loader.snapshot.adapters

    run(story)


def test_a_process_that_stood_still_looks_once_and_one_whose_registry_is_away_waits_for_nothing(run: Run) -> None:
    async def story(bench: Bench) -> None:
        before = bench.registry.num_looks
        await asyncio.gather(*(bench.pinned("ask") for _ in range(5)))
        assert bench.registry.num_looks == before
        bench.loader._ticked_at -= 60
        await asyncio.gather(*(bench.pinned("ask") for _ in range(5)))
        assert bench.registry.num_looks in (before + 1, before + 2)  # those who came during the look share another
        bench.registry.is_away = True
        await bench.loader.refresh()
        before = bench.registry.num_looks
        assert (await bench.pinned("ask")).info.name == "ask"
        assert bench.registry.num_looks == before

    run(story)


# --- the end -------------------------------------------------------------------------------------------------


def test_closing_tells_those_whose_load_never_began(run: Run) -> None:
    async def story(bench: Bench) -> None:
        bench.artifacts.is_open.clear()
        tasks = [asyncio.create_task(bench.pinned(name)) for name in ("ask", "tell", "look", "find", "heads")]
        await asyncio.to_thread(bench.artifacts.has_begun.wait, WAIT_S)
        closing = asyncio.create_task(bench.loader.close())
        while not all(t.done() for t in tasks[2:]):  # two load threads: the others wait in their queue
            await asyncio.sleep(0)
        bench.artifacts.is_open.set()
        await closing
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Pin, Pin, NotReady, NotReady, NotReady]
        with pytest.raises(NotReady):
            await bench.pinned("frames")

    run(story)
