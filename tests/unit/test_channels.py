"""KernelChannels: who gets what, what waits for a kernel, and who is refused or cut."""

from __future__ import annotations

import asyncio

import pytest

from gateway import channels as channels_module
from gateway import client_channel
from gateway.channel_bounds import ChannelBounds
from gateway.channels import Refused
from gateway.client_channel import ClientForm
from gateway.websocket_frames import CHANNELS, V1, FrameError, decode, encode
from kernelprovisioner.message import Message
from tests.unit.held_channels import FakeSocket, attach, connect, cut, send, settle, the_channels


async def test_replies_go_to_who_asked_and_outputs_to_all() -> None:
    async with the_channels() as channels:
        wire = attach(channels)
        one, two = connect(channels, "one"), connect(channels, "two")
        header = await send(channels, one, code="1")
        wire.prints("1", header)
        wire.says("execute_reply", {"status": "ok"}, header, channel="shell", tag=wire.tag)
        wire.says("input_request", {"prompt": "?"}, header, channel="stdin", tag=wire.tag)
        wire.says("samovar_probe_reply", {"status": "ok"}, channel="control")
        wire.says("iopub_welcome", {"subscription": ""})
        await settle()
        assert one.told == ["stream 1", "execute_reply ok", "input_request"]
        assert two.told == ["stream 1"]


async def test_the_parts_of_messages_go_through_untouched() -> None:
    async with the_channels() as channels:
        wire = attach(channels)
        client = connect(channels)
        parts = [b'{"msg_id" : "a",  "msg_type":"comm_msg"}', b"{ }", b'{"x":1.0}', b'{"data":  1e3}', b"\0buffer", b""]
        assert client.client is not None
        await channels.received(client.client, encode(V1, "shell", parts))
        assert wire.forwarded == [("shell", parts, client.client.session.tag)]
        header = {"msg_id": "k", "msg_type": "comm_msg"}
        wire.on_any and wire.on_any(Message("iopub", parts, header, {}, b"topic"))
        await settle()
        assert decode(V1, client.frames[-1], CHANNELS) == ("iopub", parts)


async def test_a_frame_that_is_none_is_an_error_and_changes_nothing() -> None:
    async with the_channels() as channels:
        wire = attach(channels)
        client = connect(channels)
        assert client.client is not None
        with pytest.raises(FrameError):
            await channels.received(client.client, b"nonsense")
        assert not wire.forwarded and not channels.busy


async def test_who_is_new_gets_what_comes_from_now_on_and_learns_that_the_kernel_is_busy() -> None:
    async with the_channels() as channels:
        wire = attach(channels)
        first = connect(channels, "first")
        header = await send(channels, first, code="1")
        wire.says("status", {"execution_state": "busy"}, header)
        wire.prints("old", header)
        await settle()
        late = connect(channels, "late")
        wire.prints("new", header)
        await settle()
        assert late.told == ["status busy", "stream new"]
        assert first.told == ["status busy", "stream old", "stream new"]


async def test_a_fragile_client_gets_a_notice_in_place_of_binary() -> None:
    async with the_channels() as channels:
        wire = attach(channels)
        socket = FakeSocket()
        socket.client = channels.open("page", socket, ClientForm(V1, fragile=True))
        wire.says("comm_msg", {"data": {}}, buffers=[b"x"])
        wire.prints("after")
        await settle()
        assert len(socket.told) == 2 and "binary" in socket.told[0]
        assert socket.told[1] == "stream after"


async def test_a_client_that_says_and_takes_nothing_is_cut_but_not_one_that_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_channel, "KEEP_ALIVE_SECONDS", 0.02)
    monkeypatch.setattr(client_channel, "SILENCE_SECONDS", 0.1)
    async with the_channels() as channels:
        wire = attach(channels)
        silent, takes = connect(channels, "silent", answers=False), connect(channels, "takes", answers=False)
        silent.stalled = True
        for _ in range(20):
            wire.prints("x")
            await asyncio.sleep(0.01)
        assert silent.closing is not None and silent.closing[0] == 1011
        assert takes.closing is None


