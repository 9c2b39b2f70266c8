"""Websocket frames: what we write jupyter_server reads and the other way round; what is no message is refused."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jupyter_server.services.kernels.connection.base import (
    deserialize_binary_message,
    deserialize_msg_from_ws_v1,
    serialize_binary_message,
    serialize_msg_to_ws_v1,
)

from gateway.websocket_frames import (
    CHANNELS,
    LEGACY,
    V1,
    FrameError,
    decode,
    encode,
    header_of,
    in_place_of,
    legacy_notice,
)

KINDS = (V1, LEGACY)
HEADER = b'{"msg_id":"1","msg_type":"stream","session":"s","username":"u","version":"5.4"}'
PARTS = [HEADER, b'{"msg_id":"0"}', b"{}", b'{"name":"stdout","text":"hello"}']

values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**60), 2**60),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(max_size=8), values, max_size=4)
headers = st.builds(
    lambda rest, msg_id, msg_type: {**rest, "msg_id": msg_id, "msg_type": msg_type}, objects, st.text(), st.text()
).map(lambda header: {name: value for name, value in header.items() if name != "session"})


def as_json(value: Any, *, pretty: bool = False) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2 if pretty else None).encode("utf-8", "surrogatepass")


parts_lists = st.builds(
    lambda header, others, pretty, buffers: [*(as_json(part, pretty=pretty) for part in (header, *others)), *buffers],
    headers,
    st.tuples(objects, objects, objects),
    st.booleans(),
    st.lists(st.binary(max_size=40), max_size=4),
)


@given(parts_lists, st.sampled_from(KINDS), st.sampled_from(CHANNELS))
def test_what_is_encoded_comes_back_to_the_byte(parts: list[bytes], kind: str, channel: str) -> None:
    frame = encode(kind, channel, parts)
    assert isinstance(frame, bytes) == (kind == V1 or len(parts) > 4)
    assert decode(kind, frame, CHANNELS) == (channel, parts)


@given(parts_lists, st.sampled_from(CHANNELS))
def test_v1_is_what_jupyter_server_writes_and_reads(parts: list[bytes], channel: str) -> None:
    assert encode(V1, channel, parts) == serialize_msg_to_ws_v1(parts, channel)
    assert deserialize_msg_from_ws_v1(encode(V1, channel, parts)) == (channel, parts)


@given(parts_lists, st.sampled_from(CHANNELS))
def test_jupyter_server_reads_our_older_form(parts: list[bytes], channel: str) -> None:
    frame = encode(LEGACY, channel, parts)
    message = deserialize_binary_message(frame) if isinstance(frame, bytes) else json.loads(frame)
    header, parent, metadata, content = [json.loads(part) for part in parts[:4]]
    assert message == {
        "msg_id": header["msg_id"],
        "msg_type": header["msg_type"],
        "channel": channel,
        "header": header,
        "parent_header": parent,
        "metadata": metadata,
        "content": content,
        "buffers": parts[4:],
    }


@given(parts_lists, st.sampled_from(("shell", "control", "stdin")), st.booleans())
def test_we_read_what_clients_of_jupyter_server_write_in_the_older_form(
    parts: list[bytes], channel: str, extra: bool
) -> None:
    names = ("header", "parent_header", "metadata", "content")
    message: dict[str, Any] = {name: json.loads(part) for name, part in zip(names, parts, strict=False)}
    message |= {"channel": channel, "buffers": parts[4:]} | ({"msg_id": "1", "more": [1]} if extra else {})
    frame: bytes | str
    if parts[4:]:
        frame = serialize_binary_message(message)
    else:
        frame = json.dumps({**message, "buffers": []})
    read_channel, read = decode(LEGACY, frame)
    assert read_channel == channel
    assert [json.loads(part) for part in read[:4]] == [json.loads(part) for part in parts[:4]]
    assert read[4:] == parts[4:]


def test_the_older_form_may_leave_out_all_but_the_header() -> None:
    frame = json.dumps({"header": {"msg_id": "1", "msg_type": "x"}, "parent_header": None})
    channel, parts = decode(LEGACY, frame)
    assert channel == "shell"
    assert [json.loads(part) for part in parts] == [{"msg_id": "1", "msg_type": "x"}, {}, {}, {}]


@given(st.binary(max_size=300), st.sampled_from(KINDS))
def test_any_bytes_give_a_message_or_a_reason(noise: bytes, kind: str) -> None:
    try:
        channel, parts = decode(kind, noise)
    except FrameError as error:
        assert str(error)
    else:
        assert channel in CHANNELS
        assert len(parts) >= 4


@given(st.text(max_size=100))
def test_any_text_gives_a_message_or_a_reason(noise: str) -> None:
    with pytest.raises(FrameError):
        decode(V1, noise)
    try:
        decode(LEGACY, noise)
    except FrameError as error:
        assert str(error)


@given(parts_lists, st.sampled_from(KINDS), st.data())
def test_a_spoilt_binary_frame_gives_a_message_within_it_or_a_reason(parts: list[bytes], kind: str, data: Any) -> None:
    frame = encode(kind, "shell", [*parts, b"a buffer"])
    assert isinstance(frame, bytes)
    at = data.draw(st.integers(0, len(frame) - 1))
    spoilt = frame[:at] + bytes([data.draw(st.integers(0, 255))]) + frame[at + 1 :]
    try:
        _, read = decode(kind, spoilt)
    except FrameError:
        return
    assert sum(map(len, read)) <= len(frame)


@given(parts_lists, st.data())
def test_a_frame_of_v1_that_was_cut_is_refused(parts: list[bytes], data: Any) -> None:
    frame = encode(V1, "shell", parts)
    with pytest.raises(FrameError):
        decode(V1, frame[: data.draw(st.integers(0, len(frame) - 1))])  # type: ignore[arg-type]


def v1_frame(*offsets: int, count: int | None = None, rest: bytes = b"shell" + b"".join(PARTS)) -> bytes:
    return struct.pack(f"<{len(offsets) + 1}Q", len(offsets) if count is None else count, *offsets) + rest


GOOD = encode(V1, "shell", PARTS)
assert isinstance(GOOD, bytes)
START = 8 * 7


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x06",
        v1_frame(count=2**64 - 1),
        v1_frame(count=2**31),
        v1_frame(count=4097),
        v1_frame(count=0),
        v1_frame(START, START + 5, len(GOOD)),
        v1_frame(START, START + 5, START + 6, START + 6, START + 6, 2**64 - 1),
        v1_frame(START, START + 5, START + 20, START + 10, START + 30, len(GOOD)),
        v1_frame(0, 5, 10, 15, 20, len(GOOD)),
        GOOD + b"x",
    ],
)
def test_offsets_that_lie_are_refused(frame: bytes) -> None:
    with pytest.raises(FrameError, match=r"frame of|offsets"):
        decode(V1, frame)


BOMB = b"[" * 200_000 + b"]" * 200_000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize(
    "part", [BOMB, b'{"a":' + BOMB + b"}", b"[]", b"1", b"", b'{"a":1', b'{"a":NaN}', b'{"a":"\xff"}']
)
def test_a_part_that_is_no_object_is_refused(kind: str, at: int, part: bytes) -> None:
    parts = [part if number == at else good for number, good in enumerate(PARTS)]
    frame: bytes | str = encode(V1, "shell", parts)
    if kind == LEGACY:
        names = (b"header", b"parent_header", b"metadata", b"content")
        text = b"{%b}" % b",".join(b'"%b":%b' % pair for pair in zip(names, parts, strict=True))
        frame = struct.pack("!II", 1, 8) + text
    with pytest.raises(FrameError, match=r"header|metadata|content|message"):
        decode(kind, frame)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channel", ["iopub", "hb", "", "shell\0", "s" * 5000])
def test_a_client_may_not_send_on_other_channels(kind: str, channel: str) -> None:
    frame = encode(kind, channel, PARTS)
    if kind == LEGACY and not channel:
        assert decode(kind, frame)[0] == "shell"
        return
    with pytest.raises(FrameError, match="unknown channel") as refusal:
        decode(kind, frame)
    assert len(str(refusal.value)) < 100


def test_a_channel_that_is_no_text_is_refused() -> None:
    frame = GOOD.replace(b"shell", b"sh\xffll")
    with pytest.raises(FrameError, match="UTF-8"):
        decode(V1, frame)


@pytest.mark.parametrize("header", [b"{}", b'{"msg_id":1,"msg_type":"x"}', b'{"msg_id":"1"}'])
@pytest.mark.parametrize("kind", KINDS)
def test_a_header_needs_an_id_and_a_type(header: bytes, kind: str) -> None:
    frame: bytes | str = encode(V1, "shell", [header, *PARTS[1:]])
    if kind == LEGACY:
        frame = f'{{"header":{header.decode()}}}'
    with pytest.raises(FrameError, match="the header cannot be read"):
        decode(kind, frame)


def test_a_header_is_bounded() -> None:
    with pytest.raises(FrameError, match="header of more than"):
        header_of([b'{"msg_id":"' + b"x" * 100_000 + b'","msg_type":"x"}'])


def test_what_is_no_json_but_kernels_do_send_is_readable_in_the_older_form() -> None:
    frame = encode(LEGACY, "iopub", [HEADER, b"{}", b'{"a":NaN,"b":-Infinity}', b'{"text":"caf\xff"}'])
    assert isinstance(frame, str)
    message = json.loads(frame, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert message["metadata"] == {"a": None, "b": None}
    assert message["content"] == {"text": "caf\ufffd"}


@pytest.mark.parametrize("part", [b"", b"{", BOMB, b'{"text":"\xff' + b"x" * 2_000_000 + b'"}'])
def test_what_nobody_could_read_is_refused_in_the_older_form(part: bytes) -> None:
    with pytest.raises(FrameError, match="the content"):
        encode(LEGACY, "iopub", [*PARTS[:3], part])


def test_clients_that_break_on_it_are_told_in_place_of_it() -> None:
    assert legacy_notice(PARTS) is None
    assert "binary data" in str(legacy_notice([*PARTS, b""]))
    assert legacy_notice([*PARTS[:3], b"x" * (8 * 1024 * 1024)]) is None
    assert "9.5 MiB" in str(legacy_notice([*PARTS[:3], b"x" * (19 * 1024 * 1024 // 2)]))


@given(st.sampled_from(CHANNELS), parts_lists, st.text(), st.sampled_from(KINDS))
def test_a_notice_stands_where_the_message_would_have_been(
    channel: str, parts: list[bytes], text: str, kind: str
) -> None:
    told_channel, told = decode(kind, encode(kind, *in_place_of(channel, parts, text)), CHANNELS)
    assert told_channel == channel
    assert told[1] == parts[1]
    before, after = json.loads(parts[0]), json.loads(told[0])
    content = json.loads(told[3])
    if channel == "iopub":
        assert after == before | {"msg_type": "stream"}
        assert content == {"name": "stderr", "text": text + "\n"}
    else:
        assert after == before
        assert content == {"status": "error", "ename": "MessageLeftOut", "evalue": text, "traceback": [text]}
