"""Websocket frames of Jupyter messages: v1.kernel.websocket.jupyter.org, and the older JSON form.

Whatever a client or a kernel wrote goes through as it is: only a header's few names are read, and of the rest only
whether it is JSON. What a client sends is bounded here by its form; its size is bounded where the frame is read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Sequence
from itertools import pairwise

import msgspec

from kernelprovisioner.wire import MAX_HEADER_BYTES, MAX_MESSAGE_FRAMES

#: The subprotocol's name; clients that ask for none speak the older form.
V1 = "v1.kernel.websocket.jupyter.org"
LEGACY = ""
#: what a client may send on, and what a kernel sends on
CLIENT_CHANNELS = ("shell", "control", "stdin")
CHANNELS = (*CLIENT_CHANNELS, "iopub")

_PARTS = ("header", "parent_header", "metadata", "content")
_MAX_NAME = 64
#: JSON makes objects of twenty times its size, so only small parts are repaired.
_MAX_REPAIRED_BYTES = 1024 * 1024
#: jupyter_server's gateway client loses its connection at 10 MiB.
_MAX_LEGACY_BYTES = 9 * 1024 * 1024
_REMEDY = "--ServerApp.kernel_websocket_connection_class=gateway.lab.SamovarWebSocketConnection"


class FrameError(Exception):
    """A frame is no Jupyter message, or a message cannot be put into one; the text says what is wrong."""


class Header(msgspec.Struct, gc=False):
    """What is read of a header."""

    msg_id: str
    msg_type: str
    session: str = ""


class _LegacyMessage(msgspec.Struct, gc=False):
    header: msgspec.Raw
    parent_header: msgspec.Raw = msgspec.Raw(b"{}")
    metadata: msgspec.Raw = msgspec.Raw(b"{}")
    content: msgspec.Raw = msgspec.Raw(b"{}")
    channel: str | None = None


_read_header = msgspec.json.Decoder(Header).decode
_read_any = msgspec.json.Decoder(msgspec.Raw).decode
_read_legacy = msgspec.json.Decoder(_LegacyMessage).decode
_to_json = msgspec.json.Encoder().encode


def encode(kind: str, channel: str, parts: Sequence[bytes]) -> bytes | str:
    """Return the frame of one message: bytes go into a binary one, str into a text one.

    `parts` are header, parent header, metadata, content and buffers. Raises FrameError where the older form cannot
    hold them, which has to be JSON of at most 4 GiB.
    """
    return _encode_v1(channel, parts) if kind == V1 else _encode_legacy(channel, parts)


def decode(kind: str, data: bytes | str, channels: Collection[str] = CLIENT_CHANNELS) -> tuple[str, list[bytes]]:
    """Return one frame's channel, which is one of `channels`, and its parts. Raises FrameError."""
    if kind == V1:
        if isinstance(data, str):
            raise FrameError(f"a text frame on a connection that speaks {V1}")
        channel, parts = _decode_v1(data)
    else:
        channel, parts = _decode_legacy(data)
    if channel not in channels:
        raise FrameError(f"unknown channel {channel[:_MAX_NAME]!r}")
    header_of(parts)
    if kind == V1:
        for name, part in zip(_PARTS[1:], parts[1:4], strict=True):
            _check(name, part)
    return channel, parts


def header_of(parts: Sequence[bytes]) -> Header:
    """Return what is read of a message's header. Raises FrameError."""
    if len(parts[0]) > MAX_HEADER_BYTES:
        raise FrameError(f"a header of more than {MAX_HEADER_BYTES} bytes")
    try:
        return _read_header(parts[0])
    except (ValueError, RecursionError) as error:
        raise FrameError(f"the header cannot be read: {error}") from None


def legacy_notice(parts: Sequence[bytes]) -> str | None:
    """Return what to tell a client that breaks on binary and on large frames in place of this message; None: send it.

    jupyter_server's gateway client is one: the first ends its reading, the second its connection, again and again.
    """
    size = sum(map(len, parts))
    if len(parts) > 4:
        what = "binary data, which jupyter_server does not pass on from a gateway"
    elif size > _MAX_LEGACY_BYTES:
        what = f"{size / 1024 / 1024:.1f} MiB, and jupyter_server takes at most 10 MiB from a gateway"
    else:
        return None
    kind = header_of(parts).msg_type[:_MAX_NAME]
    return f"[samovar: a message ({kind}) was left out: it has {what}. Start it with {_REMEDY}]"


def in_place_of(channel: str, parts: Sequence[bytes], text: str) -> tuple[str, list[bytes]]:
    """Return a message that shows `text` where the one of these parts would have gone, or answers what it answers."""
    try:
        header = msgspec.json.decode(parts[0], type=dict[str, msgspec.Raw])
    except (ValueError, RecursionError) as error:
        raise FrameError(f"the header cannot be read: {error}") from None
    content: dict[str, object]
    if channel == "iopub":
        header["msg_type"] = msgspec.Raw(b'"stream"')
        content = {"name": "stderr", "text": text + "\n"}
    else:
        content = {"status": "error", "ename": "MessageLeftOut", "evalue": text, "traceback": [text]}
    return channel, [_to_json(header), parts[1], b"{}", _to_json(content)]


