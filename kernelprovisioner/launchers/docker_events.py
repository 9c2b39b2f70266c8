"""EventWatch: the engine's events, read in a thread of its own that reconnects."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from docker.errors import DockerException
from requests.exceptions import RequestException

Event = dict[str, Any]

ACTIONS = ("oom", "kill", "die", "destroy")

_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 5.0
_STOP_SECONDS = 10.0

log = logging.getLogger(__name__)


class EventWatch:
    """Hands each event of the containers with one label to `on_event`, and tells `on_connected` at each connection.

    Both are called on the loop. What happened while there was no connection is asked for again, as far as the engine
    remembers it; `on_connected` is the time to compare with its list of containers.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        label: str,
        on_event: Callable[[Event], None],
        on_connected: Callable[[], None],
    ) -> None:
        self._connect = connect
        self._label = label
        self._on_event = on_event
        self._on_connected = on_connected
        self._loop = asyncio.get_running_loop()
        self._stopping = threading.Event()
        self._connected = asyncio.Event()
        self._stream: Any = None
        self._seen_nanoseconds = 0
        self._thread = threading.Thread(target=self._run, name="samovar-engine-events", daemon=True)

    async def start(self, timeout: float) -> None:
        """Start the thread; returns once the first connection stands. Raises TimeoutError."""
        self._thread.start()
        async with asyncio.timeout(timeout):
            await self._connected.wait()

    async def stop(self) -> None:
        """End the connection and the thread. Raises TimeoutError where it does not end."""
        self._stopping.set()
        async with asyncio.timeout(_STOP_SECONDS):
            # Again and again: the thread may be between two connections when it is asked.
            while self._thread.is_alive():
                self._close_stream()
                await asyncio.sleep(0.01)

    def _close_stream(self) -> None:
        stream = self._stream
        if stream is not None:
            # AttributeError: the stream has just ended by itself, and its socket with it.
            with contextlib.suppress(OSError, AttributeError, DockerException):
                stream.close()

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                self._follow()
            except (DockerException, RequestException, OSError, ValueError) as error:
                # ValueError: the stream was closed, or broke off, in the middle of an event.
                if not self._stopping.is_set():
                    log.warning("lost the container engine's events, connecting again: %s", error)
            pause = _FIRST_PAUSE if time.monotonic() - started > _LONGEST_PAUSE else min(pause * 2, _LONGEST_PAUSE)
            self._stopping.wait(pause)

    def _follow(self) -> None:
        client = self._connect()
        try:
            since = f"{self._seen_nanoseconds // 10**9}.{self._seen_nanoseconds % 10**9:09d}"
            filters = {"type": "container", "label": self._label, "event": list(ACTIONS)}
            self._stream = client.events(since=since if self._seen_nanoseconds else None, filters=filters, decode=True)
            self._post(self._tell_connected)
            for event in self._stream:
                at = int(event.get("timeNano", 0))
                if at > self._seen_nanoseconds:
                    self._seen_nanoseconds = at
                    self._post(self._on_event, event)
        finally:
            self._stream = None
            client.close()

    def _tell_connected(self) -> None:
        self._connected.set()
        self._on_connected()

    def _post(self, callback: Callable[..., None], *arguments: Any) -> None:
        # RuntimeError: the loop has been closed, nobody listens any more.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *arguments)
