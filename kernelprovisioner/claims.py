"""The claim socket, the holder's end: how a provisioner gets a sandbox from a gateway of the same user."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from samovar_kernel.frames import MAX_BODY, FrameError, FrameReader, pack

from kernelprovisioner.launchers.base import Endpoint
from kernelprovisioner.sandbox_exit import CellReference, ExitCause, SandboxExit
from kernelprovisioner.supervisor import SupervisorError

#: How long a gateway keeps a sandbox whose holder's connection broke, in seconds.
RESUME_SECONDS = 30.0
#: The code of a refusal: this gateway does not hold that sandbox, and will not.
UNKNOWN_SANDBOX = "unknown_sandbox"
#: And: this gateway takes no claims yet.
STARTING = "starting"
#: Operations that the gateway passes on to the sandbox's supervisor as they are, with the fields each may have.
RELAYED: dict[str, tuple[str, ...]] = {
    "signal": ("signum",),
    "put": ("path", "offset", "final", "mtime_ns"),
    "get": ("path", "offset", "size"),
    "list": ("after", "limit"),
    "stats": (),
}


class NoGateway(Exception):
    """Nobody serves the claim socket: a sandbox has to be launched without a gateway."""


class ClaimRefused(Exception):
    """The gateway gives no sandbox; `code` says which kind of no, `retry_after` (seconds) when it helps to wait."""

    def __init__(self, text: str, code: str = "failed", retry_after: float | None = None) -> None:
        super().__init__(text)
        self.code = code
        self.retry_after = retry_after


@dataclass(frozen=True)
class ClaimAnswer:
    """What a holder needs to know of its sandbox. `source`: warm, cold or started, as the pool says."""

    sandbox_id: str
    container_id: str
    directory: Path
    channels: dict[str, Endpoint]
    transport: str
    source: str
    token: str

    def as_dict(self) -> dict[str, Any]:
        """As it travels; `from_dict` reads it."""
        return {
            "sandbox_id": self.sandbox_id,
            "container_id": self.container_id,
            "directory": str(self.directory),
            "channels": {name: _endpoint_fields(endpoint) for name, endpoint in self.channels.items()},
            "transport": self.transport,
            "source": self.source,
            "token": self.token,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ClaimAnswer:
        """Raises ClaimRefused where the gateway's answer is not one."""
        try:
            return cls(
                str(fields["sandbox_id"]),
                str(fields["container_id"]),
                Path(fields["directory"]),
                {str(name): _endpoint(value) for name, value in fields["channels"].items()},
                str(fields["transport"]),
                str(fields["source"]),
                str(fields["token"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ClaimRefused(f"the gateway's answer to a claim cannot be read: {error!r}") from None


@dataclass(frozen=True)
class Ending:
    """Why a held sandbox died, and the output records that may not have left its kernel."""

    exit: SandboxExit
    unsent: tuple[dict[str, Any], ...] = ()

    def frame(self) -> bytes:
        """The `exit` event; the oldest records are left out where all of them are too much for one frame."""
        records = list(self.unsent)
        while len(body := json.dumps(records, ensure_ascii=False).encode("utf-8", "surrogatepass")) > MAX_BODY:
            del records[: len(records) // 4 + 1]
        return pack({"event": "exit", **self.exit.as_dict()}, body)

    @classmethod
    def of(cls, header: Mapping[str, Any], body: bytes) -> Ending:
        """Raises ValueError where the event cannot be read."""
        records = json.loads(body)
        cell = header.get("cell")
        exit_ = SandboxExit(
            ExitCause(header["cause"]),
            header.get("exit_code"),
            header.get("signal"),
            dict(header.get("evidence") or {}),
            datetime.fromisoformat(header["at"]),
            None if cell is None else CellReference(str(cell["msg_id"]), cell.get("execution_count")),
        )
        return cls(exit_, tuple(record for record in records if isinstance(record, dict)))


class ClaimConnection(asyncio.Protocol):
    """One held sandbox, seen from its holder: the open connection is what keeps the sandbox."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        #: the sandbox died, as the gateway tells it
        self.ended: asyncio.Future[Ending] = loop.create_future()
        #: the connection is closed
        self.gone: asyncio.Future[None] = loop.create_future()
        self._reader = FrameReader()
        self._replies: dict[int, asyncio.Future[tuple[dict[str, Any], bytes]]] = {}
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._count = 0

    @classmethod
    async def connect(cls, path: Path, *, timeout: float = 2.0) -> ClaimConnection:
        """Return a connection to the gateway at `path`. Raises NoGateway."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                _, connection = await loop.create_unix_connection(cls, str(path))
        except (OSError, TimeoutError) as error:
            raise NoGateway(f"no gateway at {path}: {error}") from None
        if not peer_is_ours(connection._socket()):
            connection.close()
            raise NoGateway(f"{path} is served by another user")
        return connection

    async def claim(
        self, *, image: str, kernel_id: str, key: bytes, env: Mapping[str, str], timeout: float, **fields: Any
    ) -> ClaimAnswer:
        """Return the sandbox that is ours from now on.

        `fields`: mount, hold_ms, notice, session_name. Raises ClaimRefused; NoGateway when the gateway goes away.
        """
        # In the body: an environment may be larger than a frame's header.
        body = json.dumps(dict(env)).encode()
        wanted = {"image": image, "kernel_id": kernel_id, "key": key.decode(), "wait": timeout, **fields}
        header, _ = await self._ask("claim", body, timeout=timeout + 10.0, **wanted)
        return ClaimAnswer.from_dict(header)

    async def resume(self, sandbox_id: str, token: str) -> ClaimAnswer:
        """Take up a sandbox that an earlier connection held. Raises ClaimRefused, NoGateway."""
        header, _ = await self._ask("resume", timeout=10.0, sandbox_id=sandbox_id, token=token)
        return ClaimAnswer.from_dict(header)

    async def request(
        self, op: str, body: bytes = b"", *, timeout: float = 30.0, **fields: Any
    ) -> tuple[dict[str, Any], bytes]:
        """Ask the sandbox's supervisor, as `SupervisorClient.request`. Raises SupervisorError."""
        try:
            return await self._ask(op, body, timeout=timeout, **fields)
        except (ClaimRefused, NoGateway) as error:
            raise SupervisorError(str(error)) from None

    async def release(self) -> None:
        """Give the sandbox up: the gateway destroys it, without our waiting for it. Closes the connection."""
        try:
            await self._ask("release", timeout=5.0)
        except (ClaimRefused, NoGateway):
            # Gone or refused: a closed connection gives it up as well, only later.
            pass
        finally:
            self.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        try:
            for header, body in self._reader.feed(data):
                self._frame(header, body)
        except (FrameError, ValueError, KeyError, TypeError):
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._writable.set()
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(NoGateway("the gateway closed its connection"))
        if not self.gone.done():
            self.gone.set_result(None)

    def _frame(self, header: dict[str, Any], body: bytes) -> None:
        if header.get("event") == "exit":
            if not self.ended.done():
                self.ended.set_result(Ending.of(header, body))
            return
        number = header.get("id")
        reply = self._replies.get(number) if isinstance(number, int) else None
        if reply is not None and not reply.done():
            reply.set_result((header, body))

    async def _ask(self, op: str, body: bytes = b"", *, timeout: float, **fields: Any) -> tuple[dict[str, Any], bytes]:
        self._count += 1
        number = self._count
        reply = self._replies[number] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout):
                await self._writable.wait()
                if self._transport is None or self._transport.is_closing():
                    raise NoGateway("the gateway closed its connection")
                self._transport.write(pack({"op": op, "id": number, **fields}, body))
                header, answer = await reply
        except TimeoutError:
            raise ClaimRefused(f"the gateway did not answer {op!r} within {timeout:g} s") from None
        except FrameError as error:
            raise ClaimRefused(f"{op!r} is too large to send: {error}") from None
        finally:
            del self._replies[number]
            reply.cancel()
        if not header.get("ok"):
            raise ClaimRefused(
                str(header.get("error", "refused"))[:2000], str(header.get("code", "failed")), header.get("retry_after")
            )
        return header, answer

    def _socket(self) -> socket.socket:
        assert self._transport is not None
        found: socket.socket = self._transport.get_extra_info("socket")
        return found


def peer_is_ours(connection: socket.socket) -> bool:
    """Whether the process at the other end of a Unix socket runs under our own uid.

    Where the system does not tell (it does on Linux), the 0700 directory around the socket is what keeps others out.
    """
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return bool(uid == os.getuid())


def _endpoint_fields(endpoint: Endpoint) -> dict[str, Any]:
    if endpoint.path is not None:
        return {"path": str(endpoint.path)}
    return {"host": endpoint.host, "port": endpoint.port}


def _endpoint(fields: Mapping[str, Any]) -> Endpoint:
    if "path" in fields:
        return Endpoint(path=Path(fields["path"]))
    return Endpoint(host=str(fields["host"]), port=int(fields["port"]))
