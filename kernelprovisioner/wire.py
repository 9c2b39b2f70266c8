"""One kernel's channels: connect, sign, route, bounds. Used by pool, provisioner and gateway."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from kernelprovisioner import endpoints, zmtp
from kernelprovisioner.launchers.base import Endpoint
from kernelprovisioner.message import MAX_HEADER_BYTES, Listener, Message, WireError, decode_object

__all__ = [
    "CHANNELS",
    "MAX_HEADER_BYTES",
    "KernelWire",
    "Listener",
    "Message",
    "Unfinished",
    "WireError",
    "first_of",
]

CHANNELS = ("shell", "iopub", "stdin", "control")
#: Bounds on what a kernel may send in one message; past them the connection is closed, and with it the sandbox.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
MAX_MESSAGE_FRAMES = 4096
#: A kernel whose messages are no messages so often does nothing else, and each costs us time.
MAX_REJECTED = 1000
#: What kernels that share an Unfinished may have sent of messages that are not complete.
MAX_UNFINISHED_BYTES = 512 * 1024 * 1024
#: A kernel that stops reading may leave this much of our requests unsent before we refuse more.
MAX_UNSENT_BYTES = 32 * 1024 * 1024
#: Who can wait does so from here on until the kernel has read half of it.
_ROOM_BYTES = 1024 * 1024

_DELIMITER = b"<IDS|MSG>"
_PROTOCOL_VERSION = "5.4"
_RETRY_SECONDS = 0.01
_log = logging.getLogger(__name__)


class Unfinished:
    """What many kernels have sent of messages that are not complete: bounded together, the greediest is cut off."""

    def __init__(self, limit: int = MAX_UNFINISHED_BYTES) -> None:
        self._limit = limit
        self._sizes: dict[_Connection, int] = {}
        self._total = 0

    def note(self, connection: _Connection, size: int) -> None:
        """A connection holds `size` bytes now."""
        self._total += size - self._sizes.pop(connection, 0)
        if not size:
            return
        self._sizes[connection] = size
        if self._total <= self._limit:
            return
        by_wire: Counter[KernelWire] = Counter()
        for each, held in self._sizes.items():
            by_wire[each.wire] += held
        greediest = max(by_wire, key=lambda wire: by_wire[wire])
        _log.warning("a kernel's channels were closed: it left messages of %d bytes unfinished", by_wire[greediest])
        for each in [each for each in self._sizes if each.wire is greediest]:
            each.abort()


class KernelWire:
    """The channels of one kernel, connected. Not thread-safe: it belongs to the loop that made it."""

    def __init__(self, key: bytes, unfinished: Unfinished | None = None) -> None:
        self.unfinished = unfinished or Unfinished()
        self.session = secrets.token_hex(16)
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.rejected = 0
        #: hears every message that no listener of its parent takes
        self.on_other: Listener | None = None
        #: hears every valid message, whoever else does
        self.on_any: Listener | None = None
        #: header.session of the newest message: what tells this kernel process from the one before it
        self.peer_session = ""
        # Shell, stdin and control share one identity: the kernel addresses its input requests by the shell's.
        self._identity = b"samovar-" + secrets.token_hex(8).encode()
        self._listeners: dict[str, Listener] = {}
        self._connections: dict[str, _Connection] = {}
        self._closing = False
        self._count = 0
        self.rekey(key)

    @classmethod
    async def connect(
        cls,
        channels: Mapping[str, Endpoint],
        key: bytes,
        *,
        timeout: float,
        names: Sequence[str] = CHANNELS,
        topics: Sequence[bytes] = (b"",),
        unfinished: Unfinished | None = None,
    ) -> KernelWire:
        """Return the wire once all `names` are connected, trying again until `timeout` seconds have passed.

        Wires that share `unfinished` share its bound.

        Raises WireError when the kernel is not there in time.
        """
        wire = cls(key, unfinished)
        try:
            async with asyncio.timeout(timeout):
                for name in names:
                    wire._connections[name] = await wire._open(name, channels[name], topics)
        except TimeoutError:
            await wire.close()
            raise WireError(f"the kernel's channels could not be connected within {timeout:g} s") from None
        except BaseException:
            await wire.close()
            raise
        return wire

    def rekey(self, key: bytes) -> None:
        """Sign and check with `key` from now on."""
        self._mac = hmac.new(key, digestmod="sha256")

    def send(
        self,
        channel: str,
        msg_type: str,
        content: Mapping[str, Any],
        *,
        metadata: Mapping[str, Any] | None = None,
        msg_id: str | None = None,
        buffers: Sequence[bytes] = (),
    ) -> str:
        """Send one message; return its id. Raises WireError where the channel is closed or the kernel does not read."""
        connection = self._connection(channel)
        msg_id = msg_id or self.new_id()
        header = {
            "msg_id": msg_id,
            "msg_type": msg_type,
            "session": self.session,
            "username": "samovar",
            "date": datetime.now(UTC).isoformat(),
            "version": _PROTOCOL_VERSION,
        }
        try:
            parts = [_encode(header), b"{}", _encode(metadata or {}), _encode(content)]
        except UnicodeEncodeError as error:
            raise WireError(f"{msg_type} cannot be sent: it has text that is not Unicode ({error.reason})") from None
        connection.send([_DELIMITER, self._sign(parts), *parts, *buffers])
        return msg_id

    def forward(self, channel: str, parts: Sequence[bytes], tag: bytes) -> None:
        """Send somebody else's message (`parts` as a Message has them) as it is, signed anew.

        What the kernel sends in answer to it on shell, control and stdin has its `tag`. Raises WireError as `send`.
        """
        self._connection(channel).send([tag, _DELIMITER, self._sign(parts[:4]), *parts])

    async def room(self, channel: str, *, timeout: float) -> None:
        """Wait until the kernel reads: returns at once below 1 MiB of unsent bytes.

        Raises TimeoutError after `timeout` seconds, WireError where the channel is closed.
        """
        connection = self._connection(channel)
        async with asyncio.timeout(timeout):
            # Again, where others that waited as well have filled it at the same moment.
            while not connection.room.is_set():
                await connection.room.wait()
        self._connection(channel)

    def hold(self, channel: str, hold: bool) -> None:
        """Read nothing more of a channel until it is told otherwise: soon its kernel has to wait, too."""
        connection = self._connections.get(channel)
        if connection is not None:
            connection.hold(hold)

    def new_id(self) -> str:
        """A message id that was not used before on this wire."""
        self._count += 1
        return f"{self.session}_{os.getpid()}_{self._count}"

    def listen(self, msg_id: str, listener: Listener) -> None:
        """Call `listener` for every message of any channel whose parent is `msg_id`."""
        self._listeners[msg_id] = listener

    def unlisten(self, msg_id: str) -> None:
        self._listeners.pop(msg_id, None)

    async def request(
        self,
        channel: str,
        msg_type: str,
        content: Mapping[str, Any],
        *,
        timeout: float,
        metadata: Mapping[str, Any] | None = None,
    ) -> Message:
        """Send a request; return its reply. Raises TimeoutError after `timeout` seconds, WireError when it closes."""
        msg_id = self.new_id()
        reply: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

        def take(message: Message) -> None:
            if message.channel == channel and message.msg_type.endswith("_reply") and not reply.done():
                reply.set_result(message)

        self.listen(msg_id, take)
        try:
            self.send(channel, msg_type, content, metadata=metadata, msg_id=msg_id)
            async with asyncio.timeout(timeout):
                await first_of(reply, self.closed)
            if not reply.done():
                raise WireError(f"the kernel went away before it answered {msg_type}")
            return reply.result()
        finally:
            self.unlisten(msg_id)
            reply.cancel()

    async def drained(self, channel: str, *, timeout: float) -> None:
        """Wait until a dead kernel's channel has ended: all it had sent was heard then; at most `timeout` seconds."""
        connection = self._connections.get(channel)
        if connection is not None:
            await first_of(connection.gone, timeout=timeout)

    async def close(self, names: Sequence[str] | None = None) -> None:
        """Close the named channels (default: all) and wait until they are."""
        if names is None:
            self._closing = True
            self._listeners.clear()
        closing = [self._connections.pop(name) for name in list(self._connections) if names is None or name in names]
        for connection in closing:
            connection.expected = True
            connection.abort()
        for connection in closing:
            await connection.gone
        if names is None and not self.closed.done():
            self.closed.set_result(None)

    def _connection(self, channel: str) -> _Connection:
        connection = self._connections.get(channel)
        if connection is None or connection.lost:
            raise WireError(f"the kernel's {channel} channel is closed")
        return connection

    async def _open(self, name: str, endpoint: Endpoint, topics: Sequence[bytes]) -> _Connection:
        socket_type = "SUB" if name == "iopub" else "DEALER"
        while True:
            try:
                connection = await endpoints.connect(
                    endpoint, lambda: _Connection(self, name, socket_type, b"" if name == "iopub" else self._identity)
                )
            except endpoints.NotASocket as error:
                raise WireError(str(error)) from None
            except OSError:
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            try:
                await connection.ready
            except asyncio.CancelledError:
                connection.abort()
                raise
            except ConnectionError:
                # Behind a port proxy a connection opens before the kernel listens, and ends at once.
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            if name == "iopub":
                for topic in topics:
                    connection.send([zmtp.SUBSCRIBE + topic])
            return connection

    def _received(self, channel: str, frames: list[bytes]) -> None:
        try:
            message = self._parse(channel, frames)
        except WireError as error:
            self.rejected += 1
            _log.debug("message on %s dropped: %s", channel, error)
            return
        self.peer_session = str(message.header.get("session", ""))
        if self.on_any is not None:
            self.on_any(message)
        listener = self._listeners.get(message.parent_id, self.on_other)
        if listener is not None:
            listener(message)

    def _parse(self, channel: str, frames: list[bytes]) -> Message:
        try:
            start = frames.index(_DELIMITER, 0, 8) + 1
        except ValueError:
            raise WireError("no delimiter") from None
        if len(frames) < start + 5:
            raise WireError("too few frames")
        parts = frames[start + 1 :]
        if max(len(parts[0]), len(parts[1])) > MAX_HEADER_BYTES:
            raise WireError(f"a header of more than {MAX_HEADER_BYTES} bytes")
        if not hmac.compare_digest(frames[start], self._sign(parts[:4])):
            raise WireError("wrong signature")
        tag = frames[start - 2] if start > 1 else b""
        return Message(channel, parts, decode_object(parts[0]), decode_object(parts[1]), tag)

    def _sign(self, parts: Sequence[bytes]) -> bytes:
        mac = self._mac.copy()
        for part in parts:
            mac.update(part)
        return mac.hexdigest().encode()

    def _lost(self, name: str, error: Exception | None) -> None:
        if self._closing or self.closed.done():
            return
        if error is not None:
            _log.info("kernel's %s channel lost: %s", name, error)
        self.closed.set_result(None)


