"""KernelWire against real ZeroMQ sockets, and against a kernel that does not play by the rules."""

from __future__ import annotations

import asyncio
import hmac
import json
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from kernelprovisioner import endpoints, wire, zmtp
from kernelprovisioner.launchers.base import Endpoint
from kernelprovisioner.wire import KernelWire, Message, WireError

KEY = b"secret"


def signed(
    header: dict[str, object],
    parent: dict[str, object],
    content: dict[str, object],
    *,
    key: bytes = KEY,
    buffers: Sequence[bytes] = (),
) -> list[bytes]:
    parts = [json.dumps(part).encode() for part in (header, parent, {}, content)]
    signature = hmac.new(key, b"".join(parts), "sha256").hexdigest().encode()
    return [b"<IDS|MSG>", signature, *parts, *buffers]


class ZmqKernel:
    """The sockets of a kernel, of libzmq's make."""

    def __init__(self, directory: Path) -> None:
        self.context = zmq.asyncio.Context()
        self.sockets: dict[str, zmq.asyncio.Socket] = {}
        self.channels: dict[str, Endpoint] = {}
        for name, kind in {"shell": zmq.ROUTER, "control": zmq.ROUTER, "stdin": zmq.ROUTER, "iopub": zmq.XPUB}.items():
            socket = self.context.socket(kind)
            socket.linger = 0
            socket.bind(f"ipc://{directory}/{name}")
            self.sockets[name] = socket
            self.channels[name] = Endpoint(path=directory / name)

    def close(self) -> None:
        for socket in self.sockets.values():
            socket.close()
        self.context.term()


@asynccontextmanager
async def kernel_and_wire(directory: Path) -> AsyncIterator[tuple[ZmqKernel, KernelWire]]:
    kernel = ZmqKernel(directory)
    connected = await KernelWire.connect(kernel.channels, KEY, timeout=5)
    try:
        yield kernel, connected
    finally:
        await connected.close()
        kernel.close()


Server = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def wire_to(serve: Server, directory: Path) -> AsyncIterator[KernelWire]:
    """A wire to a shell channel that does as `serve` says."""
    async with await asyncio.start_unix_server(serve, directory / "shell"):
        channels = {"shell": Endpoint(path=directory / "shell")}
        connected = await KernelWire.connect(channels, KEY, timeout=5, names=["shell"])
        try:
            yield connected
        finally:
            await connected.close()


