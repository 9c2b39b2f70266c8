"""BoundedWebsocket: large messages are read where there is room; who never finishes one is cut where others wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application
from tornado.websocket import WebSocketHandler, WebSocketProtocol, WebSocketProtocol13

from gateway.bounded_websocket import INVALID, SMALL_BYTES, BoundedWebsocket
from gateway.client_channel import AGAIN_LATER
from gateway.large_frames import LargeFrames
from tests.raw_websocket import BINARY, PING, RawWebsocket

LARGE = 2 * SMALL_BYTES


@asynccontextmanager
async def served(room: LargeFrames, got: list[int]) -> AsyncIterator[int]:
    """A websocket that tells the sizes of what it gets; its port."""

    class Handler(WebSocketHandler):
        max_message_size = LARGE

        def get_compression_options(self) -> dict[str, Any]:
            return {}

        def get_websocket_protocol(self) -> WebSocketProtocol | None:
            plain = super().get_websocket_protocol()
            assert isinstance(plain, WebSocketProtocol13)
            return BoundedWebsocket(self, plain, room)

        def on_message(self, message: str | bytes) -> None:
            got.append(len(message))

    server = HTTPServer(Application([("/", Handler)]))
    sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    try:
        yield int(sockets[0].getsockname()[1])
    finally:
        server.stop()
        await server.close_all_connections()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.01)


def piece(client: RawWebsocket, opcode: int, size: int) -> None:
    """Send a frame that is not its message's last."""
    client.writer.write(bytes((opcode, 0xFF)) + size.to_bytes(8, "big") + b"\0" * (4 + size))


async def test_messages_in_one_and_in_pieces_arrive_and_give_their_room_back() -> None:
    room, got = LargeFrames(LARGE), list[int]()
    async with served(room, got) as port, await RawWebsocket.connect(port, "/", kind="") as client:
        client.send_frame(BINARY, b"x" * LARGE)
        client.send_frame(BINARY, b"x")
        piece(client, BINARY, SMALL_BYTES)
        client.send_frame(PING, b"")
        client.send_frame(0, b"x" * 100)
        client.send_frame(BINARY, b"")
        await until(lambda: len(got) == 4)
        assert got == [LARGE, 1, SMALL_BYTES + 100, 0]
        assert room.used == 0


@pytest.mark.parametrize("in_pieces", [False, True])
async def test_what_is_never_finished_is_cut_where_others_wait_and_small_ones_do_not(in_pieces: bool) -> None:
    room, got = LargeFrames(LARGE, patience=0.2), list[int]()
    async with served(room, got) as port:
        clients = [await RawWebsocket.connect(port, "/", kind="") for _ in range(3)]
        stalled, waiting, small = clients
        if in_pieces:
            piece(stalled, BINARY, SMALL_BYTES)
            piece(stalled, 0, 1000)
        else:
            stalled.send_frame(BINARY, b"x" * LARGE, cut=1000)
        await until(lambda: room.used == LARGE)
        waiting.send_frame(BINARY, b"x" * LARGE)
        small.send_frame(BINARY, b"x")
        await until(lambda: got == [1])
        assert await stalled.ended() == (AGAIN_LATER, "A large message comes too slowly, and others wait.")
        await stalled.end()
        await until(lambda: got == [1, LARGE])
        assert room.used == 0
        waiting.send_frame(BINARY, b"x" * LARGE, cut=1000)
        await until(lambda: room.used == LARGE)
        waiting.reset()
        await until(lambda: room.used == 0)
        await asyncio.gather(small.end(), waiting.end())


async def test_a_compressed_message_that_cannot_be_read_ends_its_connection_with_a_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    room, got = LargeFrames(), list[int]()
    async with served(room, got) as port:
        headers = {"Sec-WebSocket-Extensions": "permessage-deflate"}
        client = await RawWebsocket.connect(port, "/", kind="", headers=headers)
        client.writer.write(bytes((0xC0 | BINARY, 0x80 | 50)) + b"\0" * 4 + b"\xff" * 50)
        assert await client.ended() == (INVALID, "The message cannot be decompressed.")
        await client.end()
    assert got == [] and "Traceback" not in caplog.text


DEFLATE = "permessage-deflate"


@pytest.mark.parametrize(
    ("offered", "agreed"),
    [
        (DEFLATE, DEFLATE),
        (f"{DEFLATE}; client_max_window_bits", DEFLATE),
        (f'{DEFLATE};server_max_window_bits="10" ; client_max_window_bits=8', "server_max_window_bits=10"),
        (f"{DEFLATE}; server_no_context_takeover", "server_no_context_takeover"),
        # The first that can be taken is.
        (f"x-other; a=1, {DEFLATE}; server_max_window_bits=99, {DEFLATE}", DEFLATE),
        ("x-other", None),
        (f"{DEFLATE}; server_max_window_bits=99", None),
        (f"{DEFLATE}; server_max_window_bits=7", None),
        (f"{DEFLATE}; server_max_window_bits=8", None),  # zlib has no such window
        (f"{DEFLATE}; server_max_window_bits=010", None),
        (f"{DEFLATE}; server_max_window_bits", None),
        (f"{DEFLATE}; server_max_window_bits=x", None),
        (f"{DEFLATE}; client_max_window_bits=16", None),
        (f"{DEFLATE}; server_no_context_takeover=1", None),
        (f"{DEFLATE}; server_max_window_bits=10; server_max_window_bits=10", None),
        (f"{DEFLATE}; unheard_of", None),
        (f"{DEFLATE};", None),
        (";;=\"\\,,=;\xff*0*='", None),
        ("a*0*=x'y'%ff; a*1=2; permessage-deflate*=x", None),
    ],
)
async def test_compression_that_cannot_be_had_as_it_is_offered_is_declined(
    caplog: pytest.LogCaptureFixture, offered: str, agreed: str | None
) -> None:
    room, got = LargeFrames(), list[int]()
    async with served(room, got) as port:
        headers = {"Sec-WebSocket-Extensions": offered}
        async with await RawWebsocket.connect(port, "/", kind="", headers=headers) as client:
            answered = [line for line in client.head.split("\r\n") if line.lower().startswith("sec-websocket-ext")]
            assert len(answered) == (agreed is not None)
            assert (agreed or "") in "".join(answered)
            client.send_frame(BINARY, b"plain")
            await until(lambda: got == [5])
    assert "Traceback" not in caplog.text
