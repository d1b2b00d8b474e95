"""Who runs next: batching, limits, fairness, the background's share, dropping. No torch, no threads, no clock."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.scheduler import BACKGROUND_SHARE, MAX_PASSED_OVER, NOBODY, BatchLimits, Scheduler, is_late
from service.types import Job, Stage, TextInput

NO_LIMITS = BatchLimits(max_rows=1 << 30, max_tokens=1 << 30)
ONE_AT_A_TIME = BatchLimits(max_rows=1, max_tokens=1 << 30)


def job(
    client: str = "a",
    adapter: str = "x",
    *,
    stage: Stage = "text",
    shape: tuple[int, ...] = (),
    rows: int = 1,
    tokens: int = 1,
    cost: float = 1.0,
    deadline: float = 1e9,
    background: bool = False,
) -> Job:
    return Job(
        stage, adapter, TextInput((1, 2)), shape, rows, tokens, cost, deadline, client=client, background=background
    )


def anybody(_: Job) -> bool:
    return True


def scheduler_with(*jobs: Job, limits: BatchLimits = NO_LIMITS) -> Scheduler:
    scheduler = Scheduler(limits)
    for one in jobs:
        scheduler.add(one)
    return scheduler


def batches(scheduler: Scheduler, may_join: Callable[[Job], bool] = anybody) -> list[tuple[Job, ...]]:
    """Every batch until nothing more comes."""
    taken = []
    while (batch := scheduler.next_batch(may_join)) is not None:
        taken.append(batch.jobs)
    return taken


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_is_upcoming_is_the_next_batch_and_stays(data: st.DataObject) -> None:
    scheduler = Scheduler(BatchLimits(max_rows=5, max_tokens=9))
    jobs: list[Job] = []
    for _ in range(data.draw(st.integers(0, 14))):
        small = st.integers(1, 3)
        stage: Stage = data.draw(st.sampled_from(["text", "match"]))
        rows, tokens, cost = data.draw(small), data.draw(small), float(data.draw(small))
        client, is_background = data.draw(st.sampled_from("abc")), data.draw(st.booleans())
        jobs.append(job(client, stage=stage, rows=rows, tokens=tokens, cost=cost, background=is_background))
        scheduler.add(jobs[-1])
        if data.draw(st.integers(0, 4)) == 0:
            scheduler.remove(data.draw(st.sampled_from(jobs)).number)
    while len(scheduler):
        for stage in ("text", "match"):
            came = [one.submitted_at for one in scheduler._foreground.jobs.values() if one.stage == stage]
            waiting = scheduler.waiting_like(job(stage=stage))
            assert waiting.num == len(came)
            others = scheduler.upcoming(without=[stage])
            assert all(one.stage != stage for one in others)
            assert others or all(one.stage == stage for lane in scheduler._lanes() for one in lane.jobs.values())
            assert waiting.seconds(1e6) == pytest.approx(sum(1e6 - at for at in came))
        before = len(scheduler)
        upcoming = tuple(scheduler.upcoming())
        assert len(scheduler) == before
        batch = scheduler.next_batch(anybody)
        assert batch is not None and batch.jobs == upcoming
    assert scheduler.upcoming() == [] and scheduler.waiting_like(job()) == NOBODY and not scheduler._foreground.waiting


# --- what goes together --------------------------------------------------------------------------------------


def test_jobs_of_one_stage_and_shape_share_a_batch_whatever_their_adapter_and_client() -> None:
    jobs = [job("a", "x"), job("b", "y"), job("a", "__base__")]
    scheduler = scheduler_with(*jobs)
    assert [set(batch) for batch in batches(scheduler)] == [set(jobs)]
    assert len(scheduler) == 0


def test_other_stages_and_shapes_run_apart() -> None:
    jobs = [job(stage="vision", shape=(16,)), job(stage="vision", shape=(24,)), job(stage="text")]
    assert batches(scheduler_with(*jobs)) == [(one,) for one in jobs]


@pytest.mark.parametrize("limits", [BatchLimits(5, 1000), BatchLimits(1000, 50)])
def test_a_batch_keeps_to_both_limits(limits: BatchLimits) -> None:
    scheduler = scheduler_with(*[job(rows=2, tokens=20) for _ in range(5)], limits=limits)
    assert [len(batch) for batch in batches(scheduler)] == [2, 2, 1]


def test_a_job_above_a_limit_runs_alone() -> None:
    small, big, last = job(), job(rows=9), job()
    scheduler = scheduler_with(small, big, last, limits=BatchLimits(4, 100))
    assert batches(scheduler) == [(small,), (big,), (last,)]


def test_a_job_that_does_not_fit_any_more_is_not_overtaken_for_ever() -> None:
    """What does not fit ends the batch, so a stream of small jobs cannot keep a wide one out."""
    first, wide, second = job("first"), job("wide", rows=4), job("second")
    scheduler = scheduler_with(first, wide, second, limits=BatchLimits(4, 100))
    assert [wide in batch for batch in batches(scheduler)] == [False, True, False]


def test_one_flow_runs_in_the_order_it_came() -> None:
    jobs = [job(cost=cost) for cost in (5.0, 1.0, 3.0, 1.0)]
    assert [batch[0] for batch in batches(scheduler_with(*jobs, limits=ONE_AT_A_TIME))] == jobs


def test_nothing_waits_no_batch() -> None:
    assert Scheduler(NO_LIMITS).next_batch(anybody) is None


# --- fairness ------------------------------------------------------------------------------------------------


def test_who_queued_a_thousand_jobs_does_not_hold_up_who_queued_one() -> None:
    scheduler = scheduler_with(*[job("many") for _ in range(1000)], limits=ONE_AT_A_TIME)
    scheduler.next_batch(anybody)
    scheduler.add(one := job("one"))
    served = [batch.jobs[0] for _ in range(2) if (batch := scheduler.next_batch(anybody))]
    assert one in served


def test_a_backlog_at_one_stage_does_not_hold_up_another_client_at_a_later_stage() -> None:
    """The second stage of a request arrives after the whole backlog, but its client has had little so far."""
    scheduler = scheduler_with(*[job("many", stage="vision") for _ in range(500)], limits=ONE_AT_A_TIME)
    scheduler.add(first := job("one", stage="vision"))
    while (batch := scheduler.next_batch(anybody)) and batch.jobs != (first,):
        pass
    scheduler.add(second := job("one", stage="generate"))
    served = [batch.jobs[0] for _ in range(3) if (batch := scheduler.next_batch(anybody))]
    assert second in served


def test_adapters_of_one_client_are_flows_of_their_own() -> None:
    scheduler = scheduler_with(*[job("a", "busy") for _ in range(50)], limits=ONE_AT_A_TIME)
    scheduler.add(quiet := job("a", "quiet"))
    assert quiet in [batch.jobs[0] for _ in range(2) if (batch := scheduler.next_batch(anybody))]


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(0.5, 20.0), min_size=4, max_size=30), min_size=2, max_size=5), st.integers(1, 3))
def test_flows_that_all_wait_get_equal_shares_of_cost(costs: list[list[float]], max_rows: int) -> None:
    """While two flows both wait, what they were served differs by no more than a batch of their largest jobs."""
    scheduler = Scheduler(BatchLimits(max_rows, 1 << 30))
    flow_of = {}
    for client, own in enumerate(costs):
        for cost in own:
            scheduler.add(one := job(str(client), cost=cost))
            flow_of[one.number] = client
    left = Counter(flow_of.values())
    served = [0.0] * len(costs)
    largest = [max(own) for own in costs]
    while (batch := scheduler.next_batch(anybody)) is not None:
        for one in batch.jobs:
            served[flow_of[one.number]] += one.cost
            left[flow_of[one.number]] -= 1
            waiting = [flow for flow in left if left[flow]]
            for a in waiting:
                for b in waiting:
                    assert served[a] - served[b] <= largest[a] + largest[b] + 1e-6


def test_cheap_jobs_of_one_outnumber_dear_jobs_of_another() -> None:
    """Turns are in units of cost: a clip's worth of pictures for each clip."""
    cheap, dear = [job("cheap", cost=1.0) for _ in range(64)], [job("dear", cost=8.0) for _ in range(8)]
    scheduler = scheduler_with(*dear, *cheap, limits=ONE_AT_A_TIME)
    first = [batch.jobs[0].client for _ in range(36) if (batch := scheduler.next_batch(anybody))]
    assert 3 <= first.count("dear") <= 5


