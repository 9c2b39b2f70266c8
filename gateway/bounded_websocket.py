"""BoundedWebsocket: a websocket that reads a large message only where there is room for it, over all websockets."""

from __future__ import annotations

import asyncio
import zlib
from typing import Any

from tornado.httputil import HTTPHeaders
from tornado.websocket import WebSocketHandler, WebSocketProtocol13

from gateway import deflate_offers
from gateway.client_channel import AGAIN_LATER
from gateway.large_frames import LargeFrames, Sending

#: Smaller messages are read without asking.
SMALL_BYTES = 256 * 1024
INVALID = 1007
_CONTROL = 0x8


class BoundedWebsocket(WebSocketProtocol13):
    """Tornado's, but clients that never finish their messages cannot fill the memory together."""

    def __init__(self, handler: WebSocketHandler, plain: WebSocketProtocol13, room: LargeFrames) -> None:
        """In the place of `plain`, which has read nothing yet."""
        super().__init__(handler, False, plain.params)
        self._owner = handler
        self._large = room
        self._room: Sending | None = None
        #: the first byte of the frame that is read
        self._first: int | None = None

    def _parse_extensions_header(self, headers: HTTPHeaders) -> list[tuple[str, Any]]:
        # Tornado takes the first offer of compression, and fails on one that it cannot take.
        return deflate_offers.acceptable(headers.get("Sec-WebSocket-Extensions", ""))

    async def _receive_frame(self) -> None:
        self._first = None
        try:
            await super()._receive_frame()
        except BaseException:
            self._leave()
            raise
        if self._fragmented_message_buffer is None or self.client_terminated:
            self._leave()

    async def _read_bytes(self, n: int) -> bytes:
        pieces = self._fragmented_message_buffer
        if self._room is None and n + len(pieces or b"") > SMALL_BYTES:
            # How long a message in pieces gets only its end tells.
            whole = pieces is None and bool((self._first or 0) & self.FIN)
            self._room = await self._large.take(n if whole else self.params.max_message_size, self._cut)
        data = await super()._read_bytes(n)
        if self._first is None:
            self._first = data[0]
        return data

    def _handle_message(self, opcode: int, data: bytes) -> asyncio.Future[None] | None:
        if not opcode & _CONTROL:
            # What then waits for its kernel is counted there.
            self._leave()
        try:
            return super()._handle_message(opcode, data)
        except zlib.error:
            # Tornado would drop the connection without a word, and log it as a fault of ours.
            self._owner.close(INVALID, "The message cannot be decompressed.")
            self._abort()
            return None

    def _leave(self) -> None:
        room, self._room = self._room, None
        if room is not None:
            self._large.give_back(room)

    def _cut(self) -> None:
        self._owner.close(AGAIN_LATER, "A large message comes too slowly, and others wait.")
