"""One holder's connection to the claim socket: its requests, and what it holds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from samovar_kernel.frames import FrameError, pack

from kernelprovisioner.claims import RELAYED, ClaimAnswer, Ending
from kernelprovisioner.images import KernelImage
from kernelprovisioner.launchers.base import LaunchError
from kernelprovisioner.pool import PoolClaim
from kernelprovisioner.pool_errors import PoolBusy, PoolError
from kernelprovisioner.sandbox import ClaimError, ClaimRequest, Sandbox
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from kernelprovisioner.supervisor import SupervisorError

if TYPE_CHECKING:
    from kernelprovisioner.claim_server import ClaimServer

#: A holder reads the last files of a sandbox that died; after this it is released all the same.
_AFTER_EXIT_SECONDS = 10.0
_MAX_OVERLAPPING = 8
_log = logging.getLogger(__name__)


class Pool(Protocol):
    """What is asked of a pool (`kernelprovisioner.pool.SandboxPool`)."""

    image: KernelImage

    async def claim(
        self, owner: str, request: ClaimRequest, *, timeout: float = ..., mount: Path | None = ...
    ) -> PoolClaim: ...

    async def release(self, sandbox: Sandbox, cause: SandboxExit) -> None: ...


class BadClaim(Exception):
    """A request of a holder that cannot be met; `code` says which kind of no."""

    def __init__(self, text: str, code: str = "bad_request") -> None:
        super().__init__(text)
        self.code = code


class ClaimWanted(msgspec.Struct):
    """The fields of a claim, checked."""

    image: str
    kernel_id: str
    key: str
    wait: float = 120.0  # seconds
    mount: str | None = None
    hold_ms: int = 0
    notice: str | None = None
    session_name: str | None = None


class Held:
    """A sandbox that a holder has: its token opens it again after a broken connection."""

    def __init__(self, pool: Pool, sandbox: Sandbox, source: str, token: str) -> None:
        self.pool = pool
        self.sandbox = sandbox
        # Its files come out after its death, before its container goes.
        self.sandbox.last_use = self.used = asyncio.get_running_loop().create_future()
        self.token = token
        launched = sandbox.launched
        self.answer = ClaimAnswer(
            launched.sandbox_id,
            launched.runtime_id,
            launched.directory,
            launched.channels,
            launched.transport,
            source,
            token,
        )
        self.connection: HolderConnection | None = None
        self.giving_up: asyncio.TimerHandle | None = None

    def set_used(self) -> None:
        """Its holder needs nothing of it any more."""
        if not self.used.done():
            self.used.set_result(None)


class HolderConnection:
    """One holder's connection."""

    def __init__(self, server: ClaimServer, writer: asyncio.StreamWriter) -> None:
        self.held: Held | None = None
        self._server = server
        self._writer = writer
        self._slots = asyncio.Semaphore(_MAX_OVERLAPPING)
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None
        self._told = asyncio.Event()
        self._asked = False

    async def take(self, header: dict[str, Any], body: bytes) -> None:
        """Begin one request; waits while too many of this holder run."""
        await self._slots.acquire()
        task = asyncio.create_task(self._answer(header, body))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def end(self) -> None:
        """The peer is gone: nothing more is answered."""
        tasks = [*self._tasks, *([self._watch] if self._watch is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._writer.close()
        if self.held is not None:
            self._server.left(self.held)
            self.held = None

    async def finish(self) -> None:
        """Let the exit event go out, then hang up."""
        if self._watch is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._told.wait()
        self._writer.close()

    def abort(self) -> None:
        self._writer.transport.abort()

    async def _answer(self, header: dict[str, Any], body: bytes) -> None:
        try:
            await self._answer_one(header, body)
        finally:
            # After the answer has left: a holder that asks and never reads waits with us.
            self._slots.release()

    async def _answer_one(self, header: dict[str, Any], body: bytes) -> None:
        try:
            fields, payload = await self._do(header, body)
            answer = {**fields, "id": header.get("id"), "ok": True}
        except BadClaim as error:
            answer, payload = _no(header, error, error.code), b""
        except PoolError as error:
            answer, payload = _no(header, error, "full"), b""
            answer["retry_after"] = error.retry_after if isinstance(error, PoolBusy) else None
        except (LaunchError, ClaimError, SupervisorError) as error:
            answer, payload = _no(header, error, "failed"), b""
        except Exception as error:
            # Without an answer its holder would wait for its whole deadline.
            _log.exception("a holder's request failed unexpectedly")
            answer, payload = _no(header, RuntimeError(f"the gateway failed at this: {error!r}"), "failed"), b""
        try:
            self._writer.write(pack(answer, payload))
            await self._writer.drain()
        except (ConnectionError, FrameError) as error:
            _log.info("a holder's answer could not be sent: %s", error)
            self.abort()

    async def _do(self, header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        op = header.get("op")
        if op in ("claim", "resume"):
            return await self._take_up(header, body), b""
        if self.held is None:
            raise BadClaim("this connection holds no sandbox")
        if op in RELAYED:
            fields = {name: header[name] for name in RELAYED[op] if name in header}
            if op == "signal" and fields.get("signum") in (signal.SIGKILL, signal.SIGTERM):
                self.held.sandbox.end_asked = True
            reply, payload = await self.held.sandbox.supervisor.request(op, body, **fields)
            return {name: value for name, value in reply.items() if name not in ("id", "ok")}, payload
        if op in ("release", "destroy"):
            held, self.held = self.held, None
            if op == "release":
                self._server.release_later(held, SandboxExit(ExitCause.REQUESTED))
            else:
                await self._server.release(held, SandboxExit(ExitCause.REQUESTED))
            return {}, b""
        raise BadClaim(f"unknown operation {str(op)[:50]!r}")

    async def _take_up(self, header: dict[str, Any], body: bytes) -> dict[str, Any]:
        """Claim or resume, once: requests of one connection overlap, and a second sandbox would have no holder."""
        if self._asked:
            raise BadClaim("this connection has its one sandbox already")
        self._asked = True
        try:
            if header["op"] == "claim":
                held = await self._server.claim(*_wanted(header, body))
            else:
                held = self._server.resumed(header.get("sandbox_id"), header.get("token"))
        except BaseException:
            self._asked = False
            raise
        self.held = held
        held.connection = self
        self._watch = asyncio.create_task(self._tell_exit(held))
        return held.answer.as_dict()

    async def _tell_exit(self, held: Held) -> None:
        exit_ = await asyncio.shield(held.sandbox.exited)
        kernel_exit = held.sandbox.kernel_exit
        loop = asyncio.get_running_loop()
        end = loop.time() + _AFTER_EXIT_SECONDS
        try:
            self._writer.write(Ending(exit_, kernel_exit.unsent if kernel_exit is not None else ()).frame())
            # A holder that is stopped never reads, and others wait for the place of its dead sandbox.
            async with asyncio.timeout_at(end):
                await self._writer.drain()
            self._told.set()
        except (TimeoutError, ConnectionError, FrameError) as error:
            _log.info("a holder was not told of its sandbox's end: %s", error or "it does not read")
        await asyncio.sleep(end - loop.time())
        self._server.release_later(held, exit_)


def _no(header: Mapping[str, Any], error: Exception, code: str) -> dict[str, Any]:
    return {"id": header.get("id"), "ok": False, "error": str(error)[:2000], "code": code}


def _wanted(header: dict[str, Any], body: bytes) -> tuple[ClaimWanted, dict[str, str]]:
    try:
        return msgspec.convert(header, ClaimWanted), msgspec.convert(json.loads(body), dict[str, str])
    except (msgspec.ValidationError, ValueError, RecursionError) as error:
        raise BadClaim(f"the claim cannot be read: {error}") from None
