"""Adoption: connecting again to a sandbox that an earlier gateway started, or the reason why that cannot be."""

from __future__ import annotations

import asyncio

from kernelprovisioner.launchers.base import Launched, LaunchError
from kernelprovisioner.records import SandboxRecord
from kernelprovisioner.sandbox_exit import SandboxExit
from kernelprovisioner.supervisor import SupervisorClient, SupervisorError
from kernelprovisioner.warming import unless_ended
from kernelprovisioner.wire import CHANNELS, KernelWire, Unfinished, WireError, first_of

#: the kind of a record's holder that is a provisioner in another process
PROVISIONER = "provisioner"


async def reconnect(
    record: SandboxRecord,
    launched: Launched,
    container_ended: asyncio.Future[SandboxExit],
    unfinished: Unfinished,
    *,
    timeout: float,
) -> tuple[SupervisorClient, KernelWire]:
    """Return the connections of a sandbox that runs, within `timeout` seconds. Raises LaunchError.

    The kernel of a claimed one may have ended meanwhile: `exited` of its supervisor tells why, and its wire is closed.
    """
    deadline = asyncio.get_running_loop().time() + timeout
    try:
        supervisor = await unless_ended(
            SupervisorClient.connect(launched.supervisor, launched.token, timeout=timeout), container_ended
        )
    except SupervisorError as error:
        raise LaunchError(f"sandbox {record.sandbox_id} cannot be taken over: {error}") from None
    try:
        # Its answer comes after the news of a kernel that has ended.
        await unless_ended(supervisor.request("stats", timeout=_left(deadline)), container_ended)
        return supervisor, await _wire(record, launched, supervisor, container_ended, unfinished, _left(deadline))
    except BaseException as error:
        supervisor.close()
        if isinstance(error, SupervisorError | WireError):
            raise LaunchError(f"sandbox {record.sandbox_id} cannot be taken over: {error}") from None
        raise


async def _wire(
    record: SandboxRecord,
    launched: Launched,
    supervisor: SupervisorClient,
    container_ended: asyncio.Future[SandboxExit],
    unfinished: Unfinished,
    timeout: float,
) -> KernelWire:
    # A holder in another process has the other channels.
    names = ("control",) if record.holder.get("kind") == PROVISIONER else CHANNELS
    if record.state == "claimed" and supervisor.exited.done():
        return await _closed_wire(launched)
    connecting = asyncio.ensure_future(
        unless_ended(
            KernelWire.connect(launched.channels, launched.key, timeout=timeout, names=names, unfinished=unfinished),
            container_ended,
        )
    )
    try:
        await first_of(connecting, supervisor.exited)
        if connecting.done():
            return connecting.result()
        if record.state == "claimed":
            return await _closed_wire(launched)
        raise LaunchError(f"sandbox {record.sandbox_id} is gone: its kernel has ended")
    finally:
        if not connecting.done():
            connecting.cancel()
            await asyncio.gather(connecting, return_exceptions=True)


async def _closed_wire(launched: Launched) -> KernelWire:
    """Return the wire of a kernel that has ended: every channel of it is closed."""
    wire = await KernelWire.connect(launched.channels, launched.key, timeout=1.0, names=())
    await wire.close()
    return wire


def _left(deadline: float) -> float:
    return max(0.1, deadline - asyncio.get_running_loop().time())
