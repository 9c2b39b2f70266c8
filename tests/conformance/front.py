"""A jupyter_server in front of a gateway, as a process, and what a page of JupyterLab would ask of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jupyter_server.services.kernels.connection.base import (
    deserialize_binary_message,
    deserialize_msg_from_ws_v1,
    serialize_binary_message,
    serialize_msg_to_ws_v1,
)
from tornado.httpclient import HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect

from tests.conformance.jupyter_process import JupyterProcess

V1 = "v1.kernel.websocket.jupyter.org"
CONNECTION_CLASS = "gateway.lab.SamovarWebSocketConnection"
TOKEN = "token-of-the-server-in-front"


class FrontServer(JupyterProcess):
    """`jupyter server --gateway-url`, with our connection class or with its own."""

    def __init__(self, directory: Path, gateway_url: str, key: str, environment: dict[str, str], *, ours: bool) -> None:
        command = [
            *("jupyter", "server", f"--ServerApp.root_dir={directory}"),
            *(f"--gateway-url={gateway_url}", f"--GatewayClient.auth_token={key}"),
            *([f"--ServerApp.kernel_websocket_connection_class={CONNECTION_CLASS}"] if ours else []),
        ]
        own = {"JUPYTER_CONFIG_DIR": str(directory / "config")}
        super().__init__(command, directory, directory / "front.log", environment | own, token=TOKEN)

    @asynccontextmanager
    async def page(self, kernel_id: str, session: str | None = None, protocol: str = V1) -> AsyncIterator[Page]:
        """A page's websocket."""
        session = session or uuid.uuid4().hex
        url = f"ws://127.0.0.1:{self.port}/api/kernels/{kernel_id}/channels?session_id={session}"
        page = await Page.open(url, TOKEN, session, protocol)
        try:
            yield page
        finally:
            await page.close()

    @asynccontextmanager
    async def kernel(self, name: str = "sandbox") -> AsyncIterator[str]:
        """The id of a kernel that ends with the block."""
        kernel_id = (await self.ask("POST", "/api/kernels", {"name": name}))["id"]
        try:
            yield kernel_id
        finally:
            await self.ask("DELETE", f"/api/kernels/{kernel_id}")


@dataclass
class Page:
    """A page's websocket. Frames are made and read with jupyter_server's own functions."""

    socket: WebSocketClientConnection
    session: str
    protocol: str
    #: everything that came, in order
    messages: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    async def open(cls, url: str, token: str, session: str, protocol: str = V1) -> Page:
        """Connect as JupyterLab does: with v1 offered, or as a legacy client."""
        request = HTTPRequest(url, headers={"Authorization": f"token {token}"})
        subprotocols = [protocol] if protocol else None
        socket = await websocket_connect(request, subprotocols=subprotocols, max_message_size=100 * 2**20)
        assert (socket.selected_subprotocol or "") == protocol
        return cls(socket, session, protocol)

    async def send(
        self,
        channel: str,
        msg_type: str,
        content: dict[str, Any],
        buffers: Iterable[bytes] = (),
        parent: dict[str, Any] | None = None,
    ) -> str:
        """Send a message; returns its id."""
        msg_id = uuid.uuid4().hex
        header = {"msg_id": msg_id, "msg_type": msg_type, "session": self.session, "username": "", "version": "5.4"}
        header["date"] = datetime.now(UTC).isoformat()
        message: dict[str, Any] = {"header": header, "parent_header": parent or {}, "metadata": {}, "content": content}
        if self.protocol:
            parts = [json.dumps(part).encode() for part in message.values()]
            await self.socket.write_message(serialize_msg_to_ws_v1([*parts, *buffers], channel), binary=True)
        elif buffers:
            frame = serialize_binary_message({**message, "channel": channel, "buffers": list(buffers)})
            await self.socket.write_message(frame, binary=True)
        else:
            await self.socket.write_message(json.dumps({**message, "channel": channel, "buffers": []}))
        return msg_id

    async def receive(self, timeout: float = 30.0) -> dict[str, Any]:
        """The next message. Raises ConnectionError with code and reason where the server has closed."""
        async with asyncio.timeout(timeout):
            raw = await self.socket.read_message()
        if raw is None:
            # Whoever asks again hears the same.
            self.socket.read_queue.put_nowait(None)
            raise ConnectionError(self.socket.close_code, self.socket.close_reason)
        message = self._decoded(raw)
        self.messages.append(message)
        return message

    def _decoded(self, raw: str | bytes) -> dict[str, Any]:
        if self.protocol:
            channel, parts = deserialize_msg_from_ws_v1(raw)
            names = ("header", "parent_header", "metadata", "content")
            message: dict[str, Any] = {name: json.loads(part) for name, part in zip(names, parts, strict=False)}
            return message | {"channel": channel, "buffers": [bytes(part) for part in parts[4:]]}
        if isinstance(raw, bytes):
            found: dict[str, Any] = deserialize_binary_message(raw)
            return found
        return dict(json.loads(raw))

    async def until(self, msg_id: str, *wanted: str, timeout: float = 30.0) -> list[dict[str, Any]]:
        """Read until all these message types or execution states have come for a request; return its messages."""
        missing = set(wanted)
        found = []
        async with asyncio.timeout(timeout):
            while missing:
                message = await self.receive(timeout)
                if message["parent_header"].get("msg_id") == msg_id:
                    found.append(message)
                    missing -= {message["header"]["msg_type"], message["content"].get("execution_state")}
        return found

    async def run(self, code: str, timeout: float = 30.0, *, allow_stdin: bool = False) -> list[dict[str, Any]]:
        """Execute a cell; returns all of its messages."""
        return await self.until(
            await self.execute(code, allow_stdin=allow_stdin), "execute_reply", "idle", timeout=timeout
        )

    async def execute(self, code: str, *, allow_stdin: bool = False) -> str:
        """Send a cell; returns the request's id."""
        content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}}
        return await self.send(
            "shell", "execute_request", content | {"allow_stdin": allow_stdin, "stop_on_error": True}
        )

    async def close(self) -> None:
        """Close it as a page does that is left. Idempotent."""
        self.socket.close()
        with contextlib.suppress(ConnectionError):
            while True:
                await self.receive()

    async def cut(self) -> None:
        """Lose the connection without a word."""
        assert self.socket.protocol is not None
        self.socket.protocol.stream.close()
        await self.close()


def text_of(messages: list[dict[str, Any]], name: str = "stdout") -> str:
    """What of a cell's messages was printed."""
    return "".join(
        message["content"]["text"]
        for message in messages
        if message["header"]["msg_type"] == "stream" and message["content"]["name"] == name
    )
