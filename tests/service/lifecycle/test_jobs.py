"""Two replicas on one registry, SQLite and Redis: one builds a gallery, and the other goes on when that one dies."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from adapters.registry import JobRecord, Registry
from service.folders import open_registry
from service.gallery.sources import Source
from service.gallery.store import GalleryStore
from service.lifecycle.jobs import JobArguments
from service.loader import Pin
from service.types import RequestContext, RetrieveAnswer, RetrieveQuery, TextQuery
from tests.redis_server import RedisServer
from tests.service.worlds import Service, World, context, picture, running

WAIT_S = 60.0


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


class Gate:
    """Counts what a service embeds, and lets so many items through until it is opened."""

    def __init__(self, service: Service, num_free: int = 10_000) -> None:
        self.seen: list[str] = []
        self._num_free = num_free
        self._is_open = threading.Event()
        galleries = service.runtime.galleries
        self._embedded = galleries._embedded
        galleries._embedded = self._gated  # type: ignore[method-assign]

    async def _gated(self, source: Source, pin: Pin, request: RequestContext) -> Any:
        self.seen.append(source.id)
        while len(self.seen) > self._num_free and not self._is_open.is_set():
            await asyncio.sleep(0.01)
        return await self._embedded(source, pin, request)

    def open(self) -> None:
        self._is_open.set()


@dataclass
class Pair:
    """Two services on one home, and an operator's view of their registry."""

    world: World
    first: Service
    second: Service
    registry: Registry
    media: Path

    def add_pictures(self, numbers: range) -> None:
        self.media.mkdir(exist_ok=True)
        for number in numbers:
            (self.media / f"{number:03d}.png").write_bytes(picture(number))

    def build(self, name: str = "clips", adapter: str = "find", **wanted: Any) -> str:
        arguments = JobArguments(adapter=adapter, source=str(self.media), **wanted)
        return self.first.runtime.deployments.build_gallery(name, arguments, actor="ada").id

    def rebuild(self, name: str = "clips", adapter: str | None = None) -> str:
        return self.second.runtime.deployments.rebuild_gallery(name, adapter, actor="ada").id

    def job(self, job_id: str) -> JobRecord:
        job = self.registry.snapshot().job(job_id)
        assert job is not None
        return job

    def ended(self, job_id: str) -> JobRecord:
        until(lambda: not self.job(job_id).is_active)
        return self.job(job_id)

    def worker(self, job_id: str) -> tuple[Service, Service]:
        """(whoever does a job, the other one)."""
        until(lambda: self.job(job_id).worker is not None)
        is_first = self.job(job_id).worker == self.first.runtime.replica_id
        return (self.first, self.second) if is_first else (self.second, self.first)

    def search(self, service: Service, name: str = "clips") -> RetrieveAnswer:
        generation = self.registry.revision().generation
        until(lambda: service.runtime.loader.snapshot.generation >= generation)
        query = RetrieveQuery(name, TextQuery("a big red circle"), k=3)
        return service.call(service.runtime.retrieve.search(query, context()))


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "redis"])
def pair(world: World, tmp_path: Path, request: pytest.FixtureRequest, redis_server: RedisServer) -> Iterator[Pair]:
    if request.param == "redis":
        world = world.copy(tmp_path, registry_url=f"{redis_server.url}?namespace={tmp_path.name}")
        world.push("find", "retrieval", seed=4)
        world.push("ask", seed=1)
    else:
        world = world.copy(tmp_path)
    registry = open_registry(world.settings)
    with ExitStack() as stack:
        stack.callback(registry.close)
        first, second = (stack.enter_context(running(world.settings)) for _ in range(2))
        yield Pair(world, first, second, registry, tmp_path / "media")


async def crash(service: Service) -> None:
    """Do nothing any more, and say nothing."""
    lifecycle = service.runtime.lifecycle
    for task in lifecycle._tasks:
        task.cancel()
    await asyncio.gather(*lifecycle._tasks, return_exceptions=True)
    await lifecycle._jobs.close()


