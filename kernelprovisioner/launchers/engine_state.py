"""EngineState: what a launcher knows of its engine from what it does with it anyway. Pure: the clock comes in."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

#: A call that takes longer means a slow engine: a container usually starts within one.
SLOW_SECONDS = 5.0


@dataclass
class EngineState:
    """Whether the engine is there, and which calls it has not answered yet. All times are monotonic seconds."""

    #: when its events broke off, None while they come
    away_since: float | None = None
    #: why
    reason: str = ""
    #: whether the last call took long
    slow: bool = False
    #: when each call began that is under way, by the thread that waits for it
    _under_way: dict[int, float] = field(default_factory=dict)

    @property
    def available(self) -> bool:
        """Whether the engine's events come."""
        return self.away_since is None

    def lost(self, now: float, reason: str) -> bool:
        """The events broke off, or could not be had again; return whether that is news."""
        news = self.away_since is None
        if news:
            self.away_since = now
        self.reason = reason
        return news

    def connected(self, now: float) -> float | None:
        """The events come; return for how many seconds they did not, None if that is no news."""
        since, self.away_since, self.reason = self.away_since, None, ""
        return None if since is None else now - since

    def began(self, now: float) -> None:
        """A call begins in this thread."""
        self._under_way[threading.get_ident()] = now

    def ended(self, now: float) -> float | None:
        """This thread's call has been answered, or has failed; return its seconds where it is the first slow one."""
        took = now - self._under_way.pop(threading.get_ident())
        was_slow, self.slow = self.slow, took > SLOW_SECONDS
        return took if self.slow and not was_slow else None

    def waiting(self, now: float) -> float:
        """For how many seconds the oldest call that is under way has waited, 0 where none is. For any thread."""
        return now - min(list(self._under_way.values()), default=now)
