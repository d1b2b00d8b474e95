"""Who may come in: a request's bytes take room as they stream in, and before anything is decoded it takes one permit for
its estimated device cost.

The budget is in seconds of device time: estimated operations divided by the speed measured while serving. Stages of a
request inherit its permit, so permits never nest and cannot deadlock.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import NotReady, Overloaded, TooLarge
from service.metrics import Metrics

INITIAL_FLOPS = 2e10  # operations per second assumed until a batch has been measured
SMOOTHING = 0.2
UPLOAD_RETRY_S = 1.0


class Admission:
    """The budget at the door. Called from the event loop and, for measurements, from the device thread."""

    def __init__(self, *, max_queue_seconds: float, max_bytes: int, metrics: Metrics) -> None:
        self.max_queue_seconds = max_queue_seconds
        self.max_bytes = max_bytes
        self._metrics = metrics
        self._lock = threading.Lock()
        self._flops = INITIAL_FLOPS
        self._cost = 0.0
        self._bytes = 0
        self._num_permits = 0
        self._is_open = True

    @property
    def flops(self) -> float:
        """Measured operations per second."""
        return self._flops

    def measured(self, cost: float, seconds: float) -> None:
        """A batch of that cost took so long."""
        if cost > 0 and seconds > 0:
            with self._lock:
                self._flops += SMOOTHING * (cost / seconds - self._flops)

    @contextmanager
    def permit(self, cost: float) -> Iterator[None]:
        """Hold a share of the budget for the length of a request.

        A request that costs more than the whole budget is still admitted when nothing else is in: its cost is an
        estimate, and refusing it for ever would depend on a guess.
        Raises: Overloaded with the time until enough of the budget is free; NotReady while draining.
        """
        self._enter(cost)
        try:
            yield
        finally:
            with self._lock:
                self._num_permits -= 1
                # no rounding error outlives a quiet moment
                self._cost = self._cost - cost if self._num_permits else 0.0
                self._report()

    def _enter(self, cost: float) -> None:
        with self._lock:
            if not self._is_open:
                self._metrics.refused.labels("draining").inc()
                raise NotReady("the server is shutting down")
            budget = self.max_queue_seconds * self._flops
            if self._num_permits and self._cost + cost > budget:
                self._metrics.refused.labels("overloaded").inc()
                excess = max(self._cost + cost - budget, 0.1 * self._cost)
                raise Overloaded("no capacity for this request now", retry_after_s=max(0.1, excess / self._flops))
            self._cost += cost
            self._num_permits += 1
            self._report()

    @contextmanager
    def upload(self) -> Iterator["Upload"]:
        """Room for a request's bytes, taken as they come and given back with the block."""
        upload = Upload(self)
        try:
            yield upload
        finally:
            with self._lock:
                self._bytes -= upload.num_bytes

    def _take_bytes(self, num_bytes: int, taken: int) -> None:
        """Take room for more bytes of a request that has `taken` so many. Raises: Overloaded, TooLarge."""
        with self._lock:
            if taken + num_bytes > self.max_bytes:
                self._metrics.refused.labels("too_large").inc()
                raise TooLarge(f"the request alone is above the {self.max_bytes} bytes that may be in at once")
            if self._bytes + num_bytes > self.max_bytes:
                self._metrics.refused.labels("overloaded").inc()
                raise Overloaded("no memory for this request now", retry_after_s=UPLOAD_RETRY_S)
            self._bytes += num_bytes

    def _report(self) -> None:
        self._metrics.admitted_cost.set(self._cost / (self.max_queue_seconds * self._flops))

    @property
    def num_permits(self) -> int:
        """Requests that are in."""
        return self._num_permits

    def close(self) -> None:
        """Admit nobody any more; who is in may finish."""
        self._is_open = False


class Upload:
    """The bytes of one request that are in. Made by `Admission.upload`."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.num_bytes = 0

    def reserve(self, num_bytes: int) -> None:
        """Have room for so many bytes in all. Raises: Overloaded, TooLarge."""
        missing = num_bytes - self.num_bytes
        if missing > 0:
            self._admission._take_bytes(missing, self.num_bytes)
            self.num_bytes = num_bytes