def test_nothing_starves_behind_an_endless_stream_of_newcomers() -> None:
    scheduler = scheduler_with(*[job("old") for _ in range(20)], limits=ONE_AT_A_TIME)
    number = count()
    for _ in range(2000):
        scheduler.add(job(f"new {next(number)}"))
        scheduler.add(job(f"new {next(number)}"))
        batch = scheduler.next_batch(anybody)
        assert batch is not None
    left = [one for batch in batches(scheduler) for one in batch]
    assert not [one for one in left if one.client == "old"]


def test_who_was_served_while_alone_owes_nothing_afterwards() -> None:
    scheduler = scheduler_with(*[job("alone") for _ in range(300)], limits=ONE_AT_A_TIME)
    batches(scheduler)
    for _ in range(4):
        scheduler.add(job("newcomer"))
        scheduler.add(job("alone"))
    first = [batch.jobs[0].client for _ in range(4) if (batch := scheduler.next_batch(anybody))]
    assert first.count("alone") == 2


def test_cancelled_jobs_cost_their_flow_nothing() -> None:
    scheduler = scheduler_with(*(many := [job("a") for _ in range(100)]), limits=ONE_AT_A_TIME)
    for one in many:
        assert scheduler.remove(one.number) is one
    scheduler.add(job("b"))
    scheduler.add(again := job("a"))
    assert again in [batch.jobs[0] for _ in range(2) if (batch := scheduler.next_batch(anybody))]


