"""A TCP port in front of a server's, whose connections a test can cut."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading

_PIECE = 64 * 1024
#: close with a reset instead of a goodbye
_RESET = struct.pack("ii", 1, 0)


class CuttableProxy:
    """Passes connections to 127.0.0.1:`port` on to 127.0.0.1:`target`; a context manager."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._closing = threading.Event()
        self._through = threading.Event()
        self._through.set()
        #: readable while connections are to be cut: wakes the threads that wait for data
        self._down, self._control = socket.socketpair()
        self._down.setblocking(False)
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.1)
        self.port: int = self._listener.getsockname()[1]
        #: connections that were cut in the middle
        self.cuts = 0

    def __enter__(self) -> CuttableProxy:
        self._run(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join(10)
        for end in (self._listener, self._down, self._control):
            end.close()

    def cut(self) -> None:
        """Reset all connections; new ones are accepted and then hear nothing until `mend`."""
        self._through.clear()
        self._control.send(b"x")

    def mend(self) -> None:
        """Let connections through again."""
        self._down.recv(1)
        self._through.set()

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
        server = socket.socket()
        with client, server, contextlib.suppress(OSError):
            while not self._through.wait(0.1):
                if self._closing.is_set():
                    return
            client.settimeout(10)
            server.settimeout(10)
            server.connect(("127.0.0.1", self._target))
            while not self._closing.is_set():
                ready, _, _ = select.select([client, server, self._down], [], [], 0.1)
                if self._down in ready:
                    for end in (client, server):
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    self.cuts += 1
                    return
                for source in ready:
                    piece = source.recv(_PIECE)
                    if not piece:
                        return
                    (server if source is client else client).sendall(piece)
