"""Whether texts that wait come in beside those being written, or wait for others to come in with them.

To let texts in holds up everybody who is being written: for a time that grows with how many come, and for one that does not,
as the weights are read and the kept keys moved for one as for ten. That fixed part, the *price*, is paid each time. So
newcomers wait for company as long as it pays, in seconds that requests wait in all:

- not unless others are likely to come: while the newcomers who wait are fewer than arrive in the time that a shared price saves
  (arrivals a second x price x texts being written);
- no longer than what the price costs: once they have waited, all together, as long as their coming would hold up the others.
  Whatever comes then, this costs at most twice what was best (dynamic acknowledgement: Dooly, Goldman and Scott, 1998);
- and on average no longer than `MAX_HELD_S`.
"""

import math

MAX_HELD_S = 0.5
MEMORY_S = 2.0  # of arrivals
FORGETTING = 0.95  # of what was learnt of the price, by each time that somebody comes in


class Newcomers:
    """What was learnt of arrivals and of the price. The device thread's own."""

    def __init__(self) -> None:
        self.price = Price()
        self._num_arrived = 0.0  # of late: each counts less as time goes by
        self._counted_at = 0.0

    def arrived(self, now: float) -> None:
        """Somebody has come who will want to be let in."""
        self._num_arrived = 1.0 + self._late_arrivals(now)
        self._counted_at = now

    def per_s(self, now: float) -> float:
        """How many come a second, of late."""
        return self._late_arrivals(now) / MEMORY_S

    def _late_arrivals(self, now: float) -> float:
        return self._num_arrived * math.exp(-max(0.0, now - self._counted_at) / MEMORY_S)

    def should_wait(self, now: float, *, num_writing: int, num_waiting: int, waited_s: float) -> bool:
        """Whether those who wait, `waited_s` in all, go on waiting while so many are being written."""
        held_up_s = num_writing * self.price.fixed_s  # what all these would lose if somebody came in now
        is_company_likely = num_waiting < self.per_s(now) * held_up_s
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
        """Seconds; 0 while all that was seen was equally much work, from which nothing can be learnt."""
        spread = self._weight * self._xx - self._x * self._x
        if spread <= 1e-9 * self._weight * self._xx:
            return 0.0
        slope = max(0.0, (self._weight * self._xy - self._x * self._y) / spread)
        return min(max(0.0, self._y - slope * self._x), self._y) / self._weight
