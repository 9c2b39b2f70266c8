"""How many sandboxes a pool starts, how long it waits after a failure: pure functions, no I/O, no clock."""

from __future__ import annotations

import math
from dataclasses import dataclass

FIRST_BACKOFF = 0.5
LONGEST_BACKOFF = 30.0


@dataclass(frozen=True, slots=True)
class Want:
    """How many unclaimed sandboxes (starting or warm) a pool wants right now, and why, for a person."""

    count: int
    why: str


def wanted(kept: Want, waiting: int, room: int, *, replaced: bool = False) -> Want:
    """Return how many unclaimed sandboxes to have: one for each of `waiting` claims and those `kept` beside them.

    One more if one is `replaced`. `room` is how many unclaimed ones fit under the pool's `max`.
    """
    count = waiting + kept.count + replaced
    why = kept.why if not waiting else f"{waiting} waiting and {kept.why}"
    if replaced:
        why += ", and 1 to take the place of an old one"
    if count <= room:
        return Want(count, why)
    return Want(max(room, 0), f"{why}, but max leaves room for {max(room, 0)}")


def starts_now(want: int, waiting: int, unclaimed: int, starting: int, concurrency: int, *, empty: bool = False) -> int:
    """Return how many to start now, where `starting` are under way and `concurrency` may be.

    What claims wait for takes all of it. Where nobody waits half of it does (at least one): cores that start spare
    sandboxes are missing to those at work. With none warm or claimed (`empty`) nobody is.
    """
    for_line = max(0, min(min(want, waiting) - unclaimed, concurrency - starting))
    missing = want - unclaimed - for_line
    at_once = concurrency if empty and not waiting else refill_concurrency(concurrency)
    spare = max(0, min(missing, at_once - starting - for_line))
    return for_line + spare


def refill_concurrency(concurrency: int) -> int:
    """Return how many spare sandboxes may be starting at once."""
    return max(1, concurrency // 2)


def backoff(failures: int) -> float:
    """Return the seconds to wait after this many failures in a row: doubled each time, 0.5 s to 30 s."""
    if failures <= 0:
        return 0.0
    # The exponent is bounded so that a long outage cannot overflow the float.
    return min(LONGEST_BACKOFF, FIRST_BACKOFF * 2.0 ** min(failures - 1, 16))


def retry_after(waiting: int, start_seconds: float, concurrency: int) -> int:
    """Return the whole seconds, 1 to 60, in which a line of `waiting` claims will have moved on by about half."""
    return max(1, min(60, math.ceil(waiting * start_seconds / max(1, concurrency) / 2)))
