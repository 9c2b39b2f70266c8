"""PoolState: what a pool decides. Events go in, instructions come out; no clock, no socket, no task.

The style is that of distributed's worker state machine: SandboxPool (pool.py) does the I/O and tells what happened, so
that every race is only an order of events, and is tested as one.

A place is one of the pool's `max`. A sandbox takes one from its Start until its Removed: one that is being removed
still has memory and processes. The line holds the claims that have no sandbox yet; a claim leaves it by Give, or, if it
needs a sandbox of its own (a mounted directory), by the Start of that one.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from typing import assert_never

from kernelprovisioner import sizing
from kernelprovisioner.member import Member
from kernelprovisioner.pool_events import (
    Adopted,
    ClaimAbandoned,
    ClaimAsked,
    ClaimFailed,
    ClaimSettled,
    EngineBack,
    Event,
    Evict,
    Exited,
    Give,
    Instruction,
    ProbeFailed,
    Refusal,
    Refuse,
    Released,
    Remove,
    Removed,
    Scheduled,
    Source,
    Start,
    Started,
    StartFailed,
    Stop,
    TemplateIs,
    Tick,
    Touched,
    WakeAt,
)
from kernelprovisioner.sandbox import SandboxState
from kernelprovisioner.sandbox_exit import ExitCause
from kernelprovisioner.standing import Standing, standing_now
from kernelprovisioner.stock import Stock
from kernelprovisioner.waiting_line import Waiter, WaitingLine

#: so many failed starts in a row, with none under way, are told to those who wait instead of trying on for them
FAILURES_TOLD = 3


class PoolState:
    """All sandboxes of one kernel image and all that wait for one.

    `minimum` are kept warm, `maximum` bounds all places, `line_bound` the line, `concurrency` the starts under way.
    `new_id` makes sandbox ids. `hit_rate` and `max_age` (seconds): see Stock.
    """

    def __init__(
        self,
        *,
        minimum: int,
        maximum: int,
        line_bound: int,
        concurrency: int,
        new_id: Callable[[], str],
        hit_rate: float = 0.0,
        max_age: float = math.inf,
    ) -> None:
        if not 0 <= minimum <= maximum or maximum < 1:
            raise ValueError(f"a pool needs 0 ≤ min ≤ max and max ≥ 1, not min={minimum} and max={maximum}")
        if line_bound < 1 or concurrency < 1:
            raise ValueError(f"line bound ({line_bound}) and concurrency ({concurrency}) must be at least 1")
        self.minimum = minimum
        self.maximum = maximum
        self.concurrency = concurrency
        self.stopping = False
        self.stock = Stock(
            minimum=minimum,
            maximum=maximum,
            concurrency=sizing.refill_concurrency(concurrency),
            hit_rate=hit_rate,
            max_age=max_age,
        )
        self.failures = 0  # failed starts in a row
        self.retry_at = 0.0
        self.members: dict[str, Member] = {}
        self._new_id = new_id
        self._now = 0.0  # of the last event
        self._number = 0  # of the last start
        self._newest = -1  # the start that tells the template: of those that were ever warm the last
        self._template: str | None = None  # what it was built from
        self.line = WaitingLine(line_bound)
        self._given: dict[int, tuple[Waiter, str]] = {}  # out of the line, not settled: claim → its sandbox

    @property
    def waiting(self) -> int:
        """How many claims are in line."""
        return len(self.line)

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
        self._now = now
        out: list[Instruction] = []
        asking: int | None = None
        match event:
            case ClaimAsked(claim, owner, own, standing):
                asking = claim
                if not own:
                    self.stock.claim_came(now)
                out += self._join(Waiter(claim, owner, own, standing))
                if Refuse(claim, Refusal.FULL) in out:
                    return out  # it takes no longer for a longer line: who is too many is told at once
            case ClaimAbandoned(claim):
                if claim not in self._given and self.line.find(claim) is None:
                    return out  # settled or refused before
                out += self._abandon(claim)
            case ClaimFailed(claim):
                asking = claim
                out += self._return(claim)
            case ClaimSettled(claim):
                if self.has_given(claim):
                    self.members[self._given.pop(claim)[1]].claim = None
            case Started(sandbox, template):
                out += self._started(sandbox, template)
            case Adopted():
                out += self._adopt(event)
            case StartFailed(sandbox):
                out += self._start_failed(sandbox, now)
            case Touched(sandbox, idle_since, standing):
                if self._is(sandbox, SandboxState.CLAIMED) and self.members[sandbox].claim is None:
                    self.members[sandbox].idle_since = idle_since
                    self.members[sandbox].standing = standing
            case Exited(sandbox):
                out += self._remove(sandbox, None)
            case ProbeFailed(sandbox):
                if self._is(sandbox, SandboxState.WARM):
                    out += self._remove(sandbox, ExitCause.PROTOCOL)
            case Released(sandbox):
                out += self._remove(sandbox, ExitCause.REQUESTED)
            case Removed(sandbox):
                self._forget(sandbox)
            case TemplateIs(template):
                out += self._template_is(template)
            case Scheduled():
                self.stock.scheduled = event
            case EngineBack():
                self.failures, self.retry_at = 0, 0.0
            case Tick():
                pass
            case Stop(keep):
                out += self._stop(keep)
            case _:
                assert_never(event)
        # Those that are adopted come one after the other, and the last may be what is missing.
        if not self.stopping and (self.line or not isinstance(event, Adopted)):
            out += self._serve(asking, now)
            if isinstance(event, Tick):
                going = self.stock.one_too_many(self.members.values(), now)
                out += [] if going is None else self._remove(going.id, ExitCause.REQUESTED)
        return out

    # What each event changes by itself.

    def _join(self, waiter: Waiter) -> list[Instruction]:
        if self.stopping:
            return [Refuse(waiter.claim, Refusal.STOPPED)]
        sent_away = self.line.join(waiter)
        return [] if sent_away is None else [Refuse(sent_away.claim, Refusal.FULL)]

    def _abandon(self, claim: int) -> list[Instruction]:
        if claim in self._given:
            return self._remove(self._given.pop(claim)[1], ExitCause.REQUESTED)
        if (waiter := self.line.find(claim)) is not None:
            self.line.leave(waiter, served=False)
        return []

    def _return(self, claim: int) -> list[Instruction]:
        if claim not in self._given:
            return []
        waiter, sandbox = self._given.pop(claim)
        out = self._remove(sandbox, ExitCause.PROTOCOL)
        if self.stopping:
            return [*out, Refuse(claim, Refusal.STOPPED)]
        self.line.come_back(waiter)
        return out

    def _started(self, sandbox: str, template: str | None) -> list[Instruction]:
        if not self._is(sandbox, SandboxState.STARTING):
            return []  # given up meanwhile: its removal is under way
        member = self.members[sandbox]
        member.become(SandboxState.WARM)
        member.template, member.warm_since = template, self._now
        self.stock.started(self._now - member.started_at)
        self.failures, self.retry_at = 0, 0.0
        out: list[Instruction] = []
        if member.claim is not None:
            member.become(SandboxState.CLAIMED)
            member.claimed_at = self._now
            out.append(Give(sandbox, member.claim, Source.COLD))
        if member.number > self._newest:
            self._newest, self._template = member.number, template
        # The image was rebuilt meanwhile. Judged by who was started last: an older one may be the last to be warm.
        return out + self._remove_outdated()

    def _adopt(self, event: Adopted) -> list[Instruction]:
        """Whoever holds a sandbox keeps it, also beyond `max`; a warm one is kept where it fits."""
        if event.sandbox in self.members:
            return []
        full = len(self.members) >= self.maximum
        self._number += 1
        member = self.members[event.sandbox] = Member(event.sandbox, self._number, template=event.template)
        member.become(SandboxState.WARM)
        member.warm_since = self._now - event.age
        if event.owner is not None:
            member.become(SandboxState.CLAIMED)
            member.owner, member.claimed_at = event.owner, self._now - event.age
        if self.stopping:
            return self._remove(member.id, ExitCause.GATEWAY)
        if event.owner is None and full:
            return self._remove(member.id, ExitCause.REQUESTED)
        return self._remove_outdated() if self._newest >= 0 else []

    def _template_is(self, template: str) -> list[Instruction]:
        if self._newest >= 0 and template == self._template:
            return []
        # What is on its way was begun before: it is outdated, too, unless it says otherwise.
        self._newest, self._template = self._number, template
        return self._remove_outdated()

    def _remove_outdated(self) -> list[Instruction]:
        out: list[Instruction] = []
        for member in list(self.members.values()):
            if member.state is SandboxState.WARM and member.template != self._template:
                out += self._remove(member.id, ExitCause.REQUESTED)
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
            for waiter in [waiter for waiter in self.line if not waiter.own]:
                self.line.leave(waiter, served=False)
                out.append(Refuse(waiter.claim, Refusal.START_FAILED))
        return out

    def _stop(self, keep: bool) -> list[Instruction]:
        self.stopping = True
        out: list[Instruction] = []
        for waiter in list(self.line):
            self.line.leave(waiter, served=False)
            out.append(Refuse(waiter.claim, Refusal.STOPPED))
        for claim, (_, sandbox) in list(self._given.items()):
            if self._is(sandbox, SandboxState.STARTING):  # the others learn it when their sandbox goes
                del self._given[claim]
                out.append(Refuse(claim, Refusal.STOPPED))
        for member in list(self.members.values()):
            stays = member.state is SandboxState.WARM or (member.state is SandboxState.CLAIMED and member.claim is None)
            if not (keep and stays):
                out += self._remove(member.id, ExitCause.GATEWAY)
        return out

    # Who gets what.

    def _serve(self, asking: int | None, now: float) -> list[Instruction]:
        """Give, start and evict for the line in its fair order; what is left over goes to the refill."""
        out: list[Instruction] = []
        held = self._held()
        # By owner and standing: who has a sandbox, and in the end who is to get one.
        placed = Counter((str(m.owner), m.standing) for m in self.members.values() if m.state is SandboxState.CLAIMED)
        states = self.counts()
        warm = deque(m for m in self.members.values() if m.state is SandboxState.WARM)
        # What is on its way: each covers one claim of the line, in order, and counts as held by its owner.
        starting = sum(m.state is SandboxState.STARTING and m.claim is None for m in self.members.values())
        # Those that were adopted beyond `max` leave no place behind.
        leaving = states[SandboxState.GONE] - max(0, len(self.members) - self.maximum)
        leaving, free = max(0, leaving), max(0, self.maximum - len(self.members))
        slots = self.concurrency - states[SandboxState.STARTING]
        backing_off = now < self.retry_at
        shared, planned, reserved = starting, 0, 0
        staying: set[str] = set()  # owners with a claim that stays in line: none behind it may leave
        without: set[str] = set()  # owners with a claim that nothing covers: so it is for all behind it

        for waiter in list(self.line.fair_order(held)):
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
                elif (victim := self._victim(owner, held, placed, now)) is not None:
                    out.append(self._evict(victim, owner))
                    held[str(victim.owner)] -= 1
                    placed[str(victim.owner), victim.standing] -= 1
                else:
                    without.add(owner)
                    continue
            held[owner] += 1
            placed[owner, waiter.standing] += 1

        in_line = sum(not waiter.own for waiter in self.line)
        unclaimed = len(warm) + shared
        room = self.maximum - len(self.members) + unclaimed - reserved
        want = self.stock.look(self.members.values(), in_line, room, now)
        if not backing_off:
            empty = not (states[SandboxState.WARM] or states[SandboxState.CLAIMED])
            starting = self.concurrency - slots
            starts = sizing.starts_now(want.count, in_line, unclaimed, starting, self.concurrency, empty=empty)
            out += [self._start(None) for _ in range(starts)]
        return out

    def _victim(
        self, owner: str, held: Counter[str], placed: Counter[tuple[str, Standing]], now: float
    ) -> Member | None:
        """Return the idle session that a claim of `owner` costs, if any: the lowest in standing, used longest ago.

        It is one of an owner that holds more, or of its own. Of its own nobody at work loses a sandbox while there is a
        lower one, idle, busy or on its way: that one is waited for.
        """
        lowest = min((standing for standing in Standing if placed[owner, standing] > 0), default=Standing.PASSING)
        idle = []
        for member in self.members.values():
            if member.state is not SandboxState.CLAIMED or member.idle_since is None:
                continue
            standing = standing_now(member.standing, now - member.idle_since)
            if standing <= lowest if member.owner == owner else held[str(member.owner)] > held[owner] + 1:
                idle.append((standing, member.standing, member.idle_since, member.id, member))
        return min(idle)[-1] if idle else None

    def _held(self) -> Counter[str]:
        """How many sandboxes each owner has, or has being started for it alone."""
        return Counter(m.owner for m in self.members.values() if m.owner and m.state is not SandboxState.GONE)

    def _give(self, member: Member, waiter: Waiter, source: Source) -> Give:
        member.become(SandboxState.CLAIMED)
        member.owner, member.claim, member.standing = waiter.owner, waiter.claim, waiter.standing
        member.claimed_at = self._now
        self.line.leave(waiter, served=True)
        self._given[waiter.claim] = (waiter, member.id)
        return Give(member.id, waiter.claim, source)

    def _start(self, waiter: Waiter | None) -> Start:
        self._number += 1
        member = Member(self._new_id(), self._number, started_at=self._now)
        self.members[member.id] = member
        if waiter is not None:
            member.owner, member.claim, member.standing = waiter.owner, waiter.claim, waiter.standing
            self.line.leave(waiter, served=True)
            self._given[waiter.claim] = (waiter, member.id)
        return Start(member.id, member.claim)

    def _evict(self, victim: Member, owner: str) -> Evict:
        if victim.owner == owner:
            self.line.gave_up_one(owner)
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

    def _is(self, sandbox: str, state: SandboxState) -> bool:
        member = self.members.get(sandbox)
        return member is not None and member.state is state
