"""KernelChannels with a kernel and clients that a test holds in its hands."""

from __future__ import annotations

import asyncio
import itertools
import json
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tornado.websocket import WebSocketClosedError

from gateway.channel_bounds import ChannelBounds
from gateway.channels import KernelChannels
from gateway.client_channel import ClientChannel, ClientForm
from gateway.output_budget import OutputBudget
from gateway.output_log import OutputLog
from gateway.websocket_frames import CHANNELS, V1, decode, encode
from kernelprovisioner.message import Listener, Message, WireError

MIB = 1024 * 1024
_numbers = itertools.count(1)


class FakeWire:
    """Remembers what is sent to the kernel, and plays the kernel."""

    def __init__(self, session: str = "kernel-1") -> None:
        self.session = "gateway"
        self.peer_session = session
        self.on_any: Listener | None = None
        self.forwarded: list[tuple[str, list[bytes], bytes]] = []
        self.has_room = asyncio.Event()
        self.has_room.set()
        self.lost = False

    async def room(self, channel: str, *, timeout: float) -> None:
        if self.lost:
            raise WireError("the channel is closed")
        async with asyncio.timeout(timeout):
            await self.has_room.wait()

    def hold(self, channel: str, hold: bool) -> None:
        """The log keeps up."""

    def forward(self, channel: str, parts: Sequence[bytes], tag: bytes) -> None:
        if self.lost:
            raise WireError("the channel is closed")
        self.forwarded.append((channel, list(parts), tag))

    def says(
        self,
        msg_type: str,
        content: dict[str, Any],
        parent: dict[str, Any] | None = None,
        *,
        channel: str = "iopub",
        tag: bytes = b"",
        buffers: Sequence[bytes] = (),
    ) -> None:
        header = {"msg_id": f"k{next(_numbers)}", "msg_type": msg_type, "session": self.peer_session}
        parts = [json.dumps(part).encode() for part in (header, parent or {}, {}, content)]
        if self.on_any is not None:
            self.on_any(Message(channel, [*parts, *buffers], header, parent or {}, tag))

    def prints(self, text: str, parent: dict[str, Any] | None = None) -> None:
        self.says("stream", {"name": "stdout", "text": text}, parent)

    @property
    def header(self) -> dict[str, Any]:
        """The header of the request that came last."""
        return dict(json.loads(self.forwarded[-1][1][0]))

    @property
    def tag(self) -> bytes:
        return self.forwarded[-1][2]


class FakeSocket:
    """A websocket of a client that reads at once, until it stalls or closes."""

    def __init__(self) -> None:
        self.frames: list[bytes | str] = []
        self.pings: list[bytes] = []
        self.closing: tuple[int | None, str | None] | None = None
        self.stalled = False
        self.gone = False
        self.client: ClientChannel | None = None
        self.answers = True

    def write(self, frame: bytes | str) -> asyncio.Future[None]:
        if self.gone:
            raise WebSocketClosedError
        self.frames.append(frame)
        written = asyncio.get_running_loop().create_future()
        if not self.stalled:
            written.set_result(None)
        return written

    def ping(self, data: bytes = b"") -> None:
        self.pings.append(data)
        if self.answers and self.client is not None and not self.gone:
            self.client.ponged(data)

    def close(self, code: int | None = None, reason: str | None = None) -> None:
        if self.closing is None:
            self.closing = (code, reason)

    @property
    def messages(self) -> list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]]:
        """Channel, header, parent header and content of all that came."""
        got = [decode(V1, frame, CHANNELS) for frame in self.frames]
        return [(channel, json.loads(parts[0]), json.loads(parts[1]), json.loads(parts[3])) for channel, parts in got]

    @property
    def told(self) -> list[str]:
        """What came, in short: message types, and states or texts where that is what they are about."""
        short = []
        for _, header, _, content in self.messages:
            about = content.get("execution_state") or content.get("text") or content.get("status") or ""
            short.append(f"{header['msg_type']} {about}".strip())
        return short


@asynccontextmanager
async def the_channels(bounds: ChannelBounds | None = None, *, memory: int = 8 * MIB) -> AsyncIterator[KernelChannels]:
    with tempfile.TemporaryDirectory() as directory:
        budget = OutputBudget(memory_bytes=4 * memory, disk_bytes=0)
        log = OutputLog(Path(directory), memory_bytes=memory, disk_bytes=0, budget=budget)
        channels = KernelChannels(log, bounds or ChannelBounds())
        try:
            yield channels
        finally:
            await channels.close(1001, "the test is over")
            budget.close()


def attach(channels: KernelChannels, session: str = "kernel-1", *, adopted: bool = False) -> FakeWire:
    wire = FakeWire(session)
    channels.attach(SimpleNamespace(wire=wire), adopted=adopted)  # type: ignore[arg-type]
    return wire


def connect(
    channels: KernelChannels,
    session: str = "page",
    after: str | None = None,
    *,
    answers: bool = True,
    exact: bool = False,
) -> FakeSocket:
    socket = FakeSocket()
    socket.answers = answers
    socket.client = channels.open(session, socket, ClientForm(V1, exact=exact), after)
    return socket


def cut(socket: FakeSocket) -> None:
    """The connection ends."""
    socket.gone = True
    assert socket.client is not None
    socket.client.closed()


async def send(
    channels: KernelChannels,
    socket: FakeSocket,
    msg_type: str = "execute_request",
    channel: str = "shell",
    **content: Any,
) -> dict[str, Any]:
    """Have a client send a message; return its header."""
    header = {"msg_id": f"m{next(_numbers)}", "msg_type": msg_type, "session": "page"}
    parts = [json.dumps(part).encode() for part in (header, {}, {}, content)]
    assert socket.client is not None
    await channels.received(socket.client, encode(V1, channel, parts))
    return header


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)
