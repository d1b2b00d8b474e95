"""Two replicas on one registry: what one operator starts, both prepare, and alias and galleries move together."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from adapters.errors import Conflict
from adapters.package import write_package
from adapters.registry import Registry, Replica, RolloutRecord, open_registry
from service.folders import HomeFolders
from service.gallery.sources import Source
from service.lifecycle.sweeper import Sweeper
from service.lifecycle.writing import write_probed_package
from service.loader import Loader
from service.pipelines.galleries import BuildOptions
from service.types import MediaBytes, RankDecode, RetrieveAnswer, RetrieveQuery, TextQuery, VqaAnswer, VqaQuery
from tests.service.worlds import Service, World, adapter_config, context, picture, random_tensors, running

WAIT_S = 30.0


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


class Pair:
    """Two services on one home, and an operator's view of their registry."""

    def __init__(self, world: World, services: tuple[Service, Service], registry: Registry) -> None:
        self.world = world
        self.services = services
        self.registry = registry

    @property
    def ids(self) -> list[str]:
        return [service.runtime.replica_id for service in self.services]

    def promote(self, name: str, version: int, rollout_id: str = "op", **wanted: object) -> RolloutRecord:
        self.registry.start_rollout(name, "prod", version, rollout_id=rollout_id, replicas=self.ids, **wanted)  # type: ignore[arg-type]
        until(lambda: not self.rollout(rollout_id).is_active)
        return self.rollout(rollout_id)

    def rollout(self, rollout_id: str) -> RolloutRecord:
        rollout = self.registry.snapshot().rollout(rollout_id)
        assert rollout is not None
        return rollout

    def caught_up(self) -> None:
        """Until both replicas serve the registry's newest state."""
        generation = self.registry.revision().generation
        until(lambda: all(s.runtime.loader.snapshot.generation >= generation for s in self.services))

    def ask(self, service: Service, adapter: str = "ask") -> VqaAnswer:
        query = VqaQuery(adapter, "what colour is the big circle?", MediaBytes("image", picture(1)), RankDecode())
        return service.call(service.runtime.vqa.answer(query, context()))

    def search(self, service: Service, gallery: str = "shared") -> RetrieveAnswer:
        query = RetrieveQuery(gallery, TextQuery("a big red circle"), k=3)
        return service.call(service.runtime.retrieve.search(query, context()))


@pytest.fixture
def pair(world: World, tmp_path: Path) -> Iterator[Pair]:
    world = world.copy(tmp_path)
    registry = open_registry(HomeFolders(world.settings.home).registry)
    with ExitStack() as stack:
        stack.callback(registry.close)
        first = stack.enter_context(running(world.settings))
        second = stack.enter_context(running(world.settings))
        pair = Pair(world, (first, second), registry)
        until(lambda: {replica.id for replica in registry.replicas()} >= set(pair.ids))
        yield pair


def build_gallery(service: Service, folder: Path, numbers: range, name: str = "shared") -> None:
    folder.mkdir(exist_ok=True)
    for number in numbers:
        (folder / f"{number}.png").write_bytes(picture(number))
    sources = [Source(path.name, "image", path) for path in sorted(folder.iterdir())]
    build = service.runtime.galleries.build(name, "find", sources, BuildOptions("image"), context())
    service.call(build)


def test_a_version_goes_live_on_every_replica_and_rolls_back_at_once(pair: Pair) -> None:
    before = [pair.ask(service).adapter.version for service in pair.services]
    pair.world.push("ask", seed=71)
    committed = pair.promote("ask", 2)
    assert (committed.phase, committed.ready) == ("committed", tuple(sorted(pair.ids)))
    pair.caught_up()
    after = [pair.ask(service) for service in pair.services]
    assert (before, [answer.adapter.version for answer in after]) == ([1, 1], [2, 2])
    assert len({answer.adapter.digest for answer in after}) == 1
    pair.registry.roll_back("ask", "prod", rollout_id="back", expect=2)
    pair.caught_up()
    assert [pair.ask(service).adapter.version for service in pair.services] == [1, 1]


def test_both_replicas_hold_the_version_before_it_is_live(pair: Pair) -> None:
    pair.world.push("ask", seed=72)
    digest = pair.registry.snapshot().version("ask", 2).weights_digest
    pair.registry.start_rollout("ask", "prod", 2, rollout_id="op", replicas=[*pair.ids, "a replica that never answers"])
    pair.registry.beat(replica_that_lives := _replica("a replica that never answers"))
    until(lambda: set(pair.rollout("op").ready) == set(pair.ids))
    assert all(digest in s.runtime.bank.residency()["host"] for s in pair.services)
    assert pair.rollout("op").phase == "preparing" and pair.registry.snapshot().aliases_of("ask") == {"prod": 1}
    pair.registry.forget(replica_that_lives.id)
    until(lambda: pair.rollout("op").phase == "committed")


def _replica(name: str) -> Replica:
    return Replica(name, 0, True)


