"""PoolState under every order of events that hypothesis can think of, against an independent model of the rules."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kernelprovisioner.member import InvalidTransition, Member
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
from kernelprovisioner.pool_state import FAILURES_TOLD, PoolState
from kernelprovisioner.sandbox import TRANSITIONS, SandboxState
from kernelprovisioner.sandbox_exit import ExitCause
from kernelprovisioner.standing import Standing, standing_now
from kernelprovisioner.stock import SURPLUS_SECONDS

OWNERS = ("ada", "bob", "cyd")


def make_state(
    *,
    minimum: int = 0,
    maximum: int = 4,
    line_bound: int = 16,
    concurrency: int = 2,
    hit_rate: float = 0.0,
    max_age: float = math.inf,
) -> PoolState:
    numbers = itertools.count(1)
    return PoolState(
        minimum=minimum,
        maximum=maximum,
        line_bound=line_bound,
        concurrency=concurrency,
        new_id=lambda: f"s{next(numbers)}",
        hit_rate=hit_rate,
        max_age=max_age,
    )


@dataclass
class Box:
    """A sandbox as the model knows it."""

    number: int
    state: str = "starting"
    template: str | None = None
    owner: str | None = None
    claim: int | None = None
    settled: bool = False
    idle_since: float | None = None
    standing: Standing = Standing.KEPT
    warm_since: float = 0.0
    claimed_at: float = 0.0
    beyond: bool = False  # it was adopted although all places were taken


@dataclass
class Ask:
    """A claim in line as the model knows it."""

    owner: str
    own: bool
    standing: Standing


class PoolMachine(RuleBasedStateMachine):
    """Plays engine, sessions and callers; checks each instruction when it is given, and the whole after each event."""

    @initialize(
        minimum=st.integers(0, 3),
        more=st.integers(0, 4),
        concurrency=st.integers(1, 3),
        line_bound=st.integers(1, 16),
        hit_rate=st.sampled_from([0.0, 0.95]),
        max_age=st.sampled_from([math.inf, 1000.0]),
    )
    def setup(
        self, minimum: int, more: int, concurrency: int, line_bound: int, hit_rate: float, max_age: float
    ) -> None:
        self.maximum = max(1, minimum + more)
        self.minimum, self.concurrency, self.line_bound = minimum, concurrency, line_bound
        self.max_age = max_age
        self.state = make_state(
            minimum=minimum,
            maximum=self.maximum,
            line_bound=line_bound,
            concurrency=concurrency,
            hit_rate=hit_rate,
            max_age=max_age,
        )
        self.scheduled = Scheduled(0)
        self.wanted_at = 100.0  # when none was certain to be one too many
        self.now = 100.0
        self.numbers = itertools.count(1)
        self.boxes: dict[str, Box] = {}
        self.line: dict[int, Ask] = {}
        self.placed: dict[int, Ask] = {}  # claims with a sandbox that is not settled yet
        self.handed_out: set[str] = set()
        self.gave_up: Counter[str] = Counter()  # own sessions given up for claims that still wait
        self.failures = 0
        self.wake_at: float | None = None
        self.stopped = False
        self.starts = itertools.count(1)
        #: what tells the template: the last started that was ever warm, or the launcher after so many starts
        self.newest: tuple[int, str | None] = (-1, None)
        self.tell(Tick())

    # What the model knows.

    def of(self, *states: str) -> list[str]:
        return [sandbox for sandbox, box in self.boxes.items() if box.state in states]

    def shared_starting(self) -> int:
        return sum(self.boxes[sandbox].claim is None for sandbox in self.of("starting"))

    def held(self, owner: str | None) -> int:
        return sum(box.owner == owner for box in self.boxes.values() if box.state in ("starting", "claimed"))

    def free(self) -> int:
        return max(0, self.maximum - len(self.boxes))

    def coming(self) -> int:
        """Places that are free, or will be once those that are going have gone."""
        return max(0, self.maximum - len(self.boxes) + len(self.of("gone")))

    def unclaimed(self) -> int:
        return len(self.of("warm")) + self.shared_starting()

    def kept(self) -> int:
        """How many are wanted warm, at least."""
        came = sum(self.boxes[sandbox].claimed_at >= self.scheduled.since for sandbox in self.of("claimed"))
        return max(self.minimum, self.scheduled.count - came)

    def surely_wanted(self) -> int:
        """How many unclaimed ones are wanted, at least: those in line, those kept, as far as there is room."""
        own = sum(ask.own for ask in self.line.values())
        room = self.maximum - len(self.boxes) + self.unclaimed() - own
        return min(len(self.line) - own + self.kept(), max(0, room))

    def outdated(self, sandbox: str) -> bool:
        return self.newest[0] >= 0 and self.boxes[sandbox].template != self.newest[1]

    def in_line(self, owner: str | None) -> list[int]:
        return sorted(claim for claim, ask in self.line.items() if ask.owner == owner)

    def heads(self) -> list[int]:
        return [self.in_line(owner)[0] for owner in {ask.owner for ask in self.line.values()}]

    def rank(self, box: Box) -> tuple[Standing, Standing, float]:
        """The lower goes first."""
        assert box.idle_since is not None
        return standing_now(box.standing, self.now - box.idle_since), box.standing, box.idle_since

    def idle(self, owner: str | None) -> list[Box]:
        return [box for box in self.boxes.values() if box.owner == owner and box.idle_since is not None]

    def claimed_standings(self, owner: str | None) -> list[Standing]:
        return [box.standing for box in self.boxes.values() if box.owner == owner and box.state == "claimed"]

    def backing_off(self) -> bool:
        return self.wake_at is not None and self.now < self.wake_at

    def served(self, owner: str) -> None:
        self.gave_up[owner] = min(max(0, self.gave_up[owner] - 1), len(self.in_line(owner)))

    def forget_waiter(self, claim: int) -> None:
        owner = self.line.pop(claim).owner
        self.gave_up[owner] = min(self.gave_up[owner], len(self.in_line(owner)))

    # Events, and what may come of them.

    def tell(self, event: Event) -> list[Instruction]:
        instructions = self.state.handle(event, self.now)
        for instruction in instructions:
            getattr(self, f"see_{type(instruction).__name__.lower()}")(instruction, event)
        plain = sum(not ask.own for ask in self.line.values())
        if self.unclaimed() <= self.surely_wanted():
            self.wanted_at = self.now
        spare = self.unclaimed() > plain
        if spare and any(isinstance(i, Start) and i.claim is None for i in instructions):
            own = len(self.line) - plain
            assert own <= self.coming(), "a spare one took the place of who waits"
            assert not any(self.line[claim].own for claim in self.heads()), "refill went before who waits"
        return instructions

    def see_start(self, start: Start, event: Event) -> None:
        assert not self.stopped
        assert start.sandbox not in self.boxes and start.sandbox not in self.handed_out
        assert self.free() > 0, "more live sandboxes than max"
        assert len(self.of("starting")) < self.concurrency
        box = self.boxes[start.sandbox] = Box(next(self.starts))
        if start.claim is None:
            assert not self.backing_off()
            return
        ask = self.line[start.claim]
        assert ask.own and start.claim == min(self.in_line(ask.owner)), "overtook one of its own owner"
        box.standing = ask.standing
        box.owner, box.claim = ask.owner, start.claim  # and warm and claimed at once, when it is there
        self.placed[start.claim] = self.line.pop(start.claim)
        self.served(ask.owner)

    def see_give(self, give: Give, event: Event) -> None:
        box = self.boxes[give.sandbox]
        assert box.state == "warm"
        assert give.sandbox not in self.handed_out, "handed out twice"
        self.handed_out.add(give.sandbox)
        if box.claim is not None:
            assert give.claim == box.claim and give.source is Source.COLD
        else:
            ask = self.line[give.claim]
            assert not ask.own and give.claim == min(self.in_line(ask.owner)), "overtook one of its own owner"
            rivals = [self.line[head].owner for head in self.heads() if not self.line[head].own]
            assert self.held(ask.owner) == min(map(self.held, rivals)), "an owner that holds less was passed over"
            equals = {rival for rival in rivals if self.held(rival) == self.held(ask.owner) and self.gave_up[rival]}
            assert not equals or self.gave_up[ask.owner], "the place of who gave up a session went to another"
            asked_now = isinstance(event, ClaimAsked | ClaimFailed) and event.claim == give.claim
            assert (give.source is Source.WARM) == asked_now
            box.owner, box.claim, box.standing = ask.owner, give.claim, ask.standing
            self.placed[give.claim] = self.line.pop(give.claim)
            self.served(ask.owner)
        box.state, box.claimed_at = "claimed", self.now

    def see_evict(self, evict: Evict, event: Event) -> None:
        victim = self.boxes[evict.sandbox]
        assert victim.state == "claimed" and victim.settled
        assert victim.idle_since is not None, "a busy session lost its sandbox"
        assert not self.of("warm"), "a session lost its sandbox while a warm one was there"
        mixed = any(ask.own for ask in self.line.values())
        supply = self.coming() + (0 if mixed else self.shared_starting())
        assert len(self.line) > supply, "a session lost its sandbox although one was coming"
        assert self.rank(victim) == min(map(self.rank, self.idle(victim.owner))), "not the one used longest ago"
        # Of its own it spares who is at work while there is a lower one: those in line may be on their way already.
        waiting = [ask.standing for ask in self.line.values() if ask.owner == evict.owner]
        lowest = min([*self.claimed_standings(evict.owner), *waiting])
        for box in self.idle(evict.owner):
            assert self.rank(victim) <= self.rank(box) or self.rank(box)[0] > lowest, "an own one should have gone"
        if victim.owner == evict.owner:
            assert self.rank(victim)[0] <= min(self.claimed_standings(victim.owner)), "somebody at work lost a sandbox"
        if victim.owner != evict.owner:
            # Those being started for the waiter's owner count; which they are is certain where it alone waits.
            coming = 0
            if all(ask.owner == evict.owner and not ask.own for ask in self.line.values()):
                coming = self.shared_starting() + self.coming()
            holds = self.held(victim.owner) + len(self.in_line(victim.owner))
            assert holds > self.held(evict.owner) + coming + 1, "a flood cost another owner its session"
        else:
            self.gave_up[evict.owner] += 1
        victim.state, victim.idle_since = "gone", None

    def see_remove(self, remove: Remove, event: Event) -> None:
        box = self.boxes[remove.sandbox]
        assert box.state != "gone"
        if isinstance(event, Started | TemplateIs | Adopted) and remove.cause is ExitCause.REQUESTED:
            assert box.state == "warm"
            beyond = isinstance(event, Adopted) and len(self.boxes) > self.maximum
            assert beyond or self.outdated(remove.sandbox), "a sandbox of the newest template was thrown away"
        if isinstance(event, Tick):
            assert box.state == "warm" and remove.cause is ExitCause.REQUESTED
            beside = self.unclaimed() > self.surely_wanted()
            if self.now - box.warm_since >= self.max_age:
                full = self.unclaimed() == self.surely_wanted() and not self.of("starting", "gone")
                assert beside or full, "an old one went before a younger one was there"
                assert box.warm_since == min(self.boxes[other].warm_since for other in self.of("warm"))
            else:
                assert beside, "one that is wanted was given back"
                assert self.now - self.wanted_at >= SURPLUS_SECONDS, "given back too soon"
        if remove.cause is ExitCause.EVICTED:
            assert box.state == "warm"
            own = sum(ask.own for ask in self.line.values())
            assert own > self.coming(), "a warm sandbox was thrown away for nothing"
        box.state, box.idle_since = "gone", None

    def see_refuse(self, refuse: Refuse, event: Event) -> None:
        match refuse.reason:
            case Refusal.STOPPED:
                assert self.stopped
            case Refusal.FULL:
                assert isinstance(event, ClaimAsked)
                assert len(self.line) > self.line_bound
                mine, theirs = self.in_line(event.owner), self.in_line(self.line[refuse.claim].owner)
                assert refuse.claim == theirs[-1], "one that waited longer was sent away"
                assert refuse.claim == event.claim or len(theirs) > len(mine)
            case Refusal.START_FAILED:
                assert isinstance(event, StartFailed)
                assert refuse.claim in self.placed or self.failures >= FAILURES_TOLD
        assert (refuse.claim in self.line) != (refuse.claim in self.placed)
        if refuse.claim in self.line:
            self.forget_waiter(refuse.claim)
        self.placed.pop(refuse.claim, None)

    def see_wakeat(self, wake: WakeAt, event: Event) -> None:
        assert self.now < wake.at <= self.now + 30.0
        self.wake_at = wake.at

    # What can happen.

    def pick(self, data: st.DataObject, choices: list[Any]) -> Any:
        return data.draw(st.sampled_from(choices))

    @rule(owner=st.sampled_from(OWNERS), own=st.booleans(), standing=st.sampled_from(Standing))
    def ask(self, owner: str, own: bool, standing: Standing) -> None:
        claim, before = next(self.numbers), len(self.line)
        self.line[claim] = Ask(owner, own, standing)
        self.tell(ClaimAsked(claim, owner, own, standing))
        # Only a claim whose sandbox failed comes back in line beyond the bound.
        assert len(self.line) <= max(self.line_bound, before)

    @rule(owner=st.sampled_from(OWNERS), count=st.integers(2, 6), standing=st.sampled_from(Standing))
    def flood(self, owner: str, count: int, standing: Standing) -> None:
        for _ in range(count):
            self.ask(owner, False, standing)

    @precondition(lambda self: self.line or self.placed)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        claim = self.pick(data, [*self.line, *self.placed])
        if claim in self.line:
            self.forget_waiter(claim)
        placed = self.placed.pop(claim, None)
        mine = [sandbox for sandbox, box in self.boxes.items() if box.claim == claim and not box.settled]
        self.tell(ClaimAbandoned(claim))
        assert all(self.boxes[sandbox].state == "gone" for sandbox in mine) or placed is None

    def given(self) -> list[int]:
        return [c for c in self.placed if any(b.claim == c and b.state != "starting" for b in self.boxes.values())] + [
            c for c in self.placed if all(b.claim != c for b in self.boxes.values())
        ]

    @precondition(lambda self: self.given())
    @rule(data=st.data())
    def fail_claim(self, data: st.DataObject) -> None:
        claim = self.pick(data, self.given())
        self.put_back(claim)

    def put_back(self, claim: int) -> None:
        self.line[claim] = self.placed.pop(claim)
        self.tell(ClaimFailed(claim))

    @precondition(lambda self: self.given())
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        self.settle_one(self.pick(data, self.given()))

    def settle_one(self, claim: int) -> None:
        box = next((b for b in self.boxes.values() if b.claim == claim and b.state == "claimed"), None)
        assert self.state.has_given(claim) == (box is not None)
        if box is None:  # it died while it was claimed: the caller sees that and says so
            self.put_back(claim)
            return
        box.settled = True
        del self.placed[claim]
        self.tell(ClaimSettled(claim))

    @precondition(lambda self: self.of("starting", "gone"))
    @rule(data=st.data(), template=st.sampled_from([None, "old", "new", "new"]))
    def started(self, data: st.DataObject, template: str | None) -> None:
        self.started_one(self.pick(data, self.of("starting", "gone")), template)

    def started_one(self, sandbox: str, template: str | None = "new") -> None:
        """Also for one that was given up while it started: that changes nothing."""
        box = self.boxes[sandbox]
        if box.state == "starting":
            box.state, box.template, box.warm_since = "warm", template, self.now
            self.newest = max(self.newest, (box.number, template), key=lambda start: start[0])
            self.failures, self.wake_at = 0, None
        self.tell(Started(sandbox, template))

    @precondition(lambda self: self.of("starting"))
    @rule(data=st.data())
    def start_failed(self, data: st.DataObject) -> None:
        box = self.boxes.pop(sandbox := self.pick(data, self.of("starting")))
        self.failures += box.claim is None
        self.tell(StartFailed(sandbox))

    @precondition(lambda self: self.of("claimed"))
    @rule(data=st.data(), idle=st.booleans(), standing=st.sampled_from(Standing))
    def touch(self, data: st.DataObject, idle: bool, standing: Standing) -> None:
        self.touch_one(self.pick(data, self.of("claimed")), idle, standing)

    def touch_one(self, sandbox: str, idle: bool, standing: Standing = Standing.KEPT) -> None:
        """Before its claim is settled that changes nothing."""
        box = self.boxes[sandbox]
        self.now += 0.001
        if box.settled:
            box.idle_since, box.standing = self.now if idle else None, standing
        self.tell(Touched(sandbox, self.now if idle else None, standing))

    @rule(owner=st.sampled_from(OWNERS), count=st.integers(1, 6), idle=st.booleans())
    def sessions(self, owner: str, count: int, idle: bool) -> None:
        """An owner claims some, and all that is under way goes well: the quick way to a full pool."""
        for _ in range(count):
            self.ask(owner, False, Standing.KEPT)
            for sandbox in self.of("gone"):
                self.removed_one(sandbox)
            for sandbox in self.of("starting"):
                self.started_one(sandbox)
            for claim in self.given():
                self.settle_one(claim)
        for sandbox in self.of("claimed"):
            if self.boxes[sandbox].state == "claimed" and self.boxes[sandbox].owner == owner:
                self.touch_one(sandbox, idle)

    @precondition(lambda self: self.of("warm", "claimed"))
    @rule(data=st.data())
    def dies(self, data: st.DataObject) -> None:
        sandbox = self.pick(data, self.of("warm", "claimed"))
        self.tell(Exited(sandbox))
        assert self.boxes[sandbox].state == "gone"

    @precondition(lambda self: self.of("claimed"))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        settled = [sandbox for sandbox in self.of("claimed") if self.boxes[sandbox].settled]
        if settled:
            self.tell(Released(self.pick(data, settled)))

    @precondition(lambda self: self.of("gone"))
    @rule(data=st.data())
    def removed(self, data: st.DataObject) -> None:
        self.removed_one(self.pick(data, self.of("gone")))

    def removed_one(self, sandbox: str) -> None:
        del self.boxes[sandbox]
        self.tell(Removed(sandbox))

    @rule(
        owner=st.sampled_from([None, None, *OWNERS]),
        template=st.sampled_from([None, "old", "new", "new"]),
        age=st.floats(0.0, 2000.0),
    )
    def adopt(self, owner: str | None, template: str | None, age: float) -> None:
        full = len(self.boxes) >= self.maximum
        box = Box(next(self.starts), "warm" if owner is None else "claimed", template, owner, beyond=full)
        box.settled, box.warm_since, box.claimed_at = owner is not None, self.now - age, self.now - age
        self.boxes[sandbox := f"adopted-{box.number}"] = box
        unfit = owner is None and (full or self.outdated(sandbox))
        self.tell(Adopted(sandbox, template, owner, age))
        if unfit or self.stopped:
            assert box.state == "gone"
        elif not any(ask.own for ask in self.line.values()):  # for those it would make room
            assert box.state != "gone"
        self.tell(Adopted(sandbox, template, owner, age))  # once more: that changes nothing

    @precondition(lambda self: self.boxes)
    @rule(data=st.data())
    def probe_fails(self, data: st.DataObject) -> None:
        """Also of one that was claimed while it was asked: that one is its holder's."""
        box = self.boxes[sandbox := self.pick(data, list(self.boxes))]
        before = box.state
        self.tell(ProbeFailed(sandbox))
        assert box.state == ("gone" if before == "warm" else before)

    @rule(template=st.sampled_from(["old", "new", "newer"]))
    def template_is(self, template: str) -> None:
        if self.newest[0] < 0 or self.newest[1] != template:
            started = max((box.number for box in self.boxes.values()), default=0)
            self.newest = (max(started, self.newest[0], 0), template)
        self.tell(TemplateIs(template))

    @rule(count=st.integers(0, 8), ago=st.floats(0.0, 100.0))
    def schedule(self, count: int, ago: float) -> None:
        self.scheduled = Scheduled(count, self.now - ago, "the timetable")
        self.tell(self.scheduled)

    @rule()
    def engine_back(self) -> None:
        self.failures, self.wake_at = 0, None
        self.tell(EngineBack())

    @rule(sandbox=st.sampled_from(["s1", "s2", "never"]), kind=st.sampled_from([Exited, Released, Removed]))
    def late_news(self, sandbox: str, kind: type[Exited] | type[Released] | type[Removed]) -> None:
        """News of a sandbox that has no place (any more) changes nothing; nor does a removal that nobody asked for."""
        if sandbox not in self.boxes or (kind is Removed and self.boxes[sandbox].state != "gone"):
            self.tell(kind(sandbox))

    @rule(seconds=st.floats(0.0, 40.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.tell(Tick())

    @precondition(lambda self: not self.stopped)
    @rule(really=st.sampled_from([False] * 19 + [True]))
    def stop(self, really: bool) -> None:
        if really:
            self.stopped = True
            self.tell(Stop())
            assert not self.line and not self.of("starting", "warm", "claimed")

    @precondition(lambda self: not self.stopped)
    @rule(really=st.sampled_from([False, False, False, True]))
    def all_goes_well(self, really: bool) -> None:
        """From any state: if starts succeed and sessions end, everyone in line is served."""
        if not really:
            return
        self.now += 60.0
        self.tell(Tick())
        for _ in range(4 * (len(self.line) + self.maximum) + 10):
            if not self.line and not self.placed:
                return
            for claim in self.given():
                self.settle_one(claim)
            for sandbox in self.of("starting"):
                self.started_one(sandbox)
            for sandbox in self.of("claimed"):
                if self.boxes[sandbox].settled and self.boxes[sandbox].state == "claimed":
                    self.tell(Released(sandbox))
            for sandbox in self.of("gone"):
                self.removed_one(sandbox)
        raise AssertionError(f"still in line: {self.line}, still placed: {self.placed}")

    @precondition(lambda self: not self.stopped)
    @rule(really=st.sampled_from([False, False, False, True]))
    def rests(self, really: bool) -> None:
        """From any state: if nobody comes any more, exactly as many are warm as are kept, and none of them is old."""
        if not really:
            return
        self.all_goes_well(True)
        self.now += 2000.0
        for _ in range(3):
            self.now += SURPLUS_SECONDS + 1.0
            for _ in range(3 * self.maximum + 10):
                self.now += 1.0
                self.tell(Tick())
                for sandbox in self.of("starting"):
                    self.started_one(sandbox)
                for sandbox in self.of("gone"):
                    self.removed_one(sandbox)
        room = max(0, self.maximum - len(self.of("claimed")))
        assert len(self.boxes) == len(self.of("warm", "claimed"))
        assert len(self.of("warm")) == min(self.kept(), room)
        assert all(self.now - self.boxes[sandbox].warm_since < self.max_age for sandbox in self.of("warm"))
        assert self.state.stock.want.count == len(self.of("warm")), "it wants something else than it has"

    # What holds after each event.

    @invariant()
    def state_and_model_agree(self) -> None:
        assert {member.id: str(member.state) for member in self.state.members.values()} == {
            sandbox: box.state for sandbox, box in self.boxes.items()
        }
        assert self.state.waiting == len(self.line)
        assert sum(self.state.counts().values()) == len(self.boxes)

    @invariant()
    def no_warm_one_is_outdated(self) -> None:
        assert not any(self.outdated(sandbox) for sandbox in self.of("warm"))

    @invariant()
    def bounds_hold(self) -> None:
        assert len(self.boxes) - sum(box.beyond for box in self.boxes.values()) <= self.maximum

    @invariant()
    def nothing_stands_idle(self) -> None:
        if self.stopped:
            assert not self.line
            return
        heads = [self.line[claim] for claim in self.heads()]
        if self.of("warm"):
            assert all(ask.own for ask in heads), "a warm sandbox stands idle while somebody waits for one"
        busy = len(self.of("starting")) >= self.concurrency
        unclaimed = len(self.of("warm")) + self.shared_starting()
        own = sum(ask.own for ask in self.line.values())
        plain = len(self.line) - own
        if heads and not plain:
            assert busy or not self.free(), "a place is free, and nothing starts for who waits"
        if not own and not self.backing_off():
            empty = not plain and not self.of("warm", "claimed")
            enough = self.concurrency if empty else max(1, self.concurrency // 2)
            refilling = unclaimed >= plain and len(self.of("starting")) >= enough
            assert busy or refilling or not self.free() or unclaimed >= plain + self.kept(), "nothing refills"

    @invariant()
    def an_idle_session_gives_way(self) -> None:
        owners = {ask.owner for ask in self.line.values()}
        if len(owners) != 1 or self.free() or self.of("starting", "warm", "gone"):
            return
        (owner,) = owners
        # Only a lower one, which is busy now, is waited for.
        lowest = min(self.claimed_standings(owner), default=Standing.PASSING)
        assert all(self.rank(box)[0] > lowest for box in self.idle(owner)), "one of its own sessions should give way"
        for other in OWNERS:
            assert not (self.idle(other) and self.held(other) > self.held(owner) + 1), "an unfair share is kept"

    def teardown(self) -> None:
        """Whatever happened, all ends in gone and nothing is left."""
        if not hasattr(self, "state"):
            return
        self.stopped = True
        self.tell(Stop())
        for claim in list(self.placed):
            self.placed.pop(claim)
            self.tell(ClaimAbandoned(claim))
        for sandbox in self.of("gone"):
            self.removed_one(sandbox)
        assert not self.boxes and not self.state.members and not self.line
        assert self.tell(Tick()) == []


PoolMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestPoolMachine = pytest.mark.limit(120)(PoolMachine.TestCase)  # thousands of events, on a machine that may be busy


# Single rules, as a reader would try them.


def of_kind(instructions: list[Instruction], kind: type[Any]) -> list[Any]:
    return [instruction for instruction in instructions if isinstance(instruction, kind)]


def occupy(state: PoolState, owner: str, count: int, *, idle_from: float | None, first_claim: int) -> list[str]:
    """Let `owner` claim `count` sandboxes, settled; idle since idle_from, idle_from + 1, … or busy (None)."""
    sandboxes = []
    for index in range(count):
        claim = first_claim + index
        for start in of_kind(state.handle(ClaimAsked(claim, owner), 0.0), Start):
            for give in of_kind(state.handle(Started(start.sandbox), 0.0), Give):
                state.handle(ClaimSettled(give.claim), 0.0)
                sandboxes.append(give.sandbox)
    assert len(sandboxes) == count
    for index, sandbox in enumerate(sandboxes):
        state.handle(Touched(sandbox, None if idle_from is None else idle_from + index), 0.0)
    return sandboxes


def test_the_pool_fills_to_its_minimum_with_half_of_what_may_start_once_somebody_could_be_at_work() -> None:
    state = make_state(minimum=6, maximum=6, concurrency=4)
    first = of_kind(state.handle(Tick(), 0.0), Start)
    assert len(first) == 4, "the pool is empty"
    for start in first[:2]:
        assert of_kind(state.handle(Started(start.sandbox), 0.0), Start) == []
    assert len(of_kind(state.handle(Started(first[2].sandbox), 0.0), Start)) == 1
    assert state.counts()[SandboxState.STARTING] == 2


def test_for_those_who_wait_all_that_may_start_does() -> None:
    state = make_state(minimum=1, maximum=6, concurrency=2)
    (first,) = of_kind(state.handle(ClaimAsked(1, "ada"), 0.0), Start)
    (second,) = of_kind(state.handle(ClaimAsked(2, "bob"), 0.0), Start)
    assert first.sandbox != second.sandbox


def test_a_warm_sandbox_is_handed_out_at_once_and_replaced() -> None:
    state = make_state(minimum=1)
    (start,) = of_kind(state.handle(Tick(), 0.0), Start)
    state.handle(Started(start.sandbox), 0.0)
    give, refill = state.handle(ClaimAsked(1, "ada"), 0.0)
    assert give == Give(start.sandbox, 1, Source.WARM)
    assert isinstance(refill, Start) and refill.claim is None


def test_a_place_is_free_only_when_removal_is_confirmed() -> None:
    state = make_state(maximum=1)
    (sandbox,) = occupy(state, "ada", 1, idle_from=None, first_claim=1)
    assert state.handle(ClaimAsked(2, "bob"), 0.0) == []
    assert of_kind(state.handle(Released(sandbox), 0.0), Start) == []
    assert len(of_kind(state.handle(Removed(sandbox), 0.0), Start)) == 1


def test_a_flood_takes_its_fair_share_and_no_more() -> None:
    state = make_state(maximum=6, line_bound=64)
    bobs = occupy(state, "bob", 6, idle_from=1.0, first_claim=1)
    evicted = []
    for claim in range(10, 30):
        evicted += [evict.sandbox for evict in of_kind(state.handle(ClaimAsked(claim, "ada"), 0.0), Evict)]
    assert evicted == bobs[:3], "those used longest ago, until both hold three"


def test_a_flood_never_costs_the_only_session_of_another() -> None:
    state = make_state(maximum=2, line_bound=64)
    occupy(state, "ada", 1, idle_from=None, first_claim=1)
    occupy(state, "bob", 1, idle_from=1.0, first_claim=2)
    for claim in range(10, 30):
        assert state.handle(ClaimAsked(claim, "ada"), 0.0) == []


def test_who_gives_up_an_own_session_gets_the_place_before_an_older_claim_of_a_flood() -> None:
    state = make_state(maximum=3, line_bound=64)
    occupy(state, "ada", 1, idle_from=None, first_claim=1)
    bobs = occupy(state, "bob", 2, idle_from=1.0, first_claim=2)
    for claim in range(10, 20):
        assert state.handle(ClaimAsked(claim, "ada"), 0.0) == []
    assert state.handle(ClaimAsked(50, "bob"), 0.0) == [Evict(bobs[0], "bob")]
    (start,) = state.handle(Removed(bobs[0]), 0.0)
    assert isinstance(start, Start), "not a second session of his"
    assert of_kind(state.handle(Started(start.sandbox), 0.0), Give) == [Give(start.sandbox, 50, Source.STARTED)]


def test_the_line_is_shared_fairly_too() -> None:
    state = make_state(maximum=1, line_bound=4)
    occupy(state, "ada", 1, idle_from=None, first_claim=1)
    for claim in range(2, 6):
        assert state.handle(ClaimAsked(claim, "ada"), 0.0) == []
    assert state.handle(ClaimAsked(6, "ada"), 0.0) == [Refuse(6, Refusal.FULL)]
    assert state.handle(ClaimAsked(7, "bob"), 0.0) == [Refuse(5, Refusal.FULL)]
    assert state.waiting == 4


def test_a_claim_for_a_sandbox_of_its_own_takes_the_place_of_a_warm_one() -> None:
    state = make_state(minimum=1, maximum=1)
    (start,) = of_kind(state.handle(Tick(), 0.0), Start)
    state.handle(Started(start.sandbox), 0.0)
    (remove,) = state.handle(ClaimAsked(1, "ada", own=True), 0.0)
    assert isinstance(remove, Remove) and remove.sandbox == start.sandbox
    (own,) = state.handle(Removed(start.sandbox), 0.0)
    assert isinstance(own, Start) and own.claim == 1
    assert state.handle(Started(own.sandbox), 0.0) == [Give(own.sandbox, 1, Source.COLD)]


def test_a_rebuilt_image_replaces_the_warm_sandboxes_of_the_older_one() -> None:
    state = make_state(minimum=2, maximum=4, concurrency=4)
    first, second = of_kind(state.handle(Tick(), 0.0), Start)
    state.handle(Started(first.sandbox, "old"), 0.0)
    state.handle(Started(second.sandbox, "old"), 0.0)
    (give, refill) = state.handle(ClaimAsked(1, "ada"), 0.0)
    assert isinstance(give, Give) and isinstance(refill, Start)
    state.handle(ClaimSettled(1), 0.0)
    remove, again = state.handle(Started(refill.sandbox, "new"), 0.0)
    assert remove == Remove(second.sandbox, ExitCause.REQUESTED), "the claimed one stays with its session"
    assert isinstance(again, Start)
    give = state.handle(ClaimAsked(2, "bob"), 0.0)[0]
    assert isinstance(give, Give) and give.sandbox == refill.sandbox


def test_an_older_sandbox_that_is_warm_later_is_outdated_all_the_same() -> None:
    state = make_state(minimum=2, maximum=4, concurrency=4)
    first, second = of_kind(state.handle(Tick(), 0.0), Start)
    state.handle(Started(second.sandbox, "new"), 0.0)
    assert Remove(first.sandbox, ExitCause.REQUESTED) in state.handle(Started(first.sandbox, "old"), 0.0)


def test_no_session_is_lost_while_a_sandbox_is_coming() -> None:
    state = make_state(maximum=2)
    occupy(state, "ada", 1, idle_from=1.0, first_claim=1)
    assert len(of_kind(state.handle(ClaimAsked(2, "ada"), 0.0), Start)) == 1
    assert state.handle(Tick(), 0.0) == []


def test_refill_leaves_the_place_to_who_waits_behind_another_of_its_owner() -> None:
    state = make_state(minimum=1, maximum=2)
    (start,) = of_kind(state.handle(ClaimAsked(1, "bob"), 0.0), Start)
    (spare,) = of_kind(state.handle(Started(start.sandbox), 0.0), Start)
    state.handle(ClaimSettled(1), 0.0)
    state.handle(ClaimAsked(2, "ada"), 0.0)
    state.handle(ClaimAsked(3, "ada", own=True), 0.0)
    state.handle(Released(start.sandbox), 0.0)
    assert state.handle(Removed(start.sandbox), 0.0) == [], "the free place is for the claim that is second"
    give, own = state.handle(Started(spare.sandbox), 0.0)
    assert isinstance(give, Give) and give.claim == 2
    assert isinstance(own, Start) and own.claim == 3


def test_a_warm_sandbox_is_kept_for_who_waits_behind_one_that_wants_its_own() -> None:
    state = make_state(minimum=1, maximum=2, concurrency=1)
    (start,) = of_kind(state.handle(Tick(), 0.0), Start)
    state.handle(Started(start.sandbox), 0.0)
    (give, refill) = state.handle(ClaimAsked(1, "ada"), 0.0)
    assert isinstance(give, Give) and isinstance(refill, Start)
    state.handle(ClaimSettled(1), 0.0)
    state.handle(Started(refill.sandbox), 0.0)
    state.handle(Released(give.sandbox), 0.0)
    assert state.handle(ClaimAsked(2, "ada", own=True), 0.0) == [], "its place is being cleared"
    assert state.handle(ClaimAsked(3, "ada"), 0.0) == [], "the warm one stays for it"
    own, warm = state.handle(Removed(give.sandbox), 0.0)
    assert isinstance(own, Start) and own.claim == 2
    assert warm == Give(refill.sandbox, 3, Source.STARTED)


def test_failed_starts_back_off_and_are_told_to_who_waits() -> None:
    state = make_state(maximum=2, concurrency=1)
    (start,) = of_kind(state.handle(ClaimAsked(1, "ada"), 0.0), Start)
    now = 0.0
    for pause in (0.5, 1.0):
        assert state.handle(StartFailed(start.sandbox), now) == [WakeAt(now + pause)]
        assert state.handle(Tick(), now + pause / 2) == []
        now += pause
        (start,) = state.handle(Tick(), now)
    assert state.handle(StartFailed(start.sandbox), now) == [WakeAt(now + 2.0), Refuse(1, Refusal.START_FAILED)]


def test_a_start_that_fails_for_one_claim_alone_makes_nobody_else_wait() -> None:
    state = make_state(maximum=2)
    (start,) = state.handle(ClaimAsked(1, "ada", own=True), 0.0)
    assert isinstance(start, Start)
    assert state.handle(StartFailed(start.sandbox), 0.0) == [Refuse(1, Refusal.START_FAILED)]
    assert len(of_kind(state.handle(ClaimAsked(2, "ada"), 0.0), Start)) == 1


def test_a_claim_that_failed_is_first_in_line_again() -> None:
    state = make_state(maximum=2, concurrency=2)
    starts = of_kind(state.handle(ClaimAsked(1, "ada"), 0.0), Start)
    starts += of_kind(state.handle(ClaimAsked(2, "ada"), 0.0), Start)
    assert of_kind(state.handle(Started(starts[0].sandbox), 0.0), Give)[0].claim == 1
    assert state.handle(ClaimFailed(1), 0.0)[0].sandbox == starts[0].sandbox  # type: ignore[union-attr]
    assert of_kind(state.handle(Started(starts[1].sandbox), 0.0), Give)[0].claim == 1


def fill(state: PoolState, now: float = 0.0, template: str = "t") -> list[str]:
    """Start all that the pool wants; return those that are warm."""
    state.handle(Tick(), now)
    while starting := [member.id for member in state.members.values() if member.state is SandboxState.STARTING]:
        state.handle(Started(starting[0], template), now)
    return [member.id for member in state.members.values() if member.state is SandboxState.WARM]


def test_one_more_than_is_wanted_is_given_back_after_a_minute_and_the_oldest_goes() -> None:
    state = make_state(minimum=1, concurrency=1)
    (first,) = fill(state)
    (start,) = of_kind(state.handle(Scheduled(2, 0.0, "the timetable"), 10.0), Start)
    state.handle(Started(start.sandbox, "t"), 12.0)
    state.handle(Scheduled(0), 20.0)
    assert state.handle(Tick(), 79.0) == []
    assert state.handle(Tick(), 80.0) == [Remove(first, ExitCause.REQUESTED)]
    assert state.handle(Tick(), 82.0) == []


def test_what_is_claimed_and_comes_back_within_the_minute_is_no_surplus() -> None:
    state = make_state(minimum=1, concurrency=1)
    fill(state)
    (start,) = of_kind(state.handle(Scheduled(2, 0.0, "the timetable"), 10.0), Start)
    state.handle(Started(start.sandbox, "t"), 12.0)
    state.handle(Scheduled(0), 20.0)
    state.handle(ClaimAsked(1, "ada"), 50.0)
    assert not of_kind(state.handle(Tick(), 200.0), Remove)


def test_an_old_one_stays_until_a_younger_one_is_warm() -> None:
    state = make_state(minimum=1, max_age=100.0)
    (old,) = fill(state)
    assert state.handle(Tick(), 99.0) == []
    (start,) = state.handle(Tick(), 100.0)
    assert isinstance(start, Start)
    assert state.stock.want.why == "1 kept warm, and 1 to take the place of an old one"
    assert state.handle(Tick(), 101.0) == []
    state.handle(Started(start.sandbox, "t"), 103.0)
    assert state.handle(Tick(), 104.0) == [Remove(old, ExitCause.REQUESTED)]
    state.handle(Removed(old), 105.0)
    assert state.handle(Tick(), 106.0) == [] and state.stock.want.count == 1


def test_in_a_full_pool_an_old_one_makes_room_and_only_one_at_a_time() -> None:
    state = make_state(minimum=2, maximum=2, max_age=100.0)
    first, second = fill(state)
    assert state.handle(Tick(), 100.0) == [Remove(first, ExitCause.REQUESTED)]
    assert state.handle(Tick(), 101.0) == []
    (start,) = state.handle(Removed(first), 102.0)
    assert isinstance(start, Start)
    assert state.handle(Tick(), 103.0) == []
    state.handle(Started(start.sandbox, "t"), 104.0)
    assert state.handle(Tick(), 105.0) == [Remove(second, ExitCause.REQUESTED)]


def test_while_starts_fail_an_old_one_is_better_than_none() -> None:
    state = make_state(minimum=2, maximum=2, max_age=100.0)
    first, second = fill(state)
    state.handle(Exited(first), 90.0)
    (start,) = of_kind(state.handle(Removed(first), 91.0), Start)
    state.handle(StartFailed(start.sandbox), 99.9)
    assert state.handle(Tick(), 100.2) == [], f"{second} went"
    (start,) = state.handle(Tick(), 100.5)
    assert isinstance(start, Start)


def test_a_start_from_before_the_template_changed_is_outdated_when_it_is_warm() -> None:
    state = make_state(minimum=2, concurrency=4)
    first, second = of_kind(state.handle(Tick(), 0.0), Start)
    state.handle(Started(first.sandbox, "old"), 0.0)
    assert Remove(first.sandbox, ExitCause.REQUESTED) in state.handle(TemplateIs("new"), 1.0)
    assert Remove(second.sandbox, ExitCause.REQUESTED) in state.handle(Started(second.sandbox, "old"), 2.0)


def test_a_template_that_is_told_again_changes_nothing() -> None:
    state = make_state(minimum=1)
    fill(state, template="new")
    assert state.handle(TemplateIs("new"), 1.0) == []


def test_those_adopted_beyond_max_go_before_anybody_else_gets_a_place() -> None:
    state = make_state(maximum=2)
    for number in range(4):
        assert state.handle(Adopted(f"a{number}", "t", "ada", 0.0), 0.0) == []
        state.handle(Touched(f"a{number}", float(number)), 5.0)
    gone: list[str] = []
    state.handle(ClaimAsked(1, "ada"), 6.0)
    for now in range(7, 12):
        state.handle(Tick(), float(now))
        gone += [member.id for member in state.members.values() if member.state is SandboxState.GONE]
        for sandbox in [member.id for member in state.members.values() if member.state is SandboxState.GONE]:
            starts = of_kind(state.handle(Removed(sandbox), float(now)), Start)
            if starts:
                assert gone == ["a0", "a1", "a2"], "as many as are too many, and one more for who waits"
                return
    raise AssertionError("who waits got nothing")


def test_adoption_starts_nothing_before_all_are_there() -> None:
    state = make_state(minimum=2)
    assert state.handle(Adopted("held", "t", "ada", 0.0), 0.0) == []
    assert state.handle(Adopted("warm", "t", None, 0.0), 0.0) == []
    assert len(of_kind(state.handle(Tick(), 0.0), Start)) == 1


def test_a_schedule_counts_those_who_came_and_still_are_there() -> None:
    state = make_state(maximum=10, concurrency=2)
    state.handle(ClaimAsked(1, "early"), 50.0)
    sandbox = next(iter(state.members))
    state.handle(Started(sandbox, "t"), 55.0)
    state.handle(ClaimSettled(1), 55.0)
    state.handle(Scheduled(3, 100.0, "3 python on Mondays 08:55-10:00"), 100.0)
    assert state.stock.want.count == 3, "the early one is not of the class"
    (warm, *_) = fill(state, 100.0)
    state.handle(ClaimAsked(2, "pupil"), 110.0)
    state.handle(ClaimSettled(2), 110.0)
    assert state.stock.want.count == 2
    assert state.stock.want.why == "2 kept warm (scheduled: 3 python on Mondays 08:55-10:00; 1 of them claimed)"
    state.handle(Released(warm), 120.0)
    assert state.stock.want.count == 3


def test_a_stop_that_keeps_takes_only_what_is_nobodys() -> None:
    state = make_state(minimum=2, maximum=6, concurrency=2)
    warm = fill(state)
    (given,) = of_kind(state.handle(ClaimAsked(1, "ada"), 0.0), Give)
    state.handle(ClaimSettled(1), 0.0)
    (unsettled,) = of_kind(state.handle(ClaimAsked(2, "bob"), 0.0), Give)
    starting = [member.id for member in state.members.values() if member.state is SandboxState.STARTING]
    assert starting and {given.sandbox, unsettled.sandbox} == set(warm)
    removed = of_kind(state.handle(Stop(keep=True), 0.0), Remove)
    assert {remove.sandbox for remove in removed} == {unsettled.sandbox, *starting}


@pytest.mark.parametrize(
    ("minimum", "maximum", "line_bound", "concurrency"),
    [(3, 2, 1, 1), (-1, 2, 1, 1), (0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 0)],
)
def test_bounds_that_make_no_sense_are_refused(minimum: int, maximum: int, line_bound: int, concurrency: int) -> None:
    with pytest.raises(ValueError):
        make_state(minimum=minimum, maximum=maximum, line_bound=line_bound, concurrency=concurrency)


def test_a_member_takes_only_the_steps_of_the_life_cycle() -> None:
    tried: Counter[bool] = Counter()
    for before, after in itertools.product(SandboxState, SandboxState):
        member = Member("s", state=before)
        allowed = after in TRANSITIONS[before]
        tried[allowed] += 1
        if allowed:
            member.become(after)
            assert member.state is after
        else:
            with pytest.raises(InvalidTransition):
                member.become(after)
    assert tried[True] == sum(map(len, TRANSITIONS.values()))
