"""Sandbox: one running container with one kernel process in it, its life cycle and why it ended."""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import signal
import stat
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from kernelprovisioner.images import KernelImage
from kernelprovisioner.launchers.base import Launched, Launcher, LaunchError, LaunchRequest
from kernelprovisioner.patience import all_done, end
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from kernelprovisioner.supervisor import KernelExit, SupervisorClient, SupervisorError
from kernelprovisioner.warming import prove, unless_ended
from kernelprovisioner.wire import KernelWire, Message, Unfinished, WireError, first_of

#: How long an engine's `oom` event may come after the kernel process was seen dead.
_EVIDENCE_SECONDS = 0.5
#: How long before the kernel's end the engine's `oom` event may have come.
_OUT_OF_MEMORY_SECONDS = 1.5
#: How long the news of a kernel's end may come after its channels closed.
_NEWS_SECONDS = 2.0
_CLAIM_SECONDS = 5.0
#: An engine that is away is asked so often to remove a sandbox; after that the launcher's own reaping has to.
_REMOVAL_ATTEMPTS = 10
_REMOVAL_PAUSE_SECONDS = 1.0
_LAST_USE_SECONDS = 10.0

_log = logging.getLogger(__name__)


class SandboxState(enum.StrEnum):
    """`starting → warm → claimed → gone`; never back (a claimed sandbox is destroyed, never reused)."""

    STARTING = "starting"
    WARM = "warm"
    CLAIMED = "claimed"
    GONE = "gone"


#: The whole life cycle: every state may end in `gone`, nothing else goes back.
TRANSITIONS: dict[SandboxState, frozenset[SandboxState]] = {
    SandboxState.STARTING: frozenset({SandboxState.WARM, SandboxState.GONE}),
    SandboxState.WARM: frozenset({SandboxState.CLAIMED, SandboxState.GONE}),
    SandboxState.CLAIMED: frozenset({SandboxState.GONE}),
    SandboxState.GONE: frozenset(),
}


class ClaimError(Exception):
    """A warm sandbox could not be made personal; it is of no use any more."""


@dataclass(frozen=True)
class ClaimRequest:
    """What makes a warm sandbox personal. `hold_ms`: shell requests wait that long after the first one (restart)."""

    kernel_id: str
    key: bytes
    env: Mapping[str, str] = field(default_factory=dict)
    session_name: str | None = None
    notice: str | None = None
    hold_ms: int = 0


