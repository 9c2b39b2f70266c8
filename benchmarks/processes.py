"""Processes: what CPU and memory the processes of a sandbox and of its engine have used, from /proc."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

import psutil

_ENGINE = "dockerd"
_CONTAINERD = "containerd"
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Memory:
    """Bytes of some processes: `private` nobody else has; `shared` is their part of what several have mapped."""

    private: int
    shared: int
    resident: int


def cpu_seconds(process: psutil.Process) -> float:
    """CPU of a process and of those children that it has waited for."""
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def memory(processes: list[psutil.Process]) -> Memory:
    """Memory of these processes together (from smaps_rollup: USS, PSS − USS, RSS). Needs the right to read theirs."""
    found = [process.memory_full_info() for process in processes]
    private = sum(one.uss for one in found)
    return Memory(private, sum(one.pss for one in found) - private, sum(one.rss for one in found))


def engine_processes(docker_url: str) -> list[psutil.Process]:
    """The engine's long-lived processes: dockerd and its containerd. Raises LookupError where they are not here."""
    peer = _peer(docker_url)
    engine = psutil.Process(peer) if peer is not None else None
    if engine is None or engine.name() != _ENGINE:
        # Its socket was made by somebody else, systemd for one.
        engine = _named(_ENGINE)
    own = [child for child in engine.children() if child.name() == _CONTAINERD]
    return [engine, own[0] if own else _named(_CONTAINERD)]


def container_cpu_seconds(pid: int) -> float | None:
    """CPU of all that ever ran in the container of process `pid`, by its control group; None where it is not there."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        inside = path.lstrip("/")
        with contextlib.suppress(OSError):
            if "cpuacct" in controllers.split(","):
                return int((_CGROUP / "cpuacct" / inside / "cpuacct.usage").read_text()) / 1e9
            if not controllers:
                text = (_CGROUP / inside / "cpu.stat").read_text()
                if usage := re.search(r"^usage_usec (\d+)", text, re.MULTILINE):
                    return int(usage[1]) / 1e6
    return None


def _peer(docker_url: str) -> int | None:
    parts = urllib.parse.urlsplit(docker_url)
    if parts.scheme != "unix":
        return None
    with socket.socket(socket.AF_UNIX) as stream:
        stream.connect(parts.path)
        credentials = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    return pid or None


def _named(name: str) -> psutil.Process:
    for process in psutil.process_iter(["name"]):
        if process.info["name"] == name:
            return process
    raise LookupError(f"no process {name!r} on this machine: the engine's CPU cannot be measured")
