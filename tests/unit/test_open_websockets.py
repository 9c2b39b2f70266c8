"""How many websockets owners may have open, and that the server counts them."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tornado.netutil import bind_sockets
from tornado.web import Application
from tornado.websocket import WebSocketHandler

from gateway.bounded_server import BoundedServer
from gateway.errors import RequestError
from gateway.open_websockets import OpenWebsockets
from tests.raw_websocket import RawWebsocket


def opened(websockets: OpenWebsockets, owner: str, stack: ExitStack) -> int:
    """Open as many as the owner gets, and return how many these are."""
    for number in range(1000):
        try:
            stack.enter_context(websockets.one(owner))
        except RequestError as error:
            assert (error.status, error.retry_after is None) == (HTTPStatus.SERVICE_UNAVAILABLE, False)
            assert f"has {number} websockets open" in error.message
            return number
    raise AssertionError("no bound")


@given(st.integers(2, 200), st.integers(1, 10))
def test_whatever_others_have_there_is_room_for_one_more_owner(room: int, owners: int) -> None:
    websockets = OpenWebsockets(room)
    with ExitStack() as stack:
        for number in range(owners):
            # Each takes all that it gets, the first half of the room.
            free = room - websockets.total
            assert opened(websockets, f"owner {number}", stack) == (free + 1) // 2
            assert free < 2 or websockets.total < room
    assert websockets.total == 0


def test_a_websocket_that_is_closed_makes_room_and_one_that_is_refused_takes_none() -> None:
    websockets = OpenWebsockets(4)
    with ExitStack() as stack:
        assert opened(websockets, "one", stack) == 2
        with pytest.raises(RequestError), websockets.one("one"):
            pass
        assert websockets.total == 2
        with websockets.one("other"):
            pass
        assert websockets.total == 2
    with websockets.one("one"):
        assert websockets.total == 1


class Echo(WebSocketHandler):
    """A websocket that is counted."""

    websockets = OpenWebsockets(6)

    async def get(self, *args: str, **kwargs: str) -> None:
        with self.websockets.one("one"):
            await super().get(*args, **kwargs)


async def test_a_server_counts_its_websockets_among_its_connections(caplog: pytest.LogCaptureFixture) -> None:
    server = BoundedServer(Application([("/", Echo)]))
    server.max_connections, server.websockets = 2, Echo.websockets
    sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    port = int(sockets[0].getsockname()[1])
    try:
        one, two = [await RawWebsocket.connect(port, "/", kind="") for _ in range(2)]
        with pytest.raises((OSError, EOFError)):
            await RawWebsocket.connect(port, "/", kind="")
        assert "2 connections are open: more are refused" in caplog.text
        await one.end()
        async with asyncio.timeout(5):
            while Echo.websockets.total == 2:  # noqa: ASYNC110 (what is waited for has no event)
                await asyncio.sleep(0.01)
        await (await RawWebsocket.connect(port, "/", kind="")).end()
        await two.end()
    finally:
        server.stop()
        await server.close_all_connections()
