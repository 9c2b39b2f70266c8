"""EngineCalls: blocking calls to the engine, in a bounded number of threads, and how long they take."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from kernelprovisioner.launchers.engine_state import EngineState

T = TypeVar("T")
_log = logging.getLogger(__name__)


class EngineCalls:
    """Runs calls to one engine from `start()` to `stop()`, and notes in `state` which of them it has not answered."""

    def __init__(self) -> None:
        self.state = EngineState()
        self._threads: ThreadPoolExecutor | None = None
        self._url = ""

    def start(self, url: str, threads: int) -> None:
        """Be ready for calls, so many at once; `url` is named in the log where one takes long."""
        self._url = url
        self._threads = ThreadPoolExecutor(threads, "samovar-engine")

    def stop(self) -> None:
        """Begin no more calls. Those that the engine does not answer are not waited for. May be called again."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return what the blocking `function` returns. Raises RuntimeError before `start()` and after `stop()`."""
        if self._threads is None:
            raise RuntimeError("the docker launcher is not started")
        work = functools.partial(self._timed, function, *arguments)
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _timed(self, function: Callable[..., T], *arguments: Any) -> T:
        # From when a thread has it: one that waits for a thread says nothing of the engine.
        self.state.began(time.monotonic())
        try:
            return function(*arguments)
        finally:
            took = self.state.ended(time.monotonic())
            if took is not None:
                _log.warning("the container engine at %s is slow: a call took %.1f s", self._url, took)
