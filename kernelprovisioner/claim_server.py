"""The claim socket, the gateway's end: gives sandboxes of its pools to provisioners of the same user."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import os
import secrets
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
from samovar_kernel.frames import FrameError, FrameReader, pack

from kernelprovisioner.claims import RELAYED, RESUME_SECONDS, ClaimAnswer, Ending, peer_is_ours
from kernelprovisioner.environment import allowed_in
from kernelprovisioner.images import KernelImage
from kernelprovisioner.launchers.base import LaunchError
from kernelprovisioner.pool import PoolClaim, PoolError
from kernelprovisioner.sandbox import ClaimError, ClaimRequest, Sandbox
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from kernelprovisioner.supervisor import SupervisorError
from kernelprovisioner.workdir import refusal

#: A holder reads the last files of a sandbox that died; after this it is released all the same.
_AFTER_EXIT_SECONDS = 10.0
_MAX_CONNECTIONS = 1000
_MAX_OVERLAPPING = 8
_PIECE = 256 * 1024
_log = logging.getLogger(__name__)


class Pool(Protocol):
    """What is asked of a pool (`kernelprovisioner.pool.SandboxPool`)."""

    image: KernelImage

    async def claim(
        self, owner: str, request: ClaimRequest, *, timeout: float = ..., mount: Path | None = ...
    ) -> PoolClaim: ...

    async def release(self, sandbox: Sandbox, cause: SandboxExit) -> None: ...


class SocketInUse(Exception):
    """Another gateway of this user serves the claim socket already."""


class BadClaim(Exception):
    """A request of a holder that cannot be met; `code` says which kind of no."""

    def __init__(self, text: str, code: str = "bad_request") -> None:
        super().__init__(text)
        self.code = code


class _Wanted(msgspec.Struct):
    """The fields of a claim, checked."""

    image: str
    kernel_id: str
    key: str
    wait: float = 120.0  # seconds
    mount: str | None = None
    hold_ms: int = 0
    notice: str | None = None
    session_name: str | None = None


class _Held:
    """A sandbox that a holder has: its token opens it again after a broken connection."""

    def __init__(self, pool: Pool, claim: PoolClaim) -> None:
        self.pool = pool
        self.sandbox = claim.sandbox
        # Its files come out after its death, before its container goes.
        self.sandbox.last_use = self.used = asyncio.get_running_loop().create_future()
        self.token = secrets.token_urlsafe(32)
        launched = claim.sandbox.launched
        self.answer = ClaimAnswer(
            launched.sandbox_id,
            launched.runtime_id,
            launched.directory,
            launched.channels,
            launched.transport,
            claim.source,
            self.token,
        )
        self.connection: _Connection | None = None
        self.giving_up: asyncio.TimerHandle | None = None

    def set_used(self) -> None:
        """Its holder needs nothing of it any more."""
        if not self.used.done():
            self.used.set_result(None)


class ClaimServer:
    """Serves the claim socket over a gateway's pools. One connection is one held sandbox."""

    def __init__(self, pools: Mapping[str, Pool], path: Path) -> None:
        self.path = path
        self._pools = pools
        self._held: dict[str, _Held] = {}
        self._connections: dict[_Connection, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._stopping = False

    @property
    def held(self) -> list[str]:
        """Ids of the sandboxes that holders have now."""
        return list(self._held)

    async def start(self) -> None:
        """Bind and serve. Raises SocketInUse, OSError."""
        self._remove_stale()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.setblocking(False)
            listener.bind(str(self.path))
            os.chmod(self.path, 0o600)
            self._server = await asyncio.start_unix_server(self._serve, sock=listener)
        except BaseException:
            listener.close()
            raise

    async def stop(self) -> None:
        """Tell every holder that the gateway stops, give all sandboxes back, close the socket. May be called twice."""
        self._stopping = True
        if self._server is not None:
            self._server.close()
            self._server = None
            self.path.unlink(missing_ok=True)
        cause = SandboxExit(ExitCause.GATEWAY)
        # Each holder hears of it by the exit event, and has a moment for its last files before the sandbox goes.
        await asyncio.gather(*(self._release(held, cause, used=False) for held in list(self._held.values())))
        await asyncio.gather(*(connection.finish() for connection in list(self._connections)))
        if self._connections:
            await asyncio.wait(list(self._connections.values()), timeout=5.0)
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _remove_stale(self) -> None:
        """A socket that nobody answers on was left by a gateway that was killed."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(self.path))
            except FileNotFoundError:
                return
            except OSError:
                self.path.unlink(missing_ok=True)
                return
        raise SocketInUse(f"another gateway serves {self.path}; stop it, or give this one its own SAMOVAR_RUNTIME_DIR")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(self, writer)
        if (
            self._stopping
            or len(self._connections) >= _MAX_CONNECTIONS
            or not peer_is_ours(writer.get_extra_info("socket"))
        ):
            writer.close()
            return
        task = asyncio.current_task()
        assert task is not None
        self._connections[connection] = task
        try:
            async for header, body in _frames(reader):
                await connection.take(header, body)
        except (FrameError, ConnectionError) as error:
            _log.info("claim connection closed: %s", error)
        finally:
            await connection.end()
            del self._connections[connection]

    async def claim(self, wanted: _Wanted, env: Mapping[str, str]) -> _Held:
        """Claim for a holder. Raises BadClaim and what the pool raises."""
        pool = self._pools.get(wanted.image)
        if pool is None:
            raise BadClaim(f"this gateway has no kernel image {wanted.image!r}", "unknown_image")
        mount = Path(wanted.mount) if wanted.mount is not None else None
        if mount is not None:
            why = "not an absolute path of a directory" if not mount.is_absolute() or not mount.is_dir() else None
            why = why or refusal(mount)
            if why is not None:
                raise BadClaim(f"{mount} is not mounted: {why}")
        request = ClaimRequest(
            wanted.kernel_id,
            wanted.key.encode(),
            allowed_in(pool.image, env),
            session_name=wanted.session_name,
            notice=wanted.notice,
            hold_ms=max(0, min(wanted.hold_ms, 1000)),
        )
        claim = await pool.claim(f"uid:{os.getuid()}", request, timeout=max(0.1, min(wanted.wait, 600.0)), mount=mount)
        held = _Held(pool, claim)
        self._held[claim.sandbox.id] = held
        try:
            await claim.sandbox.hand_over()
        except BaseException:
            self.release_later(held, SandboxExit(ExitCause.REQUESTED))
            raise
        return held

    def resumed(self, sandbox_id: object, token: object) -> _Held:
        """Return the sandbox of a broken connection. Raises BadClaim."""
        held = self._held.get(sandbox_id) if isinstance(sandbox_id, str) else None
        if held is None or not isinstance(token, str) or not hmac.compare_digest(held.token.encode(), token.encode()):
            raise BadClaim("this gateway does not hold that sandbox", "unknown_sandbox")
        if held.giving_up is not None:
            held.giving_up.cancel()
            held.giving_up = None
        if held.connection is not None:
            held.connection.held = None
            held.connection.abort()
        return held

    def left(self, held: _Held) -> None:
        """The connection of a holder broke: it has a while to come back."""
        held.connection = None
        if self._stopping:
            held.set_used()
        elif held.sandbox.id in self._held:
            cause = SandboxExit(ExitCause.REQUESTED, evidence={"reason": "its holder went away"})
            seconds = 0.0 if held.sandbox.exited.done() else RESUME_SECONDS
            held.giving_up = asyncio.get_running_loop().call_later(seconds, self.release_later, held, cause)

    def release_later(self, held: _Held, cause: SandboxExit) -> None:
        """Release in a task of our own."""
        task = asyncio.get_running_loop().create_task(self._release(held, cause))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _release(self, held: _Held, cause: SandboxExit, *, used: bool = True) -> None:
        if held.giving_up is not None:
            held.giving_up.cancel()
        if used:
            held.set_used()
        if self._held.pop(held.sandbox.id, None) is not None:
            await held.pool.release(held.sandbox, cause)


class _Connection:
    """One holder's connection."""

    def __init__(self, server: ClaimServer, writer: asyncio.StreamWriter) -> None:
        self.held: _Held | None = None
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
            answer["retry_after"] = getattr(error, "retry_after", None)
        except (LaunchError, ClaimError, SupervisorError) as error:
            answer, payload = _no(header, error, "failed"), b""
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
            reply, payload = await self.held.sandbox.supervisor.request(op, body, **fields)
            return {name: value for name, value in reply.items() if name not in ("id", "ok")}, payload
        if op in ("release", "destroy"):
            held, self.held = self.held, None
            if op == "release":
                self._server.release_later(held, SandboxExit(ExitCause.REQUESTED))
            else:
                await self._server._release(held, SandboxExit(ExitCause.REQUESTED))
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

    async def _tell_exit(self, held: _Held) -> None:
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


def _wanted(header: dict[str, Any], body: bytes) -> tuple[_Wanted, dict[str, str]]:
    try:
        return msgspec.convert(header, _Wanted), msgspec.convert(json.loads(body), dict[str, str])
    except (msgspec.ValidationError, ValueError, RecursionError) as error:
        raise BadClaim(f"the claim cannot be read: {error}") from None


async def _frames(reader: asyncio.StreamReader) -> AsyncIterator[tuple[dict[str, Any], bytes]]:
    """Yield the peer's frames until it closes. Raises FrameError."""
    frames = FrameReader()
    while data := await reader.read(_PIECE):
        for frame in frames.feed(data):
            yield frame
