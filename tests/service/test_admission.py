"""The budget at the door."""

import threading

import pytest

from service.admission import INITIAL_FLOPS, Admission
from service.errors import NotReady, Overloaded, TooLarge
from service.metrics import Metrics


def admission(*, seconds: float = 10.0, max_bytes: int = 100) -> Admission:
    return Admission(max_queue_seconds=seconds, max_bytes=max_bytes, metrics=Metrics())


def refused(door: Admission, reason: str) -> float:
    return door._metrics.registry.get_sample_value("bank_refused_total", {"reason": reason}) or 0.0


def test_a_permit_is_given_back_whatever_happens() -> None:
    door = admission()
    with door.permit(1e9), door.upload() as upload:
        upload.reserve(10)
        assert door.num_permits == 1
        with pytest.raises(ZeroDivisionError), door.permit(1e9):
            1 / (door.num_permits - 2)
        assert door.num_permits == 1
    assert door.num_permits == 0
    assert (door._cost, door._bytes) == (0.0, 0)


def test_more_work_than_the_queue_may_hold_is_refused_with_a_time_to_come_back() -> None:
    door = admission(seconds=10.0)
    with door.permit(6 * INITIAL_FLOPS), door.permit(3 * INITIAL_FLOPS):
        with pytest.raises(Overloaded) as refusal, door.permit(4 * INITIAL_FLOPS):
            pass
        assert refusal.value.retry_after_s == pytest.approx(3.0)  # 13 s of work where 10 fit
        with door.permit(1 * INITIAL_FLOPS):
            pass
    assert refused(door, "overloaded") == 1


def test_a_refusal_leaves_the_budget_as_it_was() -> None:
    door = admission()
    with door.permit(9 * INITIAL_FLOPS):
        for _ in range(3):
            with pytest.raises(Overloaded), door.permit(2 * INITIAL_FLOPS):
                pass
        assert door.num_permits == 1


def test_one_request_above_the_whole_budget_comes_in_when_nobody_else_is_there() -> None:
    door = admission()
    with door.permit(1000 * INITIAL_FLOPS):
        with pytest.raises(Overloaded), door.permit(1.0):
            pass


def test_bytes_are_a_budget_of_their_own_taken_as_they_come() -> None:
    door = admission(max_bytes=100)
    with door.upload() as first:
        first.reserve(40)
        first.reserve(60)  # 20 more
        first.reserve(50)  # has them already
        with door.upload() as second:
            second.reserve(40)
            with pytest.raises(Overloaded) as refusal:
                second.reserve(41)
            assert refusal.value.retry_after_s > 0
        with door.upload() as third:
            third.reserve(40)
    with door.upload() as alone, pytest.raises(TooLarge, match="100 bytes"):
        alone.reserve(101)
    assert door._bytes == 0
    assert refused(door, "too_large") == 1
    assert refused(door, "overloaded") == 1


def test_the_budget_follows_the_measured_speed() -> None:
    door = admission(seconds=10.0)
    for _ in range(60):
        door.measured(cost=1e12, seconds=1.0)
    assert door.flops == pytest.approx(1e12, rel=1e-3)
    with door.permit(1e9), door.permit(9e12):
        pass
    for _ in range(60):
        door.measured(cost=1e6, seconds=1.0)
    with door.permit(1e3), pytest.raises(Overloaded), door.permit(9e12):
        pass


@pytest.mark.parametrize(("cost", "seconds"), [(0.0, 1.0), (1.0, 0.0)])
def test_measurements_that_mean_nothing_are_left_out(cost: float, seconds: float) -> None:
    door = admission()
    door.measured(cost, seconds)
    assert door.flops == INITIAL_FLOPS


def test_a_closed_door_lets_nobody_in_and_those_inside_finish() -> None:
    door = admission()
    with door.permit(1.0):
        door.close()
        with pytest.raises(NotReady, match="shutting down"), door.permit(1.0):
            pass
        assert door.num_permits == 1
    assert door.num_permits == 0
    assert refused(door, "draining") == 1


def test_the_share_in_use_is_measured() -> None:
    door = admission(seconds=10.0)
    with door.permit(5 * INITIAL_FLOPS):
        assert door._metrics.registry.get_sample_value("bank_admitted_cost_ratio") == pytest.approx(0.5)
    assert door._metrics.registry.get_sample_value("bank_admitted_cost_ratio") == 0.0


def test_threads_leave_nothing_behind() -> None:
    door = admission(max_bytes=1 << 30)

    def work() -> None:
        for i in range(500):
            with door.permit(0.1 * i), door.upload() as upload:
                upload.reserve(i)
                door.measured(1e9, 0.1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (door.num_permits, door._bytes, door._cost) == (0, 0, 0.0)
