"""Servers with homes of their own on one Redis and one place for packages: what one makes, the others fetch."""

import asyncio
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import ArtifactUnavailable
from adapters.registry import GalleryRecord, JobRecord, Registry
from service.auth import LOCAL
from service.config import Settings
from service.errors import DeadlineExceeded, GalleryDamaged, InsufficientRoom
from service.folders import open_registry
from service.gallery import trees as trees_module
from service.gallery.sources import Source
from service.gallery.store import Gallery
from service.lifecycle.sweeper import Sweeper
from service.operator import LocalOperator
from service.pipelines.galleries import BuildOptions
from service.types import MediaBytes, RankDecode, RetrieveAnswer, RetrieveQuery, TextQuery, VqaQuery
from tests.redis_server import RedisServer
from tests.service.lifecycle.replicas import Replica, until
from tests.service.lifecycle.test_jobs import Gate
from tests.service.worlds import Service, World, context, picture, running

pytestmark = pytest.mark.timeout(120)


@dataclass
class Hosts:
    """Two hosts' services, and what both can reach."""

    world: World
    first: Service
    second: Service
    registry: Registry
    folder: Path

    @property
    def store(self) -> Path:
        """Where trees are."""
        return self.folder / "shared" / "trees" / "sha256"

    def media(self, name: str, numbers: range, *, tail: bytes = b"") -> list[Source]:
        folder = self.folder / f"media-{name}"
        folder.mkdir(exist_ok=True)
        for path, number in ((folder / f"{number}.png", number) for number in numbers):
            if not path.exists():
                path.write_bytes(picture(number) + tail)
        return [Source(path.name, "image", path) for path in sorted(folder.iterdir())]

    def build(self, name: str, numbers: range = range(4), *, adapter: str = "find", **options: Any) -> GalleryRecord:
        """Build a gallery on the first host."""
        sources = self.media(name, numbers)
        build = self.first.runtime.galleries.build(name, adapter, sources, BuildOptions("image", **options), context())
        return self.first.call(build)

    def caught_up(self, service: Service) -> None:
        generation = self.registry.revision().generation
        until(lambda: service.runtime.loader.snapshot.generation >= generation)

    def search(self, service: Service, name: str, timeout_s: float = 30.0) -> RetrieveAnswer:
        self.caught_up(service)
        query = RetrieveQuery(name, TextQuery("a big red circle"), k=4, rerank="frames")
        return service.call(service.runtime.retrieve.search(query, context(timeout_s)))

    def path(self, service: Service, name: str, version: int = 1) -> Path:
        return service.runtime.galleries.store.root / name / f"v{version}"

    def stored(self, record: GalleryRecord) -> Path:
        assert record.tree is not None
        return self.store / record.tree.removeprefix("sha256:")


async def stop_ahead(service: Service) -> None:
    """Fetch nothing any more but what somebody asks for."""
    ahead = service.runtime.galleries._ahead
    assert ahead is not None
    ahead.cancel()
    await asyncio.gather(ahead, return_exceptions=True)


async def start_ahead(service: Service) -> None:
    service.runtime.galleries.start()


