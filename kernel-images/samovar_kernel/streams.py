"""SandboxStream: what `sys.stdout` and `sys.stderr` are in a sandbox."""

from __future__ import annotations

import contextvars
import io
from collections.abc import Iterable
from typing import Any

from ipykernel.iostream import OutStream
from jupyter_client.session import extract_header

from samovar_kernel.output import Header, OutputBuffer
from samovar_kernel.publisher import Publisher

_FILE_DESCRIPTORS = {"stdout": 1, "stderr": 2}


class SandboxStream(OutStream):
    """A text stream into the shared output. An `OutStream` by type, since libraries recognise a notebook by that."""

    # on the class: io's own attribute of that name cannot be set
    errors = "strict"

    def __init__(self, publisher: Publisher, name: str) -> None:
        # not OutStream.__init__: it would start a watcher thread and replace the file descriptor
        io.TextIOBase.__init__(self)
        self.pub_thread = publisher
        self.session = publisher.session
        self.name = name
        self.echo = None
        self._output: OutputBuffer = publisher.output
        self._isatty = False
        self._should_watch = False
        self._exc = None
        self._parent_header: contextvars.ContextVar[Header] = contextvars.ContextVar("parent_header")
        self._parent_header_global: Header = {}
        self._buffer: _ByteStream | None = None

    @property
    def buffer(self) -> io.RawIOBase:
        """The bytes below, as files have it: what is written there appears in order."""
        if self._buffer is None:
            self._buffer = _ByteStream(self)
        return self._buffer

    @property
    def parent_header(self) -> Header:
        """Header of the request that the calling thread's (or task's) output belongs to."""
        return self._parent_header.get(self._parent_header_global)

    @parent_header.setter
    def parent_header(self, value: Header) -> None:
        self._parent_header.set(value)
        self._parent_header_global = value
        self._output.set_parent(self.name, value)

    def set_parent(self, parent: dict[str, Any]) -> None:
        """Say whose output follows: `parent` is a message or its header."""
        self.parent_header = extract_header(parent)

    def fileno(self) -> int:
        """Return the descriptor that child processes inherit: what they write to it appears here as well."""
        return _FILE_DESCRIPTORS[self.name]

    def write(self, string: str) -> int:
        """Queue `string` and return its length. Raises UnicodeEncodeError for a lone surrogate."""
        if not isinstance(string, str):
            raise TypeError(f"write() argument must be str, not {type(string).__name__}")
        if self.pub_thread is None:
            raise ValueError("I/O operation on closed file")
        self._output.write(self.name, self.parent_header, string)
        return len(string)

    def writelines(self, sequence: Iterable[str]) -> None:  # type: ignore[override]
        """Write each string of `sequence`."""
        for string in sequence:
            self.write(string)

    def flush(self) -> None:
        """Have what was written sent soon, in order with everything published later. Never waits."""
        if self.pub_thread is not None:
            self.pub_thread.flush()

    def close(self) -> None:
        """Refuse further writes."""
        if self.pub_thread is not None:
            self.flush()
            self.pub_thread = None


class _ByteStream(io.RawIOBase):
    """`sys.stdout.buffer`: bytes go through the descriptor, whose pipe is read before each text that follows."""

    def __init__(self, stream: SandboxStream) -> None:
        super().__init__()
        self._stream = stream

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        size = view.nbytes
        with open(self.fileno(), "wb", buffering=0, closefd=False) as file:
            while view:
                view = view[file.write(view) or 0 :]
        return size

    def flush(self) -> None:
        self._stream.flush()
