"""Kernels that are plain processes, of a gateway with two owners, and their websockets."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from tests.gateway_process import Answer, GatewayProcess
from tests.raw_websocket import Got, RawWebsocket, text_of

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


@contextmanager
def plain_gateway(directory: Path, **settings: str) -> Iterator[GatewayProcess]:
    """A gateway whose kernels are plain processes, one of them warm. `settings` are environment variables."""
    own = {
        "SAMOVAR_LAUNCHER": "process",
        "API_KEYS": json.dumps({"other": OTHER_KEY}),
        "SAMOVAR_POOL_SETTINGS_MIN_SIZE": "1",
    }
    gateway = GatewayProcess(directory, None, settings=own | settings)
    gateway.start()
    try:
        yield gateway
    finally:
        gateway.stop()


@contextmanager
def shared_gateway() -> Iterator[GatewayProcess]:
    """One for all tests of a module: it warms one sandbox at a time, and lets cells print much."""
    settings = {"SAMOVAR_POOL_SETTINGS_HIT_RATE": "0", "SAMOVAR_JUPYTER_SETTINGS_CELL_STREAM_MB": "150"}
    with (
        tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as directory,
        plain_gateway(Path(directory), **settings) as gateway,
    ):
        yield gateway


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


def kinds(got: list[Got], msg_id: str) -> list[str]:
    return [message.msg_type for message in got if message.parent_id == msg_id]
