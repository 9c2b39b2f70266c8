"""Why a sandbox ends: what the engine says comes before what the sandbox says of itself."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

from kernelprovisioner.launchers.base import Launched, Launcher
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from kernelprovisioner.supervisor import KernelExit, SupervisorClient, SupervisorError
from kernelprovisioner.wire import first_of

#: How long an engine's `oom` event, or the end of PID 1, may come after the kernel process was seen dead.
_EVIDENCE_SECONDS = 0.5
#: How long before the kernel's end the engine's `oom` event may have come.
_OUT_OF_MEMORY_SECONDS = 1.5
#: How long the news of a kernel's end may come after its channels closed.
_NEWS_SECONDS = 2.0
#: How long the engine's word may come after PID 1 went, or was told to go: a busy one has many to tell of.
_ENGINE_SECONDS = 5.0
#: An engine that stops its containers sends one of these.
_ENGINE_SIGNALS = (signal.SIGKILL, signal.SIGTERM)


async def find_cause(
    launched: Launched,
    supervisor: SupervisorClient,
    closed: asyncio.Future[Any],
    container_ended: asyncio.Future[SandboxExit],
    launcher: Launcher,
    *,
    heard: bool = True,
) -> SandboxExit:
    """Return why a sandbox ended, once it has.

    `closed` is done when its channels are closed, `container_ended` has the engine's verdict. Not `heard`: nobody
    listened to the engine when its kernel ended.
    """
    await first_of(supervisor.exited, supervisor.gone, container_ended, closed)
    if not supervisor.exited.done() and not container_ended.done():
        await first_of(supervisor.exited, container_ended, timeout=_NEWS_SECONDS)
    if container_ended.done():
        return container_ended.result()
    if supervisor.exited.done():
        return await _of_kernel(launched, supervisor, supervisor.exited.result(), container_ended, launcher, heard)
    if supervisor.gone.done() and not launcher.available:
        return SandboxExit(ExitCause.ENGINE)
    return SandboxExit(ExitCause.PROTOCOL)


async def _of_kernel(
    launched: Launched,
    supervisor: SupervisorClient,
    ended: KernelExit,
    container_ended: asyncio.Future[SandboxExit],
    launcher: Launcher,
    heard: bool,
) -> SandboxExit:
    if ended.signal not in _ENGINE_SIGNALS:
        cause = ExitCause.EXITED if ended.signal is None else ExitCause.SIGNAL
        return SandboxExit(cause, ended.code, ended.signal)
    loop = asyncio.get_running_loop()
    began = loop.time()
    while not container_ended.done():
        from_outside = ended.stopped or supervisor.gone.done()
        if loop.time() - began > (_ENGINE_SECONDS if from_outside else _EVIDENCE_SECONDS):
            break
        if launcher.was_out_of_memory(launched, within=_OUT_OF_MEMORY_SECONDS):
            usage = await _usage(supervisor)
            return SandboxExit(ExitCause.OUT_OF_MEMORY, None, ended.signal, _memory_evidence(launched, usage))
        if supervisor.gone.done() and not launcher.available:
            # PID 1 went as well, and there is no engine of which somebody could have asked it.
            return SandboxExit(ExitCause.ENGINE)
        await asyncio.sleep(0.01)
    if container_ended.done():
        return container_ended.result()
    if not (heard and launcher.available) and ended.signal == signal.SIGKILL:
        # No engine told us: then the sandbox's own count has to do.
        usage = await _usage(supervisor)
        if _is_positive(usage.get("oom_kills")):
            return SandboxExit(ExitCause.OUT_OF_MEMORY, None, ended.signal, _memory_evidence(launched, usage))
    if ended.stopped or supervisor.gone.done():
        # Who ends a kernel only leaves PID 1.
        return SandboxExit(ExitCause.REMOVED, None, ended.signal)
    return SandboxExit(ExitCause.SIGNAL, None, ended.signal)


async def ended_from_outside(container_ended: asyncio.Future[SandboxExit], launcher: Launcher) -> SandboxExit | None:
    """Return how a sandbox that has just failed was ended from outside; None where nothing is known of that."""
    away = not launcher.available
    await first_of(container_ended, timeout=_NEWS_SECONDS)
    if container_ended.done():
        return container_ended.result()
    return SandboxExit(ExitCause.ENGINE) if away or not launcher.available else None


async def _usage(supervisor: SupervisorClient) -> dict[str, Any]:
    try:
        usage, _ = await supervisor.request("stats", timeout=_EVIDENCE_SECONDS)
    except SupervisorError:
        return {}
    return usage


def _memory_evidence(launched: Launched, usage: dict[str, Any]) -> dict[str, Any]:
    evidence: dict[str, Any] = {"limit_mb": launched.image.limits.container_memory_mb}
    peak = usage.get("memory_peak")
    if isinstance(peak, int) and _is_positive(peak):
        evidence["peak_mb"] = round(peak / 2**20)
    return evidence


def _is_positive(value: object) -> bool:
    """Whether it is a number from 1 to what a machine can have: sandboxes tell it."""
    return isinstance(value, int) and 0 < value < 2**50
