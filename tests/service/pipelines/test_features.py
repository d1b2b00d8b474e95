"""The cache of states: budget, recency, replacement; and states that several requests wait for together."""

import asyncio
import gc
import threading
from collections import OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import CorruptMedia
from service.metrics import Metrics
from service.pipelines.features import FeatureCache, Features, cache_key
from service.pipelines.stages import within_deadline
from service.types import RequestContext
from tests.service.worlds import context


@dataclass(frozen=True)
class Block:
    """So many bytes."""

    num_bytes: int
    mark: int = 0


# --- keys ----------------------------------------------------------------------------------------------------


def test_keys_differ_wherever_a_part_ends() -> None:
    parts = [("a", "b"), ("ab",), ("a|b",), ("a", "", "b"), ("", "a", "b"), ("a", "b", ""), ("b", "a")]
    assert len({cache_key(*each) for each in parts}) == len(parts)


def test_a_path_that_is_no_text_has_a_key_too() -> None:
    assert cache_key("/media/\udcff.png") != cache_key("/media/ÿ.png")


# --- the cache -----------------------------------------------------------------------------------------------


class Model:
    """What a cache must hold, the plainest way: a list of keys by their last use."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.kept: OrderedDict[str, Block] = OrderedDict()

    def put(self, key: str, block: Block) -> None:
        self.kept.pop(key, None)
        if block.num_bytes <= self.max_bytes:
            self.kept[key] = block
        while self.num_bytes > self.max_bytes:
            del self.kept[next(iter(self.kept))]

    def get(self, key: str) -> Block | None:
        if key in self.kept:
            self.kept.move_to_end(key)
        return self.kept.get(key)

    @property
    def num_bytes(self) -> int:
        return sum(block.num_bytes for block in self.kept.values())


STEPS = st.lists(st.tuples(st.sampled_from("abcdef"), st.none() | st.integers(0, 14)), max_size=60)  # None: get


@settings(max_examples=300, deadline=None)
@given(max_bytes=st.integers(0, 20), steps=STEPS)
def test_the_cache_holds_the_last_used_of_what_was_last_put(
    max_bytes: int, steps: list[tuple[str, int | None]]
) -> None:
    cache, model = FeatureCache[Block](max_bytes), Model(max_bytes)
    for mark, (key, num_bytes) in enumerate(steps):
        if num_bytes is None:
            assert cache.get(key) is model.get(key)
        else:
            block = Block(num_bytes, mark)
            cache.put(key, block)
            model.put(key, block)
        assert list(cache._entries) == list(model.kept)
        assert cache.num_bytes == model.num_bytes <= max_bytes


def test_a_cache_of_no_bytes_keeps_nothing() -> None:
    cache = FeatureCache[Block](0)
    cache.put("a", Block(1))
    assert cache.get("a") is None and cache.num_bytes == 0


def test_what_is_put_last_counts_even_when_it_is_too_large() -> None:
    cache = FeatureCache[Block](10)
    cache.put("a", Block(4))
    cache.put("a", Block(11))
    assert cache.get("a") is None and cache.num_bytes == 0


def test_threads_do_not_spoil_the_count() -> None:
    cache, num_threads = FeatureCache[Block](50), 8
    start = threading.Barrier(num_threads)

    def use(seed: int) -> None:
        chance = Random(seed)
        start.wait()
        for _ in range(2000):
            key = f"{chance.randrange(12)}"
            if chance.random() < 0.5:
                cache.put(key, Block(chance.randrange(20)))
            else:
                cache.get(key)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.num_bytes == sum(block.num_bytes for block in cache._entries.values()) <= 50


# --- in the making -------------------------------------------------------------------------------------------


class Maker:
    """Makes blocks when it is told to, and remembers for whom it was asked to."""

    def __init__(self) -> None:
        self.asked: list[RequestContext] = []
        self.given_up = 0
        self.may_go_on = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self, context: RequestContext) -> Block:
        self.asked.append(context)
        try:
            async with within_deadline(context):
                await self.may_go_on.wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        if self.error is not None:
            raise self.error
        return Block(4, len(self.asked))


class Story:
    """Features with room for two blocks, and who asks for them."""

    def __init__(self, max_bytes: int = 8) -> None:
        self.metrics = Metrics()
        self.features = Features[Block](max_bytes, self.metrics, "blip")
        self.make = Maker()

    async def ask(self, key: str = "a", **fields: Any) -> "asyncio.Task[Block]":
        """A request that has begun to wait, unless it need not."""
        task = asyncio.create_task(self.features.get(key, self.make, context(**fields)))
        await settle()
        return task

    def outcomes(self) -> tuple[float, ...]:
        """How many lookups hit, joined and missed."""
        return tuple(self._sample("bank_feature_lookups_total", outcome=o) for o in ("hit", "joined", "miss"))

    def num_bytes(self) -> float:
        """Of what is kept, as it is scraped."""
        return self._sample("bank_feature_cache_bytes")

    def _sample(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, {"backbone": "blip", **labels}) or 0.0


async def settle() -> None:
    """Let all who can go on do so."""
    for _ in range(10):
        await asyncio.sleep(0)


def tell(story: Coroutine[Any, Any, None]) -> None:
    async def in_time() -> None:
        async with asyncio.timeout(30):
            await story

    asyncio.run(in_time())


def test_all_who_ask_at_once_share_what_is_made_once_and_later_ones_find_it() -> None:
    async def story() -> None:
        it = Story()
        tasks = [await it.ask() for _ in range(5)]
        it.make.may_go_on.set()
        blocks = await asyncio.gather(*tasks)
        assert all(block is blocks[0] for block in blocks)
        assert await (await it.ask()) is blocks[0]
        assert len(it.make.asked) == 1
        assert it.outcomes() == (1, 4, 1)
        assert it.num_bytes() == 4
        assert not it.features._flights

    tell(story())


def test_other_keys_are_made_beside_each_other() -> None:
    async def story() -> None:
        it = Story()
        tasks = [await it.ask(key) for key in "abab"]
        it.make.may_go_on.set()
        blocks = await asyncio.gather(*tasks)
        assert blocks[0] is blocks[2] and blocks[1] is blocks[3] and blocks[0] is not blocks[1]
        assert it.outcomes() == (0, 2, 2)

    tell(story())


def test_the_first_is_served_by_its_own_work_and_the_others_wait() -> None:
    """The times of decoding and looking are the first's; the others are told how long they waited for it."""

    async def story() -> None:
        it = Story()
        first, second = [context(client="ada", request_id=number) for number in ("1", "2")]
        tasks = [asyncio.create_task(it.features.get("a", it.make, each)) for each in (first, second)]
        await settle()
        (made_for,) = it.make.asked
        assert (made_for.client, made_for.request_id) == ("ada", "1")
        assert made_for.stage_ms is first.stage_ms
        it.make.may_go_on.set()
        await asyncio.gather(*tasks)
        assert set(first.stage_ms) == set()
        assert set(second.stage_ms) == {"join"}

    tell(story())


