"""What all pipelines share: deadlines, texts within limits, vision states kept and shared, gathering."""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from service.auth import LOCAL
from service.errors import BadQuery, CorruptMedia, DeadlineExceeded, Overloaded
from service.loader import Pin
from service.media import media_digest
from service.metrics import Metrics
from service.pipelines.blip import BlipStages, preprocessing_of, text_limit
from service.pipelines.galleries import frame_features
from service.pipelines.stage_set import StageSet
from service.pipelines.stages import (
    HASHED_BY_THREADS_BYTES,
    MAX_TEXT_CHARS,
    Medium,
    gather_or_cancel,
    tokenize_within,
    within_deadline,
)
from service.types import BASE_INFO, Job, MediaBytes, StageOutput
from tests.service.media.clips import make_clip
from tests.service.worlds import Service, World, adapter_config, context, picture

# --- deadlines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout_s", [-1.0, 0.0, 0.001])
def test_a_block_ends_at_the_deadline(timeout_s: float) -> None:
    async def story() -> None:
        async with within_deadline(context(timeout_s)):
            await asyncio.Event().wait()

    with pytest.raises(DeadlineExceeded):
        asyncio.run(story())


def test_a_block_that_ends_in_time_is_left_alone() -> None:
    async def story() -> int:
        async with within_deadline(context(60.0)):
            await asyncio.sleep(0)
            return 5

    assert asyncio.run(story()) == 5


def test_errors_and_cancellations_pass_through() -> None:
    async def failing() -> None:
        async with within_deadline(context()):
            raise Overloaded("no", retry_after_s=1.0)

    async def cancelled() -> None:
        async def waiting() -> None:
            async with within_deadline(context()):
                await asyncio.Event().wait()

        task = asyncio.create_task(waiting())
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(Overloaded):
        asyncio.run(failing())
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())


# --- texts ---------------------------------------------------------------------------------------------------


def test_a_text_is_tokenised_within_its_limit_and_never_cut(world: World) -> None:
    tokens = tokenize_within(world.backbone, "a red circle", 5, param="question")
    assert len(tokens.ids) == 5
    assert tokens.warnings == ()
    with pytest.raises(BadQuery, match="question has 5 tokens; at most 4 are allowed") as refusal:
        tokenize_within(world.backbone, "a red circle", 4, param="question")
    assert refusal.value.param == "question"


@pytest.mark.parametrize("text", ["", " ", "\n\t "])
def test_an_empty_text_is_refused(world: World, text: str) -> None:
    with pytest.raises(BadQuery, match="question is empty"):
        tokenize_within(world.backbone, text, 10, param="question")


