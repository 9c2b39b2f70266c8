"""The container engine for commands: asked with short deadlines, and done without where it does not answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from gateway.app import GatewayApp
from kernelprovisioner.launchers.docker_engine import ENGINE_ERRORS, explain, new_client

ENGINE_SECONDS = 5.0


@contextlib.contextmanager
def engine_client(app: GatewayApp, seconds: float | None = None) -> Iterator[tuple[Any | None, str | None]]:
    """Give docker's low-level client, or None and the sentence that says why there is none.

    Each call may take `seconds`. With the process launcher no engine is asked, and that is no problem to tell.
    """
    if app.launcher == "process":
        yield None, None
        return
    try:
        client = new_client(app.docker_url, ENGINE_SECONDS if seconds is None else seconds)
    except ENGINE_ERRORS as error:
        yield None, f"no container engine answers at {app.docker_url}: {explain(error)}"
        return
    try:
        yield client, None
    finally:
        client.close()
