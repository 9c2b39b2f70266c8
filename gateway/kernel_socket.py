"""The client's end of a kernel's websocket: it outlives cuts, and what a cut took comes again, once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.httputil import HTTPHeaders
from tornado.iostream import StreamClosedError
from tornado.websocket import WebSocketClientConnection, WebSocketClosedError, WebSocketError

#: bytes of one message; Tornado's client connections have no room for more
MAX_MESSAGE = 100 * 2**20
#: bytes that wait for a connection before no more are taken
MAX_UNSENT = 64 * 2**20
#: close codes: the kernel is gone; the gateway went, refused or was never there
KERNEL_GONE = 4410
REFUSED = 1008
UNREACHABLE = 1011
#: no close frame came
CUT = 1006
#: what ends a connection, but not what it was for
_CUTS = frozenset({1001, CUT, UNREACHABLE, 1012, 1013, 1014})
#: what a proxy answers while the gateway behind it starts
_NOT_YET = frozenset({502, 503, 504, 599})
#: the gateway pings every 25 s; after so long without a sign of it, the connection is dead
_SILENCE = 75.0
#: seconds that the gateway has to answer a close frame
_CLOSING = 1.0
#: frames since the last numbered ping that are remembered; a gateway pings far more often
_MAX_REMEMBERED = 4096

_log = logging.getLogger(__name__)


class SocketFullError(Exception):
    """Too much waits for a connection to the gateway."""


@dataclass(frozen=True)
class End:
    """Why there will be no further connection: a websocket close code and its reason."""

    code: int
    reason: str


@dataclass(frozen=True)
class Retries:
    """How often and how long apart (seconds, doubled each time) a connection is tried again."""

    attempts: int = 18
    first: float = 0.2
    longest: float = 1.0

    def delay(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row, up to a half more at random: clients come back apart."""
        return float(min(self.first * 2**failures, self.longest)) * random.uniform(1.0, 1.5)


class KernelSocket:
    """Frames of one client session, over as many connections as it takes.

    `request` makes the websocket request for a position: what a numbered ping of the gateway said last, "" = none.
    `deliver` gets each frame once and in order; the next one is read when it is done. `numbered` gets the payloads
    of numbered pings, in order with the frames.
    """

    def __init__(
        self,
        request: Callable[[str], HTTPRequest],
        subprotocol: str,
        deliver: Callable[[str | bytes], Awaitable[None]],
        *,
        numbered: Callable[[bytes], None] = lambda _: None,
        position: str = "",
        retries: Retries | None = None,
    ) -> None:
        self.opened = asyncio.Event()
        self._request = request
        self._subprotocol = subprotocol
        self._deliver = deliver
        self._numbered = numbered
        self._position = position
        self._retries = retries or Retries()
        self._seen: dict[int, None] = {}
        self._unsent: deque[str | bytes] = deque()
        self._unsent_bytes = 0
        self._work = asyncio.Event()

    def send(self, frame: str | bytes) -> None:
        """Send a frame, now or over the next connection. Raises SocketFullError."""
        if self._unsent_bytes > MAX_UNSENT:
            raise SocketFullError(f"more than {MAX_UNSENT >> 20} MiB wait to be sent to the gateway")
        self._unsent.append(frame)
        self._unsent_bytes += len(frame)
        self._work.set()

    async def run(self) -> End:
        """Connect, and again after each cut, until the gateway ends it or cannot be reached; cancel it to close.

        Raises what `deliver` raises.
        """
        failures = 0
        while True:
            end, heard = await self._one_connection()
            if end.code not in _CUTS:
                return end
            failures = 0 if heard else failures
            if failures == self._retries.attempts:
                return End(UNREACHABLE, end.reason or "the connection to the gateway was cut again and again")
            delay = self._retries.delay(failures)
            _log.info("connection to the gateway lost (%s); trying again in %.1f s", end.reason or "cut", delay)
            await asyncio.sleep(delay)
            failures += 1

    async def _one_connection(self) -> tuple[End, bool]:
        """One connection from its start to its end, and whether anything came over it."""
        connection = _Connection(self._request(self._position), self._subprotocol, self)
        try:
            await asyncio.wait({connection.connect_future})
            connection.connect_future.result()
            if (connection.selected_subprotocol or "") != self._subprotocol:
                return End(REFUSED, f"the gateway does not speak {self._subprotocol}"), False
            self.opened.set()
            await self._until_one_ends(connection)
            return End(connection.close_code or CUT, connection.close_reason or ""), connection.heard
        except HTTPClientError as error:
            return _refusal(error), False
        except (OSError, StreamClosedError, WebSocketError) as error:
            return End(UNREACHABLE, f"the gateway cannot be reached: {error}"), False
        finally:
            await connection.wind_up()

    async def _until_one_ends(self, connection: _Connection) -> None:
        """Send what is to be sent, until the connection ends."""
        works = (connection.ended.wait(), self._send(connection), _watch(connection))
        tasks = [asyncio.create_task(work) for work in works]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if connection.failure is not None:
                raise connection.failure
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def received(self, frame: str | bytes) -> None:
        """Deliver a frame, unless it came before a cut already."""
        key = hash(frame)
        if key in self._seen:
            return
        if len(self._seen) == _MAX_REMEMBERED:
            del self._seen[next(iter(self._seen))]
        self._seen[key] = None
        await self._deliver(frame)

    def pinged(self, payload: bytes, *, first: bool) -> None:
        """Note that all frames up to a number have come. `first`: nothing else has over this connection."""
        position = payload.decode("ascii", "replace")
        if position and position != self._position:
            self._position = position
            if not first:
                # The first ping of a connection says where it starts: what came since then may come again.
                self._seen.clear()
            self._numbered(payload)

    async def _send(self, connection: _Connection) -> None:
        """Send what is to be sent; return when the connection takes nothing more."""
        while True:
            while not self._unsent:
                self._work.clear()
                await self._work.wait()
            frame = self._unsent[0]
            try:
                written = asyncio.ensure_future(connection.write_message(frame, binary=isinstance(frame, bytes)))
            except WebSocketClosedError:
                return
            try:
                # wait() leaves it alone when this task is cancelled: what is not written goes over the next connection.
                await asyncio.wait({written})
            finally:
                if sent := _succeeded(written):
                    self._unsent.popleft()
                    self._unsent_bytes -= len(frame)
                else:
                    written.add_done_callback(_succeeded)
            if not sent:
                return


