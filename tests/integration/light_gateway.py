"""A gateway in the test's own process, on the real engine: many sandboxes at little cost."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tornado.httpclient import AsyncHTTPClient

from gateway import server
from gateway.app import GatewayApp
from kernelprovisioner.images import read_images
from tests.gateway_process import KEY

#: One HTTP client for all calls of a test, which may be many at once.
_MAX_CLIENTS = 400


@dataclass
class Timed:
    """An answer of the gateway, and the seconds after which it came."""

    status: int
    headers: Any
    body: Any
    seconds: float


@dataclass
class LightGateway:
    """A served gateway and a client of it."""

    gateway: server.Gateway
    client: AsyncHTTPClient
    runtime: Path

    async def call(self, method: str, path: str, body: Any = None, *, key: str = KEY) -> Timed:
        """One call; 4xx and 5xx are answers, too."""
        began = time.monotonic()
        response = await self.client.fetch(
            f"http://127.0.0.1:{self.gateway.port}{path}",
            method=method,
            body=None if body is None else json.dumps(body),
            headers={"x-api-key": key},
            raise_error=False,
            request_timeout=180.0,
            connect_timeout=60.0,
        )
        assert response.code != 599, response.error
        decoded = json.loads(response.body) if response.body else None
        return Timed(response.code, response.headers, decoded, time.monotonic() - began)

    async def exec(self, code: str, *, key: str = KEY, **fields: Any) -> Timed:
        """Run Python through `POST /exec`."""
        return await self.call("POST", "/exec", {"code": code, "lang": "py", **fields}, key=key)

    async def pool(self) -> dict[str, Any]:
        """What the pool of the image `python` says of itself."""
        found: dict[str, Any] = (await self.call("GET", "/metrics/pool")).body["pool"]["python"]
        return found

    async def reached(self, state: str, count: int, timeout: float = 60.0) -> None:
        """Wait until so many sandboxes are `warm`, `claimed` and so on."""
        async with asyncio.timeout(timeout):
            while True:
                if (await self.pool())[state] == count:
                    return
                await asyncio.sleep(0.05)


@asynccontextmanager
async def light_gateway(docker_url: str, patch: pytest.MonkeyPatch, *options: str) -> AsyncIterator[LightGateway]:
    """Serve with these options of `samovar serve`. Its sandboxes import no libraries, which is most of their cost."""
    images = {name: dataclasses.replace(image, preload=()) for name, image in read_images().items()}
    patch.setattr(server, "_read_images", lambda: images)
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as directory:
        runtime = Path(directory) / "run"
        runtime.mkdir(mode=0o700)
        app = GatewayApp()
        app.configure(
            [
                *("--port=0", f"--GatewayApp.api_key={KEY}", f"--DockerLauncher.docker_url={docker_url}"),
                *(f"--data-dir={directory}/data", f"--GatewayApp.runtime_dir={runtime}", "--launcher=docker"),
                *options,
            ]
        )
        gateway = app.gateway(lambda _: None)
        client = AsyncHTTPClient(force_instance=True, max_clients=_MAX_CLIENTS)
        try:
            await gateway.start()
            yield LightGateway(gateway, client, runtime)
        finally:
            client.close()
            await gateway.stop()
        assert not gateway.left
