"""Waiting with an end that somebody else sets: what a stop does about an engine that may never answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any


async def all_done(work: Iterable[asyncio.Future[Any]], give_up: asyncio.Event | None) -> bool:
    """Wait until all of `work` is done, or until `give_up` is set; return whether it is done. Nothing is cancelled."""
    pending = set(work)
    if give_up is None:
        if pending:
            await asyncio.wait(pending)
        return True
    # Made after the work, so that each task has taken its first step even if it is given up at once.
    giving_up = asyncio.create_task(give_up.wait(), name="wait until given up")
    try:
        while pending and not giving_up.done():
            await asyncio.wait({*pending, giving_up}, return_when=asyncio.FIRST_COMPLETED)
            pending = {each for each in pending if not each.done()}
    finally:
        giving_up.cancel()
        await asyncio.gather(giving_up, return_exceptions=True)
    return not pending


async def end(work: set[asyncio.Task[None]]) -> None:
    """Cancel tasks until all have ended. `work` is the living set, from which a task that is done discards itself."""
    while work:
        # Again and again: one that is cancelled may first see to what it has made, and that is cut short, too.
        for task in list(work):
            task.cancel()
        await asyncio.wait(list(work), timeout=0.1)
