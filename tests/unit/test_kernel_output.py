"""The kernel's output buffer: order, bounds, encoding; then the same with a real kernel."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.session import Session
from samovar_kernel.output import BUDGET, MESSAGE_SIZE, OutputBuffer
from samovar_kernel.unsent import Ring, create_ring

from tests.unit.local_sandbox import LocalSandbox

PARENT = {"msg_id": "cell"}


class Buffer:
    """An OutputBuffer with pipes and a ring of its own, and what it would send."""

    def __init__(self) -> None:
        pipes = {"stdout": os.pipe(), "stderr": os.pipe()}
        ring = create_ring()
        self.ring = Ring(ring)
        self.descriptors = [*pipes["stdout"], *pipes["stderr"], ring]
        self.writers = {name: ends[1] for name, ends in pipes.items()}
        self.session = Session(key=b"key")
        self.output = OutputBuffer(self.session, {name: ends[0] for name, ends in pipes.items()}, self.ring)
        for name in pipes:
            self.output.set_parent(name, PARENT)

    def taken(self) -> list[tuple[str, Any]]:
        """Take all messages; return each as stream name and text, or ("frames", frames)."""
        found: list[tuple[str, Any]] = []
        while (frames := self.output.take()) is not None:
            if frames[0].startswith(b"stream."):
                content = json.loads(frames[-1])
                found.append((content["name"], content["text"]))
            else:
                found.append(("frames", frames))
        return found


@pytest.fixture
def buffer() -> Iterator[Buffer]:
    made = Buffer()
    yield made
    made.ring.close()
    for descriptor in made.descriptors:
        os.close(descriptor)


def test_everything_keeps_its_order(buffer: Buffer) -> None:
    output = buffer.output
    output.write("stdout", PARENT, "1")
    os.write(buffer.writers["stdout"], b"2")
    output.write("stdout", PARENT, "3")
    output.put([b"topic", b"4"])
    output.write("stderr", PARENT, "5")
    os.write(buffer.writers["stdout"], b"6")
    output.write("stderr", PARENT, "7")
    assert buffer.taken() == [
        ("stdout", "123"),
        ("frames", [b"topic", b"4"]),
        ("stderr", "5"),
        ("stdout", "6"),
        ("stderr", "7"),
    ]


def test_another_parent_is_another_message(buffer: Buffer) -> None:
    other = {"msg_id": "other"}
    buffer.output.write("stdout", PARENT, "a")
    buffer.output.write("stdout", other, "b")
    first, second = buffer.output.take(), buffer.output.take()
    assert first is not None and second is not None
    assert [json.loads(frames[4]) for frames in (first, second)] == [PARENT, other]


def test_signed_as_the_session_signs(buffer: Buffer) -> None:
    buffer.output.write("stdout", PARENT, "a")
    frames = buffer.output.take()
    assert frames is not None
    message = buffer.session.deserialize(buffer.session.feed_identities(frames)[1])
    assert message["msg_type"] == "stream"
    assert message["content"] == {"name": "stdout", "text": "a"}


def test_bytes_of_a_pipe(buffer: Buffer) -> None:
    for piece in (b"a\xff", "ä".encode()[:1], "ä".encode()[1:], b"\x00\x1b", "€".encode()[:2]):
        os.write(buffer.writers["stdout"], piece)
        buffer.output.drain()
    assert buffer.taken() == [("stdout", "a\ufffdä\x00\x1b")]
    buffer.output.finish_pipes()
    assert buffer.taken() == [("stdout", "\ufffd")]


def test_a_lone_surrogate_raises(buffer: Buffer) -> None:
    with pytest.raises(UnicodeEncodeError):
        buffer.output.write("stdout", PARENT, "x\ud800")
    assert buffer.taken() == []


def test_a_long_text_goes_out_in_pieces(buffer: Buffer) -> None:
    text = "äb" * 100_000
    buffer.output.write("stdout", PARENT, text)
    pieces = [piece for _, piece in buffer.taken()]
    assert "".join(pieces) == text
    assert all(len(piece.encode()) < 2 * MESSAGE_SIZE for piece in pieces)


def test_writers_wait_above_the_budget(buffer: Buffer) -> None:
    output = buffer.output

    def flood() -> None:
        for _ in range(100):
            output.write("stdout", PARENT, "x" * 50_000)

    writer = threading.Thread(target=flood)
    writer.start()
    total = 0
    while writer.is_alive() or not output.empty:
        assert output.size <= BUDGET + 2 * MESSAGE_SIZE
        total += sum(len(text) for _, text in buffer.taken())
        time.sleep(0.001)
    writer.join()
    assert total == 5_000_000
    assert output.size == 0


def test_who_may_not_wait_does_not(buffer: Buffer) -> None:
    buffer.output.may_wait = lambda: False
    for _ in range(30):
        buffer.output.write("stdout", PARENT, "x" * 50_000)
    assert buffer.output.size == 1_500_000


def test_told_once_and_again_for_a_flood(buffer: Buffer) -> None:
    told: list[bool] = []
    buffer.output.notify = told.append
    for _ in range(5):
        buffer.output.write("stdout", PARENT, "x")
    buffer.output.write("stdout", PARENT, "x" * MESSAGE_SIZE)
    assert told == [False, True]
    buffer.taken()
    buffer.output.write("stdout", PARENT, "x")
    assert told == [False, True, False]


def test_a_pipe_without_writers_is_given_up(buffer: Buffer) -> None:
    os.close(buffer.writers["stdout"])
    buffer.descriptors.remove(buffer.writers["stdout"])
    buffer.output.drain()
    assert len(buffer.output.pipes) == 1
    os.write(buffer.writers["stderr"], b"still")
    buffer.output.drain()
    assert buffer.taken() == [("stderr", "still")]


# --- with a real kernel -----------------------------------------------------------------------------------------------

MIXED = """
import os, subprocess, sys
for number in range(3):
    print("print", number)
    os.write(1, b"write \\xff\\n")
    subprocess.run(["echo", "child"])
    sys.stdout.buffer.write(b"bytes\\n")
