"""KernelLife: how kernels get their sandboxes, the next one after a restart or a death, and how they end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime

from gateway.cancellation import Cancelled
from gateway.errors import RequestError
from gateway.holdings import Holdings
from gateway.kernel import BUSY, DEAD, IDLE, RESTARTING, STARTING, Channels, Kernel
from gateway.kernel_bounds import LifeBounds
from gateway.kernel_sandboxes import KernelSandboxes, gone
from gateway.tasks import Tasks
from kernelprovisioner.sandbox import ProbeError, Sandbox
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from kernelprovisioner.supervisor import SupervisorError
from kernelprovisioner.wire import first_of

#: A websocket is closed with this when its kernel is gone: JupyterLab asks why, and shows the answer.
KERNEL_GONE = 4410
#: ... and with this when the gateway stops: clients come back.
GATEWAY_RESTARTS = 1012
#: A kernel that lives so long is not dying in a row, in seconds.
STABLE_SECONDS = 10.0
#: How long what a dead kernel had sent may take to be heard.
_TRAILING_SECONDS = 2.0
#: A page whose websocket closes before its own request to end the kernel is answered connects again.
_ANSWER_SECONDS = 1.0
#: How long a kernel that its client told to end may take to end.
_END_SECONDS = 5.0
#: How long a kernel may take to say what it runs.
_PROBE_SECONDS = 5.0
#: How often one that was taken up is asked whether its cell still runs.
_ASKING_SECONDS = 2.0
_ENAME = "SandboxDied"
_log = logging.getLogger(__name__)


class KernelLife:
    """What becomes of kernels: they start, restart, die, are started again, end."""

    def __init__(
        self,
        holdings: Holdings,
        bounds: LifeBounds,
        make_channels: Callable[[], Channels],
        buried: Callable[[Kernel], None],
        given_up: Callable[[Kernel], None],
    ) -> None:
        """`buried` is told of each kernel that is dead from now on, `given_up` of each whose client has ended it."""
        self._bounds = bounds
        self._make_channels = make_channels
        self._buried = buried
        self._given_up = given_up
        #: what is under way; its failures are those of whoever asked, where somebody did
        self.tasks = Tasks(RequestError, Cancelled, SupervisorError)
        self.sandboxes = KernelSandboxes(holdings, self.tasks, self._exited)
        #: set whenever a kernel's state changes
        self.changed = asyncio.Event()

    def open(self, kernel: Kernel) -> None:
        """Hear what goes through the channels of a kernel."""
        channels = kernel.channels
        channels.on_status = lambda state: self._status(kernel, state)
        channels.on_activity = lambda: _active(kernel)
        channels.on_shutdown_request = lambda restart: self._end_asked(kernel, restart)

    async def begin(self, kernel: Kernel, timeout: float | None, cancelled: asyncio.Future[None] | None) -> None:
        """Give a new kernel its first sandbox, within `timeout` seconds. Raises RequestError, Cancelled."""
        async with kernel.turn:
            sandbox = await self.sandboxes.claim(kernel, timeout, cancelled)
            self.sandboxes.attach(kernel, sandbox)
            self._became(kernel, IDLE)
            await self.sandboxes.recorded(kernel, sandbox)
            if kernel.gone.done():
                raise gone(kernel)

    def take_up(self, kernel: Kernel, sandbox: Sandbox) -> None:
        """As `attach`, for the sandbox of an earlier gateway's kernel: it may run a cell."""
        self.sandboxes.attach(kernel, sandbox, adopted=True)
        self.tasks.run(self._ask(kernel, sandbox), f"ask {kernel.id}")

    def lost(self, kernel: Kernel, exit_: SandboxExit) -> None:
        """The sandbox of an earlier gateway's kernel could not be taken up: the kernel is dead."""
        self.tasks.run(self._bury(kernel, exit_, str(exit_)), f"bury {kernel.id}")

    async def restart(self, kernel: Kernel) -> None:
        """Give a kernel a new sandbox, as its user asked. Raises RequestError; then the kernel is dead."""
        if kernel.restarting is None:
            kernel.restarting = self.tasks.run(self._restart(kernel), f"restart {kernel.id}")
            kernel.restarting.add_done_callback(lambda _: _restarted(kernel))
        # Shielded: others may wait for it, and a client that goes away leaves no half of a restart.
        await asyncio.shield(kernel.restarting)

    async def end(self, kernel: Kernel, reason: str) -> None:
        """The kernel's id is given up: its sandbox is gone when this returns, or 30 s have passed."""
        if not kernel.gone.done():
            kernel.gone.set_result(None)
        async with kernel.turn:
            self._became(kernel, DEAD)
            try:
                await self.sandboxes.give_back(kernel, SandboxExit(ExitCause.REQUESTED))
            finally:
                self.tasks.run(self._close_later(kernel, reason), f"close {kernel.id}")

    def end_later(self, kernel: Kernel, reason: str) -> None:
        """`end` in a task of our own."""
        self.tasks.run(self.end(kernel, reason), f"end {kernel.id}")

    def cull(self, kernel: Kernel, text: str, exit_: SandboxExit) -> None:
        """Shut a kernel down that nobody uses: its clients are told under their last cells, and it is dead."""
        if not (kernel.dead or kernel.turn.locked() or kernel.gone.done()):
            self.tasks.run(self._cull(kernel, text, exit_), f"cull {kernel.id}")

    async def interrupt(self, kernel: Kernel) -> None:
        """Interrupt what runs. Raises SupervisorError."""
        if kernel.interrupting is None and kernel.sandbox is not None:
            kernel.interrupting = self.tasks.run(kernel.sandbox.interrupt(), f"interrupt {kernel.id}")
            kernel.interrupting.add_done_callback(lambda _: _interrupted(kernel))
        if kernel.interrupting is not None:
            await asyncio.shield(kernel.interrupting)

    async def leave(self, kernel: Kernel, *, keep: bool) -> None:
        """The gateway stops; with `keep` the kernel runs on for the next one."""
        if kernel.sandbox is not None and not keep:
            text = str(SandboxExit(ExitCause.GATEWAY))
            kernel.channels.tell_death(text, _ENAME, traceback=[f"{_ENAME}: {text}"])
        self.sandboxes.detach(kernel)
        if not keep:
            # Else the next gateway tells of a kernel whose restart this one does not end.
            self.sandboxes.forget_former(kernel)
        await kernel.channels.close(GATEWAY_RESTARTS, "The gateway restarts." if keep else "The gateway stops.")

    # What happens to a kernel.

    def _status(self, kernel: Kernel, state: str) -> None:
        if kernel.sandbox is not None and kernel.execution_state in (STARTING, IDLE, BUSY) and state in (IDLE, BUSY):
            self._became(kernel, state)

    def _became(self, kernel: Kernel, state: str) -> None:
        kernel.execution_state = state
        self.changed.set()

    def _exited(self, kernel: Kernel, sandbox: Sandbox) -> None:
        # One that was told to end is waited for already.
        if not sandbox.end_asked:
            self.tasks.run(self._died(kernel, sandbox, sandbox.exited.result()), f"death of {kernel.id}")

    async def _died(self, kernel: Kernel, sandbox: Sandbox, exit_: SandboxExit) -> None:
        """Tell those who wait why, and start again where that is to be."""
        async with kernel.turn:
            if kernel.sandbox is not sandbox:
                return
            await sandbox.wire.drained("iopub", timeout=_TRAILING_SECONDS)
            self._tell(kernel, sandbox, exit_)
            lived = asyncio.get_running_loop().time() - kernel.attached_at
            kernel.deaths = kernel.deaths + 1 if lived < STABLE_SECONDS else 1
            kernel.last_exit = exit_
            self.sandboxes.lose(kernel, exit_)
            if kernel.gone.done():
                return
            if kernel.deaths > self._bounds.restarts or self.sandboxes.closed.done():
                often = f" It died {kernel.deaths} times in a row." if kernel.deaths > self._bounds.restarts > 0 else ""
                await self._bury(kernel, exit_, f"{exit_}{often}")
                return
            self._became(kernel, RESTARTING)
            kernel.channels.publish("iopub", "status", {"execution_state": "restarting"})
            try:
                await self._renew(kernel)
            except RequestError as error:
                _log.warning("kernel %s could not be restarted after its death: %s", kernel.id, error)

    def _tell(self, kernel: Kernel, sandbox: Sandbox, exit_: SandboxExit) -> None:
        text = str(exit_)
        unsent = sandbox.kernel_exit.unsent if sandbox.kernel_exit is not None else ()
        kernel.channels.tell_death(text, _ENAME, traceback=[f"{_ENAME}: {text}"], unsent=unsent)

    async def _ask(self, kernel: Kernel, sandbox: Sandbox) -> None:
        """Find out whether a kernel that was taken up runs a cell, and when that ends: nobody gets its reply."""
        followed, told = "", False
        over = sandbox.exited, kernel.gone, self.sandboxes.closed
        while kernel.sandbox is sandbox and not any(each.done() for each in over):
            try:
                probe = await sandbox.probe(timeout=_PROBE_SECONDS)
            except ProbeError as error:
                # Code that does not let go of the interpreter lock: then something runs.
                _log.debug("kernel %s does not say what it runs: %s", kernel.id, error)
                self._status(kernel, BUSY)
            else:
                if kernel.sandbox is not sandbox:
                    return
                running = probe.running
                if not told:
                    told = True
                    kernel.channels.make_up(probe.ended)
                if running is not None and not followed:
                    followed = running
                    kernel.channels.follow(followed, probe.running_count)
                    # Asked again at once: it may have ended before it was followed.
                    continue
                if running is None or running != followed:
                    break
            await first_of(*over, timeout=_ASKING_SECONDS)
        if followed:
            await first_of(*over, timeout=_TRAILING_SECONDS)
            kernel.channels.follow_no_more(followed)
        if kernel.sandbox is sandbox:
            self._status(kernel, BUSY if kernel.channels.busy else IDLE)

    async def _restart(self, kernel: Kernel) -> None:
        asked = asyncio.get_running_loop().time()
        async with kernel.turn:
            if kernel.gone.done():
                raise gone(kernel)
            if kernel.sandbox is not None and kernel.attached_at > asked:
                return  # restarted by itself, after this was asked for
            if kernel.dead:
                kernel.channels = self._make_channels()
                self.open(kernel)
                kernel.reason = kernel.traceback = None
            else:
                kernel.channels.tell_restart()
            kernel.deaths, kernel.last_exit = 0, None
            self._became(kernel, STARTING)
            self.sandboxes.lose(kernel, SandboxExit(ExitCause.REQUESTED))
            await self._renew(kernel)

    async def _renew(self, kernel: Kernel) -> None:
        """A new sandbox behind the same id. Raises RequestError; then the kernel is dead, unless it is given up."""
        try:
            sandbox = await self.sandboxes.claim_patiently(kernel)
        except RequestError as error:
            if not kernel.gone.done() and not self.sandboxes.closed.done():
                exit_ = kernel.last_exit or SandboxExit(ExitCause.START_FAILED, evidence={"reason": error.message})
                before = f"{kernel.last_exit} " if kernel.last_exit is not None else ""
                await self._bury(kernel, exit_, f"{before}The kernel could not be started again: {error.message}")
            raise
        self.sandboxes.attach(kernel, sandbox)
        kernel.channels.publish("iopub", "status", {"execution_state": "starting"})
        kernel.channels.publish("iopub", "status", {"execution_state": "idle"})
        _active(kernel)
        self._became(kernel, IDLE)
        await self.sandboxes.recorded(kernel, sandbox)

    async def _cull(self, kernel: Kernel, text: str, exit_: SandboxExit) -> None:
        async with kernel.turn:
            if kernel.dead or kernel.gone.done():
                return
            if kernel.channels.busy:
                kernel.channels.tell_death(text, _ENAME, traceback=[f"{_ENAME}: {text}"])
            else:
                kernel.channels.notice_to_each(text)
            self.sandboxes.lose(kernel, exit_)
            await self._bury(kernel, exit_, text)

    async def _bury(self, kernel: Kernel, exit_: SandboxExit, reason: str) -> None:
        """The kernel is dead from now on, and its id says why for a while."""
        kernel.reason, kernel.traceback, kernel.last_exit = reason, f"{_ENAME}: {reason}", exit_
        self.sandboxes.forget_former(kernel)
        self._became(kernel, DEAD)
        self._buried(kernel)
        await kernel.channels.close(KERNEL_GONE, reason)

    def _end_asked(self, kernel: Kernel, restart: bool) -> None:
        """A client has told its kernel to end by a message of its own."""
        sandbox = kernel.sandbox
        if sandbox is not None and not sandbox.end_asked and not self.sandboxes.closed.done():
            sandbox.end_asked = True
            self.tasks.run(self._let_end(kernel, sandbox, restart), f"end {kernel.id}")

    async def _close_later(self, kernel: Kernel, reason: str) -> None:
        await first_of(self.sandboxes.closed, timeout=_ANSWER_SECONDS)
        await kernel.channels.close(KERNEL_GONE, reason)

    async def _let_end(self, kernel: Kernel, sandbox: Sandbox, restart: bool) -> None:
        await first_of(sandbox.exited, kernel.gone, self.sandboxes.closed, timeout=_END_SECONDS)
        await sandbox.wire.drained("iopub", timeout=_TRAILING_SECONDS if sandbox.exited.done() else 0)
        if kernel.sandbox is not sandbox or self.sandboxes.closed.done():
            return
        if not restart:
            self._given_up(kernel)
            return
        try:
            await self.restart(kernel)
        except RequestError as error:
            _log.warning("kernel %s could not be restarted: %s", kernel.id, error)


def _active(kernel: Kernel) -> None:
    kernel.last_activity = datetime.now(UTC)


def _restarted(kernel: Kernel) -> None:
    kernel.restarting = None


def _interrupted(kernel: Kernel) -> None:
    kernel.interrupting = None