def test_a_version_that_a_replica_cannot_serve_aborts_its_rollout(pair: Pair) -> None:
    record = pair.world.push("ask", seed=73)
    for service in pair.services:
        service.runtime.artifacts.delete(record.package_digest)
    aborted = pair.promote("ask", 2)
    assert aborted.phase == "aborted" and "cannot serve it" in (aborted.error or "")
    assert pair.registry.snapshot().aliases_of("ask") == {"prod": 1}
    assert pair.ask(pair.services[0]).adapter.version == 1


def test_a_rollout_past_its_deadline_is_aborted_by_whoever_lives(pair: Pair) -> None:
    pair.world.push("ask", seed=74)
    pair.registry.beat(_replica("silent"))
    pair.registry.start_rollout("ask", "prod", 2, rollout_id="op", replicas=[*pair.ids, "silent"], timeout_s=1.0)
    until(lambda: not pair.rollout("op").is_active)
    assert pair.rollout("op").phase == "aborted"
    assert "it waited for silent" in (pair.rollout("op").error or "")


def test_a_gallery_moves_with_its_alias_and_never_answers_with_two_keys(pair: Pair, tmp_path: Path) -> None:
    first, second = pair.services
    build_gallery(first, tmp_path / "media", range(4))
    pair.caught_up()
    pair.world.push("find", "retrieval", seed=75)
    seen: set[tuple[int, str]] = set()
    is_over = threading.Event()
    failures: list[BaseException] = []

    def search_on(service: Service) -> None:
        while not is_over.is_set():
            try:
                answer = pair.search(service)
                seen.add((answer.gallery_version, answer.adapter.digest))
            except BaseException as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=search_on, args=(service,)) for service in pair.services]
    for thread in threads:
        thread.start()
    try:
        committed = pair.promote("find", 2)
        pair.caught_up()
    finally:
        time.sleep(0.2)
        is_over.set()
        for thread in threads:
            thread.join(WAIT_S)
    assert not failures
    snapshot = pair.registry.snapshot()
    old, new = (snapshot.version("find", number).weights_digest for number in (1, 2))
    assert committed.phase == "committed" and [move.to_version for move in committed.moves] == [2]
    assert seen == {(1, old), (2, new)}
    build_gallery(second, tmp_path / "media", range(4, 6))  # the old key gets the new items too
    pair.registry.roll_back("find", "prod", rollout_id="back", expect=2)
    pair.caught_up()
    answer = pair.search(first)
    assert (answer.adapter.digest, answer.num_items) == (old, 6)


def test_a_gallery_that_lost_too_many_media_fails_the_rollout(pair: Pair, tmp_path: Path) -> None:
    build_gallery(pair.services[0], tmp_path / "media", range(3))
    (tmp_path / "media" / "1.png").unlink()
    pair.world.push("find", "retrieval", seed=76)
    aborted = pair.promote("find", 2)
    assert aborted.phase == "aborted" and "1 of 3 items" in (aborted.error or "")
    pair.caught_up()
    assert pair.search(pair.services[1]).gallery_version == 1


def test_a_gallery_is_not_built_while_a_rollout_embeds_it(pair: Pair, tmp_path: Path) -> None:
    build_gallery(pair.services[0], tmp_path / "media", range(2))
    pair.world.push("find", "retrieval", seed=77)
    pair.registry.beat(_replica("silent"))
    pair.registry.start_rollout("find", "prod", 2, rollout_id="op", replicas=["silent"])
    with pytest.raises(Conflict, match="operation op"):
        build_gallery(pair.services[1], tmp_path / "media", range(3))
    pair.registry.abort_rollout("op", "enough")


def stage(pair: Pair, folder: Path, name: str, *, probed: bool) -> None:
    """Push a package as an operator does."""
    backbone = pair.world.backbone
    config = adapter_config(backbone)
    tensors = random_tensors(config, backbone.dims(), 78)
    if probed:
        write_probed_package(folder, config, tensors, "# staged\n", backbone)
    else:
        write_package(folder, config, tensors, "# staged\n", None)
    pair.services[0].runtime.deployments.push(folder, name, actor="ada")


def test_a_pushed_version_is_validated_by_one_of_them_and_becomes_prod(pair: Pair, tmp_path: Path) -> None:
    stage(pair, tmp_path / "good", "fresh", probed=True)
    until(lambda: pair.registry.snapshot().version("fresh", 1).status in ("ready", "failed"))
    assert pair.registry.snapshot().version("fresh", 1).reason is None
    assert pair.registry.snapshot().aliases_of("fresh") == {"prod": 1}
    lines = [line for line in pair.registry.audit() if line.subject == "fresh@1"]
    assert [line.action for line in lines] == ["validated", "validate", "add_version"]


def test_a_version_without_a_probe_is_refused_and_serves_nobody(pair: Pair, tmp_path: Path) -> None:
    stage(pair, tmp_path / "bad", "fresh", probed=False)
    until(lambda: pair.registry.snapshot().version("fresh", 1).status in ("ready", "failed"))
    assert "carries no probe" in (pair.registry.snapshot().version("fresh", 1).reason or "")
    assert pair.registry.snapshot().aliases_of("fresh") == {}