def test_a_gallery_is_built_while_both_serve_and_searched_on_both(pair: Pair) -> None:
    pair.add_pictures(range(5))
    (pair.media / "broken.png").write_bytes(picture(1)[:30])
    job = pair.ended(pair.build(pooling="mean", index="hnsw", copy_media=True))
    assert (job.phase, job.error, job.version, job.from_version) == ("succeeded", None, 1, None)
    for service in (pair.first, pair.second):
        answer = pair.search(service)
        assert (answer.gallery_version, answer.num_items) == (1, 5)
    head = pair.registry.snapshot().head("clips")
    assert head is not None and head.follows == "find@prod"
    manifest = pair.first.runtime.galleries.store.manifest("clips", 1)
    assert (manifest.index, manifest.copy_media, manifest.num_quarantined) == ("hnsw", True, 1)
    pair.add_pictures(range(5, 7))
    added = pair.ended(pair.build())
    assert (added.phase, added.from_version, added.version) == ("succeeded", 1, 2)
    assert pair.search(pair.second).num_items == 7


def test_another_replica_goes_on_where_one_died(pair: Pair) -> None:
    pair.add_pictures(range(90))
    gates = {id(service): Gate(service, 70) for service in (pair.first, pair.second)}
    job_id = pair.build()
    worker, heir = pair.worker(job_id)
    until(lambda: len(gates[id(worker)].seen) > 70)
    until(lambda: (pair.first.runtime.deployments.operation(job_id).progress or (0, 0))[0] > 0)
    operation = pair.second.runtime.deployments.operation(job_id)
    assert (operation.kind, operation.status, operation.subject, operation.progress) == (
        "gallery", "running", "clips", (70, 90)
    )  # fmt: skip
    worker.call(crash(worker))
    pair.registry.forget(worker.runtime.replica_id)
    job = pair.ended(job_id)
    assert (job.phase, job.worker, job.token, job.version) == ("succeeded", heir.runtime.replica_id, 2, 1)
    assert len(gates[id(heir)].seen) == 20  # what was durable is not embedded again
    assert pair.search(heir).num_items == 90


def test_a_worker_that_was_given_up_too_early_does_no_harm(pair: Pair) -> None:
    """It stood still, so another took over, while the gallery's files were still in its hands."""
    pair.add_pictures(range(4))
    gates = {id(service): Gate(service, 2) for service in (pair.first, pair.second)}
    job_id = pair.build()
    worker, heir = pair.worker(job_id)
    until(lambda: len(gates[id(worker)].seen) > 2)
    gates[id(heir)].open()
    claimed = pair.registry.claim_job(job_id, heir.runtime.replica_id, {heir.runtime.replica_id})
    assert claimed is not None and claimed.token == 2
    job = pair.ended(job_id)
    assert (job.phase, job.worker, job.version) == ("succeeded", heir.runtime.replica_id, 1)
    until(lambda: job_id not in worker.runtime.lifecycle._jobs._running)
    assert pair.search(worker).gallery_version == 1
    assert [record.version for record in pair.registry.snapshot().gallery_versions["clips"]] == [1]


def test_a_version_that_was_made_is_not_made_again(pair: Pair) -> None:
    pair.add_pictures(range(3))
    pair.ended(pair.build())
    pair.first.call(crash(pair.first))
    pair.second.call(crash(pair.second))
    job_id = pair.build(index="hnsw")
    pair.registry.claim_job(job_id, "dead", {"dead"})  # between the version and its going live
    pair.registry.keep_job(job_id, 1, 1, actor="dead")
    gate = Gate(pair.second)
    pair.second.call(_reconcile(pair.second))
    job = pair.ended(job_id)
    assert (job.phase, job.version, gate.seen) == ("succeeded", 1, [])


async def _reconcile(service: Service) -> None:
    await service.runtime.loader.refresh()
    await service.runtime.lifecycle._reconcile()


def test_a_gallery_is_embedded_anew_with_what_its_alias_names(pair: Pair) -> None:
    pair.add_pictures(range(3))
    pair.ended(pair.build())
    again = pair.ended(pair.rebuild())
    assert (again.phase, again.from_version, again.version) == ("succeeded", 1, 2)
    pair.world.push("find", "retrieval", seed=90)
    pair.registry.start_rollout("find", "prod", 2, rollout_id="op", migrate=False)  # the gallery stays behind
    fixed = pair.ended(pair.rebuild())
    snapshot = pair.registry.snapshot()
    assert fixed.phase == "succeeded" and snapshot.gallery("clips").adapter_version == 1
    moved = pair.ended(pair.rebuild(adapter="find"))
    snapshot = pair.registry.snapshot()
    head = snapshot.head("clips")
    assert moved.phase == "succeeded" and head is not None
    assert (head.live, head.follows, snapshot.gallery("clips").adapter_version) == (moved.version, "find@prod", 2)
    assert len({record.content for record in snapshot.gallery_versions["clips"]}) == 1
    assert pair.search(pair.first).adapter.version == 2


