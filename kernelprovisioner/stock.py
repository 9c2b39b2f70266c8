"""Stock: how many unclaimed sandboxes a pool wants, and which of its warm ones is one too many. No clock, no I/O."""

from __future__ import annotations

from collections.abc import Collection

from kernelprovisioner import sizing
from kernelprovisioner.demand import Demand
from kernelprovisioner.member import Member
from kernelprovisioner.pool_events import Scheduled
from kernelprovisioner.sandbox import SandboxState

#: So long (seconds) more are warm than wanted before one of them goes: who comes back soon finds them.
SURPLUS_SECONDS = 60.0
_FIRST_GUESS_OF_START_SECONDS = 3.0


class Stock:
    """What a pool knows of the demand for it: `minimum`, the claims of late, the schedule; and how old its members are.

    `hit_rate` is the share of claims that are to meet a warm sandbox; warm ones older than `max_age` (seconds) are
    replaced. `concurrency` spare ones start at once, `maximum` is the pool's.
    """

    def __init__(self, *, minimum: int, maximum: int, concurrency: int, hit_rate: float, max_age: float) -> None:
        self.hit_rate = hit_rate
        self.max_age = max_age
        self.scheduled = Scheduled(0)
        #: how many unclaimed sandboxes are wanted, and why
        self.want = sizing.Want(minimum, f"{minimum} kept warm")
        #: how long a start takes, the later ones counting more
        self.start_seconds = _FIRST_GUESS_OF_START_SECONDS
        self._last_start_seconds = self.start_seconds
        self._minimum = self.want
        self._demand = Demand(concurrency, maximum)
        self._enough = minimum  # `want` without what takes the place of an old one
        self._room_to_replace = True
        self._surplus_since: float | None = None

    @property
    def claims(self) -> int:
        """How many claims of late the demand is known from."""
        return self._demand.claims

    def claim_came(self, now: float) -> None:
        """Somebody wants a sandbox."""
        # The last one's time, not the average: what varies costs more than its average.
        self._demand.came(now, self._last_start_seconds)

    def started(self, seconds: float) -> None:
        """A start took so long."""
        self._last_start_seconds = seconds
        self.start_seconds += 0.2 * (seconds - self.start_seconds)

    def look(self, members: Collection[Member], waiting: int, room: int, now: float) -> sizing.Want:
        """Decide and return how many unclaimed ones are wanted, where `room` fit under the pool's `max`."""
        warm = starting = came = 0
        oldest = now
        for member in members:
            if member.state is SandboxState.CLAIMED:
                came += member.claimed_at >= self.scheduled.since
            elif member.state is SandboxState.WARM:
                warm, oldest = warm + 1, min(oldest, member.warm_since)
            elif member.state is SandboxState.STARTING and member.claim is None:
                starting += 1
        choices = (self._minimum, self._demand.wanted(now, self.hit_rate), self._scheduled(came))
        kept = max(choices, key=lambda want: want.count)
        self._enough = min(kept.count + waiting, max(room, 0))
        self._room_to_replace = room > kept.count + waiting
        replaced = self._room_to_replace and warm > 0 and now - oldest >= self.max_age
        self.want = sizing.wanted(kept, waiting, room, replaced=replaced)
        if warm + starting <= self.want.count:
            self._surplus_since = None
        elif self._surplus_since is None:
            self._surplus_since = now
        return self.want

    def one_too_many(self, members: Collection[Member], now: float) -> Member | None:
        """Return the warm one that goes now, after a `look`: one that is too old, or one more than was wanted for long.

        One at a time. An old one goes once a younger one is warm beside it, or, in a full pool, to make room for that.
        """
        warm = sorted((m for m in members if m.state is SandboxState.WARM), key=lambda member: member.warm_since)
        if not warm:
            return None
        if now - warm[0].warm_since >= self.max_age:
            moving = any(member.state in (SandboxState.STARTING, SandboxState.GONE) for member in members)
            # One less is made up for before the next one goes: starts may fail, and an old one is better than none.
            makes_room = len(warm) == self._enough and not (self._room_to_replace or moving)
            if len(warm) > self._enough or makes_room:
                return warm[0]
        if self._surplus_since is not None and now - self._surplus_since >= SURPLUS_SECONDS:
            return warm[0]
        return None

    def _scheduled(self, came: int) -> sizing.Want:
        """How many of the scheduled ones are still to come, where `came` were claimed in the time of the entry."""
        scheduled = self.scheduled
        count = max(0, scheduled.count - came)
        claimed = f"; {came} of them claimed" if came else ""
        return sizing.Want(count, f"{count} kept warm (scheduled: {scheduled.entry}{claimed})")
