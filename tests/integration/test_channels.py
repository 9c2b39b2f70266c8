"""Websockets to real kernels: what clients get, and what they hear when their kernel ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tornado.websocket import websocket_connect

from gateway.websocket_frames import LEGACY, V1
from tests.gateway_process import GatewayProcess
from tests.integration.channel_kernels import ECHO, FLOOD, OTHER_KEY, a_kernel, kinds, plain_gateway, shared_gateway
from tests.raw_websocket import RawWebsocket, Refusal, text_of


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    with shared_gateway() as gateway:
        yield gateway


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


async def test_a_large_message_arrives_whole(gateway: GatewayProcess) -> None:
    async with a_kernel(gateway) as kernel:
        client = await kernel.connect()
        await client.finish(client.execute(ECHO))
        client.request("comm_open", {"comm_id": "c", "target_name": "echo", "data": {}}, buffers=(b"x" * 20_000_000,))
        answer = await client.first("comm_msg")
        assert len(answer.parts[4]) == 20_000_000


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


async def test_text_past_the_limit_is_cut_and_messages_are_compressed_where_that_is_configured(
    short_directory: Path,
) -> None:
    with plain_gateway(
        short_directory, SAMOVAR_JUPYTER_SETTINGS_CELL_STREAM_MB="2", SAMOVAR_JUPYTER_SETTINGS_COMPRESSION="true"
    ) as gateway:
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


async def another_kernel(gateway: GatewayProcess) -> str:
    """The id of a new kernel of another owner, as soon as the gateway has seen that refused connections are closed."""
    async with asyncio.timeout(10):
        while True:
            try:
                answer = await asyncio.to_thread(
                    gateway.call, "POST", "/api/kernels", {}, headers={"x-api-key": OTHER_KEY}
                )
                return str(answer.body["id"])
            except OSError:
                await asyncio.sleep(0.1)


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
            path = f"/api/kernels/{await another_kernel(gateway)}/channels"
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
