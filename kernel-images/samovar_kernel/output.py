"""Output: everything that the kernel publishes, in the one order in which it happened, bounded in bytes.

Texts of both streams, what arrived on the pipes behind fd 1 and 2, and whole messages (status, results, plots) wait
in one queue until the publisher takes them. Neighbouring texts become one stream message, so that a flood of prints is
few messages.
"""

from __future__ import annotations

import codecs
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jupyter_client.session import DELIM, Session

from samovar_kernel.system import readable_test
from samovar_kernel.unsent import Ring

BUDGET = 512 * 1024
"""Bytes that may wait; a writer above it waits until the publisher has made room."""

MESSAGE_SIZE = 64 * 1024
"""A stream message takes no further text from this size on (bytes)."""

PIPE_SIZE = 64 * 1024

MAX_MESSAGE = 60 * 1024 * 1024
"""Bytes of one message; the host closes the channel over a larger one, which would end the sandbox."""

_OVERHEAD = 2048  # bytes that a message counts for beside its own: an interrupted cell's end comes behind all that wait
_FILE_DESCRIPTORS = {"stdout": 1, "stderr": 2}
_WAIT = 0.002
_NOTHING, _SOON, _FLOOD = range(3)

Header = dict[str, Any]


class TooLarge(ValueError):
    """What user code wants to publish does not fit in one message."""


_Item = tuple[Any, str | None, Header | None, int, int]  # frames or text, stream, parent, position in the ring, size


