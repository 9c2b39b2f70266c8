"""ZMTP 3.0, the wire protocol of ZeroMQ sockets, as far as a Jupyter client needs it: DEALER and SUB, NULL mechanism.

Ours instead of libzmq's where the host reads from a sandbox, because libzmq bounds a frame but not the number of frames
in a message: a hostile kernel could fill the gateway's memory with one endless multipart message (docs/decisions.md).
Pure: bytes in, messages out; connections are in `wire.py`. Source of the rules: ZeroMQ RFC 23, ZMTP 3.0.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

GREETING = b"\xff" + b"\0" * 8 + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" * 32
SUBSCRIBE = b"\x01"

#: A peer has no reason for many of them: heartbeats are for who asked for them, which we do not.
_MAX_COMMANDS = 1000
_MORE, _LONG, _COMMAND = 0x01, 0x02, 0x04
_LENGTH = struct.Struct(">Q")
_PROPERTY_LENGTH = struct.Struct(">I")


class ZmtpError(Exception):
    """The peer broke the protocol or one of our bounds; the connection cannot be used any further."""


def ready_command(socket_type: str, identity: bytes = b"") -> bytes:
    """Return the READY command that opens the connection after the greetings."""
    body = b"\x05READY" + _property(b"Socket-Type", socket_type.encode())
    if identity:
        body += _property(b"Identity", identity)
    return bytes((_COMMAND, len(body))) + body


def encode(frames: Sequence[bytes]) -> bytes:
    """Return one multipart message as bytes for the wire."""
    pieces: list[bytes] = []
    last = len(frames) - 1
    for index, frame in enumerate(frames):
        more = _MORE if index != last else 0
        size = len(frame)
        pieces.append(bytes((more, size)) if size < 256 else bytes((more | _LONG,)) + _LENGTH.pack(size))
        pieces.append(frame)
    return b"".join(pieces)


class Decoder:
    """Turns what a peer sends into multipart messages, within bounds on bytes and frames of one message.

    Greeting and READY come first; `ready` says that both are behind us. Later commands are ignored, as the RFC asks.
    """

    def __init__(self, *, max_message: int, max_frames: int) -> None:
        self.ready = False
        self._max_message = max_message
        self._max_frames = max_frames
        self._greeted = False
        self._buffer = bytearray()
        self._frames: list[bytes] = []
        self._bytes = 0
        self._commands = 0

    @property
    def unfinished(self) -> int:
        """Bytes that are held of a message that is not complete."""
        return len(self._buffer) + self._bytes

    def feed(self, data: bytes) -> list[list[bytes]]:
        """Return the messages that `data` completes. Raises ZmtpError where the peer leaves protocol or bounds."""
        buffer = self._buffer
        buffer += data
        start = 0
        if not self._greeted:
            if len(buffer) < len(GREETING):
                return []
            _check_greeting(bytes(buffer[: len(GREETING)]))
            self._greeted = True
            start = len(GREETING)
        messages: list[list[bytes]] = []
        available = len(buffer)
        while available - start >= 2:
            flags = buffer[start]
            if flags & _LONG:
                if available - start < 9:
                    break
                size = _LENGTH.unpack_from(buffer, start + 1)[0]
                body = start + 9
            else:
                size = buffer[start + 1]
                body = start + 2
            if size + self._bytes > self._max_message:
                raise ZmtpError(f"message of more than {self._max_message} bytes")
            if available < body + size:
                break
            frame = bytes(memoryview(buffer)[body : body + size])
            start = body + size
            if flags & _COMMAND:
                self._command(frame)
            elif not self.ready:
                raise ZmtpError("message before READY")
            else:
                self._bytes += size
                self._frames.append(frame)
                if len(self._frames) > self._max_frames:
                    raise ZmtpError(f"message of more than {self._max_frames} frames")
                if not flags & _MORE:
                    messages.append(self._frames)
                    self._frames, self._bytes = [], 0
        del buffer[:start]
        return messages

    def _command(self, frame: bytes) -> None:
        self._commands += 1
        if self._commands > _MAX_COMMANDS:
            raise ZmtpError(f"more than {_MAX_COMMANDS} commands")
        if self.ready:
            return
        if frame.startswith(b"\x05READY"):
            self.ready = True
        else:
            raise ZmtpError(f"peer refused the connection: {frame[:100]!r}")


def _check_greeting(greeting: bytes) -> None:
    if greeting[0] != 0xFF or not greeting[9] & 1 or greeting[10] < 3:
        raise ZmtpError("peer does not speak ZMTP 3")
    if greeting[12:32].rstrip(b"\0") != b"NULL":
        raise ZmtpError("peer asks for a security mechanism that is not NULL")


def _property(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + _PROPERTY_LENGTH.pack(len(value)) + value
