"""A gateway whose launcher does not remove what it made: the stop is bounded all the same, and says what stays."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import docker
import pytest

from gateway import patience, server
from gateway.app import GatewayApp
from gateway.first_cell import _key_header
from gateway.recovery import Recovered, recover
from gateway.server import Gateway
from kernelprovisioner.images import KernelImage
from kernelprovisioner.launchers import DockerLauncher, ProcessLauncher
from kernelprovisioner.launchers.base import Launched, LaunchError, LaunchRequest
from kernelprovisioner.launchers.container_ends import Container
from kernelprovisioner.runtime import RuntimeRoot


class StuckLauncher(ProcessLauncher):
    """Its sandboxes stay until the test is done: `destroy` hangs, or raises."""

    raises = False
    kept: list[str]

    async def launch(self, request: LaunchRequest) -> Launched:
        launched = await super().launch(request)
        self.kept = sorted(self._children)
        return launched

    async def destroy(self, launched: Launched) -> None:
        if self.raises:
            raise LaunchError("the engine does not answer")
        await asyncio.Event().wait()

    async def stop(self, give_up: asyncio.Event | None = None, *, keep: bool = False) -> list[str]:
        left = sorted(self._children)
        if give_up is not None:
            await give_up.wait()
        await super().stop()
        return left


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[StuckLauncher]:
    launchers: list[StuckLauncher] = []

    async def make(kind: str, runtime: RuntimeRoot, *, parent: Any) -> StuckLauncher:
        launchers.append(StuckLauncher(runtime, parent=parent))
        return launchers[0]

    root = Path(server.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{root}{os.pathsep}{root / 'kernel-images'}")
    monkeypatch.setattr(server, "make_launcher", make)
    monkeypatch.setattr(patience, "REMOVAL_SECONDS", 1.0)
    monkeypatch.setattr(patience, "HURRIED_SECONDS", 0.1)
    return launchers


@asynccontextmanager
async def started(directory: Path) -> AsyncIterator[Gateway]:
    app = GatewayApp()
    app.configure(
        [
            "--port=0",
            f"--data-dir={directory / 'data'}",
            f"--GatewayApp.runtime_dir={directory / 'run'}",
            "--GatewayApp.api_key=configured-key",
            "--GatewayApp.drain_timeout=0.2",
            "--PoolSettings.min_size=1",
        ]
    )
    found = app.gateway(lambda _: None)
    await found.start()
    try:
        yield found
    finally:
        await found.stop()


async def warm(gateway: Gateway) -> None:
    async with asyncio.timeout(15):
        while gateway.pools["python"].describe()["warm"] < 1:  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("raises", [False, True])
async def test_a_stop_is_bounded_and_says_what_stays(
    directory: Path, made: list[StuckLauncher], raises: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with started(directory) as gateway:
        await warm(gateway)
        made[0].raises = raises
        began = time.monotonic()
        await gateway.stop()
        assert 1.0 <= time.monotonic() - began < 5
        assert gateway.left == made[0].kept
        told = [record.getMessage() for record in caplog.records if "the next start removes" in record.getMessage()]
        assert len(told) == 1 and gateway.left[0] in told[0]


async def test_a_stop_while_the_first_sandbox_starts_is_bounded(directory: Path, made: list[StuckLauncher]) -> None:
    async with started(directory) as gateway:
        while not made[0]._children:  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.01)
        began = time.monotonic()
        await gateway.stop()
        assert time.monotonic() - began < 5


async def test_a_start_that_breaks_off_in_the_recovery_leaves_what_it_took_to_the_next_one(
    directory: Path, made: list[StuckLauncher], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def make(kind: str, runtime: RuntimeRoot, *, parent: Any) -> ProcessLauncher:
        return ProcessLauncher(runtime, parent=parent)

    async def breaks_off(*arguments: Any, **more: Any) -> Recovered:
        await recover(*arguments, **more)
        raise RuntimeError("broken")

    monkeypatch.setattr(server, "make_launcher", make)
    async with started(directory) as gateway:
        await warm(gateway)
        gateway.keep = True
    assert len(gateway.kept) == 1
    with monkeypatch.context() as broken:
        broken.setattr(server, "recover", breaks_off)
        with pytest.raises(RuntimeError, match="broken"):
            async with started(directory):
                pass
    async with started(directory) as following:
        assert [sandbox.id for sandbox in following.pools["python"].warm] == gateway.kept


async def test_a_second_ctrl_c_ends_the_waiting_for_removals(
    directory: Path, made: list[StuckLauncher], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started(directory) as gateway:
        monkeypatch.setattr(patience, "REMOVAL_SECONDS", 12.0)
        await warm(gateway)
        stopping = asyncio.create_task(gateway.stop())
        await asyncio.sleep(0.5)
        assert not stopping.done()
        gateway.hurry.set()
        async with asyncio.timeout(5):
            await stopping


async def test_a_configured_key_can_be_read_by_the_printed_command_until_the_stop(
    directory: Path, made: list[StuckLauncher]
) -> None:
    async with started(directory) as gateway:
        header = _key_header(gateway)
        shell = await asyncio.create_subprocess_shell(f"printf %s {header}", stdout=asyncio.subprocess.PIPE)
        assert (await shell.communicate())[0] == b"x-api-key: configured-key"
        (path,) = gateway.runtime.path.glob("*/api-key")
        assert path.stat().st_mode & 0o777 == 0o600
        assert "configured-key" not in header
        await gateway.stop()
        assert not path.exists()
        assert not list(gateway.settings.data_directory.glob("*key*"))


@pytest.mark.parametrize("hangs", [False, True])
async def test_the_docker_launcher_leaves_what_its_engine_does_not_remove(
    directory: Path, hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = DockerLauncher(RuntimeRoot.open(directory))
    owner = launcher.runtime.owner_directory()

    def clear(sandbox_id: str) -> None:
        if hangs:
            time.sleep(1.5)
        raise docker.errors.DockerException("the engine is away")

    monkeypatch.setattr(launcher, "_clear", clear)
    launcher._owner = owner
    launcher._calls.start("unix:///nowhere", 1)
    threads = launcher._calls._threads
    assert threads is not None
    image = KernelImage("python", "python", "Python", Path("."), "base")
    launcher._containers["0" * 16] = Container("0" * 16, image)
    give_up = asyncio.Event()
    asyncio.get_running_loop().call_later(0.3, give_up.set)
    async with asyncio.timeout(1):
        assert await launcher.stop(give_up) == ["0" * 16]
    threads.shutdown()
    (dead,) = launcher.runtime.dead_owners()
    assert dead.path == owner.path, "its directory is there for who reaps it, and its lock is free"
    dead.close()