class OutputBuffer:
    """The queue between all who print or publish and the publisher. Writers may be any thread and any forked child."""

    def __init__(self, session: Session, pipes: Mapping[str, int], ring: Ring) -> None:
        self.session = session
        #: tells the publisher that something waits; the argument is true when it should not wait for more
        self.notify: Callable[[bool], None] = lambda urgent: None
        #: tells whether the calling thread may be made to wait for room
        self.may_wait: Callable[[], bool] = lambda: True
        self.forked = False
        self._ring = ring
        self._queue: deque[_Item] = deque()
        # reentrant: a signal handler or a finalizer may print while its own thread is inside
        self._lock = threading.RLock()
        self._told = _NOTHING  # what the publisher knows of, so that it is told once and not at every print
        self._produced = 0
        self._consumed = 0
        self._parents: dict[str, Header] = {"stdout": {}, "stderr": {}}
        self._packed: tuple[Header, bytes] = ({}, b"{}")
        self._decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in pipes}
        self._pipes = {descriptor: name for name, descriptor in pipes.items()}
        for descriptor in self._pipes:
            os.set_blocking(descriptor, False)
        self._waiting = readable_test(self._pipes)
        os.register_at_fork(after_in_child=self._after_fork)

    @property
    def size(self) -> int:
        """Bytes that wait."""
        return self._produced - self._consumed

    @property
    def empty(self) -> bool:
        """Whether nothing waits."""
        return not self._queue

    @property
    def pipes(self) -> tuple[int, ...]:
        """Descriptors of the pipes that are still open at the other end."""
        return tuple(self._pipes)

    def begin_cell(self, parent: Header) -> None:
        """Note which cell begins: one that dies at once may have told nobody yet that it runs."""
        with self._lock:
            self._ring.text("stdout", self._pack(parent), b"")

    def set_parent(self, name: str, parent: Header) -> None:
        """Say whose output it is that arrives on the pipe of stream `name` from now on."""
        self._parents[name] = parent

    def write(self, name: str, parent: Header, text: str) -> None:
        """Queue `text`; wait while the budget is used up. Raises UnicodeEncodeError for a lone surrogate."""
        data = text.encode()
        if self.forked:
            _write_all(_FILE_DESCRIPTORS[name], data)
            return
        if len(data) <= MESSAGE_SIZE:
            self._write(name, parent, text, data)
            return
        for piece in _pieces(text):
            self._write(name, parent, piece, piece.encode())

    def _write(self, name: str, parent: Header, text: str, data: bytes) -> None:
        if self._produced - self._consumed > BUDGET:
            self._wait_for_room(BUDGET)
        with self._lock:
            if self._waiting():
                self.drain()
            self._append(text, name, parent, data)
        urgency = _FLOOD if self._produced - self._consumed > MESSAGE_SIZE // 2 else _SOON
        if self._told < urgency:
            self._told = urgency
            self.notify(urgency == _FLOOD)

    def put(self, frames: list[Any]) -> None:
        """Queue a whole message; wait while the budget is used up twice: a flood of text must not delay its result.

        Raises TooLarge above MAX_MESSAGE.
        """
        size = sum(memoryview(frame).nbytes for frame in frames)
        if size > MAX_MESSAGE:
            raise TooLarge(
                f"an output of {size >> 20} MiB is too large to be shown, at most {MAX_MESSAGE >> 20} MiB are"
            )
        if self._produced - self._consumed > 2 * BUDGET:
            self._wait_for_room(2 * BUDGET)
        # a copy of what its owner may change before it has been sent
        kept = [frame if isinstance(frame, bytes) else memoryview(frame).tobytes() for frame in frames]
        with self._lock:
            self.drain()
            self._queue.append((kept, None, None, 0, size + _OVERHEAD))
            self._produced += size + _OVERHEAD

    def drain(self) -> int:
        """Queue what waits in the pipes, before anything written later, and return how many bytes it was."""
        taken = 0
        if not self._waiting():
            return 0
        with self._lock:
            for descriptor in tuple(self._pipes):
                try:
                    # all that a pipe can hold: whatever was in it when this began
                    data = os.read(descriptor, PIPE_SIZE)
                except BlockingIOError:
                    continue
                name = self._pipes[descriptor]
                if data:
                    self._append(data, name, self._parents[name], data)
                    taken += len(data)
                else:
                    del self._pipes[descriptor]
                    self._waiting = readable_test(self._pipes)
        return taken

    def finish_pipes(self) -> None:
        """Let a character that is still incomplete in a pipe's output show as U+FFFD (a cell has ended)."""
        with self._lock:
            self.drain()
            for name in self._decoders:
                self._queue.append((None, name, self._parents[name], 0, 0))

    def discard(self) -> None:
        """Forget all that waits (start-up's own output)."""
        with self._lock:
            self.drain()
            self._queue.clear()
            self._consumed = self._produced
            self._ring.clear()

    def forget(self) -> None:
        """Have nothing told after a death of what was printed so far (before a claim)."""
        with self._lock:
            self._ring.clear()

    def take(self) -> list[Any] | None:
        """Return the frames of the next message, or None. The publisher calls it, one thread at a time."""
        self._told = _NOTHING
        queue = self._queue
        while queue:
            frames, name, parent, _, size = queue[0]
            if name is None:
                queue.popleft()
                self._consumed += size
                return list(frames)
            pieces: list[str] = []
            total = position = 0
            while queue and total < MESSAGE_SIZE:
                data, other, its_parent, end, size = queue[0]
                if other != name or its_parent is not parent:
                    break
                queue.popleft()
                total += size
                position = end or position
                pieces.append(self._text(name, data))
            self._consumed += total
            text = "".join(pieces)
            if text:
                return self._stream_message(name, parent or {}, text, position)
        # nothing waits, so nothing is counted: heals a count that an interrupt tore
        with self._lock:
            if not queue:
                self._consumed = self._produced
        return None

    def _text(self, name: str, data: str | bytes | None) -> str:
        if isinstance(data, str):
            return data
        decoder = self._decoders[name]
        return decoder.decode(b"", final=True) if data is None else decoder.decode(data)

    def _stream_message(self, name: str, parent: Header, text: str, position: int) -> list[bytes]:
        session = self.session
        header = session.msg_header("stream")
        parts = [session.pack(header), self._pack(parent), b"{}", session.pack({"name": name, "text": text})]
        with self._lock:
            # before the message can reach anybody: what has arrived is never shown a second time
            self._ring.mark(position, header["msg_id"])
        return [b"stream." + name.encode(), DELIM, session.sign(parts), *parts]

    def _append(self, item: str | bytes, name: str, parent: Header, data: bytes) -> None:
        end = self._ring.text(name, self._pack(parent), data)
        self._queue.append((item, name, parent, end, len(data)))
        self._produced += len(data)

    def _pack(self, parent: Header) -> bytes:
        known = self._packed
        if known[0] is parent:
            return known[1]
        packed: bytes = self.session.pack(parent)
        self._packed = (parent, packed)
        return packed

    def _wait_for_room(self, limit: int) -> None:
        if not self.may_wait():
            return
        # a short sleep and not a condition variable: an interrupt gets out of it with every lock as it was
        while self.size > limit and not self.forked:
            self.notify(True)
            time.sleep(_WAIT)

    def _after_fork(self) -> None:
        # threads and sockets stayed with the parent: children print into the pipe, which the parent reads
        self.forked = True
        self._lock = threading.RLock()


def _pieces(text: str) -> Iterator[str]:
    step = MESSAGE_SIZE // 4  # a character has at most four bytes
    return (text[start : start + step] for start in range(0, len(text), step))


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
