"""What a stock ipykernel answers, ours answers: the same requests to both, and the same replies and outputs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_core.utils import ensure_event_loop

from tests.unit.local_sandbox import KEY, LocalSandbox

#: what differs between any two kernels: process, paths, numbers of measurements, random ids
VOLATILE = {"pid", "engine_uuid", "kernel_cpu", "kernel_memory", "host_virtual_memory", "subshell_id"}
#: left out where nothing was measured yet
SOMETIMES = {"host_cpu_percent"}

PORTS = {"shell_port": 1, "iopub_port": 2, "stdin_port": 3, "control_port": 4, "hb_port": 5}

SETUP = "def greet(name):\n    '''Say hello.'''\n    return f'hello {name}'\n\nvalue = 6 * 7\nvalue"

SHELL: list[tuple[str, str, dict[str, Any]]] = [
    ("what it is", "kernel_info_request", {}),
    ("complete", "is_complete_request", {"code": "x = 1"}),
    ("incomplete", "is_complete_request", {"code": "for n in range(3):\n    print(n)"}),
    ("invalid", "is_complete_request", {"code": "x ==== 1"}),
    ("a name", "complete_request", {"code": "gre", "cursor_pos": 3}),
    ("an attribute", "complete_request", {"code": "value.bit_le", "cursor_pos": 12}),
    ("a magic", "complete_request", {"code": "%tim", "cursor_pos": 4}),
    ("nothing to complete", "complete_request", {"code": "zzzzz", "cursor_pos": 5}),
    ("found", "inspect_request", {"code": "greet", "cursor_pos": 5, "detail_level": 0}),
    ("found with source", "inspect_request", {"code": "value", "cursor_pos": 5, "detail_level": 1}),
    ("not found", "inspect_request", {"code": "zzzzz", "cursor_pos": 5, "detail_level": 0}),
    ("tail", "history_request", {"hist_access_type": "tail", "n": 10, "output": False, "raw": True}),
    ("short tail", "history_request", {"hist_access_type": "tail", "n": 1, "output": False, "raw": True}),
    ("search", "history_request", {"hist_access_type": "search", "pattern": "*val*", "output": False, "raw": True}),
    ("no search", "history_request", {"hist_access_type": "search", "pattern": "val", "output": False, "raw": True}),
    (
        "unique",
        "history_request",
        {"hist_access_type": "search", "pattern": "value*", "output": False, "raw": True, "unique": True, "n": 5},
    ),
    (
        "range",
        "history_request",
        {"hist_access_type": "range", "session": 0, "start": 1, "stop": 3, "output": True, "raw": True},
    ),
    ("comms", "comm_info_request", {}),
    ("where it listens", "connect_request", {}),
    ("result", "execute_request", {"code": "greet('you')"}),
    ("silent", "execute_request", {"code": "value = 43", "silent": True}),
    ("not stored", "execute_request", {"code": "value", "store_history": False}),
    (
        "expressions",
        "execute_request",
        {"code": "1", "user_expressions": {"a": "value + 1", "b": "1 / 0", "c": "'ä\\ud800'"}},
    ),
    ("error", "execute_request", {"code": "1 / 0"}),
    ("not Python", "execute_request", {"code": "1 +"}),
    ("pager", "execute_request", {"code": "greet?"}),
    ("no such magic", "execute_request", {"code": "%zzzzz"}),
    ("next input", "execute_request", {"code": "get_ipython().set_next_input('x')"}),
    ("rich", "execute_request", {"code": "from IPython.display import HTML, display; display(HTML('<b>ä</b>'), 1)"}),
    (
        "update",
        "execute_request",
        {"code": "h = display(1, display_id='here'); h.update(2); from IPython.display import clear_output as c; c()"},
    ),
    ("both streams", "execute_request", {"code": "import sys; print('o', flush=True); print('e', file=sys.stderr)"}),
    ("stdin refused", "execute_request", {"code": "input('?')", "allow_stdin": False}),
    ("system exit", "execute_request", {"code": "raise SystemExit(3)"}),
    ("awaited", "execute_request", {"code": "import asyncio; await asyncio.sleep(0); 'awaited'"}),
    ("empty", "execute_request", {"code": ""}),
    ("unknown", "nonsense_request", {}),
]  # fmt: skip

CONTROL: list[tuple[str, str, dict[str, Any]]] = [
    ("what it is", "kernel_info_request", {}),
    ("usage", "usage_request", {}),
    ("a new subshell", "create_subshell_request", {}),
    ("none of these", "delete_subshell_request", {"subshell_id": "none"}),
    ("debugger", "debug_request", {"type": "request", "seq": 1, "command": "debugInfo", "arguments": {}}),
    ("not started", "debug_request", {"type": "request", "seq": 2, "command": "threads", "arguments": {}}),
    ("interrupt of nothing", "interrupt_request", {}),
]  # fmt: skip


#: The first completion reads a good part of the standard library.
PATIENCE = 50.0

pytestmark = pytest.mark.limit(120)


@contextmanager
def connected(prefix: Path) -> Iterator[BlockingKernelClient]:
    """A client of the kernel whose sockets are `<prefix>-1` to `<prefix>-5`."""
    client = BlockingKernelClient()
    client.load_connection_info({"transport": "ipc", "ip": str(prefix), "key": KEY.decode(), **PORTS})
    client.start_channels(hb=False)
    try:
        client.wait_for_ready(timeout=15)
        yield client
    finally:
        client.stop_channels()


@pytest.fixture(scope="module")
def clients() -> Iterator[tuple[BlockingKernelClient, BlockingKernelClient]]:
    """A stock kernel's client and a sandbox's, after the same first cell."""
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as name:
        directory = Path(name)
        info = {"transport": "ipc", "ip": str(directory / "s"), "key": KEY.decode(), **PORTS}
        (directory / "c.json").write_text(json.dumps({**info, "signature_scheme": "hmac-sha256"}))
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", str(directory / "c.json")]
        environment = {**os.environ, "IPYTHONDIR": str(directory / "ipython")}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, cwd=directory)
        try:
            with LocalSandbox(directory) as sandbox:
                sandbox.open()
                with connected(directory / "s") as stock, connected(sandbox.runtime / "k") as ours:
                    for client in (stock, ours):
                        exchange(client, "shell", "execute_request", {"code": SETUP})
                    yield stock, ours
        finally:
            process.kill()
            process.wait()
            ensure_event_loop().close()  # the blocking clients' own, which nobody else closes


def exchange(
    client: BlockingKernelClient, channel: str, msg_type: str, content: dict[str, Any]
) -> tuple[dict[str, Any] | None, list[tuple[str, Any]]]:
    """Send a request; return its reply (None where it has none) and all its messages on iopub."""
    if msg_type == "execute_request":
        content = {"silent": False, "store_history": not content.get("silent"), "allow_stdin": False, **content}
    request = client.session.msg(msg_type, content)
    sockets = {"shell": client.shell_channel, "control": client.control_channel}
    sockets[channel].send(request)
    published: list[tuple[str, Any]] = []
    while True:
        message = client.get_iopub_msg(timeout=PATIENCE)
        if message["parent_header"].get("msg_id") != request["header"]["msg_id"]:
            continue
        if message["msg_type"] == "stream" and published and published[-1][0] == "stream":
            last = published[-1][1]
            if last["name"] == message["content"]["name"]:
                last["text"] += message["content"]["text"]
                continue
        published.append((message["msg_type"], message["content"]))
        if message["content"].get("execution_state") == "idle":
            break
    while True:
        try:
            reply = sockets[channel].get_msg(timeout=0.2 if msg_type == "nonsense_request" else PATIENCE)
        except Empty:
            return None, published
        if reply["parent_header"]["msg_id"] == request["header"]["msg_id"]:
            break
    return {"msg_type": reply["msg_type"], "status": reply["metadata"].get("status"), **reply["content"]}, published


def alike(value: Any) -> Any:
    """Return `value` without what differs between any two kernels."""
    if isinstance(value, dict):
        return {key: "…" if key in VOLATILE else alike(each) for key, each in value.items() if key not in SOMETIMES}
    if isinstance(value, list | tuple):
        return [alike(each) for each in value]
    if isinstance(value, str):
        return re.sub(r"ipykernel_\d+", "ipykernel_N", re.sub(r"\nTip: .*\n", "\nTip\n", value))  # one of many tips
    return value


CASES = [("shell", *case) for case in SHELL] + [("control", *case) for case in CONTROL]


@pytest.mark.parametrize(
    ("channel", "msg_type", "content"),
    [case[:1] + case[2:] for case in CASES],
    ids=[f"{channel}: {name}" for channel, name, _, _ in CASES],
)
def test_the_same_answer(
    clients: tuple[BlockingKernelClient, BlockingKernelClient], channel: str, msg_type: str, content: dict[str, Any]
) -> None:
    (stock, stock_published), (ours, published) = (exchange(each, channel, msg_type, content) for each in clients)
    if msg_type == "history_request":
        for reply in (stock, ours):
            assert reply is not None and isinstance(reply["history"], list)
            reply["history"] = [line[1:] for line in reply["history"]]  # without the number of the session
    assert alike(ours) == alike(stock)
    assert alike(published) == alike(stock_published)
