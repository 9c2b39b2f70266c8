"""A holder whose sandbox is gone before it was ready: the error says why, not only that nothing answered."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kernelprovisioner import holder as module
from kernelprovisioner.claims import Ending
from kernelprovisioner.held import Wanted
from kernelprovisioner.holder import KernelHolder
from kernelprovisioner.launchers.base import LaunchError
from kernelprovisioner.runtime import RuntimeRoot
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from kernelprovisioner.wire import WireError

WANTED = Wanted("python", "k", b"key", {})


def held() -> Any:
    async def release() -> None:
        """Nothing to give up."""

    ended = asyncio.get_running_loop().create_future()
    return SimpleNamespace(ended=ended, channels={}, transport="ipc", release=release, sandbox_id="0" * 16)


async def failed_start(sandbox: Any, directory: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    async def connect(*_: Any, **__: Any) -> None:
        raise WireError("the kernel's channels could not be connected within 10 s")

    async def make(_: Wanted) -> Any:
        return sandbox

    monkeypatch.setattr(module.KernelMonitor, "connect", connect)
    holder = KernelHolder(RuntimeRoot.open(directory), "k", b"key", None)
    with pytest.raises(LaunchError) as failure:
        await holder.start(make, WANTED)
    await holder.close()
    return str(failure.value)


async def test_the_cause_that_comes_a_little_later_is_told(
    short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = held()
    ending = Ending(SandboxExit(ExitCause.ENGINE))
    asyncio.get_running_loop().call_later(0.05, sandbox.ended.set_result, ending)
    assert str(ending.exit) in await failed_start(sandbox, short_directory / "run", monkeypatch)


async def test_without_a_cause_the_error_is_told(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CAUSE_SECONDS", 0.05)
    assert "could not be connected" in await failed_start(held(), short_directory / "run", monkeypatch)
