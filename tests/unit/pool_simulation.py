"""A pool's state under arrivals, with starts that take their time: who met a warm sandbox. No clock, no engine."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from kernelprovisioner.pool_events import (
    ClaimAsked,
    ClaimSettled,
    Event,
    Give,
    Released,
    Remove,
    Removed,
    Scheduled,
    Source,
    Start,
    Started,
    Tick,
)
from kernelprovisioner.pool_state import PoolState
from kernelprovisioner.sandbox import SandboxState

_REMOVAL_SECONDS = 0.3
_TICK_SECONDS = 2.0


@dataclass
class Outcome:
    """What came of a simulation: for each claim when it came and whether it met a warm one; the stock over time."""

    claims: list[tuple[float, bool]] = field(default_factory=list)
    warm: list[tuple[float, int]] = field(default_factory=list)
    wanted: list[tuple[float, int]] = field(default_factory=list)
    starts: int = 0

    def hit_rate(self, since: float = 0.0) -> float:
        """The share of the claims from `since` on that met a warm sandbox."""
        hits = [hit for at, hit in self.claims if at >= since]
        return sum(hits) / len(hits)

    def warm_at(self, at: float) -> int:
        """How many were warm at that time."""
        return next(count for time, count in reversed(self.warm) if time <= at)


def simulate(
    arrivals: Iterable[float],
    *,
    until: float,
    start_seconds: float = 3.0,
    held_seconds: float = 20.0,
    minimum: int = 2,
    maximum: int = 60,
    concurrency: int = 2,
    hit_rate: float = 0.95,
    schedule: Iterable[tuple[float, Scheduled]] = (),
    seed: int = 0,
) -> Outcome:
    """Let `arrivals` (times) claim one sandbox each and hold it for `held_seconds` on average.

    Starts take `start_seconds` on average, some of them twice as long; at most `concurrency` at once.
    """
    dice, ids, order = random.Random(seed), itertools.count(1), itertools.count()
    state = PoolState(
        minimum=minimum,
        maximum=maximum,
        line_bound=4 * maximum,
        concurrency=concurrency,
        new_id=lambda: f"s{next(ids)}",
        hit_rate=hit_rate,
    )
    outcome = Outcome()
    asked = dict(enumerate(sorted(arrivals), 1))
    coming: list[tuple[float, int, Event]] = []

    def later(at: float, event: Event) -> None:
        heapq.heappush(coming, (at, next(order), event))

    for number, at in asked.items():
        later(at, ClaimAsked(number, f"owner-{number}"))
    for at, scheduled in schedule:
        later(at, scheduled)
    later(0.0, Tick())
    while coming and coming[0][0] <= until:
        now, _, event = heapq.heappop(coming)
        if isinstance(event, Tick):
            later(now + _TICK_SECONDS, Tick())
            outcome.warm.append((now, state.counts()[SandboxState.WARM]))
            outcome.wanted.append((now, state.stock.want.count))
        for instruction in state.handle(event, now):
            match instruction:
                case Start(sandbox):
                    outcome.starts += 1
                    seconds = start_seconds * dice.choice([0.8, 0.8, 0.8, 0.8, 0.8, 2.0])
                    later(now + seconds, Started(sandbox, "template"))
                case Give(sandbox, claim, source):
                    outcome.claims.append((asked[claim], source is Source.WARM))
                    later(now, ClaimSettled(claim))
                    later(now + dice.expovariate(1 / held_seconds), Released(sandbox))
                case Remove(sandbox):
                    later(now + _REMOVAL_SECONDS, Removed(sandbox))
                case other:
                    raise AssertionError(f"not expected here: {other}")
    return outcome


def poisson(rate: float, begin: float, end: float, seed: int = 1) -> list[float]:
    """Arrivals that know nothing of each other, `rate` a second."""
    dice, times, at = random.Random(seed), [], begin
    while (at := at + dice.expovariate(rate)) < end:
        times.append(at)
    return times
