"""For a jupyter_server in front of the gateway: websockets of kernels that carry everything and outlive cuts.

    jupyter lab --gateway-url=URL --ServerApp.kernel_websocket_connection_class=gateway.lab.SamovarWebSocketConnection

jupyter_server's own connection ends at the first binary buffer and at messages over 10 MiB, and loses what was sent
while it was cut. This module is imported by that server; the gateway itself never does.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from typing import Any

from jupyter_server.gateway.gateway_client import GatewayClient
from jupyter_server.services.kernels.connection.base import BaseKernelWebsocketConnection
from jupyter_server.utils import url_escape, url_path_join
from tornado.escape import url_escape as query_escape
from tornado.httpclient import HTTPRequest
from tornado.web import HTTPError
from tornado.websocket import WebSocketClosedError

from gateway.kernel_socket import MAX_MESSAGE, UNREACHABLE, KernelSocket, Retries, SocketFullError
from gateway.websocket_frames import CHANNELS, LEGACY, V1, FrameError, decode, encode

#: pages whose position is remembered after their websocket went
_MAX_POSITIONS = 1000
#: seconds that a kernel's last model may take to fetch
_MODEL_TIMEOUT = 5.0
#: close codes: "invalid data" and "try again later"
_INVALID = 1007
_TOO_MUCH = 1013
#: a close reason's longest length in bytes
_MAX_REASON = 123

_log = logging.getLogger(__name__)


class SamovarWebSocketConnection(BaseKernelWebsocketConnection):
    """One page's websocket, passed on frame by frame: v1 to the gateway, whichever protocol the page speaks."""

    #: kernel id and client session → how far its page has come: what it acknowledged last
    _positions: OrderedDict[tuple[str, str], str] = OrderedDict()  # noqa: RUF012 - of the process, as Jupyter has it
    #: connections that still run; an asyncio task needs a holder
    _running: set[asyncio.Task[None]] = set()  # noqa: RUF012

    _socket: KernelSocket | None = None
    _task: asyncio.Task[None] | None = None
    _ended = False

    async def prepare(self) -> None:
        """Called by jupyter_server before the handshake with the page: let the page send as much as we may.

        Raises HTTPError where the kernel is dead: only a handshake that is refused lets JupyterLab ask for the reason
        and show it; closed after it, the page comes back at once, for ever.
        """
        self.websocket_handler.settings.setdefault("websocket_max_message_size", MAX_MESSAGE)
        model = await self._model()
        if model is not None and model.get("execution_state") == "dead":
            raise HTTPError(404, str(model.get("reason")))

    async def connect(self) -> None:
        """Called by jupyter_server when the page is connected."""
        handler = self.websocket_handler
        # Else small messages wait for the page's acknowledgements of earlier ones.
        handler.set_nodelay(True)
        heard = handler.on_pong

        def on_pong(data: bytes) -> None:
            if data:
                self._page_has(data.decode("ascii", "replace"))
            heard(data)

        handler.on_pong = on_pong  # type: ignore[method-assign]
        client = GatewayClient.instance()
        self._socket = KernelSocket(
            self._request,
            V1,
            self._to_page,
            numbered=self._numbered,
            position=self._positions.get(self._key, ""),
            # For about as long as jupyter_server's own would try, but each second: who waits sees a gateway come back.
            retries=Retries(3 * (client.gateway_retry_max + 1), 0.2, min(1.0, client.gateway_retry_interval_max)),
        )
        self._task = asyncio.create_task(self._run(self._socket), name=f"websocket of kernel {self.kernel_id}")
        self._running.add(self._task)
        self._task.add_done_callback(self._finished)

    def disconnect(self) -> None:  # type: ignore[override]  # jupyter_server calls it without awaiting
        """Called by jupyter_server when the page is gone."""
        # One that has ended by itself needs the model for the page that comes back.
        if self._task is not None and not self._ended:
            self._task.cancel()

    def handle_incoming_message(self, incoming_msg: str | bytes) -> None:
        """Called by jupyter_server with each frame of the page."""
        if self._socket is None:
            return
        try:
            if not self._page_speaks_v1:
                incoming_msg = encode(V1, *decode(LEGACY, incoming_msg))
            self._socket.send(incoming_msg)
        except SocketFullError as error:
            self.websocket_handler.close(_TOO_MUCH, str(error))
        except FrameError as error:
            self.websocket_handler.close(_INVALID, _reason(str(error)))

    @property
    def _page_speaks_v1(self) -> bool:
        return bool(self.websocket_handler.selected_subprotocol == V1)

    @property
    def _key(self) -> tuple[str, str]:
        return str(self.kernel_id), str(self.session_id)

    async def _run(self, socket: KernelSocket) -> None:
        end = await socket.run()
        self._ended = True
        self.log.info("The websocket of kernel %s ended: %s %s", self.kernel_id, end.code, end.reason)
        # The page asks for the model when its websocket closes; its reason is what the page shows.
        await self._model()
        self.websocket_handler.close(end.code, _reason(end.reason))

    async def _model(self) -> dict[str, Any] | None:
        """The kernel as the gateway has it, which jupyter_server tells the page from now on; None: not known."""
        try:
            async with asyncio.timeout(_MODEL_TIMEOUT):
                model: dict[str, Any] | None = await self.kernel_manager.refresh_model()
        except (HTTPError, OSError, TimeoutError) as error:
            self.log.warning("The model of kernel %s could not be fetched: %s", self.kernel_id, error)
            return None
        return model

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.log.error("The websocket of kernel %s failed", self.kernel_id, exc_info=error)
            self.websocket_handler.close(UNREACHABLE, "the connection to the gateway failed; see the server's log")

    async def _to_page(self, frame: str | bytes) -> None:
        try:
            if not self._page_speaks_v1:
                frame = encode(LEGACY, *decode(V1, frame, CHANNELS))
            await self.websocket_handler.write_message(frame, binary=isinstance(frame, bytes))
        except FrameError as error:
            self.log.warning("A message of kernel %s was left out: %s", self.kernel_id, error)
        except WebSocketClosedError:
            _log.debug("the page went; what it has not acknowledged comes when it is back")

    def _numbered(self, payload: bytes) -> None:
        """Ask the page where it is: its pong comes after all it has read."""
        # A page that never answered starts where its first connection did.
        self._positions.setdefault(self._key, payload.decode("ascii", "replace"))
        try:
            self.websocket_handler.ping(payload)
        except WebSocketClosedError:
            _log.debug("the page went before it acknowledged %r", payload)

    def _page_has(self, position: str) -> None:
        self._positions[self._key] = position
        self._positions.move_to_end(self._key)
        while len(self._positions) > _MAX_POSITIONS:
            self._positions.popitem(last=False)

    def _request(self, position: str) -> HTTPRequest:
        client = GatewayClient.instance()
        url = url_path_join(client.ws_url or "", client.kernels_endpoint, url_escape(str(self.kernel_id)), "channels")
        url += f"?session_id={query_escape(str(self.session_id))}"
        if position:
            url += f"&samovar_after={query_escape(position)}"
        arguments: dict[str, Any] = client.load_connection_args()
        return HTTPRequest(url, **arguments)


def _reason(text: str) -> str:
    """As much of a text as a close frame holds."""
    return text.encode()[:_MAX_REASON].decode(errors="ignore")