"""

CHILDREN = """
import multiprocessing, os, threading
thread = threading.Thread(target=print, args=("thread",)); thread.start(); thread.join()
process = multiprocessing.get_context("fork").Process(target=print, args=("process",)); process.start(); process.join()
if os.fork() == 0:
    print("fork"); os._exit(0)
os.wait(); print("parent")
"""


def test_output_of_a_real_kernel(short_directory: Path) -> None:
    with LocalSandbox(short_directory) as sandbox:
        sandbox.open()
        mixed = "".join(f"print {number}\nwrite \ufffd\nchild\nbytes\n" for number in range(3))
        assert sandbox.run(MIXED).text() == mixed
        assert sandbox.run(CHILDREN).text() == "thread\nprocess\nfork\nparent\n"
        bash = sandbox.run("%%bash\necho out; echo err >&2")
        assert (bash.text(), bash.text("stderr")) == ("out\n", "err\n")
        assert sandbox.run("!echo shell").text().strip() == "shell"
        assert sandbox.run("print(chr(0xd800))").reply["ename"] == "UnicodeEncodeError"
        flood = sandbox.run("for i in range(20000): print('x' * 99)")
        assert flood.text() == ("x" * 99 + "\n") * 20000
        assert len(flood.messages) < 500


@pytest.mark.parametrize("code", ["print('x' * 1000)", "os.write(1, b'x' * 1000)", "display('x' * 1000)"])
def test_an_interrupt_gets_through_a_blocked_writer(short_directory: Path, code: str) -> None:
    with LocalSandbox(short_directory) as sandbox:
        sandbox.open()
        cell = sandbox.start_cell(f"import os\nwhile True: {code}")
        time.sleep(1.0)  # nobody reads iopub: the kernel's buffers are full by now
        asked = time.monotonic()
        assert sandbox.ask("control", "interrupt_request", {})["status"] == "ok"
        ran = sandbox.finish_cell(cell)
        assert ran.reply["ename"] == "KeyboardInterrupt"
        assert time.monotonic() - asked < 4
        assert sandbox.run("print('alive')").text() == "alive\n"


def test_an_awaiting_cell_is_interrupted(short_directory: Path) -> None:
    with LocalSandbox(short_directory) as sandbox:
        sandbox.open()
        cell = sandbox.start_cell("import asyncio\nprint('waiting')\nawait asyncio.sleep(60)")
        sandbox.receive("iopub", lambda message: message["msg_type"] == "stream")
        sandbox.request("signal", signum=2)
        assert sandbox.finish_cell(cell).reply["status"] == "error"
