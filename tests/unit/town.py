"""PoolState on a virtual clock: people at work, calls in passing, and an engine that takes its time."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from kernelprovisioner.pool_events import (
    ClaimAbandoned,
    ClaimAsked,
    ClaimSettled,
    Event,
    Evict,
    Give,
    Refuse,
    Released,
    Remove,
    Removed,
    Start,
    Started,
    Tick,
    Touched,
    WakeAt,
)
from kernelprovisioner.pool_state import PoolState
from kernelprovisioner.standing import Standing

_REMOVAL_SECONDS = 0.3
_CLAIM_SECONDS = 0.002
_CELL_SECONDS = 0.3


@dataclass
class User:
    """Somebody who runs cells in one session."""

    owner: str
    named: bool = False
    sandbox: str | None = None
    cells: int = 0
    waits: list[float] = field(default_factory=list)
    #: the times at which an idle sandbox was taken away
    lost: list[float] = field(default_factory=list)
    refused: int = 0

    @property
    def standing(self) -> Standing:
        """What the gateway says of such a session."""
        if self.cells > 1:
            return Standing.KEPT
        return Standing.NAMED if self.named else Standing.PASSING


class Simulation:
    """One pool. All times are virtual seconds, shaken by ±30 %."""

    def __init__(
        self,
        *,
        maximum: int,
        concurrency: int,
        seed: int = 1,
        line_bound: int | None = None,
        start_seconds: float = 2.0,
        deadline: float = 120.0,
        standing: bool = True,
    ) -> None:
        """`standing`: whether the pool is told what the calls are; else all are as good as people at work."""
        self.now = 0.0
        self.most = 0
        self.deadline = deadline
        self._start_seconds = start_seconds
        self._standing = standing
        self._wake_at: float | None = None
        self._random = random.Random(seed)
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count(1)
        self._asking: dict[int, tuple[User, float, Callable[[], None]]] = {}
        self._holders: dict[str, User] = {}
        self.state = PoolState(
            minimum=min(2, maximum),
            maximum=maximum,
            line_bound=4 * maximum if line_bound is None else line_bound,
            concurrency=concurrency,
            new_id=lambda: f"s{next(self._numbers)}",
        )
        self.tell(Tick())

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Do something at a time."""
        heapq.heappush(self._agenda, (when, next(self._numbers), what))

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        """Do something after about so many seconds."""
        self.at(self.now + seconds * self._random.uniform(0.7, 1.3), what)

    def run(self, until: float) -> None:
        """Let time pass."""
        while self._agenda and self._agenda[0][0] <= until:
            self.now, _, what = heapq.heappop(self._agenda)
            what()
        self.now = until

    def tell(self, event: Event) -> None:
        """What SandboxPool does, without sandboxes."""
        for instruction in self.state.handle(event, self.now):
            match instruction:
                case Start(sandbox):
                    self._tell_after(self._start_seconds, Started(sandbox))
                case Give(sandbox, claim):
                    self._given(sandbox, claim)
                case Refuse(claim):
                    user, _, then = self._asking.pop(claim)
                    user.refused += 1
                    then()
                case Evict(sandbox):
                    user = self._holders.pop(sandbox)
                    user.sandbox = None
                    user.lost.append(self.now)
                    self._tell_after(_REMOVAL_SECONDS, Removed(sandbox))
                case Remove(sandbox):
                    self._tell_after(_REMOVAL_SECONDS, Removed(sandbox))
                case WakeAt(at):
                    self._wake_at = at
                    self.at(at, self._wake)
        self.most = max(self.most, len(self.state.members))

    def cell(self, user: User, then: Callable[[], None] = lambda: None) -> None:
        """A user runs a cell, in its sandbox or in one that it claims now; then, also if it gets none, does `then`."""
        if user.sandbox is not None:
            user.waits.append(0.0)
            self._run(user, user.sandbox, then)
            return
        claim = next(self._numbers)
        self._asking[claim] = (user, self.now, then)
        self.at(self.now + self.deadline, lambda: self._abandon(claim))
        self.tell(ClaimAsked(claim, user.owner, standing=self._shown(user)))

    def leave(self, user: User) -> None:
        """A user's session ends."""
        if user.sandbox is not None:
            sandbox, user.sandbox = user.sandbox, None
            del self._holders[sandbox]
            self.tell(Released(sandbox))

    def _given(self, sandbox: str, claim: int) -> None:
        user, asked, then = self._asking.pop(claim)
        user.waits.append(self.now - asked)
        user.sandbox = sandbox
        self._holders[sandbox] = user

        def settled() -> None:
            self.tell(ClaimSettled(claim))
            self._run(user, sandbox, then)

        self.after(_CLAIM_SECONDS, settled)

    def _run(self, user: User, sandbox: str, then: Callable[[], None]) -> None:
        user.cells += 1
        self.tell(Touched(sandbox, None, self._shown(user)))

        def ended() -> None:
            if user.sandbox == sandbox:
                self.tell(Touched(sandbox, self.now, self._shown(user)))
            then()

        self.after(_CELL_SECONDS, ended)

    def _shown(self, user: User) -> Standing:
        return user.standing if self._standing else Standing.KEPT

    def _wake(self) -> None:
        if self._wake_at == self.now:  # else a later one has replaced it
            self._wake_at = None
            self.tell(Tick())

    def _abandon(self, claim: int) -> None:
        asked = self._asking.pop(claim, None)
        if asked is not None:
            self.tell(ClaimAbandoned(claim))
            asked[2]()

    def _tell_after(self, seconds: float, event: Event) -> None:
        self.after(seconds, lambda: self.tell(event))


@dataclass
class Town:
    """Who lives in a simulation: `people` at work in a session each, and the `calls` that name nobody."""

    simulation: Simulation
    people: list[User] = field(default_factory=list)
    calls: list[User] = field(default_factory=list)

    def person(self, owner: str, *, named: bool, arrives: float, until: float, thinks: float = 12.0) -> None:
        """Somebody runs a cell, thinks for about `thinks` seconds, runs the next one, until they go home."""
        user = User(owner, named)
        self.people.append(user)
        simulation = self.simulation

        def work() -> None:
            if simulation.now < until:
                simulation.cell(user, lambda: simulation.after(thinks, work))
            else:
                simulation.leave(user)

        simulation.at(arrives, work)

    def flood(self, owner: str, *, count: int, every: float, until: float) -> None:
        """`count` calls at once that name nobody, again and again."""
        simulation = self.simulation

        def burst() -> None:
            for _ in range(count):
                user = User(owner)
                self.calls.append(user)
                simulation.cell(user)
            if simulation.now + every < until:
                simulation.at(simulation.now + every, burst)

        simulation.at(simulation.now + every, burst)

    @property
    def unanswered(self) -> list[User]:
        """The calls that got no sandbox."""
        return [call for call in self.calls if not call.waits]
