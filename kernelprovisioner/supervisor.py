"""The host's end of a supervisor's stream: signals, files, statistics, and the news that the kernel process ended."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from samovar_kernel.frames import FrameError, FrameReader, pack

from kernelprovisioner import endpoints
from kernelprovisioner.launchers.base import Endpoint

_RETRY_SECONDS = 0.01
_MAX_PENDING = 64


class SupervisorError(Exception):
    """The supervisor is gone, broke the protocol, or refused a request."""


@dataclass(frozen=True)
class KernelExit:
    """How a kernel process ended, as its supervisor tells it: evidence against its own session only.

    `unsent` are the output records that may not have left the kernel, see `remaining_output`. `stopped`: the
    supervisor itself was told to end, and ended the kernel for that.
    """

    code: int | None
    signal: int | None
    unsent: tuple[dict[str, Any], ...] = ()
    stopped: bool = False


def remaining_output(
    unsent: tuple[dict[str, Any], ...], received: set[str], parent_id: str | None = None
) -> list[dict[str, Any]]:
    """Return the text records that come after the last stream message that was received (msg_ids in `received`).

    Who has heard one cell only names it in `parent_id`: the records reach back to cells before it.
    """
    start = 0
    for index, record in enumerate(unsent):
        if record.get("kind") == "mark" and record.get("msg_id") in received:
            start = index + 1
    return [
        record
        for record in unsent[start:]
        # an empty text only says which cell had begun
        if record.get("kind") == "text"
        and record["text"]
        and (parent_id is None or record["parent"].get("msg_id") == parent_id)
    ]


class SupervisorClient(asyncio.Protocol):
    """One authenticated connection to a supervisor. Requests may overlap; each has one reply."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[KernelExit] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()
        self._hello: asyncio.Future[dict[str, Any]] = loop.create_future()
        self._reader = FrameReader()
        self._replies: dict[int, asyncio.Future[tuple[dict[str, Any], bytes]]] = {}
        self._transport: asyncio.Transport | None = None
        self._count = 0

    @classmethod
    async def connect(cls, endpoint: Endpoint, token: str, *, timeout: float) -> SupervisorClient:
        """Return the connected client, trying again until `timeout` seconds have passed. Raises SupervisorError."""
        try:
            async with asyncio.timeout(timeout):
                while True:
                    try:
                        client = await endpoints.connect(endpoint, cls)
                    except endpoints.NotASocket as error:
                        raise SupervisorError(str(error)) from None
                    except OSError:
                        await asyncio.sleep(_RETRY_SECONDS)
                        continue
                    try:
                        client._send({"op": "hello", "token": token})
                        await client._hello
                    except SupervisorError:
                        await asyncio.sleep(_RETRY_SECONDS)
                    except BaseException:
                        client.close()
                        raise
                    else:
                        return client
        except TimeoutError:
            raise SupervisorError(f"the supervisor did not answer within {timeout:g} s") from None

    async def request(
        self, op: str, body: bytes = b"", *, timeout: float = 30.0, **fields: Any
    ) -> tuple[dict[str, Any], bytes]:
        """Return the reply's header and body. Raises SupervisorError where it is refused, late, or never comes."""
        if len(self._replies) >= _MAX_PENDING:
            raise SupervisorError(f"more than {_MAX_PENDING} requests wait for the supervisor")
        self._count += 1
        number = self._count
        reply = self._replies[number] = asyncio.get_running_loop().create_future()
        try:
            self._send({"op": op, "id": number, **fields}, body)
            async with asyncio.timeout(timeout):
                header, answer = await reply
        except TimeoutError:
            raise SupervisorError(f"the supervisor did not answer {op!r} within {timeout:g} s") from None
        finally:
            del self._replies[number]
        if not header.get("ok"):
            raise SupervisorError(str(header.get("error", f"{op!r} failed"))[:1000])
        return header, answer

    async def signal(self, signum: int) -> None:
        """Send a signal to the kernel's process group."""
        await self.request("signal", signum=signum)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for header, body in self._reader.feed(data):
                self._frame(header, body)
        except (FrameError, SupervisorError):
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        error = SupervisorError("the supervisor closed its stream")
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(error)
        if not self._hello.done():
            self._hello.set_exception(error)
            self._hello.exception()  # seen: whoever greeted may have gone already
        if not self.gone.done():
            self.gone.set_result(None)

    def _frame(self, header: dict[str, Any], body: bytes) -> None:
        if header.get("event") == "exit":
            if not self.exited.done():
                self.exited.set_result(_kernel_exit(header, body))
        elif "id" in header:
            number = header["id"]
            reply = self._replies.get(number) if isinstance(number, int) else None
            if reply is not None and not reply.done():
                reply.set_result((header, body))
        elif header.get("ok") and not self._hello.done():
            self._hello.set_result(header)

    def _send(self, header: dict[str, Any], body: bytes = b"") -> None:
        if self._transport is None or self._transport.is_closing():
            raise SupervisorError("the supervisor's stream is closed")
        self._transport.write(pack(header, body))


def _kernel_exit(header: dict[str, Any], body: bytes) -> KernelExit:
    code, signal = header.get("code"), header.get("signal")
    try:
        records = json.loads(body) if body else []
    except (ValueError, RecursionError):
        records = []
    return KernelExit(
        code if isinstance(code, int) else None,
        signal if isinstance(signal, int) else None,
        tuple(record for record in records if _is_record(record)) if isinstance(records, list) else (),
        header.get("stopped") is True,
    )


def _is_record(record: object) -> bool:
    """What comes from a sandbox has the shape we read from it, or is left out."""
    if not isinstance(record, dict):
        return False
    if record.get("kind") == "mark":
        return isinstance(record.get("msg_id"), str)
    return (
        record.get("kind") == "text"
        and record.get("name") in ("stdout", "stderr")
        and isinstance(record.get("text"), str)
        and isinstance(record.get("parent"), dict)
    )
