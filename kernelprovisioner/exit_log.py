"""ExitLog: how many sandboxes ended by which cause, the last of them in full, and one line in the log for each."""

from __future__ import annotations

import logging
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit

#: How many exits are kept in full.
KEPT = 100

_log = logging.getLogger(__name__)
#: Ends that somebody asked for, or that our own rules brought about: no reason to worry.
_ORDERLY = frozenset({ExitCause.REQUESTED, ExitCause.EVICTED, ExitCause.IDLE, ExitCause.GATEWAY, ExitCause.EXITED})


@dataclass(frozen=True)
class ExitEntry:
    """One sandbox's end. `session`: the kernel id that it was claimed for, "" for one that was never claimed."""

    sandbox_id: str
    image: str
    session: str
    exit: SandboxExit

    def as_dict(self) -> dict[str, Any]:
        """Return the entry for a JSON answer, and for the fields of its line in the log."""
        return {"sandbox": self.sandbox_id, "session": self.session, "image": self.image, **self.exit.as_dict()}


class ExitLog:
    """All exits of one gateway. A pool that thins out its own warm sandboxes is no news: that is not counted."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, ExitCause]] = Counter()
        self._last: deque[ExitEntry] = deque(maxlen=KEPT)

    def add(self, entry: ExitEntry) -> None:
        """Count and keep an exit, and write its line."""
        exit_ = entry.exit
        if not entry.session and exit_.cause is ExitCause.REQUESTED:
            return
        self._counts[entry.image, exit_.cause] += 1
        self._last.append(entry)
        level = logging.INFO if exit_.cause in _ORDERLY else logging.WARNING
        reason = exit_.evidence.get("reason")
        _log.log(
            level,
            "sandbox %s of %s ended%s: %s%s",
            entry.sandbox_id,
            entry.image,
            "" if exit_.cell is None else f" while cell {exit_.cell.execution_count or exit_.cell.msg_id} ran",
            exit_,
            f" ({reason})" if reason and str(reason) not in str(exit_) else "",
            extra={"fields": {"event": "exit", **entry.as_dict()}},
        )

    def add_failed_start(self, image: str) -> None:
        """Count a sandbox that never became warm; whoever started it tells why."""
        self._counts[image, ExitCause.START_FAILED] += 1

    def counts(self, image: str | None = None) -> dict[str, int]:
        """How many ended, by cause; of one image or of all. Causes that never came are left out."""
        found: Counter[str] = Counter()
        for (name, cause), count in self._counts.items():
            if image in (None, name):
                found[cause.value] += count
        return dict(found)

    def last(self, count: int) -> list[ExitEntry]:
        """The last exits, the newest first; failed starts are not among them."""
        return list(reversed(self._last))[:count]
