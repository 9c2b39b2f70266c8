"""A Unix socket in front of a container engine's, which passes requests on late, or not at all."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from pathlib import Path

_PIECE = 64 * 1024


class DelayingProxy:
    """Serves `path` for the engine at `target`; a context manager. What the engine sends by itself comes at once."""

    def __init__(self, path: Path, target: Path) -> None:
        self.url = f"unix://{path}"
        #: seconds that each piece of a request waits, in requests that come from now on
        self.delay = 0.0
        self._target = str(target)
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._listener.settimeout(0.1)

    def __enter__(self) -> DelayingProxy:
        self._run(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

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
        engine = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with client, engine, contextlib.suppress(OSError):
            engine.connect(self._target)
            while not self._closing.is_set():
                ready, _, _ = select.select([client, engine], [], [], 0.1)
                for source in ready:
                    piece = source.recv(_PIECE)
                    if not piece:
                        return
                    if source is client and self.delay:
                        self._closing.wait(self.delay)
                    (engine if source is client else client).sendall(piece)
