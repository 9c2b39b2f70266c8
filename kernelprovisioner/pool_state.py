"""PoolState: what a pool decides. Events go in, instructions come out; no clock, no socket, no task.

The style is that of distributed's worker state machine: SandboxPool (pool.py) does the I/O and tells what happened, so
that every race is only an order of events, and is tested as one.

A place is one of the pool's `max`. A sandbox takes one from its Start until its Removed: one that is being removed
still has memory and processes. The line holds the claims that have no sandbox yet; a claim leaves it by Give, or, if it
needs a sandbox of its own (a mounted directory), by the Start of that one.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import assert_never

from kernelprovisioner import sizing
from kernelprovisioner.pool_events import (
    ClaimAbandoned,
    ClaimAsked,
    ClaimFailed,
    ClaimSettled,
    Event,
    Evict,
    Exited,
    Give,
    Instruction,
    Refusal,
    Refuse,
    Released,
    Remove,
    Removed,
    Source,
    Start,
    Started,
    StartFailed,
    Stop,
    Tick,
    Touched,
    WakeAt,
)
from kernelprovisioner.sandbox import TRANSITIONS, SandboxState
from kernelprovisioner.sandbox_exit import ExitCause

#: so many failed starts in a row, with none under way, are told to those who wait instead of trying on for them
FAILURES_TOLD = 3


class InvalidTransition(RuntimeError):
    """A sandbox was to take a step that its life cycle does not have: a bug of the pool."""


@dataclass(slots=True)
class Member:
    """One sandbox that has a place. `gone` means that it is being removed."""

    id: str
    number: int = 0  # in the order of their starts
    state: SandboxState = SandboxState.STARTING
    template: str | None = None  # what its image was built from, known once it is warm
    owner: str | None = None
    claim: int | None = None  # the claim that it is for, until that is settled
    idle_since: float | None = None

    def become(self, state: SandboxState) -> None:
        """Take one step of the life cycle. Raises InvalidTransition."""
        if state not in TRANSITIONS[self.state]:
            raise InvalidTransition(f"sandbox {self.id} cannot go from {self.state} to {state}")
        self.state = state


@dataclass(frozen=True, slots=True, order=True)
class Waiter:
    """A claim without a settled sandbox; ordered by when it was asked."""

    claim: int
    owner: str
    own: bool


class PoolState:
    """All sandboxes of one kernel image and all that wait for one.

    `minimum` are kept warm, `maximum` bounds all places, `line_bound` the line, `concurrency` the starts under way.
    `new_id` makes sandbox ids.
    """

    def __init__(
        self, *, minimum: int, maximum: int, line_bound: int, concurrency: int, new_id: Callable[[], str]
    ) -> None:
        if not 0 <= minimum <= maximum or maximum < 1:
            raise ValueError(f"a pool needs 0 ≤ min ≤ max and max ≥ 1, not min={minimum} and max={maximum}")
        if line_bound < 1 or concurrency < 1:
            raise ValueError(f"line bound ({line_bound}) and concurrency ({concurrency}) must be at least 1")
        self.minimum = minimum
        self.maximum = maximum
        self.line_bound = line_bound
        self.concurrency = concurrency
        self.stopping = False
        self.want = sizing.wanted(minimum, 0, maximum)
        self.failures = 0  # failed starts in a row
        self.retry_at = 0.0
        self.members: dict[str, Member] = {}
        self._new_id = new_id
        self._numbers = itertools.count(1)
        self._newest = 0  # of those that were ever warm, the one started last
        self._template: str | None = None  # what it was built from
        self._line: dict[str, list[Waiter]] = {}  # by owner, in the order of asking
        self._given: dict[int, tuple[Waiter, str]] = {}  # out of the line, not settled: claim → its sandbox
        self._gave_up: Counter[str] = Counter()  # own sessions that an owner gave up for claims still in line

    @property
    def waiting(self) -> int:
        """How many claims are in line."""
        return sum(map(len, self._line.values()))

    def counts(self) -> dict[SandboxState, int]:
        """How many sandboxes are in each state; `gone` are those whose removal is not confirmed yet."""
        counts = Counter(member.state for member in self.members.values())
        return {state: counts[state] for state in SandboxState}

    def has_given(self, claim: int) -> bool:
        """Whether this claim's sandbox still is its own to settle."""
        given = self._given.get(claim)
        return given is not None and self._is(given[1], SandboxState.CLAIMED)

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Return what is to be done after `event`. What comes too late for a sandbox or claim changes nothing."""
        out: list[Instruction] = []
        asking: int | None = None
        match event:
            case ClaimAsked(claim, owner, own):
                asking = claim
                out += self._join(Waiter(claim, owner, own))
            case ClaimAbandoned(claim):
                out += self._abandon(claim)
            case ClaimFailed(claim):
                asking = claim
                out += self._return(claim)
            case ClaimSettled(claim):
                if self.has_given(claim):
                    self.members[self._given.pop(claim)[1]].claim = None
            case Started(sandbox, template):
                out += self._started(sandbox, template)
            case StartFailed(sandbox):
                out += self._start_failed(sandbox, now)
            case Touched(sandbox, idle_since):
                if self._is(sandbox, SandboxState.CLAIMED) and self.members[sandbox].claim is None:
                    self.members[sandbox].idle_since = idle_since
            case Exited(sandbox):
                out += self._remove(sandbox, None)
            case Released(sandbox):
                out += self._remove(sandbox, ExitCause.REQUESTED)
            case Removed(sandbox):
                self._forget(sandbox)
            case Tick():
                pass
            case Stop():
                out += self._stop()
            case _:
                assert_never(event)
        if not self.stopping:
            out += self._serve(asking, now)
        return out

    # What each event changes by itself.

    def _join(self, waiter: Waiter) -> list[Instruction]:
        if self.stopping:
            return [Refuse(waiter.claim, Refusal.STOPPED)]
        out: list[Instruction] = []
        if self.waiting >= self.line_bound:
            # A flood of one owner does not keep the others out of the line: its own last one makes room.
            longest = max(self._line.values(), key=len)
            if len(longest) <= len(self._line.get(waiter.owner, ())) + 1:
                return [Refuse(waiter.claim, Refusal.FULL)]
            out.append(Refuse(longest[-1].claim, Refusal.FULL))
            self._leave_line(longest[-1], served=False)
        insort(self._line.setdefault(waiter.owner, []), waiter)
        return out

    def _abandon(self, claim: int) -> list[Instruction]:
        if claim in self._given:
            return self._remove(self._given.pop(claim)[1], ExitCause.REQUESTED)
        for waiter in [w for line in self._line.values() for w in line if w.claim == claim]:
            self._leave_line(waiter, served=False)
        return []

    def _return(self, claim: int) -> list[Instruction]:
        if claim not in self._given:
            return []
        waiter, sandbox = self._given.pop(claim)
        out = self._remove(sandbox, ExitCause.PROTOCOL)
        if self.stopping:
            return [*out, Refuse(claim, Refusal.STOPPED)]
        # By its number it comes before all of its owner that asked later; the bound counts newcomers only.
        insort(self._line.setdefault(waiter.owner, []), waiter)
        return out

    def _started(self, sandbox: str, template: str | None) -> list[Instruction]:
        if not self._is(sandbox, SandboxState.STARTING):
            return []  # given up meanwhile: its removal is under way
        member = self.members[sandbox]
        member.become(SandboxState.WARM)
        member.template = template
        self.failures, self.retry_at = 0, 0.0
        out: list[Instruction] = []
        if member.claim is not None:
            member.become(SandboxState.CLAIMED)
            out.append(Give(sandbox, member.claim, Source.COLD))
        if member.number > self._newest:
            self._newest, self._template = member.number, template
        # The image was rebuilt meanwhile. Judged by who was started last: an older one may be the last to be warm.
        for other in list(self.members.values()):
            if other.state is SandboxState.WARM and other.template != self._template:
                out += self._remove(other.id, ExitCause.REQUESTED)
        return out

    def _start_failed(self, sandbox: str, now: float) -> list[Instruction]:
        if not self._is(sandbox, SandboxState.STARTING):
            return []
        member = self.members[sandbox]
        member.become(SandboxState.GONE)
        self._forget(sandbox)
        if member.claim is not None:
            # Its directory may be the reason: nobody else is made to wait for that.
            self._given.pop(member.claim, None)
            return [Refuse(member.claim, Refusal.START_FAILED)]
        self.failures += 1
        self.retry_at = now + sizing.backoff(self.failures)
        out: list[Instruction] = [WakeAt(self.retry_at)]
        under_way = any(m.state is SandboxState.STARTING and m.claim is None for m in self.members.values())
        if self.failures >= FAILURES_TOLD and not under_way:
            for waiter in sorted(w for line in self._line.values() for w in line if not w.own):
                self._leave_line(waiter, served=False)
                out.append(Refuse(waiter.claim, Refusal.START_FAILED))
        return out

    def _stop(self) -> list[Instruction]:
        self.stopping = True
        out: list[Instruction] = []
        for waiter in sorted(w for line in self._line.values() for w in line):
            self._leave_line(waiter, served=False)
            out.append(Refuse(waiter.claim, Refusal.STOPPED))
        for claim, (_, sandbox) in list(self._given.items()):
            if self._is(sandbox, SandboxState.STARTING):  # the others learn it when their sandbox goes
                del self._given[claim]
                out.append(Refuse(claim, Refusal.STOPPED))
        for sandbox in list(self.members):
            out += self._remove(sandbox, ExitCause.GATEWAY)
        return out

    # Who gets what.

    def _serve(self, asking: int | None, now: float) -> list[Instruction]:
        """Give, start and evict for the line in its fair order; what is left over goes to the refill."""
        out: list[Instruction] = []
        held = self._held()
        states = self.counts()
        warm = deque(m for m in self.members.values() if m.state is SandboxState.WARM)
        # What is on its way: each covers one claim of the line, in order, and counts as held by its owner.
        starting = sum(m.state is SandboxState.STARTING and m.claim is None for m in self.members.values())
        leaving = states[SandboxState.GONE]
        free = self.maximum - len(self.members)
        slots = self.concurrency - states[SandboxState.STARTING]
        backing_off = now < self.retry_at
        shared, planned, reserved = starting, 0, 0
        staying: set[str] = set()  # owners with a claim that stays in line: none behind it may leave
        without: set[str] = set()  # owners with a claim that nothing covers: so it is for all behind it

        for waiter in list(self._fair_order(held)):
            owner = waiter.owner
            if owner in without:
                continue
            if owner not in staying and warm and not waiter.own:
                source = Source.WARM if waiter.claim == asking else Source.STARTED
                out.append(self._give(warm.popleft(), waiter, source))
            elif owner not in staying and waiter.own and free and slots > planned:
                out.append(self._start(waiter))
                free, slots = free - 1, slots - 1
            else:
                staying.add(owner)
                if warm and not waiter.own:
                    continue  # there is one for it as soon as those before it have left
                if starting and not waiter.own:
                    starting -= 1
                elif free:
                    free -= 1
                    planned += not waiter.own and not backing_off
                    reserved += waiter.own
                elif leaving:
                    leaving -= 1
                elif warm:
                    out += self._remove(warm.popleft().id, ExitCause.EVICTED)
                elif (victim := self._victim(owner, held)) is not None:
                    out.append(self._evict(victim, owner))
                    held[str(victim.owner)] -= 1
                else:
                    without.add(owner)
                    continue
            held[owner] += 1

        in_line = sum(not w.own for line in self._line.values() for w in line)
        unclaimed = len(warm) + shared
        room = self.maximum - len(self.members) + unclaimed - reserved
        self.want = sizing.wanted(self.minimum, in_line, room)
        if not backing_off:
            starts = sizing.starts_now(self.want.count, in_line, unclaimed, self.concurrency - slots, self.concurrency)
            out += [self._start(None) for _ in range(starts)]
        return out

    def _fair_order(self, held: Counter[str]) -> Iterator[Waiter]:
        """Yield the line: next is always the owner that holds fewest, counting what it got here; then who asked first.

        Between equals, an owner that gave up a session of its own goes first: else another's flood would get the place.
        """
        heap = [(held[owner], not self._gave_up[owner], line[0], 0) for owner, line in self._line.items()]
        heapq.heapify(heap)
        while heap:
            count, _, waiter, index = heapq.heappop(heap)
            yield waiter
            line, index = self._line[waiter.owner], index + 1
            if index < len(line):
                heapq.heappush(heap, (count + 1, index >= self._gave_up[waiter.owner], line[index], index))

    def _victim(self, owner: str, held: Counter[str]) -> Member | None:
        """Return the idle session used longest ago among those that a claim of `owner` may cost, if any."""
        idle = [
            (member.idle_since, member.id, member)
            for member in self.members.values()
            if member.state is SandboxState.CLAIMED and member.idle_since is not None
            if member.owner == owner or held[str(member.owner)] > held[owner] + 1
        ]
        return min(idle)[2] if idle else None

    def _held(self) -> Counter[str]:
        """How many sandboxes each owner has, or has being started for it alone."""
        return Counter(m.owner for m in self.members.values() if m.owner and m.state is not SandboxState.GONE)

    def _give(self, member: Member, waiter: Waiter, source: Source) -> Give:
        member.become(SandboxState.CLAIMED)
        member.owner, member.claim = waiter.owner, waiter.claim
        self._leave_line(waiter, served=True)
        self._given[waiter.claim] = (waiter, member.id)
        return Give(member.id, waiter.claim, source)

    def _start(self, waiter: Waiter | None) -> Start:
        member = Member(self._new_id(), next(self._numbers))
        self.members[member.id] = member
        if waiter is not None:
            member.owner, member.claim = waiter.owner, waiter.claim
            self._leave_line(waiter, served=True)
            self._given[waiter.claim] = (waiter, member.id)
        return Start(member.id, member.claim)

    def _evict(self, victim: Member, owner: str) -> Evict:
        if victim.owner == owner:
            self._gave_up[owner] += 1
        victim.become(SandboxState.GONE)
        return Evict(victim.id, owner)

    def _remove(self, sandbox: str, cause: ExitCause | None) -> list[Instruction]:
        member = self.members.get(sandbox)
        if member is None or member.state is SandboxState.GONE:
            return []
        member.become(SandboxState.GONE)
        return [Remove(sandbox, cause)]

    def _forget(self, sandbox: str) -> None:
        if self._is(sandbox, SandboxState.GONE):
            del self.members[sandbox]

    def _leave_line(self, waiter: Waiter, *, served: bool) -> None:
        line = self._line[waiter.owner]
        line.remove(waiter)
        self._gave_up[waiter.owner] = max(0, min(self._gave_up[waiter.owner] - served, len(line)))
        if not line:
            del self._line[waiter.owner], self._gave_up[waiter.owner]

    def _is(self, sandbox: str, state: SandboxState) -> bool:
        member = self.members.get(sandbox)
        return member is not None and member.state is state
