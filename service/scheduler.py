"""Which waiting jobs run next. Policy only: knows no tensors, no device and no futures.

Jobs of one stage and shape may share a batch whatever their adapter. Who goes first is decided by start-time fair
queueing over flows of (client, adapter), in units of cost: a job is stamped on arrival with the later of

    the lane's clock, which moves on by the cost run divided by the number of flows that wait (AGEING_FLOWS at most)
    the stamp at which its flow's earlier jobs end

and the lowest stamp runs first, at every stage. So a flow that queues much waits behind itself and not in front of
others, and nothing starves: the clock soon passes every stamp, however many newcomers there are. Background work has a lane of its own, which runs when the
foreground has nothing to run, and otherwise gets a small guaranteed share. Whatever adds or takes out takes logarithmic time.
"""

import heapq
import math
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from service.types import Batch, Job, Stage

BACKGROUND_SHARE = 0.05
AGEING_FLOWS = 16  # with more flows than these waiting, the order of arrival begins to count
MAX_PASSED_OVER = 256  # jobs that one batch may skip for want of a slot; they come first in the next

Group = tuple[str, Stage, tuple[int, ...]]  # backbone, stage, shape
Flow = tuple[str, str]
Stamped = tuple[float, int]  # stamp and job number: the order of a group's heap


@dataclass(frozen=True)
class BatchLimits:
    """What fits into one batch. A job above a limit runs alone."""

    max_rows: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """How many wait, and the sum of the times at which they came."""

    num: int = 0
    came_at: float = 0.0

    def seconds(self, now: float) -> float:
        """How long they have waited, all together."""
        return max(0.0, self.num * now - self.came_at)

    def with_job(self, job: Job) -> "Waiting":
        """With one more."""
        return Waiting(self.num + 1, self.came_at + job.submitted_at)

    def without(self, job: Job) -> "Waiting":
        """With one less."""
        return Waiting(self.num - 1, self.came_at - job.submitted_at) if self.num > 1 else NOBODY


NOBODY = Waiting()


@dataclass
class _Flow:
    """Where the jobs of a flow end on the clock, and how many of them wait."""

    end: float
    num_waiting: int = 0


@dataclass
class _Lane:
    """Waiting jobs under one clock. Heaps may hold numbers of jobs that are gone: they are skipped when they surface."""

    jobs: dict[int, Job] = field(default_factory=dict)
    groups: dict[Group, list[Stamped]] = field(default_factory=dict)
    flows: dict[Flow, _Flow] = field(default_factory=dict)
    adapters: Counter[str] = field(default_factory=Counter)  # waiting jobs of each; none have no entry
    waiting: dict[Group, Waiting] = field(default_factory=dict)
    num_waiting_flows: int = 0
    num_rows: int = 0
    clock: float = 0.0

    def add(self, job: Job) -> None:
        flow = self.flows.setdefault((job.client, job.adapter), _Flow(self.clock))
        start = max(self.clock, flow.end)
        flow.end = start + job.cost
        flow.num_waiting += 1
        self.num_waiting_flows += flow.num_waiting == 1
        self.jobs[job.number] = job
        self.adapters[job.adapter] += 1
        self.num_rows += job.rows
        group = _group_of(job)
        self.waiting[group] = self.waiting.get(group, NOBODY).with_job(job)
        heapq.heappush(self.groups.setdefault(group, []), (start, job.number))

    def forget(self, job: Job, *, has_run: bool) -> None:
        """A job has left. One that never ran gives its flow the time back."""
        del self.jobs[job.number]
        self.num_rows -= job.rows
        left = self.waiting.pop(_group_of(job)).without(job)
        if left.num:
            self.waiting[_group_of(job)] = left
        self.adapters[job.adapter] -= 1
        if not self.adapters[job.adapter]:
            del self.adapters[job.adapter]
        flow = self.flows[job.client, job.adapter]
        flow.num_waiting -= 1
        if not has_run:
            flow.end -= job.cost
        if flow.num_waiting == 0:
            self.num_waiting_flows -= 1
            if len(self.flows) > 2 * self.num_waiting_flows + 64:
                self._forget_flows()

    def _forget_flows(self) -> None:
        """Flows that wait for nothing and owe nothing are like new ones."""
        self.flows = {key: flow for key, flow in self.flows.items() if flow.num_waiting or flow.end > self.clock}

    def order(self) -> list[Group]:
        """Groups by the stamp of their first job; those that have none left are forgotten."""
        heads = {group: self._head(heap) for group, heap in self.groups.items()}
        for group, head in heads.items():
            if head is None:
                del self.groups[group]
        return [group for _, group in sorted((head, group) for group, head in heads.items() if head is not None)]

    def _head(self, heap: list[Stamped]) -> Stamped | None:
        while heap and heap[0][1] not in self.jobs:
            heapq.heappop(heap)
        return heap[0] if heap else None

    def first(self, group: Group, limits: BatchLimits) -> list[Job]:
        """The first jobs of a group that fit together; of a group that has one."""
        waiting = [entry for entry in self.groups[group] if entry[1] in self.jobs]
        found: list[Job] = []
        rows = tokens = 0
        for _, number in heapq.nsmallest(min(len(waiting), limits.max_rows), waiting):
            job = self.jobs[number]
            rows, tokens = rows + job.rows, tokens + job.tokens
            if found and (rows > limits.max_rows or tokens > limits.max_tokens):
                break
            found.append(job)
        return found

    def pack(self, group: Group, limits: BatchLimits, max_cost: float, may_join: Callable[[Job], bool]) -> list[Job]:
        """Take the first jobs of a group that fit together and may join."""
        heap = self.groups[group]
        packed: list[Job] = []
        passed_over: list[Stamped] = []
        refused: set[str] = set()
        rows = tokens = 0
        cost = 0.0
        first_stamp = 0.0
        while (head := self._head(heap)) is not None and len(passed_over) < MAX_PASSED_OVER:
            job = self.jobs[head[1]]
            fits = rows + job.rows <= limits.max_rows and tokens + job.tokens <= limits.max_tokens
            if packed and not (fits and cost + job.cost <= max_cost):
                break
            heapq.heappop(heap)
            if job.adapter in refused or not may_join(job):
                refused.add(job.adapter)
                passed_over.append(head)
                continue
            first_stamp = first_stamp if packed else head[0]
            packed.append(job)
            rows, tokens, cost = rows + job.rows, tokens + job.tokens, cost + job.cost
        for stamped in passed_over:
            heapq.heappush(heap, stamped)
        self._run(packed, first_stamp)
        return packed

    def _run(self, jobs: list[Job], first_stamp: float) -> None:
        if jobs:
            share = sum(job.cost for job in jobs) / min(self.num_waiting_flows, AGEING_FLOWS)
            self.clock = max(self.clock, first_stamp) + share
        for job in jobs:
            self.forget(job, has_run=True)