# --- background ----------------------------------------------------------------------------------------------


def test_background_work_runs_when_nothing_else_waits() -> None:
    scheduler = scheduler_with(quiet := job(background=True), urgent := job())
    assert batches(scheduler) == [(urgent,), (quiet,)]


@pytest.mark.parametrize("background_rows", [1, 8])
def test_background_work_gets_its_share_and_no_more(background_rows: int) -> None:
    scheduler = Scheduler(BatchLimits(8, 1 << 30))
    ran = {True: 0.0, False: 0.0}
    for _ in range(4000):
        while len(scheduler._foreground.jobs) < 16:
            scheduler.add(job("web"))
        while len(scheduler._background.jobs) < 16:
            scheduler.add(job("cli", rows=background_rows, cost=background_rows, background=True))
        batch = scheduler.next_batch(anybody)
        assert batch is not None
        assert len({one.background for one in batch.jobs}) == 1
        ran[batch.jobs[0].background] += sum(one.cost for one in batch.jobs)
    assert ran[True] / sum(ran.values()) == pytest.approx(BACKGROUND_SHARE, rel=0.1)


def test_a_long_past_without_background_work_gives_it_no_credit() -> None:
    scheduler = Scheduler(ONE_AT_A_TIME)
    for _ in range(1000):
        scheduler.add(job())
        scheduler.next_batch(anybody)
    for _ in range(100):
        scheduler.add(job())
        scheduler.add(job(background=True))
    first = [batch.jobs[0].background for _ in range(20) if (batch := scheduler.next_batch(anybody))]
    assert sum(first) <= 1


def test_background_work_that_comes_one_job_at_a_time_gets_no_more_either() -> None:
    scheduler = Scheduler(BatchLimits(10, 1 << 30))
    ran = {True: 0.0, False: 0.0}
    for number in range(4000):
        for _ in range(2):
            scheduler.add(job(f"web {number}"))
        if number % 2:
            scheduler.add(job(background=True, cost=10.0))
        batch = scheduler.next_batch(anybody)
        assert batch is not None
        ran[batch.jobs[0].background] += sum(one.cost for one in batch.jobs)
        for waiting in list(scheduler._background.jobs)[1:]:  # its caller waits for one before it sends the next
            scheduler.remove(waiting)
    assert ran[True] / sum(ran.values()) < 1.5 * BACKGROUND_SHARE


# --- slots ---------------------------------------------------------------------------------------------------


@dataclass
class Slots:
    """So many adapters may be in one batch."""

    num_slots: int
    held: set[str] = field(default_factory=set)
    num_asked: int = 0

    def may_join(self, one: Job) -> bool:
        self.num_asked += 1
        if one.adapter not in self.held and len(self.held) == self.num_slots:
            return False
        self.held.add(one.adapter)
        return True


def test_more_adapters_than_slots_all_finish_and_those_passed_over_come_first() -> None:
    jobs = [job("a", f"adapter {i % 10}") for i in range(40)]
    scheduler = scheduler_with(*jobs)
    done: list[Job] = []
    adapters_of = []
    while len(scheduler):
        batch = scheduler.next_batch(Slots(3).may_join)
        assert batch is not None
        adapters_of.append({one.adapter for one in batch.jobs})
        done += batch.jobs
    assert Counter(done) == Counter(jobs)
    assert len(adapters_of) == 4
    assert not set.intersection(*adapters_of[:2])


def test_a_job_whose_adapter_was_refused_is_not_asked_about_again_in_that_batch() -> None:
    slots = Slots(1)
    scheduler = scheduler_with(*[job(adapter=name) for name in ["x", *["y"] * 50, "x"]])
    batch = scheduler.next_batch(slots.may_join)
    assert batch is not None
    assert [one.adapter for one in batch.jobs] == ["x", "x"]
    assert slots.num_asked == 3


def test_a_group_that_may_not_run_lets_the_next_one_run() -> None:
    scheduler = scheduler_with(job(adapter="x", stage="vision"), other := job(adapter="y"))
    batch = scheduler.next_batch(lambda one: one.adapter == "y")
    assert batch is not None
    assert batch.jobs == (other,)
    assert scheduler.next_batch(lambda one: False) is None
    assert len(scheduler) == 1


