"""Websockets to real kernels that outlive their gateway: what their clients get of the next one."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from tests.integration.channel_kernels import a_kernel, plain_gateway
from tests.raw_websocket import Got, text_of


def replies_to(cell: str, messages: list[Got]) -> list[Got]:
    return [each for each in messages if each.msg_type == "execute_reply" and each.parent["msg_id"] == cell]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.limit(120)
async def test_a_client_of_a_gateway_that_was_restarted_gets_the_rest_and_a_reply(
    short_directory: Path, how: signal.Signals
) -> None:
    with plain_gateway(short_directory, SAMOVAR_KEEP_SANDBOXES="true", SAMOVAR_DRAIN_TIMEOUT="1") as gateway:
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


@pytest.mark.limit(120)
async def test_cells_that_end_while_no_gateway_is_there_are_answered_by_the_next_one(short_directory: Path) -> None:
    with plain_gateway(short_directory, SAMOVAR_KEEP_SANDBOXES="true") as gateway:
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
