"""Websockets to real kernels: what clients get, and what the others notice when one of them, or a kernel, fails."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tornado.websocket import websocket_connect

from gateway.websocket_frames import LEGACY, V1
from tests.gateway_process import Answer, GatewayProcess
from tests.raw_websocket import BINARY, TEXT, Got, RawWebsocket, Refusal, text_of

OTHER_KEY = "key-of-another-owner"
#: a cell after which a comm sends back the buffers that it gets, backwards
ECHO = """
from comm import get_comm_manager
def opened(comm, message):
    comm.send({'n': len(message['buffers'])}, buffers=[bytes(each)[::-1] for each in message['buffers']])
get_comm_manager().register_target('echo', opened)
"""
#: a cell that prints so many lines of 100 kB
FLOOD = "import sys\nfor i in range({0}):\n    print(f'{{i:06}}' + 'x' * 99_994)\n"


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    """A gateway whose kernels are plain processes."""
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as directory:
        settings = {
            "SAMOVAR_LAUNCHER": "process",
            "API_KEYS": json.dumps({"other": OTHER_KEY}),
            "SAMOVAR_POOL_SETTINGS_MIN_SIZE": "1",
            "SAMOVAR_POOL_SETTINGS_HIT_RATE": "0",
            "SAMOVAR_JUPYTER_SETTINGS_CELL_STREAM_MB": "150",
        }
        process = GatewayProcess(Path(directory), None, settings=settings)
        process.start()
        try:
            yield process
        finally:
            process.stop()


class Kernel:
    """One kernel of a gateway, over REST and websockets."""

    def __init__(self, gateway: GatewayProcess, kernel_id: str) -> None:
        self.gateway = gateway
        self.id = kernel_id
        self._open: list[RawWebsocket] = []

    @property
    def path(self) -> str:
        return f"/api/kernels/{self.id}"

    async def call(self, method: str, path: str = "") -> Answer:
        return await asyncio.to_thread(self.gateway.call, method, self.path + path, {} if method == "POST" else None)

    async def connect(
        self, session: str = "", *, after: str | None = None, agent: str | None = None, **options: Any
    ) -> RawWebsocket:
        query = f"?session_id={session}" + (f"&samovar_after={after}" if after is not None else "")
        headers = {"Authorization": f"token {self.gateway.key}"}
        if agent is not None:
            headers["User-Agent"] = agent
        path = f"{self.path}/channels{query}"
        client = await RawWebsocket.connect(self.gateway.port, path, headers=headers, **options)
        client.session = session or client.session
        self._open.append(client)
        return client

    async def state(self, wanted: str, timeout: float = 20.0) -> dict[str, Any]:
        """Wait until the kernel's model says so."""
        async with asyncio.timeout(timeout):
            while True:
                model = (await self.call("GET")).body
                if model["execution_state"] == wanted:
                    return dict(model)
                await asyncio.sleep(0.05)

    async def works(self) -> None:
        """Check that a new client gets an answer."""
        client = await self.connect()
        cell = client.execute("print(6 * 7)")
        assert text_of(await client.finish(cell), cell) == "42\n"
        await client.end()

    async def close(self) -> None:
        for client in self._open:
            await client.end()
        assert (await self.call("DELETE")).status == 204


@asynccontextmanager
async def a_kernel(gateway: GatewayProcess) -> AsyncIterator[Kernel]:
    answer = await asyncio.to_thread(gateway.call, "POST", "/api/kernels", {})
    assert answer.status == 201, answer
    kernel = Kernel(gateway, answer.body["id"])
    try:
        yield kernel
    finally:
        await kernel.close()


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


def kinds(got: list[Got], msg_id: str) -> list[str]:
    return [message.msg_type for message in got if message.parent_id == msg_id]


# --- what clients get


@pytest.mark.parametrize("kind", [V1, LEGACY])
async def test_a_cell_runs_and_its_outputs_come_in_order(gateway: GatewayProcess, kind: str) -> None:
    async with a_kernel(gateway) as kernel:
        client = await kernel.connect("one", kind=kind)
        cell = client.execute("print('hello')\n6 * 7")
        got = await client.finish(cell)
        iopub = [each.msg_type for each in got if each.channel == "iopub" and each.parent_id == cell]
        assert iopub == ["status", "execute_input", "stream", "execute_result", "status"]
        assert [each.content["status"] for each in got if each.msg_type == "execute_reply"] == ["ok"]
        assert client.pings[0].endswith(b":0")


