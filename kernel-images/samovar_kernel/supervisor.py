"""Supervisor: PID 1 of every sandbox. Starts the kernel, reaps, carries signals and files, outlives a kernel that dies.

One thread, one selector, frames on one socket. Standard library only, and little of it: it stays in memory for the
sandbox's whole life. User code runs under the same user and can disturb it (a SIGTERM ends it), but not look into it
or write its memory; what it says is evidence against its own session only.
"""

from __future__ import annotations

import errno
import json
import os
import selectors
import signal
import socket
import sys
import time
from _ctypes import call_function, dlopen, dlsym  # what ctypes is made of, for a quarter of its memory
from _operator import _compare_digest  # what hmac has, without loading OpenSSL
from collections.abc import Callable
from typing import Any

from samovar_kernel.frames import FrameError, FrameReader, pack
from samovar_kernel.kernel_process import KernelProcess
from samovar_kernel.usage import read_usage
from samovar_kernel.workfiles import MAX_PIECE, BadPath, WorkFiles

VARIABLE = "SAMOVAR_SUPERVISOR"
PROTOCOL = 1

AFTERLIFE = 30.0
"""Seconds that files can still be fetched after the kernel's end."""

HOST_ABSENCE = 60.0
"""Seconds without a connected host after which the sandbox ends itself."""

_HELLO_DEADLINE = 5.0
_STOP_DEADLINE = 1.0  # less than whoever stops us waits
_MAX_STRANGERS = 8
_MAX_UNSENT = 16 * 1024 * 1024
_MAX_LIST = 2000
_READ = 256 * 1024
_PR_SET_DUMPABLE = 4
_CHANNELS = ("shell", "iopub", "stdin", "control", "hb")


class Connection:
    """One stream to a host (or to somebody who has not yet said that he is one)."""

    def __init__(self, stream: socket.socket) -> None:
        stream.setblocking(False)
        self.stream = stream
        self.reader = FrameReader()
        self.unsent = bytearray()
        self.authenticated = False
        self.since = time.monotonic()


