"""Sandboxes: all sandboxes of one launcher: starts them, takes them over, hears how they end, knows which live."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from kernelprovisioner.adoption import reconnect
from kernelprovisioner.causes import ended_from_outside
from kernelprovisioner.exit_log import ExitLog
from kernelprovisioner.images import KernelImage
from kernelprovisioner.launchers.base import Launched, Launcher, LaunchError, LaunchRequest
from kernelprovisioner.patience import all_done, end
from kernelprovisioner.records import RecordStore, SandboxRecord
from kernelprovisioner.sandbox import Sandbox
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from kernelprovisioner.supervisor import SupervisorClient, SupervisorError
from kernelprovisioner.warming import unless_ended
from kernelprovisioner.wire import KernelWire, Unfinished, WireError

#: An engine that is away is asked so often to remove a sandbox; after that the launcher's own reaping has to.
_REMOVAL_ATTEMPTS = 10
_REMOVAL_PAUSE_SECONDS = 1.0

_log = logging.getLogger(__name__)


class Sandboxes:
    """All sandboxes of one launcher: starts them, hears how they end, and knows which live."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        #: how sandboxes ended
        self.exits = ExitLog()
        self._container_ended: dict[str, asyncio.Future[SandboxExit]] = {}
        self._records: RecordStore | None = None
        #: whether warm and claimed sandboxes outlive us, see `keep_all`
        self.keeping = False
        self._live: dict[str, Sandbox] = {}
        self._unfinished = Unfinished()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def live(self) -> list[Sandbox]:
        """Every sandbox that was started and whose container is not yet confirmed to be gone."""
        return list(self._live.values())

    @property
    def records(self) -> RecordStore:
        """The records of our owner directory. Raises RuntimeError before `start()`."""
        if self._records is None:
            raise RuntimeError("the sandboxes' launcher is not started")
        return self._records

    async def start(self, *, resume: bool = False) -> None:
        """With `resume` what a dead gateway left stays until `adopt` and `settle`. Raises EngineUnavailable."""
        await self.launcher.start(self._ended, resume=resume)
        self._records = RecordStore(self.launcher.owner)

    async def recoverable(self) -> list[SandboxRecord]:
        """Return the records of the gateway as whose owner we continue, oldest first: adopt or discard each."""
        return [record for record in await self.records.read() if record.sandbox_id not in self._container_ended]

    async def adopt(self, record: SandboxRecord, image: KernelImage, *, timeout: float) -> Sandbox:
        """Return the sandbox of a record, warm or claimed as it was; `timeout` in seconds. Raises LaunchError.

        A warm one has answered a probe. A claimed one has not been asked, since its cell may keep Python's lock; one
        whose kernel has ended meanwhile is returned, and its `exited` tells why. One that fails is being removed.
        """
        launched = record.launched(image, self.launcher.owner.path)
        if record.sandbox_id in self._container_ended:
            raise LaunchError(f"sandbox {record.sandbox_id} is here already")
        ended: asyncio.Future[SandboxExit] = asyncio.get_running_loop().create_future()
        self._container_ended[record.sandbox_id] = ended
        deadline = asyncio.get_running_loop().time() + timeout
        try:
            await self.launcher.adopt(launched)
            if not launched.directory.is_dir():
                raise LaunchError(f"sandbox {record.sandbox_id} cannot be taken over: its directory is gone")
            supervisor, wire = await reconnect(record, launched, ended, self._unfinished, timeout=timeout)
            try:
                sandbox = Sandbox(launched, supervisor, wire, self)
                await sandbox.become(record, max(0.1, deadline - asyncio.get_running_loop().time()))
            except BaseException:
                await wire.close()
                supervisor.close()
                raise
        except BaseException as error:
            self._container_ended.pop(record.sandbox_id, None)
            # Whatever a damaged record brings about.
            if isinstance(error, Exception):
                self.run(self.launcher.discard(record.sandbox_id))
            raise
        self._live[sandbox.id] = sandbox
        self.run(sandbox.watch(ended))
        return sandbox

    async def discard(self, record: SandboxRecord) -> None:
        """Remove a sandbox that is not adopted, with its record; what cannot be removed yet is tried again later."""
        self.records.remove(record.sandbox_id)
        await self.launcher.discard(record.sandbox_id)

    async def settle(self) -> None:
        """After recovery: everything of our owner that lives in no `Sandbox` is removed. Call it once."""
        self.records.remove_all_but(self._container_ended.keys())
        await self.launcher.settle()

    def keep_all(self) -> None:
        """From now on, whoever destroys a living sandbox only lets go of it: it stays for the gateway that comes next.

        Nothing else stays: not what is starting, nor what has ended.
        """
        self.keeping = True

    async def launch(self, request: LaunchRequest, *, timeout: float = 60.0) -> Sandbox:
        """Return a warm sandbox. Raises LaunchError, and then nothing of it is left."""
        ended: asyncio.Future[SandboxExit] = asyncio.get_running_loop().create_future()
        self._container_ended[request.sandbox_id] = ended
        try:
            launched = await self.launcher.launch(request)
        except BaseException as error:
            self._note_failed_start(request.image, error)
            del self._container_ended[request.sandbox_id]
            raise
        try:
            return await self._warm_up(launched, ended, timeout)
        except BaseException as error:
            self._note_failed_start(request.image, error)
            # Shielded: the container exists, so it has to go even when we are being cancelled.
            await asyncio.shield(self.run(self._abandon(launched)))
            raise

    def _note_failed_start(self, image: KernelImage, error: BaseException) -> None:
        # One that is not wanted any more has not failed.
        if not isinstance(error, asyncio.CancelledError):
            self.exits.add_failed_start(image.name)

    async def stop(self, give_up: asyncio.Event | None = None) -> list[str]:
        """Destroy every sandbox that lives and stop the launcher; after `keep_all` let go of them.

        Once `give_up` is set no removal is waited for. Returns the sandboxes that stay; the next start reaps them.
        """
        for sandbox in self.live:
            self.run(self._end_at_stop(sandbox))
        while self._tasks and await all_done(self._tasks, give_up):
            pass
        await end(self._tasks)
        if self._records is not None:
            await self._records.close()
        left = await self.launcher.stop(give_up, keep=self.keeping)
        if left and not self.keeping:
            _log.warning(
                "not confirmed as removed, so that the next start removes what is left of them: the sandboxes %s",
                ", ".join(left),
            )
        return left

    def run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run small work of a sandbox's life in a task that is owned here."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def forget(self, sandbox: Sandbox) -> None:
        """The sandbox's container is confirmed to be gone."""
        self._live.pop(sandbox.id, None)
        ended = self._container_ended.pop(sandbox.id, None)
        if ended is not None:
            ended.cancel()

    async def _warm_up(self, launched: Launched, ended: asyncio.Future[SandboxExit], timeout: float) -> Sandbox:
        supervisor: SupervisorClient | None = None
        wire: KernelWire | None = None
        try:
            async with asyncio.timeout(timeout):
                supervisor = await unless_ended(
                    SupervisorClient.connect(launched.supervisor, launched.token, timeout=timeout), ended
                )
                connecting = KernelWire.connect(
                    launched.channels, launched.key, timeout=timeout, unfinished=self._unfinished
                )
                wire = await unless_ended(connecting, ended, supervisor.exited)
                sandbox = Sandbox(launched, supervisor, wire, self)
                await unless_ended(sandbox.warm(), ended, supervisor.exited)
        except BaseException as error:
            if wire is not None:
                await wire.close()
            if supervisor is not None:
                supervisor.close()
            if isinstance(error, TimeoutError):
                raise LaunchError(f"the sandbox was not ready within {timeout:g} s") from None
            if not isinstance(error, WireError | SupervisorError | LaunchError):
                raise
            outside = await ended_from_outside(ended, self.launcher)
            if outside is not None and outside.cause in (ExitCause.ENGINE, ExitCause.REMOVED):
                raise LaunchError(f"the sandbox ended before it was ready: {outside}") from None
            if isinstance(error, LaunchError):
                raise
            raise LaunchError(f"the sandbox could not be made ready: {error}") from None
        self._live[sandbox.id] = sandbox
        self.run(sandbox.watch(ended))
        return sandbox

    async def _abandon(self, launched: Launched) -> None:
        """Remove what nobody got; as long as it may exist, whoever started it is told nothing, and it counts."""
        self.records.remove(launched.sandbox_id)
        for attempt in range(_REMOVAL_ATTEMPTS):
            try:
                await self.launcher.destroy(launched)
                break
            except LaunchError as error:
                _log.warning(
                    "sandbox %s could not be removed (attempt %d): %s", launched.sandbox_id, attempt + 1, error
                )
                await asyncio.sleep(_REMOVAL_PAUSE_SECONDS)
        ended = self._container_ended.pop(launched.sandbox_id, None)
        if ended is not None:
            ended.cancel()

    async def _end_at_stop(self, sandbox: Sandbox) -> None:
        try:
            await sandbox.destroy(SandboxExit(ExitCause.GATEWAY))
        except Exception as error:
            # The launcher tries once more; what stays then is told in one line.
            _log.debug("sandbox %s could not be removed: %s", sandbox.id, error)

    def _ended(self, sandbox_id: str, cause: SandboxExit) -> None:
        ended = self._container_ended.get(sandbox_id)
        if ended is not None and not ended.done():
            ended.set_result(cause)