@pytest.mark.parametrize("kind", [V1, LEGACY])
async def test_buffers_go_both_ways(gateway: GatewayProcess, kind: str) -> None:
    async with a_kernel(gateway) as kernel:
        client = await kernel.connect(kind=kind)
        await client.finish(client.execute(ECHO))
        content = {"comm_id": "c", "target_name": "echo", "data": {}}
        client.request("comm_open", content, buffers=(b"\0\1\2", b"", b"xyz"))
        message = await client.first("comm_msg")
        assert message.content["data"] == {"n": 3}
        assert [bytes(part) for part in message.parts[4:]] == [b"\2\1\0", b"", b"zyx"]


async def test_questions_go_to_who_runs_the_cell_and_outputs_to_all(gateway: GatewayProcess) -> None:
    async with a_kernel(gateway) as kernel:
        asked, other = await kernel.connect("asked"), await kernel.connect("other")
        cell = asked.execute("print('got', input('name? '))")
        message = await asked.first("input_request")
        assert message.content["prompt"] == "name? "
        asked.request("input_reply", {"value": "ada"}, "stdin", parent=message.header)
        assert text_of(await asked.finish(cell), cell) == "got ada\n"
        theirs = []
        while (seen := await other.message()) is not None:
            theirs.append(seen)
            if seen.msg_type == "status" and seen.content["execution_state"] == "idle" and seen.parent_id == cell:
                break
        assert {each.channel for each in theirs} == {"iopub"}
        assert text_of(theirs, cell) == "got ada\n"


async def test_every_line_arrives_in_order(gateway: GatewayProcess) -> None:
    async with a_kernel(gateway) as kernel:
        client = await kernel.connect()
        cell = client.execute("for i in range(5000): print(i, flush=True)")
        got = await client.finish(cell, 60)
        assert text_of(got, cell) == "".join(f"{i}\n" for i in range(5000))
        cell = client.execute("from IPython.display import display\nfor i in range(3000): display(i)")
        got = await client.finish(cell, 60)
        shown = [each.content["data"]["text/plain"] for each in got if each.msg_type == "display_data"]
        assert shown == [str(i) for i in range(3000)]


async def test_handshakes_that_are_refused(gateway: GatewayProcess) -> None:
    async with a_kernel(gateway) as kernel:
        path = f"{kernel.path}/channels"
        for headers, status in (
            ({}, 403),
            ({"Authorization": "token wrong"}, 403),
            ({"Authorization": f"token {OTHER_KEY}"}, 404),
        ):
            with pytest.raises(Refusal) as refusal:
                await RawWebsocket.connect(gateway.port, path, headers=headers)
            assert refusal.value.status == status
        assert (await kernel.call("GET", "/channels")).status == 400
        client = await RawWebsocket.connect(gateway.port, f"{path}?token={gateway.key}")
        await client.end()
        assert gateway.key not in gateway.log.read_text()
    with pytest.raises(Refusal) as refusal:
        await kernel.connect()
    assert refusal.value.status == 404


async def test_who_connects_while_a_cell_runs_sees_a_busy_kernel(gateway: GatewayProcess) -> None:
    async with a_kernel(gateway) as kernel:
        first = await kernel.connect("first")
        cell = first.execute("print('begun', flush=True); _ = input()")
        message = await first.first("input_request")
        late = await kernel.connect("late")
        seen = await late.message()
        assert seen is not None
        assert (seen.msg_type, seen.content, seen.parent_id) == ("status", {"execution_state": "busy"}, cell)
        assert (await kernel.call("GET")).body["execution_state"] == "busy"
        first.request("input_reply", {"value": ""}, "stdin", parent=message.header)
        await first.finish(cell)
        seen = await late.message()
        assert seen is not None and seen.content == {"execution_state": "idle"}


# --- connections that end, and come back


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


# --- invalid frames


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


