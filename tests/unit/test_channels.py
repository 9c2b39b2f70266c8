"""KernelChannels with a wire and websockets that a test holds in its hands: replay, bounds, deaths and restarts."""

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

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tornado.websocket import WebSocketClosedError

from gateway import channels as channels_module
from gateway import client_channel
from gateway.channel_bounds import ChannelBounds
from gateway.channels import KernelChannels, Refused
from gateway.client_channel import ClientChannel, ClientForm
from gateway.large_frames import LargeFrames
from gateway.output_budget import OutputBudget
from gateway.output_log import Entry, OutputLog
from gateway.websocket_frames import CHANNELS, V1, FrameError, decode, encode
from kernelprovisioner.message import Listener, Message, WireError
from kernelprovisioner.sandbox import EndedCell

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


# --- routes


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


# --- replay


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


# --- what cannot be sent


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


async def test_restarting_is_said_once_to_each_client() -> None:
    async with the_channels() as channels:
        attach(channels)
        reads, cuts, away = connect(channels, "reads"), connect(channels, "cuts"), connect(channels, "away")
        await settle()
        cut(away)
        for client in (reads, cuts):
            client.answers = False
        channels.tell_death("Killed.", "SandboxDied", traceback=[])
        channels.publish("iopub", "stream", {"name": "stderr", "text": "cause"})
        channels.publish("iopub", "status", {"execution_state": "restarting"})
        await settle()
        assert reads.told == cuts.told == ["stream cause", "status restarting"]
        reads.gone = True
        assert reads.client is not None
        reads.client.closed(in_order=True)
        cut(cuts)
        attach(channels, "kernel-2")
        channels.publish("iopub", "status", {"execution_state": "starting"})
        again = [connect(channels, name) for name in ("reads", "cuts", "away")]
        await settle()
        assert [client.told for client in again] == [
            ["status starting"],
            ["stream cause", "status starting"],
            ["stream cause", "status restarting", "status starting"],
        ]


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


# --- requests, deaths, restarts


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


async def test_a_death_is_told_where_it_happened_and_what_waited_is_answered() -> None:
    async with the_channels() as channels:
        states: list[str] = []
        channels.on_status = states.append
        wire = attach(channels)
        one, two = connect(channels, "one"), connect(channels, "two")
        cell = await send(channels, one, code="1")
        wire.says("status", {"execution_state": "busy"}, cell)
        wire.says("execute_input", {"code": "1", "execution_count": 7}, cell)
        waits = await send(channels, two, code="2")
        asks = await send(channels, two, "complete_request")
        channels.tell_death("It ran out of memory.", "SandboxDied", traceback=["SandboxDied: memory"])
        channels.detach()
        wire.says("stream", {"name": "stdout", "text": "a ghost"}, cell)
        await settle()
        assert states == ["busy", "idle"]
        assert one.told == [
            "status busy",
            "execute_input",
            "stream It ran out of memory.",
            "error",
            "execute_reply error",
            "status idle",
            "status idle",
            "status idle",
        ]
        reply = next(content for channel, _, _, content in one.messages if channel == "shell")
        assert reply["execution_count"] == 7 and reply["ename"] == "SandboxDied"
        replies = {
            parent["msg_id"]: content["status"] for channel, _, parent, content in two.messages if channel == "shell"
        }
        assert replies == {waits["msg_id"]: "aborted", asks["msg_id"]: "aborted"}
        assert {header["session"] for _, header, _, _ in one.messages} == {"kernel-1"}
        assert not channels.busy


@pytest.mark.parametrize("end", ["death", "restart"])
async def test_a_cell_that_has_asked_its_user_something_is_answered_all_the_same(end: str) -> None:
    async with the_channels() as channels:
        wire = attach(channels)
        page = connect(channels)
        cell = await send(channels, page, code="input(); input()")
        tag = wire.tag
        # The two channels are not in order: the first question may come before the status.
        wire.says("input_request", {"prompt": ""}, cell, channel="stdin", tag=tag)
        wire.says("status", {"execution_state": "busy"}, cell)
        wire.says("input_request", {"prompt": ""}, cell, channel="stdin", tag=tag)
        if end == "death":
            channels.tell_death("It ran out of memory.", "SandboxDied", traceback=[])
        else:
            channels.tell_restart()
        await settle()
        assert [told for told in page.told if told.startswith("execute_reply")] == [
            "execute_reply error" if end == "death" else "execute_reply aborted"
        ]
        if end == "death":
            assert "stream It ran out of memory." in page.told and "error" in page.told


