"""LargeFrames: how many bytes of large messages may be on their way at once, over all kernels."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

#: All clients' large messages together.
LIMIT_BYTES = 256 * 1024 * 1024
#: Where somebody waits, who has not taken a message within so many seconds is cut off.
PATIENCE_SECONDS = 30.0


@dataclass(eq=False)
class Sending:
    """A message that has its room."""

    size: int
    since: float
    cut: Callable[[], None]


class LargeFrames:
    """Room for large messages, in order of arrival. One that is larger than all the room goes alone."""

    def __init__(self, limit: int = LIMIT_BYTES, patience: float = PATIENCE_SECONDS) -> None:
        #: bytes that are on their way
        self.used = 0
        self._limit = limit
        self._patience = patience
        #: oldest first
        self._sending: dict[Sending, None] = {}
        #: held by the first of the line
        self._first = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def room(self, size: int, cut: Callable[[], None]) -> AsyncIterator[None]:
        """Wait for room, and have it until the message has left; see `take`."""
        sending = await self.take(size, cut)
        try:
            yield
        finally:
            self.give_back(sending)

    async def take(self, size: int, cut: Callable[[], None]) -> Sending:
        """Wait for room, and have it until it is given back.

        `cut` is called where others wait and it takes too long; who is cut leaves.
        """
        loop = asyncio.get_running_loop()
        async with self._first:
            while self.used and self.used + size > self._limit:
                self._freed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._patience / 4):
                        await self._freed.wait()
                oldest = next(iter(self._sending), None)
                if oldest is not None and loop.time() - oldest.since > self._patience:
                    oldest.cut()
            self.used += size
        sending = Sending(size, loop.time(), cut)
        self._sending[sending] = None
        return sending

    def give_back(self, sending: Sending) -> None:
        """The message has left, or never will."""
        self.used -= sending.size
        del self._sending[sending]
        self._freed.set()
