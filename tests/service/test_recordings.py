"""Recordings: whose they are, what is kept for the next, what is dropped for it, and what goes wrong without harm."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from service import recordings as module
from service.recordings import Recording, Recordings
from tests.tape import CannotRecord, TapeRecorder, make_recordings


class Counting:
    """Adds to a number what it is told."""

    def __init__(self, size: int, device: torch.device | None) -> None:
        self.told, self.sum, self.result = (torch.zeros(size, device=device) for _ in range(3))

    @property
    def num_bytes(self) -> int:
        return 4 * 3 * len(self.told)

    @property
    def changing(self) -> Sequence[Tensor]:
        return (self.sum,)

    def run(self) -> None:
        self.sum += 2 * self.told
        self.result.copy_(self.sum.abs())


class Holder:
    """Somebody."""


def ones(work: Counting) -> None:
    work.told.fill_(1)


def take(
    recordings: Recordings,
    size: int,
    holder: object,
    load: Callable[[Counting], None] = ones,
    kind: type[Counting] = Counting,
) -> Recording[Counting] | None:
    return recordings.take((kind, size), lambda device: kind(size, device), load, holder)


def test_a_recording_does_again_what_was_recorded_on_what_is_there_then() -> None:
    recordings, recorder = make_recordings()
    taken = take(recordings, 2, holder := Holder())
    assert taken is not None and holder
    assert not taken.fixed.sum.any(), "trying it leaves everything as it was"
    for wanted, told in ((2.0, 1.0), (8.0, 3.0), (8.0, 0.0)):
        taken.fixed.told.fill_(told)
        taken.replay()
        assert taken.fixed.result.tolist() == [wanted, wanted]
    recordings.give_back(taken)
    assert take(recordings, 2, holder) is taken
    assert recorder.num_recorded == 1


def test_work_that_is_done_once_is_held_by_nobody() -> None:
    recordings, recorder = make_recordings()
    for told in (1.0, 2.0):
        found = recordings.run(2, lambda device: Counting(2, device), lambda work: work.told.fill_(told))  # noqa: B023
        assert found is not None and recordings.num_held == 0
    assert found.result.tolist() == [6.0, 6.0]
    assert (recorder.num_recorded, recorder.num_played) == (1, 3), "one of them a trial"


def test_who_holds_a_recording_has_it_alone_and_others_get_it_next() -> None:
    recordings, _ = make_recordings()
    first, second = Holder(), Holder()
    one, other = take(recordings, 4, first), take(recordings, 4, second)
    assert one is not None and other is not None and one is not other and recordings.num_held == 2
    recordings.give_back(one)
    assert take(recordings, 4, second) is one
    assert take(recordings, 8, second) not in (one, other)
    third = Holder()
    recordings.give_back(other)
    assert take(recordings, 4, third) is other


def test_a_holder_that_is_gone_holds_nothing() -> None:
    recordings, _ = make_recordings()
    holder = Holder()
    one = take(recordings, 4, holder)
    del holder
    assert recordings.num_held == 0
    assert take(recordings, 4, recordings) is one


def test_the_least_recently_used_that_nobody_holds_make_room() -> None:
    recordings, _ = make_recordings(max_bytes=12 * 10)
    holder = Holder()
    small = {size: take(recordings, size, holder) for size in (2, 3, 4)}
    assert recordings.num_bytes == 12 * 9
    assert take(recordings, 5, holder) is None, "all are held"
    for size in (3, 2):
        recordings.give_back(small[size])  # type: ignore[arg-type]
    assert take(recordings, 4, holder) not in (None, small[4]), "3 went"
    assert recordings.num_bytes == 12 * 10
    assert take(recordings, 11, holder) is None, "larger than all there is"
    assert take(recordings, 2, holder) is small[2]
    assert recordings.num_bytes == 12 * 10, "nothing was dropped for what has no room anyway"


class Asking(Counting):
    """Looks at what it is told."""

    def run(self) -> None:
        if self.told.sum() > 1:
            self.sum += 1


class Elsewhere(Counting):
    """What it reads is replaced when it is recorded: it does not stay where it was."""

    def run(self) -> None:
        self.told = self.told + 1
        super().run()


@pytest.mark.parametrize(
    ("kind", "reason"), [(Asking, "waits for the device"), (Elsewhere, "does not do what was recorded")]
)
def test_what_cannot_be_recorded_is_said_and_nothing_is_recorded_any_more(
    kind: type[Counting], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    recordings, _ = make_recordings()
    holder, free = Holder(), Holder()
    held = take(recordings, 2, holder)
    recordings.give_back(take(recordings, 3, free))  # type: ignore[arg-type]
    assert take(recordings, 4, free, kind=kind) is None
    assert recordings.has_failed and reason in caplog.text
    assert recordings.num_held == 1 and recordings.num_bytes == 12 * 2, "what nobody holds is of no use any more"
    assert take(recordings, 2, free) is None
    assert held is not None
    held.replay()
    assert held.fixed.result.tolist() == [2.0, 2.0]
    recordings.give_back(held)
    assert not recordings.num_bytes


def test_a_holder_that_goes_after_a_failure_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.log, "disabled", True)  # pytest keeps what is logged, and with the error whoever saw it
    recordings, _ = make_recordings()
    holder = Holder()
    assert take(recordings, 2, holder) is not None and take(recordings, 4, holder, kind=Asking) is None
    del holder
    assert take(recordings, 2, recordings) is None
    assert not recordings.num_bytes


@pytest.mark.parametrize("where", ["make", "load", "record"])
def test_where_memory_runs_out_callers_do_without_for_a_while(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    recordings, recorder = make_recordings()
    holder, is_full = Holder(), True
    recordings.give_back(take(recordings, 3, holder))  # type: ignore[arg-type]

    def fail(at: str) -> None:
        if is_full and at == where:
            raise torch.OutOfMemoryError("full")

    class Full(Counting):
        def __init__(self, size: int, device: torch.device | None) -> None:
            super().__init__(size, device)
            fail("make" if device is None else "meta")

        def run(self) -> None:
            fail("record")
            super().run()

    assert take(recordings, 4, holder, lambda work: fail("load"), Full) is None
    assert not recordings.has_failed and not recordings.num_held and not recordings.num_bytes, (
        "all gave up their memory"
    )
    is_full = False
    assert take(recordings, 4, holder, kind=Full) is None, "not yet again"
    clock[0] += module.PAUSE_S
    assert take(recordings, 4, holder, kind=Full) is not None
    assert recorder.num_recorded == 2


def test_making_recordings_takes_no_more_than_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])

    class Slow(TapeRecorder):
        def record(self, run: Callable[[], None]) -> Callable[[], None]:
            clock[0] += 2.0
            return super().record(run)

    recordings, holder = Recordings(Slow(), 1 << 20, share=0.05), Holder()
    made = take(recordings, 2, holder)
    assert made is not None
    recordings.give_back(made)
    clock[0] += 37.9
    assert take(recordings, 3, holder) is None
    assert take(recordings, 2, holder) is made, "what there is serves on"
    clock[0] += 0.2
    assert take(recordings, 3, holder) is not None


def test_a_tape_refuses_what_waits_for_a_device() -> None:
    x, mask, rows = torch.arange(6.0), torch.tensor([True, False] * 3), torch.tensor([1, 2])
    for ask in (
        lambda: x.tolist(),
        lambda: x[0].item(),
        lambda: bool(x[0] > 1),
        lambda: x.cpu(),
        lambda: x.numpy(),
        lambda: x[mask],
        lambda: x.masked_select(mask),
        lambda: mask.nonzero(),
        lambda: torch.bincount(rows),
        lambda: x[:2].repeat_interleave(rows),
        lambda: torch.unique(x),
        lambda: torch.tensor([1.0]) + x,
        lambda: x.clone().index_put_((mask,), torch.zeros(())),
    ):
        with pytest.raises(CannotRecord):
            TapeRecorder().record(ask)  # type: ignore[arg-type]
    TapeRecorder().record(lambda: x[rows].add_(1).sum())  # type: ignore[arg-type, return-value]
