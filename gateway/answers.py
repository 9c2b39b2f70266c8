"""Answers: what was answered and not yet taken, bounded over all clients, and waited for by a drain."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

#: Bytes of all answers that clients have not taken yet; past it whoever has been taking one longest is hung up on.
MAX_UNTAKEN_BYTES = 256 * 1024 * 1024
#: Seconds that a client may take for one answer.
TAKING_SECONDS = 120.0
_log = logging.getLogger(__name__)


class Answers:
    """The answers on their way out. A client that reads slowly costs itself its answer, not the gateway its memory."""

    def __init__(self, max_bytes: int = MAX_UNTAKEN_BYTES, seconds: float = TAKING_SECONDS) -> None:
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._bytes = 0
        # In the order in which they were given; the size of each, and how to hang up on its client.
        self._untaken: dict[asyncio.Future[None], tuple[int, Callable[[], None]]] = {}

    def add(self, taken: asyncio.Future[None], size: int, hang_up: Callable[[], None]) -> None:
        """Watch an answer of `size` bytes until `taken` is done, which `hang_up` makes it."""
        if taken.done():
            return
        self._untaken[taken] = size, hang_up
        self._bytes += size
        deadline = asyncio.get_running_loop().call_later(self._seconds, self._too_slow, taken)

        def done(_: asyncio.Future[None]) -> None:
            deadline.cancel()
            self._forget(taken)

        taken.add_done_callback(done)
        while self._bytes > self._max_bytes:
            self._too_slow(next(iter(self._untaken)))

    async def taken(self, timeout: float) -> None:
        """Wait until all answers that were given are taken; at most `timeout` seconds."""
        if self._untaken:
            await asyncio.wait(list(self._untaken), timeout=timeout)

    def _too_slow(self, taken: asyncio.Future[None]) -> None:
        _, hang_up = self._untaken[taken]
        # At once: closing a connection settles `taken` only later.
        self._forget(taken)
        _log.warning("a client that did not take its answer was hung up on")
        hang_up()

    def _forget(self, taken: asyncio.Future[None]) -> None:
        size, _ = self._untaken.pop(taken, (0, None))
        self._bytes -= size
