"""Pace: how many cells begin at the same moment, so that many at once do not slow each other down."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

#: A kernel hands each cell from thread to thread: with more of them than this per core, all wait for each other.
_PER_CORE = 2
#: After so many seconds a cell is no small one, and the next may begin beside it.
_SMALL_SECONDS = 0.02


class Pace:
    """Lets cells begin in order of arrival, `width` at once. Each keeps its place until its end, or for `small` s.

    So whoever is the n-th in line waits for n · small / width seconds at most.
    """

    def __init__(self, width: int | None = None, *, small: float = _SMALL_SECONDS) -> None:
        """`width`: None for what the processors of this machine are good for."""
        self._free = width or _PER_CORE * len(os.sched_getaffinity(0))
        self._small = small
        self._line: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a place, and have it until the end of the block or of the time that a small cell takes."""
        if self._free:
            self._free -= 1
        else:
            await self._in_line()
        kept = True

        def give_back() -> None:
            nonlocal kept
            if kept:
                kept = False
                self._next()

        overdue = asyncio.get_running_loop().call_later(self._small, give_back)
        try:
            yield
        finally:
            overdue.cancel()
            give_back()

    async def _in_line(self) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._next()  # it was this one's turn just now
            raise

    def _next(self) -> None:
        """A place is free: the first in line gets it."""
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
