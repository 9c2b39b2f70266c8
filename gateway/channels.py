"""KernelChannels: what goes between a kernel and its clients. They outlive its sandboxes, which come and go behind."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import msgspec

from gateway.channel_bounds import ChannelBounds
from gateway.client_channel import AGAIN_LATER, ClientChannel, ClientForm, ClientSession, ClientSocket
from gateway.client_sessions import MAX_SESSION_ID, ClientSessions
from gateway.kernel_hearing import KernelHearing
from gateway.kernel_requests import KernelRequests
from gateway.kernel_voice import NO_PARENT, KernelVoice
from gateway.large_frames import LargeFrames
from gateway.output_log import OutputLog
from gateway.stream_limit import StreamLimit
from gateway.websocket_frames import Header, decode, header_of
from kernelprovisioner.sandbox import EndedCell, Sandbox
from kernelprovisioner.sandbox_exit import CellReference
from kernelprovisioner.supervisor import remaining_output
from kernelprovisioner.wire import WireError, first_of

REPLACED = 1000
#: What may wait for a kernel that does not read, or for the next sandbox, beside one more message.
MAX_WAITING_BYTES = 64 * 1024 * 1024
#: An honest kernel tells of 32 cells at most; what user code makes up beyond is nobody's.
MAX_MADE_UP = 32
#: How long a client's message waits for room, or for a sandbox, before somebody looks whether it still matters.
_LOOK_SECONDS = 30.0
#: How long the last messages may take to reach the clients when everything is closed.
_LAST_SECONDS = 2.0
_log = logging.getLogger(__name__)


class Refused(Exception):
    """A websocket that is closed as soon as it is open, with a code and a reason."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class _Shutdown(msgspec.Struct):
    restart: bool = False


