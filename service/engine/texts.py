"""Texts that are being written word by word, and who may come in beside them."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from service.backbone.decoding import Writing
from service.backbones import HostedBackbone
from service.bank import BatchLeases
from service.engine.newcomers import MAX_HELD_S, Newcomers
from service.scheduler import Scheduler
from service.types import Batch, ContinueInput, Job


@dataclass
class Texts:
    """Texts that are being written together: whose they are, in order, their slots, and the device time each has had."""

    hosted: HostedBackbone
    writing: Writing
    jobs: list[Job]
    leases: BatchLeases = field(default_factory=BatchLeases)
    seconds: dict[int, float] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Rows of a step."""
        return len(self.writing) * self.writing.num_beams

    @property
    def num_tokens(self) -> int:
        """Tokens that are kept for as long as the texts are written."""
        return sum(map(_kept_tokens, self.jobs))

    def spent(self, seconds: float) -> None:
        """Share device time among the texts."""
        for job in self.jobs:
            self.seconds[job.number] = self.seconds.get(job.number, 0.0) + seconds / len(self.jobs)

    def can_join(self, other: "Texts") -> bool:
        """Whether another's texts can be written in the same steps."""
        return self.hosted is other.hosted and self.writing.can_join(other.writing)

    def join(self, other: "Texts") -> None:
        """Take others in. Texts of neighbouring slots are put side by side."""
        self.writing.join(other.writing)
        self.jobs += other.jobs
        self.seconds |= other.seconds
        self.leases.take(other.leases)
        bank = self.hosted.bank
        order = sorted(range(len(self.jobs)), key=lambda place: bank.place(self.jobs[place].adapter))
        if order != list(range(len(order))):
            self.writing.reorder(order)
            self.jobs = [self.jobs[place] for place in order]

    def remove(self, places: Sequence[int]) -> list[tuple[Job, float]]:
        """Let jobs go, by their places, with the device time each had."""
        gone = [self.jobs[place] for place in places]
        self.jobs = [job for place, job in enumerate(self.jobs) if place not in set(places)]
        self.leases.keep(job.adapter for job in self.jobs)
        return [(job, self.seconds.pop(job.number)) for job in gone]


class WritingTurns:
    """All texts that are being written, and whose turn it is beside them. The device thread's own.

    A new text comes in while there is room, and when it pays (`engine/newcomers.py`). Other jobs get half of the device's time: a
    batch of them runs, and then words are written for as long as it took. No text comes in before one that was first in the
    queue and found no room or no slot: texts that come and go would never leave it any.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._texts: list[Texts] = []
        self._first: Job | None = None  # it waits for room or a slot that texts have
        self._new_rows = self._new_tokens = 0  # of texts that the batch being formed would begin
        self._newcomers = Newcomers()
        # which kinds wait in this round for others to come in with them
        self._wait: dict[tuple[str, tuple[int, ...]], bool] = {}
        self._writing_due_s = 0.0  # device time that others had since, and that writing is to have

    def __iter__(self) -> Iterator[Texts]:
        """The texts, those that are written together at a time."""
        return iter(list(self._texts))

    def __len__(self) -> int:
        """How many such steps a round has."""
        return len(self._texts)

    def add(self, begun: Texts) -> None:
        """Texts are written from now on, by themselves."""
        self._texts.append(begun)

    def remove(self, texts: Texts) -> None:
        """Texts are written no more."""
        self._texts.remove(texts)
        if not self._texts:
            self._writing_due_s = 0.0

    def arrived(self, job: Job) -> None:
        """A job was queued."""
        if job.stage == "generate":
            self._newcomers.arrived((job.backbone, job.shape), job.submitted_at)

    def form_batch(self, is_dead: Callable[[Job], bool]) -> None:
        """A batch is about to be formed; `is_dead` says for which jobs nobody waits any more."""
        self._new_rows = self._new_tokens = 0
        self._wait = {}
        if self._first is not None and (not self._texts or is_dead(self._first)):
            self._first = None

    @property
    def are_closed(self) -> bool:
        """Whether no text would come in now."""
        return bool(self._texts) and (self._first is not None or any(self._wait.values()))

    def _should_wait(self, job: Job) -> bool:
        """Whether a job waits for others to come in with it; not if it has little time left."""
        now, kind = time.monotonic(), (job.backbone, job.shape)
        if job.deadline - now < 2 * MAX_HELD_S:
            return False
        if kind not in self._wait:
            waiting = self._scheduler.waiting_like(job)
            num = min(waiting.num, self._num_places(job))
            self._wait[kind] = self._newcomers.should_wait(
                kind,
                now,
                num_writing=sum(len(texts.jobs) for texts in self._texts),
                num_waiting=num,
                waited_s=waiting.seconds(now) * num / max(1, waiting.num),
            )
        return self._wait[kind]

    def _num_places(self, job: Job) -> int:
        """How many like a job there is room for."""
        limits, kept = self._scheduler.limits, _kept_tokens(job)
        num_rows = limits.max_rows - sum(texts.num_rows for texts in self._texts)
        num_tokens = limits.max_tokens - sum(texts.num_tokens for texts in self._texts)
        return max(0, min(num_rows // job.rows, num_tokens // kept if kept else num_rows))

    def may_come_in(self, job: Job) -> bool:
        """Whether it is a job's turn to join the batch that is being formed."""
        if not self._texts:
            return True
        if job.stage != "generate":
            return self._writing_due_s <= 0
        if not self._new_rows and self._should_wait(job):
            return False
        if self._first is not None and job is not self._first:
            return False
        limits = self._scheduler.limits
        num_rows = sum(texts.num_rows for texts in self._texts) + self._new_rows + job.rows
        num_tokens = sum(texts.num_tokens for texts in self._texts) + self._new_tokens + _kept_tokens(job)
        has_room = num_rows <= limits.max_rows and num_tokens <= limits.max_tokens
        if not has_room and not self._new_rows:
            self.keep_for(job)
        return has_room

    def came_in(self, job: Job) -> None:
        """A job joined the batch that is being formed."""
        if job.stage == "generate":
            self._new_rows += job.rows
            self._new_tokens += _kept_tokens(job)

    def keep_for(self, job: Job) -> None:
        """A job found that texts have all room or slots: what they leave is kept for it. Background work asks in its turn."""
        if self._texts and self._first is None and (not job.background or self._scheduler.is_background_due):
            self._first = job

    def formed(self, batch: Batch) -> None:
        """A batch was formed."""
        if self._first in batch.jobs:
            self._first = None

    def let_in(self, jobs: Sequence[Job], seconds: float) -> None:
        """These came in beside texts that were being written, which took so long."""
        self._newcomers.let_in(time.monotonic(), sum(job.cost for job in jobs), seconds)

    def others_ran(self, seconds: float) -> None:
        """A batch that wrote nothing took so long."""
        if self._texts:
            self._writing_due_s += seconds

    def wrote(self, seconds: float) -> None:
        """A word of texts took so long."""
        self._writing_due_s = max(0.0, self._writing_due_s - seconds)


def _kept_tokens(job: Job) -> int:
    """Tokens of a text that stay while it is written: all of a language model's. What a BLIP looked at is read only once."""
    return job.tokens if isinstance(job.inputs, ContinueInput) else 0
