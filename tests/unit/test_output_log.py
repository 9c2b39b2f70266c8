"""The output log against a plain list: what it still has it gives back in order, what it has not it counts."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.output_budget import OutputBudget
from gateway.output_log import CHUNK_BYTES, Entry, Gap, OutputLog
from gateway.spill import SpillFile

MIB = 1024 * 1024
PLENTY = 64 * MIB


@contextmanager
def a_log(directory: Path, *, memory_bytes: int = PLENTY, disk_bytes: int = PLENTY) -> Iterator[OutputLog]:
    budget = OutputBudget(memory_bytes=4 * memory_bytes, disk_bytes=4 * disk_bytes)
    try:
        yield OutputLog(directory, memory_bytes=memory_bytes, disk_bytes=disk_bytes, budget=budget)
    finally:
        budget.close()


async def read_all(log: OutputLog, after: int = 0, **bounds: int) -> list[Entry | Gap]:
    read: list[Entry | Gap] = []
    while items := await log.read(after, **bounds):
        read += items
        after = items[-1].number if isinstance(items[-1], Entry) else items[-1].last
    return read


async def written(log: OutputLog) -> None:
    """Wait until all that was to go to the disk is there."""
    async with asyncio.timeout(20):
        while log.queued or (log._writer is not None and not log._writer.done()):  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def fill(log: OutputLog, count: int, size: int = 1000) -> None:
    """Append messages, no faster than the disk takes them."""
    for _ in range(count):
        log.append("iopub", text_of(log.last + 1, size))
        if log.queued:
            await written(log)
    await written(log)


def text_of(number: int, size: int = 0) -> list[bytes]:
    return [b"%d" % number, b"{}", b"{}", b"x" * size]


def numbers(items: list[Entry | Gap]) -> list[int]:
    return [item.number if isinstance(item, Entry) else -1 for item in items]


def check(items: list[Entry | Gap], after: int, appended: list[tuple[str, bytes, list[bytes]]]) -> None:
    """`items` follow number `after`, each is what was appended under its number, and a gap says how much it hides."""
    for item in items:
        if isinstance(item, Gap):
            assert item.first == after + 1
            assert item.first <= item.last <= len(appended)
            assert item.bytes <= sum(sum(map(len, parts)) for _, _, parts in appended)
            after = item.last
            continue
        after += 1
        assert item.number == after
        assert (item.channel, item.tag, list(item.parts)) == appended[after - 1]


#: bytes; far below a chunk's, so that a few dozen messages meet every bound
MEMORY, SHARED_MEMORY, DISK, SHARED_DISK, LARGEST = 20_000, 30_000, 30_000, 50_000, 6000


class LogMachine(RuleBasedStateMachine):
    """Two logs of small bounds that share a budget, against the lists of what was appended to them."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = Path(tempfile.mkdtemp())
        self.budget = OutputBudget(memory_bytes=SHARED_MEMORY, disk_bytes=SHARED_DISK)
        self.logs = [
            OutputLog(self.directory, memory_bytes=MEMORY, disk_bytes=disk, budget=self.budget)
            for disk in (DISK, 2 * DISK)
        ]
        self.appended: list[list[tuple[str, bytes, list[bytes]]]] = [[], []]
        self.cursors = [0, 0]

    def do(self, call: Callable[[], Awaitable[Any]]) -> Any:
        async def bounded() -> Any:
            async with asyncio.timeout(20):
                return await call()

        return self.runner.run(bounded())

    @rule(
        which=st.integers(0, 1),
        count=st.integers(1, 40),
        size=st.sampled_from([0, 100, 1000, LARGEST]),
        tag=st.binary(max_size=3),
        buffers=st.lists(st.binary(max_size=20), max_size=2),
    )
    def append(self, which: int, count: int, size: int, tag: bytes, buffers: list[bytes]) -> None:
        async def all_of_it() -> None:
            for _ in range(count):
                number = len(self.appended[which]) + 1
                parts = [*text_of(number, size), *buffers]
                self.appended[which].append(("iopub", tag, parts))
                assert self.logs[which].append("iopub", parts, tag) == number

        self.do(all_of_it)

    @rule(which=st.integers(0, 1))
    def let_it_write(self, which: int) -> None:
        self.do(lambda: written(self.logs[which]))

    @rule(which=st.integers(0, 1), max_bytes=st.integers(1, 20_000), max_entries=st.integers(1, 50))
    def read_on(self, which: int, max_bytes: int, max_entries: int) -> None:
        items = self.do(
            lambda: self.logs[which].read(self.cursors[which], max_bytes=max_bytes, max_entries=max_entries)
        )
        assert bool(items) == (self.cursors[which] < len(self.appended[which]))
        assert len(items) <= max_entries
        assert len(items) == 1 or sum(item.size for item in items) <= max_bytes
        check(items, self.cursors[which], self.appended[which])
        if items:
            self.cursors[which] = items[-1].number if isinstance(items[-1], Entry) else items[-1].last

    @rule(which=st.integers(0, 1), data=st.data())
    def read_from_anywhere(self, which: int, data: Any) -> None:
        after = data.draw(st.integers(0, len(self.appended[which])))
        items = self.do(lambda: read_all(self.logs[which], after))
        check(items, after, self.appended[which])
        last = after
        if items:
            last = items[-1].number if isinstance(items[-1], Entry) else items[-1].last
        assert last == len(self.appended[which])

    @precondition(lambda self: all(not log.closed for log in self.logs))
    @rule()
    def nothing_waits_for_nothing(self) -> None:
        """A wait ends at once where there is more, and else with the next message."""
        log = self.logs[0]
        if log.last:
            self.do(lambda: log.wait(log.last - 1))

        async def one_more() -> None:
            waiting = asyncio.create_task(log.wait(log.last))
            await asyncio.sleep(0)
            assert not waiting.done()
            self.appended[0].append(("shell", b"", text_of(0)))
            log.append("shell", text_of(0))
            await waiting

        self.do(one_more)

    @invariant()
    def bounds_hold(self) -> None:
        for log, appended in zip(self.logs, self.appended, strict=True):
            assert log.last == len(appended)
            assert log.kept <= MEMORY // 2
            assert log.queued <= MEMORY // 2 + MEMORY
        assert self.budget.kept == sum(log.kept for log in self.logs) <= SHARED_MEMORY // 2
        assert self.budget.queued == sum(log.queued for log in self.logs) <= SHARED_MEMORY // 2
        assert self.budget.on_disk == sum(log.on_disk for log in self.logs) <= SHARED_DISK
        assert all(log.on_disk <= disk for log, disk in zip(self.logs, (DISK, 2 * DISK), strict=True))

    @rule(which=st.integers(0, 1))
    def what_was_lost_is_counted(self, which: int) -> None:
        log = self.logs[which]
        self.do(lambda: written(log))
        items = self.do(lambda: read_all(log))
        gaps = [item for item in items if isinstance(item, Gap)]
        assert sum(gap.last - gap.first + 1 for gap in gaps) == log.lost
        assert sum(gap.bytes for gap in gaps) + sum(item.size for item in items if isinstance(item, Entry)) == sum(
            sum(map(len, parts)) for _, _, parts in self.appended[which]
        )
        assert not any(isinstance(a, Gap) and isinstance(b, Gap) for a, b in pairwise(items))

    def teardown(self) -> None:
        self.budget.close()
        assert (self.budget.kept, self.budget.queued, self.budget.on_disk) == (0, 0, 0)
        self.runner.close()
        self.directory.rmdir()


LogMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestLogMachine = pytest.mark.limit(120)(LogMachine.TestCase)


async def test_nothing_is_lost_while_the_disk_keeps_up(tmp_path: Path) -> None:
    with a_log(tmp_path, memory_bytes=MIB) as log:
        await fill(log, 20_000)
        assert log.on_disk > 15 * MIB
        assert numbers(await read_all(log)) == list(range(1, 20_001))
        assert numbers(await read_all(log, 12_345, max_bytes=5000)) == list(range(12_346, 20_001))
        assert log.lost == 0


async def test_a_message_of_more_than_the_memory_goes_by_the_disk(tmp_path: Path) -> None:
    with a_log(tmp_path, memory_bytes=MIB) as log:
        for number in (1, 2):
            log.append("iopub", text_of(number, 3 * MIB // 2))
        assert log.kept == 0
        first, second = await read_all(log)
        assert isinstance(first, Entry) and isinstance(second, Entry)
        assert (first.size, second.size) == (3 * MIB // 2 + 5, 3 * MIB // 2 + 5)
        await written(log)
        assert await read_all(log) == [first, second]


async def test_without_room_on_the_disk_the_oldest_go_and_are_told(tmp_path: Path) -> None:
    with a_log(tmp_path, memory_bytes=100_000, disk_bytes=0) as log:
        for number in range(1, 1001):
            log.append("iopub", text_of(number, 1000))
        gap, *rest = await read_all(log)
        assert isinstance(gap, Gap)
        assert gap.first == 1
        assert gap.last == log.lost > 900
        assert gap.bytes == sum(len(str(number)) + 4 + 1000 for number in range(1, gap.last + 1))
        assert numbers(rest) == list(range(gap.last + 1, 1001))
        (later,) = await log.read(gap.last - 10)
        assert isinstance(later, Gap)
        assert (later.first, later.last) == (gap.last - 9, gap.last)
        assert later.bytes == pytest.approx(10_000, rel=0.05)


async def test_a_full_disk_loses_output_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = True
    write = SpillFile.write

    def fails(self: SpillFile, offset: int, data: bytes) -> None:
        if full:
            raise OSError(28, "No space left on device")
        write(self, offset, data)

    monkeypatch.setattr(SpillFile, "write", fails)
    with a_log(tmp_path, memory_bytes=10_000) as log:
        await fill(log, 100)
        full = False
        await fill(log, 100)
        gap, *rest = await read_all(log)
        assert isinstance(gap, Gap)
        assert 90 < gap.last == log.lost <= 100
        assert numbers(rest) == list(range(gap.last + 1, 201))
    assert [record.getMessage() for record in caplog.records if "No space left" in record.getMessage()] == [
        f"output of a kernel was lost: its log in {tmp_path} cannot be kept: [Errno 28] No space left on device"
    ]


async def test_a_slow_disk_loses_the_oldest_and_memory_stays_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = SpillFile.write
    stuck = threading.Event()

    def waits(self: SpillFile, offset: int, data: bytes) -> None:
        assert stuck.wait(20)
        write(self, offset, data)

    monkeypatch.setattr(SpillFile, "write", waits)
    with a_log(tmp_path, memory_bytes=MIB) as log:
        try:
            for number in range(1, 101):
                log.append("iopub", text_of(number, 100_000))
                await asyncio.sleep(0)
                assert log.kept + log.queued <= MIB
        finally:
            stuck.set()
        await written(log)
        items = await read_all(log)
        assert any(isinstance(item, Gap) for item in items)
        assert log.lost > 80
        check(items, 0, [("iopub", b"", text_of(number, 100_000)) for number in range(1, 101)])


async def test_who_waits_while_the_disk_is_behind_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = SpillFile.write

    def slowly(self: SpillFile, offset: int, data: bytes) -> None:
        time.sleep(0.02)
        write(self, offset, data)

    monkeypatch.setattr(SpillFile, "write", slowly)
    told: list[bool] = []
    may_go_on = asyncio.Event()
    may_go_on.set()

    def behind(is_so: bool) -> None:
        told.append(is_so)
        (may_go_on.clear if is_so else may_go_on.set)()

    with a_log(tmp_path, memory_bytes=4 * MIB) as log:
        log.on_behind = behind
        for number in range(1, 301):
            await may_go_on.wait()
            log.append("iopub", text_of(number, 100_000))
        await written(log)
        assert log.lost == 0
        assert numbers(await read_all(log)) == list(range(1, 301))
    assert told == [True, False] * (len(told) // 2)
    assert told


async def test_one_kernels_flood_costs_no_other_its_log(tmp_path: Path) -> None:
    budget = OutputBudget(memory_bytes=400_000, disk_bytes=400_000)
    try:
        quiet, loud = [OutputLog(tmp_path, memory_bytes=10 * MIB, disk_bytes=10 * MIB, budget=budget) for _ in range(2)]
        for number in range(1, 51):
            quiet.append("iopub", text_of(number, 1000))
        for number in range(1, 5001):
            loud.append("iopub", text_of(number, 1000))
            await asyncio.sleep(0)
        await written(loud)
        assert numbers(await read_all(quiet)) == list(range(1, 51))
        assert loud.lost > 3000
    finally:
        budget.close()


async def test_what_a_reader_was_about_to_read_may_be_dropped_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = SpillFile.read
    dropped = threading.Event()

    def is_late(self: SpillFile, offset: int, size: int) -> bytes | None:
        assert dropped.wait(20)
        self.close()
        return read(self, offset, size)

    monkeypatch.setattr(SpillFile, "read", is_late)
    with a_log(tmp_path, memory_bytes=10_000) as log:
        await fill(log, 100)
        reading = asyncio.create_task(log.read(0))
        await asyncio.sleep(0)
        assert log.lose_oldest_file()
        dropped.set()
        (gap,) = await reading
        assert isinstance(gap, Gap)
        assert numbers(await read_all(log, gap.last)) == list(range(gap.last + 1, 101))


async def test_closing_ends_every_wait_and_gives_everything_back(tmp_path: Path) -> None:
    open_files = len(os.listdir("/proc/self/fd"))
    budget = OutputBudget(memory_bytes=PLENTY, disk_bytes=PLENTY)
    log = OutputLog(tmp_path, memory_bytes=10_000, disk_bytes=MIB, budget=budget)
    await fill(log, 400)
    assert len(os.listdir("/proc/self/fd")) > open_files
    waits = [asyncio.create_task(log.wait(log.last)) for _ in range(3)]
    reading = asyncio.create_task(log.read(0))
    await asyncio.sleep(0)
    log.close()
    log.close()
    async with asyncio.timeout(5):
        await asyncio.gather(*waits)
        await reading
    assert await log.read(0) == []
    assert (budget.kept, budget.queued, budget.on_disk) == (0, 0, 0)
    budget.close()
    async with asyncio.timeout(5):
        while len(os.listdir("/proc/self/fd")) > open_files:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_reading_the_newest_never_leaves_the_loop(tmp_path: Path) -> None:
    """A live websocket's read costs no thread and no turn of the loop."""
    with a_log(tmp_path) as log:
        log.append("shell", text_of(1, CHUNK_BYTES))
        log.append("shell", text_of(2), b"tag")
        read = log.read(1)
        with pytest.raises(StopIteration) as done:
            read.send(None)
        assert done.value.value == [Entry(2, "shell", b"tag", tuple(text_of(2)))]
