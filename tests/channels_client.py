"""A small Jupyter client over the gateway's websocket, which keeps every message it got in order, for tests."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from jupyter_server.services.kernels.connection.base import deserialize_msg_from_ws_v1, serialize_msg_to_ws_v1
from tornado.httpclient import HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect

V1 = "v1.kernel.websocket.jupyter.org"
_SECONDS = 30.0


class ChannelsClient:
    """One websocket of one client session. An async context manager."""

    def __init__(self, url: str, kernel_id: str, key: str, session: str | None = None) -> None:
        """`url`: the gateway's, with http."""
        self.session = session or uuid.uuid4().hex
        address = f"{url.replace('http', 'ws', 1)}/api/kernels/{kernel_id}/channels?session_id={self.session}"
        self._request = HTTPRequest(address, headers={"Authorization": f"token {key}"})
        self._connection: WebSocketClientConnection | None = None
        self._reading: asyncio.Task[None] | None = None
        self._came = asyncio.Event()
        #: all that came: header, parent_header, metadata, content, channel
        self.messages: list[dict[str, Any]] = []
        self.ended = asyncio.Event()

    async def __aenter__(self) -> ChannelsClient:
        connecting = websocket_connect(self._request, subprotocols=[V1], ping_interval=None)
        self._connection = await asyncio.wait_for(connecting, _SECONDS)
        self._reading = asyncio.create_task(self._read(self._connection))
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._connection is not None and self._reading is not None
        self._connection.close()
        await self._reading

    @property
    def closed_with(self) -> tuple[int | None, str | None]:
        """Code and reason of the close frame; (None, None) where there was none."""
        assert self._connection is not None
        return self._connection.close_code, self._connection.close_reason

    async def send(self, channel: str, msg_type: str, content: dict[str, Any]) -> str:
        """Send a message and return its id."""
        assert self._connection is not None
        msg_id = uuid.uuid4().hex
        header = {
            "msg_id": msg_id,
            "msg_type": msg_type,
            "session": self.session,
            "username": "",
            "date": datetime.now(UTC).isoformat(),
            "version": "5.4",
        }
        parts = [json.dumps(part).encode() for part in (header, {}, {}, content)]
        await self._connection.write_message(serialize_msg_to_ws_v1(parts, channel), binary=True)
        return msg_id

    async def execute(self, code: str, **content: Any) -> str:
        """Send a cell and return its id."""
        return await self.send("shell", "execute_request", {"code": code, "silent": False, **content})

    async def run(self, code: str) -> list[dict[str, Any]]:
        """Run a cell; return all messages under it once its reply and its idle status are here."""
        return await self.finish(await self.execute(code))

    async def finish(self, msg_id: str) -> list[dict[str, Any]]:
        """Return all messages under a request once its reply and its idle status are here."""
        await self.until(lambda: {"reply", "idle"} <= {_end(message) for message in self.of(msg_id)})
        return self.of(msg_id)

    def of(self, msg_id: str) -> list[dict[str, Any]]:
        """The messages under a request."""
        return [message for message in self.messages if message["parent_header"].get("msg_id") == msg_id]

    def states(self, msg_id: str | None = None) -> list[str]:
        """The execution states that came, under one request or under none."""
        return [
            message["content"]["execution_state"]
            for message in self.messages
            if message["header"]["msg_type"] == "status" and message["parent_header"].get("msg_id") == msg_id
        ]

    async def until(self, condition: Callable[[], object], seconds: float = _SECONDS) -> None:
        """Wait for something that messages bring about. Raises TimeoutError that shows what came."""
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    self._came.clear()
                    await self._came.wait()
        except TimeoutError:
            lines = [f"{each['channel']} {each['header']['msg_type']} {each['content']}" for each in self.messages]
            raise TimeoutError("there came: " + "\n".join(line[:200] for line in lines[-30:])) from None

    async def _read(self, connection: WebSocketClientConnection) -> None:
        while (frame := await connection.read_message()) is not None:
            assert isinstance(frame, bytes)
            channel, parts = deserialize_msg_from_ws_v1(frame)
            header, parent, metadata, content = (json.loads(part) for part in parts[:4])
            self.messages.append(
                {
                    "channel": channel,
                    "header": header,
                    "parent_header": parent,
                    "metadata": metadata,
                    "content": content,
                    "buffers": parts[4:],
                }
            )
            self._came.set()
        self.ended.set()
        self._came.set()


def text(messages: list[dict[str, Any]], name: str = "stdout") -> str:
    """What was printed to a stream."""
    streams = [message["content"] for message in messages if message["header"]["msg_type"] == "stream"]
    return "".join(content["text"] for content in streams if content["name"] == name)


def kinds(messages: list[dict[str, Any]]) -> list[str]:
    """The types of messages, statuses with what they say."""
    found = []
    for message in messages:
        kind = str(message["header"]["msg_type"])
        found.append(str(message["content"]["execution_state"]) if kind == "status" else kind)
    return found


def _end(message: dict[str, Any]) -> str:
    if message["header"]["msg_type"].endswith("_reply"):
        return "reply"
    return str(message["content"].get("execution_state", ""))
