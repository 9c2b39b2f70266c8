"""What is broken when: a schedule that a seed repeats, and the history of what really happened."""

from __future__ import annotations

import enum
import random
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field


class Kind(enum.StrEnum):
    """What can be broken."""

    KERNEL = "kernel"  # SIGKILL to the kernel process of a claimed sandbox
    CLAIMED = "claimed"  # docker kill, or docker rm -f, of a claimed sandbox
    WARM = "warm"
    WARMING = "warming"
    GATEWAY_KILL = "gateway-kill"  # SIGKILL
    GATEWAY_UPGRADE = "gateway-upgrade"  # SIGTERM to a gateway that keeps its sandboxes
    GATEWAY_STOP = "gateway-stop"  # SIGTERM to one that removes them
    ENGINE_KILL = "engine-kill"
    ENGINE_RESTART = "engine-restart"


GATEWAY_KINDS = frozenset({Kind.GATEWAY_KILL, Kind.GATEWAY_UPGRADE, Kind.GATEWAY_STOP})
ENGINE_KINDS = frozenset({Kind.ENGINE_KILL, Kind.ENGINE_RESTART})
#: How often each kind is chosen, beside the one time that every run has.
WEIGHTS = {
    Kind.KERNEL: 8,
    Kind.CLAIMED: 6,
    Kind.WARM: 5,
    Kind.WARMING: 5,
    Kind.GATEWAY_KILL: 3,
    Kind.GATEWAY_UPGRADE: 2,
    Kind.GATEWAY_STOP: 1,
    Kind.ENGINE_KILL: 1,
    Kind.ENGINE_RESTART: 1,
}
#: Mean seconds between two faults.
MEAN_PAUSE = 4.0


@dataclass(frozen=True)
class Fault:
    """One planned fault: when (seconds after the start), what, and two numbers in [0, 1) that choose how."""

    at: float
    kind: Kind
    victim: float
    variant: float


def schedule(seed: int, seconds: float, kinds: Iterable[Kind] = Kind) -> list[Fault]:
    """Return the faults of one run, in order: each of `kinds` at least once, where there is time for it."""
    dice = random.Random(seed)
    wanted = sorted(kinds)
    faults = [_fault(dice, (index + dice.random()) * seconds / len(wanted), kind) for index, kind in
              enumerate(dice.sample(wanted, len(wanted)))]  # fmt: skip
    for _ in range(max(0, round(seconds / MEAN_PAUSE) - len(wanted))):
        kind = dice.choices(wanted, [WEIGHTS[each] for each in wanted])[0]
        faults.append(_fault(dice, dice.random() * seconds, kind))
    return sorted(faults, key=lambda fault: fault.at)


def _fault(dice: random.Random, at: float, kind: Kind) -> Fault:
    return Fault(round(at, 2), kind, dice.random(), dice.random())


@dataclass
class Happening:
    """A fault that was injected: when it began, when its effect was over (infinity: not yet), whom it hit."""

    kind: Kind
    begin: float
    end: float = float("inf")
    containers: frozenset[str] = frozenset()

    def overlaps(self, since: float, until: float) -> bool:
        return self.begin <= until and self.end >= since


@dataclass
class History:
    """All that has been injected so far; threads write and read it."""

    happenings: list[Happening] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, kind: Kind, containers: Iterable[str] = ()) -> Happening:
        """Note a fault just before it is injected."""
        happening = Happening(kind, time.monotonic(), containers=frozenset(containers))
        with self.lock:
            self.happenings.append(happening)
        return happening

    def within(self, since: float, until: float) -> list[Happening]:
        """What was going on at some time between the two (of the monotonic clock)."""
        with self.lock:
            return [happening for happening in self.happenings if happening.overlaps(since, until)]
