"""Starts: the CPU that one sandbox costs until it is warm, and where it goes.

Sandboxes are launched one after the other, by turns with the image's preload and without it: what the kernel processes
of the two cost more or less is the imports.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections import defaultdict

import psutil
from tqdm import tqdm

from benchmarks.figures import Quantity
from benchmarks.processes import container_cpu_seconds, cpu_seconds, engine_processes
from benchmarks.stage import Stage
from kernelprovisioner.images import KernelImage
from kernelprovisioner.launchers import DockerLauncher
from kernelprovisioner.launchers.base import LaunchRequest
from kernelprovisioner.runtime import RuntimeRoot
from kernelprovisioner.sandboxes import Sandboxes

_START_TIMEOUT = 120.0

Samples = dict[str, list[float]]


def measure(stage: Stage, rounds: int) -> list[Quantity]:
    """CPU seconds of one start, by part, from `rounds` starts of each kind."""
    directory = stage.directory / "starts"
    directory.mkdir(mode=0o700)
    full, bare = asyncio.run(_starts(stage, RuntimeRoot.open(directory), rounds))
    pairs = list(zip(full["kernel"], bare["kernel"], strict=True))
    parts = {
        "total": ("CPU of one sandbox, from the call to warm", full["total"]),
        "imports": ("– imports of the image's preload", [with_them - without for with_them, without in pairs]),
        "kernel": ("– kernel process without them", bare["kernel"]),
        "container": ("– container start and supervisor", full["container"]),
        "shim": ("– containerd-shim and runc", full["shim"]),
        "engine": ("– dockerd and containerd", full["engine"]),
        "host": ("– our side: engine calls, handshake", full["host"]),
    }
    quantities = [
        Quantity(
            f"cpu {name}",
            what,
            "s",
            values,
            "the whole start" if name != "total" else "",
            full["total"] if name != "total" else (),
        )
        for name, (what, values) in parts.items()
    ]
    removal = Quantity("cpu removal", "CPU of its removal, engine and our side", "s", full["removal"])
    wall = Quantity(
        "start seconds", "one start by the clock, no other one beside it", "s", full["wall"], "its CPU", full["total"]
    )
    return [*quantities, removal, wall]


async def _starts(stage: Stage, runtime: RuntimeRoot, rounds: int) -> tuple[Samples, Samples]:
    engine = engine_processes(stage.docker_url)
    sandboxes = Sandboxes(DockerLauncher(runtime, docker_url=stage.docker_url))
    without = dataclasses.replace(stage.image, preload=())
    full: Samples = defaultdict(list)
    bare: Samples = defaultdict(list)
    await sandboxes.start()
    try:
        for _ in tqdm(range(rounds), desc="single starts", disable=None):
            for image, samples in ((stage.image, full), (without, bare)):
                for part, value in (await _start(stage, sandboxes, engine, image)).items():
                    samples[part].append(value)
    finally:
        await sandboxes.stop()
    return full, bare


async def _start(
    stage: Stage, sandboxes: Sandboxes, engine: list[psutil.Process], image: KernelImage
) -> dict[str, float]:
    """Start and remove one sandbox; CPU seconds by part."""
    meter = _Meter(engine)
    started = time.perf_counter()
    sandbox = await sandboxes.launch(LaunchRequest(secrets.token_hex(8), image), timeout=_START_TIMEOUT)
    wall = time.perf_counter() - started
    host, of_engine = meter.read()
    pid = await asyncio.to_thread(stage.first_process, sandbox.launched.runtime_id)
    parts = _parts(psutil.Process(pid)) | {"host": host, "engine": of_engine}
    parts["total"] = sum(parts.values())
    meter = _Meter(engine)
    await sandbox.destroy()
    return parts | {"wall": wall, "removal": sum(meter.read())}


def _parts(supervisor: psutil.Process) -> dict[str, float]:
    """What stands behind one container: its kernel process, the rest of it, and the engine's shim."""
    kernel = sum(cpu_seconds(child) for child in supervisor.children(recursive=True))
    # The control group has also counted what prepared the container in it before our program began.
    everything = container_cpu_seconds(supervisor.pid)
    container = cpu_seconds(supervisor) if everything is None else everything - kernel
    shim = supervisor.parent()
    return {"kernel": kernel, "container": container, "shim": 0.0 if shim is None else cpu_seconds(shim)}


class _Meter:
    """CPU of this process and of the engine since it was made."""

    def __init__(self, engine: list[psutil.Process]) -> None:
        self._engine = engine
        self._before = self._now()

    def read(self) -> tuple[float, float]:
        """Seconds of ours, and of the engine's."""
        before, now = self._before, self._now()
        return now[0] - before[0], now[1] - before[1]

    def _now(self) -> tuple[float, float]:
        return time.process_time(), sum(cpu_seconds(process) for process in self._engine)
