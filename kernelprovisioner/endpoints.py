"""Connect to a sandbox's socket, without ever following a link that the sandbox may have put there."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable
from typing import TypeVar

from kernelprovisioner.launchers.base import Endpoint

ProtocolT = TypeVar("ProtocolT", bound=asyncio.Protocol)


class NotASocket(OSError):
    """Where a socket should be, there is something else (a link, a file): somebody tampered with the directory."""


async def connect(endpoint: Endpoint, factory: Callable[[], ProtocolT]) -> ProtocolT:
    """Return a connected protocol of `factory`. Raises OSError; NotASocket where the path is a link or a file.

    The path is opened first and connected through its descriptor, so that what was checked is what is connected to
    (and the 107 bytes of a socket address do not matter).
    """
    loop = asyncio.get_running_loop()
    if endpoint.path is None:
        if endpoint.host is None or endpoint.port is None:
            raise ValueError(f"{endpoint} names neither a path nor host and port")
        _, protocol = await loop.create_connection(factory, endpoint.host, endpoint.port)
        return protocol
    handle = os.open(endpoint.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(handle).st_mode):
            raise NotASocket(f"{endpoint.path} is not a socket")
        _, protocol = await loop.create_unix_connection(factory, f"/proc/self/fd/{handle}")
    finally:
        os.close(handle)
    return protocol