class _Connection(asyncio.Protocol):
    """One ZMTP connection of a wire."""

    def __init__(self, wire: KernelWire, name: str, socket_type: str, identity: bytes) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()
        #: set while the kernel reads what is sent to it
        self.room = asyncio.Event()
        self.room.set()
        self.expected = False
        self.wire = wire
        self._name = name
        self._opening = zmtp.GREETING + zmtp.ready_command(socket_type, identity)
        self._decoder = _decoder()
        self._transport: asyncio.Transport | None = None

    @property
    def lost(self) -> bool:
        return self.gone.done()

    @property
    def unsent(self) -> int:
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(_ROOM_BYTES, _ROOM_BYTES // 2)
        # The peer of a DEALER drops nothing, so its unsent bytes are bounded in send(), not by the transport.
        transport.write(self._opening)

    def data_received(self, data: bytes) -> None:
        try:
            messages = self._decoder.feed(data)
        except zmtp.ZmtpError as error:
            _log.warning("kernel's %s channel closed: %s", self._name, error)
            self.abort()
            return
        if self._decoder.ready and not self.ready.done():
            self.ready.set_result(None)
        self.wire.unfinished.note(self, self._decoder.unfinished)
        for frames in messages:
            self.wire._received(self._name, frames)
            if self.wire.rejected > MAX_REJECTED:
                _log.warning("kernel's %s channel closed: %d messages were none", self._name, self.wire.rejected)
                self.abort()
                return

    def hold(self, hold: bool) -> None:
        assert self._transport is not None
        if hold:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def pause_writing(self) -> None:
        self.room.clear()

    def resume_writing(self) -> None:
        self.room.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.room.set()
        self._decoder = _decoder()
        self.wire.unfinished.note(self, 0)
        if not self.gone.done():
            self.gone.set_result(None)
        if not self.ready.done():
            self.ready.set_exception(ConnectionError("closed during the handshake"))
        elif not self.expected:
            self.wire._lost(self._name, exc)

    def send(self, frames: Sequence[bytes]) -> None:
        assert self._transport is not None
        if self.unsent > MAX_UNSENT_BYTES:
            raise WireError(f"the kernel does not read its {self._name} channel")
        self._transport.write(zmtp.encode(frames))

    def abort(self) -> None:
        self._decoder = _decoder()
        self.wire.unfinished.note(self, 0)
        if self._transport is not None:
            self._transport.abort()


def _decoder() -> zmtp.Decoder:
    return zmtp.Decoder(max_message=MAX_MESSAGE_BYTES, max_frames=MAX_MESSAGE_FRAMES)


async def first_of(*futures: asyncio.Future[Any], timeout: float | None = None) -> None:
    """Wait until one of `futures` is done, or `timeout` seconds have passed; cancels none of them."""
    await asyncio.wait(futures, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)


_encode = msgspec.json.Encoder().encode