def _encode_v1(channel: str, parts: Sequence[bytes]) -> bytes:
    name = channel.encode()
    offset = 8 * (len(parts) + 3)
    offsets = [offset, offset := offset + len(name)]
    for part in parts:
        offset += len(part)
        offsets.append(offset)
    return b"".join((struct.pack(f"<{len(offsets) + 1}Q", len(offsets), *offsets), name, *parts))


def _decode_v1(data: bytes) -> tuple[str, list[bytes]]:
    """The frame: how many offsets, the offsets (channel, each part, the end), and what they point at; 64 bits each."""
    offsets = _offsets(data, "<Q", least=len(_PARTS) + 2)
    if offsets[-1] != len(data):
        raise FrameError(f"a frame of {len(data)} bytes that says it ends at {offsets[-1]}")
    name, *parts = [data[start:end] for start, end in pairwise(offsets)]
    try:
        return name.decode(), parts
    except UnicodeDecodeError:
        raise FrameError("the channel's name is not UTF-8") from None


def _encode_legacy(channel: str, parts: Sequence[bytes]) -> bytes | str:
    header = header_of(parts)
    fields = {
        "msg_id": _to_json(header.msg_id),
        "msg_type": _to_json(header.msg_type),
        "channel": _to_json(channel),
        **{name: _readable(name, part) for name, part in zip(_PARTS, parts, strict=False)},
    }
    buffers = parts[4:]
    if not buffers:
        fields["buffers"] = b"[]"
    text = b"{" + b",".join(b'"%b":%b' % (name.encode(), part) for name, part in fields.items()) + b"}"
    if not buffers:
        return text.decode()
    offset = 4 * (len(buffers) + 2)
    offsets = [offset]
    for part in (text, *buffers[:-1]):
        offset += len(part)
        offsets.append(offset)
    try:
        start = struct.pack(f"!{len(offsets) + 1}I", len(offsets), *offsets)
    except struct.error:
        raise FrameError("a message of more than 4 GiB") from None
    return b"".join((start, text, *buffers))


def _decode_legacy(data: bytes | str) -> tuple[str, list[bytes]]:
    """A text frame is the message as JSON; a binary one: how many parts, their offsets (32 bits), JSON, buffers."""
    buffers: list[bytes] = []
    try:
        if isinstance(data, str):
            text = data.encode()
        else:
            offsets = [*_offsets(data, "!I", least=1), len(data)]
            text, *buffers = [data[start:end] for start, end in pairwise(offsets)]
            str(text, "utf-8")
        message = _read_legacy(text)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"the message cannot be read: {error}") from None
    raw = (message.header, message.parent_header, message.metadata, message.content)
    parts = [bytes(part) if bytes(part) != b"null" else b"{}" for part in raw]
    for name, part in zip(_PARTS, parts, strict=True):
        if not part.startswith(b"{"):
            raise FrameError(f"the {name} is not an object")
    return message.channel or "shell", [*parts, *buffers]


def _offsets(data: bytes, form: str, *, least: int) -> list[int]:
    """Return the offsets that a binary frame begins with: in order, and within it."""
    order, size = form[0], struct.calcsize(form)
    if len(data) < size:
        raise FrameError(f"a frame of {len(data)} bytes")
    (count,) = struct.unpack_from(form, data)
    if not least <= count <= MAX_MESSAGE_FRAMES:
        raise FrameError(f"a frame of {count} parts")
    start = size * (count + 1)
    if start > len(data):
        raise FrameError(f"a frame of {len(data)} bytes is too short for {count} offsets")
    offsets = list(struct.unpack_from(f"{order}{count}{form[1]}", data, size))
    if offsets[0] < start or offsets[-1] > len(data) or any(a > b for a, b in pairwise(offsets)):
        raise FrameError("a frame whose offsets overlap or lead out of it")
    return offsets


def _check(name: str, part: bytes) -> None:
    """Raise FrameError where a part is not a JSON object."""
    try:
        value = _read_any(part)
        if not part.isascii():
            str(part, "utf-8")
    except (ValueError, RecursionError) as error:
        raise FrameError(f"the {name} is not JSON: {error}") from None
    if memoryview(value)[0] != ord("{"):
        raise FrameError(f"the {name} is not an object")


def _readable(name: str, part: bytes) -> bytes:
    """Return a part as JSON that any client reads: NaN and infinities become null, invalid bytes U+FFFD."""
    try:
        _check(name, part)
    except FrameError:
        if len(part) > _MAX_REPAIRED_BYTES:
            raise
    else:
        return part
    try:
        value = json.loads(part.decode("utf-8", "replace"), parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"the {name} is not JSON: {error}") from None
    return json.dumps(value).encode()
