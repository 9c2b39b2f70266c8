"""LocalSandbox: a real supervisor and a real kernel as plain child processes: no container engine needed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import samovar_kernel
import zmq
from jupyter_client.session import Session
from samovar_kernel.frames import FrameReader, pack

TOKEN = "token"
KEY = b"warm"
_PACKAGES = Path(samovar_kernel.__file__).parent.parent
_NUMBERS = {"shell": 1, "iopub": 2, "stdin": 3, "control": 4}
_START_DEADLINE = 15.0


@dataclass
class Ran:
    """What came of one cell: the reply's content, its output messages, and each stream's text."""

    reply: dict[str, Any]
    messages: list[dict[str, Any]] = field(default_factory=list)

    def text(self, name: str = "stdout") -> str:
        """Return all that the cell printed to stream `name`."""
        streams = [message["content"] for message in self.messages if message["msg_type"] == "stream"]
        return "".join(content["text"] for content in streams if content["name"] == name)


class LocalSandbox:
    """One supervisor, its kernel, and a client of both. A context manager, which leaves nothing behind."""

    def __init__(self, directory: Path, *, preload: list[str] | None = None, kernel: list[str] | None = None) -> None:
        self.runtime = directory / "r"
        self.work = directory / "w"
        for path in (self.runtime, self.work):
            path.mkdir()
        config = {
            "token": TOKEN,
            "key": KEY.decode(),
            "transport": "ipc",
            "directory": str(self.runtime),
            "work_directory": str(self.work),
            "preload": preload or [],
            "kernel": kernel or [sys.executable, "-m", "samovar_kernel.app"],
        }
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.work), "PYTHONPATH": str(_PACKAGES)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "samovar_kernel.supervisor"],
            env={**environment, "SAMOVAR_SUPERVISOR": json.dumps(config)},
            stdin=subprocess.DEVNULL,
        )
        self.events: list[tuple[dict[str, Any], bytes]] = []
        self._reader = FrameReader()
        self._frames: list[tuple[dict[str, Any], bytes]] = []
        self._count = 0
        self._context = zmq.Context()
        self.session = Session(key=KEY)
        self.stream = self.connect()
        self.hello = self.greet(TOKEN)

    def __enter__(self) -> LocalSandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self._context.destroy(linger=0)
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(10)

    # --- the supervisor

    def connect(self) -> socket.socket:
        """Return a new connection to the supervisor."""
        deadline = time.monotonic() + _START_DEADLINE
        while True:
            stream = socket.socket(socket.AF_UNIX)
            try:
                stream.connect(str(self.runtime / "sup"))
            except OSError:
                stream.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
                continue
            stream.settimeout(15)
            return stream

    def greet(self, token: str) -> dict[str, Any]:
        """Say hello on the present connection and return the answer. Raises EOFError if it is closed instead."""
        self.stream.sendall(pack({"op": "hello", "token": token}))
        return self._frame()[0]

    def request(self, op: str, body: bytes = b"", **fields: Any) -> tuple[dict[str, Any], bytes]:
        """Return the answer (header, body) to one request."""
        self._count += 1
        self.stream.sendall(pack({"op": op, "id": self._count, **fields}, body))
        while True:
            header, content = self._frame()
            if "event" not in header:
                assert header["id"] == self._count
                return header, content
            self.events.append((header, content))

    def exit_event(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Wait for the kernel's end; return the event and its unsent output."""
        while not self.events:
            self.events.append(self._frame())
        header, body = self.events[0]
        return header, json.loads(body)

    def _frame(self) -> tuple[dict[str, Any], bytes]:
        while not self._frames:
            data = self.stream.recv(1 << 20)
            if not data:
                raise EOFError
            self._frames += self._reader.feed(data)
        return self._frames.pop(0)

    # --- the kernel

    def open(self) -> None:
        """Connect to the kernel and wait until it answers."""
        self.sockets: dict[str, zmq.Socket[Any]] = {}
        for name, number in _NUMBERS.items():
            kind = zmq.SUB if name == "iopub" else zmq.DEALER
            self.sockets[name] = self._context.socket(kind)
            if name == "iopub":
                self.sockets[name].subscribe(b"")
            else:
                self.sockets[name].identity = b"client"
            connected = self.sockets[name].get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
            self.sockets[name].connect(f"ipc://{self.runtime}/k-{number}")
            assert connected.poll(int(_START_DEADLINE * 1000)), f"cannot connect to {name}"
            self.sockets[name].disable_monitor()
        self.receive("iopub", lambda message: message["msg_type"] == "iopub_welcome")
        self.ask("shell", "kernel_info_request", {})

    def send(self, channel: str, msg_type: str, content: dict[str, Any], metadata: dict[str, Any] | None = None) -> str:
        """Send a request and return its id."""
        message = self.session.send(self.sockets[channel], msg_type, content, metadata=metadata)
        assert message is not None
        return str(message["header"]["msg_id"])

    def receive(self, channel: str, wanted: Any, timeout: float = 15.0) -> dict[str, Any]:
        """Return the next message that is `wanted`. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while self.sockets[channel].poll(max(0, int((deadline - time.monotonic()) * 1000))):
            _, message = self.session.recv(self.sockets[channel], 0)
            if message is not None and wanted(message):
                return dict(message)
        raise TimeoutError(f"nothing on {channel} for {timeout} s")

    def ask(self, channel: str, msg_type: str, content: dict[str, Any]) -> dict[str, Any]:
        """Return the content of the reply to a request."""
        msg_id = self.send(channel, msg_type, content)
        content = self.receive(channel, lambda message: message["parent_header"].get("msg_id") == msg_id)["content"]
        return content

    def claim(self, key: bytes = b"personal", **content: Any) -> dict[str, Any]:
        """Claim the kernel with a new key and return the reply, which is signed with it."""
        msg_id = self.send("control", "samovar_claim_request", {"key": key.decode(), "kernel_id": "id", **content})
        self.session.key = key
        message = self.receive("control", lambda message: message["parent_header"].get("msg_id") == msg_id)
        return dict(message["content"])

    def start_cell(self, code: str, *, metadata: dict[str, Any] | None = None, **content: Any) -> str:
        """Send a cell and return its id."""
        return self.send("shell", "execute_request", {"code": code, **content}, metadata)

    def finish_cell(self, msg_id: str, timeout: float = 15.0) -> Ran:
        """Return what came of a cell, once its idle status and its reply are here."""
        ran = Ran({})

        def collect(message: dict[str, Any]) -> bool:
            if message["parent_header"].get("msg_id") != msg_id:
                return False
            if message["msg_type"] not in ("status", "execute_input"):
                ran.messages.append(message)
            return bool(message["content"].get("execution_state") == "idle")

        self.receive("iopub", collect, timeout)
        ran.reply = self.receive("shell", lambda message: message["parent_header"].get("msg_id") == msg_id)["content"]
        return ran

    def run(self, code: str, **options: Any) -> Ran:
        """Run a cell and return what came of it."""
        return self.finish_cell(self.start_cell(code, **options))
