"""EventWatch: the engine's events, read in a thread of its own that reconnects."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from docker.errors import DockerException
from requests.exceptions import RequestException

from kernelprovisioner.launchers.docker_engine import explain

Event = dict[str, Any]

#: `start` says nothing of an end: it makes sure that there is an event by which an engine is known again.
ACTIONS = ("start", "oom", "kill", "die", "destroy")

_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 2.0
_STOP_SECONDS = 10.0
#: Events of the same moment come in any order: a stream is taken up so much before the last event that was heard.
_OVERLAP_SECONDS = 1
#: how many of the last events are known again
_RECENT = 1000


class EventWatch:
    """Hands each event of the containers with one label to `on_event`; tells `on_connected` and `on_lost`.

    All are called on the loop. What happened while there was no connection is asked for again, as far as the engine
    remembers it. `on_connected` comes at each connection, before those events, and is the time to compare with its list
    of containers; it is told whether the engine was restarted meanwhile: then it has forgotten the last event that we
    know. `on_lost` comes at each connection that broke or could not be made, with the reason.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        label: str,
        on_event: Callable[[Event], None],
        on_connected: Callable[[bool], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._connect = connect
        self._label = label
        self._on_event = on_event
        self._on_connected = on_connected
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._stopping = threading.Event()
        self._connected = asyncio.Event()
        self._stream: Any = None
        self._seen_nanoseconds = 0
        self._recent: deque[tuple[Any, ...]] = deque(maxlen=_RECENT)
        self._was_connected = False
        self._was_refused = False
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
            reason = "it closed the stream of its events"
            try:
                self._follow()
            except (DockerException, RequestException, OSError, ValueError) as error:
                # ValueError: the stream was closed, or broke off, in the middle of an event.
                reason = explain(error)
                self._was_refused = True
            if not self._stopping.is_set():
                self._post(self._on_lost, reason)
            pause = _FIRST_PAUSE if time.monotonic() - started > _LONGEST_PAUSE else min(pause * 2, _LONGEST_PAUSE)
            self._stopping.wait(pause)

    def _follow(self) -> None:
        client = self._connect()
        try:
            filters = {"type": "container", "label": self._label, "event": list(ACTIONS)}
            restarted = self._was_connected and self._was_restarted(client, filters)
            since = _timestamp(self._seen_nanoseconds - _OVERLAP_SECONDS * 10**9) if self._seen_nanoseconds else None
            self._stream = client.events(since=since, filters=filters, decode=True)
            self._was_connected, self._was_refused = True, False
            self._post(self._tell_connected, restarted)
            for event in self._stream:
                at = int(event.get("timeNano", 0))
                key = (at, event.get("Action"), event.get("Actor", {}).get("ID"))
                if key not in self._recent:
                    self._recent.append(key)
                    self._seen_nanoseconds = max(self._seen_nanoseconds, at)
                    self._post(self._on_event, event)
        finally:
            self._stream = None
            client.close()

    def _was_restarted(self, client: Any, filters: dict[str, Any]) -> bool:
        """Whether the engine has forgotten the last event that we know; where we know none, whether it was away."""
        if not self._seen_nanoseconds:
            return self._was_refused
        # From then until then, by the engine's own clock: what it remembers comes, and the answer ends.
        last = _timestamp(self._seen_nanoseconds)
        found = client.events(since=last, until=last, filters=filters, decode=True)
        return all(int(event.get("timeNano", 0)) != self._seen_nanoseconds for event in found)

    def _tell_connected(self, restarted: bool) -> None:
        self._connected.set()
        self._on_connected(restarted)

    def _post(self, callback: Callable[..., None], *arguments: Any) -> None:
        # RuntimeError: the loop has been closed, nobody listens any more.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *arguments)


def _timestamp(nanoseconds: int) -> str:
    """Seconds since the epoch as the engine reads them."""
    return f"{nanoseconds // 10**9}.{nanoseconds % 10**9:09d}"
