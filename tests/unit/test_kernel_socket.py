"""The client's end of a kernel's websocket, against a server that cuts, repeats, refuses and falls silent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tornado.httpclient import HTTPRequest
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application, HTTPError
from tornado.websocket import WebSocketClosedError, WebSocketHandler

from gateway import kernel_socket
from gateway.kernel_socket import End, KernelSocket, Retries, SocketFullError

PROTOCOL = "v1.kernel.websocket.jupyter.org"
AT_ONCE = Retries(attempts=3, first=0.001, longest=0.001)


class Server:
    """What each connection does, in order, is a coroutine over its handler."""

    def __init__(self, *scripts: Callable[[Handler], Awaitable[None]] | HTTPError) -> None:
        self.scripts = list(scripts)
        #: `samovar_after` of each connection
        self.positions: list[str] = []
        self.received: list[str | bytes] = []
        self.handlers: list[Handler] = []
        self.protocol: str | None = PROTOCOL


class Handler(WebSocketHandler):
    def initialize(self, server: Server) -> None:
        self.server = server
        self.arrived = asyncio.Event()

    async def get(self, *args: Any, **kwargs: Any) -> None:
        self.server.positions.append(self.get_argument("samovar_after", ""))
        if self.server.scripts and isinstance(self.server.scripts[0], HTTPError):
            raise self.server.scripts.pop(0)  # type: ignore[misc]
        await super().get(*args, **kwargs)

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        return self.server.protocol if self.server.protocol in subprotocols else None

    async def open(self, *_: str) -> None:
        self.server.handlers.append(self)
        script = self.server.scripts.pop(0)
        assert not isinstance(script, HTTPError)
        self.task = asyncio.create_task(script(self))

    async def on_message(self, message: str | bytes) -> None:
        self.server.received.append(message)
        self.arrived.set()

    def cut(self) -> None:
        assert self.ws_connection is not None
        self.ws_connection.stream.close()

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        self.finish({"message": f"answer {status_code}", "reason": None})


@asynccontextmanager
async def served(server: Server) -> AsyncIterator[Callable[[str], HTTPRequest]]:
    """Serve; what comes is the `request` of a KernelSocket."""
    listener, port = bind_unused_port()
    http = HTTPServer(Application([("/", Handler, {"server": server})]))
    http.add_socket(listener)

    def request(position: str) -> HTTPRequest:
        query = f"?samovar_after={position}" if position else ""
        return HTTPRequest(f"ws://127.0.0.1:{port}/{query}", connect_timeout=5, request_timeout=5)

    try:
        yield request
    finally:
        http.stop()
        await http.close_all_connections()
        await asyncio.gather(*(handler.task for handler in server.handlers), return_exceptions=True)


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


class Client:
    """A KernelSocket and what came of it."""

    def __init__(self, request: Callable[[str], HTTPRequest], retries: Retries = AT_ONCE, position: str = "") -> None:
        self.frames: list[str | bytes] = []
        self.numbers: list[bytes] = []
        self.slow = 0.0
        self.socket = KernelSocket(
            request, PROTOCOL, self.deliver, numbered=self.numbers.append, retries=retries, position=position
        )

    async def deliver(self, frame: str | bytes) -> None:
        await asyncio.sleep(self.slow)
        self.frames.append(frame)

    async def run(self) -> End:
        async with asyncio.timeout(10):
            return await self.socket.run()


async def test_what_a_cut_took_comes_once() -> None:
    async def first(handler: Handler) -> None:
        handler.ping(b"e:0")
        await handler.write_message(b"one", binary=True)
        handler.ping(b"e:1")
        await handler.write_message(b"two", binary=True)
        await handler.write_message("three")
        await asyncio.sleep(0.05)
        handler.cut()

    async def second(handler: Handler) -> None:
        handler.ping(b"e:1")
        for frame in (b"two", "three", b"four"):
            await handler.write_message(frame, binary=isinstance(frame, bytes))
        handler.ping(b"e:4")
        handler.close(4410, "gone")

    server = Server(first, second)
    async with served(server) as request:
        client = Client(request)
        assert await client.run() == End(4410, "gone")
    assert client.frames == [b"one", b"two", "three", b"four"]
    assert server.positions == ["", "e:1"]
    assert client.numbers == [b"e:0", b"e:1", b"e:4"]


async def test_what_a_cut_took_comes_once_also_where_the_kernel_died_meanwhile() -> None:
    async def first(handler: Handler) -> None:
        handler.ping(b"old:1")
        await handler.write_message(b"the cause", binary=True)
        await asyncio.sleep(0.05)
        handler.cut()

    async def second(handler: Handler) -> None:
        # A position of the kernel process before means all that came since it died.
        handler.ping(b"new:1")
        await handler.write_message(b"the cause", binary=True)
        await handler.write_message(b"more", binary=True)
        handler.ping(b"new:3")
        handler.close(4410, "gone")

    server = Server(first, second)
    async with served(server) as request:
        client = Client(request)
        assert await client.run() == End(4410, "gone")
    assert client.frames == [b"the cause", b"more"]
    assert client.numbers == [b"old:1", b"new:1", b"new:3"]


async def test_it_goes_on_from_a_position_that_it_is_given() -> None:
    async def script(handler: Handler) -> None:
        handler.close(1000, "replaced")

    server = Server(script)
    async with served(server) as request:
        assert await Client(request, position="e:7").run() == End(1000, "replaced")
    assert server.positions == ["e:7"]


async def test_what_could_not_be_sent_goes_over_the_next_connection() -> None:
    async def first(handler: Handler) -> None:
        await handler.arrived.wait()
        handler.close(1012, "restart")

    async def second(handler: Handler) -> None:
        await handler.arrived.wait()
        handler.close(4410, "gone")

    server = Server(first, second)
    async with served(server) as request:
        client = Client(request)
        client.socket.send("before it is connected")
        running = asyncio.create_task(client.run())
        await until(lambda: len(server.received) == 1)
        await until(lambda: not server.scripts or server.handlers[0].ws_connection is None)
        client.socket.send(b"while it is cut")
        assert await running == End(4410, "gone")
    assert server.received == ["before it is connected", b"while it is cut"]


@pytest.mark.parametrize(
    ("status", "end"),
    [
        (404, End(4410, "answer 404")),
        (403, End(1008, "answer 403")),
        (400, End(1008, "answer 400")),
    ],
)
async def test_a_refusal_is_final(status: int, end: End) -> None:
    server = Server(HTTPError(status))
    async with served(server) as request:
        assert await Client(request).run() == end
    assert len(server.positions) == 1


async def test_a_server_that_starts_is_waited_for() -> None:
    async def script(handler: Handler) -> None:
        handler.close(4410, "gone")

    server = Server(HTTPError(503), HTTPError(502), script)
    async with served(server) as request:
        assert (await Client(request).run()).code == 4410
    assert len(server.positions) == 3


async def test_it_gives_up_after_as_many_attempts_as_it_is_told() -> None:
    server = Server(*(HTTPError(503) for _ in range(4)))
    async with served(server) as request:
        end = await Client(request).run()
    assert end == End(1011, "answer 503")
    assert server.scripts == [], "one and three more"
    listener, port = bind_unused_port()
    listener.close()
    end = await Client(lambda _: HTTPRequest(f"ws://127.0.0.1:{port}/", connect_timeout=5, request_timeout=5)).run()
    assert end.code == 1011 and "cannot be reached" in end.reason


async def test_a_connection_that_lasted_gives_new_attempts() -> None:
    async def script(handler: Handler) -> None:
        await handler.write_message(f"frame {len(handler.server.handlers)}")
        handler.close(1012, "restart")

    async def last(handler: Handler) -> None:
        handler.close(4410, "gone")

    server = Server(*[script] * 8, last)
    async with served(server) as request:
        client = Client(request)
        assert (await client.run()).code == 4410
    assert client.frames == [f"frame {number}" for number in range(1, 9)]


async def test_another_protocol_is_refused() -> None:
    async def script(handler: Handler) -> None:
        await handler.arrived.wait()

    server = Server(script)
    server.protocol = None
    async with served(server) as request:
        assert await Client(request).run() == End(1008, f"the gateway does not speak {PROTOCOL}")
        server.handlers[0].arrived.set()


async def test_a_slow_reader_is_not_taken_for_a_dead_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_socket, "_SILENCE", 0.3)

    async def silent(handler: Handler) -> None:
        await handler.write_message("one")
        await handler.arrived.wait()

    async def last(handler: Handler) -> None:
        handler.close(4410, "gone")

    server = Server(silent, last)
    async with served(server) as request:
        client = Client(request)
        client.slow = 2.0
        running = asyncio.create_task(client.run())
        await asyncio.sleep(1.5)
        assert len(server.positions) == 1, "it is we who do not read"
        assert (await running).code == 4410, "then nothing comes any more"
        server.handlers[0].arrived.set()
    assert client.frames == ["one"]


async def test_what_waits_to_be_sent_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_socket, "MAX_UNSENT", 100)
    socket = Client(lambda _: HTTPRequest("ws://127.0.0.1:1/")).socket
    socket.send(b"x" * 200)  # one always goes, however large
    with pytest.raises(SocketFullError, match="wait to be sent"):
        socket.send(b"x")


async def test_it_is_closed_by_cancelling() -> None:
    closed = asyncio.Event()

    async def script(handler: Handler) -> None:
        try:
            while True:
                await handler.write_message(b"x" * 100_000, binary=True)
        except WebSocketClosedError:
            closed.set()

    server = Server(script)
    async with served(server) as request:
        client = Client(request)
        client.slow = 60
        running = asyncio.create_task(client.run())
        await client.socket.opened.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        async with asyncio.timeout(5):
            await closed.wait()


async def test_an_attempt_is_ended_by_cancelling() -> None:
    listener, port = bind_unused_port()  # accepts, and never answers
    try:
        client = Client(lambda _: HTTPRequest(f"ws://127.0.0.1:{port}/", connect_timeout=60, request_timeout=60))
        running = asyncio.create_task(client.run())
        await asyncio.sleep(0.1)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert running.cancelled()
        await asyncio.sleep(0.1)
    finally:
        listener.close()


async def test_an_error_of_the_reader_ends_it() -> None:
    async def script(handler: Handler) -> None:
        await handler.write_message("one")
        await handler.arrived.wait()

    server = Server(script)
    async with served(server) as request:
        client = Client(request)
        client.frames = None  # type: ignore[assignment]
        with pytest.raises(AttributeError):
            await client.run()
        server.handlers[0].arrived.set()


def test_delays_are_doubled_up_to_a_bound() -> None:
    retries = Retries(first=0.2, longest=2.0)
    for failures, least in enumerate((0.2, 0.4, 0.8, 1.6, 2.0, 2.0)):
        assert least <= retries.delay(failures) <= 1.5 * least
