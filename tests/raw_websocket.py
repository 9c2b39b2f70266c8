"""RawWebsocket: a client that a test controls to the byte: when it reads, whether it answers pings, how it ends."""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import struct
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from jupyter_client.session import Session

from gateway.websocket_frames import CHANNELS, V1, decode, encode

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
_session = Session(key=b"")


class Refusal(Exception):
    """The handshake was answered with another status than 101."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"{status}: {body!r}")
        self.status = status
        self.body = body


@dataclass
class Got:
    """One Jupyter message."""

    channel: str
    parts: list[bytes]
    header: dict[str, Any]
    parent: dict[str, Any]
    content: dict[str, Any]
    frame: bytes | str

    @property
    def msg_type(self) -> str:
        return str(self.header["msg_type"])

    @property
    def parent_id(self) -> str:
        return str(self.parent.get("msg_id", ""))


@dataclass(eq=False)
class RawWebsocket:
    """One connection. `pings` are the payloads that came; `close` is the close frame's code and reason.

    `head` is the answer to the handshake.
    """

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    kind: str
    answers_pings: bool = True
    pings: list[bytes] = field(default_factory=list)
    close_frame: tuple[int, str] | None = None
    session: str = field(default_factory=lambda: os.urandom(8).hex())
    head: str = ""

    @classmethod
    async def connect(
        cls,
        port: int,
        path: str,
        *,
        headers: dict[str, str] | None = None,
        kind: str = V1,
        answers_pings: bool = True,
        receive_buffer: int | None = None,
    ) -> RawWebsocket:
        """Open a websocket. Raises Refusal."""
        raw = socket.socket()
        if receive_buffer is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=raw, limit=2**16)
        fields = {
            "Host": f"127.0.0.1:{port}",
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
            "Sec-WebSocket-Version": "13",
            **({"Sec-WebSocket-Protocol": kind} if kind else {}),
            **(headers or {}),
        }
        lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split()[1])
        if status != 101:
            body = await reader.read(10_000)
            writer.close()
            raise Refusal(status, body)
        return cls(reader, writer, kind, answers_pings, head=head.decode("latin-1"))

    async def __aenter__(self) -> RawWebsocket:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.end()

    async def end(self) -> None:
        """Close the connection as TCP does (FIN), without a word."""
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except OSError:
            return

    def reset(self) -> None:
        """End it with a RST."""
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    # --- frames

    def send_frame(self, opcode: int, data: bytes, *, cut: int | None = None) -> None:
        """Send one masked frame, or its first `cut` bytes."""
        size = len(data)
        if size < 126:
            head = bytes((0x80 | opcode, 0x80 | size))
        elif size < 65536:
            head = bytes((0x80 | opcode, 0xFE)) + struct.pack(">H", size)
        else:
            head = bytes((0x80 | opcode, 0xFF)) + struct.pack(">Q", size)
        # a mask of zeros is one, too
        self.writer.write((head + b"\0\0\0\0" + data)[:cut])

    async def frame(self) -> tuple[int, bytes]:
        """Return the next frame, whatever it is. Raises EOFError where the connection has ended."""
        try:
            first, second = await self.reader.readexactly(2)
            size = second & 0x7F
            if size == 126:
                size = struct.unpack(">H", await self.reader.readexactly(2))[0]
            elif size == 127:
                size = struct.unpack(">Q", await self.reader.readexactly(8))[0]
            return first & 0x0F, await self.reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise EOFError from error

    # --- messages

    async def message(self, timeout: float = 10.0) -> Got | None:
        """Return the next Jupyter message; None where the connection has ended. Raises TimeoutError."""
        async with asyncio.timeout(timeout):
            while True:
                try:
                    opcode, data = await self.frame()
                except EOFError:
                    return None
                if opcode == PING:
                    self.pings.append(data)
                    if self.answers_pings:
                        self.send_frame(PONG, data)
                elif opcode == CLOSE:
                    self.close_frame = (struct.unpack(">H", data[:2])[0], data[2:].decode()) if data else (1005, "")
                    self.send_frame(CLOSE, data[:2])
                elif opcode in (TEXT, BINARY):
                    frame = data.decode() if opcode == TEXT else data
                    channel, parts = decode(self.kind, frame, CHANNELS)
                    loads = _session.unpack
                    return Got(channel, parts, loads(parts[0]), loads(parts[1]), loads(parts[3]), frame)

    def request(
        self,
        msg_type: str,
        content: dict[str, Any],
        channel: str = "shell",
        *,
        parent: dict[str, Any] | None = None,
        buffers: tuple[bytes, ...] = (),
    ) -> str:
        """Send a message and return its id."""
        header = _session.msg_header(msg_type) | {"session": self.session}
        parts = [_session.pack(each) for each in (header, parent or {}, {}, content)]
        frame = encode(self.kind, channel, [*parts, *buffers])
        self.send_frame(TEXT if isinstance(frame, str) else BINARY, frame.encode() if isinstance(frame, str) else frame)
        return str(header["msg_id"])

    def execute(self, code: str, **fields: Any) -> str:
        """Send a cell and return its id."""
        content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": True}
        return self.request("execute_request", {**content, **fields})

    async def finish(self, msg_id: str, timeout: float = 20.0) -> list[Got]:
        """Return all messages up to the reply and the idle status of a request."""
        return await self.until({msg_id}, timeout)

    async def until(self, msg_ids: set[str], timeout: float = 20.0) -> list[Got]:
        """Return all messages up to the replies and the idle statuses of requests. Raises EOFError, TimeoutError."""
        got: list[Got] = []
        replies, idle = set(msg_ids), set(msg_ids)
        async with asyncio.timeout(timeout):
            while replies or idle:
                message = await self.message(timeout)
                if message is None:
                    raise EOFError(f"closed ({self.close_frame}) after {[each.msg_type for each in got][-20:]}")
                got.append(message)
                if message.channel == "shell" and message.msg_type.endswith("_reply"):
                    replies.discard(message.parent_id)
                elif message.msg_type == "status" and message.content["execution_state"] == "idle":
                    idle.discard(message.parent_id)
        return got

    async def first(self, msg_type: str, timeout: float = 20.0) -> Got:
        """Return the next message of that type; those before it are skipped. Raises EOFError, TimeoutError."""
        async with asyncio.timeout(timeout):
            while (message := await self.message(timeout)) is not None:
                if message.msg_type == msg_type:
                    return message
        raise EOFError(f"closed ({self.close_frame})")

    async def ended(self, timeout: float = 10.0) -> tuple[int, str] | None:
        """Read to the end and return the close frame's code and reason; None: it ended without one."""
        async with asyncio.timeout(timeout):
            while await self.message(timeout) is not None:
                continue
        return self.close_frame


def text_of(got: list[Got], msg_id: str, name: str = "stdout") -> str:
    """What a cell printed."""
    streams = [each for each in got if each.msg_type == "stream" and each.parent_id == msg_id]
    return "".join(each.content["text"] for each in streams if each.content["name"] == name)
