"""Proxies that stand between a client and a server, and fail as a test wants it."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from pathlib import Path
from typing import Self

_PIECE = 64 * 1024
#: close with a reset instead of a goodbye
_RESET = struct.pack("ii", 1, 0)


class _Proxy:
    """Passes connections to `listener` on to `target`, each in a thread of its own; a context manager.

    The hooks of a subclass end their connection by an OSError.
    """

    def __init__(self, listener: socket.socket, target: str | tuple[str, int]) -> None:
        self._listener = listener
        self._listener.settimeout(0.1)
        self._target = target
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        #: wakes the threads that wait for data: readable while `_alarmed` is to be called
        self._alarms: list[socket.socket] = []

    def __enter__(self) -> Self:
        self._run(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join(10)
        for end in (self._listener, *self._alarms):
            end.close()

    def _connect(self, client: socket.socket, server: socket.socket) -> None:
        """Connect `server`."""
        server.connect(self._target)

    def _alarmed(self, client: socket.socket, server: socket.socket) -> None:
        """An alarm goes off."""

    def _requested(self) -> None:
        """A piece of a request is about to be passed on."""

    def _run(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            self._run(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        server = socket.socket(self._listener.family, socket.SOCK_STREAM)
        with client, server, contextlib.suppress(OSError):
            self._connect(client, server)
            while not self._closing.is_set():
                ready, _, _ = select.select([client, server, *self._alarms], [], [], 0.1)
                if any(alarm in ready for alarm in self._alarms):
                    self._alarmed(client, server)
                for source in ready:
                    piece = source.recv(_PIECE)
                    if not piece:
                        return
                    if source is client:
                        self._requested()
                    (server if source is client else client).sendall(piece)


class CuttableProxy(_Proxy):
    """A port in front of a server's at 127.0.0.1:`target`, whose connections can be cut."""

    def __init__(self, target: int) -> None:
        super().__init__(socket.create_server(("127.0.0.1", 0)), ("127.0.0.1", target))
        self.port: int = self._listener.getsockname()[1]
        #: connections that were cut in the middle
        self.cuts = 0
        self._through = threading.Event()
        self._through.set()
        #: readable while connections are to be cut
        self._down, self._control = socket.socketpair()
        self._down.setblocking(False)
        self._alarms.append(self._down)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._control.close()

    def cut(self) -> None:
        """Reset all connections; new ones are accepted and then hear nothing until `mend`."""
        self._through.clear()
        self._control.send(b"x")

    def mend(self) -> None:
        """Let connections through again."""
        self._down.recv(1)
        self._through.set()

    def _connect(self, client: socket.socket, server: socket.socket) -> None:
        while not self._through.wait(0.1):
            if self._closing.is_set():
                raise ConnectionAbortedError
        client.settimeout(10)
        server.settimeout(10)
        super()._connect(client, server)

    def _alarmed(self, client: socket.socket, server: socket.socket) -> None:
        for end in (client, server):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.cuts += 1
        raise ConnectionAbortedError


class DelayingProxy(_Proxy):
    """A Unix socket at `path` in front of the one of a container engine, `target`, which passes requests on late.

    Or not at all. What the engine sends by itself comes at once.
    """

    def __init__(self, path: Path, target: Path) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen(64)
        super().__init__(listener, str(target))
        self.url = f"unix://{path}"
        #: seconds that each piece of a request waits, in requests that come from now on
        self.delay = 0.0

    def _requested(self) -> None:
        if self.delay:
            self._closing.wait(self.delay)
