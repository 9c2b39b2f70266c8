"""What a pool's I/O tells its state (events) and what the state wants done (instructions)."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kernelprovisioner.sandbox_exit import ExitCause
from kernelprovisioner.standing import Standing


class Source(enum.StrEnum):
    """Where a claim's sandbox came from."""

    WARM = "warm"  # it was ready when it was asked for
    STARTED = "started"  # the claim waited in line for it
    COLD = "cold"  # it was started for this claim alone


class Refusal(enum.StrEnum):
    """Why a claim leaves the line without a sandbox."""

    FULL = "full"
    STOPPED = "stopped"
    START_FAILED = "start_failed"


# Events: what happened.


@dataclass(frozen=True, slots=True)
class ClaimAsked:
    """Somebody wants a sandbox. Claim numbers grow; `own` asks for one started for this claim alone."""

    claim: int
    owner: str
    own: bool = False
    standing: Standing = Standing.KEPT


@dataclass(frozen=True, slots=True)
class ClaimAbandoned:
    """Whoever asked waits no more: deadline or cancelled. A sandbox that was given and not settled is destroyed."""

    claim: int


@dataclass(frozen=True, slots=True)
class ClaimFailed:
    """The given sandbox could not be made personal: it is destroyed, and the claim is back in line."""

    claim: int


@dataclass(frozen=True, slots=True)
class ClaimSettled:
    """The given sandbox is personal now; it counts as busy until it is touched."""

    claim: int


@dataclass(frozen=True, slots=True)
class Started:
    """A sandbox is warm. `template` is what its image was built from: one that is rebuilt makes the others outdated."""

    sandbox: str
    template: str | None = None


@dataclass(frozen=True, slots=True)
class Adopted:
    """A sandbox of a gateway that is gone is here again: of `owner`, or warm (None).

    `age`: seconds since it was claimed, or became warm.
    """

    sandbox: str
    template: str | None = None
    owner: str | None = None
    age: float = 0.0


@dataclass(frozen=True, slots=True)
class StartFailed:
    """A start ended without a sandbox and left nothing behind."""

    sandbox: str


@dataclass(frozen=True, slots=True)
class Touched:
    """A claimed sandbox is idle since then, in the time of `now`; None: it is busy."""

    sandbox: str
    idle_since: float | None
    standing: Standing = Standing.KEPT


@dataclass(frozen=True, slots=True)
class Exited:
    """A sandbox died by itself."""

    sandbox: str


@dataclass(frozen=True, slots=True)
class ProbeFailed:
    """A sandbox that was warm when it was asked does not answer; one that was claimed meanwhile is its holder's."""

    sandbox: str


@dataclass(frozen=True, slots=True)
class Released:
    """Its holder gives a sandbox up."""

    sandbox: str


@dataclass(frozen=True, slots=True)
class Removed:
    """The engine has confirmed that nothing is left of a sandbox."""

    sandbox: str


@dataclass(frozen=True, slots=True)
class TemplateIs:
    """What sandboxes that start from now on are made from: warm ones of another template are outdated."""

    template: str


@dataclass(frozen=True, slots=True)
class Scheduled:
    """What the schedule wants now: `count` sandboxes, in which those claimed `since` then are counted; `entry` says so.

    0 where nothing is scheduled.
    """

    count: int
    since: float = 0.0
    entry: str = ""


@dataclass(frozen=True, slots=True)
class EngineBack:
    """The engine answers again after it was away: starts that failed say nothing about the next one."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: at the beginning, whenever WakeAt asked for it, and every few seconds."""


@dataclass(frozen=True, slots=True)
class Stop:
    """No more sandboxes; all that live are destroyed; with `keep` those stay that are warm or have a holder."""

    keep: bool = False


Event = (
    ClaimAsked
    | ClaimAbandoned
    | ClaimFailed
    | ClaimSettled
    | Started
    | Adopted
    | StartFailed
    | Touched
    | Exited
    | ProbeFailed
    | Released
    | Removed
    | TemplateIs
    | Scheduled
    | EngineBack
    | Tick
    | Stop
)

# Instructions: what is to be done.


@dataclass(frozen=True, slots=True)
class Start:
    """Start a sandbox; `claim` is set if it is for that claim alone. Answered by Started or StartFailed."""

    sandbox: str
    claim: int | None = None


@dataclass(frozen=True, slots=True)
class Give:
    """Make this sandbox personal for this claim. Answered by ClaimSettled, ClaimFailed or ClaimAbandoned."""

    sandbox: str
    claim: int
    source: Source


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell a claim that it gets nothing."""

    claim: int
    reason: Refusal


@dataclass(frozen=True, slots=True)
class Evict:
    """Tell the holder of an idle sandbox that it loses it to `owner`, then remove it. Answered by Removed."""

    sandbox: str
    owner: str


@dataclass(frozen=True, slots=True)
class Remove:
    """Destroy a sandbox, also one that is still starting. Answered by Removed. No cause: it died by itself."""

    sandbox: str
    cause: ExitCause | None = None


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Send a Tick at this time; replaces an earlier WakeAt."""

    at: float


Instruction = Start | Give | Refuse | Evict | Remove | WakeAt
