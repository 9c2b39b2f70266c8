"""BoundedServer: an HTTP server with a bound on its connections."""

from __future__ import annotations

import logging
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.iostream import IOStream

from gateway.open_websockets import OpenWebsockets

MAX_CONNECTIONS = 1000
_log = logging.getLogger(__name__)


class BoundedServer(HTTPServer):
    """Hangs up on a connection that is one too many, so that those there, sandboxes and engine keep descriptors."""

    max_connections = MAX_CONNECTIONS
    #: Tornado forgets a connection that becomes a websocket
    websockets: OpenWebsockets | None = None
    _full = False

    def handle_stream(self, stream: IOStream, address: Any) -> None:
        there = len(self._connections) + (0 if self.websockets is None else self.websockets.total)
        full, self._full = self._full, there >= self.max_connections
        if not self._full:
            super().handle_stream(stream, address)
            return
        stream.close()
        if not full:
            _log.warning("%d connections are open: more are refused", there)
