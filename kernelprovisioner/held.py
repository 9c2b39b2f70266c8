"""A sandbox in a holder's hands: claimed through a gateway, or launched cold without one. Both look the same."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kernelprovisioner.claims import (
    RESUME_SECONDS,
    UNKNOWN_SANDBOX,
    ClaimAnswer,
    ClaimConnection,
    ClaimRefused,
    Ending,
    NoGateway,
)
from kernelprovisioner.environment import allowed_in
from kernelprovisioner.images import KernelImage
from kernelprovisioner.launchers.base import Endpoint, Launcher, LaunchError, LaunchRequest
from kernelprovisioner.sandbox import ClaimError, ClaimRequest, Sandbox
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from kernelprovisioner.sandboxes import Sandboxes
from kernelprovisioner.supervisor import SupervisorError
from kernelprovisioner.wire import first_of

_LAUNCH_SECONDS = 120.0
_RESUME_PAUSE = 0.2
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """What a kernel asks of its sandbox."""

    image: str
    kernel_id: str
    key: bytes
    env: Mapping[str, str]
    mount: Path | None = None
    session_name: str | None = None
    notice: str | None = None
    hold_ms: int = 0
    timeout: float = 120.0


class HeldSandbox(Protocol):
    """One claimed sandbox. `source` says where it came from: gateway-warm, gateway-cold, gateway-started or cold."""

    sandbox_id: str
    container_id: str
    directory: Path
    channels: Mapping[str, Endpoint]
    transport: str
    source: str
    ended: asyncio.Future[Ending]

    async def request(
        self, op: str, body: bytes = b"", *, timeout: float = 30.0, **fields: Any
    ) -> tuple[dict[str, Any], bytes]:
        """Ask its supervisor. Raises SupervisorError."""
        ...

    async def release(self) -> None:
        """Give it up. Returns when nothing of it is ours any more."""
        ...


class GatewaySandbox:
    """A sandbox of a gateway's pool."""

    def __init__(self, path: Path, connection: ClaimConnection, answer: ClaimAnswer) -> None:
        self._path = path
        self._connection = connection
        self._answer = answer
        self._released = False
        self.sandbox_id = answer.sandbox_id
        self.container_id = answer.container_id
        self.directory = answer.directory
        self.channels: Mapping[str, Endpoint] = answer.channels
        self.transport = answer.transport
        self.source = f"gateway-{answer.source}"
        self.ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        #: done when the present connection has been replaced by another one
        self._replaced: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watching = asyncio.create_task(self._watch(), name=f"claim of {answer.sandbox_id}")

    @classmethod
    async def claim(cls, path: Path, wanted: Wanted) -> GatewaySandbox:
        """Raises NoGateway where none serves `path`, ClaimRefused."""
        connection = await ClaimConnection.connect(path)
        try:
            answer = await connection.claim(
                image=wanted.image,
                kernel_id=wanted.kernel_id,
                key=wanted.key,
                env=wanted.env,
                timeout=wanted.timeout,
                mount=str(wanted.mount) if wanted.mount is not None else None,
                hold_ms=wanted.hold_ms,
                notice=wanted.notice,
                session_name=wanted.session_name,
            )
        except BaseException:
            connection.close()
            raise
        return cls(path, connection, answer)

    async def request(
        self, op: str, body: bytes = b"", *, timeout: float = 30.0, **fields: Any
    ) -> tuple[dict[str, Any], bytes]:
        """As HeldSandbox.request; while the gateway is away it waits for the next one, within `timeout`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while True:
            connection, replaced = self._connection, self._replaced
            left = max(0.0, deadline - loop.time())
            if not connection.gone.done():
                try:
                    return await connection.request(op, body, timeout=left, **fields)
                except SupervisorError:
                    # A signal may have arrived before the connection broke; all else may be asked for twice.
                    if op == "signal" or not connection.gone.done():
                        raise
            await first_of(replaced, self.ended, timeout=left)
            if not replaced.done():
                raise SupervisorError(f"the gateway at {self._path} is away: {op!r} could not be asked for")

    async def release(self) -> None:
        if self._released:
            return
        self._released = True
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        await self._connection.release()
        if not self.ended.done():
            self.ended.set_result(Ending(SandboxExit(ExitCause.REQUESTED)))

    async def _watch(self) -> None:
        while True:
            connection = self._connection
            await first_of(connection.ended, connection.gone)
            if connection.ended.done():
                self.ended.set_result(connection.ended.result())
                return
            if not await self._resume():
                self.ended.set_result(Ending(SandboxExit(ExitCause.GATEWAY)))
                return

    async def _resume(self) -> bool:
        """Come back to the sandbox within the time that a gateway keeps it; return whether that worked."""
        deadline = time.monotonic() + RESUME_SECONDS
        _log.warning("the connection to the gateway at %s broke; trying to take it up again", self._path)
        while time.monotonic() < deadline:
            try:
                connection = await ClaimConnection.connect(self._path)
            except NoGateway:
                await asyncio.sleep(_RESUME_PAUSE)
                continue
            try:
                await connection.resume(self.sandbox_id, self._answer.token)
            except NoGateway:
                connection.close()
                await asyncio.sleep(_RESUME_PAUSE)
                continue
            except ClaimRefused as error:
                connection.close()
                if error.code != UNKNOWN_SANDBOX:
                    await asyncio.sleep(_RESUME_PAUSE)
                    continue
                _log.warning("the gateway does not have the sandbox any more: %s", error)
                return False
            except BaseException:
                connection.close()
                raise
            self._connection = connection
            replaced, self._replaced = self._replaced, asyncio.get_running_loop().create_future()
            replaced.set_result(None)
            _log.warning("sandbox %s is held by the gateway at %s again", self.sandbox_id, self._path)
            return True
        return False


class OwnSandbox:
    """A sandbox that was launched cold for one kernel, with a launcher of its own."""

    source = "cold"

    def __init__(self, sandboxes: Sandboxes, sandbox: Sandbox) -> None:
        self._sandboxes = sandboxes
        self._sandbox = sandbox
        launched = sandbox.launched
        self.sandbox_id = sandbox.id
        self.container_id = sandbox.container_id
        self.directory = launched.directory
        self.channels: Mapping[str, Endpoint] = launched.channels
        self.transport = launched.transport
        self.ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        sandbox.exited.add_done_callback(self._has_ended)

    @classmethod
    async def launch(cls, launcher: Launcher, image: KernelImage, wanted: Wanted) -> OwnSandbox:
        """Raises LaunchError (EngineUnavailable), and then nothing is left."""
        sandboxes = Sandboxes(launcher)
        try:
            await sandboxes.start()
            request = LaunchRequest(secrets.token_hex(8), image, wanted.mount)
            sandbox = await sandboxes.launch(request, timeout=min(wanted.timeout, _LAUNCH_SECONDS))
            claim = ClaimRequest(
                wanted.kernel_id,
                wanted.key,
                allowed_in(image, wanted.env),
                session_name=wanted.session_name,
                notice=wanted.notice,
                hold_ms=wanted.hold_ms,
            )
            try:
                await sandbox.claim(claim)
            except ClaimError as error:
                raise LaunchError(await sandbox.with_cause(error)) from None
            await sandbox.hand_over()
        except BaseException:
            await sandboxes.stop()
            raise
        return cls(sandboxes, sandbox)

    async def request(
        self, op: str, body: bytes = b"", *, timeout: float = 30.0, **fields: Any
    ) -> tuple[dict[str, Any], bytes]:
        return await self._sandbox.supervisor.request(op, body, timeout=timeout, **fields)

    async def release(self) -> None:
        await self._sandbox.destroy(SandboxExit(ExitCause.REQUESTED))
        await self._sandboxes.stop()

    def _has_ended(self, exited: asyncio.Future[SandboxExit]) -> None:
        if not self.ended.done():
            kernel_exit = self._sandbox.kernel_exit
            self.ended.set_result(Ending(exited.result(), kernel_exit.unsent if kernel_exit is not None else ()))


async def signal(held: HeldSandbox, signum: int) -> None:
    """Send a signal to the kernel's process group; one whose sandbox is gone needs none."""
    try:
        await held.request("signal", timeout=5.0, signum=signum)
    except SupervisorError as error:
        _log.info("signal %d was not delivered: %s", signum, error)
