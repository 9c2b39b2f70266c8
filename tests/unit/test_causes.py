"""Which cause a sandbox's end is put down to, by what its supervisor, its engine and its channels tell, and when."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from kernelprovisioner import causes
from kernelprovisioner.images import find_image
from kernelprovisioner.launchers.base import Endpoint, Launched
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from kernelprovisioner.supervisor import KernelExit, SupervisorError

LIMIT_MB = find_image("python").limits.container_memory_mb


class Scene:
    """A sandbox's supervisor, launcher and channels, as far as the cause is asked of them."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[KernelExit] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self.container_ended: asyncio.Future[SandboxExit] = loop.create_future()
        self.available = True
        self.out_of_memory = False
        self.stats: dict[str, Any] | None = {}

    async def request(self, op: str, *, timeout: float) -> tuple[dict[str, Any], bytes]:
        if self.stats is None:
            raise SupervisorError("the supervisor's stream is closed")
        return self.stats, b""

    def was_out_of_memory(self, launched: Launched, within: float) -> bool:
        return self.out_of_memory

    async def cause(self, *, heard: bool = True) -> SandboxExit:
        nowhere = Endpoint(path=Path("/nowhere"))
        launched = Launched("a" * 16, find_image("python"), "c", Path("/nowhere"), "/mnt", b"k", "t", nowhere, {})
        return await asyncio.wait_for(
            causes.find_cause(
                launched, cast(Any, self), self.closed, self.container_ended, cast(Any, self), heard=heard
            ),
            10,
        )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_EVIDENCE_SECONDS", "_NEWS_SECONDS", "_ENGINE_SECONDS"):
        monkeypatch.setattr(causes, name, 0.1)


async def test_the_engines_word_comes_first() -> None:
    scene = Scene()
    scene.exited.set_result(KernelExit(None, 9))
    asyncio.get_running_loop().call_later(0.02, scene.container_ended.set_result, SandboxExit(ExitCause.REMOVED))
    assert (await scene.cause()).cause is ExitCause.REMOVED


@pytest.mark.parametrize(
    ("code", "signum", "cause"),
    [(3, None, ExitCause.EXITED), (0, None, ExitCause.EXITED), (None, 11, ExitCause.SIGNAL)],
)
@pytest.mark.parametrize("available", [True, False])
async def test_what_a_kernel_did_to_itself(code: int, signum: int, cause: ExitCause, available: bool) -> None:
    scene = Scene()
    scene.available = available
    scene.exited.set_result(KernelExit(code, signum))
    found = await scene.cause()
    assert (found.cause, found.exit_code, found.signal) == (cause, code, signum)


async def test_out_of_memory_by_the_engines_event() -> None:
    scene = Scene()
    scene.out_of_memory, scene.stats = True, {"memory_peak": 100 * 2**20}
    scene.exited.set_result(KernelExit(None, 9))
    found = await scene.cause()
    assert found.cause is ExitCause.OUT_OF_MEMORY and found.evidence == {"limit_mb": LIMIT_MB, "peak_mb": 100}


@pytest.mark.parametrize(
    ("stats", "cause"),
    [
        ({"oom_kills": 1, "memory_peak": 2**20}, ExitCause.OUT_OF_MEMORY),
        ({"oom_kills": 0}, ExitCause.SIGNAL),
        ({"oom_kills": "many"}, ExitCause.SIGNAL),
        (None, ExitCause.SIGNAL),
    ],
)
@pytest.mark.parametrize(("available", "heard"), [(False, True), (True, False)])
async def test_where_no_engine_told_us_the_sandboxes_own_count_tells_out_of_memory(
    stats: dict[str, Any] | None, cause: ExitCause, available: bool, heard: bool
) -> None:
    scene = Scene()
    scene.available, scene.stats = available, stats
    scene.exited.set_result(KernelExit(None, 9))
    assert (await scene.cause(heard=heard)).cause is cause


@pytest.mark.parametrize("signum", [9, 15])
async def test_an_engine_that_went_took_pid_1_as_well(signum: int) -> None:
    scene = Scene()
    scene.exited.set_result(KernelExit(None, signum))
    loop = asyncio.get_running_loop()
    loop.call_later(0.02, scene.gone.set_result, None)
    loop.call_later(0.04, setattr, scene, "available", False)
    assert (await scene.cause()).cause is ExitCause.ENGINE


@pytest.mark.parametrize("told", [True, False])
async def test_a_supervisor_that_was_told_to_end_waits_for_the_engines_word(
    told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causes, "_ENGINE_SECONDS", 0.5)
    scene = Scene()
    scene.exited.set_result(KernelExit(None, 9, stopped=True))
    if told:
        engine = SandboxExit(ExitCause.ENGINE)
        asyncio.get_running_loop().call_later(0.3, scene.container_ended.set_result, engine)
    assert (await scene.cause()).cause is (ExitCause.ENGINE if told else ExitCause.REMOVED)


async def test_a_stream_that_ends_without_a_word_while_the_engine_is_away() -> None:
    scene = Scene()
    scene.available = False
    scene.gone.set_result(None)
    assert (await scene.cause()).cause is ExitCause.ENGINE


async def test_a_sandbox_that_breaks_the_protocol_is_no_fault_of_an_engine_that_is_away() -> None:
    scene = Scene()
    scene.available = False
    scene.closed.set_result(None)
    assert (await scene.cause()).cause is ExitCause.PROTOCOL
