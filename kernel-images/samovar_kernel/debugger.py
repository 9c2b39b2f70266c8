"""SandboxDebugger: ipykernel's, which does not keep the control channel waiting for a running cell when it starts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import zmq
from ipykernel.compiler import get_tmp_directory
from ipykernel.debugger import Debugger

_PAUSE = 0.02


class SandboxDebugger(Debugger):
    """What `Debugger.start()` would wait for in the control thread is done before, by `listen()`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._listening = asyncio.Lock()

    async def listen(self) -> None:
        """Have debugpy listen, once. It is a request to the shell like any other: a running cell comes first."""
        async with self._listening:
            if self.debugpy_initialized:
                return
            Path(get_tmp_directory()).mkdir(mode=0o700, parents=True, exist_ok=True)
            host, port = self.debugpy_client.get_host_port()
            content = {"code": f"import debugpy; debugpy.listen(({host!r}, {port}))", "silent": True}
            socket = self.shell_socket
            self.session.send(socket, "execute_request", content, None, socket.getsockopt(zmq.ROUTING_ID))
            while not socket.poll(0):  # noqa: ASYNC110  not worth a second kind of ZeroMQ socket
                await asyncio.sleep(_PAUSE)
            reply = self.session.recv(socket)[1]
            self.debugpy_initialized = reply["content"]["status"] == "ok"
