"""Member: one sandbox as a pool's state knows it."""

from __future__ import annotations

from dataclasses import dataclass

from kernelprovisioner.sandbox import TRANSITIONS, SandboxState
from kernelprovisioner.standing import Standing


class InvalidTransition(RuntimeError):
    """A sandbox was to take a step that its life cycle does not have: a bug of the pool."""


@dataclass(slots=True)
class Member:
    """One sandbox that has a place. `gone` means that it is being removed. Times are those of the pool's events."""

    id: str
    number: int = 0  # in the order of their starts
    state: SandboxState = SandboxState.STARTING
    template: str | None = None  # what its image was built from, known once it is warm
    owner: str | None = None
    claim: int | None = None  # the claim that it is for, until that is settled
    idle_since: float | None = None
    standing: Standing = Standing.KEPT
    started_at: float = 0.0
    warm_since: float = 0.0
    claimed_at: float = 0.0

    def become(self, state: SandboxState) -> None:
        """Take one step of the life cycle. Raises InvalidTransition."""
        if state not in TRANSITIONS[self.state]:
            raise InvalidTransition(f"sandbox {self.id} cannot go from {self.state} to {state}")
        self.state = state