class Supervisor:
    """Ties kernel process, host connection and time limits together."""

    def __init__(self, config: dict[str, Any]) -> None:
        """Start the kernel and listen. Raises OSError, KeyError."""
        self._token = str(config["token"]).encode()
        self._files = WorkFiles(config["work_directory"])
        self._selector = selectors.DefaultSelector()
        self._host: Connection | None = None
        self._strangers: list[Connection] = []
        self._absent_since = time.monotonic()
        self._dead_since: float | None = None
        self._exit_event: bytes | None = None
        self._stop_signal: int | None = None
        self._stop_deadline: float | None = None
        self._wakeup, writer = socket.socketpair()
        self._wakeup.setblocking(False)
        writer.setblocking(False)
        self._wakeup_writer = writer
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_stop)
        self._selector.register(self._wakeup, selectors.EVENT_READ, self._on_wakeup)
        self._listener = _listen(config)
        self._selector.register(self._listener, selectors.EVENT_READ, self._on_connect)
        os.chdir(config["work_directory"])
        ipc = config["transport"] == "ipc"
        ports = {name: number for number, name in enumerate(_CHANNELS, 1)} if ipc else config["ports"]
        self._kernel = KernelProcess(
            config["kernel"],
            os.environ,
            transport=config["transport"],
            ip=os.path.join(config["directory"], "k") if ipc else "0.0.0.0",
            ports={name: ports[name] for name in _CHANNELS},
            key=config["key"],
            preload=config.get("preload", ()),
        )
        self._operations: dict[str, Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]] = {
            "signal": self._signal,
            "put": self._put,
            "get": self._get,
            "list": self._list,
            "stats": self._stats,
        }

    def run(self) -> int:
        """Serve until the end; return the kernel's exit code (128 + signal if one killed it, or ended us with it)."""
        while not self._finished():
            for key, mask in self._selector.select(self._patience()):
                key.data(mask)
            self._drop_silent_strangers()
            if self._stop_signal is not None and self._stop_deadline is None:
                self._begin_stop()
        self._kernel.signal(signal.SIGKILL)
        if self._kernel.exit is None:
            self._kernel.ended(os.waitpid(self._kernel.pid, 0)[1])
        code, signum = self._kernel.exit or (None, None)
        if signum == signal.SIGKILL and self._stop_signal is not None:
            signum = self._stop_signal
        return code if code is not None else 128 + (signum or 0)

    def _begin_stop(self) -> None:
        """Kill the kernel. Its end is told like any other, with what it had not sent, before we end."""
        self._stop_deadline = time.monotonic() + _STOP_DEADLINE
        if self._kernel.exit is None:
            self._kernel.signal(signal.SIGKILL)
        else:
            self._stop_signal = None  # it had ended before, and not of this

    # -- time

    def _finished(self) -> bool:
        now = time.monotonic()
        if self._stop_deadline is not None:
            told = self._kernel.exit is not None and not (self._host and self._host.unsent)
            return told or now >= self._stop_deadline
        if self._dead_since is not None and now - self._dead_since >= AFTERLIFE:
            return True
        return self._host is None and now - self._absent_since >= HOST_ABSENCE

    def _patience(self) -> float | None:
        now = time.monotonic()
        deadlines = [stranger.since + _HELLO_DEADLINE for stranger in self._strangers]
        if self._dead_since is not None:
            deadlines.append(self._dead_since + AFTERLIFE)
        if self._host is None:
            deadlines.append(self._absent_since + HOST_ABSENCE)
        if self._stop_deadline is not None:
            deadlines.append(self._stop_deadline)
        return max(0.0, min(deadlines) - now) if deadlines else None

    def _drop_silent_strangers(self) -> None:
        now = time.monotonic()
        for stranger in [one for one in self._strangers if now - one.since >= _HELLO_DEADLINE]:
            self._close(stranger)

    # -- processes

    def _on_wakeup(self, _: int) -> None:
        try:
            self._wakeup.recv(4096)
        except BlockingIOError:
            return
        self._reap()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._kernel.pid:
                self._on_kernel_end(status)

    def _on_kernel_end(self, status: int) -> None:
        self._kernel.ended(status)
        self._dead_since = time.monotonic()
        code, signum = self._kernel.exit or (None, None)
        # A stop that came first is why it ended: the kernel's own signal would not tell.
        event = {"event": "exit", "code": code, "signal": signum, "stopped": self._stop_deadline is not None}
        self._exit_event = pack(event, self._kernel.unsent())
        if self._host is not None:
            self._send(self._host, self._exit_event)

    def _on_stop(self, signum: int, _: Any) -> None:
        if self._stop_signal is None:
            self._stop_signal = signum

    # -- the stream

    def _on_connect(self, _: int) -> None:
        try:
            stream, _address = self._listener.accept()
        except OSError:
            return  # gone again, or no descriptor left: the others go on
        if len(self._strangers) >= _MAX_STRANGERS:
            self._close(self._strangers[0])
        connection = Connection(stream)
        self._strangers.append(connection)
        self._selector.register(stream, selectors.EVENT_READ, lambda mask: self._on_ready(connection, mask))

    def _on_ready(self, connection: Connection, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self._flush(connection)
        if mask & selectors.EVENT_READ and connection.stream.fileno() >= 0:
            self._receive(connection)

    def _receive(self, connection: Connection) -> None:
        try:
            data = connection.stream.recv(_READ)
            frames = connection.reader.feed(data) if data else []
        except BlockingIOError:
            return
        except (OSError, FrameError):
            self._close(connection)
            return
        if not data:
            self._close(connection)
            return
        for header, body in frames:
            if connection.authenticated:
                self._answer(connection, header, body)
            elif not self._greet(connection, header):
                self._close(connection)
                return

    def _greet(self, connection: Connection, header: dict[str, Any]) -> bool:
        token = header.get("token")
        if header.get("op") != "hello" or not isinstance(token, str):
            return False
        if not _compare_digest(token.encode(errors="replace"), self._token):
            return False
        previous, self._host = self._host, None
        if previous is not None:
            self._close(previous)
        self._strangers.remove(connection)
        connection.authenticated = True
        self._host = connection
        self._send(connection, pack({"ok": True, "pid": self._kernel.pid, "protocol": PROTOCOL}))
        if self._exit_event is not None:
            self._send(connection, self._exit_event)
        return True

    def _answer(self, connection: Connection, header: dict[str, Any], body: bytes) -> None:
        reply: dict[str, Any] = {"id": header.get("id")}
        content = b""
        operation = self._operations.get(str(header.get("op")))
        try:
            if operation is None:
                raise ValueError(f"unknown operation {header.get('op')!r}")
            fields, content = operation(header, body)
            reply |= {"ok": True, **fields}
        except OSError as error:
            code = error.errno
            reply |= {"ok": False, "error": error.strerror or str(error)}
            if code is not None:
                reply["errno"] = errno.errorcode.get(code, str(code))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            reply |= {"ok": False, "error": f"{type(error).__name__}: {error}"}
        self._send(connection, pack(reply, content))

    def _send(self, connection: Connection, frame: bytes) -> None:
        connection.unsent += frame
        self._flush(connection)

    def _flush(self, connection: Connection) -> None:
        try:
            while connection.unsent:
                sent = connection.stream.send(memoryview(connection.unsent)[:_READ])
                del connection.unsent[:sent]
        except BlockingIOError:
            if len(connection.unsent) > _MAX_UNSENT:
                self._close(connection)
                return
        except OSError:
            self._close(connection)
            return
        # a host that does not read its answers is not asked for more
        events = selectors.EVENT_READ if not connection.unsent else selectors.EVENT_WRITE
        key = self._selector.get_key(connection.stream)
        if key.events != events:
            self._selector.modify(connection.stream, events, key.data)

    def _close(self, connection: Connection) -> None:
        if connection.stream.fileno() < 0:
            return
        self._selector.unregister(connection.stream)
        connection.stream.close()
        connection.unsent.clear()
        if connection in self._strangers:
            self._strangers.remove(connection)
        if connection is self._host:
            self._host = None
            self._absent_since = time.monotonic()

    # -- operations: each returns header fields and body of its answer

    def _signal(self, header: dict[str, Any], _: bytes) -> tuple[dict[str, Any], bytes]:
        self._kernel.signal(signal.Signals(header["signum"]))
        return {}, b""

    def _put(self, header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        if len(body) > MAX_PIECE:
            raise BadPath(f"piece of {len(body)} bytes, at most {MAX_PIECE}")
        mtime_ns = header.get("mtime_ns") if header.get("final") else None
        self._files.put(_text(header, "path"), _number(header, "offset"), body, mtime_ns=mtime_ns)
        return {}, b""

    def _get(self, header: dict[str, Any], _: bytes) -> tuple[dict[str, Any], bytes]:
        offset = _number(header, "offset")
        data, status = self._files.get(_text(header, "path"), offset, _number(header, "size"))
        eof = not data or offset + len(data) >= status.st_size
        return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "eof": eof}, data

    def _list(self, header: dict[str, Any], _: bytes) -> tuple[dict[str, Any], bytes]:
        after = _text(header, "after") if header.get("after") else None
        files, more = self._files.entries(after, min(_number(header, "limit"), _MAX_LIST))
        return {"more": more}, json.dumps(files).encode()

    def _stats(self, _: dict[str, Any], __: bytes) -> tuple[dict[str, Any], bytes]:
        return read_usage(self._kernel.pid), b""


def _close_to_others() -> None:
    """Let no process of the same user read our memory and environment (the token!), or trace us. Raises OSError.

    A program that we start is open again.
    """
    program: Any = None  # as in CDLL(None)
    if call_function(dlsym(dlopen(program, 0), "prctl"), (_PR_SET_DUMPABLE, 0, 0, 0, 0)) != 0:
        raise OSError("prctl(PR_SET_DUMPABLE) failed")


def _listen(config: dict[str, Any]) -> socket.socket:
    if config["transport"] == "tcp":
        return socket.create_server(("0.0.0.0", config["ports"]["supervisor"]))
    listener = socket.socket(socket.AF_UNIX)
    # the host is another user than we are
    previous = os.umask(0)
    try:
        listener.bind(os.path.join(config["directory"], "sup"))
    finally:
        os.umask(previous)
    listener.listen(_MAX_STRANGERS)
    return listener


def _text(header: dict[str, Any], field: str) -> str:
    value = header[field]
    if not isinstance(value, str):
        raise TypeError(f"{field} must be a string")
    return value


def _number(header: dict[str, Any], field: str) -> int:
    value = header[field]
    if not isinstance(value, int) or value < 0:
        raise TypeError(f"{field} must be a number from 0")
    return value


def main() -> None:
    """Run the sandbox that the environment describes, and exit as its kernel did."""
    text = os.environ.pop(VARIABLE, None)
    if text is None:
        sys.exit(f"{VARIABLE} is not set: this program is started by a launcher of samovar")
    try:
        _close_to_others()
        supervisor = Supervisor(json.loads(text))
    except (OSError, KeyError, ValueError) as error:
        sys.exit(f"the sandbox cannot start: {type(error).__name__}: {error}")
    sys.exit(supervisor.run())


if __name__ == "__main__":
    main()