@pytest.mark.parametrize("pair", ["sqlite"], indirect=True)
def test_what_cannot_be_built_fails_with_the_reason_and_changes_nothing(pair: Pair) -> None:
    pair.add_pictures(range(2))
    pair.ended(pair.build())
    for path in pair.media.iterdir():
        path.write_bytes(b"no picture")
    failed = pair.ended(pair.build())
    assert failed.phase == "failed" and "nothing could be embedded" in (failed.error or "")
    (pair.media / "lines.jsonl").write_text("{}")
    arguments = JobArguments(adapter="find", source=str(pair.media / "lines.jsonl"))
    wrong = pair.first.runtime.deployments.build_gallery("clips", arguments, actor="ada").id
    assert "lines.jsonl line 1" in (pair.ended(wrong).error or "")
    gone = pair.ended(pair.rebuild())
    assert gone.phase == "failed" and "2 of 2 items" in (gone.error or "")
    assert pair.registry.snapshot().live_version("clips") == 1
    operations = pair.first.runtime.deployments.operations()
    assert [operation.status for operation in operations] == ["failed", "failed", "failed", "succeeded"]
    root = pair.first.runtime.galleries.store.root
    sweeper, now = pair.first.runtime.lifecycle._sweeper, pair.registry.now()
    sweeper._sweep_folders(pair.registry.snapshot(), now - 60)
    assert list(root.glob("*/.build-*"))
    sweeper._sweep_folders(pair.registry.snapshot(), now + 60)
    assert not list(root.glob("*/.build-*")) and pair.search(pair.first).num_items == 2


def test_a_job_is_aborted_while_it_runs(pair: Pair) -> None:
    pair.add_pictures(range(6))
    gates = [Gate(service, 2) for service in (pair.first, pair.second)]
    job_id = pair.build()
    worker, other = pair.worker(job_id)
    until(lambda: any(len(gate.seen) > 2 for gate in gates))
    aborted = other.runtime.deployments.abort(job_id, reason="enough", actor="ada")
    assert (aborted.status, aborted.error, aborted.to_version) == ("failed", "enough", None)
    until(lambda: job_id not in worker.runtime.lifecycle._jobs._running)
    assert "clips" not in pair.registry.snapshot().gallery_versions
    for gate in gates:
        gate.open()
    assert pair.ended(pair.build()).phase == "succeeded"  # goes on with what was embedded


@pytest.mark.parametrize("pair", ["sqlite"], indirect=True)
def test_a_deleted_gallery_is_let_go_of_by_all_and_its_files_are_swept(pair: Pair) -> None:
    pair.add_pictures(range(3))
    pair.ended(pair.build())
    pair.ended(pair.rebuild())
    for service in (pair.first, pair.second):
        pair.search(service)
    held = pair.second.runtime.galleries.store.open("clips", 2)
    pair.first.runtime.deployments.delete_gallery_version("clips", 1, actor="ada")
    pair.first.runtime.deployments.delete_gallery("clips", reason="old", actor="ada")
    stores = [service.runtime.galleries.store for service in (pair.first, pair.second)]
    until(lambda: not any(store.opened() for store in stores))
    sweeper = pair.first.runtime.lifecycle._sweeper
    sweeper.sweep_home()
    assert stores[0].versions("clips") == [1, 2]  # kept for a day
    sweeper._sweep_folders(pair.registry.snapshot(), pair.registry.now() + 60)
    assert GalleryStore(stores[0].root).names() == []
    assert held.index.search(held.vectors[:1], 1).positions.tolist() == [[0]]  # who holds it goes on
    assert pair.ended(pair.build()).version == 3


@pytest.mark.parametrize("pair", ["sqlite"], indirect=True)
def test_a_job_does_what_whoever_asked_was_allowed_to(pair: Pair) -> None:
    """Even when its record says more than it should."""
    pair.add_pictures(range(2))
    arguments = JobArguments(adapter="find", source=str(pair.media), principal="a", adapters=("ask",))
    pair.registry.start_job("build", "clips", job_id="job", adapter="find", arguments=arguments.text())
    assert "may not use" in (pair.ended("job").error or "")
    pair.registry.start_job("build", "clips", job_id="odd", adapter="find", arguments=json.dumps({"colour": "red"}))
    assert "cannot be understood" in (pair.ended("odd").error or "")