@pytest.mark.parametrize("who", [0, 1, 2])
def test_whoever_leaves_the_others_get_theirs(who: int) -> None:
    async def story() -> None:
        it = Story()
        tasks = [await it.ask() for _ in range(3)]
        tasks[who].cancel()
        await settle()
        assert tasks[who].cancelled() and it.make.given_up == 0
        it.make.may_go_on.set()
        assert len({id(await task) for task in tasks if not task.cancelled()}) == 1
        assert len(it.make.asked) == 1

    tell(story())


def test_the_deadline_of_the_first_is_nobody_elses() -> None:
    async def story() -> None:
        it = Story()

        async def asking(timeout_s: float) -> Block:
            request = context(timeout_s)
            async with within_deadline(request):
                return await it.features.get("a", it.make, request)

        hasty, patient = asyncio.create_task(asking(0.02)), asyncio.create_task(asking(20.0))
        await asyncio.wait({hasty})
        assert hasty.exception() is not None
        it.make.may_go_on.set()
        assert (await patient).mark == 1
        assert it.make.given_up == 0

    tell(story())


def test_when_all_have_left_the_work_ends_and_the_next_begins_anew() -> None:
    async def story() -> None:
        it = Story()
        tasks = [await it.ask() for _ in range(3)]
        for task in tasks:
            task.cancel()
        latecomer = asyncio.create_task(it.features.get("a", it.make, context()))  # before the work heard of it
        await settle()
        assert it.make.given_up == 1
        assert len(it.make.asked) == 2
        it.make.may_go_on.set()
        assert (await latecomer).mark == 2
        assert it.outcomes() == (0, 2, 2)
        assert not it.features._flights

    tell(story())