class Sandbox:
    """One sandbox, connected. Made by `Sandboxes.launch`; whoever holds it calls `destroy` in the end."""

    def __init__(
        self, launched: Launched, supervisor: SupervisorClient, wire: KernelWire, sandboxes: Sandboxes
    ) -> None:
        self.launched = launched
        self.supervisor = supervisor
        self.wire = wire
        self.state = SandboxState.STARTING
        self.exited: asyncio.Future[SandboxExit] = asyncio.get_running_loop().create_future()
        #: how the kernel process ended and what output it had not sent, where its supervisor could still tell
        self.kernel_exit: KernelExit | None = None
        #: a holder that still reads the files of a sandbox that ended: `destroy` waits for it, bounded
        self.last_use: asyncio.Future[None] | None = None
        self._sandboxes = sandboxes
        self._destroying: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        return self.launched.sandbox_id

    @property
    def image(self) -> KernelImage:
        return self.launched.image

    @property
    def template(self) -> str | None:
        """What its image was built from, where that is known."""
        return self.launched.template

    @property
    def container_id(self) -> str:
        """The engine's id of the container, or `process:<pid>`."""
        return self.launched.runtime_id

    async def claim(self, request: ClaimRequest) -> None:
        """Make a warm sandbox personal: key, kernel id, environment. Raises ClaimError; then destroy it.

        The kernel answers under the new key, so that the answer itself proves who holds it.
        """
        if self.state is not SandboxState.WARM:
            raise ClaimError(f"sandbox {self.id} is {self.state}, not warm")
        self._move(SandboxState.CLAIMED)
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Message] = loop.create_future()

        def take(message: Message) -> None:
            if message.msg_type == "samovar_claim_reply" and not reply.done():
                reply.set_result(message)

        msg_id = self.wire.new_id()
        self.wire.listen(msg_id, take)
        content = {
            "key": request.key.decode(),
            "kernel_id": request.kernel_id,
            "env": dict(request.env),
            "session_name": request.session_name,
            "notice": request.notice,
            "hold_ms": request.hold_ms,
        }
        try:
            self.wire.send("control", "samovar_claim_request", content, msg_id=msg_id)
            self.wire.rekey(request.key)
            async with asyncio.timeout(_CLAIM_SECONDS):
                await first_of(reply, self.wire.closed, self.exited)
            if not reply.done():
                raise ClaimError(f"sandbox {self.id} died while it was claimed")
            answer = reply.result().content
            if answer.get("status") != "ok":
                raise ClaimError(f"sandbox {self.id} refused its claim: {str(answer.get('evalue'))[:200]}")
        except TimeoutError:
            raise ClaimError(f"sandbox {self.id} did not answer its claim within {_CLAIM_SECONDS:g} s") from None
        except WireError as error:
            raise ClaimError(str(error)) from None
        finally:
            self.wire.unlisten(msg_id)
            reply.cancel()

    async def hand_over(self) -> None:
        """Close our own shell, iopub and stdin channels: somebody else talks to the kernel directly now."""
        await self.wire.close(("shell", "iopub", "stdin"))

    async def interrupt(self) -> None:
        """Interrupt what runs, children included. Raises SupervisorError where the sandbox is gone.

        Through the supervisor: a kernel's own control thread can be starved by the cell that has to be interrupted.
        """
        await self.supervisor.signal(signal.SIGINT)

    async def destroy(self, cause: SandboxExit | None = None) -> None:
        """End the sandbox; returns once its container is confirmed to be gone. Idempotent.

        `cause` is what `exited` tells, unless the sandbox had died by itself before.
        """
        task = self._destroying
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            # A removal that failed (the engine was away) is tried again by whoever asks next.
            self._end(cause or SandboxExit(ExitCause.REQUESTED))
            task = self._destroying = self._sandboxes.run(self._destroy())
        # Shielded: a caller that is cancelled must not leave half a sandbox behind.
        await asyncio.shield(task)

    async def _destroy(self) -> None:
        if self.last_use is not None:
            await asyncio.wait({self.last_use}, timeout=_LAST_USE_SECONDS)
        await self.wire.close()
        self.supervisor.close()
        await self._sandboxes.launcher.destroy(self.launched)
        self._sandboxes.forget(self)

    def _end(self, cause: SandboxExit) -> None:
        if self.state is not SandboxState.GONE:
            self._move(SandboxState.GONE)
        if not self.exited.done():
            self.exited.set_result(cause)

    def _move(self, state: SandboxState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise ValueError(f"sandbox {self.id} cannot go from {self.state} to {state}")
        self.state = state

    async def _warm(self) -> None:
        """Until the kernel has answered and run one silent cell; then its directory loses its write bit."""
        await prove(self.wire)
        if self.launched.transport == "ipc":
            os.chmod(self.launched.directory, stat.S_IRUSR | stat.S_IXUSR | 0o055)
        await self._sandboxes.launcher.warmed(self.launched)
        self._move(SandboxState.WARM)

    async def _watch(self, container_ended: asyncio.Future[SandboxExit]) -> None:
        """Find out why the sandbox ends: what the engine says comes before what the sandbox says of itself."""
        supervisor = self.supervisor
        await first_of(supervisor.exited, supervisor.gone, container_ended, self.wire.closed)
        if not supervisor.exited.done() and not container_ended.done():
            await first_of(supervisor.exited, container_ended, timeout=_NEWS_SECONDS)
        if supervisor.exited.done():
            self.kernel_exit = supervisor.exited.result()
        if container_ended.done():
            self._end(container_ended.result())
        elif self.kernel_exit is not None:
            self._end(await self._kernel_cause(self.kernel_exit, container_ended))
        else:
            self._end(SandboxExit(ExitCause.PROTOCOL))

    async def _kernel_cause(self, kernel_exit: KernelExit, container_ended: asyncio.Future[SandboxExit]) -> SandboxExit:
        if kernel_exit.signal != signal.SIGKILL:
            cause = ExitCause.EXITED if kernel_exit.signal is None else ExitCause.SIGNAL
            return SandboxExit(cause, kernel_exit.code, kernel_exit.signal)
        deadline = asyncio.get_running_loop().time() + _EVIDENCE_SECONDS
        while asyncio.get_running_loop().time() < deadline and not container_ended.done():
            if self._sandboxes.launcher.was_out_of_memory(self.launched, within=_OUT_OF_MEMORY_SECONDS):
                return SandboxExit(ExitCause.OUT_OF_MEMORY, None, signal.SIGKILL, await self._memory_evidence())
            await asyncio.sleep(0.01)
        if container_ended.done():
            return container_ended.result()
        return SandboxExit(ExitCause.SIGNAL, None, signal.SIGKILL)

    async def _memory_evidence(self) -> dict[str, Any]:
        evidence: dict[str, Any] = {"limit_mb": self.image.limits.container_memory_mb}
        try:
            stats, _ = await self.supervisor.request("stats", timeout=_EVIDENCE_SECONDS)
        except SupervisorError:
            return evidence
        peak = stats.get("memory_peak")
        if isinstance(peak, int) and 0 < peak < 2**50:
            evidence["peak_mb"] = round(peak / 2**20)
        return evidence


class Sandboxes:
    """All sandboxes of one launcher: starts them, hears how they end, and knows which live."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self._container_ended: dict[str, asyncio.Future[SandboxExit]] = {}
        self._live: dict[str, Sandbox] = {}
        self._unfinished = Unfinished()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def live(self) -> list[Sandbox]:
        """Every sandbox that was started and whose container is not yet confirmed to be gone."""
        return list(self._live.values())

    async def start(self) -> None:
        """Raises EngineUnavailable."""
        await self.launcher.start(self._ended)

    async def launch(self, request: LaunchRequest, *, timeout: float = 60.0) -> Sandbox:
        """Return a warm sandbox. Raises LaunchError, and then nothing of it is left."""
        ended: asyncio.Future[SandboxExit] = asyncio.get_running_loop().create_future()
        self._container_ended[request.sandbox_id] = ended
        try:
            launched = await self.launcher.launch(request)
        except BaseException:
            del self._container_ended[request.sandbox_id]
            raise
        try:
            return await self._warm_up(launched, ended, timeout)
        except BaseException:
            # Shielded: the container exists, so it has to go even when we are being cancelled.
            await asyncio.shield(self.run(self._abandon(launched)))
            raise

    async def stop(self, give_up: asyncio.Event | None = None) -> list[str]:
        """Destroy every sandbox that lives and stop the launcher.

        Once `give_up` is set no removal is waited for. Returns the sandboxes that stay; the next start reaps them.
        """
        for sandbox in self.live:
            self.run(self._end_at_stop(sandbox))
        while self._tasks and await all_done(self._tasks, give_up):
            pass
        await end(self._tasks)
        left = await self.launcher.stop(give_up)
        if left:
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
                await unless_ended(sandbox._warm(), ended, supervisor.exited)
        except BaseException as error:
            if wire is not None:
                await wire.close()
            if supervisor is not None:
                supervisor.close()
            if isinstance(error, TimeoutError):
                raise LaunchError(f"the sandbox was not ready within {timeout:g} s") from None
            if isinstance(error, WireError | SupervisorError):
                raise LaunchError(f"the sandbox could not be made ready: {error}") from None
            raise
        self._live[sandbox.id] = sandbox
        self.run(sandbox._watch(ended))
        return sandbox

    async def _abandon(self, launched: Launched) -> None:
        """Remove what never became warm; as long as it may exist, whoever started it is told nothing, and it counts."""
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
