"""The log of one chaos run: what was broken, asked and answered, one JSON line each."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path


class EventLog:
    """Threads write to it; times are seconds after its making."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.began = time.monotonic()
        self._lock = threading.Lock()
        self._file = path.open("w")
        self.violations: list[str] = []

    def write(self, event: str, **fields: object) -> None:
        line = json.dumps({"at": round(time.monotonic() - self.began, 3), "event": event, **fields}, default=str)
        with self._lock:
            self._file.write(line + "\n")
            self._file.flush()

    def violation(self, who: str, what: str) -> None:
        """Note what no injected fault explains: it fails the run in the end."""
        self.write("VIOLATION", who=who, what=what)
        with self._lock:
            self.violations.append(f"{time.monotonic() - self.began:.1f} s, {who}: {what}")

    def close(self) -> None:
        self._file.close()
