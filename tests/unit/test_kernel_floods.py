"""Many outputs of one cell: complete and in order, bounded, and interruptible whoever else listens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq
from jupyter_client.session import Session
from samovar_kernel import publisher

from tests.unit.local_sandbox import KEY, LocalSandbox, Ran

PRINTS = "for n in range({}): print(n)"
WIDE = "for n in range({}): print(n, 'x' * 500)"
FLUSHED = "for n in range({}): print(n, flush=True)"
STREAMS = "import sys\nfor n in range({}): print(n, file=(sys.stdout, sys.stderr)[n % 2])"
DISPLAYS = "for n in range({}): display(n)"
BARE_DISPLAYS = """
from IPython.display import publish_display_data
for n in range({}): publish_display_data({{"text/plain": str(n)}})
"""
RESULTS = """
import sys
for n in range({}): sys.displayhook(n)
"""

ENDLESS = {
    "print": "n = 0\nwhile True: print(n, 'x' * 80); n += 1",
    "flush": "n = 0\nwhile True: print(n, 'x' * 80, flush=True); n += 1",
    "display": "n = 0\nwhile True: display(n); n += 1",
    "write": "import os\nwhile True: os.write(1, b'x' * 80 + b'\\n')",
}


def numbers(ran: Ran) -> list[int]:
    """What the cell's outputs say, whatever carried it, in the order of arrival."""
    texts = []
    for message in ran.messages:
        content = message["content"]
        texts.append(content["text"] if message["msg_type"] == "stream" else content["data"]["text/plain"] + "\n")
    return [int(line.split()[0]) for line in "".join(texts).split("\n") if line]


@pytest.mark.limit(60)
def test_5000_outputs_of_each_kind(short_directory: Path) -> None:
    with LocalSandbox(short_directory) as sandbox:
        sandbox.open()
        for code in (PRINTS, FLUSHED, STREAMS, DISPLAYS, BARE_DISPLAYS, RESULTS):
            ran = sandbox.finish_cell(sandbox.start_cell(code.format(5000)), timeout=40)
            assert ran.reply["status"] == "ok", code
            assert numbers(ran) == list(range(5000)), code


@pytest.mark.limit(60)
def test_200000_lines_and_20000_displays(short_directory: Path) -> None:
    with LocalSandbox(short_directory) as sandbox:
        sandbox.open()
        printed = sandbox.finish_cell(sandbox.start_cell(PRINTS.format(200_000)), timeout=60)
        assert numbers(printed) == list(range(200_000))
        assert len(printed.messages) < 1000, "neighbouring prints are one message"
        shown = sandbox.finish_cell(sandbox.start_cell(BARE_DISPLAYS.format(20_000)), timeout=60)
        assert numbers(shown) == list(range(20_000))


def subscriber(context: zmq.Context[Any], sandbox: LocalSandbox) -> zmq.Socket[Any]:
    """A subscriber that has been welcomed, and takes next to nothing before it is read."""
    socket = context.socket(zmq.SUB)
    socket.linger = 0
    socket.rcvhwm = 1
    socket.subscribe(b"")
    socket.connect(f"ipc://{sandbox.runtime}/k-2")
    session = Session(key=KEY)
    while session.recv(socket, 0)[1]["msg_type"] != "iopub_welcome":
        pass  # what others have asked for
    return socket


@contextmanager
def stalled(sandbox: LocalSandbox) -> Iterator[None]:
    """Beside the sandbox's own there is a subscriber that reads nothing."""
    with zmq.Context() as context, subscriber(context, sandbox):
        yield


@pytest.mark.parametrize("kind", ENDLESS)
def test_an_endless_cell_ends_beside_a_subscriber_that_has_stalled(short_directory: Path, kind: str) -> None:
    with LocalSandbox(short_directory) as sandbox:
        sandbox.open()
        with stalled(sandbox):
            cell = sandbox.start_cell(ENDLESS[kind])
            time.sleep(1.0)
            asked = time.monotonic()
            sandbox.request("signal", signum=2)
            ran = sandbox.finish_cell(cell)
            # far from what a subscriber that stalls may cost in mid-cell; on an idle machine it takes 0.1 s
            assert time.monotonic() - asked < publisher.STALL_LIMIT - 1
            assert ran.reply["ename"] == "KeyboardInterrupt"
            assert ran.messages[-1]["msg_type"] == "error"
            if kind != "write":
                shown = numbers(Ran({}, ran.messages[:-1]))
                assert shown[:-1] == list(range(len(shown) - 1)), "nothing before the last line is missing"
            assert sandbox.run("print('alive')").text() == "alive\n"


@pytest.mark.limit(60)
def test_who_stalls_alone_loses_nothing_and_beside_others_is_left_behind(short_directory: Path) -> None:
    with LocalSandbox(short_directory) as sandbox, zmq.Context() as context:
        sandbox.open()
        with stalled(sandbox):
            assert numbers(sandbox.run(WIDE.format(20_000))) == list(range(20_000))
        sandbox.sockets["iopub"].close()
        with subscriber(context, sandbox) as alone:
            sandbox.sockets["iopub"] = alone
            cell = sandbox.start_cell(WIDE.format(20_000))
            time.sleep(publisher.STALL_LIMIT + 1)
            assert numbers(sandbox.finish_cell(cell)) == list(range(20_000))


def test_each_subscriber_is_welcomed(short_directory: Path) -> None:
    with LocalSandbox(short_directory) as sandbox:
        sandbox.open()
        for _ in range(2):
            with stalled(sandbox):
                welcome = sandbox.receive("iopub", lambda message: message["msg_type"] == "iopub_welcome")
                assert welcome["content"] == {"subscription": ""}


def test_an_output_that_no_message_can_hold_is_an_error_of_the_cell(short_directory: Path) -> None:
    with LocalSandbox(short_directory) as sandbox:
        sandbox.open()
        ran = sandbox.run("from IPython.display import HTML\ndisplay(HTML('x' * (61 << 20)))")
        assert ran.reply["ename"] == "TooLarge"
        assert "an output of 61 MiB is too large" in ran.reply["evalue"]
        assert sandbox.run("print('alive')").text() == "alive\n"
