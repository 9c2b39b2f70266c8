"""EndpointRelay: ipc endpoints on the host for a sandbox whose own sockets are TCP ports.

ZMTP is a stream of bytes on either transport, so passing bytes on is all it takes; and a kernel keeps its endpoints
over a restart, whatever port the next sandbox has.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path

from kernelprovisioner.launchers.base import Endpoint
from kernelprovisioner.launchers.configurable import CHANNELS
from kernelprovisioner.runtime import check_socket_path

_PIECE = 64 * 1024


class EndpointRelay:
    """Serves `k-1` … `k-5` in one directory and passes each connection on to the sandbox's port."""

    def __init__(self) -> None:
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, directory: Path, channels: Mapping[str, Endpoint]) -> None:
        """Raises OSError."""
        for number, name in enumerate(CHANNELS, start=1):
            path = check_socket_path(directory / f"k-{number}")
            endpoint = channels[name]

            async def serve(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter, endpoint: Endpoint = endpoint
            ) -> None:
                task = asyncio.current_task()
                assert task is not None
                self._tasks.add(task)
                try:
                    await _pass_on(reader, writer, endpoint)
                finally:
                    self._tasks.discard(task)

            self._servers.append(await asyncio.start_unix_server(serve, str(path), limit=_PIECE))

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, endpoint: Endpoint) -> None:
    try:
        there, back = await asyncio.open_connection(endpoint.host, endpoint.port, limit=_PIECE)
    except OSError:
        writer.close()  # its client tries again, as after any refused connection
        return
    try:
        ways = [asyncio.ensure_future(_copy(reader, back)), asyncio.ensure_future(_copy(there, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
    finally:
        writer.close()
        back.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(_PIECE):
            writer.write(piece)
            await writer.drain()