async def test_a_large_message_arrives_whole(gateway: GatewayProcess) -> None:
    async with a_kernel(gateway) as kernel:
        client = await kernel.connect()
        await client.finish(client.execute(ECHO))
        client.request("comm_open", {"comm_id": "c", "target_name": "echo", "data": {}}, buffers=(b"x" * 20_000_000,))
        answer = await client.first("comm_msg")
        assert len(answer.parts[4]) == 20_000_000


# --- life of the kernel


async def test_restart_while_busy_releases_who_waits_and_nothing_old_comes_after_it(gateway: GatewayProcess) -> None:
    async with a_kernel(gateway) as kernel:
        client, other = await kernel.connect("one"), await kernel.connect("two")
        cell = client.execute("import itertools\nfor i in itertools.count(): print(i)")
        await client.first("stream")
        waiting = other.execute("print('never')")
        await asyncio.sleep(0.3)
        assert (await kernel.call("POST", "/restart")).status == 200
        got = await client.finish(cell)
        assert [each.content["status"] for each in got if each.msg_type == "execute_reply"] == ["aborted"]
        theirs = await other.finish(waiting)
        assert [each.content["status"] for each in theirs if each.msg_type == "execute_reply"] == ["aborted"]
        marker = client.execute("print('new')")
        after = await client.finish(marker)
        assert text_of(after, marker) == "new\n"
        assert text_of(after, cell) == ""
        states = [each.content["execution_state"] for each in after if each.msg_type == "status" and not each.parent_id]
        assert states == ["starting", "idle"]
        again = await kernel.connect("one")
        replayed = await again.finish(again.execute("1"))
        assert text_of(replayed, cell) == ""


async def test_two_clients_may_restart_at_once(gateway: GatewayProcess) -> None:
    async with a_kernel(gateway) as kernel:
        answers = await asyncio.gather(kernel.call("POST", "/restart"), kernel.call("POST", "/restart"))
        assert [answer.status for answer in answers] == [200, 200]
        await kernel.works()


async def test_a_storm_of_interrupts_leaves_a_kernel_that_works(gateway: GatewayProcess) -> None:
    async with a_kernel(gateway) as kernel:
        client = await kernel.connect()
        cell = client.execute("import time\nwhile True: time.sleep(0.01)")
        await kernel.state("busy")
        answers = await asyncio.gather(*(kernel.call("POST", "/interrupt") for _ in range(30)))
        assert {answer.status for answer in answers} == {204}
        got = await client.finish(cell)
        # Those that come while IPython shows the first one's traceback take the traceback's place.
        assert [each.content["ename"] for each in got if each.msg_type == "execute_reply"] == ["KeyboardInterrupt"]
        await kernel.works()


async def test_a_kernel_that_is_killed_tells_all_its_clients_why(gateway: GatewayProcess) -> None:
    async with a_kernel(gateway) as kernel:
        clients = [await kernel.connect(f"client-{number}") for number in range(10)]
        cell = clients[0].execute(
            "import os, signal, time\nprint('begun', flush=True)\ntime.sleep(1)\n"
            "print('last words', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
        )
        await clients[1].first("stream")
        queued = {client: client.execute("1") for client in clients[1:]}
        got = await clients[0].finish(cell)
        order = [kind for kind in kinds(got, cell) if kind not in ("execute_input",)]
        assert order == ["status", "stream", "stream", "stream", "error", "execute_reply", "status"]
        assert text_of(got, cell) == "begun\nlast words\n"
        assert "SIGKILL" in text_of(got, cell, "stderr")
        for client, request in queued.items():
            theirs = await client.finish(request)
            assert [each.content["status"] for each in theirs if each.msg_type == "execute_reply"] == ["aborted"]
            assert "SIGKILL" in text_of(theirs, cell, "stderr")
        await kernel.state("idle")
        states = []
        while (message := await clients[0].message()) is not None:
            if message.msg_type == "status" and not message.parent_id:
                states.append(message.content["execution_state"])
            if states[-1:] == ["idle"]:
                break
        assert states == ["restarting", "starting", "idle"]
        await kernel.works()


# --- who is slow, who floods


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


