"""IdleSessions: who does not use a session for long gives its sandbox up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gateway.session import Session
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from kernelprovisioner.standing import Standing

#: A sandbox goes at most so many seconds late.
_LONGEST_INTERVAL = 15.0


@dataclass(frozen=True)
class IdleBounds:
    """Seconds without a request after which a session gives its sandbox up; `one_off`: where nobody came back to it."""

    session: float = 3600.0
    one_off: float = 300.0

    def of(self, session: Session) -> float:
        """The seconds that this session has."""
        return self.one_off if session.standing is Standing.PASSING else self.session


class IdleSessions:
    """Looks at all sessions that hold a sandbox, a few times in each bound; `give_up` ends what is overdue."""

    def __init__(
        self, bounds: IdleBounds, held: Callable[[], Iterable[Session]], give_up: Callable[[Session, SandboxExit], None]
    ) -> None:
        self._bounds = bounds
        self._held = held
        self._give_up = give_up
        self._interval = min(_LONGEST_INTERVAL, bounds.session / 4, bounds.one_off / 4)
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Look from now on."""
        self._timer = asyncio.get_running_loop().call_later(self._interval, self._look)

    def stop(self) -> None:
        """Look no more. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self.start()
        for session in overdue(self._held(), self._bounds, asyncio.get_running_loop().time()):
            cause = SandboxExit(ExitCause.IDLE, evidence={"limit_seconds": self._bounds.of(session)})
            self._give_up(session, cause)


def overdue(sessions: Iterable[Session], bounds: IdleBounds, now: float) -> list[Session]:
    """Return the sessions that have been idle for longer than they may, by the clock of their `idle_since`."""
    return [
        session
        for session in sessions
        if session.idle_since is not None and session.state == "idle" and now - session.idle_since >= bounds.of(session)
    ]
