"""Usage: what a kernel process and its container have used, from /proc and the container's control group.

Standard library only: the supervisor imports this module as PID 1.
"""

from __future__ import annotations

import os
from typing import Any

_PEAK_FILES = ("/sys/fs/cgroup/memory.peak", "/sys/fs/cgroup/memory/memory.max_usage_in_bytes")  # version 2, version 1
_OOM_FILES = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")


def read_usage(pid: int) -> dict[str, Any]:
    """Return rss (bytes) and cpu_seconds of process `pid`, memory_peak (bytes) and oom_kills of its container."""
    return {
        "rss": _rss(pid),
        "cpu_seconds": _cpu_seconds(pid),
        "memory_peak": _memory_peak(),
        "oom_kills": _oom_kills(),
    }


def _rss(pid: int) -> int:
    fields = _read(f"/proc/{pid}/statm").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else 0


def _cpu_seconds(pid: int) -> float:
    # the second field is the program's name, which may hold blanks and parentheses
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") if len(fields) > 14 else 0.0


def _memory_peak() -> int | None:
    for path in _PEAK_FILES:
        text = _read(path).strip()
        if text.isdigit():
            return int(text)
    return None


def _oom_kills() -> int | None:
    for path in _OOM_FILES:
        for line in _read(path).splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill" and value.isdigit():
                return int(value)
    return None


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