async def test_text_past_the_limit_is_cut_and_messages_are_compressed_where_that_is_configured(
    short_directory: Path,
) -> None:
    settings = {
        "SAMOVAR_LAUNCHER": "process",
        "SAMOVAR_POOL_SETTINGS_MIN_SIZE": "1",
        "SAMOVAR_JUPYTER_SETTINGS_CELL_STREAM_MB": "2",
        "SAMOVAR_JUPYTER_SETTINGS_COMPRESSION": "true",
    }
    gateway = GatewayProcess(short_directory, None, settings=settings)
    await asyncio.to_thread(gateway.start)
    try:
        async with a_kernel(gateway) as kernel:
            client = await kernel.connect()
            cell = client.execute(FLOOD.format(50))
            got = await client.finish(cell)
            assert 1_500_000 < len(text_of(got, cell)) <= 2 * 2**20
            notices = text_of(got, cell, "stderr")
            assert "2 MiB" in notices and "MiB of text of this cell were cut" in notices
            cell = client.execute("while True: print('y' * 1000)")
            await asyncio.sleep(1)
            assert (await kernel.call("POST", "/interrupt")).status == 204
            got = await client.finish(cell)
            assert [each.content["ename"] for each in got if each.msg_type == "error"] == ["KeyboardInterrupt"]
            assert "were cut" in text_of(got, cell, "stderr")
            address = f"ws://127.0.0.1:{gateway.port}{kernel.path}/channels?token={gateway.key}&samovar_after=0"
            compressed = await websocket_connect(address, compression_options={})
            assert "permessage-deflate" in compressed.headers["Sec-WebSocket-Extensions"]
            frame = await compressed.read_message()
            assert isinstance(frame, str) and json.loads(frame)["msg_type"] == "status"
            compressed.close()
            while await compressed.read_message() is not None:
                continue
    finally:
        await asyncio.to_thread(gateway.stop)


async def test_the_websockets_of_one_owner_leave_room_for_those_of_others(short_directory: Path) -> None:
    settings = {
        "SAMOVAR_LAUNCHER": "process",
        "API_KEYS": json.dumps({"other": OTHER_KEY}),
        "CONTAINER_POOL_PY_MAX": "2",
        "SAMOVAR_JUPYTER_SETTINGS_COMPRESSION": "true",
    }
    # So few files that there is room for 24 connections.
    gateway = GatewayProcess(short_directory, None, settings=settings, starter=["prlimit", "--nofile=536:536"])
    await asyncio.to_thread(gateway.start)
    try:
        async with a_kernel(gateway) as kernel:
            tried = await asyncio.gather(*(kernel.connect() for _ in range(30)), return_exceptions=True)
            opened = [each for each in tried if isinstance(each, RawWebsocket)]
            refused = [each for each in tried if isinstance(each, Refusal)]
            assert len(opened) == 12, "however many try at once"
            assert {each.status for each in refused} == {503}
            assert all(b"12 websockets open" in each.body for each in refused)
            answer = await asyncio.to_thread(gateway.call, "POST", "/api/kernels", {}, headers={"x-api-key": OTHER_KEY})
            path = f"/api/kernels/{answer.body['id']}/channels"
            others = [
                await RawWebsocket.connect(gateway.port, path, headers={"x-api-key": OTHER_KEY}) for _ in range(6)
            ]
            with pytest.raises(Refusal, match="6 websockets open"):
                await RawWebsocket.connect(gateway.port, path, headers={"x-api-key": OTHER_KEY})
            for each in (*others, *opened):
                await each.end()
            await kernel.works()
            # A handshake that asks for what there is not ends in a plain websocket.
            offer = {
                "x-api-key": gateway.key,
                "Sec-WebSocket-Extensions": "permessage-deflate; server_max_window_bits=99",
            }
            async with await RawWebsocket.connect(gateway.port, f"{kernel.path}/channels", headers=offer) as plain:
                assert "permessage-deflate" not in plain.head
    finally:
        await asyncio.to_thread(gateway.stop)


