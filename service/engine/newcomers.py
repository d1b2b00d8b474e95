"""Whether texts that wait come in beside those being written, or wait for others to come in with them.

To let texts in holds up everybody who is being written: for a time that grows with how many come, and for one that does not,
as the weights are read and the kept keys moved for one as for ten. That fixed part, the *price*, is paid each time. So
newcomers wait for company as long as it pays, in seconds that requests wait in all:

- not unless others are likely to come: while the newcomers who wait are fewer than arrive in the time that a shared price saves
  (arrivals a second x price x texts being written);
- no longer than what the price costs: once they have waited, all together, as long as their coming would hold up the others.
  Where all can share, this costs at most twice what was best, whatever comes (dynamic acknowledgement: Dooly, Goldman and
  Scott, 1998);
- and on average no longer than `MAX_HELD_S`.
"""

import math
from collections.abc import Hashable

MAX_HELD_S = 0.5
MEMORY_S = 2.0  # of arrivals
MAX_KINDS = 64  # of which arrivals are remembered; those of which none came of late are forgotten
FORGETTING = 0.95  # of what was learnt of the price, by each time that somebody comes in
LEAST_SPREAD = 0.01  # of work, relative to its mean square, from which its price can be told from noise


class Newcomers:
    """What was learnt of arrivals, by kinds that can come in together, and of the price. The device thread's own."""

    def __init__(self) -> None:
        self.price = Price()
        # how many, each counting less as time goes by, and when they were counted
        self._arrivals: dict[Hashable, tuple[float, float]] = {}
        self._let_in_at = -math.inf

    def arrived(self, kind: Hashable, now: float) -> None:
        """Somebody has come who will want to be let in."""
        self._arrivals[kind] = (1.0 + self._late_arrivals(kind, now), now)
        if len(self._arrivals) > MAX_KINDS:
            self._arrivals = {
                known: own for known, own in self._arrivals.items() if self._late_arrivals(known, now) > 1.0
            }

    def per_s(self, kind: Hashable, now: float) -> float:
        """How many others come a second, of late."""
        return max(0.0, self._late_arrivals(kind, now) - 1.0) / MEMORY_S

    def _late_arrivals(self, kind: Hashable, now: float) -> float:
        num, counted_at = self._arrivals.get(kind, (0.0, now))
        return num * math.exp(-max(0.0, now - counted_at) / MEMORY_S)

    def let_in(self, now: float, work: float, seconds: float) -> None:
        """Some were let in, which took so long."""
        self.price.learn(work, seconds)
        self._let_in_at = now

    def should_wait(self, kind: Hashable, now: float, *, num_writing: int, num_waiting: int, waited_s: float) -> bool:
        """Whether those who could come in, and have waited `waited_s` in all, go on waiting while so many are being written.

        Only the time since somebody was let in last counts: before it there may have been no room for them.
        """
        held_up_s = num_writing * self.price.fixed_s  # what all these would lose if somebody came in now
        waited_s = min(waited_s, num_waiting * (now - self._let_in_at))
        is_company_likely = num_waiting < self.per_s(kind, now) * held_up_s
        return is_company_likely and waited_s < held_up_s and waited_s < num_waiting * MAX_HELD_S


class Price:
    """The part of a time that does not grow with the work: by least squares, of which the latest count most."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def learn(self, work: float, seconds: float) -> None:
        """So much work took so long."""
        sums = (self._weight, self._x, self._y, self._xx, self._xy)
        new = (1.0, work, seconds, work * work, work * seconds)
        self._weight, self._x, self._y, self._xx, self._xy = (
            FORGETTING * old + one for old, one in zip(sums, new, strict=True)
        )

    @property
    def fixed_s(self) -> float:
        """Seconds; 0 while all that was seen was about equally much work, from which nothing can be learnt."""
        spread = self._weight * self._xx - self._x * self._x
        if spread <= LEAST_SPREAD * self._weight * self._xx:
            return 0.0
        slope = max(0.0, (self._weight * self._xy - self._x * self._y) / spread)
        return min(max(0.0, self._y - slope * self._x), self._y) / self._weight
