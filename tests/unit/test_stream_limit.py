"""The limit on a cell's text: what is passed on is a beginning without holes, and what is cut is told to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway.channel_bounds import ChannelBounds
from gateway.channels import KernelChannels
from gateway.output_budget import OutputBudget
from gateway.output_log import Entry, OutputLog
from gateway.stream_limit import MAX_CELLS, Share, StreamLimit, beginning_of
from kernelprovisioner.wire import Message

KERNEL = "kernel-session"


@given(st.integers(0, 50), st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 40)), max_size=40))
def test_each_cell_gets_a_beginning_of_its_text(limit: int, pieces: list[tuple[str, int]]) -> None:
    judge = StreamLimit(limit)
    shares: dict[str, list[tuple[int, Share]]] = {"a": [], "b": [], "c": []}
    for cell, size in pieces:
        shares[cell].append((size, judge.take(cell, size)))
    for cell, taken in shares.items():
        total = sum(size for size, _ in taken)
        assert sum(share.passed for _, share in taken) == min(total, limit)
        holes = [share.passed < size for size, share in taken]
        assert holes == sorted(holes)
        assert [share.cut_begins for _, share in taken].count(True) == (total > limit)
        assert judge.end(cell) == max(0, total - limit)
        assert judge.end(cell) == 0
        assert judge.take(cell, 1).passed == min(1, limit)


def test_the_number_of_cells_is_bounded() -> None:
    judge = StreamLimit(10)
    judge.take("first", 11)
    for number in range(MAX_CELLS):
        judge.take(str(number), 11)
    assert judge.take("first", 11) == Share(10, True)
    assert judge.take(str(MAX_CELLS - 1), 11) == Share(0, False)


@given(st.text(), st.integers(0, 40))
def test_a_text_is_cut_between_its_characters(text: str, size: int) -> None:
    cut = beginning_of(json.dumps({"name": "stderr", "text": text}).encode(), size)
    if cut is None:
        assert len(text[:1].encode()) > size or not text
        return
    content = json.loads(cut)
    assert content["name"] == "stderr"
    assert text.startswith(content["text"])
    assert size - 4 < len(content["text"].encode()) <= size or content["text"] == text


def test_what_is_no_stream_has_no_beginning() -> None:
    for content in (b"", b"[]", b'{"name":"stdout"}', b'{"name":"stdout","text":1}', b"[" * 200_000):
        assert beginning_of(content, 100) is None


# --- what a notebook shows of it --------------------------------------------------------------------------------------


class Wire:
    """What channels ask of a sandbox's wire."""

    session = "of the gateway"
    peer_session = KERNEL
    on_any: Any = None

    def hold(self, channel: str, hold: bool) -> None:
        assert (channel, hold) == ("iopub", False)


class Sandbox:
    """What channels ask of a sandbox."""

    def __init__(self) -> None:
        self.wire = Wire()


def said(channel: KernelChannels, wire: Wire, msg_type: str, parent: str, **content: Any) -> None:
    """Have the kernel say something."""
    header = {"msg_id": f"{msg_type} of {parent}", "msg_type": msg_type, "session": KERNEL}
    asked = {"msg_id": parent, "msg_type": "execute_request", "session": "client"}
    parts = [json.dumps(part).encode() for part in (header, asked, {}, content)]
    wire.on_any(Message("iopub", parts, header, asked))


def shown(entries: list[Any], cell: str) -> tuple[str, str]:
    """What a cell shows on stdout and on stderr."""
    text = {"stdout": "", "stderr": ""}
    for entry in entries:
        assert isinstance(entry, Entry)
        content = json.loads(entry.parts[3])
        if json.loads(entry.parts[1]).get("msg_id") == cell and "text" in content:
            text[content["name"]] += content["text"]
    return text["stdout"], text["stderr"]


async def test_a_runaway_cell_is_cut_and_its_notebook_says_how_much(tmp_path: Path) -> None:
    budget = OutputBudget(memory_bytes=2**26, disk_bytes=2**26)
    log = OutputLog(tmp_path, memory_bytes=2**24, disk_bytes=2**24, budget=budget)
    channels, sandbox = KernelChannels(log, ChannelBounds(cell_stream=2**20)), Sandbox()
    try:
        channels.attach(sandbox)  # type: ignore[arg-type]
        lines = [f"{number:099}\n" for number in range(50_000)]
        said(channels, sandbox.wire, "status", "flood", execution_state="busy")
        for start in range(0, len(lines), 1000):
            said(channels, sandbox.wire, "stream", "flood", name="stdout", text="".join(lines[start : start + 1000]))
        said(channels, sandbox.wire, "stream", "quiet", name="stdout", text="not cut")
        said(channels, sandbox.wire, "display_data", "flood", data={"text/plain": "shown"}, metadata={})
        said(channels, sandbox.wire, "status", "flood", execution_state="idle")
        entries = await log.read(0, max_bytes=2**24)
        while entries[-1].number < log.last:  # type: ignore[union-attr]
            entries += await log.read(entries[-1].number, max_bytes=2**24)  # type: ignore[union-attr]
        stdout, stderr = shown(entries, "flood")
        assert "".join(lines).startswith(stdout)
        assert 0.9 * 2**20 < len(stdout) <= 2**20
        first, last = stderr.splitlines()
        assert "has printed 1 MiB of text, the limit" in first
        # Line breaks are two bytes in JSON: a hundredth more than the text itself.
        assert last == "[samovar: 3.8 MiB of text of this cell were cut]"
        assert shown(entries, "quiet") == ("not cut", "")
        kinds = [json.loads(entry.parts[0])["msg_type"] for entry in entries if isinstance(entry, Entry)]
        assert kinds[-3:] == ["display_data", "stream", "status"]
    finally:
        await channels.close(4410, "the test is over")
        budget.close()


async def test_a_death_in_a_runaway_cell_says_how_much_was_cut(tmp_path: Path) -> None:
    budget = OutputBudget(memory_bytes=2**26, disk_bytes=2**26)
    log = OutputLog(tmp_path, memory_bytes=2**24, disk_bytes=2**24, budget=budget)
    channels, sandbox = KernelChannels(log, ChannelBounds(cell_stream=1000)), Sandbox()
    try:
        channels.attach(sandbox)  # type: ignore[arg-type]
        said(channels, sandbox.wire, "status", "flood", execution_state="busy")
        said(channels, sandbox.wire, "stream", "flood", name="stdout", text="x" * 3 * 2**20)
        channels.tell_death("It was killed.", "KernelDied", traceback=[])
        stdout, stderr = shown(await log.read(0), "flood")
        assert stdout == "x" * 1000
        assert [line for line in stderr.splitlines() if "cut" in line] == [
            "[samovar: this cell has printed 0.000954 MiB of text, the limit: what it prints from here on is cut]",
            "[samovar: 3.0 MiB of text of this cell were cut]",
        ]
        assert stderr.endswith("It was killed.\n")
    finally:
        await channels.close(4410, "the test is over")
        budget.close()