def reads_from(moment: asyncio.Event) -> Server:
    """A kernel that reads nothing before this moment, and then all."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(zmtp.GREETING + zmtp.ready_command("ROUTER"))
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await moment.wait()
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        while await reader.read(2**20):
            continue
        writer.close()

    return serve


def unsent(connected: KernelWire) -> int:
    """Bytes that the kernel has not read from its shell channel yet."""
    return connected._connection("shell").unsent


async def test_a_request_gets_its_reply_and_the_identity_is_shared_by_shell_and_stdin(tmp_path: Path) -> None:
    async with kernel_and_wire(tmp_path) as (kernel, connected):
        asking = asyncio.create_task(connected.request("shell", "some_request", {"a": 1}, timeout=5))
        identity, delimiter, _, header, *_ = await kernel.sockets["shell"].recv_multipart()
        assert delimiter == b"<IDS|MSG>"
        parent = json.loads(header)
        reply = signed({"msg_type": "some_reply"}, parent, {"b": 2}, buffers=[b"\0binary"])
        await kernel.sockets["shell"].send_multipart([identity, *reply])
        message = await asking
        assert message.content == {"b": 2}
        assert list(message.buffers) == [b"\0binary"]

        heard: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        connected.on_other = heard.set_result
        await kernel.sockets["stdin"].send_multipart(
            [identity, *signed({"msg_type": "input_request"}, {}, {"prompt": "?"})]
        )
        assert (await asyncio.wait_for(heard, 5)).channel == "stdin"


async def test_published_messages_arrive_and_wrong_signatures_do_not(tmp_path: Path) -> None:
    async with kernel_and_wire(tmp_path) as (kernel, connected):
        assert await kernel.sockets["iopub"].recv() == b"\x01"  # the subscription, as the kernel sees it
        heard: asyncio.Queue[Message] = asyncio.Queue()
        connected.listen("cell", heard.put_nowait)
        await kernel.sockets["iopub"].send_multipart(
            [b"topic", *signed({"msg_type": "stream"}, {"msg_id": "cell"}, {"text": "forged"}, key=b"other")]
        )
        await kernel.sockets["iopub"].send_multipart(
            [b"topic", *signed({"msg_type": "stream"}, {"msg_id": "cell"}, {"text": "true"})]
        )
        assert (await asyncio.wait_for(heard.get(), 5)).content["text"] == "true"
        assert connected.rejected == 1


@pytest.mark.parametrize(
    "frames",
    [
        [b"no delimiter"],
        [b"<IDS|MSG>", b"sig"],
        [b"<IDS|MSG>", b"sig", b"{}", b"{}", b"{}"],
        [b"<IDS|MSG>", b"\xff\xfe", b"{}", b"{}", b"{}", b"{}"],
        [b"t"] * 20,
        [b""],
    ],
)
async def test_torn_messages_are_dropped_and_the_next_one_is_heard(tmp_path: Path, frames: list[bytes]) -> None:
    async with kernel_and_wire(tmp_path) as (kernel, connected):
        await kernel.sockets["iopub"].recv()
        heard: asyncio.Queue[Message] = asyncio.Queue()
        connected.listen("cell", heard.put_nowait)
        await kernel.sockets["iopub"].send_multipart(frames)
        await kernel.sockets["iopub"].send_multipart(signed({"msg_type": "status"}, {"msg_id": "cell"}, {}))
        assert (await asyncio.wait_for(heard.get(), 5)).msg_type == "status"
        assert connected.rejected == 1


@pytest.mark.parametrize("part", [b"[" * 100_000, b'"text"', b"{", b"\xff", b"[]"])
async def test_parts_that_are_no_json_object_are_dropped(tmp_path: Path, part: bytes) -> None:
    async with kernel_and_wire(tmp_path) as (kernel, connected):
        await kernel.sockets["iopub"].recv()
        parts = [b"{}", part, b"{}", b"{}"]
        signature = hmac.new(KEY, b"".join(parts), "sha256").hexdigest().encode()
        heard: asyncio.Queue[Message] = asyncio.Queue()
        connected.on_other = heard.put_nowait
        await kernel.sockets["iopub"].send_multipart([b"<IDS|MSG>", signature, *parts])
        await kernel.sockets["iopub"].send_multipart(signed({"msg_type": "status"}, {}, {}))
        assert (await asyncio.wait_for(heard.get(), 5)).msg_type == "status"


async def test_a_header_that_is_larger_than_any_is_not_decoded(tmp_path: Path) -> None:
    async with kernel_and_wire(tmp_path) as (kernel, connected):
        await kernel.sockets["iopub"].recv()
        heard: asyncio.Queue[Message] = asyncio.Queue()
        connected.on_other = heard.put_nowait
        huge = {"msg_type": "huge", "more": "x" * wire.MAX_HEADER_BYTES}
        await kernel.sockets["iopub"].send_multipart(signed(huge, {}, {}))
        await kernel.sockets["iopub"].send_multipart(signed({"msg_type": "parent"}, huge, {}))
        await kernel.sockets["iopub"].send_multipart(signed({"msg_type": "status"}, {}, {}))
        assert (await asyncio.wait_for(heard.get(), 5)).msg_type == "status"
        assert connected.rejected == 2


async def test_a_header_with_invalid_bytes_costs_nobody_the_connection(tmp_path: Path) -> None:
    async with kernel_and_wire(tmp_path) as (kernel, connected):
        await kernel.sockets["iopub"].recv()
        parts = [b'{"msg_type": "a\xff"}', b"{}", b"{}", b"{}"]
        signature = hmac.new(KEY, b"".join(parts), "sha256").hexdigest().encode()
        heard: asyncio.Queue[Message] = asyncio.Queue()
        connected.on_other = heard.put_nowait
        await kernel.sockets["iopub"].send_multipart([b"<IDS|MSG>", signature, *parts])
        assert (await asyncio.wait_for(heard.get(), 5)).msg_type == "a\N{REPLACEMENT CHARACTER}"


async def test_not_a_number_in_content_is_read(tmp_path: Path) -> None:
    async with kernel_and_wire(tmp_path) as (kernel, connected):
        await kernel.sockets["iopub"].recv()
        heard: asyncio.Queue[Message] = asyncio.Queue()
        connected.on_other = heard.put_nowait
        await kernel.sockets["iopub"].send_multipart(signed({}, {}, {"value": float("nan")}))
        assert str((await asyncio.wait_for(heard.get(), 5)).content["value"]) == "nan"


async def test_after_rekey_only_the_new_key_counts(tmp_path: Path) -> None:
    async with kernel_and_wire(tmp_path) as (kernel, connected):
        await kernel.sockets["iopub"].recv()
        heard: asyncio.Queue[Message] = asyncio.Queue()
        connected.on_other = heard.put_nowait
        connected.rekey(b"new")
        await kernel.sockets["iopub"].send_multipart(signed({"msg_type": "old"}, {}, {}))
        await kernel.sockets["iopub"].send_multipart(signed({"msg_type": "new"}, {}, {}, key=b"new"))
        assert (await asyncio.wait_for(heard.get(), 5)).msg_type == "new"


async def test_a_kernel_that_is_not_there_is_an_error_in_time(tmp_path: Path) -> None:
    channels = {name: Endpoint(path=tmp_path / name) for name in wire.CHANNELS}
    with pytest.raises(WireError, match=r"within 0\.2 s"):
        await KernelWire.connect(channels, KEY, timeout=0.2)


async def test_a_link_in_place_of_a_socket_is_never_followed(tmp_path: Path) -> None:
    kernel = ZmqKernel(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "shell")
    channels = {**kernel.channels, "shell": Endpoint(path=tmp_path / "link")}
    try:
        with pytest.raises(OSError):
            await asyncio.wait_for(endpoints.connect(channels["shell"], asyncio.Protocol), 1)
        with pytest.raises(WireError):
            await KernelWire.connect(channels, KEY, timeout=0.2)
    finally:
        kernel.close()


async def test_a_file_in_place_of_a_socket_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a socket")
    with pytest.raises(endpoints.NotASocket):
        await endpoints.connect(Endpoint(path=tmp_path / "file"), asyncio.Protocol)


@pytest.mark.parametrize(
    "attack",
    [b"\x02" + b"\xff" * 8, b"\x01\x00" * 5000, b"\x00\x00" * 5000, b"\x04\x00" * 5000],
    ids=["a frame of 2**64 bytes", "endless parts", "endless messages that are none", "endless commands"],
)
async def test_a_kernel_that_breaks_the_protocol_closes_the_wire(tmp_path: Path, attack: bytes) -> None:
    opening = zmtp.GREETING + zmtp.ready_command("ROUTER")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(64)
        writer.write(opening)
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(attack)

    async with wire_to(serve, tmp_path) as connected:
        await asyncio.wait_for(asyncio.shield(connected.closed), 5)
        with pytest.raises(WireError, match="closed"):
            connected.send("shell", "execute_request", {})


async def test_a_kernel_that_does_not_read_makes_send_fail_instead_of_filling_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_UNSENT_BYTES", 100_000)
    stopped = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(zmtp.GREETING + zmtp.ready_command("ROUTER"))
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await stopped.wait()
        writer.close()

    async with wire_to(serve, tmp_path) as connected:
        with pytest.raises(WireError, match="does not read"):
            for _ in range(100):
                connected.send("shell", "execute_request", {"code": "x" * 50_000})
        stopped.set()


async def test_of_many_kernels_that_finish_no_message_the_greediest_is_cut_off(tmp_path: Path) -> None:
    begun = {"greedy": 6000, "modest": 3000}

    def serve(name: str) -> Server:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(zmtp.GREETING + zmtp.ready_command("ROUTER") + b"\x02" + struct.pack(">Q", 10_000))
            await reader.readexactly(64)
            for _ in range(0, begun[name], 1000):
                writer.write(b"x" * 1000)
                await asyncio.sleep(0.01)
            await reader.read()
            writer.close()

        return connected

    servers = [await asyncio.start_unix_server(serve(name), tmp_path / name) for name in begun]
    bound = wire.Unfinished(7000)
    wires = {
        name: await KernelWire.connect(
            {"shell": Endpoint(path=tmp_path / name)}, KEY, timeout=5, names=("shell",), unfinished=bound
        )
        for name in begun
    }
    await asyncio.wait_for(wires["greedy"].closed, 5)
    await asyncio.sleep(0.05)
    assert not wires["modest"].closed.done()
    for each in wires.values():
        await each.close()
    for server in servers:
        server.close()
        await server.wait_closed()


async def test_a_channel_that_is_held_is_not_read_and_loses_nothing(tmp_path: Path) -> None:
    async with kernel_and_wire(tmp_path) as (kernel, connected):
        heard: list[str] = []
        connected.on_any = lambda message: heard.append(message.channel)
        await kernel.sockets["iopub"].recv()
        connected.hold("iopub", True)
        await kernel.sockets["iopub"].send_multipart([b"topic", *signed({"msg_type": "stream"}, {}, {})])
        asking = asyncio.create_task(connected.request("shell", "some_request", {}, timeout=5))
        identity, _, _, header, *_ = await kernel.sockets["shell"].recv_multipart()
        reply = signed({"msg_type": "some_reply"}, json.loads(header), {})
        await kernel.sockets["shell"].send_multipart([identity, *reply])
        await asking
        assert heard == ["shell"]
        connected.hold("iopub", False)
        async with asyncio.timeout(5):
            while len(heard) < 2:  # noqa: ASYNC110 (a listener has no event)
                await asyncio.sleep(0.001)
        assert heard == ["shell", "iopub"]
        await connected.close(["iopub"])
        connected.hold("iopub", True)


async def test_closing_some_channels_leaves_the_others(tmp_path: Path) -> None:
    async with kernel_and_wire(tmp_path) as (_, connected):
        await connected.close(("shell", "iopub", "stdin"))
        assert not connected.closed.done()
        connected.send("control", "kernel_info_request", {})
        with pytest.raises(WireError):
            connected.send("shell", "execute_request", {})


async def test_a_kernel_that_goes_away_closes_the_wire_and_fails_what_waits(tmp_path: Path) -> None:
    async with kernel_and_wire(tmp_path) as (kernel, connected):
        asking = asyncio.create_task(connected.request("shell", "some_request", {}, timeout=5))
        await kernel.sockets["shell"].recv_multipart()
        kernel.sockets["shell"].close()
        with pytest.raises(WireError, match="went away"):
            await asking


async def test_text_that_is_not_unicode_is_an_error_of_its_sender(tmp_path: Path) -> None:
    async with kernel_and_wire(tmp_path) as (_, connected):
        with pytest.raises(WireError, match="not Unicode"):
            connected.send("shell", "execute_request", {"code": "\udc80"})


async def test_a_forwarded_message_is_signed_anew_and_its_reply_has_its_tag(tmp_path: Path) -> None:
    async with kernel_and_wire(tmp_path) as (kernel, connected):
        heard: asyncio.Queue[Message] = asyncio.Queue()
        connected.on_any = heard.put_nowait
        listened: asyncio.Queue[Message] = asyncio.Queue()
        connected.listen("a", listened.put_nowait)
        parts = [b'{"msg_id":  "a"}', b"{}", b'{"x": 1.0}', b'{"code": "1"}', b"\0buffer"]
        connected.forward("shell", parts, b"tag")
        identity, tag, delimiter, signature, *rest = await kernel.sockets["shell"].recv_multipart()
        assert (tag, delimiter, rest) == (b"tag", b"<IDS|MSG>", parts)
        assert signature == hmac.new(KEY, b"".join(parts[:4]), "sha256").hexdigest().encode()
        reply = signed({"msg_type": "some_reply", "session": "kernel"}, {"msg_id": "a"}, {}, buffers=[b"b"])
        await kernel.sockets["shell"].send_multipart([identity, tag, *reply])
        message = await asyncio.wait_for(heard.get(), 5)
        assert (message.tag, list(message.parts)) == (b"tag", reply[2:])
        assert connected.peer_session == "kernel"
        assert (await asyncio.wait_for(listened.get(), 5)) is message
        await kernel.sockets["shell"].send_multipart([identity, *reply])
        assert (await asyncio.wait_for(heard.get(), 5)).tag == b""


async def test_who_can_wait_waits_until_the_kernel_reads(tmp_path: Path) -> None:
    reads = asyncio.Event()

    async with wire_to(reads_from(reads), tmp_path) as connected:
        parts = [b"{}", b"{}", b"{}", b"{}", b"x" * 100_000]
        while unsent(connected) < 2**20:
            await connected.room("shell", timeout=1)
            connected.forward("shell", parts, b"tag")
        with pytest.raises(TimeoutError):
            await connected.room("shell", timeout=0.01)
        reads.set()
        await connected.room("shell", timeout=5)
        assert unsent(connected) <= 2**19
        await connected.close()
        with pytest.raises(WireError, match="closed"):
            await connected.room("shell", timeout=1)


async def test_of_many_that_wait_for_room_one_goes_at_a_time(tmp_path: Path) -> None:
    reads = asyncio.Event()

    async with wire_to(reads_from(reads), tmp_path) as connected:
        parts = [b"{}", b"{}", b"{}", b"{}", b"x" * 8_000_000]
        most = 0

        async def send() -> None:
            nonlocal most
            await connected.room("shell", timeout=10)
            connected.forward("shell", parts, b"tag")
            most = max(most, unsent(connected))

        connected.forward("shell", parts, b"tag")
        sending = [asyncio.create_task(send()) for _ in range(8)]
        await asyncio.sleep(0.05)
        reads.set()
        # None is refused because others, who waited beside it, filled the room at the same moment.
        await asyncio.gather(*sending)
        assert most < 10_000_000
