"""The application over fake sandboxes, on a port of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tornado.httpclient import AsyncHTTPClient, HTTPResponse
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

from gateway.auth import KeyCheck
from gateway.cors import CorsPolicy
from gateway.execution import CellLimits
from gateway.handlers import make_application
from gateway.handlers.base import Services
from gateway.health import Health
from gateway.holdings import Holdings
from gateway.jupyter_services import JupyterServices
from gateway.kernels import KernelRegistry
from gateway.kernelspecs import KernelSpecs
from gateway.limits import OwnerBounds
from gateway.notebook_sessions import NotebookSessions
from gateway.sessions import SessionRegistry
from kernelprovisioner.images import read_images
from tests.unit.gateway_fakes import FakeChannels, FakePool, Script, ends_well, keyed_calls

KEY = "key-of-the-tests"
OTHER_KEY = "another-key"


@dataclass
class Api:
    """A served application and its parts."""

    port: int
    pool: FakePool
    sessions: SessionRegistry
    kernels: KernelRegistry

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        key: str = KEY,
        raw: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> HTTPResponse:
        data = raw if raw is not None else json.dumps(body).encode() if method in ("POST", "PATCH") else None
        return await AsyncHTTPClient().fetch(
            f"http://127.0.0.1:{self.port}{path}",
            method=method,
            body=data,
            headers={**({"x-api-key": key} if key else {}), **(headers or {})},
            raise_error=False,
            follow_redirects=False,
        )

    async def exec(self, **fields: Any) -> dict[str, Any]:
        response = await self.call("POST", "/exec", {"lang": "py", **fields})
        assert response.code == 200, response.body
        answer: dict[str, Any] = json.loads(response.body)
        return answer


@asynccontextmanager
async def served(
    script: Script = ends_well,
    *,
    local_monitoring: bool = True,
    check: Any = None,
    directory: Path = Path("/nonexistent"),
    owner_bounds: OwnerBounds | None = None,
    cors: CorsPolicy | None = None,
) -> AsyncIterator[Api]:
    """The application on a port of its own."""
    pool = FakePool(script)
    pools: Any = {"python": pool}
    holdings = Holdings(pools, line_timeout=5.0, bounds=owner_bounds)
    sessions = SessionRegistry(holdings, CellLimits(0.05, 10_000, 100))
    health = Health("1", {"engine": check} if check is not None else {})
    keys = KeyCheck({KEY: "main", OTHER_KEY: "other"})
    keyed = keyed_calls(sessions, directory)
    images = read_images()
    services = Services(keys, sessions, pools, images, health, keyed, 5.0, local_monitoring)
    specs = KernelSpecs(images, {"python3": "sandbox"})
    kernels = KernelRegistry(holdings, specs, FakeChannels)
    jupyter = JupyterServices(kernels, specs, NotebookSessions(kernels), cors or CorsPolicy())
    server = HTTPServer(make_application(services, jupyter))
    sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    try:
        yield Api(sockets[0].getsockname()[1], pool, sessions, kernels)
    finally:
        server.stop()
        await server.close_all_connections()
        await keyed.stop(1.0)
        await kernels.stop(1.0)
        await asyncio.sleep(0.01)
