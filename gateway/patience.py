"""Patience: how long a stop waits for removals that an engine which is away never confirms."""

from __future__ import annotations

import asyncio
from contextlib import suppress

#: From the end of the drain on.
REMOVAL_SECONDS = 10.0
#: From a second Ctrl-C on: long enough for an engine, or a process, that ends at once.
HURRIED_SECONDS = 3.0


class Patience:
    """Sets `over` some time after `begin`, and soon after `hurry` is set."""

    def __init__(self, hurry: asyncio.Event) -> None:
        self.over = asyncio.Event()
        self._hurry = hurry
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """The time counts from the first call on."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="patience")

    async def end(self) -> None:
        """Nobody waits any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(REMOVAL_SECONDS):
                await self._hurry.wait()
                await asyncio.sleep(HURRIED_SECONDS)
        self.over.set()
