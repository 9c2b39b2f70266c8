"""KernelSocket: a client of any Jupyter server's kernel websocket, with as little of its own as possible."""

from __future__ import annotations

import json
import socket
import time
import uuid
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

import websocket
from jupyter_server.services.kernels.connection.base import deserialize_msg_from_ws_v1, serialize_msg_to_ws_v1

from gateway.websocket_frames import V1

_ANSWER_TIMEOUT = 60.0


class _QuickSocket(websocket.WebSocket):
    """Acknowledges each piece as soon as it is read, as few clients do: what a server sends next waits for that."""

    def _recv(self, bufsize: int) -> bytes:
        data: bytes = super()._recv(bufsize)
        assert self.sock is not None
        # Linux forgets this with the next packet.
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return data


class KernelSocket:
    """One websocket to the kernel `kernel_id` of the server at `url` (http://…)."""

    def __init__(self, url: str, token: str, kernel_id: str, *, quick_ack: bool = False) -> None:
        self._session = uuid.uuid4().hex
        self._socket = websocket.create_connection(
            f"ws{url.removeprefix('http')}/api/kernels/{kernel_id}/channels?session_id={self._session}",
            timeout=_ANSWER_TIMEOUT,
            subprotocols=[V1],
            header=[f"Authorization: token {token}"],
            class_=_QuickSocket if quick_ack else websocket.WebSocket,
        )
        if self._socket.getsubprotocol() != V1:
            raise RuntimeError(f"{url} does not speak {V1}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._socket.close()

    def execute(self, code: str) -> float:
        """Return the milliseconds from sending `code` to having its reply and its idle."""
        return self.run(code)[0]

    def run(self, code: str) -> tuple[float, list[bytes]]:
        """Return the milliseconds, and the contents of the stream messages as they came."""
        started = time.perf_counter()
        identity = self._send(code)
        streams: list[bytes] = []
        replied = idle = False
        while not (replied and idle):
            channel, parts = deserialize_msg_from_ws_v1(self._socket.recv())
            if json.loads(parts[1]).get("msg_id") != identity:
                continue
            kind = json.loads(parts[0])["msg_type"]
            if kind == "stream":
                streams.append(parts[3])
            replied |= channel == "shell" and kind == "execute_reply"
            idle |= kind == "status" and json.loads(parts[3])["execution_state"] == "idle"
        return (time.perf_counter() - started) * 1000, streams

    def _send(self, code: str) -> str:
        identity = uuid.uuid4().hex
        header = {
            "msg_id": identity,
            "msg_type": "execute_request",
            "username": "bench",
            "session": self._session,
            "date": datetime.now(UTC).isoformat(),
            "version": "5.4",
        }
        content: dict[str, Any] = {
            "code": code,
            "silent": False,
            "store_history": True,
            "user_expressions": {},
            "allow_stdin": False,
            "stop_on_error": True,
        }
        parts = [json.dumps(part).encode() for part in (header, {}, {}, content)]
        self._socket.send_binary(serialize_msg_to_ws_v1(parts, "shell"))
        return identity