def test_a_text_of_absurd_length_is_counted_and_not_tokenised(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.backbone, "tokenizer", None)
    words = "circle " * (MAX_TEXT_CHARS // 7 + 1)
    with pytest.raises(BadQuery, match=rf"question has {len(words.split())} words; at most 10 tokens"):
        tokenize_within(world.backbone, words, 10, param="question")


def test_words_nobody_taught_are_named(world: World) -> None:
    tokens = tokenize_within(world.backbone, "a zyx circle, zyx and qwert", 20, param="question")
    assert tokens.warnings == ("unknown words: zyx, qwert",)


def test_limits_and_preprocessing_are_the_adapters_or_the_backbones(world: World) -> None:
    config = adapter_config(world.backbone, resolution=24)
    assert preprocessing_of(config, world.backbone).resolution == 24
    assert preprocessing_of(None, world.backbone).resolution == 16
    assert text_limit(None, world.backbone) == 16
    long = config.model_copy(update={"max_text_tokens": 1000})
    assert text_limit(long, world.backbone) == 24  # the backbone's positions


# --- vision states -------------------------------------------------------------------------------------------


class Watch:
    """What a service decodes and runs from now on. Either can be held up until it may go on."""

    def __init__(self, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runtime = service.runtime
        self.num_decoded = 0
        self.jobs: list[Job] = []
        self.results: list[Future[StageOutput]] = []
        self.may_decode, self.may_run = asyncio.Event(), asyncio.Event()
        self.may_decode.set()
        self.may_run.set()
        submit, decode = self.runtime.engine.submit, self.runtime.media.call

        async def decoded(*args: Any, **kwargs: Any) -> Any:
            self.num_decoded += 1
            await self.may_decode.wait()
            return await decode(*args, **kwargs)

        def submitted(job: Job) -> Future[StageOutput]:
            self.jobs.append(job)
            if self.may_run.is_set():
                return submit(job)
            held: Future[StageOutput] = Future()
            self.results.append(held)
            return held

        monkeypatch.setattr(self.runtime.media, "call", decoded)
        monkeypatch.setattr(self.runtime.engine, "submit", submitted)

    @property
    def num_looks(self) -> tuple[int, int]:
        """Media decoded, and jobs that looked at one."""
        return self.num_decoded, sum(job.stage in ("vision", "perceive") for job in self.jobs)


@pytest.fixture
def watch(service: Service, monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(service, monkeypatch)


def blip(service: Service, feature_cache_bytes: int = 1 << 20) -> BlipStages:
    """Stages that have kept nothing yet."""
    runtime = service.runtime
    stages = StageSet(
        runtime.engine, runtime.backbones, runtime.media, Metrics(), feature_cache_bytes=feature_cache_bytes
    ).on("")
    assert isinstance(stages, BlipStages)
    return stages


def lookups(stages: BlipStages) -> dict[str, float]:
    """How media were come by, as it is scraped."""
    (family,) = stages.metrics.feature_lookups.collect()
    return {s.labels["outcome"]: s.value for s in family.samples if s.name == "bank_feature_lookups_total"}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


UPLOADS = {"image": MediaBytes("image", picture(3)), "video": MediaBytes("video", make_clip(num_frames=9))}


def test_states_are_kept_where_the_bytes_are_known(service: Service) -> None:
    stages = blip(service)

    async def story() -> None:
        async with (
            service.runtime.loader.pin("find", LOCAL) as find,
            service.runtime.loader.pin("heads", LOCAL) as heads,
        ):
            known, unknown = await stages.uploaded(UPLOADS["image"]), Medium("image", picture(3))
            first = await stages.see(known, find, context())
            assert await stages.see(known, find, context()) is first
            assert await stages.see(known, heads, context()) is not first
            fresh = await stages.see(unknown, find, context())
            assert fresh is not first
            torch.testing.assert_close(fresh.output.states, first.output.states)
            assert await stages.see(unknown, find, context()) is not fresh

    service.call(story())
    assert lookups(stages) == {"miss": 2, "hit": 1}


def test_the_key_tells_apart_all_that_decides_the_states(service: Service, tmp_path: Path) -> None:
    stages, base = blip(service), Pin(BASE_INFO, "__base__", None)
    ask, tell = (adapter_config(service.runtime.backbone, resolution=side) for side in (16, 24))
    digest = media_digest(picture(3))

    async def story() -> None:
        upload = await stages.uploaded(UPLOADS["image"])
        assert upload.digest == digest
        keys = [
            stages._key(medium, pin, context())
            for medium, pin in [
                (upload, base),
                (replace(upload, digest=media_digest(picture(4))), base),
                (replace(upload, kind="video"), base),
                (Medium("image", tmp_path / "a.png", digest), base),  # not what others upload, though it claims to be
                (Medium("image", tmp_path / "b.png", digest), base),
                (upload, Pin(BASE_INFO, "sha256:1", ask)),
                (upload, Pin(BASE_INFO, "sha256:2", ask)),
                (upload, Pin(BASE_INFO, "sha256:1", tell)),
            ]
        ]
        assert None not in keys and len(set(keys)) == len(keys)
        same = await stages.uploaded(MediaBytes("image", bytes(bytearray(picture(3)))))
        assert stages._key(same, base, context()) == keys[0]

    service.call(story())


def test_what_is_long_is_hashed_by_another_thread(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed_by: list[str] = []

    def noted(data: bytes) -> str:
        hashed_by.append(threading.current_thread().name)
        return media_digest(data)

    monkeypatch.setattr("service.pipelines.stages.media_digest", noted)
    stages = blip(service)
    for num_bytes in (HASHED_BY_THREADS_BYTES - 1, HASHED_BY_THREADS_BYTES):
        medium = service.call(stages.uploaded(MediaBytes("image", bytes(num_bytes))))
        assert medium.digest == media_digest(bytes(num_bytes))
    on_loop, elsewhere = hashed_by
    assert on_loop == "service-loop" != elsewhere


@pytest.mark.parametrize("kind", UPLOADS)
def test_many_who_look_at_once_share_one_decoding_and_one_job(service: Service, watch: Watch, kind: str) -> None:
    stages, requests = blip(service), [context(client="ada", request_id=f"{number}") for number in range(8)]
    watch.may_decode.clear()

    async def story() -> None:
        async with service.runtime.loader.pin("find", LOCAL) as pin:
            tasks = [
                asyncio.create_task(stages.see(await stages.uploaded(UPLOADS[kind]), pin, request))
                for request in requests
            ]
            await until(lambda: lookups(stages) == {"miss": 1, "joined": 7})
            watch.may_decode.set()
            seen = await asyncio.gather(*tasks)
            assert all(one is seen[0] for one in seen)
            alone = await stages.see(await stages.uploaded(UPLOADS[kind]), pin, context(alone=True))
            torch.testing.assert_close(seen[0].output.states, alone.output.states, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(seen[0].output.frames, alone.output.frames, atol=1e-5, rtol=1e-5)

    service.call(story())
    assert watch.num_looks == (2, 2)  # with the one who was alone
    assert lookups(stages) == {"miss": 1, "joined": 7}
    job = watch.jobs[0]
    assert (job.client, job.request_id, job.background) == ("ada", "0", False)
    assert set(requests[0].stage_ms) == {"decode", "vision"}
    assert all(set(request.stage_ms) == {"join"} for request in requests[1:])


@pytest.mark.parametrize("leaving", ["cancelled", "late"])
@pytest.mark.parametrize("during", ["decode", "vision"])
def test_the_first_may_leave_and_the_others_get_their_states(
    service: Service, watch: Watch, leaving: str, during: str
) -> None:
    stages = blip(service)
    (watch.may_decode if during == "decode" else watch.may_run).clear()

    async def story() -> None:
        async with service.runtime.loader.pin("find", LOCAL) as pin:
            medium = await stages.uploaded(UPLOADS["image"])
            timeout_s = 0.05 if leaving == "late" else 30.0
            first = asyncio.create_task(stages.see(medium, pin, context(timeout_s)))
            others = [asyncio.create_task(stages.see(medium, pin, context())) for _ in range(3)]
            await until(lambda: watch.num_decoded == 1 if during == "decode" else len(watch.results) == 1)
            if leaving == "cancelled":
                first.cancel()
            (outcome,) = await asyncio.gather(first, return_exceptions=True)
            assert isinstance(outcome, DeadlineExceeded if leaving == "late" else asyncio.CancelledError)
            watch.may_decode.set()
            watch.may_run.set()
            if during == "vision":
                assert not watch.results[0].cancelled()
                ran = await asyncio.wrap_future(watch.runtime.engine.submit(watch.jobs[0]))
                watch.results[0].set_result(ran)
            seen = await asyncio.gather(*others)
            assert all(one is seen[0] for one in seen)

    service.call(story())
    assert watch.num_decoded == 1
    assert len({job.number for job in watch.jobs}) == 1
    assert watch.jobs[0].deadline == math.inf  # it lives as long as somebody waits


def test_when_all_have_left_the_job_is_taken_back(service: Service, watch: Watch) -> None:
    stages = blip(service)
    watch.may_run.clear()

    async def story() -> None:
        async with service.runtime.loader.pin("find", LOCAL) as pin:
            medium = await stages.uploaded(UPLOADS["image"])
            tasks = [asyncio.create_task(stages.see(medium, pin, context())) for _ in range(3)]
            await until(lambda: len(watch.results) == 1)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert watch.results[0].cancelled()
            watch.may_run.set()
            await stages.see(medium, pin, context())

    service.call(story())
    assert watch.num_looks == (2, 2)


def test_an_error_is_told_to_all_who_wait_and_the_next_tries_again(service: Service, watch: Watch) -> None:
    stages = blip(service)

    async def story() -> None:
        async with service.runtime.loader.pin("find", LOCAL) as pin:
            medium = await stages.uploaded(MediaBytes("image", picture(3)[:60]))
            looks = [stages.see(medium, pin, context()) for _ in range(3)]
            outcomes = await asyncio.gather(*looks, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [CorruptMedia] * 3
            with pytest.raises(CorruptMedia):
                await stages.see(medium, pin, context())

    service.call(story())
    assert watch.num_looks == (2, 0)
    assert stages._features._cache.num_bytes == 0


@pytest.mark.parametrize("alone", [True, False])
def test_nothing_is_kept_or_shared_for_who_is_alone_or_where_it_is_off(
    service: Service, watch: Watch, alone: bool
) -> None:
    stages = blip(service, 1 << 20 if alone else 0)

    async def story() -> None:
        async with service.runtime.loader.pin("find", LOCAL) as pin:
            medium = await stages.uploaded(UPLOADS["image"])
            assert (medium.digest is None) == (not alone)
            known = Medium("image", picture(3), "sha256:3")
            for one in (medium, known):
                looks = [stages.see(one, pin, context(alone=alone)) for _ in range(2)]
                await asyncio.gather(*looks)
                assert stages.recall(one, pin, context(alone=alone)).kept is None

    service.call(story())
    assert watch.num_looks == (4, 4)
    assert stages._features._cache.num_bytes == 0
    assert lookups(stages) == {}


def test_what_was_recalled_is_had_whatever_makes_room_meanwhile(service: Service, watch: Watch) -> None:
    """So a request that was admitted as one that need not look does not look."""
    one_picture = 5 * 16 * 4 + 8 * 4  # [1, 5, 16] and [1, 8], float32
    stages = blip(service, one_picture)

    async def story() -> None:
        async with (
            service.runtime.loader.pin("find", LOCAL) as pin,
            service.runtime.loader.pin("heads", LOCAL) as other,
        ):
            medium, another = [await stages.uploaded(MediaBytes("image", picture(n))) for n in (3, 4)]
            assert stages.recall(medium, pin, context()).kept is None
            seen = await stages.see(medium, pin, context())
            assert seen.num_bytes == one_picture
            recalled = stages.recall(medium, pin, context())
            assert stages.cost_of_seeing(medium, pin) > stages.cost_of_seeing(recalled, pin) == 0.0
            await stages.see(another, pin, context())
            assert stages.recall(medium, pin, context()).kept is None
            assert await stages.see(recalled, pin, context()) is seen
            assert watch.num_looks == (2, 2)
            assert await stages.see(recalled, other, context()) is not seen  # not another adapter's
            assert await stages.see(medium, pin, context()) is not seen

    service.call(story())
    assert watch.num_looks == (4, 4)


def test_what_is_kept_owns_its_memory_and_is_counted_whole(service: Service) -> None:
    """States of many pictures come from one batch; none may keep the whole batch alive."""
    stages = blip(service)

    async def story() -> None:
        async with service.runtime.loader.pin("find", LOCAL) as pin:
            media = [await stages.uploaded(MediaBytes("image", picture(number))) for number in range(12)]
            media += [await stages.uploaded(UPLOADS["video"])]
            await asyncio.gather(*(stages.see(medium, pin, context()) for medium in media))

    service.call(story())
    kept = list(stages._features._cache._entries.values())
    assert len(kept) == 13
    for seen in kept:
        tensors = [seen.output.states, seen.output.frames]
        assert seen.num_bytes == sum(t.untyped_storage().nbytes() for t in tensors if t is not None)
    gauge = stages.metrics.registry.get_sample_value("bank_feature_cache_bytes", {"backbone": stages.hosted.name})
    assert gauge == sum(seen.num_bytes for seen in kept)


def test_frames_are_handed_out_to_be_read_only(service: Service) -> None:
    stages, base = blip(service), Pin(BASE_INFO, "__base__", None)
    seen = service.call(stages.see(Medium("image", picture(1)), base, context()))
    frames = frame_features(seen.output.frames)
    with pytest.raises(ValueError, match="read-only"):
        frames[0, 0] = 1.0


def test_a_picture_has_one_frame_and_no_times(service: Service) -> None:
    base = Pin(BASE_INFO, "__base__", None)
    picture_seen = service.call(service.runtime.stages.on("").see(Medium("image", picture(1)), base, context()))
    assert picture_seen.times_s == (0.0,)
    assert picture_seen.duration_s is None
    assert picture_seen.output.states.shape == (1, 5, 16)
    assert picture_seen.output.frames is not None
    assert picture_seen.output.frames.shape == (1, 8)


def test_who_was_admitted_waits_for_a_worker_and_is_not_refused(service: Service) -> None:
    """More media at once than the workers' queue takes."""
    runtime = service.runtime

    async def crowd() -> int:
        async with runtime.loader.pin("find", LOCAL) as pin:
            media = [Medium("image", picture(number % 3)) for number in range(400)]
            return len(await gather_or_cancel([runtime.stages.on("").see(medium, pin, context()) for medium in media]))

    assert service.call(crowd()) == 400


def test_the_time_of_each_stage_is_told(service: Service) -> None:
    request = context()
    base = Pin(BASE_INFO, "__base__", None)
    service.call(service.runtime.stages.on("").see(Medium("image", picture(1)), base, request))
    assert set(request.stage_ms) == {"decode", "vision"}


# --- gathering -----------------------------------------------------------------------------------------------


def test_results_come_in_order() -> None:
    async def one(number: int) -> int:
        for _ in range(5 - number):
            await asyncio.sleep(0)
        return number

    async def story() -> Sequence[int]:
        return await gather_or_cancel([one(number) for number in range(5)])

    assert asyncio.run(story()) == [0, 1, 2, 3, 4]


def test_when_one_fails_the_others_are_cancelled_before_its_error_is_told() -> None:
    ended: list[str] = []

    async def waiting() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("waiting")

    async def failing() -> None:
        await asyncio.sleep(0)
        raise BadQuery("oops")

    async def story() -> None:
        with pytest.raises(BadQuery, match="oops"):
            await gather_or_cancel([waiting(), failing(), waiting()])
        assert ended == ["waiting", "waiting"]

    asyncio.run(story())


def test_being_cancelled_before_anything_began_leaves_no_coroutine_behind() -> None:
    """An un-awaited coroutine would be a warning, and warnings are errors here."""

    async def one() -> None:
        await asyncio.sleep(0)

    async def story() -> None:
        deadline = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            async with within_deadline(context(deadline - time.monotonic())):
                await gather_or_cancel([one(), one()])

    asyncio.run(story())
