"""What an ended container or process says about why it ended: pure decisions."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import Any

from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit

_SIGNAL_BASE = 128
_LAST_SIGNAL = 64


@dataclass
class Evidence:
    """What the engine told about one container so far."""

    oom_events: int = 0
    #: the last signal that somebody sent from outside
    engine_signal: int | None = None
    #: PID 1's exit code, once it ended
    exit_code: int | None = None
    ended: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def conclusive(self) -> bool:
        """Whether waiting for further events could not change the verdict."""
        killed = self.exit_code == _SIGNAL_BASE + signal.SIGKILL
        return not killed or self.oom_events > 0 or self.engine_signal is not None

    def verdict(self) -> SandboxExit:
        """Return why the container ended."""
        code = self.exit_code
        killed = signal_of(code)
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
