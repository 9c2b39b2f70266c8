"""The ZMTP codec: what we encode comes back, however it is cut; what leaves protocol or bounds is refused early."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelprovisioner import zmtp

OPENING = zmtp.GREETING + zmtp.ready_command("ROUTER")


def decoder(max_message: int = 10_000, max_frames: int = 16) -> zmtp.Decoder:
    return zmtp.Decoder(max_message=max_message, max_frames=max_frames)


def opened(**bounds: int) -> zmtp.Decoder:
    result = decoder(**bounds)
    assert result.feed(OPENING) == []
    assert result.ready
    return result


messages = st.lists(st.lists(st.binary(max_size=600), min_size=1, max_size=8), max_size=6)


@given(messages, st.lists(st.integers(1, 200), min_size=1, max_size=20))
def test_messages_survive_any_cut_of_the_stream(sent: list[list[bytes]], cuts: list[int]) -> None:
    stream = OPENING + b"".join(zmtp.encode(frames) for frames in sent)
    reader = decoder()
    received: list[list[bytes]] = []
    position, turn = 0, 0
    while position < len(stream):
        size = cuts[turn % len(cuts)]
        received += reader.feed(stream[position : position + size])
        position, turn = position + size, turn + 1
    assert received == sent


@given(st.binary(max_size=2000))
def test_any_bytes_give_messages_or_a_protocol_error(noise: bytes) -> None:
    reader = opened()
    try:
        for frames in reader.feed(noise):
            assert sum(map(len, frames)) <= 10_000
    except zmtp.ZmtpError:
        pass  # a refusal is one of the two right answers; anything else propagates


def test_a_forged_length_is_refused_before_its_bytes_come() -> None:
    with pytest.raises(zmtp.ZmtpError, match="more than 10000 bytes"):
        opened().feed(b"\x02" + struct.pack(">Q", 10 * 2**30))


def test_a_message_of_many_parts_is_bounded_in_bytes() -> None:
    reader = opened()
    part = b"\x03" + struct.pack(">Q", 3000) + b"x" * 3000
    with pytest.raises(zmtp.ZmtpError, match="more than 10000 bytes"):
        for _ in range(4):
            reader.feed(part)


def test_an_endless_message_of_empty_parts_is_bounded_in_frames() -> None:
    reader = opened()
    with pytest.raises(zmtp.ZmtpError, match="more than 16 frames"):
        for _ in range(17):
            reader.feed(b"\x01\x00")


def test_the_bytes_of_one_message_do_not_count_for_the_next() -> None:
    reader = opened()
    for _ in range(5):
        assert reader.feed(zmtp.encode([b"x" * 9000])) == [[b"x" * 9000]]


@pytest.mark.parametrize(
    ("opening", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request".ljust(64), "does not speak ZMTP 3"),
        (zmtp.GREETING[:10] + b"\x01" + zmtp.GREETING[11:], "does not speak ZMTP 3"),
        (zmtp.GREETING[:12] + b"CURVE".ljust(20, b"\0") + zmtp.GREETING[32:], "security mechanism"),
        (zmtp.GREETING + b"\x04\x0a\x05ERROR\x03bad", "refused the connection"),
        (zmtp.GREETING + zmtp.encode([b"early"]), "before READY"),
    ],
)
def test_a_wrong_opening_is_refused(opening: bytes, reason: str) -> None:
    with pytest.raises(zmtp.ZmtpError, match=reason):
        decoder().feed(opening)


def test_commands_after_ready_are_ignored() -> None:
    assert opened().feed(b"\x04\x05\x04PING" + zmtp.encode([b"a"])) == [[b"a"]]


def test_what_is_held_of_an_unfinished_message_is_known() -> None:
    reader = opened()
    assert reader.unfinished == 0
    reader.feed(b"\x01\x05first\x00\x06sec")
    assert reader.unfinished == 5 + 2 + 3
    assert reader.feed(b"ond") == [[b"first", b"second"]]
    assert reader.unfinished == 0


def test_an_endless_row_of_commands_is_refused() -> None:
    reader = opened()
    with pytest.raises(zmtp.ZmtpError, match="more than 1000 commands"):
        reader.feed(b"\x04\x00" * 1001)
