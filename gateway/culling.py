"""Culling: kernels that nobody uses for long are shut down, by the rules that Jupyter users know."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Generic, Protocol, TypeVar


@dataclass(frozen=True)
class CullBounds:
    """Seconds without activity after which a kernel is shut down (0: never), and how often that is looked at.

    `connected`, `busy`: whether kernels with open connections, or with a running cell, are shut down, too.
    """

    idle_timeout: float = 0.0
    interval: float = 300.0
    connected: bool = False
    busy: bool = False


class Culled(Protocol):
    """What culling looks at: a kernel."""

    @property
    def execution_state(self) -> str: ...

    @property
    def last_activity(self) -> datetime: ...

    @property
    def connections(self) -> int: ...


KernelT = TypeVar("KernelT", bound=Culled)


class Culling(Generic[KernelT]):
    """Looks at all kernels every so often; `cull` is called for each that is overdue."""

    def __init__(
        self, bounds: CullBounds, kernels: Callable[[], Iterable[KernelT]], cull: Callable[[KernelT], None]
    ) -> None:
        self._bounds = bounds
        self._kernels = kernels
        self._cull = cull
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Look from now on, unless nothing is ever overdue."""
        if self._bounds.idle_timeout > 0:
            interval = min(self._bounds.interval, self._bounds.idle_timeout)
            self._timer = asyncio.get_running_loop().call_later(interval, self._look)

    def stop(self) -> None:
        """Look no more. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self.start()
        for kernel in overdue(self._kernels(), self._bounds, datetime.now(UTC)):
            self._cull(kernel)


def overdue(kernels: Iterable[KernelT], bounds: CullBounds, now: datetime) -> list[KernelT]:
    """Return the kernels that have not been used for as long as `bounds` allow, at `now` (UTC)."""
    latest = now - timedelta(seconds=bounds.idle_timeout)
    states = ("idle", "busy") if bounds.busy else ("idle",)
    return [
        kernel
        for kernel in kernels
        if bounds.idle_timeout > 0
        and kernel.last_activity <= latest
        and kernel.execution_state in states
        and (bounds.connected or not kernel.connections)
    ]
