"""Keeper: looks after the warm sandboxes of one pool: do they answer, are they of today's template, what time is it.

What comes of it is PoolState's to decide; here is the asking, at its times and with its deadlines.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from kernelprovisioner import schedule
from kernelprovisioner.images import KernelImage
from kernelprovisioner.launchers.base import LaunchError
from kernelprovisioner.pool_events import Event, Scheduled, TemplateIs, Tick
from kernelprovisioner.sandbox import ProbeError, Sandbox

_TICK_SECONDS = 2.0
_TEMPLATE_SECONDS = 30.0
_PROBE_TIMEOUT = 5.0
#: One missed answer may be this process's fault: it was stopped, or the machine has more to do than it can.
_PROBE_TRIES = 2
#: Probes under way at once: each wakes a kernel, and those at work come first.
_PROBES = 4

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Upkeep:
    """How a pool looks after itself. Times in seconds.

    `hit_rate`: the share of claims that are to meet a warm sandbox (0: as many as `min` and the schedule say);
    `schedule`: more of them at certain times; `max_age`: an older warm one is replaced; `probe_interval`: pause between
    two probes of each warm one.
    """

    hit_rate: float = 0.95
    schedule: Sequence[schedule.Entry] = ()
    max_age: float = 12 * 3600.0
    probe_interval: float = 15.0


class Kept(Protocol):
    """What a keeper looks after: a pool."""

    @property
    def image(self) -> KernelImage: ...

    @property
    def warm(self) -> Sequence[Sandbox]:
        """The sandboxes that wait to be claimed."""

    @property
    def refill_seconds(self) -> float:
        """The time that each of many sandboxes takes to start."""

    def tell(self, event: Event) -> None:
        """Tell the pool's state what happened."""

    def failed_probe(self, sandbox: Sandbox, reason: str) -> None:
        """A warm sandbox does not answer."""


class Keeper:
    """Owns the tasks that look after one pool, from `start` to `stop`."""

    def __init__(
        self,
        pool: Kept,
        upkeep: Upkeep,
        template: Callable[[KernelImage], Awaitable[str | None]],
        now: Callable[[], datetime],
    ) -> None:
        """`template`: as Launcher has it. `now`: the local time that schedules mean."""
        self._pool = pool
        self._upkeep = upkeep
        self._template = template
        self._now = now
        self._look = asyncio.Event()
        self._probing = asyncio.Semaphore(_PROBES)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin; the template is looked at, and time told, at once."""
        upkeep = self._upkeep
        self._tasks = [
            asyncio.create_task(self._again(self._tell_time, _TICK_SECONDS)),
            asyncio.create_task(self._again(self._tell_template, _TEMPLATE_SECONDS, self._look)),
            asyncio.create_task(self._again(self._probe_all, upkeep.probe_interval)),
        ]

    async def stop(self) -> None:
        """End all tasks. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def look_again(self) -> None:
        """The engine was away: it may have other images now."""
        self._look.set()

    async def _again(
        self, work: Callable[[], Awaitable[None]], pause: float, sooner: asyncio.Event | None = None
    ) -> None:
        """Do `work` over and over, with `pause` seconds between, or as soon as `sooner` is set."""
        sooner = sooner or asyncio.Event()
        while True:
            sooner.clear()
            try:
                await work()
            except Exception:
                # The next round may go well, and the pool needs all of them.
                _log.exception("pool %s: looking after it failed", self._pool.image.name)
            try:
                async with asyncio.timeout(pause):
                    await sooner.wait()
            except TimeoutError:
                continue

    async def _tell_time(self) -> None:
        name, now = self._pool.image.name, self._now()
        period = schedule.holding(self._upkeep.schedule, name, now, self._pool.refill_seconds)
        if period is None:
            self._pool.tell(Scheduled(0))
        else:
            since = asyncio.get_running_loop().time() - (now - period.begin).total_seconds()
            self._pool.tell(Scheduled(period.entry.count, since, str(period.entry)))
        self._pool.tell(Tick())

    async def _tell_template(self) -> None:
        try:
            template = await self._template(self._pool.image)
        except LaunchError as error:
            # Starts fail for the same reason, and say so.
            _log.debug("pool %s: the template cannot be told: %s", self._pool.image.name, error)
            return
        if template is not None:
            self._pool.tell(TemplateIs(template))

    async def _probe_all(self) -> None:
        await asyncio.gather(*map(self._probe, self._pool.warm))

    async def _probe(self, sandbox: Sandbox) -> None:
        async with self._probing:
            reason = ""
            for _ in range(_PROBE_TRIES):
                if sandbox not in self._pool.warm:
                    return  # claimed or gone meanwhile
                try:
                    await sandbox.probe(timeout=_PROBE_TIMEOUT)
                    return
                except ProbeError as error:
                    reason = str(error)
            self._pool.failed_probe(sandbox, reason)
