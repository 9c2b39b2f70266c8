"""jupyter_server in front of the gateway (`--gateway-url`), with our connection class and without it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
import urllib.error
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.conftest import WHERE
from tests.conformance.front import V1, FrontServer, Page, text_of
from tests.gateway_process import ROOT, GatewayProcess
from tests.proxies import CuttableProxy

pytestmark = pytest.mark.conformance

#: a comm target that answers with its buffers reversed
ECHO = """
import comm
def opened(it, message):
    def answer(message):
        it.send({"count": len(message["buffers"])}, buffers=[bytes(buffer)[::-1] for buffer in message["buffers"]])
    it.on_msg(answer)
comm.get_comm_manager().register_target("echo", opened)
"""
#: thirty lines, one after the other
SLOW = "import time\nfor i in range(30):\n    print(i, flush=True)\n    time.sleep(0.1)\n'end'"
PROTOCOLS = pytest.mark.parametrize("protocol", [V1, ""], ids=["v1", "legacy"])


@pytest.fixture(scope="module")
def proxy(created: set[str], conformance_gateway: GatewayProcess) -> Iterator[CuttableProxy]:
    """Between the server in front and the gateway."""
    with CuttableProxy(conformance_gateway.port) as proxy:
        yield proxy


def front_server(gateway: GatewayProcess, port: int, *, ours: bool) -> Iterator[FrontServer]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernel-images")))}
    with tempfile.TemporaryDirectory(prefix="sv-") as directory:
        front = FrontServer(Path(directory), f"http://127.0.0.1:{port}", gateway.key, environment, ours=ours)
        try:
            yield front
        finally:
            front.stop()
        log = front.log.read_text()
        assert "Traceback" not in log, log


@pytest.fixture(scope="module")
def front(conformance_gateway: GatewayProcess, proxy: CuttableProxy) -> Iterator[FrontServer]:
    """A server with our connection class."""
    yield from front_server(conformance_gateway, proxy.port, ours=True)


@pytest.fixture(scope="module")
def stock_front(conformance_gateway: GatewayProcess) -> Iterator[FrontServer]:
    """A server as it comes."""
    yield from front_server(conformance_gateway, conformance_gateway.port, ours=False)


async def test_kernelspecs(front: FrontServer) -> None:
    # jupyter_server takes the gateway's default for its own at the first request, and tells of it at the second.
    await front.ask("GET", "/api/kernelspecs")
    specs = await front.ask("GET", "/api/kernelspecs")
    assert specs["default"] == "sandbox"
    assert specs["kernelspecs"]["sandbox"]["spec"]["display_name"] == "Python 3 (sandbox)"
    logo = specs["kernelspecs"]["sandbox"]["resources"]["logo-svg"]
    with pytest.raises(json.JSONDecodeError):
        await front.ask("GET", logo)  # an image


@PROTOCOLS
async def test_a_cell(front: FrontServer, created: set[str], protocol: str) -> None:
    async with front.kernel() as kernel_id, front.page(kernel_id, protocol=protocol) as page:
        messages = await page.run(WHERE + "\ndisplay({'a': 1})\n6 * 7")
        assert text_of(messages).split()[1] in created
        kinds = [message["header"]["msg_type"] for message in messages if message["channel"] == "iopub"]
        assert kinds == ["status", "execute_input", "stream", "display_data", "execute_result", "status"]
        [result] = [message for message in messages if message["header"]["msg_type"] == "execute_result"]
        assert result["content"]["data"]["text/plain"] == "42"
        models = await front.ask("GET", "/api/kernels")
        assert [(model["id"], model["execution_state"]) for model in models] == [(kernel_id, "idle")]


@PROTOCOLS
async def test_input(front: FrontServer, protocol: str) -> None:
    async with front.kernel() as kernel_id, front.page(kernel_id, protocol=protocol) as page:
        cell = await page.execute("import getpass\nprint(input('a?'), getpass.getpass('b?'))", allow_stdin=True)
        for prompt, password, value in (("a?", False, "one"), ("b?", True, "two")):
            question = (await page.until(cell, "input_request"))[-1]
            assert (question["content"]["prompt"], question["content"]["password"]) == (prompt, password)
            await page.send("stdin", "input_reply", {"status": "ok", "value": value}, parent=question["header"])
        assert text_of(await page.until(cell, "execute_reply", "idle")) == "one two\n"


@PROTOCOLS
async def test_binary_buffers_and_large_messages(front: FrontServer, protocol: str) -> None:
    async with front.kernel() as kernel_id, front.page(kernel_id, protocol=protocol) as page:
        comm_id = await open_echo(page)
        sent = [bytes(range(256)), b"", os.urandom(12_000_000)]
        [answer] = await echoed(page, comm_id, sent)
        assert answer["content"]["data"] == {"count": 3}
        assert answer["buffers"] == [buffer[::-1] for buffer in sent]
        messages = await page.run("display({'text/plain': 'x' * 20_000_000}, raw=True)")
        [shown] = [message for message in messages if message["header"]["msg_type"] == "display_data"]
        assert len(shown["content"]["data"]["text/plain"]) == 20_000_000


async def open_echo(page: Page) -> str:
    await page.run(ECHO)
    comm_id = uuid.uuid4().hex
    content = {"comm_id": comm_id, "target_name": "echo", "data": {}}
    await page.until(await page.send("shell", "comm_open", content), "idle")
    return comm_id


async def echoed(page: Page, comm_id: str, buffers: list[bytes]) -> list[dict[str, Any]]:
    """Send buffers to the comm target; return what it answers with."""
    request = await page.send("shell", "comm_msg", {"comm_id": comm_id, "data": {}}, buffers)
    messages = await page.until(request, "idle", timeout=60)
    return [message for message in messages if message["header"]["msg_type"] == "comm_msg"]


async def test_five_thousand_outputs(front: FrontServer) -> None:
    async with front.kernel() as kernel_id, front.page(kernel_id) as page:
        messages = await page.run("for i in range(5000): print(i, flush=True)", 60)
        assert text_of(messages) == "".join(f"{i}\n" for i in range(5000))
        messages = await page.run("for i in range(5000): display(i)", 60)
        shown = [message for message in messages if message["header"]["msg_type"] == "display_data"]
        assert [message["content"]["data"]["text/plain"] for message in shown] == [str(i) for i in range(5000)]


async def test_a_cut_behind_the_server_is_not_seen_by_the_page(front: FrontServer, proxy: CuttableProxy) -> None:
    async with front.kernel() as kernel_id, front.page(kernel_id) as page:
        cell = await page.execute(SLOW)
        seen: list[dict[str, Any]] = []
        for line in ("3", "12", "21"):
            while not seen or text_of([seen[-1]]).strip() != line:
                seen.append(await page.receive())
            proxy.cut()
            await asyncio.sleep(0.3)
            proxy.mend()
        messages = seen + await page.until(cell, "execute_reply", "idle")
        assert text_of(messages) == "".join(f"{i}\n" for i in range(30)), "each line once, in order"
        assert [message["header"]["msg_type"] for message in messages].count("execute_result") == 1
        assert text_of(await page.run("print('on')")) == "on\n"


async def test_a_page_that_comes_back_gets_what_it_missed(front: FrontServer) -> None:
    async with front.kernel() as kernel_id:
        async with front.page(kernel_id, "the-page") as page:
            cell = await page.execute(SLOW)
            while text_of(page.messages)[-2:] != "5\n":
                await page.receive()
            await page.cut()
        before = page.messages
        await asyncio.sleep(0.5)
        async with front.page(kernel_id, "the-page") as page:
            messages = before + await page.until(cell, "execute_reply", "idle")
        lines = [int(line) for line in text_of(messages).split()]
        assert sorted(set(lines)) == list(range(30))
        assert len(lines) < 40, "only what the page had not acknowledged comes twice"
        assert [message["header"]["msg_type"] for message in messages].count("execute_reply") == 1


async def test_interrupt_and_restart(front: FrontServer) -> None:
    async with front.kernel() as kernel_id, front.page(kernel_id) as page:
        cell = await page.execute("x = 1\nprint('on', flush=True)\nimport time; time.sleep(600)")
        await page.until(cell, "stream")
        await front.ask("POST", f"/api/kernels/{kernel_id}/interrupt")
        messages = await page.until(cell, "execute_reply", "idle")
        assert "KeyboardInterrupt" in {message["content"].get("ename") for message in messages}
        await front.ask("POST", f"/api/kernels/{kernel_id}/restart")
        [error] = [m for m in await page.run("x") if m["header"]["msg_type"] == "error"]
        assert error["content"]["ename"] == "NameError"


async def test_a_death_is_explained_and_mended(front: FrontServer) -> None:
    async with front.kernel() as kernel_id, front.page(kernel_id) as page:
        messages = await page.run("print('so far', flush=True)\nimport os; os._exit(7)")
        [reply] = [message for message in messages if message["header"]["msg_type"] == "execute_reply"]
        assert "exit code 7" in reply["content"]["evalue"]
        assert "so far" in text_of(messages) and "exit code 7" in text_of(messages, "stderr")
        while page.messages[-1]["content"].get("execution_state") != "restarting":
            await page.receive()
        assert text_of(await page.run("print('again')")) == "again\n"


async def test_a_kernel_that_goes_closes_the_page_with_its_reason(
    front: FrontServer, conformance_gateway: GatewayProcess
) -> None:
    kernel_id = (await front.ask("POST", "/api/kernels", {"name": "sandbox"}))["id"]
    async with front.page(kernel_id) as page:
        await page.run("1")
        await asyncio.to_thread(conformance_gateway.call, "DELETE", f"/api/kernels/{kernel_id}")
        with pytest.raises(ConnectionError) as closed:
            while True:
                await page.receive()
    assert closed.value.args == (4410, "The kernel was shut down.")


@PROTOCOLS
async def test_an_invalid_frame_ends_its_page_only(front: FrontServer, protocol: str) -> None:
    async with front.kernel() as kernel_id, front.page(kernel_id) as other:
        async with front.page(kernel_id, protocol=protocol) as page:
            await page.run("x = 1")
            garbage: str | bytes = b"\xff" * 64 if protocol else '{"header": '
            await page.socket.write_message(garbage, binary=bool(protocol))
            with pytest.raises(ConnectionError) as closed:
                while True:
                    await page.receive()
        assert closed.value.args[0] == 1007 and closed.value.args[1]
        assert text_of(await other.run("print(x)")) == "1\n"


@pytest.mark.limit(120)
async def test_the_gateway_restarts_behind_the_server(
    docker_url: str, kernel_image: str, created: set[str], short_directory: Path
) -> None:
    settings = {"CONTAINER_POOL_PY_MIN": "1", "CONTAINER_POOL_PY_MAX": "2"}
    gateway = GatewayProcess(short_directory, docker_url, settings, ["--keep-sandboxes"])
    await asyncio.to_thread(gateway.start)
    try:
        for front in front_server(gateway, gateway.port, ours=True):
            async with front.kernel() as kernel_id, front.page(kernel_id) as page:
                await page.run("x = 41")
                await asyncio.to_thread(gateway.stop)
                await asyncio.to_thread(gateway.start)
                assert text_of(await page.run("print(x + 1)", 60)) == "42\n"
                cell = await page.execute("import time\ntime.sleep(4)\nprint('awake')")
                await page.until(cell, "busy")
                await asyncio.to_thread(gateway.stop)
                await asyncio.to_thread(gateway.start)
                await page.until(cell, "execute_reply", "idle", timeout=60)
                assert text_of(await page.run("print(x + 2)", 60)) == "43\n"
    finally:
        assert gateway.process is not None
        gateway.process.send_signal(signal.SIGINT)
        await asyncio.to_thread(gateway.process.wait, 60)


async def test_a_kernel_that_the_gateway_does_not_know(front: FrontServer) -> None:
    with pytest.raises(urllib.error.HTTPError) as answer:
        await front.ask("GET", f"/api/kernels/{uuid.uuid4()}")
    answer.value.close()
    assert answer.value.code == 404


async def test_without_our_class_binary_and_large_messages_become_notices(stock_front: FrontServer) -> None:
    async with stock_front.kernel() as kernel_id, stock_front.page(kernel_id, protocol="") as page:
        assert text_of(await page.run("print(input('?'))".replace("input('?')", "6 * 7"))) == "42\n"
        comm_id = await open_echo(page)
        request = await page.send("shell", "comm_msg", {"comm_id": comm_id, "data": {}})
        [plain] = [m for m in await page.until(request, "idle") if m["header"]["msg_type"] == "comm_msg"]
        assert plain["content"]["data"] == {"count": 0}
        code = "from ipywidgets import Image\nImage(value=b'\\x89PNG' * 100)"
        notice = text_of(await page.run(code), "stderr")
        assert "binary data" in notice and "kernel_websocket_connection_class" in notice
        messages = await page.run("display({'text/plain': 'x' * 11_000_000}, raw=True)")
        assert "10.5 MiB" in text_of(messages, "stderr")
        assert text_of(await page.run("print('still here')")) == "still here\n"