async def test_the_output_that_a_dead_kernel_had_not_sent_comes_before_the_cause() -> None:
    async with the_channels() as channels:
        wire = attach(channels)
        client = connect(channels)
        cell = await send(channels, client, code="1")
        wire.says("status", {"execution_state": "busy"}, cell)
        heard = {"msg_id": "heard", "msg_type": "stream", "session": "kernel-1"}
        parts = [json.dumps(part).encode() for part in (heard, cell, {}, {"name": "stdout", "text": "sent "})]
        assert wire.on_any is not None
        wire.on_any(Message("iopub", parts, heard, cell))
        unsent = (
            {"kind": "text", "name": "stdout", "text": "sent ", "parent": cell},
            {"kind": "mark", "msg_id": "heard"},
            {"kind": "text", "name": "stdout", "text": "unsent", "parent": cell},
        )
        channels.tell_death("Killed.", "SandboxDied", traceback=[], unsent=unsent)
        await settle()
        assert client.told[1:4] == ["stream sent", "stream unsent", "stream Killed."]


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


async def test_what_a_sandbox_makes_up_of_its_output_does_not_hide_its_death() -> None:
    async with the_channels() as channels:
        attach(channels, adopted=True)
        page = connect(channels)
        no_json = {"msg_id": "cell", "msg_type": "execute_request", "session": "\ud800", "x": float("inf")}
        unsent = {"kind": "text", "name": "stdout", "text": "last words", "parent": no_json}
        channels.tell_death("It ran out of memory.", "SandboxDied", traceback=[], unsent=[unsent])
        await settle()
        assert page.told[:2] == ["stream last words", "stream It ran out of memory."]


async def test_a_cell_that_kills_its_kernel_before_that_could_say_busy_is_no_waiting_one() -> None:
    async with the_channels() as channels:
        attach(channels)
        page = connect(channels)
        cell = await send(channels, page, code="os._exit(7)")
        waiting = await send(channels, page, code="2")
        begun = {"kind": "text", "name": "stdout", "text": "", "parent": cell}
        channels.tell_death("It ended.", "SandboxDied", traceback=[], unsent=[begun])
        await settle()
        replies = {
            parent["msg_id"]: content["status"] for channel, _, parent, content in page.messages if channel == "shell"
        }
        assert replies == {cell["msg_id"]: "error", waiting["msg_id"]: "aborted"}


async def test_nothing_older_comes_again_after_a_death_but_its_cause_does() -> None:
    async with the_channels() as channels:
        wire = attach(channels)
        client = connect(channels, answers=False)
        cell = await send(channels, client, code="1")
        wire.says("status", {"execution_state": "busy"}, cell)
        wire.prints("old", cell)
        await settle()
        cut(client)
        channels.tell_death("Killed.", "SandboxDied", traceback=[])
        attach(channels, "kernel-2")
        channels.publish("iopub", "status", {"execution_state": "starting"})
        again = connect(channels)
        counts = connect(channels, "counts", "0")
        await settle()
        expected = ["stream Killed.", "error", "execute_reply error", "status idle", "status starting"]
        assert again.told == expected
        assert counts.told == [told for told in expected if told != "execute_reply error"]
        assert [header["session"] for _, header, _, _ in again.messages][-2:] == ["kernel-1", "kernel-2"]


async def test_a_restart_skips_what_a_slow_client_has_not_read() -> None:
    async with the_channels() as channels:
        wire = attach(channels)
        slow = connect(channels)
        cell = await send(channels, slow, code="1")
        await settle()
        slow.stalled = True
        wire.says("status", {"execution_state": "busy"}, cell)
        await settle()
        for _ in range(5):
            wire.prints("old", cell)
        channels.tell_restart()
        channels.detach()
        attach(channels, "kernel-2")
        channels.publish("iopub", "status", {"execution_state": "starting"})
        cut(slow)
        again = connect(channels)
        await settle()
        assert again.told == ["execute_reply aborted", "status idle", "status starting"]


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


# --- adopted kernels


async def test_the_client_of_an_adopted_cell_gets_a_reply_that_is_made_up() -> None:
    async with the_channels() as channels:
        wire = attach(channels, adopted=True)
        page = {"msg_id": "cell", "msg_type": "execute_request", "session": "page"}
        queued = {"msg_id": "next", "msg_type": "execute_request", "session": "page"}
        channels.follow("cell", 7)
        assert channels.busy
        wire.prints("more", page)
        wire.says("error", {"ename": "E", "evalue": "", "traceback": []}, page)
        wire.says("status", {"execution_state": "idle"}, page)
        for state in ("busy", "idle"):
            wire.says("status", {"execution_state": state}, queued)
        rest = {"msg_id": "rest", "msg_type": "execute_request", "session": wire.session}
        for state in ("busy", "idle"):
            wire.says("status", {"execution_state": state}, rest)
        client = connect(channels, "page")
        await settle()
        replies = [
            (parent["msg_id"], content["status"], content["execution_count"])
            for channel, _, parent, content in client.messages
            if channel == "shell"
        ]
        assert replies == [("cell", "error", 7), ("next", "ok", None)]
        assert client.told[0] == "stream more"
        assert not channels.busy