def test_a_replica_that_stood_still_looks_before_it_answers(pair: Pair) -> None:
    frozen = pair.services[1].runtime.loader
    pair.world.push("ask", seed=79)
    pair.services[1].call(_stop_watching(frozen))
    pair.registry.start_rollout("ask", "prod", 2, rollout_id="op")
    assert frozen.snapshot.aliases_of("ask") == {"prod": 1}
    frozen._ticked_at -= 60
    assert pair.ask(pair.services[1]).adapter.version == 2


def test_a_replica_that_stood_still_looks_before_it_searches(pair: Pair, tmp_path: Path) -> None:
    build_gallery(pair.services[0], tmp_path / "media", range(2))
    pair.caught_up()
    frozen = pair.services[1].runtime.loader
    assert pair.search(pair.services[1]).gallery_version == 1
    pair.services[1].call(_stop_watching(frozen))
    build_gallery(pair.services[0], tmp_path / "media", range(2, 4))
    assert frozen.snapshot.live_version("shared") == 1
    frozen._ticked_at -= 60
    assert pair.search(pair.services[1]).gallery_version == 2


def test_a_replica_that_died_long_ago_is_forgotten(pair: Pair) -> None:
    runtime = pair.services[0].runtime
    pair.registry.beat(_replica("long gone"))
    time.sleep(0.1)
    sweeper = Sweeper("sweeper", pair.registry, runtime.artifacts, runtime.galleries.store, grace_s=0.05)
    sweeper.sweep(pair.registry.snapshot())
    assert "long gone" not in {replica.id for replica in pair.registry.replicas()}


def test_duties_end_when_they_are_told_to_whatever_happens_at_that_moment(pair: Pair) -> None:
    lifecycle = pair.services[0].runtime.lifecycle

    async def end(num_steps: int) -> None:
        task = asyncio.create_task(lifecycle._reconcile_on())
        await asyncio.sleep(0.2)
        lifecycle._wake.set()  # something changed
        for _ in range(num_steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=WAIT_S / 10)
        assert task.cancelled()

    for num_steps in range(5):
        pair.services[0].call(end(num_steps))


async def _stop_watching(loader: Loader) -> None:
    assert loader._watcher is not None
    loader._watcher.cancel()


def routed(pair: Pair, key: str | None, adapter: str = "ask") -> VqaAnswer:
    query = VqaQuery(adapter, "what colour is the big circle?", MediaBytes("image", picture(1)), RankDecode())
    runtime = pair.services[0].runtime
    return pair.services[0].call(runtime.vqa.answer(query, context(routing_key=key)))


def test_a_canary_gets_its_share_and_keys_stay_where_they_are(pair: Pair) -> None:
    pair.world.push("ask", seed=80)
    pair.promote("ask", 2, traffic=0.3)
    pair.caught_up()
    keys = [f"user-{number}" for number in range(60)]
    first = {key: routed(pair, key).adapter for key in keys}
    assert {info.version for info in first.values()} == {1, 2}
    assert all(info.is_canary == (info.version == 2) for info in first.values())
    assert 6 <= sum(info.is_canary for info in first.values()) <= 32  # 18 expected of 60
    assert {key: routed(pair, key).adapter for key in keys[:10]} == {key: first[key] for key in keys[:10]}
    assert routed(pair, None).adapter.version == 1
    assert routed(pair, keys[0], "ask@2").adapter.version == 2
    pair.registry.end_canary("ask", "prod", expect=2)
    pair.caught_up()
    assert {routed(pair, key).adapter.version for key in keys} == {1}


def test_a_canary_searches_galleries_of_its_own(pair: Pair, tmp_path: Path) -> None:
    build_gallery(pair.services[0], tmp_path / "media", range(3))
    pair.world.push("find", "retrieval", seed=81)
    pair.promote("find", 2, "canary", traffic=0.5)
    pair.caught_up()
    runtime = pair.services[1].runtime
    seen = set()
    for number in range(24):
        for adapter in (None, "find"):
            query = RetrieveQuery("shared", TextQuery("a big red circle"), k=2, adapter=adapter)
            answer = pair.services[1].call(runtime.retrieve.search(query, context(routing_key=str(number))))
            seen.add((answer.gallery_version, answer.adapter.version, answer.adapter.is_canary))
    assert seen == {(1, 1, False), (2, 2, True)}
    assert pair.promote("find", 2, "whole").phase == "committed"
    pair.caught_up()
    assert pair.search(pair.services[0]).gallery_version == 2


def test_a_replica_that_has_started_is_one_that_rollouts_wait_for(world: World, tmp_path: Path) -> None:
    with running(world.copy(tmp_path).settings) as service:
        (replica,) = service.runtime.registry.replicas()
        assert replica.is_serving
