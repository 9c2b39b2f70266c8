"""KernelSandboxes: which sandbox stands behind which kernel: claimed, attached, detached, given back."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from http import HTTPStatus

from gateway.cancellation import Cancelled
from gateway.errors import TOO_BUSY, RequestError
from gateway.holdings import Holdings
from gateway.kernel import Kernel
from gateway.tasks import Tasks
from kernelprovisioner.sandbox import ClaimRequest, Sandbox
from kernelprovisioner.sandbox_exit import SandboxExit
from kernelprovisioner.wire import first_of

#: The pause before a full line is tried again, in seconds.
_LINE_PAUSE = 0.5


class KernelSandboxes:
    """Gives kernels their sandboxes. `exited` is told of each one that ends while it stands behind its kernel."""

    def __init__(self, holdings: Holdings, tasks: Tasks, exited: Callable[[Kernel, Sandbox], None]) -> None:
        self._holdings = holdings
        self._tasks = tasks
        self._exited = exited
        #: done when nothing is begun any more
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def claim(
        self, kernel: Kernel, timeout: float | None = None, cancelled: asyncio.Future[None] | None = None
    ) -> Sandbox:
        """Return a sandbox for the kernel, within `timeout` seconds. Raises RequestError, Cancelled."""
        request = ClaimRequest(
            kernel_id=kernel.id,
            key=secrets.token_hex(32).encode(),
            env=kernel.env,
            session_name=kernel.session_name,
            holder=kernel.holder,
        )
        leaving = _either(kernel.gone, cancelled)
        try:
            claim = await self._holdings.claim(
                kernel.owner, kernel.image, request, cancelled=leaving, closed=self.closed, timeout=timeout
            )
        except Cancelled:
            if kernel.gone.done():
                raise gone(kernel) from None
            raise
        return claim.sandbox

    async def claim_patiently(self, kernel: Kernel) -> Sandbox:
        """As `claim`, also where the line is full at first: the kernel has just given a place back."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._holdings.line_timeout
        while True:
            try:
                return await self.claim(kernel, max(0.1, deadline - loop.time()))
            except RequestError as error:
                if error.code != TOO_BUSY or self.closed.done() or loop.time() + _LINE_PAUSE >= deadline:
                    raise
            await first_of(kernel.gone, self.closed, timeout=_LINE_PAUSE)
            if kernel.gone.done():
                raise gone(kernel)

    def attach(self, kernel: Kernel, sandbox: Sandbox, *, adopted: bool = False) -> None:
        """The kernel has a sandbox from now on. `adopted`: it had it at an earlier gateway."""
        loop = asyncio.get_running_loop()
        # It is destroyed when all it has sent is heard.
        sandbox.last_use = loop.create_future()
        sandbox.running = lambda: kernel.channels.cell
        kernel.sandbox, kernel.attached_at = sandbox, loop.time()
        self._holdings.hold(kernel.owner, sandbox)
        kernel.channels.attach(sandbox, adopted=adopted)
        sandbox.exited.add_done_callback(lambda _: self._ended(kernel, sandbox))

    async def recorded(self, kernel: Kernel, sandbox: Sandbox) -> None:
        """Return once the record of a claim is on disk, with what came to the kernel while it was claimed."""
        if kernel.notebooks:
            await sandbox.note_holder(kernel.holder)
        else:
            await sandbox.recorded()
        self.forget_former(kernel)

    def detach(self, kernel: Kernel) -> Sandbox | None:
        """Take the sandbox away from the kernel: no message of it arrives any more, and it may be destroyed."""
        sandbox, kernel.sandbox = kernel.sandbox, None
        if sandbox is not None:
            kernel.channels.detach()
            if sandbox.last_use is not None and not sandbox.last_use.done():
                sandbox.last_use.set_result(None)
            self._holdings.let_go(sandbox)
        return sandbox

    async def give_back(self, kernel: Kernel, cause: SandboxExit) -> None:
        """As `detach`; returns once the sandbox is gone, or after 30 s."""
        sandbox = self.detach(kernel)
        self.forget_former(kernel)
        if sandbox is not None:
            await self._holdings.release(kernel.image, sandbox, cause)

    def lose(self, kernel: Kernel, cause: SandboxExit) -> None:
        """As `give_back`, and wait for nothing. Its record stays until `recorded` or `forget_former`.

        So a gateway that is killed before the next sandbox has a record leaves one of the kernel. Where it leaves two,
        the next gateway takes the newer.
        """
        sandbox = self.detach(kernel)
        if sandbox is not None:
            self.forget_former(kernel)
            kernel.former, sandbox.record_stays = sandbox, True
            self._tasks.run(self._holdings.release(kernel.image, sandbox, cause), f"release {sandbox.id}")

    def forget_former(self, kernel: Kernel) -> None:
        """The record of the sandbox that the kernel had before is of no more use."""
        former, kernel.former = kernel.former, None
        if former is not None:
            former.forget_record()

    def _ended(self, kernel: Kernel, sandbox: Sandbox) -> None:
        if kernel.sandbox is sandbox:
            self._exited(kernel, sandbox)


def gone(kernel: Kernel) -> RequestError:
    """The 404 of a kernel whose id was given up meanwhile."""
    return RequestError(HTTPStatus.NOT_FOUND, "kernel_not_found", f"The kernel was shut down meanwhile: {kernel.id}")


def _either(one: asyncio.Future[None], other: asyncio.Future[None] | None) -> asyncio.Future[None]:
    """Return a future that is done as soon as one of them is."""
    if other is None:
        return one
    both: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    for future in (one, other):
        future.add_done_callback(lambda _: None if both.done() else both.set_result(None))
    return both
