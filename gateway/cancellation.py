"""Work that nobody waits for any more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from kernelprovisioner.wire import first_of

T = TypeVar("T")


class Cancelled(Exception):
    """The client went away while its request still waited; there is nobody to answer."""


class Closed(Exception):
    """Nothing more is begun; what waited is not going to get what it waits for."""


async def unless(
    cancelled: asyncio.Future[None], closed: asyncio.Future[None], work: Awaitable[T], timeout: float | None = None
) -> T:
    """Return what `work` returns.

    Raises Cancelled once `cancelled` is done, Closed once `closed` is, TimeoutError after `timeout` seconds. Work that
    succeeds at the same moment counts: what it got is not lost.
    """
    task = asyncio.ensure_future(work)
    try:
        await first_of(task, cancelled, closed, timeout=timeout)
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
    if not task.cancelled():
        return task.result()
    if cancelled.done():
        raise Cancelled
    if closed.done():
        raise Closed
    raise TimeoutError
