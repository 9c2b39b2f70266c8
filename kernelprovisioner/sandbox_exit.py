"""SandboxExit: why a sandbox died, in words for the person who reads them."""

from __future__ import annotations

import enum
import signal as signals
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any


class ExitCause(enum.StrEnum):
    """Why a sandbox died."""

    REQUESTED = "requested"  # shut down by its holder
    EXITED = "exited"  # the kernel process ended by itself: os._exit does that, sys.exit does not
    SIGNAL = "signal"  # killed by a signal: a segfault, a kill from inside
    OUT_OF_MEMORY = "out_of_memory"  # the operating system killed it at its memory limit
    TIME_LIMIT = "time_limit"  # it passed its time limit and could not be interrupted
    REMOVED = "removed"  # somebody killed or removed the container from outside
    EVICTED = "evicted"  # the pool was full and somebody waited for the place, or its owner was at its limit
    IDLE = "idle"  # nobody used its session for as long as sessions may be idle
    START_FAILED = "start_failed"  # it never became warm
    GATEWAY = "gateway"  # the gateway went away or drained
    ENGINE = "engine"  # the container engine stopped or was restarted, and took it along
    PROTOCOL = "protocol"  # it sent what is not the protocol, or stopped answering


@dataclass(frozen=True)
class CellReference:
    """A cell that ran: its request's message id, and its number in the kernel where that is known."""

    msg_id: str
    execution_count: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the cell for a JSON answer."""
        return {"msg_id": self.msg_id, "execution_count": self.execution_count}


@dataclass(frozen=True)
class SandboxExit:
    """Why a sandbox died, with what is known of it. `str()` gives one sentence for a person.

    `evidence`: `limit_mb` and `peak_mb` (out of memory), `limit_seconds` (time limit, idle), `limit_sessions`
    (evicted at its owner's limit), `reason` (free text).
    """

    cause: ExitCause
    exit_code: int | None = None
    signal: int | None = None
    evidence: dict[str, Any] = field(default_factory=dict)
    at: datetime = field(default_factory=lambda: datetime.now(UTC))
    cell: CellReference | None = None  # that ran when it ended

    def __str__(self) -> str:
        match self.cause:
            case ExitCause.REQUESTED:
                return "The kernel was shut down."
            case ExitCause.EXITED:
                return f"The kernel process ended with exit code {self.exit_code}."
            case ExitCause.SIGNAL:
                return f"The kernel process was killed by signal {_signal_name(self.signal)}."
            case ExitCause.OUT_OF_MEMORY:
                return f"The kernel ran out of memory{self._memory()} and was killed."
            case ExitCause.TIME_LIMIT:
                limit = self.evidence.get("limit_seconds")
                passed = f"its time limit of {limit:g} s" if limit is not None else "its time limit"
                return f"The cell passed {passed} and could not be interrupted; its kernel was killed."
            case ExitCause.REMOVED:
                return "The sandbox was killed or removed from outside."
            case ExitCause.EVICTED:
                limit = self.evidence.get("limit_sessions")
                why = "all places were taken and somebody waited"
                if limit is not None:
                    why = f"its owner began another one, and may have {limit} at once"
                return f"The session had been idle and gave its sandbox up: {why}."
            case ExitCause.IDLE:
                limit = self.evidence.get("limit_seconds")
                unused = f"for {_duration(limit)}" if limit is not None else "for long"
                return f"The session was not used {unused} and gave its sandbox up."
            case ExitCause.START_FAILED:
                return f"The sandbox could not be started: {self.evidence.get('reason', 'no reason known')}"
            case ExitCause.GATEWAY:
                reason = self.evidence.get("reason")
                if reason is not None:
                    return f"The gateway that held the sandbox was lost, and the next one did not find it: {reason}."
                return "The gateway that held the sandbox has stopped."
            case ExitCause.ENGINE:
                return "The container engine stopped or was restarted, which ended the sandbox."
            case ExitCause.PROTOCOL:
                return "The sandbox broke the protocol or stopped answering, and was ended."

    def as_dict(self) -> dict[str, Any]:
        """Return the exit for a JSON answer: cause, exit_code, signal, evidence, at (ISO 8601), cell, text."""
        return {
            "cause": self.cause.value,
            "exit_code": self.exit_code,
            "signal": self.signal,
            "evidence": self.evidence,
            "at": self.at.isoformat(),
            "cell": None if self.cell is None else self.cell.as_dict(),
            "text": str(self),
        }

    def _memory(self) -> str:
        limit, peak = self.evidence.get("limit_mb"), self.evidence.get("peak_mb")
        if limit is None:
            return ""
        return f" (limit {limit} MiB, peak {peak} MiB)" if peak is not None else f" (limit {limit} MiB)"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:g} minutes" if seconds >= 120 else f"{seconds:g} s"


def _signal_name(number: int | None) -> str:
    if number is None:
        return "unknown"
    try:
        return f"{number} ({signals.Signals(number).name})"
    except ValueError:
        return str(number)