@pytest.fixture(scope="module")
def hosts(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    folder = tmp_path_factory.mktemp("hosts")
    redis = RedisServer(folder / "redis")
    redis.start()
    shared = {"registry_url": redis.url, "artifacts_url": f"file://{folder}/shared"}
    worlds = [world.copy(folder / name, **shared) for name in ("a", "b")]
    worlds[0].push("find", "retrieval", seed=4)
    worlds[0].push("ask", seed=1)
    registry = open_registry(worlds[0].settings)
    with ExitStack() as stack:
        stack.callback(redis.stop)
        stack.callback(registry.close)
        first, second = (stack.enter_context(running(world.settings)) for world in worlds)
        second.call(stop_ahead(second))
        yield Hosts(worlds[0], first, second, registry, folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(".*") if path.name != ".lock"]


# --- one builds, the other searches ----------------------------------------------------------------------------------


def test_what_one_host_builds_the_other_searches_with_the_same_answers(hosts: Hosts) -> None:
    record = hosts.build("there", range(7), index="hnsw", copy_media=True)
    assert record.status == "ready" and hosts.stored(record).is_dir()
    assert not hosts.path(hosts.second, "there").exists()
    one, other = hosts.search(hosts.first, "there"), hosts.search(hosts.second, "there")
    assert one.num_items == 7 and other == one
    assert contents(hosts.path(hosts.second, "there")) == contents(hosts.path(hosts.first, "there"))
    assert hidden(hosts.path(hosts.second, "there").parent) == []
    shutil.rmtree(hosts.folder / "media-there")
    rebuilt = hosts.second.runtime.galleries.rebuild("there", 1, "find@1", context())  # copies are in the tree
    assert hosts.second.call(rebuilt).version == 2


def test_a_host_that_has_nothing_lists_what_there_is_and_fetches_nothing(hosts: Hosts) -> None:
    record = hosts.build("listed")
    hosts.caught_up(hosts.second)
    galleries = hosts.second.runtime.galleries
    manifest = hosts.second.call(galleries.manifest("listed", None, LOCAL))
    assert manifest == Gallery.open(hosts.path(hosts.first, "listed")).manifest
    assert hosts.second.call(galleries.versions("listed", LOCAL)) == [record.version]
    bare = Settings.model_validate({**hosts.world.settings.model_dump(), "home": hosts.folder / "bare"})
    with LocalOperator(bare) as operator:
        assert operator.gallery("listed").num_items == 4
        assert "listed" in [gallery.name for gallery in operator.galleries()]
    assert not hosts.path(hosts.second, "listed").parent.exists() and not (hosts.folder / "bare/galleries").exists()


def test_what_a_job_makes_goes_live_when_both_hosts_have_it(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts.build("rebuilt", copy_media=True)
    services = (hosts.first, hosts.second)
    assert [hosts.search(service, "rebuilt").gallery_version for service in services] == [1, 1]
    slow = [Slowly(service, monkeypatch) for service in services]
    hosts.second.call(start_ahead(hosts.second))
    try:
        job_id = hosts.second.runtime.deployments.rebuild_gallery("rebuilt", actor="ada").id

        def job() -> JobRecord:
            record = hosts.registry.snapshot().job(job_id)
            assert record is not None
            return record

        until(lambda: job().version == 2)
        time.sleep(2.5)  # longer than between two signs of life
        assert job().phase == "running"  # whoever did not embed it fetches it
        assert [hosts.search(service, "rebuilt").gallery_version for service in services] == [1, 1]
        for each in slow:
            each.go.set()
        until(lambda: not job().is_active)
    finally:
        for each in slow:
            each.go.set()
        hosts.second.call(stop_ahead(hosts.second))
    assert job().phase == "succeeded" and all(hosts.path(service, "rebuilt", 2).exists() for service in services)
    answers = [hosts.search(service, "rebuilt") for service in services]
    assert answers[0] == answers[1] and answers[0].gallery_version == 2


def test_alias_and_gallery_move_together_once_both_hosts_have_the_gallery(hosts: Hosts) -> None:
    hosts.world.push("seek", "retrieval", seed=301)
    hosts.build("moving", adapter="seek")
    services = (hosts.first, hosts.second)
    assert [hosts.search(service, "moving").gallery_version for service in services] == [1, 1]
    hosts.world.push("seek", "retrieval", seed=302)
    seen: set[tuple[int, str]] = set()
    late: list[Path] = []
    is_over = threading.Event()

    def search_on(service: Service) -> None:
        while not is_over.is_set():
            query = RetrieveQuery("moving", TextQuery("a big red circle"), k=3)
            answer = service.call(service.runtime.retrieve.search(query, context()))
            seen.add((answer.gallery_version, answer.adapter.digest))
            if hosts.registry.snapshot().live_version("moving") == 2:
                late.extend(p for p in (hosts.path(s, "moving", 2) for s in services) if not p.exists())

    with ThreadPoolExecutor(2) as threads:
        searching = [threads.submit(search_on, service) for service in services]
        try:
            ids = [service.runtime.replica_id for service in services]
            hosts.registry.start_rollout("seek", "prod", 2, rollout_id="moving", replicas=ids)
            until(lambda: not hosts.registry.snapshot().active_rollouts)
            for service in services:
                hosts.caught_up(service)
            time.sleep(0.1)
        finally:
            is_over.set()
        for search in searching:
            search.result()
    snapshot = hosts.registry.snapshot()
    rollout = snapshot.rollout("moving")
    assert rollout is not None and (rollout.phase, rollout.ready) == ("committed", tuple(sorted(ids)))
    old, new = (snapshot.version("seek", number).weights_digest for number in (1, 2))
    assert seen == {(1, old), (2, new)} and late == []


# --- fetching --------------------------------------------------------------------------------------------------------


class Slowly:
    """Holds a host's fetches up until it is told to let them through, and counts them."""

    def __init__(self, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        trees = service.runtime.galleries._trees._trees
        assert trees is not None
        self.num_fetches = 0
        self.go = threading.Event()
        self._fetch: Callable[..., None] = trees.fetch_tree
        monkeypatch.setattr(trees, "fetch_tree", self._fetch_slowly)

    def _fetch_slowly(self, *arguments: Any) -> None:
        self.num_fetches += 1
        assert self.go.wait(30)
        self._fetch(*arguments)


def test_requests_wait_for_one_fetch_within_their_deadlines_and_hold_nobody_up(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts.build("slow")
    slowly = Slowly(hosts.second, monkeypatch)
    with ThreadPoolExecutor(12) as threads:
        try:
            waiting = [threads.submit(hosts.search, hosts.second, "slow") for _ in range(12)]
            with pytest.raises(DeadlineExceeded):
                hosts.search(hosts.second, "slow", timeout_s=0.2)
            query = VqaQuery("ask", "what colour is the big circle?", MediaBytes("image", picture(1)), RankDecode())
            vqa = hosts.second.runtime.vqa
            assert hosts.second.call(vqa.answer(query, context(10.0))).adapter.version == 1
            assert not any(search.done() for search in waiting)
        finally:
            slowly.go.set()
        assert {search.result().num_items for search in waiting} == {4}
    assert slowly.num_fetches == 1


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_damaged_tree_is_no_gallery_and_harms_no_other(hosts: Hosts, damage: str) -> None:
    record, fine = hosts.build(f"damaged-{damage}"), hosts.build(f"fine-{damage}")
    path = hosts.stored(record) / "vectors.npy" if damage == "changed" else Path(f"{hosts.stored(record)}.json")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1])) if damage == "changed" else path.unlink()
    with pytest.raises(GalleryDamaged, match=record.key):
        hosts.search(hosts.second, record.name)
    assert not hosts.path(hosts.second, record.name).exists()
    assert hosts.search(hosts.second, fine.name).num_items == 4
    path.write_bytes(data)
    assert hosts.search(hosts.second, record.name).num_items == 4


def test_what_does_not_fit_on_the_disk_is_not_begun(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    record = hosts.build("large")
    usage = shutil.disk_usage(hosts.folder)
    monkeypatch.setattr(trees_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InsufficientRoom, match="1,000 bytes of disk are free"):
        hosts.search(hosts.second, "large")
    left = hosts.path(hosts.second, "large").parent
    assert not hosts.path(hosts.second, "large").exists() and not any(contents(left).values())
    monkeypatch.undo()
    assert hosts.search(hosts.second, "large").gallery_version == record.version


def test_a_folder_of_another_history_is_not_searched(hosts: Hosts) -> None:
    hosts.build("mine", range(3))
    hosts.build("yours", range(3, 6))
    shutil.copytree(hosts.path(hosts.first, "yours"), hosts.path(hosts.second, "mine"))
    with pytest.raises(GalleryDamaged, match="another version than the registry's"):
        hosts.search(hosts.second, "mine")
    shutil.rmtree(hosts.path(hosts.second, "mine"))
    assert hosts.search(hosts.second, "mine") == hosts.search(hosts.first, "mine")


# --- putting ---------------------------------------------------------------------------------------------------------


def test_a_store_that_goes_away_costs_no_embedding(hosts: Hosts) -> None:
    gate = Gate(hosts.first)
    sources = hosts.media("away", range(4))
    galleries = hosts.first.runtime.galleries
    embedded, aside = galleries._embedded, hosts.folder / "aside"

    async def take_away(*arguments: Any) -> Any:
        if not aside.exists():
            os.rename(hosts.store, aside)
            hosts.store.write_text("in the way")
        return await embedded(*arguments)

    galleries._embedded = take_away  # type: ignore[method-assign]
    try:
        with pytest.raises(ArtifactUnavailable):
            hosts.first.call(galleries.build("away", "find", sources, BuildOptions("image"), context(4.0)))
        assert len(gate.seen) == 4
        (failed,) = (record for record in hosts.registry.snapshot().galleries if record.name == "away")
        assert failed.status == "deleted" and "could not be written" in (failed.reason or "")
        with pytest.raises(ArtifactUnavailable):  # said at once, and not after hours
            hosts.first.call(galleries.build("other", "find", sources, BuildOptions("image"), context()))
        assert len(gate.seen) == 4
    finally:
        galleries._embedded = gate._embedded  # type: ignore[method-assign]
        hosts.store.unlink()
        os.rename(aside, hosts.store)
    again = Gate(hosts.first)
    assert hosts.build("away").version == 2 and again.seen == []
    galleries._embedded = gate._embedded  # type: ignore[method-assign]
    assert hosts.search(hosts.second, "away").gallery_version == 2


def test_a_build_is_ready_once_the_store_is_back_and_ends_when_it_is_told_to(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees = hosts.first.runtime.galleries._trees
    assert trees._trees is not None
    failing = threading.Event()
    failing.set()
    put = trees._trees.put_tree

    def put_when_back(*arguments: Any) -> str:
        if failing.is_set():
            raise ArtifactUnavailable("not now")
        return put(*arguments)

    monkeypatch.setattr(trees_module, "RETRY_S", 0.05)
    monkeypatch.setattr(trees._trees, "put_tree", put_when_back)
    sources, options = hosts.media("patient", range(3)), BuildOptions("image")
    galleries = hosts.first.runtime.galleries

    def begun() -> Future[GalleryRecord]:
        build = galleries.build("patient", "find", sources, options, context())
        return asyncio.run_coroutine_threadsafe(build, hosts.first.loop)

    def statuses() -> list[str]:
        return [record.status for record in hosts.registry.snapshot().galleries if record.name == "patient"]

    aborted = begun()
    until(lambda: statuses() == ["building"])
    aborted.cancel()
    until(lambda: statuses() == ["deleted"])
    work = begun()
    until(lambda: statuses() == ["deleted", "building"])
    time.sleep(0.2)
    assert not work.done()
    failing.clear()
    assert work.result(30).version == 2
    assert statuses() == ["deleted", "ready"]


# --- sweeping --------------------------------------------------------------------------------------------------------


def test_what_a_deleted_gallery_took_is_swept_from_the_store_and_from_every_home(hosts: Hosts) -> None:
    record, kept = hosts.build("swept"), hosts.build("kept")
    for name in ("swept", "kept"):
        hosts.search(hosts.second, name)
    hosts.registry.delete_gallery("swept")
    time.sleep(0.1)
    runtimes = [service.runtime for service in (hosts.first, hosts.second)]
    sweepers = [
        Sweeper(
            runtime.replica_id,
            hosts.registry,
            runtime.artifacts,
            runtime.galleries.store,
            runtime.galleries._trees._trees,
            grace_s=0.05,
        )
        for runtime in runtimes
    ]
    sweepers[0].sweep(hosts.registry.snapshot())
    assert not hosts.stored(record).exists() and not Path(f"{hosts.stored(record)}.json").exists()
    assert hosts.stored(kept).is_dir()
    for sweeper in sweepers:
        sweeper.sweep_home()
    for service in (hosts.first, hosts.second):
        assert not hosts.path(service, "swept").exists()
        assert hosts.search(service, "kept").num_items == 4


# --- dying -----------------------------------------------------------------------------------------------------------


def replica_of(settings: Settings) -> Replica:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BANK_")}
    values = settings.model_dump(exclude_none=True)
    return Replica(settings.home, environment | {f"BANK_{k.upper()}": str(v) for k, v in values.items()})


def test_a_replica_that_dies_half_way_through_a_fetch_shows_nothing_and_goes_on(hosts: Hosts, world: World) -> None:
    tail = bytes(24 * 2**20)  # after the end of each picture, where decoders do not look
    sources = hosts.media("heavy", range(3), tail=tail)
    options = BuildOptions("image", copy_media=True)
    hosts.first.call(hosts.first.runtime.galleries.build("heavy", "find", sources, options, context()))
    settings = hosts.world.settings
    changes = {"registry_url": settings.registry_url, "artifacts_url": settings.artifacts_url}
    third = world.copy(hosts.folder / "c", **changes).settings
    replica = replica_of(third)
    folder = replica.home / "galleries" / "heavy"

    def is_half_way() -> bool:
        return any(folder.glob(".v1.*.part/media/*")) and not (folder / "v1").exists()

    try:
        replica.start()
        replica.kill_while(is_half_way)  # at the start, ahead of any request
    finally:
        replica.stop()
    assert hidden(folder) == [path.name for path in folder.iterdir()] != []
    assert "fetching gallery heavy@1 from" in replica.log
    with running(third) as service:
        until(lambda: (folder / "v1").exists())
        assert hidden(folder) == []
        assert hosts.search(service, "heavy") == hosts.search(hosts.first, "heavy")
    assert contents(folder / "v1") == contents(hosts.path(hosts.first, "heavy"))