class Scheduler:
    """Waiting jobs. Not thread-safe: the device thread alone calls it."""

    def __init__(self, limits: BatchLimits) -> None:
        self.limits = limits
        self._foreground = _Lane()
        self._background = _Lane()
        self._deadlines: list[Stamped] = []  # a heap of deadlines and job numbers; most of the jobs have long run
        self._background_due = 0.0  # cost the background lane may run before the foreground's next batch

    def __len__(self) -> int:
        return len(self._foreground.jobs) + len(self._background.jobs)

    @property
    def has_full_batch(self) -> bool:
        """Whether what waits would fill a batch, were it all of one kind."""
        return sum(lane.num_rows for lane in (self._foreground, self._background)) >= self.limits.max_rows

    @property
    def oldest_submission(self) -> float | None:
        """When the job that waits longest was submitted, on the monotonic clock; None when nothing waits."""
        first = [next(iter(lane.jobs.values())) for lane in (self._foreground, self._background) if lane.jobs]
        return min((job.submitted_at for job in first), default=None)

    def waiting_like(self, job: Job) -> Waiting:
        """Who waits that could share a batch with a job, background work aside."""
        return self._foreground.waiting.get(_group_of(job), NOBODY)

    def is_wanted(self, adapter: str) -> bool:
        """Whether a waiting job needs an adapter."""
        return any(adapter in lane.adapters for lane in (self._foreground, self._background))

    @property
    def is_background_due(self) -> bool:
        """Whether the background may run before the foreground's next batch."""
        return self._background_due > 0

    def add(self, job: Job) -> None:
        """Queue a job."""
        self._lane(job).add(job)
        heapq.heappush(self._deadlines, (job.deadline, job.number))
        if len(self._deadlines) > 2 * len(self) + 64:
            self._deadlines = [entry for entry in self._deadlines if self._waiting(entry[1]) is not None]
            heapq.heapify(self._deadlines)

    def remove(self, number: int) -> Job | None:
        """Take out a job that need not run any more, and return it; None when it does not wait here."""
        job = self._waiting(number)
        if job is not None:
            self._lane(job).forget(job, has_run=False)
        return job

    def remove_late(self, now: float) -> list[Job]:
        """Take out every job whose deadline has passed, and return them."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            job = self.remove(heapq.heappop(self._deadlines)[1])
            if job is not None:
                late.append(job)
        return late

    def _lane(self, job: Job) -> _Lane:
        return self._background if job.background else self._foreground

    def _waiting(self, number: int) -> Job | None:
        return self._foreground.jobs.get(number) or self._background.jobs.get(number)

    def next_batch(
        self, may_join: Callable[[Job], bool], max_cost: Callable[[Stage], float] = lambda stage: math.inf
    ) -> Batch | None:
        """Take the next batch out; None when nothing waits or nothing may run.

        A batch of several jobs costs no more than `max_cost` of its stage, so that nobody waits long for one to end.
        `may_join` is asked about each job about to join (it takes the adapter's slot). A job it refuses stays, and the
        others of that adapter with it; they come first next time.
        """
        for lane in self._lanes():
            for group in lane.order():
                jobs = lane.pack(group, self.limits, max_cost(group[1]), may_join)
                if jobs:
                    self._account(lane, sum(job.cost for job in jobs))
                    return Batch(tuple(jobs))
        return None

    def upcoming(self, without: Collection[Stage] = ()) -> list[Job]:
        """The jobs that are next, as many as fit into a batch, some stages left out.

        They stay: who comes in before it is formed may be taken instead. Takes a time that grows with those who wait for it.
        """
        for lane in self._lanes():
            for group in lane.order():
                if group[1] not in without:
                    return lane.first(group, self.limits)
        return []

    def _lanes(self) -> tuple[_Lane, _Lane]:
        if self._background_due > 0 and self._background.jobs:
            return self._background, self._foreground
        return self._foreground, self._background

    def _account(self, lane: _Lane, cost: float) -> None:
        """The background earns its share of what the foreground runs, saves it only while it waits, and pays for its turns."""
        if lane is self._foreground:
            due = self._background_due + BACKGROUND_SHARE / (1 - BACKGROUND_SHARE) * cost
            self._background_due = due if self._background.jobs else min(due, 0.0)
        elif self._foreground.jobs:
            self._background_due -= cost


def _group_of(job: Job) -> Group:
    return job.backbone, job.stage, job.shape


def is_late(job: Job, now: float | None = None) -> bool:
    """Whether the job's deadline has passed."""
    return job.deadline <= (time.monotonic() if now is None else now)