def test_with_ten_thousand_jobs_of_as_many_adapters_a_batch_looks_at_a_few() -> None:
    scheduler = scheduler_with(*[job(f"client {i}", f"adapter {i}") for i in range(10_000)])
    served = 0
    while len(scheduler):
        slots = Slots(32)
        batch = scheduler.next_batch(slots.may_join)
        assert batch is not None
        assert slots.num_asked <= 32 + MAX_PASSED_OVER
        served += len(batch.jobs)
    assert served == 10_000


# --- leaving -------------------------------------------------------------------------------------------------


def test_late_jobs_are_taken_out_and_the_others_stay() -> None:
    late, on_time, also_late = job(deadline=5.0), job(deadline=5.1), job(deadline=1.0, background=True)
    scheduler = scheduler_with(late, on_time, also_late)
    assert scheduler.remove_late(now=5.0) == [also_late, late]
    assert scheduler.remove_late(now=5.0) == []
    assert batches(scheduler) == [(on_time,)]
    assert scheduler.remove_late(now=6.0) == []


def test_removing_twice_or_what_never_waited_gives_none() -> None:
    scheduler = scheduler_with(one := job())
    assert scheduler.remove(one.number) is one
    assert scheduler.remove(one.number) is None
    assert scheduler.remove(10**12) is None
    assert scheduler.next_batch(anybody) is None


def test_a_job_is_late_from_its_deadline_on() -> None:
    assert [is_late(job(deadline=5.0), now) for now in (4.9, 5.0, 5.1)] == [False, True, True]
    assert is_late(job(deadline=0.0))


Step = tuple[str, int, int]
STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "add", "add", "batch", "remove", "late"]), st.integers(0, 7), st.integers(0, 9))
)


@settings(deadline=None)
@given(STEPS, st.integers(1, 6))
def test_every_job_leaves_exactly_once_whatever_happens(steps: list[Step], num_slots: int) -> None:
    scheduler = Scheduler(BatchLimits(4, 30))
    waiting: dict[int, Job] = {}
    now = 0.0

    def leave(jobs: list[Job]) -> None:
        for one in jobs:
            assert waiting.pop(one.number) is one

    for action, a, b in steps:
        if action == "add":
            one = job(
                f"c{a % 3}",
                f"x{b}",
                shape=(a % 2,),
                rows=1 + a,
                tokens=b,
                cost=float(a),
                deadline=now + b,
                background=b == 7,
            )
            scheduler.add(one)
            waiting[one.number] = one
        elif action == "batch":
            batch = scheduler.next_batch(Slots(num_slots).may_join)
            assert (batch is None) == (not waiting)
            leave(list(batch.jobs) if batch else [])
        elif action == "remove" and waiting:
            number = sorted(waiting)[a % len(waiting)]
            one_out = scheduler.remove(number)
            assert one_out is not None
            leave([one_out])
        elif action == "late":
            now += b
            expected = {number for number, one in waiting.items() if is_late(one, now)}
            late = scheduler.remove_late(now)
            assert {one.number for one in late} == expected
            leave(late)
        assert len(scheduler) == len(waiting)
    leave([one for batch in batches(scheduler) for one in batch])
    assert not waiting


def test_nothing_is_remembered_of_what_has_left() -> None:
    """A build of a million items has deadlines a week away: they must not pile up."""
    scheduler = Scheduler(ONE_AT_A_TIME)
    for i in range(3000):
        scheduler.add(job(f"client {i}", background=bool(i % 2)))
        if i % 3:
            scheduler.next_batch(anybody)
        else:
            scheduler.remove_late(now=1e8)
    batches(scheduler)
    assert len(scheduler._deadlines) < 4000
    for lane in (scheduler._foreground, scheduler._background):
        assert not lane.jobs
        assert lane.num_waiting_flows == 0
        assert len(lane.flows) < 1500


def test_a_batch_costs_no_more_than_it_may() -> None:
    """A job above the limit runs alone; the limit is asked for each stage."""
    scheduler = Scheduler(BatchLimits(max_rows=64, max_tokens=1 << 20))
    jobs = [job(cost=cost) for cost in (3.0, 3.0, 3.0, 9.0, 1.0)]
    for one in jobs:
        scheduler.add(one)
    asked: list[str] = []

    def max_cost(stage: str) -> float:
        asked.append(stage)
        return 7.0

    sizes = []
    while (batch := scheduler.next_batch(lambda one: True, max_cost)) is not None:
        sizes.append([one.cost for one in batch.jobs])
    assert all(sum(costs) <= 7.0 or len(costs) == 1 for costs in sizes) and sum(map(len, sizes)) == 5
    assert [9.0] in sizes and set(asked) == {jobs[0].stage}
