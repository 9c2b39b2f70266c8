"""What a client of KernelChannels missed comes again, in order and within bounds, and what is lost is told of."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import client_channel
from gateway.channel_bounds import ChannelBounds
from gateway.channels import KernelChannels
from gateway.large_frames import LargeFrames
from gateway.output_budget import OutputBudget
from gateway.output_log import Entry, OutputLog
from tests.unit.held_channels import MIB, attach, connect, cut, send, settle, the_channels


@st.composite
def _plays(draw: st.DrawFn) -> list[tuple[str, int]]:
    step = st.one_of(
        st.tuples(st.just("print"), st.integers(1, 5)),
        st.tuples(st.just("cut"), st.integers(0, 3)),
        st.tuples(st.just("stall"), st.just(0)),
        st.tuples(st.just("other"), st.integers(1, 3)),
    )
    return draw(st.lists(step, max_size=30))


@settings(max_examples=150)
@given(_plays(), st.booleans())
def test_whatever_cuts_come_everything_arrives_in_order_and_nothing_acknowledged_twice(
    play: list[tuple[str, int]], exact: bool
) -> None:
    async def run() -> None:
        async with the_channels() as channels:
            wire = attach(channels)
            other = connect(channels, "other")
            asked = await send(channels, other, "kernel_info_request")
            count = 0
            client = connect(channels, "page", "0" if exact else None, answers=False, exact=exact)
            received: list[int] = []  # as a client that drops what it has by the text alone sees it
            raw: list[int] = []
            acknowledged = 0

            def take() -> None:
                nonlocal acknowledged
                texts = [int(content["text"]) for _, header, _, content in client.messages if "text" in content]
                raw.extend(texts)
                for text in texts:
                    assert text > acknowledged, "what was acknowledged came again"
                    assert text <= (received[-1] if received else 0) + 1, "something is missing"
                    if not received or text > received[-1]:
                        received.append(text)
                client.frames.clear()

            for what, number in play:
                if what == "print":
                    for _ in range(number):
                        count += 1
                        wire.prints(str(count))
                elif what == "other":
                    for _ in range(number):
                        wire.says("kernel_info_reply", {}, asked, channel="shell", tag=wire.tag)
                elif what == "stall":
                    client.stalled = True
                else:
                    await settle()
                    take()
                    assert client.client is not None
                    at = None
                    if exact:
                        at = f"{channels._sessions.epoch.id}:{_counted(channels, received[-1] if received else 0)}"
                    elif number and client.pings and received:
                        # The pong of a ping that names all that has come.
                        client.client._ping()
                        client.client.ponged(client.pings[-1])
                        acknowledged = received[-1]
                    cut(client)
                    await settle()
                    client = connect(channels, "page", at, answers=False, exact=exact)
            client.stalled = False
            await settle()
            if client.client is not None and client.client._sending:
                cut(client)
                client = connect(
                    channels, "page", None if not exact else f"{_counted(channels, received[-1] if received else 0)}"
                )
            await settle()
            take()
            assert received == list(range(1, count + 1))
            if exact:
                assert len(raw) == len(set(raw)) or "stall" in [what for what, _ in play]

    asyncio.run(run())


def _counted(channels: KernelChannels, text: int) -> int:
    """The number of the log at which a text stands; 0 for none."""
    for chunk in channels.log._chunks:
        for entry in chunk.entries or []:
            if entry.channel == "iopub" and json.loads(entry.parts[3]).get("text") == str(text):
                return entry.number
    return 0


@pytest.mark.parametrize("after", ["0", "", "-1", "x", "other:3", "99999999999999999999", "1000", "\u0663"])
async def test_a_position_that_means_nothing_here_means_all_of_the_epoch(after: str) -> None:
    async with the_channels() as channels:
        wire = attach(channels)
        for number in range(3):
            wire.prints(str(number))
        client = connect(channels, "late", after)
        await settle()
        assert client.told == ["stream 0", "stream 1", "stream 2"]


async def test_the_first_ping_says_where_a_client_begins_and_later_ones_what_was_sent() -> None:
    async with the_channels() as channels:
        wire = attach(channels)
        wire.prints("before")
        client = connect(channels)
        await settle()
        assert [ping.rpartition(b":")[2] for ping in client.pings] == [b"1"]
        wire.prints("x" * client_channel.PING_BYTES)
        await settle()
        assert client.pings[-1].endswith(b":2"), "at once after so many bytes"
        wire.prints("x")
        await asyncio.sleep(2 * client_channel.PING_SECONDS)
        assert client.pings[-1].endswith(b":3"), "soon in any case"
        assert len({ping.partition(b":")[0] for ping in client.pings}) == 1


async def test_a_pong_of_what_was_never_sent_acknowledges_nothing() -> None:
    async with the_channels() as channels:
        wire = attach(channels)
        client = connect(channels, answers=False)
        client.stalled = True
        for number in range(2):
            wire.prints(str(number))
            await settle()
        assert client.client is not None
        for data in (b"e:5000000", b"e:-1", b"junk", b"", b"9" * 125, b"9" * 4000, "e:\u0663".encode()):
            client.client.ponged(data)
        assert client.client.session.position <= client.client.cursor
        cut(client)
        wire.prints("2")
        again = connect(channels)
        await settle()
        assert again.told[-1:] == ["stream 2"]


async def test_clients_that_are_away_are_forgotten_after_the_window_and_past_the_bound() -> None:
    async with the_channels(ChannelBounds(reconnect_window=0.05)) as channels:
        wire = attach(channels)
        for number in range(3):
            cut(connect(channels, f"away-{number}"))
        await asyncio.sleep(0.1)
        wire.prints("missed")
        client = connect(channels, "new")
        assert len(list(channels._sessions)) == 1
        again = connect(channels, "away-1")
        await settle()
        assert again.told == [] and client.told == []
    async with the_channels() as channels:
        for number in range(200):
            cut(connect(channels, f"away-{number}"))
        assert len(list(channels._sessions)) <= 65


async def test_messages_that_the_log_has_lost_are_told_of() -> None:
    async with the_channels(memory=2 * MIB) as channels:
        wire = attach(channels)
        slow = connect(channels, "slow")
        header = await send(channels, slow, code="1")
        await settle()
        slow.stalled = True
        for _ in range(60):
            wire.prints("x" * 200_000, header)
            await asyncio.sleep(0)
        cut(slow)
        again = connect(channels, "slow")
        await asyncio.sleep(0.05)
        notices = [(parent, content["text"]) for _, _, parent, content in again.messages if content["name"] == "stderr"]
        (notice,) = notices
        assert notice[0] == header and "lost" in notice[1] and "MiB" in notice[1]


async def test_a_message_that_ended_a_connection_twice_gives_way_to_a_notice() -> None:
    async with the_channels() as channels:
        wire = attach(channels)
        client = connect(channels)
        client.stalled = True
        for number in range(3):
            await settle()
            if number == 0:
                wire.says("comm_msg", {"data": {}}, buffers=[b"x" * (2 * MIB)])
                wire.prints("after")
                await settle()
            assert any(len(frame) > MIB for frame in client.frames) == (number < 2)
            if number < 2:
                # It breaks over the message, having answered the ping before it.
                cut(client)
                client = connect(channels)
                client.stalled = number == 0
        assert "left out" in client.told[0]
        assert client.told[1:] == ["stream after"]


async def test_large_messages_are_read_from_disk_only_where_there_is_room_for_them(tmp_path: Path) -> None:
    budget = OutputBudget(memory_bytes=4 * MIB, disk_bytes=64 * MIB)
    log = OutputLog(tmp_path, memory_bytes=4 * MIB, disk_bytes=64 * MIB, budget=budget)
    channels = KernelChannels(log, ChannelBounds(), LargeFrames(4 * MIB))
    loaded = 0
    run = budget.run

    async def counted(call: Any) -> Any:
        nonlocal loaded
        found = await run(call)
        loaded += isinstance(found, list) and isinstance(found[0], Entry)
        return found

    budget.run = counted  # type: ignore[method-assign]
    try:
        wire = attach(channels)
        wire.says("display_data", {"data": "x" * 3 * MIB})
        assert log._writer is not None
        await log._writer
        sockets = [connect(channels, f"page{number}", "0") for number in range(5)]
        for socket in sockets:
            socket.stalled = True
        await asyncio.sleep(0.1)
        assert sum(len(socket.frames) for socket in sockets) == 1
        assert loaded == 1, "each of them would hold a copy of its own while it waits"
    finally:
        await channels.close(1001, "the test is over")
        budget.close()
