"""`/api/kernels/{id}/channels`: the websocket between a Jupyter client and its kernel."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from tornado.iostream import StreamClosedError
from tornado.websocket import WebSocketClosedError, WebSocketHandler, WebSocketProtocol, WebSocketProtocol13

from gateway.bounded_websocket import INVALID, BoundedWebsocket
from gateway.channels import KernelChannels, Refused
from gateway.client_channel import ClientChannel, ClientForm
from gateway.errors import RequestError
from gateway.handlers.jupyter.base import JupyterHandler
from gateway.websocket_frames import LEGACY, V1, FrameError

#: What a close frame may have as its reason.
_MAX_REASON = 123
#: What Tornado's stream needs beside a message: the frame's head, and what it read beyond.
_STREAM_BYTES = 1024 * 1024
#: Clients of Tornado that speak the older form: jupyter_server's gateway client is one.
_FRAGILE_AGENT = "Tornado/"


class ChannelsHandler(WebSocketHandler, JupyterHandler):
    """One websocket. All that is refused is refused before it opens: 400, 403, 404 and 503 as elsewhere."""

    _client: ClientChannel | None = None
    _refused = False
    #: whether the client has said good-bye
    _in_order = False

    def check_origin(self, origin: str) -> bool:
        """Who has a token may come from anywhere, unless origins are configured; `owner` has looked."""
        return True

    async def get(self, *args: Any, **kwargs: Any) -> None:
        """Open the websocket of the kernel that the path names."""
        owner = self.owner
        kernel = self.jupyter.kernels.find(owner, args[0])
        if self.request.headers.get("Upgrade", "").lower() != "websocket":
            text = "This is a websocket: it needs the headers Connection: Upgrade and Upgrade: websocket."
            raise RequestError(HTTPStatus.BAD_REQUEST, "no_upgrade", text)
        channels = kernel.channels
        if not isinstance(channels, KernelChannels) or kernel.dead or channels.closed:
            raise RequestError(HTTPStatus.NOT_FOUND, "kernel_dead", kernel.reason or "The kernel is gone.")
        self._channels = channels
        self._session_id = self.get_query_argument("session_id", "")
        self._after = self.get_query_argument("samovar_after", None)
        # It returns when the websocket is closed.
        with self.jupyter.websockets.one(owner):
            await super().get(*args, **kwargs)

    @property
    def max_message_size(self) -> int:
        return self._channels.bounds.max_message

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        return V1 if V1 in subprotocols else None

    def get_compression_options(self) -> dict[str, Any] | None:
        return {"compression_level": 1} if self._channels.bounds.compression else None

    def get_websocket_protocol(self) -> WebSocketProtocol | None:
        plain = super().get_websocket_protocol()
        if not isinstance(plain, WebSocketProtocol13):
            return plain
        return BoundedWebsocket(self, plain, self._channels.incoming)

    def open(self, *_: str) -> None:
        """The websocket is open: the client gets what the log has for it."""
        self.set_nodelay(True)
        if isinstance(self.ws_connection, WebSocketProtocol13):
            # The server's own bound is for bodies of requests.
            self.ws_connection.stream.max_buffer_size = self.max_message_size + _STREAM_BYTES
        kind = self.selected_subprotocol or LEGACY
        agent = self.request.headers.get("User-Agent", "")
        form = ClientForm(kind, kind == LEGACY and agent.startswith(_FRAGILE_AGENT), self._after is not None)
        try:
            self._client = self._channels.open(self._session_id, _Socket(self), form, self._after)
        except Refused as error:
            self.close(error.code, str(error))

    async def on_message(self, message: str | bytes) -> None:
        """A frame of the client; the next one is read when the kernel has room for more."""
        if self._client is None or self._refused:
            return
        try:
            await self._channels.received(self._client, message)
        except FrameError as error:
            self._refused = True
            self._client.end(INVALID, str(error))
        except Refused as error:
            self._refused = True
            self._client.end(error.code, str(error))

    def on_pong(self, data: bytes) -> None:
        if self._client is not None:
            self._client.ponged(data)

    def on_connection_close(self) -> None:
        """The connection is closed; Tornado forgets at once by whom."""
        self._in_order = self.ws_connection is not None and self.ws_connection.client_terminated
        super().on_connection_close()

    def on_close(self) -> None:
        if self._client is not None:
            self._client.closed(in_order=self._in_order)

    def close(self, code: int | None = None, reason: str | None = None) -> None:
        """Say good-bye, with as much of the reason as a close frame holds."""
        if reason is not None:
            reason = reason.encode("utf-8", "replace")[:_MAX_REASON].decode("utf-8", "ignore")
        super().close(code, reason)


class _Socket:
    """What a client channel needs of a websocket."""

    def __init__(self, handler: ChannelsHandler) -> None:
        self._handler = handler

    def write(self, frame: bytes | str) -> asyncio.Future[None]:
        return self._handler.write_message(frame, binary=isinstance(frame, bytes))

    def ping(self, data: bytes = b"") -> None:
        try:
            self._handler.ping(data)
        except (WebSocketClosedError, StreamClosedError):
            # The websocket is about to tell that it closed.
            return

    def close(self, code: int | None = None, reason: str | None = None) -> None:
        self._handler.close(code, reason)
