"""KernelProcess: the supervisor's one child, its pipes, and what it left behind when it ended.

Standard library only: the supervisor imports this module as PID 1.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

from samovar_kernel.frames import MAX_BODY
from samovar_kernel.settings import VARIABLE, KernelSettings
from samovar_kernel.unsent import create_ring, read_records

_OOM_SCORE = b"500"  # the kernel process goes before the supervisor, which can still tell what happened
_OOM_ATTEMPTS = 20
_PIPE_SIZE = 64 * 1024
_ROOM = MAX_BODY - 64 * 1024


class KernelProcess:
    """A running (or ended) kernel process, leader of its own session and process group."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        transport: str,
        ip: str,
        ports: Mapping[str, int],
        key: str,
        preload: Sequence[str],
    ) -> None:
        """Start it. Raises OSError if `command` cannot be executed."""
        self.exit: tuple[int | None, int | None] | None = None  # code and signal, once it has ended
        self._ring = create_ring()
        self._pipes: dict[str, int] = {}
        log = os.dup(2)
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_DUP2, null, 0)]
        writing = []
        for target, name in ((1, "stdout"), (2, "stderr")):
            reader, writer = os.pipe2(os.O_CLOEXEC)
            self._pipes[name] = reader
            writing.append(writer)
            actions.append((os.POSIX_SPAWN_DUP2, writer, target))
        settings = KernelSettings(transport, ip, ports, key, tuple(preload), self._pipes, self._ring, log)
        inherited = (*self._pipes.values(), self._ring, log)
        for descriptor in inherited:
            os.set_inheritable(descriptor, True)
        try:
            self.pid = os.posix_spawn(
                command[0],
                list(command),
                {**environment, VARIABLE: settings.to_environment()},
                file_actions=actions,
                setsid=True,
                setsigmask=(),
                setsigdef=[signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD],
            )
        finally:
            for descriptor in (*writing, null, log):
                os.close(descriptor)
        for descriptor in self._pipes.values():
            os.set_blocking(descriptor, False)
        _set_oom_score(self.pid)

    def ended(self, status: int) -> None:
        """Take note of its end; `status` is what `waitpid` returned. Whatever it left running is killed."""
        code = os.waitstatus_to_exitcode(status)
        self.exit = (None, -code) if code < 0 else (code, None)
        self.signal(signal.SIGKILL)

    def signal(self, signum: int) -> None:
        """Send a signal to the process group (to nobody if it is gone)."""
        try:
            os.killpg(self.pid, signum)
        except ProcessLookupError:
            return

    def unsent(self) -> bytes:
        """Return, as JSON, the output records that may not have left the kernel; the newest if they are too many.

        Call it once, after the end.
        """
        records = read_records(self._ring)
        parent: dict[str, Any] = next(
            (record["parent"] for record in reversed(records) if record["kind"] == "text"), {}
        )
        for name, reader in self._pipes.items():
            left = _drain(reader)
            if left:
                records.append({"kind": "text", "name": name, "parent": parent, "text": left.decode(errors="replace")})
        encoded: list[str] = []
        room = _ROOM
        for record in reversed(records):
            piece = json.dumps(record, ensure_ascii=False)
            room -= len(piece.encode(errors="replace")) + 1
            if room < 0:
                break
            encoded.append(piece)
        return f"[{','.join(reversed(encoded))}]".encode(errors="replace")


def _set_oom_score(pid: int) -> None:
    # For the moment in which its program replaces ours, its files in /proc are as closed as our own.
    for _ in range(_OOM_ATTEMPTS):
        try:
            descriptor = os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        except PermissionError:
            time.sleep(0.001)
            continue
        except OSError:
            return
        try:
            os.write(descriptor, _OOM_SCORE)
        except OSError:
            return  # a host that does not allow it: then whoever is largest goes first, mostly the kernel
        finally:
            os.close(descriptor)
        return


def _drain(reader: int) -> bytes:
    pieces = []
    # twice a pipe's size, should a descendant that left the group go on writing
    for _ in range(2):
        try:
            data = os.read(reader, _PIPE_SIZE)
        except BlockingIOError:
            break
        if not data:
            break
        pieces.append(data)
    return b"".join(pieces)
