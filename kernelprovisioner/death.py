"""A dead kernel's endpoints: bound once more by its holder, to tell those who wait at them why it died.

The error reply goes to the ZeroMQ identity that is the cell's header session, as jupyter_client's sockets have it. A
client whose identity is another one gets no reply, only the error and the idle status: nothing here knows its identity.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio
from jupyter_client.session import Session

from kernelprovisioner.monitor import RunningCell
from kernelprovisioner.runtime import check_socket_path
from kernelprovisioner.sandbox_exit import SandboxExit

#: Sockets of clients come back after 100 ms plus jitter; a message sent before that is lost. In seconds.
_RECONNECT_SECONDS = 0.25
#: … and on a busy machine later: so long is waited for a subscriber, and for the one who sent the cell.
_LATEST_SECONDS = 0.8
#: Readers take what was sent before `poll` may say that the kernel is dead.
_READ_SECONDS = 0.1
_MAX_REQUEST_BYTES = 64 * 1024 * 1024
_log = logging.getLogger(__name__)


class DeathNotice:
    """The endpoints of a kernel that has died. Made on the holder's loop; `close` it there."""

    def __init__(self, directory: Path, key: bytes, exit_: SandboxExit) -> None:
        """Bind the sockets `k-1` … `k-4` in `directory`. Raises OSError."""
        self._text = str(exit_)
        self._session = Session(key=key, username="samovar", check_pid=False)
        self._context = zmq.asyncio.Context(io_threads=1)
        self._tasks: list[asyncio.Task[None]] = []
        self._subscribed = asyncio.Event()
        self._told: set[str] = set()
        try:
            self._shell = self._bind(zmq.ROUTER, directory / "k-1")
            self._iopub = self._bind(zmq.XPUB, directory / "k-2")
            self._stdin = self._bind(zmq.ROUTER, directory / "k-3")
            self._control = self._bind(zmq.ROUTER, directory / "k-4")
        except BaseException:
            self._context.destroy(linger=0)
            raise

    async def tell(
        self,
        running: Sequence[RunningCell],
        unsent: Sequence[dict[str, Any]] = (),
        unheard: Sequence[RunningCell] = (),
    ) -> None:
        """Tell the death to those who wait; call it once the endpoints are where clients look for them.

        `unheard`: requests that may have died with the kernel; who sent none ignores what he is told. `unsent`: output
        that its kernel could not send any more, as {"name", "text", "parent"}.
        """
        loop = asyncio.get_running_loop()
        latest = loop.time() + _LATEST_SECONDS
        self._tasks.append(loop.create_task(self._hear_subscribers()))
        await asyncio.sleep(_RECONNECT_SECONDS)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(latest):
                await self._subscribed.wait()
        for record in unsent:
            content = {"name": record["name"], "text": record["text"]}
            await self._publish("stream", content, record.get("parent") or {})
        if not running:
            await self._publish("stream", {"name": "stderr", "text": self._text + "\n"}, {})
        for cell in running:
            await self._tell_cell(cell, latest)
        for cell in unheard:
            await self._tell_cell(cell, latest)
        for socket in (self._shell, self._control):
            self._tasks.append(loop.create_task(self._answer(socket)))
        await asyncio.sleep(_READ_SECONDS)

    async def close(self) -> None:
        """Unbind; what was sent has 100 ms to leave."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._context.destroy, linger=100)

    def _bind(self, kind: int, path: Path) -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        socket.set(zmq.LINGER, 100)
        socket.set(zmq.MAXMSGSIZE, _MAX_REQUEST_BYTES)
        if kind == zmq.ROUTER:
            # An unknown peer is an error, so that we can wait for it.
            socket.set(zmq.ROUTER_MANDATORY, 1)
            socket.set(zmq.ROUTER_HANDOVER, 1)
        socket.bind(f"ipc://{check_socket_path(path)}")
        return socket

    async def _hear_subscribers(self) -> None:
        while True:
            frame = await self._iopub.recv()
            if frame.startswith(b"\x01"):
                self._subscribed.set()

    async def _tell_cell(self, cell: RunningCell, latest: float) -> None:
        error = self._error()
        self._told.add(str(cell.header.get("msg_id")))
        await self._publish("stream", {"name": "stderr", "text": self._text + "\n"}, cell.header)
        await self._publish("error", error, cell.header)
        reply = {"status": "error", "execution_count": cell.execution_count or 0, "user_expressions": {}, **error}
        identity = str(cell.header.get("session", "")).encode()
        while True:
            try:
                await self._send(self._shell, "execute_reply", reply, cell.header, [identity])
                break
            except zmq.ZMQError as problem:
                if problem.errno != errno.EHOSTUNREACH or asyncio.get_running_loop().time() > latest:
                    _log.info("nobody at the shell endpoint waits for the dead cell's reply: %s", problem)
                    break
            await asyncio.sleep(0.02)
        await self._publish("status", {"execution_state": "idle"}, cell.header)

    async def _answer(self, socket: zmq.asyncio.Socket) -> None:
        """Whoever asks later gets the same answer, not silence."""
        while True:
            try:
                identities, frames = self._session.feed_identities(await socket.recv_multipart())
                request = self._session.deserialize(frames)
                header = request["header"]
                if header["msg_id"] in self._told:
                    continue
                await self._publish("status", {"execution_state": "busy"}, header)
                msg_type = str(header["msg_type"])
                if msg_type == "execute_request":
                    await self._publish("error", self._error(), header)
                if msg_type.endswith("_request"):
                    reply = {"status": "error", **self._error()}
                    await self._send(socket, msg_type.removesuffix("_request") + "_reply", reply, header, identities)
                await self._publish("status", {"execution_state": "idle"}, header)
            except (ValueError, TypeError, KeyError, IndexError, zmq.ZMQError) as error:
                _log.info("a request to a dead kernel was not answered: %s", error)

    def _error(self) -> dict[str, Any]:
        return {"ename": "SandboxDied", "evalue": self._text, "traceback": [f"SandboxDied: {self._text}"]}

    async def _publish(self, msg_type: str, content: dict[str, Any], parent: dict[str, Any]) -> None:
        topic = f"stream.{content['name']}" if msg_type == "stream" else f"kernel.{self._session.session}.{msg_type}"
        await self._send(self._iopub, msg_type, content, parent, [topic.encode()])

    async def _send(
        self,
        socket: zmq.asyncio.Socket,
        msg_type: str,
        content: dict[str, Any],
        parent: dict[str, Any],
        identities: list[bytes],
    ) -> None:
        message = self._session.msg(msg_type, content)
        # As it came: our own parsing must not change what the sender will compare.
        message["parent_header"] = parent
        await socket.send_multipart([*identities, *self._session.serialize(message)])
