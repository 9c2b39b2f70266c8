"""OutputLog: a kernel's output messages, numbered. The newest are in memory, older ones on disk, the oldest gone."""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec

from gateway.output_budget import OutputBudget
from gateway.spill import SpillFile

#: Entries that share one fate, and what one read returns at most if its caller does not say otherwise.
CHUNK_BYTES = 256 * 1024
CHUNK_ENTRIES = 1024

#: What an entry costs in memory beside its bytes: the objects that hold them.
_ENTRY_BYTES = 250
_PART_BYTES = 40
#: Files of one log: of the oldest one all is given up at once.
_FILES = 16
_log = logging.getLogger(__name__)

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[tuple[str, bytes, tuple[bytes, ...]]]).decode


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One message as the kernel sent it: its `parts` are header, parent header, metadata, content and buffers."""

    number: int
    channel: str
    tag: bytes
    parts: tuple[bytes, ...]

    @property
    def size(self) -> int:
        """Bytes of its parts."""
        return sum(map(len, self.parts))


class Gap(msgspec.Struct, frozen=True):
    """Messages that the log no longer has: there was no room for them.

    `bytes` is an estimate where the gap begins in the middle of messages that went together.
    """

    first: int
    last: int
    bytes: int


@dataclass(eq=False)
class _File:
    spill: SpillFile
    used: int = 0
    chunks: list[_Chunk] = field(default_factory=list)


@dataclass(eq=False)
class _Chunk:
    """Entries that follow each other. Their messages are in memory, or in a file, or lost."""

    first: int
    count: int = 0
    #: bytes of the messages, and what they cost in memory
    size: int = 0
    cost: int = 0
    entries: list[Entry] | None = None
    file: _File | None = None
    offset: int = 0
    length: int = 0

    @property
    def last(self) -> int:
        return self.first + self.count - 1

    @property
    def lost(self) -> bool:
        return self.entries is None and self.file is None


class OutputLog:
    """Not thread-safe: it belongs to the loop that appends to it. Numbers begin at 1 and never come twice."""

    def __init__(self, directory: Path, *, memory_bytes: int, disk_bytes: int, budget: OutputBudget) -> None:
        """Logs that share `budget` share its bounds. Files have no names in `directory`, so nothing is left there.

        Half of `memory_bytes` is for what is kept, half for what waits to be written.
        """
        self._directory = directory
        self._memory_bytes = memory_bytes
        self._disk_bytes = disk_bytes
        self._budget = budget
        budget.holders.add(self)
        self.closed = False
        self.kept = 0
        self.queued = 0
        self.on_disk = 0
        #: messages that were lost, all in all
        self.lost = 0
        #: told when the disk falls behind, true, and when it has caught up; what comes meanwhile may be lost
        self.on_behind: Callable[[bool], None] | None = None
        self.behind = False
        self._last = 0
        #: together they hold every number from 1 to `last`, lost ones too; no two lost ones stand side by side
        self._chunks: list[_Chunk] = []
        self._open: _Chunk | None = None
        self._kept: deque[_Chunk] = deque()
        self._queue: deque[_Chunk] = deque()
        self._files: deque[_File] = deque()
        self._writer: asyncio.Task[None] | None = None
        self._waiters: set[asyncio.Future[None]] = set()
        self._broken = False

    @property
    def last(self) -> int:
        """The number of the newest entry; 0 where there was none yet."""
        return self._last

    def append(self, channel: str, parts: Sequence[bytes], tag: bytes = b"") -> int:
        """Take in one message and return its number. Never waits: where there is no room the oldest ones go."""
        self._last += 1
        if self.closed:
            return self._last
        entry = Entry(self._last, channel, tag, tuple(parts))
        size = entry.size
        cost = size + _ENTRY_BYTES + _PART_BYTES * len(entry.parts)
        chunk = self._open
        if chunk is None or chunk.size + size > CHUNK_BYTES:
            chunk = self._open = _Chunk(self._last, entries=[])
            self._chunks.append(chunk)
            self._kept.append(chunk)
        assert chunk.entries is not None
        chunk.entries.append(entry)
        chunk.count += 1
        chunk.size += size
        chunk.cost += cost
        if chunk.count >= CHUNK_ENTRIES:
            self._open = None
        self._keep(cost)
        if self.kept > self._memory_bytes // 2:
            # Some more at once: each way to another thread costs as much as the writing of a chunk.
            while self.kept > self._memory_bytes * 3 // 8:
                self.spill_oldest()
        self._budget.settle()
        self._wake()
        return self._last

    async def read(
        self, after: int, *, max_bytes: int = CHUNK_BYTES, max_entries: int = CHUNK_ENTRIES
    ) -> list[Entry | Gap]:
        """Return entries that follow number `after`, in order: one at least where there is one, else none.

        There may be more than are returned. Messages that were lost are told as one Gap, which comes alone.
        """
        while after < self._last and not self.closed:
            chunk = self._chunks[self._index(after + 1)]
            if chunk.lost:
                count = chunk.last - after
                return [Gap(after + 1, chunk.last, chunk.size * count // chunk.count)]
            entries = chunk.entries if chunk.entries is not None else await self._load(chunk)
            if entries is None:
                continue
            return _within(entries, after + 1 - chunk.first, max_bytes, max_entries)
        return []

    def size_after(self, after: int) -> int:
        """Return how many bytes of messages a `read` that begins there has in memory: one chunk's, or 0."""
        if after >= self._last or self.closed:
            return 0
        chunk = self._chunks[self._index(after + 1)]
        return 0 if chunk.lost else chunk.size

    async def wait(self, after: int) -> None:
        """Wait until there is an entry past number `after`, or the log is closed."""
        while self._last <= after and not self.closed:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)

    def close(self) -> None:
        """Give up all it holds; whoever waits stops waiting. May be called again."""
        if self.closed:
            return
        self.closed = True
        if self._writer is not None:
            self._writer.cancel()
        self._wake()
        self._keep(-self.kept)
        self._wait_for_disk(-self.queued)
        while self._files:
            self._drop(self._files.popleft())
        self._chunks.clear()
        self._kept.clear()
        self._queue.clear()
        self._open = None
        self._budget.holders.discard(self)

    def spill_oldest(self) -> bool:
        """Have the oldest chunk in memory written to disk; return whether there was one."""
        if not self._kept:
            return False
        chunk = self._kept[0]
        if chunk.cost > self._disk_bytes:
            self._lose(chunk)
            return True
        self._kept.popleft()
        if chunk is self._open:
            self._open = None
        self._keep(-chunk.cost)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.get_running_loop().create_task(self._write(chunk))
            return True
        self._queue.append(chunk)
        self._wait_for_disk(chunk.cost)
        while self.queued > self._memory_bytes // 2 and len(self._queue) > 1:
            self.lose_oldest_queued()
        return True

    def lose_oldest_queued(self) -> bool:
        """The disk is too slow: lose the oldest chunk that waits for it; return whether there was one."""
        if not self._queue:
            return False
        self._lose(self._queue[0])
        return True

    def lose_oldest_file(self) -> bool:
        """Lose the oldest that is on disk; return whether there was anything."""
        if not self._files:
            return False
        file = self._files.popleft()
        self._drop(file)
        for chunk in file.chunks:
            chunk.file = None
            self._lose(chunk)
        return True

    async def _write(self, chunk: _Chunk) -> None:
        """Write this chunk and then what waits, as much at once as one file takes: the disk sets the pace."""
        await self._store([chunk])
        while self._queue:
            batch: list[_Chunk] = []
            cost = 0
            while self._queue and (not batch or cost + self._queue[0].cost <= self._disk_bytes // _FILES):
                chunk = self._queue.popleft()
                self._wait_for_disk(-chunk.cost)
                cost += chunk.cost
                batch.append(chunk)
            await self._store(batch)

    async def _store(self, batch: list[_Chunk]) -> None:
        # An entry costs more in memory than it takes on disk: that much room is made, and the rest given back.
        room = sum(chunk.cost for chunk in batch)
        file = self._file_for(room)
        start = file.used
        file.used += room
        self._use_disk(room)
        self._budget.settle()
        contents = [chunk.entries for chunk in batch if chunk.entries is not None]
        lengths: list[int] | None
        try:
            lengths = await self._budget.run(partial(_written, file.spill, start, contents))
            self._broken = False
        except OSError as error:
            self._tell(error)
            lengths = None
        if lengths is None or file not in self._files:
            # In the second case its room was needed for something newer meanwhile.
            for chunk in batch:
                self._lose(chunk)
            return
        for chunk, length in zip(batch, lengths, strict=True):
            chunk.offset, chunk.length = start, length
            chunk.file, chunk.entries = file, None
            file.chunks.append(chunk)
            start += length
        self._use_disk(start - file.used)
        file.used = start

    def _file_for(self, length: int) -> _File:
        while self._files and self.on_disk + length > self._disk_bytes:
            self.lose_oldest_file()
        if not self._files or self._files[-1].used + length > self._disk_bytes // _FILES:
            self._files.append(_File(SpillFile(self._directory)))
        return self._files[-1]

    async def _load(self, chunk: _Chunk) -> list[Entry] | None:
        """Return a chunk's entries from its file, or None where it has been lost meanwhile."""
        file = chunk.file
        assert file is not None
        try:
            return await self._budget.run(partial(_unpacked, file.spill, chunk.offset, chunk.length, chunk.first))
        except (OSError, msgspec.DecodeError) as error:
            self._tell(error)
            if chunk.file is not None:
                file.chunks.remove(chunk)
                chunk.file = None
                self._lose(chunk)
            return None

    def _lose(self, chunk: _Chunk) -> None:
        """Give up a chunk that is not in a file, wherever it is, and join it with lost ones beside it."""
        if chunk in self._kept:
            self._kept.remove(chunk)
            self._keep(-chunk.cost)
        elif chunk in self._queue:
            self._queue.remove(chunk)
            self._wait_for_disk(-chunk.cost)
        if chunk is self._open:
            self._open = None
        at = self._index(chunk.first)
        if self._chunks[at] is not chunk:
            return
        self.lost += chunk.count
        chunk.entries = None
        for neighbour in (at, at - 1):
            if neighbour < 0 or neighbour + 1 >= len(self._chunks):
                continue
            left, right = self._chunks[neighbour : neighbour + 2]
            if left.lost and right.lost:
                left.count += right.count
                left.size += right.size
                del self._chunks[neighbour + 1]

    def _index(self, number: int) -> int:
        """Where the chunk stands that has this number."""
        return bisect_right(self._chunks, number, key=lambda chunk: chunk.first) - 1

    def _drop(self, file: _File) -> None:
        self._use_disk(-file.used)
        self._budget.submit(file.spill.close)

    def _keep(self, count: int) -> None:
        self.kept += count
        self._budget.kept += count

    def _wait_for_disk(self, count: int) -> None:
        self.queued += count
        self._budget.queued += count
        behind = self.queued > self._memory_bytes // (8 if self.behind else 4)
        if behind != self.behind:
            self.behind = behind
            if self.on_behind is not None:
                self.on_behind(behind)

    def _use_disk(self, count: int) -> None:
        self.on_disk += count
        self._budget.on_disk += count

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _tell(self, error: Exception) -> None:
        """Say once in a row that the disk does not take or give what it should."""
        if not self._broken:
            self._broken = True
            _log.warning("output of a kernel was lost: its log in %s cannot be kept: %s", self._directory, error)


def _within(entries: list[Entry], start: int, max_bytes: int, max_entries: int) -> list[Entry | Gap]:
    taken: list[Entry | Gap] = []
    size = 0
    for entry in entries[start : start + max_entries]:
        size += entry.size
        if taken and size > max_bytes:
            break
        taken.append(entry)
    return taken


def _written(spill: SpillFile, offset: int, contents: Sequence[list[Entry]]) -> list[int]:
    """Write lists of entries behind each other; return how many bytes each took."""
    packed = [_encode([(entry.channel, entry.tag, entry.parts) for entry in entries]) for entries in contents]
    spill.write(offset, b"".join(packed))
    return [len(data) for data in packed]


def _unpacked(spill: SpillFile, offset: int, length: int, first: int) -> list[Entry] | None:
    data = spill.read(offset, length)
    if data is None:
        return None
    return [Entry(number, *fields) for number, fields in enumerate(_decode(data), first)]
