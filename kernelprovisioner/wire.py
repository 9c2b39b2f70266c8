"""One kernel's channels: connect, sign, route, bounds. Used by pool, provisioner and gateway."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, TypeVar

import msgspec

from kernelprovisioner import endpoints, zmtp
from kernelprovisioner.launchers.base import Endpoint

CHANNELS = ("shell", "iopub", "stdin", "control")
#: Bounds on what a kernel may send in one message; past them the connection is closed, and with it the sandbox.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
MAX_MESSAGE_FRAMES = 4096
#: JSON makes objects of twenty times its size, so only small parts are decoded as a whole.
MAX_HEADER_BYTES = 64 * 1024
_MAX_LENIENT_BYTES = 1024 * 1024
#: A kernel whose messages are no messages so often does nothing else, and each costs us time.
MAX_REJECTED = 1000
#: What kernels that share an Unfinished may have sent of messages that are not complete.
MAX_UNFINISHED_BYTES = 512 * 1024 * 1024
#: A kernel that stops reading may leave this much of our requests unsent before we refuse more.
MAX_UNSENT_BYTES = 32 * 1024 * 1024

_DELIMITER = b"<IDS|MSG>"
_PROTOCOL_VERSION = "5.4"
_RETRY_SECONDS = 0.01
_log = logging.getLogger(__name__)
_decode_header = msgspec.json.Decoder(dict[str, Any]).decode

StructT = TypeVar("StructT", bound=msgspec.Struct)


class WireError(Exception):
    """A kernel's channels cannot be used: not reachable in time, closed, or not reading."""


class Message:
    """One Jupyter message as it came; content and metadata are decoded when somebody looks."""

    __slots__ = ("__dict__", "_frames", "channel", "header", "parent_header")

    def __init__(self, channel: str, frames: Sequence[bytes], header: dict[str, Any], parent: dict[str, Any]) -> None:
        self.channel = channel
        self.header = header
        self.parent_header = parent
        self._frames = frames

    @property
    def msg_type(self) -> str:
        return str(self.header.get("msg_type", ""))

    @property
    def msg_id(self) -> str:
        return str(self.header.get("msg_id", ""))

    @property
    def parent_id(self) -> str:
        return str(self.parent_header.get("msg_id", ""))

    @cached_property
    def content(self) -> dict[str, Any]:
        """Decoded as a whole, however large that makes it: `content_as` is for what user code may have sent.

        Raises WireError where it is not a JSON object.
        """
        return _decode(self._frames[3])

    def content_as(self, kind: type[StructT]) -> StructT:
        """The content's fields that `kind` has; all others are skipped, and no objects are made of them.

        Raises WireError where it is not JSON, or a field is missing or of another type.
        """
        part = self._frames[3]
        try:
            if not part.isascii():
                str(part, "utf-8")  # what is skipped, or kept as msgspec.Raw, is not checked for this by msgspec
            return msgspec.json.decode(part, type=kind)
        except msgspec.ValidationError as error:
            raise WireError(f"the content of {self.msg_type!r} cannot be read: {error}") from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            if len(part) > _MAX_LENIENT_BYTES:
                raise WireError(f"the content of {self.msg_type!r} is not JSON: {error}") from None
        try:
            return msgspec.json.decode(_repaired(part), type=kind)
        except (ValueError, RecursionError) as error:
            raise WireError(f"the content of {self.msg_type!r} cannot be read: {error}") from None

    @property
    def buffers(self) -> Sequence[bytes]:
        return self._frames[4:]


Listener = Callable[[Message], None]


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

    def __init__(self, key: bytes, names: Sequence[str], unfinished: Unfinished | None = None) -> None:
        self.unfinished = unfinished or Unfinished()
        self.session = secrets.token_hex(16)
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.rejected = 0
        #: hears every message that no listener of its parent takes
        self.on_other: Listener | None = None
        # Shell, stdin and control share one identity: the kernel addresses its input requests by the shell's.
        self._identity = b"samovar-" + secrets.token_hex(8).encode()
        self._listeners: dict[str, Listener] = {}
        self._connections: dict[str, _Connection] = {}
        self._names = tuple(names)
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
        wire = cls(key, names, unfinished)
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
        connection = self._connections.get(channel)
        if connection is None or connection.lost:
            raise WireError(f"the kernel's {channel} channel is closed")
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
        return Message(channel, parts, _decode(parts[0]), _decode(parts[1]))

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
        self.expected = False
        self.wire = wire
        self._name = name
        self._opening = zmtp.GREETING + zmtp.ready_command(socket_type, identity)
        self._decoder = _decoder()
        self._transport: asyncio.Transport | None = None

    @property
    def lost(self) -> bool:
        return self.gone.done()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
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

    def connection_lost(self, exc: Exception | None) -> None:
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
        if self._transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
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


def _decode(part: bytes) -> dict[str, Any]:
    try:
        return _decode_header(part)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _decode_leniently(part)


def _decode_leniently(part: bytes) -> dict[str, Any]:
    """NaN, lone surrogates and invalid bytes are no JSON, but kernels of other languages do send them."""
    try:
        value = json.loads(part.decode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        raise WireError(f"a part of the message is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise WireError("a part of the message is not a JSON object")
    return value


def _repaired(part: bytes) -> bytes:
    """JSON that any decoder reads: NaN and infinities become null, invalid bytes and lone surrogates U+FFFD."""
    value = json.loads(part.decode("utf-8", "replace"), parse_constant=lambda _: None)
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
