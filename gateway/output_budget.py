"""OutputBudget: what the output logs of all kernels may hold together, and the threads that carry it to the disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

_THREADS = 4

T = TypeVar("T")


class Holder(Protocol):
    """What a budget asks of a log. Each method gives up the oldest that is there; False: there is nothing to give."""

    #: bytes that are kept in memory, that wait there to be written, that are on disk
    kept: int
    queued: int
    on_disk: int

    def spill_oldest(self) -> bool: ...
    def lose_oldest_queued(self) -> bool: ...
    def lose_oldest_file(self) -> bool: ...
    def close(self) -> None: ...


class OutputBudget:
    """Past its bounds the log that holds most gives up first: one kernel's flood costs no other kernel its replay."""

    def __init__(self, *, memory_bytes: int, disk_bytes: int) -> None:
        """Half of `memory_bytes` is for what is kept, half for what waits to be written.

        Each log may have what it writes at the moment beside that, at most half of its own memory, and an open chunk.
        """
        self._memory_bytes = memory_bytes
        self._disk_bytes = disk_bytes
        self.holders: set[Holder] = set()
        self.kept = 0
        self.queued = 0
        self.on_disk = 0
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="output log")

    def settle(self) -> None:
        """Have logs give up until all bounds hold."""
        if self.kept > self._memory_bytes // 2:
            # Some more at once: each way to another thread costs as much as the writing of a chunk.
            while self.kept > self._memory_bytes * 3 // 8:
                if not max(self.holders, key=lambda holder: holder.kept).spill_oldest():
                    break
        while self.queued > self._memory_bytes // 2:
            if not max(self.holders, key=lambda holder: holder.queued).lose_oldest_queued():
                break
        while self.on_disk > self._disk_bytes:
            if not max(self.holders, key=lambda holder: holder.on_disk).lose_oldest_file():
                break

    async def run(self, call: Callable[[], T]) -> T:
        """Return what it returns in one of the budget's threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def submit(self, call: Callable[[], None]) -> None:
        """Have it called in one of the budget's threads, and wait for nothing."""
        self._threads.submit(call)

    def close(self) -> None:
        """Close every log, and end the threads once they have done what they were given."""
        for holder in list(self.holders):
            holder.close()
        self._threads.shutdown(wait=False)
