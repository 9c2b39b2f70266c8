"""ProcessLauncher: sandboxes as plain child processes, and that nothing of them is left."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from kernelprovisioner.images import KernelImage, find_image
from kernelprovisioner.launchers import process
from kernelprovisioner.launchers.base import Launched, LaunchError, LaunchRequest
from kernelprovisioner.launchers.process import ProcessLauncher, sandbox_environment
from kernelprovisioner.runtime import OwnerDirectory, RuntimeRoot
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from kernelprovisioner.supervisor import SupervisorClient

ROOT = Path(__file__).parents[2]


@pytest.fixture
def image() -> KernelImage:
    return find_image("python")


@pytest.fixture
def runtime(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> RuntimeRoot:
    # A checkout that is not installed: the children find samovar_kernel as we do.
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernel-images'}")
    return RuntimeRoot.open(short_directory / "run")


Exits = asyncio.Queue[tuple[str, SandboxExit]]


@asynccontextmanager
async def launching(runtime: RuntimeRoot) -> AsyncIterator[tuple[ProcessLauncher, Exits]]:
    launcher = ProcessLauncher(runtime)
    exits: Exits = asyncio.Queue()
    await launcher.start(lambda sandbox_id, verdict: exits.put_nowait((sandbox_id, verdict)))
    try:
        yield launcher, exits
    finally:
        await launcher.stop()
        assert [entry.name for entry in runtime.path.iterdir()] == ["k"]


async def launch(launcher: ProcessLauncher, image: KernelImage, mount: Path | None = None) -> Launched:
    return await launcher.launch(LaunchRequest(secrets.token_hex(8), image, mount))


def family(launched: Launched) -> list[psutil.Process]:
    supervisor = psutil.Process(int(launched.runtime_id.removeprefix("process:")))
    return [supervisor, *supervisor.children(recursive=True)]


def all_gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=5)[1]


async def test_it_starts_and_answers_and_leaves_no_process(runtime: RuntimeRoot, image: KernelImage) -> None:
    async with launching(runtime) as (launcher, exits):
        launched = await launch(launcher, image)
        assert (launched.isolated, launched.transport) == (False, "ipc")
        client = await SupervisorClient.connect(launched.supervisor, launched.token, timeout=10)
        processes = family(launched)
        assert len(processes) >= 2
        await launcher.warmed(launched)
        client.close()
        await launcher.destroy(launched)
        await launcher.destroy(launched)
        assert all_gone(processes)
        assert not launched.directory.exists()
        assert exits.empty()


async def test_a_killed_supervisor_is_told_and_takes_its_kernel_with_it(
    runtime: RuntimeRoot, image: KernelImage
) -> None:
    async with launching(runtime) as (launcher, exits):
        launched = await launch(launcher, image)
        client = await SupervisorClient.connect(launched.supervisor, launched.token, timeout=10)
        processes = family(launched)
        os.kill(processes[0].pid, signal.SIGKILL)
        sandbox_id, verdict = await asyncio.wait_for(exits.get(), 5)
        assert (sandbox_id, verdict.cause, verdict.signal) == (launched.sandbox_id, ExitCause.SIGNAL, signal.SIGKILL)
        client.close()
        await launcher.destroy(launched)
        assert all_gone(processes)


async def test_a_dead_owners_processes_are_reaped(runtime: RuntimeRoot, image: KernelImage) -> None:
    program = f"""
