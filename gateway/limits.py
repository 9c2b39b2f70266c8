"""What one owner may have at once: reserved before the work starts, so that parallel requests cannot exceed it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gateway.errors import too_many

#: When to come back, in seconds: cells end soon, sessions do not.
_EXECUTION_RETRY = 1.0
_SESSION_RETRY = 10.0


@dataclass(frozen=True)
class OwnerBounds:
    """What each owner may have at once: `sessions` (and kernels) with a sandbox, `executions` not answered yet.

    None: as many as there is room for.
    """

    sessions: int | None = None
    executions: int | None = None


class Reservations:
    """Who has what under way."""

    def __init__(self, bounds: OwnerBounds) -> None:
        self.bounds = bounds
        self._executions: Counter[str] = Counter()
        self._claims: Counter[str] = Counter()

    @contextmanager
    def execution(self, owner: str) -> Iterator[None]:
        """Count one execution of `owner` until the end of the block. Raises RequestError (429): one too many."""
        most = self.bounds.executions
        if most is not None and self._executions[owner] >= most:
            raise too_many(
                f"The owner of this API key has as many executions under way as it may have: {most} "
                "(OwnerLimits.max_executions).",
                "max_executions",
                _EXECUTION_RETRY,
            )
        with counted(self._executions, owner):
            yield

    def room(self, owner: str, held: int) -> int | None:
        """Return how many more sandboxes `owner` may claim, who holds `held`; None: any number."""
        most = self.bounds.sessions
        return None if most is None else most - held - self._claims[owner]

    @contextmanager
    def claim(self, owner: str, held: int) -> Iterator[None]:
        """Count one claim of `owner`, who holds `held` sandboxes, until the end of the block.

        Raises RequestError (429) if it is one too many.
        """
        room = self.room(owner, held)
        if room is not None and room <= 0:
            raise too_many(
                f"The owner of this API key has as many sessions and kernels that hold a sandbox as it may have: "
                f"{self.bounds.sessions} (OwnerLimits.max_sessions). End one (DELETE /api/v1/sessions/ID or "
                "/api/kernels/ID), or come back later.",
                "max_sessions",
                _SESSION_RETRY,
            )
        with counted(self._claims, owner):
            yield


@contextmanager
def counted(counter: Counter[str], owner: str) -> Iterator[None]:
    """Count one more of `owner` until the end of the block."""
    counter[owner] += 1
    try:
        yield
    finally:
        counter[owner] -= 1
        if not counter[owner]:
            del counter[owner]
