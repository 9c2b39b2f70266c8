"""Usage: memory and CPU of sandboxes, asked of the engine or the operating system, side by side and in bounded time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import psutil

from kernelprovisioner.launchers.docker_engine import ENGINE_ERRORS
from kernelprovisioner.launchers.process import PROCESS_ID_PREFIX

#: an engine answers at its next tick, up to a second later (measured, 20.10): so all are asked at once
_THREADS = 64


@dataclass(frozen=True)
class Usage:
    """What a sandbox uses: bytes of memory (without what the kernel could drop), its limit, seconds of CPU so far."""

    memory: int | None = None
    memory_limit: int | None = None
    cpu_seconds: float | None = None


def measure(client: Any | None, runtime_ids: Iterable[str], seconds: float) -> dict[str, Usage]:
    """Return the usage by runtime id; what has not answered within `seconds`, or is gone, is left out. Blocks."""
    ids = list(runtime_ids)
    if not ids:
        return {}
    threads = ThreadPoolExecutor(min(_THREADS, len(ids)), "samovar-usage")
    asked = {threads.submit(_usage, client, runtime_id): runtime_id for runtime_id in ids}
    done, _ = wait(asked, timeout=seconds)
    threads.shutdown(wait=False, cancel_futures=True)
    found = {asked[future]: future.result() for future in done if not future.cancelled()}
    return {runtime_id: usage for runtime_id, usage in found.items() if usage is not None}


def of_stats(stats: Mapping[str, Any]) -> Usage:
    """Return the usage that an engine's statistics of one container tell, of cgroup version 1 or 2."""
    memory = stats.get("memory_stats") or {}
    cpu = (stats.get("cpu_stats") or {}).get("cpu_usage") or {}
    used = memory.get("usage")
    if used is not None:
        details = memory.get("stats") or {}
        used = max(0, used - details.get("total_inactive_file", details.get("inactive_file", 0)))
    total = cpu.get("total_usage")
    return Usage(used, memory.get("limit"), None if total is None else total / 1e9)


def of_process(pid: int) -> Usage | None:
    """Return the usage of a process and its descendants; None if it is gone."""
    memory, seconds = 0, 0.0
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.Error:
        return None
    for process in tree:
        try:
            memory += process.memory_info().rss
            times = process.cpu_times()
        except psutil.Error:
            continue  # it ended meanwhile
        seconds += times.user + times.system
    return Usage(memory, None, seconds)


def _usage(client: Any | None, runtime_id: str) -> Usage | None:
    if runtime_id.startswith(PROCESS_ID_PREFIX):
        return of_process(int(runtime_id.removeprefix(PROCESS_ID_PREFIX)))
    if client is None:
        return None
    try:
        return of_stats(client.stats(runtime_id, stream=False, one_shot=True))
    except ENGINE_ERRORS:  # it is gone, or the engine does not answer: it is left out
        return None