import asyncio
from kernelprovisioner.images import find_image
from kernelprovisioner.launchers.base import LaunchRequest
from kernelprovisioner.launchers.process import ProcessLauncher
from kernelprovisioner.runtime import RuntimeRoot
from kernelprovisioner.supervisor import SupervisorClient
async def main():
    launcher = ProcessLauncher(RuntimeRoot.open({str(runtime.path)!r}))
    await launcher.start(lambda *_: None)
    launched = await launcher.launch(LaunchRequest("0123456789abcdef", find_image("python")))
    (await SupervisorClient.connect(launched.supervisor, launched.token, timeout=10)).close()
    print(launched.runtime_id, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    other = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        line = await asyncio.wait_for(other.stdout.readline(), 15)
        supervisor = psutil.Process(int(line.decode().strip().removeprefix("process:")))
        processes = [supervisor, *supervisor.children(recursive=True)]
        living = ProcessLauncher(runtime)
        await living.start(lambda *_: None)
        await living.stop()
        assert all(process.is_running() for process in processes)
    finally:
        other.kill()
        await other.wait()
    async with launching(runtime):
        assert all_gone(processes)


async def test_a_mounted_directory_is_the_work_directory(
    runtime: RuntimeRoot, image: KernelImage, short_directory: Path
) -> None:
    async with launching(runtime) as (launcher, _):
        assert (await launch(launcher, image, short_directory)).work_directory == str(short_directory)
        with pytest.raises(LaunchError, match="is not a directory"):
            await launch(launcher, image, short_directory / "absent")


async def test_directories_are_removed_beside_the_loop(
    runtime: RuntimeRoot, image: KernelImage, short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_loop: list[bool] = []
    loop, removing = asyncio.get_running_loop(), asyncio.Event()
    remove = OwnerDirectory.remove_sandbox_directory

    def slowly(owner: OwnerDirectory, sandbox_id: str) -> None:
        in_loop.append(threading.current_thread() is threading.main_thread())
        loop.call_soon_threadsafe(removing.set)
        time.sleep(0.2)
        remove(owner, sandbox_id)

    monkeypatch.setattr(OwnerDirectory, "remove_sandbox_directory", slowly)
    async with launching(runtime) as (launcher, _):
        with pytest.raises(LaunchError):
            await launch(launcher, image, short_directory / "absent")
        launched = await launch(launcher, image)
        removing.clear()
        first = asyncio.create_task(launcher.destroy(launched))
        await asyncio.wait_for(removing.wait(), 10)
        await launcher.destroy(launched)
        assert not launched.directory.exists(), "who asks a second time waits for the same end"
        await first
        await launch(launcher, image)
    assert in_loop == [False] * 3


async def test_a_process_that_cannot_be_noted_does_not_stay(
    runtime: RuntimeRoot, image: KernelImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = process._start_supervisor

    def noting(*arguments: Any) -> subprocess.Popen[bytes]:
        started.append(start(*arguments))
        return started[0]

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(process, "_start_supervisor", noting)
    async with launching(runtime) as (launcher, exits):
        with monkeypatch.context() as disk:
            disk.setattr(Path, "write_text", full)
            with pytest.raises(LaunchError, match="No space left on device"):
                await launch(launcher, image)
        assert started[0].poll() is not None and exits.empty()
        assert launcher.owner.sandbox_ids() == []


def test_the_environment_comes_from_an_allow_list(image: KernelImage) -> None:
    ours = {"PATH": "/bin", "LC_ALL": "C", "API_KEY": "secret", "AWS_SECRET_ACCESS_KEY": "secret", "HOME": "/root"}
    image = replace(image, environment={"TZ": "UTC"})
    environment = sandbox_environment(ours, image, Path("/h"))
    assert "secret" not in json.dumps(environment)
    assert {name: environment[name] for name in ("PATH", "LC_ALL", "HOME", "TZ", "OMP_NUM_THREADS")} == {
        "PATH": "/bin",
        "LC_ALL": "C",
        "HOME": "/h",
        "TZ": "UTC",
        "OMP_NUM_THREADS": "1",
    }


async def test_stop_destroys_what_lives(runtime: RuntimeRoot, image: KernelImage) -> None:
    async with launching(runtime) as (launcher, _):
        begin = time.monotonic()
        processes = [process for _ in range(2) for process in family(await launch(launcher, image))]
    assert all_gone(processes)
    assert time.monotonic() - begin < 10