@pytest.mark.parametrize("how", ["died", "restarted"])
async def test_the_client_of_an_adopted_cell_hears_of_its_kernels_end(how: str) -> None:
    async with the_channels() as channels:
        wire = attach(channels, adopted=True)
        channels.follow("cell")
        wire.prints("more", {"msg_id": "cell", "msg_type": "execute_request", "session": "page"})
        if how == "died":
            channels.tell_death("It died.", "SandboxDied", traceback=[])
        else:
            channels.tell_restart()
        client = connect(channels, "page")
        await settle()
        (reply,) = [content for channel, _, _, content in client.messages if channel == "shell"]
        assert reply["status"] == ("error" if how == "died" else "aborted")
        assert client.told[-1] == "status idle" and not channels.busy


async def test_a_cell_whose_kernel_died_while_no_gateway_was_there_is_told_so() -> None:
    async with the_channels() as channels:
        attach(channels, adopted=True)
        parent = {"msg_id": "cell", "msg_type": "execute_request", "session": "page"}
        unsent = [
            {"kind": "mark", "msg_id": "x"},
            {"kind": "text", "name": "stdout", "text": "last", "parent": parent},
        ]
        channels.tell_death("It died.", "SandboxDied", traceback=[], unsent=unsent)
        client = connect(channels, "page")
        await settle()
        assert {each["msg_id"] for _, _, each, _ in client.messages} == {"cell"}
        assert [told.split()[0] for told in client.told] == ["stream", "stream", "error", "execute_reply", "status"]


async def test_cells_that_ended_while_no_gateway_was_there_are_answered() -> None:
    def ended(msg_id: str, status: str, session: object = "page", **fields: Any) -> EndedCell:
        header = {"msg_id": msg_id, "msg_type": "execute_request", "session": session}
        return msgspec.convert({"header": header, "status": status, "execution_count": 4, **fields}, EndedCell)

    async with the_channels() as channels:
        wire = attach(channels, adopted=True)
        heard = {"msg_id": "heard", "msg_type": "execute_request", "session": "page"}
        for state in ("busy", "idle"):
            wire.says("status", {"execution_state": state}, heard)
        runs = {"msg_id": "runs", "msg_type": "execute_request", "session": "page"}
        wire.says("status", {"execution_state": "busy"}, runs)
        raised = {"ename": "E", "evalue": "why", "traceback": ["E: why"]}
        channels.make_up(
            [
                ended("good", "ok"),
                ended("bad", "error", **raised),
                ended("skipped", "aborted"),
                *(ended(each, "ok") for each in ("heard", "runs")),
                *(ended("nobody's", "ok", session) for session in (None, "", "x" * 10_000, wire.session)),
            ]
        )
        client = connect(channels, "page")
        await settle()
        replies = {parent["msg_id"]: content for channel, _, parent, content in client.messages if channel == "shell"}
        assert {msg_id: reply["status"] for msg_id, reply in replies.items()} == {
            "heard": "ok",
            "good": "ok",
            "bad": "error",
            "skipped": "aborted",
        }
        assert replies["bad"]["traceback"] == ["E: why"] and replies["good"]["execution_count"] == 4
        errors = [parent["msg_id"] for _, header, parent, _ in client.messages if header["msg_type"] == "error"]
        missed = [parent["msg_id"] for _, header, parent, _ in client.messages if header["msg_type"] == "stream"]
        assert (errors, missed) == (["bad"], ["good", "bad"])


async def test_an_adopted_cell_whose_end_nobody_heard_ends_when_the_kernel_says_so() -> None:
    async with the_channels() as channels:
        wire = attach(channels, adopted=True)
        channels.follow("cell")
        wire.says(
            "execute_input", {"execution_count": 3}, {"msg_id": "cell", "msg_type": "execute_request", "session": "p"}
        )
        channels.follow_no_more("cell")
        client = connect(channels, "p")
        await settle()
        assert [each for each in client.told if "lost" not in each] == [
            "execute_input",
            "execute_reply ok",
            "status idle",
        ]
        assert len(client.told) == 4, "and what is missing is told of"
        assert not channels.busy
        channels.follow("unknown")
        channels.follow_no_more("unknown")
        assert not channels.busy