class KernelChannels:
    """The clients of one kernel, and the log that all of them read. Belongs to the loop that made it."""

    def __init__(
        self,
        log: OutputLog,
        bounds: ChannelBounds,
        large: LargeFrames | None = None,
        incoming: LargeFrames | None = None,
    ) -> None:
        """`large` bounds what is on its way to the clients of all kernels that share it, `incoming` what comes."""
        self.log = log
        self.bounds = bounds
        self.incoming = incoming or LargeFrames()
        self._closing: tuple[int, str] | None = None
        #: told "busy" and "idle" when that changes
        self.on_status: Callable[[str], None] | None = None
        #: told that a client or the kernel has said something
        self.on_activity: Callable[[], None] | None = None
        #: told that a client has asked the kernel to end; true: and to start again
        self.on_shutdown_request: Callable[[bool], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._sandbox: Sandbox | None = None
        #: done and made anew when a sandbox is attached, or all is closed
        self._changed: asyncio.Future[None] = self._loop.create_future()
        log.on_behind = self._hold
        self._voice = KernelVoice(log)
        self._large = large or LargeFrames()
        self._sessions = ClientSessions(log, bounds.reconnect_window)
        self._tasks: set[asyncio.Task[None]] = set()
        #: bytes of clients' messages that wait for room
        self._waiting = 0
        self._requests = KernelRequests()
        self._limit = StreamLimit(bounds.cell_stream)
        self._hearing = KernelHearing(
            log, self._requests, self._sessions, self._voice, self._limit, self._tell_status, self._active
        )
        self._busy = False

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closing is not None

    @property
    def connections(self) -> int:
        """How many websockets are open."""
        return len(self._sessions.connected)

    @property
    def busy(self) -> bool:
        """Whether the kernel works on something."""
        return self._requests.busy

    @property
    def answering(self) -> bool:
        """Whether the reply to something that has ended is still on its way."""
        return self._requests.answering

    @property
    def cell(self) -> CellReference | None:
        """The cell that the kernel runs."""
        cells = [request for request in self._requests.running if request.msg_type == "execute_request"]
        return CellReference(cells[0].msg_id, cells[0].execution_count) if cells else None

    # --- the kernel's side

    def attach(self, sandbox: Sandbox, *, adopted: bool = False) -> None:
        """Put a sandbox behind the channels.

        `adopted`: an earlier gateway had it, and its clients will come back. The replies to cells that it has begun go
        to that gateway: when they end, one is made up.
        """
        self.detach()
        self._sandbox = sandbox
        self._voice.session = sandbox.wire.peer_session or secrets.token_hex(16)
        self._hearing.stream_ids.clear()
        self._hearing.own_session = sandbox.wire.session
        sandbox.wire.on_any = self._hearing.hear
        self._hold(self.log.behind)
        if adopted:
            self._sessions.expect()
        self._wake()

    def _hold(self, hold: bool) -> None:
        """While the disk does not take the kernel's output fast enough, the kernel waits: nothing is lost."""
        if self._sandbox is not None:
            self._sandbox.wire.hold("iopub", hold)

    def detach(self) -> None:
        """Hear no more of the present sandbox; clients' messages wait for the next one."""
        if self._sandbox is not None:
            self._sandbox.wire.on_any = None
            self._sandbox = None

    def publish(self, channel: str, msg_type: str, content: Mapping[str, Any]) -> None:
        """Send a message of the gateway's own, which answers nothing, to all clients."""
        self._voice.publish(channel, msg_type, content)
        if msg_type == "status" and content.get("execution_state") == "restarting":
            self._sessions.epoch.restarting = self.log.last

    def tell_death(
        self, text: str, ename: str, *, traceback: Sequence[str], unsent: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Tell why the kernel died to whoever waits for it, under what it ran.

        `unsent` are the records of its supervisor, from which what it could not send is told first. From here on
        nothing older comes to a client that reconnects.
        """
        self._sessions.new_epoch()
        for record in remaining_output(tuple(dict(each) for each in unsent), set(self._hearing.stream_ids)):
            stream = {"name": record["name"], "text": record["text"]}
            self._voice.publish("iopub", "stream", stream, record.get("parent") or {})
        if not self._requests.running:
            self._hearing.suppose(unsent)
        for request in self._requests.running:
            self._hearing.tell_cut(request.msg_id, request.header)
        if not self._voice.death(self._requests, text, ename, traceback):
            self.notice_to_each(text)
        self._forget_requests()

    def tell_restart(self) -> None:
        """Release whoever waits for a kernel that is given up for a new one. Nothing it had sent comes any more."""
        self._sessions.new_epoch()
        for client in self._sessions.connected:
            client.skip(self.log.last)
        self._voice.restart(self._requests)
        self._forget_requests()

    def make_up(self, ended: Sequence[EndedCell]) -> None:
        """Answer cells that ended unheard; a client that has its answer already ignores another one."""
        for cell in ended[-MAX_MADE_UP:]:
            self._hearing.make_up(cell)

    def follow(self, msg_id: str, execution_count: int | None = None) -> None:
        """An adopted kernel runs this cell, which has that number."""
        request = self._requests.find(msg_id)
        if request is None:
            request = self._requests.adopt(msg_id)
            self._tell_status()
        # Who heard only the rest of the cell did not hear it.
        if request.execution_count is None:
            request.execution_count = execution_count

    def follow_no_more(self, msg_id: str) -> None:
        """It runs it no more, also where nobody heard it end."""
        request = self._requests.find(msg_id)
        if request is not None:
            self._hearing.answer_orphan(request)
            self._voice.idle(request.header)
            self._requests.ended(msg_id)
            self._tell_status()

    def notice_to_each(self, text: str) -> None:
        """Show a text under the last cell of each client: that is where a notebook shows it."""
        for session in self._sessions:
            if session.last_cell is not None:
                self._voice.stderr(text, session.last_cell)

    async def close(self, code: int, reason: str) -> None:
        """Close all websockets once they have sent what there is, or cannot within 2 s; then the log is gone."""
        if self.closed:
            return
        self.detach()
        self._closing = code, reason
        self._wake()
        clients = self._sessions.connected
        for client in clients:
            client.finish(code, reason)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_LAST_SECONDS)
        for client in clients:
            client.end(code, reason)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.log.close()
        self._requests.clear()

    # --- the clients' side

    def open(self, session_id: str, socket: ClientSocket, form: ClientForm, after: str | None = None) -> ClientChannel:
        """Take in a client's new websocket, in the place of an earlier one of the same session.

        `after` is what a numbered ping said last to a client that counts. Raises Refused.
        """
        if self._closing is not None:
            raise Refused(*self._closing)
        session = self._sessions.find(session_id[:MAX_SESSION_ID])
        earlier = session.client if session is not None else None
        if earlier is None and self.connections >= self.bounds.max_websockets:
            raise Refused(AGAIN_LATER, f"The kernel has {self.bounds.max_websockets} websockets already.")
        if session is None:
            session = self._new_session(session_id[:MAX_SESSION_ID])
        session.position = self._sessions.start_of(session, after)
        epoch = self._sessions.epoch
        client = ClientChannel(session, socket, form, self.log, epoch, session.position, self._notice, self._large)
        session.client = client
        if earlier is not None:
            session.sent = max(session.sent, earlier.cursor)
            earlier.end(REPLACED, "Another connection of the same session has taken its place.")
        client.task = self._own(client.run(), f"client of a kernel {session.tag.decode()}")
        return client

    async def received(self, client: ClientChannel, frame: bytes | str) -> None:
        """Send a client's frame on to the kernel; returns when the kernel has room for more.

        Raises FrameError where it is no message, Refused where too much waits for the kernel already.
        """
        client.heard()
        channel, parts = decode(client.form.kind, frame)
        header = header_of(parts)
        if self._waiting > MAX_WAITING_BYTES:
            # Also of clients that are gone meanwhile: nobody fills the memory by coming again and again.
            raise Refused(AGAIN_LATER, f"The kernel does not read: {self._waiting >> 20} MiB wait for it already.")
        client.paused = True
        self._waiting += len(frame)
        try:
            sandbox = await self._room(channel)
        finally:
            self._waiting -= len(frame)
            client.paused = False
            client.heard()
        if sandbox is None:
            return
        self._note_request(client.session, channel, header, parts)
        try:
            sandbox.wire.forward(channel, parts, client.session.tag)
        except WireError as error:
            # The kernel is about to be told dead, and then this request is answered.
            _log.debug("a client's message was not forwarded: %s", error)
        self._active()

    async def _room(self, channel: str) -> Sandbox | None:
        """Wait for a sandbox that reads `channel`, and return it; None where all is closed."""
        while not self.closed:
            sandbox = self._sandbox
            if sandbox is None:
                await first_of(self._changed, timeout=_LOOK_SECONDS)
                continue
            try:
                await sandbox.wire.room(channel, timeout=_LOOK_SECONDS)
            except TimeoutError:
                continue
            except WireError:
                return sandbox if sandbox is self._sandbox else await self._room(channel)
            if sandbox is self._sandbox:
                return sandbox
        return None

    def _note_request(self, session: ClientSession, channel: str, header: Header, parts: Sequence[bytes]) -> None:
        if not header.msg_type.endswith("_request"):
            return
        self._requests.sent(header.msg_id, header.msg_type, parts[0], session.tag, channel)
        if header.msg_type == "execute_request":
            session.last_cell = parts[0]
        elif header.msg_type == "shutdown_request" and self.on_shutdown_request is not None:
            try:
                restart = msgspec.json.decode(parts[3], type=_Shutdown).restart
            except msgspec.MsgspecError:
                restart = False
            self.on_shutdown_request(restart)

    def _new_session(self, session_id: str) -> ClientSession:
        session = self._sessions.add(session_id)
        running = self._requests.running
        if running and not self._sessions.expecting:
            # A page that was loaded anew shows that its kernel works.
            self._voice.publish("iopub", "status", {"execution_state": "busy"}, running[0].header, session.tag)
        return session

    def _notice(self, session: ClientSession, text: str) -> Sequence[bytes]:
        content = {"name": "stderr", "text": text + "\n"}
        return self._voice.parts("stream", content, session.last_cell or NO_PARENT)

    def _forget_requests(self) -> None:
        self._requests.clear()
        self._limit.clear()
        self._tell_status()

    def _own(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = self._loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _tell_status(self) -> None:
        if self.busy != self._busy:
            self._busy = self.busy
            if self.on_status is not None:
                self.on_status("busy" if self._busy else "idle")

    def _active(self) -> None:
        if self.on_activity is not None:
            self.on_activity()

    def _wake(self) -> None:
        if not self._changed.done():
            self._changed.set_result(None)
        if not self.closed:
            self._changed = self._loop.create_future()
