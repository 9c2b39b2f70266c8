"""What an ended container or process says about why it ended: pure decisions."""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit

_SIGNAL_BASE = 128
_LAST_SIGNAL = 64


#: a signal from outside explains a death that comes within this time (`docker stop` waits 10 s)
_SIGNAL_SECONDS = 15.0
_ALIVE = ("created", "running", "paused", "restarting")
#: exit codes of containers that an engine took with it: SIGKILL, SIGTERM, and what it writes after its own crash
_ENGINE_CODES = {137: signal.SIGKILL, 143: signal.SIGTERM, 255: signal.SIGKILL}
#: what an engine sends to end a container
_ENGINE_SIGNALS = (signal.SIGKILL, signal.SIGTERM)


@dataclass
class Evidence:
    """What the engine told about one container so far."""

    oom_events: int = 0
    #: when the last of them came (monotonic seconds)
    oom_at: float = -math.inf
    #: the last signal that somebody sent from outside, and when (monotonic seconds)
    engine_signal: int | None = None
    signal_at: float = 0.0
    #: PID 1's exit code, once it ended
    exit_code: int | None = None
    ended: bool = False
    #: the engine was restarted while it ran, and nobody has seen it run since
    engine_restarted: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def conclusive(self) -> bool:
        """Whether waiting for further events could not change the verdict."""
        # The engine tells that it sent a signal after it did so, sometimes later than the end that this brought.
        killed = signal_of(self.exit_code) in _ENGINE_SIGNALS
        return not killed or self.oom_events > 0 or self.engine_signal is not None

    def add_event(self, action: str, attributes: Mapping[str, str], now: float) -> None:
        """Take one event of the engine in: oom, kill, die or destroy."""
        match action:
            case "oom":
                self.oom_events, self.oom_at = self.oom_events + 1, now
            case "kill":
                self.engine_signal, self.signal_at = int(attributes.get("signal", 0)), now
            case "die":
                self.exit_code = int(attributes.get("exitCode", 0))
                if now - self.signal_at > _SIGNAL_SECONDS:
                    self.engine_signal = None
                self.ended = True
            case "destroy":
                self.ended = True

    def add_state(self, state: Mapping[str, Any]) -> None:
        """Take in how the engine lists the container when events may have been lost; empty: it does not list it."""
        if state.get("Status") in _ALIVE:
            self.engine_restarted = False
            return
        self.exit_code = state.get("ExitCode")
        self.ended = True
        if state.get("OOMKilled"):
            self.oom_events += 1
        elif self.exit_code in _ENGINE_CODES:
            self.engine_signal = _ENGINE_CODES[self.exit_code]

    def verdict(self) -> SandboxExit:
        """Return why the container ended."""
        code = self.exit_code
        killed = signal_of(code)
        ended_by_engine = self.engine_signal is not None or code is None or code in _ENGINE_CODES
        if self.engine_restarted and ended_by_engine and not self.oom_events:
            return SandboxExit(ExitCause.ENGINE, code, killed, self.more)
        if self.engine_signal is not None:
            return SandboxExit(ExitCause.REMOVED, code, self.engine_signal, self.more)
        if self.oom_events and killed == signal.SIGKILL:
            return SandboxExit(ExitCause.OUT_OF_MEMORY, code, killed, self.more)
        if code is None:
            return SandboxExit(ExitCause.REMOVED, None, None, self.more)
        return exit_of_code(code, self.more)


def signal_of(code: int | None) -> int | None:
    """Return the signal that an exit code stands for (128 + signal), or None."""
    if code is not None and _SIGNAL_BASE < code <= _SIGNAL_BASE + _LAST_SIGNAL:
        return code - _SIGNAL_BASE
    return None


def exit_of_code(code: int, evidence: dict[str, Any] | None = None) -> SandboxExit:
    """Return what a supervisor's exit code says of its kernel; negative codes are signals, as in `subprocess`."""
    evidence = {} if evidence is None else evidence
    killed = -code if code < 0 else signal_of(code)
    if killed is not None:
        return SandboxExit(ExitCause.SIGNAL, None, killed, evidence)
    return SandboxExit(ExitCause.EXITED, code, None, evidence)