async def test_as_many_websockets_as_allowed_and_none_on_a_kernel_that_is_gone() -> None:
    async with the_channels(ChannelBounds(max_websockets=2)) as channels:
        one, _ = connect(channels, "one"), connect(channels, "two")
        with pytest.raises(Refused) as refused:
            connect(channels, "three")
        assert refused.value.code == 1013
        connect(channels, "one")  # takes the place of its own
        assert one.closing is not None and one.closing[0] == 1000
        assert channels.connections == 2
        await channels.close(4410, "It is gone.")
        with pytest.raises(Refused) as refused:
            connect(channels, "four")
        assert (refused.value.code, str(refused.value)) == (4410, "It is gone.")


async def test_requests_wait_for_room_and_for_a_sandbox() -> None:
    async with the_channels() as channels:
        client = connect(channels)
        waiting = asyncio.create_task(send(channels, client, code="1"))
        await settle()
        assert not waiting.done()
        wire = attach(channels)
        await waiting
        assert len(wire.forwarded) == 1
        wire.has_room.clear()
        waiting = asyncio.create_task(send(channels, client, code="2"))
        await settle()
        assert len(wire.forwarded) == 1
        # The kernel is given up before it reads again: the next one gets it.
        channels.tell_restart()
        channels.detach()
        new = attach(channels, "kernel-2")
        wire.has_room.set()
        await waiting
        assert len(wire.forwarded) == 1 and len(new.forwarded) == 1


async def test_what_waits_for_a_kernel_that_does_not_read_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels_module, "MAX_WAITING_BYTES", 1500)
    async with the_channels() as channels:
        wire = attach(channels)
        wire.has_room.clear()
        waiting = []
        for number in range(3):
            client = connect(channels, f"gone-{number}")
            waiting.append(asyncio.create_task(send(channels, client, code="x" * 400)))
            await settle()
            cut(client)
        with pytest.raises(Refused) as refused:
            await send(channels, connect(channels), code="1")
        assert refused.value.code == 1013
        wire.has_room.set()
        await asyncio.gather(*waiting)
        await send(channels, connect(channels), code="1")
        assert len(wire.forwarded) == 4


async def test_who_waits_for_a_sandbox_that_never_comes_is_let_go() -> None:
    async with the_channels() as channels:
        client = connect(channels)
        waiting = asyncio.create_task(send(channels, client, code="1"))
        await settle()
        await channels.close(4410, "gone")
        async with asyncio.timeout(1):
            await waiting


async def test_a_cell_is_not_over_before_its_reply_is_there() -> None:
    async with the_channels() as channels:
        wire = attach(channels)
        page = connect(channels)
        cell = await send(channels, page, code="1")
        wire.says("status", {"execution_state": "busy"}, cell)
        assert channels.busy and not channels.answering
        wire.says("status", {"execution_state": "idle"}, cell)
        assert channels.answering and not channels.busy
        wire.says("execute_reply", {"status": "ok"}, cell, channel="shell", tag=page.client.session.tag)
        assert not channels.answering


async def test_a_notice_stands_under_the_last_cell_of_each_client() -> None:
    async with the_channels() as channels:
        attach(channels)
        one, two = connect(channels, "one"), connect(channels, "two")
        connect(channels, "looks on")
        await send(channels, one, code="1")
        cells = [await send(channels, one, code="2"), await send(channels, two, code="3")]
        channels.notice_to_each("You were away for long.")
        await settle()
        assert [parent for _, _, parent, _ in one.messages] == cells


@pytest.mark.parametrize("restart", [True, False])
async def test_a_client_that_ends_its_kernel_is_heard(restart: bool) -> None:
    async with the_channels() as channels:
        wire = attach(channels)
        asked: list[bool] = []
        channels.on_shutdown_request = asked.append
        await send(channels, connect(channels), "shutdown_request", "control", restart=restart)
        assert asked == [restart] and len(wire.forwarded) == 1


async def test_close_lets_everybody_read_the_end_and_waits_for_nobody_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels_module, "_LAST_SECONDS", 0.1)
    async with the_channels() as channels:
        wire = attach(channels)
        reads, stalls = connect(channels, "reads"), connect(channels, "stalls")
        await settle()
        stalls.stalled = True
        wire.prints("a")
        await settle()
        channels.publish("iopub", "stream", {"name": "stderr", "text": "the end"})
        async with asyncio.timeout(2):
            await channels.close(4410, "The kernel is gone.")
        assert reads.told == ["stream a", "stream the end"]
        assert reads.closing == stalls.closing == (4410, "The kernel is gone.")
