"""Holdings: how many sandboxes each owner holds, and how one more is claimed, for sessions and kernels alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from http import HTTPStatus

from gateway.cancellation import Closed, unless
from gateway.errors import RequestError, too_busy
from gateway.limits import OwnerBounds, Reservations
from kernelprovisioner.launchers.base import LaunchError
from kernelprovisioner.pool import PoolClaim, SandboxPool
from kernelprovisioner.pool_errors import PoolBusy, PoolStopped
from kernelprovisioner.sandbox import ClaimError, ClaimRequest, Sandbox
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from kernelprovisioner.standing import Standing

_SHUTTING_DOWN = "The gateway is shutting down."


class Holdings:
    """The sandboxes of the pools that owners hold through this gateway's HTTP interfaces, within their bounds."""

    def __init__(
        self, pools: Mapping[str, SandboxPool], *, line_timeout: float, bounds: OwnerBounds | None = None
    ) -> None:
        """`line_timeout`: seconds that a request may wait for a sandbox."""
        self.pools = pools
        self.line_timeout = line_timeout
        self.reservations = Reservations(bounds or OwnerBounds())
        #: asked before an owner claims: at its limit something of its own that nobody comes back to may go
        self.make_room: Callable[[str], None] = lambda owner: None
        self._owners: dict[str, str] = {}

    def held(self, owner: str) -> int:
        """How many sandboxes the owner holds."""
        return sum(holder == owner for holder in self._owners.values())

    def room(self, owner: str) -> int | None:
        """Return how many more sandboxes the owner may claim; None: any number."""
        return self.reservations.room(owner, self.held(owner))

    async def claim(
        self,
        owner: str,
        image: str,
        request: ClaimRequest,
        *,
        cancelled: asyncio.Future[None],
        closed: asyncio.Future[None],
        timeout: float | None = None,
        standing: Standing = Standing.KEPT,
    ) -> PoolClaim:
        """Return a sandbox that is personal for `request` and held by `owner`; `timeout` (seconds) of the line.

        Raises RequestError (429: the owner's limit; 503: none in time, none can be started, `closed`) and Cancelled.
        """
        self.make_room(owner)
        with self.reservations.claim(owner, self.held(owner)):
            claiming = asyncio.ensure_future(
                self.pools[image].claim(
                    owner, request, timeout=self.line_timeout if timeout is None else timeout, standing=standing
                )
            )
            try:
                claim = await unless(cancelled, closed, claiming)
            except PoolBusy as error:
                raise too_busy(_sentence(error), error.retry_after) from None
            except (PoolStopped, Closed):
                raise shutting_down() from None
            except (LaunchError, ClaimError) as error:
                raise RequestError(
                    HTTPStatus.SERVICE_UNAVAILABLE, "no_sandbox", f"No sandbox can be started: {error}", retry_after=10
                ) from None
            except asyncio.CancelledError:
                # The caller was cancelled at the moment at which it got one: nobody holds it.
                if claiming.done() and not claiming.cancelled() and claiming.exception() is None:
                    await self.pools[image].release(claiming.result().sandbox, SandboxExit(ExitCause.REQUESTED))
                raise
            self.hold(owner, claim.sandbox)
            return claim

    def hold(self, owner: str, sandbox: Sandbox) -> None:
        """Count a sandbox as the owner's."""
        self._owners[sandbox.id] = owner

    def let_go(self, sandbox: Sandbox) -> None:
        """The owner does not hold the sandbox any more: the pool has taken it, or is about to get it back."""
        self._owners.pop(sandbox.id, None)

    async def release(self, image: str, sandbox: Sandbox, cause: SandboxExit) -> None:
        """Give a sandbox back that was let go of; returns as SandboxPool.release does."""
        await self.pools[image].release(sandbox, cause)


def shutting_down() -> RequestError:
    """The 503 of a gateway that begins nothing any more."""
    return too_busy(_SHUTTING_DOWN, 5)


def _sentence(error: Exception) -> str:
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."
