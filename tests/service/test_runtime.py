"""The parts tied together: one backbone that nothing ever writes to, a start that may fail, a drain, an end."""

import asyncio
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters.config import BASE_ADAPTER
from adapters.errors import AdapterBankError, BackboneNotFound, MissingPart, RegistryUnavailable
from service import runtime as runtime_module
from service.backbone.base import Backbone, part_digest, part_tensors
from service.errors import NotReady
from service.gallery.sources import Source
from service.pipelines.galleries import BuildOptions
from service.runtime import Runtime, pick_device
from service.types import (
    GenerateDecode,
    MediaBytes,
    RankDecode,
    RetrieveAnswer,
    RetrieveQuery,
    TextQuery,
    VqaAnswer,
    VqaQuery,
)
from tests.service.test_bank import holders, slot_leases
from tests.service.worlds import Service, World, context, picture, running, write_tiny_backbone

NUM_LOADS = 200
Query = VqaQuery | RetrieveQuery
Answer = VqaAnswer | RetrieveAnswer


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Threads that begin in the test end in it, and so do processes."""
    threads, children = set(threading.enumerate()), child_processes()
    yield
    for thread in set(threading.enumerate()) - threads:
        thread.join(10)
        assert not thread.is_alive(), thread
    assert child_processes() == children


def child_processes() -> set[int]:
    """Read from /proc; none where there is no /proc."""
    children = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            if status.read_text().rpartition(")")[2].split()[1] == str(os.getpid()):
                children.add(int(status.parent.name))
    return children


# --- the client's promise ------------------------------------------------------------------------------------


def fingerprint(backbone: Backbone) -> dict[str, tuple[int, int, int]]:
    """Of every parameter: storage address, offset and version counter (raised by each write in place)."""
    return {
        name: (p.untyped_storage().data_ptr(), p.storage_offset(), p._version)
        for name, p in backbone.model.named_parameters()
    }


def digests(backbone: Backbone) -> dict[str, str]:
    """Of every part, computed anew from the values in memory."""
    tensors = part_tensors(backbone.model)
    return {part: part_digest(backbone.config, part, own) for part, own in tensors.items()}


def sample(runtime: Runtime, name: str, **labels: str) -> float:
    return runtime.metrics.registry.get_sample_value(name, labels) or 0.0


def changes(runtime: Runtime, tier: str) -> float:
    """Loads of a tier that were followed by an eviction."""
    return min(sample(runtime, f"bank_adapter_{what}_total", tier=tier) for what in ("loads", "evictions"))


def essence(answer: Answer) -> list[object]:
    """What must not depend on who else is served: words, ids and, rounded, scores."""
    if isinstance(answer, VqaAnswer):
        return [answer.adapter.digest, answer.answer, answer.index, round(answer.score, 3)]
    return [answer.adapter.digest, *[(hit.id, round(hit.score, 3)) for hit in answer.hits]]


async def ask(runtime: Runtime, query: Query) -> Answer:
    if isinstance(query, VqaQuery):
        return await runtime.vqa.answer(query, context(client=query.adapter))
    return await runtime.retrieve.search(query, context(client="searcher"))


def test_two_hundred_loads_and_evictions_under_requests_leave_the_backbone_untouched(
    world: World, tmp_path: Path
) -> None:
    """Few slots and a host cache below one adapter: nearly every request loads from disk and overwrites a slot."""
    world = world.copy(tmp_path, slots="4:2,8:1", media_workers=2)
    for number in range(6):
        world.push(f"vqa-{number}", seed=100 + number, rank=2 + number)
    with running(world.settings) as service:
        runtime = service.runtime
        runtime.bank._host_bytes = 1
        queries = service.call(_prepare(runtime, tmp_path))
        alone = [essence(service.call(ask(runtime, query))) for query in queries]
        assert len({str(answer) for answer in alone}) > len(alone) // 2, "the adapters hardly differ"
        process, before, parts = os.getpid(), fingerprint(runtime.backbone), digests(runtime.backbone)
        begun = [changes(runtime, tier) for tier in ("host", "device")]
        rng = random.Random(0)

        async def crowd() -> None:
            chosen = [rng.randrange(len(queries)) for _ in range(24)]
            answers = await asyncio.gather(*[ask(runtime, queries[i]) for i in chosen])
            for i, answer in zip(chosen, answers, strict=True):
                assert_same(essence(answer), alone[i])

        while any(
            changes(runtime, tier) - start < NUM_LOADS for tier, start in zip(("host", "device"), begun, strict=True)
        ):
            service.call(crowd())
        assert os.getpid() == process
        assert fingerprint(runtime.backbone) == before
        assert digests(runtime.backbone) == parts
        assert parts == {part: digest for part, digest in runtime.backbone.parts.items() if part != "tokenizer"}
        assert sample(runtime, "bank_backbone_loads_total") == 1
        runtime.backbone.verify()
        assert holders(runtime.bank) == slot_leases(runtime.bank) == runtime.admission.num_permits == 0
        assert runtime.bank.residency()["host"] == {}


def assert_same(got: list[object], expected: list[object]) -> None:
    """Equal but for the last digit of a rounded score."""
    for a, b in zip(_flat(got), _flat(expected), strict=True):
        assert a == b or (isinstance(a, float) and isinstance(b, float) and abs(a - b) < 0.0015), (got, expected)


def _flat(values: list[object]) -> list[object]:
    return [one for value in values for one in (value if isinstance(value, tuple) else (value,))]


async def _prepare(runtime: Runtime, folder: Path) -> list[Query]:
    """Galleries of two adapters; questions and searches that between them use eleven adapters and none."""
    files = []
    for number in range(6):
        files.append(folder / f"{number}.png")
        files[-1].write_bytes(picture(number))
    sources = [Source(file.name, "image", file) for file in files]
    for name, adapter in (("found", "find"), ("headed", "heads")):
        await runtime.galleries.build(name, adapter, sources, BuildOptions("image"), context())
    queries: list[Query] = []
    adapters = ["ask", "tell", "look", *[f"vqa-{number}" for number in range(6)], BASE_ADAPTER]
    for number, adapter in enumerate(adapters):
        media = MediaBytes("image", picture(number % 4))
        queries.append(VqaQuery(adapter, "what colour is the circle?", media, GenerateDecode(2, 3)))
        queries.append(VqaQuery(adapter, "is it big?", media, RankDecode(("red", "green", "a big circle"), 2)))
    for gallery in ("found", "headed"):
        queries.append(RetrieveQuery(gallery, TextQuery("a red circle"), k=4))
        queries.append(RetrieveQuery(gallery, TextQuery("a big green square"), k=3, rerank="match", rerank_depth=4))
    return queries


# --- starting, draining, ending ------------------------------------------------------------------------------


def test_a_service_says_what_it_is_doing(world: World, tmp_path: Path, no_leaks: None) -> None:
    world = world.copy(tmp_path)

    async def story() -> None:
        runtime = Runtime(world.settings)
        assert runtime.status()["ready"] is False
        assert runtime.status()["reasons"] == ["starting"]
        await runtime.start()
        status = runtime.status()
        assert (status["ready"], status["reasons"], status["last_forward_age_s"]) == (True, [], None)
        assert status["registry_generation"] == runtime.registry.revision().generation
        assert status["registry_error"] is None
        assert status["resident"] == {"device": {}, "host": {}}
        assert status["backbone"] == {"digest": runtime.backbone.digest, "parts": dict(runtime.backbone.parts)}
        query = VqaQuery("ask", "is it red?", MediaBytes("image", picture()), GenerateDecode())
        await runtime.vqa.answer(query, context())
        age = runtime.status()["last_forward_age_s"]
        assert isinstance(age, float)
        assert age >= 0
        assert set(runtime.loader.snapshot.adapters) == {"ask", "tell", "look", "find", "frames", "heads"}
        await runtime.drain(timeout_s=1.0)
        assert runtime.status()["reasons"] == ["draining"]
        with pytest.raises(NotReady, match="shutting down"):
            await runtime.vqa.answer(query, context())
        await runtime.close()
        assert runtime.status()["ready"] is False
        await runtime.close()

    asyncio.run(story())


def test_draining_waits_for_who_is_in_and_not_for_ever(world: World, tmp_path: Path) -> None:
    world = world.copy(tmp_path)

    async def story() -> None:
        runtime = Runtime(world.settings)
        try:
            with runtime.admission.permit(1.0):
                await runtime.drain(timeout_s=0.01)
                assert runtime.admission.num_permits == 1
                draining = asyncio.create_task(runtime.drain(timeout_s=60.0))
                await asyncio.sleep(0)
                assert not draining.done()
            await draining
        finally:
            await runtime.close()

    asyncio.run(story())


def test_closing_what_never_started_is_fine(world: World, tmp_path: Path, no_leaks: None) -> None:
    asyncio.run(Runtime(world.copy(tmp_path).settings).close())


def test_a_start_that_fails_half_way_leaves_nothing_behind(
    world: World, tmp_path: Path, no_leaks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world.copy(tmp_path)

    async def story() -> None:
        runtime = Runtime(world.settings)

        def refuse() -> None:
            raise NotReady("a media worker cannot be started")

        monkeypatch.setattr(runtime.media, "start", refuse)
        with pytest.raises(NotReady, match="media worker"):
            await runtime.start()
        assert not runtime.engine.is_alive
        with pytest.raises(RegistryUnavailable):
            runtime.registry.snapshot()

    asyncio.run(story())


def test_one_part_that_cannot_be_closed_does_not_keep_the_others_open(
    world: World, tmp_path: Path, no_leaks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world.copy(tmp_path)

    async def story() -> None:
        runtime = Runtime(world.settings)
        await runtime.start()
        close = runtime.loader.close

        async def broken() -> None:
            await close()
            raise ValueError("oops")

        monkeypatch.setattr(runtime.loader, "close", broken)
        with pytest.raises(ValueError, match="oops"):
            await runtime.close()
        assert not runtime.engine.is_alive

    asyncio.run(story())


def test_requests_in_flight_when_it_closes_are_told(world: World, tmp_path: Path, no_leaks: None) -> None:
    world = world.copy(tmp_path)

    async def story() -> list[object]:
        runtime = Runtime(world.settings)
        await runtime.start()
        query = VqaQuery("ask", "is it red?", MediaBytes("image", picture()), GenerateDecode())
        requests = [asyncio.create_task(runtime.vqa.answer(query, context())) for _ in range(20)]
        await asyncio.sleep(0)
        await runtime.close()
        return list(await asyncio.gather(*requests, return_exceptions=True))

    outcomes = asyncio.run(story())
    assert {type(outcome) for outcome in outcomes} <= {VqaAnswer, NotReady}


def test_a_dead_device_is_not_ready_and_calls_for_the_end(world: World, tmp_path: Path) -> None:
    world = world.copy(tmp_path)
    fatal: list[BaseException] = []

    async def story() -> None:
        runtime = Runtime(world.settings, on_fatal=fatal.append)
        await runtime.start()
        try:
            lost = RuntimeError("CUDA error: device-side assert triggered")

            def lose(*_: object) -> None:
                raise lost

            runtime.engine._forward = lose  # type: ignore[method-assign, assignment]
            query = VqaQuery("ask", "is it red?", MediaBytes("image", picture()), GenerateDecode())
            with pytest.raises(NotReady, match="device-side assert"):
                await runtime.vqa.answer(query, context())
            assert runtime.status()["reasons"] == ["the device thread is dead"]
            assert runtime.admission.num_permits == holders(runtime.bank) == 0
        finally:
            await runtime.close()

    asyncio.run(story())
    assert len(fatal) == 1


def test_exiting_ends_the_process_with_a_status_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(runtime_module.os, "_exit", ended.append)
    monkeypatch.setattr(runtime_module.logging, "shutdown", lambda: None)
    runtime_module.exit_process(RuntimeError("gone"))
    assert ended == [runtime_module.EXIT_DEVICE_LOST]


# --- homes and backbones -------------------------------------------------------------------------------------


def test_a_home_without_a_backbone_says_where_it_looked(world: World, tmp_path: Path) -> None:
    settings = world.settings.model_copy(update={"home": tmp_path / "empty"})
    with pytest.raises(BackboneNotFound, match="empty"):
        Runtime(settings)


def test_a_registry_that_cannot_be_read_stops_the_start(world: World, tmp_path: Path) -> None:
    world = world.copy(tmp_path)
    (world.settings.home / "registry.sqlite").write_bytes(b"this is no database" * 100)
    with pytest.raises(RegistryUnavailable):
        Runtime(world.settings)


def test_a_backbone_that_takes_no_adapters_serves_base(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tiny_backbone(tmp_path / "uneven", text_layers=1)
    with running(world.copy(tmp_path, backbone=tmp_path / "uneven", slots=None).settings) as service:
        media = MediaBytes("image", picture())
        query = VqaQuery(BASE_ADAPTER, "is it red?", media, GenerateDecode(1, 3))
        assert service.call(service.runtime.vqa.answer(query, context())).adapter.name == BASE_ADAPTER
        with pytest.raises(MissingPart, match="__base__ only"):
            service.call(service.runtime.vqa.answer(replace(query, adapter="ask"), context()))
    assert "__base__ only" in caplog.text


def test_a_backbone_without_a_decoder_serves_retrieval_alone(world: World, tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path / "searcher", with_decoder=False)
    with running(world.copy(tmp_path, backbone=tmp_path / "searcher").settings) as service:
        query = VqaQuery(BASE_ADAPTER, "is it red?", MediaBytes("image", picture()), GenerateDecode())
        with pytest.raises(MissingPart, match="decoder"):
            service.call(service.runtime.vqa.answer(query, context()))
        sources = [Source("a", "text", text="a red circle"), Source("b", "text", text="a blue square")]
        build = service.runtime.galleries.build("texts", BASE_ADAPTER, sources, BuildOptions("text"), context())
        service.call(build)
        found = service.call(
            service.runtime.retrieve.search(RetrieveQuery("texts", TextQuery("a red circle"), k=1), context())
        )
        assert found.hits[0].id == "a"
        assert found.hits[0].score == pytest.approx(1.0, abs=1e-5)


def test_the_default_slots_come_from_free_memory(world: World, tmp_path: Path) -> None:
    async def story() -> None:
        runtime = Runtime(world.copy(tmp_path, slots=None).settings)
        assert [rank for rank, _ in runtime.bank.buckets] == [64, 128, 512]
        await runtime.close()

    asyncio.run(story())


def test_devices_are_picked_by_name() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_second_service_on_the_same_home_sees_what_the_first_one_makes(
    service: Service, world: World, tmp_path: Path
) -> None:
    """Adapters and galleries are picked up by polling, and at once by whoever asks for them."""
    world = world.copy(tmp_path)
    sources = [Source(str(number), "text", text=text) for number, text in enumerate(("a red circle", "a big square"))]

    async def build(runtime: Runtime, adapter: str) -> int:
        return (await runtime.galleries.build("shared", adapter, sources, BuildOptions("text"), context())).version

    async def search(runtime: Runtime) -> RetrieveAnswer:
        return await runtime.retrieve.search(RetrieveQuery("shared", TextQuery("a red circle"), k=1), context())

    with running(world.settings) as first, running(world.settings) as second:
        with pytest.raises(AdapterBankError, match="no gallery 'shared'"):
            second.call(search(second.runtime))
        assert first.call(build(first.runtime, "find")) == 1
        assert second.call(search(second.runtime)).gallery_version == 1
        world.push("find", "retrieval", seed=60)
        assert first.call(build(first.runtime, "find@2")) == 2
        end = time.monotonic() + 30
        while (answer := second.call(search(second.runtime))).gallery_version == 1 and time.monotonic() < end:
            second.call(second.runtime.loader.refresh())
        assert (answer.gallery_version, answer.adapter.name, answer.adapter.version) == (2, "find", 2)
