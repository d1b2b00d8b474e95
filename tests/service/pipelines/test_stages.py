"""What all pipelines share: deadlines, texts within limits, cached vision states, gathering."""

import asyncio
import time
from collections.abc import Sequence

import pytest
import torch

from service.auth import LOCAL
from service.errors import BadQuery, DeadlineExceeded, Overloaded
from service.loader import Pin
from service.pipelines.blip import Seen, preprocessing_of, text_limit
from service.pipelines.stages import (
    MAX_TEXT_CHARS,
    FeatureCache,
    Medium,
    gather_or_cancel,
    tokenize_within,
    within_deadline,
)
from service.types import BASE_INFO, VisionOutput
from tests.service.worlds import Service, World, adapter_config, context, picture


def seen(num_floats: int) -> Seen:
    return Seen(VisionOutput(torch.zeros(1, 1, num_floats), None), (0.0,), None)


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


def test_the_cache_keeps_to_its_bytes_and_forgets_the_least_recently_used() -> None:
    cache = FeatureCache(max_bytes=3 * 4 * 10)
    for key in ("a", "b", "c"):
        cache.put(key, seen(10))
    assert cache.get("a") is not None
    cache.put("d", seen(10))
    assert [key for key in "abcd" if cache.get(key)] == ["a", "c", "d"]
    cache.put("huge", seen(1000))
    assert cache.get("huge") is None
    cache.put("d", seen(10))  # there already: counted once
    cache.put("wide", seen(30))
    assert [key for key in ("a", "c", "d", "wide") if cache.get(key)] == ["wide"]


def test_a_cache_of_no_bytes_keeps_nothing() -> None:
    cache = FeatureCache(0)
    cache.put("a", seen(1))
    assert cache.get("a") is None


def test_states_are_cached_by_medium_and_adapter_where_the_bytes_are_known(service: Service) -> None:
    stages = service.runtime.stages.on("")

    async def story() -> None:
        async with (
            service.runtime.loader.pin("find", LOCAL) as find,
            service.runtime.loader.pin("heads", LOCAL) as heads,
        ):
            known, unknown = Medium("image", picture(3), "sha256:3"), Medium("image", picture(3))
            first = await stages.see(known, find, context())
            assert await stages.see(known, find, context()) is first
            assert await stages.see(known, heads, context()) is not first
            fresh = await stages.see(unknown, find, context())
            assert fresh is not first
            torch.testing.assert_close(fresh.output.states, first.output.states)
            assert await stages.see(unknown, find, context()) is not fresh

    service.call(story())


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
