"""StreamLimit: how much text one cell may write before the rest is left out, and how much that was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import msgspec

#: Cells that are counted at once; past it the oldest is counted from zero again.
MAX_CELLS = 1000


class Share(NamedTuple):
    """How many bytes of a piece of text are passed on, and whether the rest is the first that is left out."""

    passed: int
    cut_begins: bool


@dataclass
class _Written:
    passed: int = 0
    cut: int = 0


class StreamLimit:
    """Counts the stream text of each cell, by the id of its request. Pure."""

    def __init__(self, limit: int) -> None:
        """`limit`: bytes of one cell's stream messages."""
        self.limit = limit
        self._cells: dict[str, _Written] = {}

    def take(self, cell: str, size: int) -> Share:
        """Judge `size` bytes more of a cell. After the first that are left out all are: what is kept has no holes."""
        written = self._cells.get(cell)
        if written is None:
            while len(self._cells) >= MAX_CELLS:
                del self._cells[next(iter(self._cells))]
            written = self._cells[cell] = _Written()
        begun = written.cut > 0
        passed = 0 if begun else min(size, self.limit - written.passed)
        written.passed += passed
        written.cut += size - passed
        return Share(passed, written.cut > 0 and not begun)

    def end(self, cell: str) -> int:
        """A cell has ended: forget it, and return how many bytes of it were left out."""
        written = self._cells.pop(cell, None)
        return 0 if written is None else written.cut

    def clear(self) -> None:
        """Forget all cells."""
        self._cells.clear()


class _Stream(msgspec.Struct):
    name: str
    text: str


def beginning_of(content: bytes, size: int) -> bytes | None:
    """Return the content of a stream message with `size` bytes of its text at most; None where that is nothing."""
    try:
        stream = msgspec.json.decode(content, type=_Stream)
    except (ValueError, RecursionError):
        return None
    stream.text = stream.text.encode("utf-8", "replace")[:size].decode("utf-8", "ignore")
    return msgspec.json.encode(stream) if stream.text else None
