"""ClientChannel: one websocket of a kernel. It reads the kernel's output log at its own pace, from where it stands."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tornado.websocket import WebSocketClosedError

from gateway.large_frames import LargeFrames
from gateway.output_log import Entry, Gap, OutputLog
from gateway.websocket_frames import FrameError, encode, in_place_of, legacy_notice

if TYPE_CHECKING:
    from gateway.client_sessions import Epoch

#: A ping with the log's number goes out after so many bytes, or so many seconds after the first unconfirmed frame.
PING_BYTES = 64 * 1024
PING_SECONDS = 0.05
#: … and in any case so often; proxies cut what is silent for longer.
KEEP_ALIVE_SECONDS = 25.0
#: A client that takes nothing and says nothing for so long is gone; large messages may take longer, at such a rate.
SILENCE_SECONDS = 90.0
SLOWEST_BYTES = 256 * 1024
#: What is read from the log at once, and so what may wait in a websocket's buffer beside one large message.
BATCH_BYTES = 256 * 1024
#: A client may break on a message with buffers, or on one that is larger than this …
SUSPECT_BYTES = 1024 * 1024
#: … and gets a notice in its place after so many connections that ended with it.
MAX_STRIKES = 2

FAILED, AGAIN_LATER = 1011, 1013
#: Longer payloads of pings are not allowed, and so no number that we have sent.
_MAX_PONG = 125
_log = logging.getLogger(__name__)


class ClientSocket(Protocol):
    """What a websocket has to offer. `ping` and `close` return at once and never raise."""

    def write(self, frame: bytes | str) -> asyncio.Future[None]:
        """Send a frame; done when it has left. Raises WebSocketClosedError, at once or when awaited."""
        ...

    def ping(self, data: bytes = b"") -> None: ...

    def close(self, code: int | None = None, reason: str | None = None) -> None: ...


@dataclass(frozen=True)
class ClientForm:
    """How a client wants its messages. `kind`: one of websocket_frames.

    `fragile`: it breaks on binary and on large ones. `exact`: it counts what it gets, to say where to go on.
    """

    kind: str
    fragile: bool = False
    exact: bool = False


@dataclass(eq=False)
class ClientSession:
    """What outlives a websocket of one client: who it is to the kernel, and what it has got.

    `position`: all up to this number of the log has been acknowledged; `sent`: it was sent. `last_cell`: the header of
    its last execute_request. `suspect`: the number of a message that was not acknowledged when a connection ended,
    `strikes` connections in a row.
    """

    tag: bytes
    position: int
    sent: int = 0
    client: ClientChannel | None = None
    last_cell: bytes | None = None
    gone_at: float = 0.0
    suspect: int = 0
    strikes: int = 0


#: makes a message that shows a text to the client of a session
NoticeMaker = Callable[[ClientSession, str], Sequence[bytes]]


class ClientChannel:
    """One open websocket. `run` sends what the log has; whoever owns the websocket tells what comes from it."""

    def __init__(
        self,
        session: ClientSession,
        socket: ClientSocket,
        form: ClientForm,
        log: OutputLog,
        epoch: Epoch,
        cursor: int,
        notice: NoticeMaker,
        large: LargeFrames,
    ) -> None:
        """`cursor`: the number of the log after which this client begins. `epoch`: the present one, as it changes."""
        self.session = session
        self.form = form
        self.cursor = cursor
        #: nothing is read from it, as its kernel takes nothing
        self.paused = False
        self.task: asyncio.Task[None] | None = None
        self._socket = socket
        self._log = log
        self._epoch = epoch
        self._notice = notice
        self._large = large
        self._loop = asyncio.get_running_loop()
        self._heard = self._loop.time()
        #: bytes that are on their way
        self._sending = 0
        self._ending: tuple[int, str] | None = None
        self._waiting = False
        #: the number up to which this client can count by itself
        self._announced = -1
        #: bytes since the last ping, and the ping that is due
        self._unconfirmed = 0
        self._timer: asyncio.TimerHandle | None = None
        #: the first message that may break it and was not acknowledged
        self._suspect = 0

    async def run(self) -> None:
        """Send what the log has and will have, until the websocket or the log is closed, or `finish` has its way."""
        alive = asyncio.create_task(self._keep_alive(), name="keep a websocket alive")
        try:
            self._ping()
            await self._pump()
        except WebSocketClosedError:
            return
        except Exception:
            _log.exception("a websocket failed")
            self._socket.close(FAILED, "The gateway failed; its log says why.")
        finally:
            alive.cancel()
            if self._timer is not None:
                self._timer.cancel()
            await asyncio.gather(alive, return_exceptions=True)

    def finish(self, code: int, reason: str) -> None:
        """Close the websocket once it has sent what the log has by now."""
        self._ending = code, reason
        if self._waiting and self.cursor >= self._log.last:
            self.end(code, reason)

    def end(self, code: int, reason: str) -> None:
        """Send nothing more and close the websocket."""
        if self.task is not None:
            self.task.cancel()
        self._socket.close(code, reason)

    def skip(self, number: int) -> None:
        """Leave out what is not sent yet up to a number."""
        self.cursor = max(self.cursor, number)

    def heard(self) -> None:
        """The client has said or taken something."""
        self._heard = self._loop.time()

    def ponged(self, data: bytes) -> None:
        """The client has answered a ping: it got all that was sent before."""
        self.heard()
        number = data.rpartition(b":")[2]
        if len(data) > _MAX_PONG or not number.isdigit() or self.session.client is not self:
            return
        session = self.session
        # Not further than what was sent: a client may say anything.
        session.position = max(session.position, min(int(number), self.cursor))
        if self._suspect and session.position >= self._suspect:
            self._suspect = session.strikes = 0

    def closed(self, *, in_order: bool = False) -> None:
        """The websocket is closed; `in_order`: by the client, with a close frame.

        What was not acknowledged then may have been too much for this client.
        """
        if self.task is not None:
            self.task.cancel()
        session = self.session
        if session.client is not self:
            return
        session.client = None
        session.gone_at = self._loop.time()
        session.sent = max(session.sent, self.cursor)
        if in_order and self.cursor >= self._epoch.restarting:
            # It has read the status `restarting`, and connects anew for that.
            session.position = max(session.position, self._epoch.restarting)
        if self._suspect:
            session.strikes = session.strikes + 1 if session.suspect == self._suspect else 1
            session.suspect = self._suspect

    async def _pump(self) -> None:
        log = self._log
        while not log.closed:
            size = log.size_after(self.cursor)
            if size > BATCH_BYTES:
                # It has its room before it is read: each client that reads it from disk has a copy of its own.
                async with self._large.room(size, self._cut):
                    if log.size_after(self.cursor) <= size:
                        await self._send(await self._read())
            elif batch := await self._read():
                await self._send(batch)
            elif self._ending is not None and self.cursor >= log.last:
                self._socket.close(*self._ending)
                return
            else:
                self._waiting = True
                await log.wait(self.cursor)
                self._waiting = False

    async def _read(self) -> Sequence[Entry | Gap]:
        """What comes next; nothing where it was told to skip while that was read from disk."""
        after = self.cursor
        batch = await self._log.read(after, max_bytes=BATCH_BYTES)
        return batch if self.cursor == after else []

    def _cut(self) -> None:
        self.end(AGAIN_LATER, "The client takes a large message too slowly, and others wait.")

    async def _send(self, batch: Sequence[Entry | Gap]) -> None:
        writes: list[asyncio.Future[None]] = []
        try:
            for item in batch:
                if isinstance(item, Gap):
                    self.cursor = item.last
                    writes.append(self._write(self._encoded("iopub", self._lost(item))))
                    self._announced = -1
                else:
                    if self._is_for_it(item):
                        writes.append(self._write(self._frame(item)))
                        self._announced = item.number
                    self.cursor = item.number
        finally:
            # Also those before one that failed: each write is awaited by somebody.
            await _written(writes)
            self._sending = 0
        self.heard()
        if self._unconfirmed >= PING_BYTES:
            self._ping()
        elif self._unconfirmed and self._timer is None:
            self._timer = self._loop.call_later(PING_SECONDS, self._ping)

    def _is_for_it(self, entry: Entry) -> bool:
        session = self.session
        if entry.number == self._epoch.restarting and entry.number <= session.sent:
            return False
        return not entry.tag or entry.tag == session.tag

    def _write(self, frame: bytes | str) -> asyncio.Future[None]:
        self._unconfirmed += len(frame)
        self._sending += len(frame)
        return self._socket.write(frame)

    def _frame(self, entry: Entry) -> bytes | str:
        """The frame of an entry; a notice in its place where this client cannot take it."""
        suspect = len(entry.parts) > 4 or entry.size > SUSPECT_BYTES
        if (suspect or self.form.exact) and self._announced != entry.number - 1:
            # What came before is acknowledged by itself; who counts learns which number comes next.
            self._ping()
        parts: Sequence[bytes] = entry.parts
        if suspect:
            text = self._why_not(entry)
            if text is not None:
                return self._encoded(*self._in_place(entry, text))
            self._suspect = self._suspect or entry.number
        return self._encoded(entry.channel, parts)

    def _why_not(self, entry: Entry) -> str | None:
        session = self.session
        if self.form.fragile:
            try:
                return legacy_notice(entry.parts)
            except FrameError as error:
                return f"[samovar: a message was left out: {error}]"
        if session.strikes >= MAX_STRIKES and session.suspect == entry.number:
            return (
                f"[samovar: a message of {entry.size / 2**20:.1f} MiB was left out: {session.strikes} connections of "
                "this client ended while it was sent]"
            )
        return None

    def _encoded(self, channel: str, parts: Sequence[bytes]) -> bytes | str:
        try:
            return encode(self.form.kind, channel, parts)
        except FrameError as error:
            text = f"[samovar: a message of the kernel was left out: {error}]"
            return encode(self.form.kind, "iopub", self._notice(self.session, text))

    def _in_place(self, entry: Entry, text: str) -> tuple[str, Sequence[bytes]]:
        try:
            return in_place_of(entry.channel, entry.parts, text)
        except FrameError:
            return "iopub", self._notice(self.session, text)

    def _lost(self, gap: Gap) -> Sequence[bytes]:
        count = gap.last - gap.first + 1
        many = "1 message" if count == 1 else f"{count} messages"
        text = f"[samovar: {many} ({gap.bytes / 2**20:.1f} MiB) could not be kept until this client took them: lost]"
        return self._notice(self.session, text)

    def _ping(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._unconfirmed = 0
        self._announced = self.cursor
        self._socket.ping(f"{self._epoch.id}:{self.cursor}".encode())

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(KEEP_ALIVE_SECONDS)
            if self.paused:
                self.heard()
            silence = self._loop.time() - self._heard
            if silence > SILENCE_SECONDS + self._sending / SLOWEST_BYTES:
                self.end(FAILED, f"The client took nothing and said nothing for {silence:.0f} s.")
                return
            self._ping()


async def _written(writes: Sequence[asyncio.Future[None]]) -> None:
    """Wait until all are done. Raises what the first failed with.

    Cancelling it leaves them alone: Tornado does not expect that somebody cancels what it gave out.
    """
    try:
        if writes:
            await asyncio.wait(writes)
    finally:
        for write in writes:
            if write.done():
                _failure_of(write)
            else:
                write.add_done_callback(_failure_of)
    for write in writes:
        write.result()


def _failure_of(write: asyncio.Future[None]) -> BaseException | None:
    """Why a write failed. Nobody complains any more that this was never asked for."""
    return None if write.cancelled() else write.exception()
