"""Websockets to real kernels that end, come back, break the rules, stall or flood: nobody else notices."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator

import pytest

from gateway.websocket_frames import LEGACY, V1
from tests.gateway_process import GatewayProcess
from tests.integration.channel_kernels import FLOOD, a_kernel, kinds, shared_gateway
from tests.raw_websocket import BINARY, TEXT, Got, RawWebsocket, text_of


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    with shared_gateway() as gateway:
        yield gateway


def descriptors(gateway: GatewayProcess) -> int:
    assert gateway.process is not None
    return len(os.listdir(f"/proc/{gateway.process.pid}/fd"))


async def refilled(gateway: GatewayProcess) -> None:
    """Wait until a sandbox is warm again: it has descriptors, too."""
    while True:
        pools = (await asyncio.to_thread(gateway.call, "GET", "/metrics/pool")).body["pool"]
        if pools["python"]["warm"]:
            return
        await asyncio.sleep(0.1)


def _fin(client: RawWebsocket) -> None:
    client.writer.close()


def _black_hole(client: RawWebsocket) -> None:
    """Neither read nor say anything from now on."""


@pytest.mark.parametrize("cut", [_fin, RawWebsocket.reset, _black_hole])
async def test_who_reconnects_gets_what_it_missed_once_and_in_order(
    gateway: GatewayProcess, cut: Callable[[RawWebsocket], None]
) -> None:
    async with a_kernel(gateway) as kernel:
        client = await kernel.connect("page")
        cell = client.execute("import time\nfor i in range(60): print(i, flush=True); time.sleep(0.02)")
        before: list[Got] = []
        while "20" not in text_of(before, cell).split():
            message = await client.message()
            assert message is not None
            before.append(message)
        await asyncio.sleep(0.2)  # the last pong is there by now
        cut(client)
        await asyncio.sleep(0.3)
        again = await kernel.connect("page")
        after = await again.finish(cell)
        seen = [message.header["msg_id"] for message in before]
        new = [message for message in after if message.header["msg_id"] not in seen]
        assert text_of(before + new, cell) == "".join(f"{i}\n" for i in range(60))
        # What was acknowledged (all but the last 50 ms or so) is not sent again.
        assert len(after) - len(new) <= 5
        assert kinds(after, cell)[-2:] in (["status", "execute_reply"], ["execute_reply", "status"])


async def test_who_counts_gets_everything_exactly_once(gateway: GatewayProcess) -> None:
    async with a_kernel(gateway) as kernel:
        other = await kernel.connect("other")
        client = await kernel.connect("counts", after="0", answers_pings=False)
        cell = client.execute("import time\nfor i in range(40): print(i, flush=True); time.sleep(0.02)")
        got: list[Got] = []
        for _ in range(4):
            at = None
            for _message in range(12):
                pings = len(client.pings)
                message = await client.message()
                assert message is not None
                if len(client.pings) > pings:
                    epoch, _, number = client.pings[-1].decode().rpartition(":")
                    at = int(number)
                assert at is not None
                at += 1
                got.append(message)
            other.request("kernel_info_request", {}, "control")  # its reply has a number that is not ours
            client.reset()
            client = await kernel.connect("counts", after=f"{epoch}:{at}", answers_pings=False)
        got += await client.finish(cell)
        assert text_of(got, cell) == "".join(f"{i}\n" for i in range(40))
        assert len({message.header["msg_id"] for message in got}) == len(got)
        log = await kernel.connect("reader", after="0")
        whole = await log.message()
        assert whole is not None and whole.header["msg_id"] == got[0].header["msg_id"]


async def test_of_two_websockets_with_one_session_the_later_gets_the_replies(gateway: GatewayProcess) -> None:
    async with a_kernel(gateway) as kernel:
        abandoned = await kernel.connect("page")
        cell = abandoned.execute("import time; time.sleep(0.3); print('done')")
        await asyncio.sleep(0.05)
        page = await kernel.connect("page")
        got = await page.finish(cell)
        assert text_of(got, cell) == "done\n"
        assert (await abandoned.ended() or (0,))[0] == 1000
        await page.finish(page.execute("1"))


async def test_a_frame_that_is_cut_in_the_middle_ends_one_connection_only(gateway: GatewayProcess) -> None:
    async with a_kernel(gateway) as kernel:
        client, other = await kernel.connect(), await kernel.connect()
        client.send_frame(BINARY, b"x" * 5000, cut=700)
        await client.writer.drain()
        client.reset()
        await other.finish(other.execute("1"))
        assert (await kernel.state("idle"))["connections"] == 1


@pytest.mark.limit(120)
async def test_messages_that_are_never_finished_do_not_fill_the_memory(gateway: GatewayProcess) -> None:
    async with a_kernel(gateway) as kernel:
        client = await kernel.connect("one")
        memory = gateway.memory()
        unfinished = [await kernel.connect(f"half-{number}") for number in range(8)]
        sending = []
        for each in unfinished:
            each.send_frame(BINARY, bytes(60 * 2**20), cut=58 * 2**20)
            sending.append(asyncio.create_task(each.writer.drain()))
        await asyncio.wait(sending, timeout=3)
        assert gateway.memory() - memory < 350 * 2**20
        await client.finish(client.execute("1"))
        for each in unfinished:
            each.reset()
        await asyncio.gather(*sending, return_exceptions=True)
        await client.finish(client.execute("x = '" + "x" * 2**20 + "'"))


async def test_a_thousand_connections_leave_nothing(gateway: GatewayProcess) -> None:
    async with a_kernel(gateway) as kernel:
        await kernel.works()
        await refilled(gateway)
        before = descriptors(gateway)
        for number in range(1000):
            client = await kernel.connect(f"s{number % 40}")
            if number % 3 == 0:
                client.request("kernel_info_request", {})
            if number % 2:
                client.reset()
            else:
                await client.end()
        await kernel.works()
        for _ in range(100):
            if descriptors(gateway) <= before:
                break
            await asyncio.sleep(0.1)
        assert descriptors(gateway) <= before
        assert (await kernel.call("GET")).body["connections"] == 0


def _v1(*offsets: int, data: bytes = b"") -> bytes:
    return b"".join(number.to_bytes(8, "little") for number in (len(offsets), *offsets)) + data


_HEADER = b'{"msg_id":"a","msg_type":"kernel_info_request","session":"s","username":"","date":"","version":"5.4"}'


def _whole(channel: bytes, content: bytes) -> bytes:
    parts = [channel, _HEADER, b"{}", b"{}", content]
    at, offsets = 8 * (len(parts) + 2), []
    for part in parts:
        offsets.append(at)
        at += len(part)
    return _v1(*offsets, at, data=b"".join(parts))


@pytest.mark.parametrize(
    ("kind", "opcode", "frame"),
    [
        (V1, BINARY, b""),
        (V1, BINARY, b"\1"),
        (V1, BINARY, _v1(8, 16)),
        (V1, BINARY, _v1(64, 2**62, 2**63, 5, 6, 7)),
        (V1, BINARY, (2**64 - 1).to_bytes(8, "little")),
        (V1, BINARY, _whole(b"iopub", b"{}")),
        (V1, BINARY, _whole(b"nonsense", b"{}")),
        (V1, BINARY, _whole(b"shell", b'{"a":' * 100_000)),
        (V1, BINARY, _whole(b"shell", b"[" * 100_000)),
        (V1, TEXT, b"{}"),
        (LEGACY, TEXT, b"no JSON"),
        (LEGACY, TEXT, b'{"a":' * 100_000),
        (LEGACY, TEXT, b'{"channel": "shell"}'),
        (LEGACY, BINARY, b"\0\0\0\2\0\0\0\x0c\xff\xff\xff\xff"),
    ],
)
async def test_an_invalid_frame_ends_its_connection_with_a_reason(
    gateway: GatewayProcess, kind: str, opcode: int, frame: bytes
) -> None:
    async with a_kernel(gateway) as kernel:
        other = await kernel.connect()
        client = await kernel.connect(kind=kind)
        client.send_frame(opcode, frame)
        ended = await client.ended()
        assert ended is not None
        assert ended[0] == 1007 and len(ended[1]) > 10
        await other.finish(other.execute("1"))


async def test_a_message_that_is_too_large_ends_its_connection(gateway: GatewayProcess) -> None:
    async with a_kernel(gateway) as kernel:
        client = await kernel.connect()
        client.writer.write(bytes((0x80 | BINARY, 0xFF)) + (65 * 2**20).to_bytes(8, "big") + b"\0\0\0\0")
        ended = await client.ended()
        assert ended is None or ended[0] == 1009
        await kernel.works()


@pytest.mark.limit(180)
async def test_a_client_that_does_not_read_costs_the_others_nothing_and_catches_up(gateway: GatewayProcess) -> None:
    async with a_kernel(gateway) as kernel:
        fast = await kernel.connect("fast")
        slow = await kernel.connect("slow", receive_buffer=65536)
        await fast.finish(fast.execute("1"))
        memory = gateway.memory()
        began = asyncio.get_running_loop().time()
        cell = fast.execute(FLOOD.format(1000))
        got = await fast.finish(cell, 120)
        assert len(text_of(got, cell)) == 1000 * 100_001
        assert gateway.memory() - memory < 80 * 2**20
        await fast.finish(fast.execute("1"))
        await asyncio.sleep(began + 30 - asyncio.get_running_loop().time())
        expected = [message.header["msg_id"] for message in got if message.channel == "iopub"]
        seen: list[str] = []
        while expected[-1] not in seen[-1:]:
            message = await slow.message(20)
            assert message is not None
            seen.append(message.header["msg_id"])
        assert [each for each in seen if each in set(expected)] == expected


@pytest.mark.limit(120)
async def test_a_client_that_floods_its_kernel_blocks_nobody(gateway: GatewayProcess) -> None:
    async with a_kernel(gateway) as kernel:
        client, flooder = await kernel.connect("one"), await kernel.connect("flood")
        cell = client.execute("import time\nwhile True: time.sleep(0.01)")
        await kernel.state("busy")
        memory = gateway.memory()
        sending = asyncio.create_task(_flood(flooder))
        await asyncio.sleep(3)
        assert gateway.memory() - memory < 60 * 2**20
        client.request("interrupt_request", {}, "control")
        got = await client.finish(cell)
        assert "KeyboardInterrupt" in [each.content.get("ename") for each in got]
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        flooder.reset()
        await client.finish(client.execute("1"), 60)


async def _flood(client: RawWebsocket) -> None:
    while True:
        client.request("comm_msg", {"comm_id": "none", "data": "x" * 500_000})
        await client.writer.drain()
