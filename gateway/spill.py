"""SpillFile: where an output log keeps what its memory does not hold. All of it blocks: call it from threads only."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path


class SpillFile:
    """A file without a name: it goes with its last reader, or with the process, however that ends."""

    def __init__(self, directory: Path) -> None:
        """Make no file yet: the first `write` does."""
        self._directory = directory
        self._guard = threading.Lock()
        self._fd: int | None = None
        self._closed = False

    def write(self, offset: int, data: bytes) -> None:
        """Put all of `data` at `offset`; nothing after `close`. Raises OSError where the disk does not take it."""
        with self._guard:
            if self._closed:
                return
            if self._fd is None:
                with tempfile.TemporaryFile(dir=self._directory, prefix="output-") as file:
                    self._fd = os.dup(file.fileno())
            view = memoryview(data)
            while view:
                written = os.pwrite(self._fd, view, offset)
                offset += written
                view = view[written:]

    def read(self, offset: int, size: int) -> bytes | None:
        """Return `size` bytes from `offset`, or None where the file has been closed. Raises OSError."""
        with self._guard:
            if self._fd is None:
                return None
            data = os.pread(self._fd, size, offset)
            if len(data) < size:
                data += self._rest(offset + len(data), size - len(data))
        return data

    def close(self) -> None:
        """Give its room on the disk back. May be called again."""
        with self._guard:
            self._closed = True
            fd, self._fd = self._fd, None
            if fd is not None:
                os.close(fd)

    def _rest(self, offset: int, size: int) -> bytes:
        """One pread returns at most 2 GiB, and less where a signal came."""
        assert self._fd is not None
        pieces = []
        while size:
            piece = os.pread(self._fd, size, offset)
            if not piece:
                raise OSError("the spill file is shorter than what was written to it")
            pieces.append(piece)
            offset += len(piece)
            size -= len(piece)
        return b"".join(pieces)
