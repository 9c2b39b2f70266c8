"""Demand: how many warm sandboxes would have been enough for the claims of late. No clock, no I/O.

Each claim takes a warm sandbox and has one started in its place. So what matters of a claim is only how many places of
the claims before it were still being filled when it came: with more warm ones than that, one was ready for it. This
number is counted for each claim as it comes; whether claims come steadily, in bursts or by the timetable of a school
needs no model, and a quantile of it is the answer.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque

from kernelprovisioner.sizing import Want

#: Claims older than this (seconds) say nothing about those to come.
WINDOW = 1800.0
#: So many claims are remembered; where more come within the window, they are from a shorter time.
_MOST_CLAIMS = 10_000


class Demand:
    """The claims of the last half hour. `concurrency` spare sandboxes start at once; more than `bound` never fit."""

    def __init__(self, concurrency: int, bound: int) -> None:
        self._bound = bound
        self._free_at = [0.0] * concurrency  # when each that starts sandboxes is done with all it has to start
        self._filling: list[float] = []  # when each place that is being filled is warm again
        self._claims: deque[tuple[float, int]] = deque()  # when it came, how many places were being filled then
        self._counts: Counter[int] = Counter()  # how often each number of places stands there

    @property
    def claims(self) -> int:
        """How many claims came in the window."""
        return len(self._claims)

    def came(self, now: float, start_seconds: float) -> None:
        """A claim came, while the start of a sandbox takes `start_seconds`."""
        self._forget(now)
        while self._filling and self._filling[0] <= now:
            heapq.heappop(self._filling)
        filling = len(self._filling)
        self._claims.append((now, filling))
        self._counts[filling] += 1
        if filling < self._bound:
            done = max(now, self._free_at[0]) + start_seconds
            heapq.heapreplace(self._free_at, done)
            heapq.heappush(self._filling, done)

    def wanted(self, now: float, hit_rate: float) -> Want:
        """How many warm ones at least the share `hit_rate` of the claims of the window would have met ready."""
        self._forget(now)
        claims = len(self._claims)
        needed = math.ceil(hit_rate * claims - 1e-9)
        count = served = 0
        while served < needed:
            served += self._counts[count]
            count += 1
        minutes = round(WINDOW / 60)
        came = "the one claim" if claims == 1 else f"the {claims} claims"
        why = f"{count} kept warm, which would have served {hit_rate * 100:g} % of {came} of {minutes} min at once"
        return Want(count, why)

    def _forget(self, now: float) -> None:
        while self._claims and (self._claims[0][0] < now - WINDOW or len(self._claims) > _MOST_CLAIMS):
            _, filling = self._claims.popleft()
            self._counts[filling] -= 1
            if not self._counts[filling]:
                del self._counts[filling]
