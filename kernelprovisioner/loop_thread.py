"""LoopThread: an asyncio loop in a thread of its own, for work that outlives one call of a blocking manager."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs a loop until `stop`. The thread is a daemon: a process that forgets it can still end."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._stopped = False
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run `work` in the thread. Raises RuntimeError after `stop`."""
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:
            work.close()
            raise

    async def stop(self) -> None:
        """As `stop_and_wait`, from another loop and without blocking it."""
        self._ask_to_stop()
        await asyncio.wrap_future(self._ended)
        self._thread.join()  # it has only its last line left to run

    def stop_and_wait(self, timeout: float) -> None:
        """Cancel what still runs, end the thread and close the loop; waits for it at most `timeout` seconds."""
        self._ask_to_stop()
        self._thread.join(timeout)

    @property
    def stopped(self) -> bool:
        """Whether somebody has asked it to stop: it takes no more work."""
        return self._stopped

    def _ask_to_stop(self) -> None:
        self._stopped = True
        # Closed already: somebody else has stopped it.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            asyncio.set_event_loop(None)
            self._loop.close()
            self._ended.set_result(None)