def test_an_error_goes_to_all_who_wait_and_is_not_kept() -> None:
    async def story() -> None:
        it = Story()
        it.make.error = CorruptMedia("the picture's header is broken")
        tasks = [await it.ask() for _ in range(3)]
        tasks[0].cancel()
        it.make.may_go_on.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError, CorruptMedia, CorruptMedia]
        assert it.num_bytes() == 0 and not it.features._flights
        it.make.error = None
        assert (await (await it.ask())).mark == 2

    tell(story())


def test_the_last_to_leave_waits_until_the_work_has_ended() -> None:
    """What a request took is given back when it is over. An error that comes of it is nobody's, nor the loop's to report."""

    async def story() -> None:
        it, reported, has_ended = Story(), [], False
        asyncio.get_running_loop().set_exception_handler(lambda _, about: reported.append(about))

        async def make(_: RequestContext) -> Block:
            nonlocal has_ended
            try:
                await asyncio.Event().wait()
            finally:
                await settle()
                has_ended = True
                raise CorruptMedia("there is no more to read")

        task = asyncio.create_task(it.features.get("a", make, context()))
        await settle()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled() and has_ended and not it.features._flights
        del task
        await settle()
        gc.collect()
        assert not reported

    tell(story())


def test_who_comes_just_after_a_failure_tries_anew() -> None:
    async def story() -> None:
        it, later = Story(), []

        async def failing(_: RequestContext) -> Block:
            later.append(
                asyncio.create_task(it.features.get("a", it.make, context()))
            )  # runs before the first hears of it
            raise CorruptMedia("the picture's header is broken")

        it.make.may_go_on.set()
        with pytest.raises(CorruptMedia):
            await it.features.get("a", failing, context())
        assert (await later[0]).mark == 1
        assert it.outcomes() == (0, 0, 2)
        assert not it.features._flights

    tell(story())


@pytest.mark.parametrize("field, values", [("client", ["ada", "bob"]), ("background", [True, False])])
def test_nobody_waits_for_anothers_turn(field: str, values: list[Any]) -> None:
    """What a client queued, or the background, may be long. What came of it serves all."""

    async def story() -> None:
        it = Story()
        tasks = [await it.ask(**{field: value}) for value in values * 2]
        assert [getattr(request, field) for request in it.make.asked] == values
        it.make.may_go_on.set()
        await asyncio.gather(*tasks)
        assert it.outcomes() == (0, 2, 2)
        assert it.num_bytes() == 4
        blocks = [await (await it.ask(**{field: value})) for value in values]
        assert blocks[0] is blocks[1] and len(it.make.asked) == 2

    tell(story())


def test_what_is_too_large_to_keep_is_shared_all_the_same() -> None:
    async def story() -> None:
        it = Story(max_bytes=3)
        tasks = [await it.ask() for _ in range(3)]
        it.make.may_go_on.set()
        await asyncio.gather(*tasks)
        await (await it.ask())
        assert it.outcomes() == (0, 2, 2)
        assert it.num_bytes() == 0

    tell(story())


@pytest.mark.parametrize("seed", range(40))
def test_however_they_come_and_go_who_stays_is_answered_and_nothing_is_left(seed: int) -> None:
    """Work of random length that sometimes fails, for requests that come at random times and sometimes leave."""
    chance = Random(seed)
    running: dict[str, int] = dict.fromkeys("ab", 0)
    num_made = 0

    async def story() -> None:
        nonlocal num_made
        features = Features[Block](chance.choice((1, 4, 100)), Metrics(), "blip")

        async def one() -> None:
            key = chance.choice("ab")

            async def make(_: RequestContext) -> Block:
                nonlocal num_made
                running[key] += 1
                try:
                    assert running[key] == 1, "the same states were made twice at once"
                    for _ in range(chance.randrange(6)):
                        await asyncio.sleep(0)
                    if chance.random() < 0.2:
                        raise CorruptMedia(key)
                    num_made += 1
                    return Block(4, ord(key))
                finally:
                    running[key] -= 1

            for _ in range(chance.randrange(30)):
                await asyncio.sleep(0)
            assert (await features.get(key, make, context())).mark == ord(key)

        tasks = [asyncio.create_task(one()) for _ in range(30)]
        left = chance.sample(tasks, 10)
        for task in left:
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for task, result in zip(tasks, results, strict=True):
            assert result is None or isinstance(result, CorruptMedia) or (task in left and task.cancelled()), result
        assert not features._flights
        assert running == {"a": 0, "b": 0}
        assert len(asyncio.all_tasks()) == 1

    tell(story())
    assert num_made >= 1
