"""The claim socket, the gateway's end: gives sandboxes of its pools to provisioners of the same user."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import secrets
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from samovar_kernel.frames import FrameError, FrameReader

from kernelprovisioner.adoption import PROVISIONER
from kernelprovisioner.claim_connection import BadClaim, ClaimWanted, Held, HolderConnection, Pool
from kernelprovisioner.claims import (
    RESUME_SECONDS,
    STARTING,
    UNKNOWN_SANDBOX,
    peer_is_ours,
)
from kernelprovisioner.environment import allowed_in
from kernelprovisioner.sandbox import ClaimRequest, Sandbox
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from kernelprovisioner.workdir import refusal

_MAX_CONNECTIONS = 1000
_PIECE = 256 * 1024
#: what a holder that came back to another gateway is told instead of where its sandbox came from
_RESTORED = "restored"
_log = logging.getLogger(__name__)


class SocketInUse(Exception):
    """Another gateway of this user serves the claim socket already."""


class ClaimServer:
    """Serves the claim socket over a gateway's pools. One connection is one held sandbox."""

    def __init__(self, pools: Mapping[str, Pool], path: Path) -> None:
        self.path = path
        self._pools = pools
        self._held: dict[str, Held] = {}
        self._connections: dict[HolderConnection, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._stopping = False
        self._closed = False

    @property
    def held(self) -> list[str]:
        """Ids of the sandboxes that holders have now."""
        return list(self._held)

    async def start(self, *, closed: bool = False) -> None:
        """Bind and serve; `closed`: only holders that come back, until `open`. Raises SocketInUse, OSError."""
        self._closed = closed
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

    def open(self) -> None:
        """Take claims from now on."""
        self._closed = False

    def restore(self, pool: Pool, sandbox: Sandbox) -> None:
        """Hold a sandbox that an earlier gateway gave to a holder, who has a while to come back to it.

        Before `open`, so that no holder is told that its sandbox is not here. Raises ValueError where its record is
        not of such a claim.
        """
        holder = {} if sandbox.record is None else sandbox.record.holder
        token = holder.get("token")
        if holder.get("kind") != PROVISIONER or not isinstance(token, str) or not token:
            raise ValueError(f"the record of sandbox {sandbox.id} names no holder that could come back")
        held = self._held[sandbox.id] = Held(pool, sandbox, _RESTORED, token)
        self._wait_for_holder(held, RESUME_SECONDS)

    async def stop(self, *, keep: bool = False) -> None:
        """Tell every holder that the gateway stops, give all sandboxes back, close the socket. May be called twice.

        With `keep` they are told nothing and nothing is given back: to them the connection breaks, and they come back
        to the next gateway.
        """
        self._stopping = True
        if self._server is not None:
            self._server.close()
            self._server = None
            self.path.unlink(missing_ok=True)
        if keep:
            self._let_go()
        cause = SandboxExit(ExitCause.GATEWAY)
        # Each holder hears of it by the exit event, and has a moment for its last files before the sandbox goes. One
        # that is away reads none.
        held_now = list(self._held.values())
        await asyncio.gather(*(self.release(held, cause, used=held.connection is None) for held in held_now))
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
        connection = HolderConnection(self, writer)
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

    async def claim(self, wanted: ClaimWanted, env: Mapping[str, str]) -> Held:
        """Claim for a holder. Raises BadClaim and what the pool raises."""
        if self._closed:
            raise BadClaim("this gateway is about to start", STARTING)
        pool = self._pools.get(wanted.image)
        if pool is None:
            raise BadClaim(f"this gateway has no kernel image {wanted.image!r}", "unknown_image")
        mount = Path(wanted.mount) if wanted.mount is not None else None
        # In a thread: a directory of another machine may take its time, and everybody else would wait with us.
        if mount is not None and (why := await asyncio.to_thread(_not_mounted, mount)) is not None:
            raise BadClaim(f"{mount} is not mounted: {why}")
        token = secrets.token_urlsafe(32)
        request = ClaimRequest(
            wanted.kernel_id,
            wanted.key.encode(),
            allowed_in(pool.image, env),
            session_name=wanted.session_name,
            notice=wanted.notice,
            hold_ms=max(0, min(wanted.hold_ms, 1000)),
            holder={"kind": PROVISIONER, "token": token},
        )
        claim = await pool.claim(f"uid:{os.getuid()}", request, timeout=max(0.1, min(wanted.wait, 600.0)), mount=mount)
        held = Held(pool, claim.sandbox, claim.source, token)
        self._held[claim.sandbox.id] = held
        try:
            await claim.sandbox.hand_over()
            await claim.sandbox.recorded()
        except BaseException:
            self.release_later(held, SandboxExit(ExitCause.REQUESTED))
            raise
        return held

    def resumed(self, sandbox_id: object, token: object) -> Held:
        """Return the sandbox of a broken connection. Raises BadClaim."""
        held = self._held.get(sandbox_id) if isinstance(sandbox_id, str) else None
        if held is None or not isinstance(token, str) or not hmac.compare_digest(held.token.encode(), token.encode()):
            # One that is still finding its sandboxes again may yet find this one.
            code = STARTING if self._closed else UNKNOWN_SANDBOX
            raise BadClaim("this gateway does not hold that sandbox", code)
        if held.giving_up is not None:
            held.giving_up.cancel()
            held.giving_up = None
        if held.connection is not None:
            held.connection.held = None
            held.connection.abort()
        return held

    def left(self, held: Held) -> None:
        """The connection of a holder broke: it has a while to come back."""
        held.connection = None
        if self._stopping:
            held.set_used()
        elif held.sandbox.id in self._held:
            self._wait_for_holder(held, 0.0 if held.sandbox.exited.done() else RESUME_SECONDS)

    def _wait_for_holder(self, held: Held, seconds: float) -> None:
        cause = SandboxExit(ExitCause.REQUESTED, evidence={"reason": "its holder went away"})
        held.giving_up = asyncio.get_running_loop().call_later(seconds, self.release_later, held, cause)

    def _let_go(self) -> None:
        """Hang up on all holders and forget what they hold."""
        for held in self._held.values():
            if held.giving_up is not None:
                held.giving_up.cancel()
            held.set_used()
        self._held.clear()
        for connection in self._connections:
            connection.abort()

    def release_later(self, held: Held, cause: SandboxExit) -> None:
        """Release in a task of our own."""
        task = asyncio.get_running_loop().create_task(self.release(held, cause))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def release(self, held: Held, cause: SandboxExit, *, used: bool = True) -> None:
        """Give a sandbox back; returns once it is destroyed. Not `used`: its holder may still read files."""
        if held.giving_up is not None:
            held.giving_up.cancel()
        if used:
            held.set_used()
        if self._held.pop(held.sandbox.id, None) is not None:
            await held.pool.release(held.sandbox, cause)


def _not_mounted(mount: Path) -> str | None:
    """Why a directory of the host does not become a work directory; None where it may. Blocks."""
    if not mount.is_absolute() or not mount.is_dir():
        return "not an absolute path of a directory"
    return refusal(mount)


async def _frames(reader: asyncio.StreamReader) -> AsyncIterator[tuple[dict[str, Any], bytes]]:
    """Yield the peer's frames until it closes. Raises FrameError."""
    frames = FrameReader()
    while data := await reader.read(_PIECE):
        for frame in frames.feed(data):
            yield frame
