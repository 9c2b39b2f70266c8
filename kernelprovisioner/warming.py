"""Warming: from a container that runs to a kernel that has proved itself, or the reason why it did not."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from kernelprovisioner.launchers.base import LaunchError
from kernelprovisioner.sandbox_exit import SandboxExit
from kernelprovisioner.supervisor import KernelExit
from kernelprovisioner.wire import KernelWire, Message, first_of

_KERNEL_INFO_SECONDS = 60.0
#: A kernel's first status messages get lost until its subscription stands, so the silent execute is tried again.
_SILENT_EXECUTE_SECONDS = 1.0

T = TypeVar("T")


async def prove(wire: KernelWire) -> None:
    """Return once the kernel has answered `kernel_info_request` and a silent cell. Raises WireError, TimeoutError."""
    await wire.request("control", "kernel_info_request", {}, timeout=_KERNEL_INFO_SECONDS)
    await _silent_execute(wire)


async def unless_ended(
    work: Coroutine[Any, Any, T],
    container_ended: asyncio.Future[SandboxExit],
    kernel_ended: asyncio.Future[KernelExit] | None = None,
) -> T:
    """Return what `work` returns. Raises LaunchError as soon as the sandbox has ended instead."""
    task = asyncio.ensure_future(work)
    try:
        await first_of(task, container_ended, *([kernel_ended] if kernel_ended is not None else []))
        if task.done():
            return task.result()
        if container_ended.done():
            ended = container_ended.result()
            reason = ended.evidence.get("reason", "")
            raise LaunchError(f"the sandbox ended before it was ready: {ended} {reason}".rstrip())
        assert kernel_ended is not None
        raise LaunchError(f"the kernel ended before it was ready: {_last_words(kernel_ended.result())}")
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def _last_words(kernel_exit: KernelExit) -> str:
    how = f"exit code {kernel_exit.code}" if kernel_exit.signal is None else f"signal {kernel_exit.signal}"
    text = "".join(record["text"] for record in kernel_exit.unsent if record["kind"] == "text").strip()
    return f"{how}: {text[-2000:]}" if text else how


async def _silent_execute(wire: KernelWire) -> None:
    """Run one silent cell; returns once its reply and its idle status came, so that every channel is proved to work."""
    content = {
        "code": "pass",
        "silent": True,
        "store_history": False,
        "user_expressions": {},
        "allow_stdin": False,
        "stop_on_error": True,
    }
    while True:
        seen: set[str] = set()
        complete = asyncio.Event()

        def take(message: Message, seen: set[str] = seen, complete: asyncio.Event = complete) -> None:
            if message.msg_type == "execute_reply":
                seen.add("reply")
            elif message.msg_type == "status" and message.content.get("execution_state") == "idle":
                seen.add("idle")
            if len(seen) == 2:
                complete.set()

        msg_id = wire.new_id()
        wire.listen(msg_id, take)
        try:
            wire.send("shell", "execute_request", content, msg_id=msg_id)
            async with asyncio.timeout(_SILENT_EXECUTE_SECONDS):
                await complete.wait()
        except TimeoutError:
            continue
        finally:
            wire.unlisten(msg_id)
        return