class _Connection(WebSocketClientConnection):
    """Tornado's, with two differences: a frame is read when the one before it is done, and pings are told in order."""

    def __init__(self, request: HTTPRequest, subprotocol: str, socket: KernelSocket) -> None:
        self.ended = asyncio.Event()
        self.heard = False
        #: has been told where it starts
        self.placed = False
        self.last_sign = asyncio.get_running_loop().time()
        self.delivery: asyncio.Task[None] | None = None
        self.failure: Exception | None = None
        self._socket = socket
        request.headers = HTTPHeaders(request.headers)
        super().__init__(request, max_message_size=MAX_MESSAGE, subprotocols=[subprotocol] if subprotocol else None)

    async def on_message(self, message: str | bytes) -> None:
        """Hand a frame on; Tornado reads the next one when this is done."""
        self._sign()
        self.delivery = asyncio.current_task()
        try:
            await self._socket.received(message)
        except Exception as error:
            # Tornado would only log it.
            self.failure = error
            self.ended.set()
        finally:
            self.delivery = None
            self._sign()

    def on_ping(self, data: bytes) -> None:
        """Tornado has answered it; all frames before it are delivered."""
        self._sign()
        self._socket.pinged(data, first=not self.placed)
        self.placed = True

    def on_ws_connection_close(self, close_code: int | None = None, close_reason: str | None = None) -> None:
        """Nothing comes any more."""
        super().on_ws_connection_close(close_code, close_reason)
        self.ended.set()

    async def wind_up(self) -> None:
        """Close it, in order where the gateway answers at once. Idempotent."""
        connected = _succeeded(self.connect_future)
        if connected and not self.ended.is_set():
            self.close()
            if self.delivery is not None:
                self.delivery.cancel()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.ended.wait(), _CLOSING)
        self.close()
        # An attempt that is still under way ends when it sees this.
        self.final_callback = None  # type: ignore[assignment]
        if stream := getattr(self, "stream", None):
            stream.close()
        if not connected:
            self.connect_future.add_done_callback(_succeeded)

    def _sign(self) -> None:
        self.heard = True
        self.last_sign = asyncio.get_running_loop().time()


async def _watch(connection: _Connection) -> None:
    """Return when nothing comes over a connection any more. While we ourselves do not read, nothing can."""
    loop = asyncio.get_running_loop()
    while True:
        left = connection.last_sign + _SILENCE - loop.time()
        if left <= 0 and connection.delivery is None:
            return
        await asyncio.sleep(max(1.0, left))


def _succeeded(future: asyncio.Future[Any]) -> bool:
    """Whether it is done without an error; an error counts as seen then."""
    return future.done() and not future.cancelled() and future.exception() is None


def _refusal(error: HTTPClientError) -> End:
    """What an HTTP answer to the websocket's request means."""
    text = f"the gateway answered {error.code} {error.message}"
    if error.response is not None:
        with contextlib.suppress(msgspec.MsgspecError):
            text = msgspec.json.decode(error.response.body, type=ErrorBody).message
    if error.code == 404:
        return End(KERNEL_GONE, text)
    return End(UNREACHABLE if error.code in _NOT_YET else REFUSED, text)


class ErrorBody(msgspec.Struct):
    """What Jupyter servers answer where something is wrong."""

    message: str
