"""Bounds on kernels: how often they are started again, how much of their output is kept."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LifeBounds:
    """How often in a row a kernel that died is restarted by itself."""

    restarts: int = 5


@dataclass(frozen=True)
class OutputBounds:
    """Bytes of output that are kept for clients that are slow or away: of each kernel, and of all together."""

    memory: int
    disk: int
    all_memory: int
    all_disk: int
