"""Recordings: whose they are, what is kept for the next, and what is dropped for it."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from service.recordings import Recordings
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


def take(recordings: Recordings, size: int, holder: object) -> Counting | None:
    taken = recordings.take(size, lambda device: Counting(size, device), holder)
    if taken is None:
        return None
    taken.fixed.taken = taken  # type: ignore[attr-defined]
    return taken.fixed


def test_a_recording_does_again_what_was_recorded_on_what_is_there_then() -> None:
    recordings, recorder = make_recordings()
    taken = recordings.take("sum", lambda device: Counting(2, device), holder := Holder())
    assert taken is not None and holder
    taken.fixed.told.fill_(1)
    taken.prepare()
    assert not taken.fixed.sum.any(), "trying it leaves everything as it was"
    for wanted, told in ((2.0, 1.0), (8.0, 3.0), (8.0, 0.0)):
        taken.fixed.told.fill_(told)
        taken.replay()
        assert taken.fixed.result.tolist() == [wanted, wanted]
    taken.prepare()
    assert recorder.num_recorded == 1


def test_who_holds_a_recording_has_it_alone_and_others_get_it_next() -> None:
    recordings, _ = make_recordings()
    first, second = Holder(), Holder()
    one, other = take(recordings, 4, first), take(recordings, 4, second)
    assert one is not None and other is not None and one is not other
    recordings.give_back(one.taken)  # type: ignore[attr-defined]
    assert take(recordings, 4, second) is one
    assert take(recordings, 8, second) not in (one, other)
    del first
    third = Holder()
    recordings.give_back(other.taken)  # type: ignore[attr-defined]
    assert take(recordings, 4, third) is other


def test_a_holder_that_is_gone_holds_nothing() -> None:
    recordings, _ = make_recordings()
    holder = Holder()
    one = take(recordings, 4, holder)
    del holder
    assert take(recordings, 4, recordings) is one


def test_the_least_recently_used_that_nobody_holds_make_room() -> None:
    recordings, _ = make_recordings(max_bytes=12 * 10)
    holder = Holder()
    small = {size: take(recordings, size, holder) for size in (2, 3, 4)}
    assert recordings.num_bytes == 12 * 9
    assert take(recordings, 5, holder) is None, "all are held"
    for size in (3, 2):
        recordings.give_back(small[size].taken)  # type: ignore[union-attr]
    assert take(recordings, 4, holder) not in (None, small[4]), "3 went"
    assert recordings.num_bytes == 12 * 10
    assert take(recordings, 11, holder) is None, "larger than all there is"
    assert take(recordings, 2, holder) is small[2]
    assert recordings.num_bytes == 12 * 10, "nothing was dropped for what has no room anyway"


def test_work_that_asks_what_is_in_a_tensor_is_not_recorded() -> None:
    class Asking(Counting):
        def run(self) -> None:
            if self.told.sum() > 1:
                self.sum += 1

    recordings, _ = make_recordings()
    taken = recordings.take("asks", lambda device: Asking(2, device), recordings)
    assert taken is not None
    with pytest.raises(CannotRecord):
        taken.prepare()


def test_a_recording_that_does_something_else_is_found_out() -> None:
    """What it reads was replaced after it was made: numbers that were brought from elsewhere."""

    class Elsewhere(Counting):
        def run(self) -> None:
            self.told = self.told + 1
            super().run()

    recordings = Recordings(TapeRecorder(), 1 << 20)
    taken = recordings.take("elsewhere", lambda device: Elsewhere(2, device), recordings)
    assert taken is not None
    with pytest.raises(RuntimeError, match="does not do what was recorded"):
        taken.prepare()