async def test_a_gateway_client_of_jupyter_server_gets_a_notice_in_place_of_what_breaks_it(
    gateway: GatewayProcess,
) -> None:
    async with a_kernel(gateway) as kernel:
        client = await kernel.connect(kind=LEGACY, agent="Tornado/6.5")
        cell = client.execute(
            "from ipykernel.comm import Comm\nComm('t', buffers=[b'abc'])\nprint('small')\n"
            "from IPython.display import display\ndisplay({'text/plain': 'z' * 12_000_000}, raw=True)"
        )
        got = await client.finish(cell)
        assert all(isinstance(message.frame, str) for message in got)
        assert max(len(message.frame) for message in got) < 9 * 2**20
        notices = text_of(got, cell, "stderr")
        assert "binary" in notices and "MiB" in notices
        assert "small" in text_of(got, cell)


# --- gateways that go


def replies_to(cell: str, messages: list[Got]) -> list[Got]:
    return [each for each in messages if each.msg_type == "execute_reply" and each.parent["msg_id"] == cell]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.limit(120)
async def test_a_client_of_a_gateway_that_was_restarted_gets_the_rest_and_a_reply(
    short_directory: Path, how: signal.Signals
) -> None:
    settings = {
        "SAMOVAR_LAUNCHER": "process",
        "SAMOVAR_POOL_SETTINGS_MIN_SIZE": "1",
        "SAMOVAR_KEEP_SANDBOXES": "true",
        "SAMOVAR_DRAIN_TIMEOUT": "1",
    }
    gateway = GatewayProcess(short_directory, None, settings=settings)
    await asyncio.to_thread(gateway.start)
    try:
        async with a_kernel(gateway) as kernel:
            client = await kernel.connect("page")
            await client.finish(client.execute("kept = 41"))
            cell = client.execute("import time\nfor i in range(100): print(i, flush=True); time.sleep(0.1)")
            await kernel.state("busy")
            assert gateway.process is not None
            gateway.process.send_signal(how)
            ended = await client.ended(20)
            assert ended == (1012, "The gateway restarts.") if how == signal.SIGTERM else ended is None
            await asyncio.to_thread(gateway.process.wait, 20)
            await asyncio.to_thread(gateway.start)
            again = await kernel.connect("page")
            got = await again.finish(cell, 30)
            printed = text_of(got, cell).split()
            assert printed and printed == [str(i) for i in range(int(printed[0]), 100)]
            assert [each.content["status"] for each in replies_to(cell, got)] == ["ok"]
            cell = again.execute("print(kept + 1)")
            assert text_of(await again.finish(cell), cell) == "42\n"
    finally:
        await asyncio.to_thread(gateway.stop)


@pytest.mark.limit(120)
async def test_cells_that_end_while_no_gateway_is_there_are_answered_by_the_next_one(short_directory: Path) -> None:
    settings = {
        "SAMOVAR_LAUNCHER": "process",
        "SAMOVAR_POOL_SETTINGS_MIN_SIZE": "1",
        "SAMOVAR_KEEP_SANDBOXES": "true",
    }
    gateway = GatewayProcess(short_directory, None, settings=settings)
    await asyncio.to_thread(gateway.start)
    try:
        async with a_kernel(gateway) as kernel:
            client = await kernel.connect("page")
            cells = [
                client.execute("import time; time.sleep(2); kept = 41"),
                client.execute("1 / 0"),
                client.execute("print('never')"),
            ]
            await kernel.state("busy")
            assert gateway.process is not None
            gateway.process.kill()
            await asyncio.to_thread(gateway.process.wait, 20)
            await asyncio.sleep(3.0)
            await asyncio.to_thread(gateway.start)
            again = await kernel.connect("page")
            got = await again.finish(cells[-1], 30)
            replies = {cell: replies_to(cell, got)[0].content for cell in cells}
            assert [replies[cell]["status"] for cell in cells] == ["ok", "error", "aborted"]
            assert replies[cells[1]]["ename"] == "ZeroDivisionError"
            assert "lost" in text_of(got, cells[0], "stderr")
            assert any("ZeroDivisionError" in line for line in replies[cells[1]]["traceback"])
            cell = again.execute("print(kept + 1)")
            assert text_of(await again.finish(cell), cell) == "42\n"
    finally:
        await asyncio.to_thread(gateway.stop)
