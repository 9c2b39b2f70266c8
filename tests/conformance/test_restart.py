"""A restart is a new sandbox behind the same endpoints, and loses no output of the first cell after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.manager import start_new_async_kernel

from tests.conformance.conftest import Place

pytestmark = pytest.mark.conformance

RESTARTS = 9  # in each place: 18 of 18
LINES = "".join(f"{number}\n" for number in range(50))


async def output_of(client: AsyncKernelClient, code: str) -> str:
    """Run a cell; return what it printed, all of it that arrived until its `idle`."""
    msg_id = client.execute(code)
    texts: list[str] = []
    while True:
        message: dict[str, Any] = await client.get_iopub_msg(timeout=20)
        parent = message["parent_header"]
        # The manager's session is a clone of the client's, and both count their messages: ids alone are not unique.
        if parent.get("msg_id") != msg_id or parent.get("msg_type") != "execute_request":
            continue
        if message["msg_type"] == "stream":
            texts.append(message["content"]["text"])
        elif message["content"].get("execution_state") == "idle":
            return "".join(texts)


async def test_restarts_lose_nothing(place: Place) -> None:
    manager, client = await start_new_async_kernel(kernel_name="sandbox", cwd=str(place.directory))
    try:
        info, file = manager.get_connection_info(), Path(manager.connection_file).read_text()
        containers = {manager.provisioner.container_id}
        await output_of(client, "x = 1")
        for number in range(RESTARTS):
            await manager.restart_kernel(now=bool(number % 2))
            printed = await output_of(client, "for number in range(50): print(number)\nprint('x' in globals())")
            assert printed == LINES + "False\n", f"restart {number}"
            place.check_source(manager.provisioner.claim_source)
            containers.add(manager.provisioner.container_id)
            assert manager.get_connection_info() == info
            assert Path(manager.connection_file).read_text() == file
        assert len(containers) == RESTARTS + 1
    finally:
        client.stop_channels()
        await manager.shutdown_kernel()
    assert not Path(manager.connection_file).exists()
