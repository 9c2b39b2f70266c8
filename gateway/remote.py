"""Kernels of a gateway over HTTP, for nbclient and what is built on it (papermill, nbconvert, `samovar run`).

    NotebookClient(notebook, kernel_manager_class="gateway.remote.RemoteKernelManager")

with JUPYTER_GATEWAY_URL and JUPYTER_GATEWAY_AUTH_TOKEN in the environment. Files stay where they are: cells see neither
the notebook's directory nor anything else of this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import uuid
from http import HTTPStatus
from queue import Empty
from typing import Any

import msgspec
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.session import Session
from tornado.escape import url_escape
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from traitlets import Unicode, default

from gateway.kernel_socket import UNREACHABLE, End, ErrorBody, KernelSocket
from gateway.websocket_frames import CHANNELS, V1, FrameError, decode, encode

#: seconds that the gateway may let us wait in line for a kernel
_LAUNCH_TIMEOUT = 125
_CONNECT_TIMEOUT = 20.0
_REQUEST_TIMEOUT = 60.0
#: bytes that have come and were not asked for yet, before no more are read
_MAX_UNREAD = 64 * 2**20

_log = logging.getLogger(__name__)


class GatewayError(RuntimeError):
    """The gateway did not do what it was asked for; one sentence for a person. `status`: its HTTP status, 0: none."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


class RemoteKernelManager(AsyncKernelManager):
    """A kernel of a gateway, as far as an nbclient manages one. (Its base is typed as if it were blocking.)"""

    gateway_url = Unicode(help="The gateway's address; default: JUPYTER_GATEWAY_URL.").tag(config=True)
    api_key = Unicode(help="The API key; default: JUPYTER_GATEWAY_AUTH_TOKEN.").tag(config=True)

    @default("gateway_url")
    def _default_gateway_url(self) -> str:
        return os.environ.get("JUPYTER_GATEWAY_URL", "")

    @default("api_key")
    def _default_api_key(self) -> str:
        return os.environ.get("JUPYTER_GATEWAY_AUTH_TOKEN", "")

    @property
    def has_kernel(self) -> bool:
        """Whether one was started and not shut down."""
        return self.kernel_id is not None

    async def start_kernel(self, **_: Any) -> None:  # type: ignore[override]
        """Start a kernel; directory and arguments that are given mean nothing over there. Raises GatewayError."""
        body: dict[str, Any] = {"env": {"KERNEL_LAUNCH_TIMEOUT": str(_LAUNCH_TIMEOUT)}}
        if self.kernel_name:
            body["name"] = self.kernel_name
        model = await self._call("POST", "", body, timeout=_LAUNCH_TIMEOUT + 5)
        self.kernel_id = str(model["id"])

    async def shutdown_kernel(self, now: bool = False, restart: bool = False) -> None:  # type: ignore[override]
        """End the kernel. Where that fails it is only told: the run itself is over."""
        if not self.has_kernel:
            return
        try:
            await self._call("DELETE", f"/{self.kernel_id}")
        except GatewayError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                self.log.warning("the kernel %s was not ended: %s", self.kernel_id, error)
        self.kernel_id = None

    async def restart_kernel(self, now: bool = False, newports: bool = False, **_: Any) -> None:  # type: ignore[override]
        """Start the kernel anew, under its id. Raises GatewayError."""
        await self._call("POST", f"/{self.kernel_id}/restart", {})

    async def interrupt_kernel(self) -> None:  # type: ignore[override]
        """Interrupt what runs. Raises GatewayError."""
        await self._call("POST", f"/{self.kernel_id}/interrupt", {})

    async def is_alive(self) -> bool:  # type: ignore[override]
        """Whether it has to be shut down; its client learns by itself when it is gone."""
        return self.has_kernel

    async def cleanup_resources(self, restart: bool = False) -> None:  # type: ignore[override]
        """Nothing of it is on this machine."""

    def client(self, **_: Any) -> RemoteKernelClient:  # type: ignore[override]
        """A client of the kernel, not connected yet."""
        if self.kernel_id is None:
            raise GatewayError("there is no kernel to connect to")
        address = f"{self._kernels_url}/{self.kernel_id}/channels".replace("http", "ws", 1)
        return RemoteKernelClient(address, self._headers)

    @property
    def _kernels_url(self) -> str:
        if not self.gateway_url.startswith(("http://", "https://")):
            raise GatewayError(f"{self.gateway_url!r} is no address of a gateway: it begins with http:// or https://")
        return f"{self.gateway_url.rstrip('/')}/api/kernels"

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    async def _call(self, method: str, path: str, body: Any = None, *, timeout: float = _REQUEST_TIMEOUT) -> Any:
        """One HTTP call; returns the answer's JSON. Raises GatewayError."""
        request = HTTPRequest(
            self._kernels_url + path,
            method,
            self._headers | {"Content-Type": "application/json"},
            body=None if body is None else json.dumps(body),
            connect_timeout=_CONNECT_TIMEOUT,
            request_timeout=timeout,
        )
        client = AsyncHTTPClient(force_instance=True)
        try:
            response = await client.fetch(request)
        except HTTPClientError as error:
            raise GatewayError(_explained(self.gateway_url, error), error.code) from None
        except OSError as error:
            raise GatewayError(f"no gateway answers at {self.gateway_url}: {error}") from None
        finally:
            client.close()
        return json.loads(response.body) if response.body else None


class RemoteKernelClient(AsyncKernelClient):
    """The channels of a gateway's kernel over one websocket, which is made again after a cut: no message is lost."""

    def __init__(self, address: str, headers: dict[str, str]) -> None:
        # Without a key nothing is signed: the gateway does that.
        super().__init__(session=Session(key=b"", session=uuid.uuid4().hex))
        self._address = address
        self._http_headers = headers
        self._unread = _Unread()
        self._channels = {name: _Channel(self, name, self._unread) for name in CHANNELS}
        self._socket = KernelSocket(self._request, V1, self._deliver)
        self._task: asyncio.Task[None] | None = None
        self._end: End | None = None

    async def start_channels(self, *_: Any, **__: Any) -> None:  # type: ignore[override]
        """Connect. Raises GatewayError."""
        self._task = asyncio.create_task(self._run(), name=f"websocket to {self._address}")
        opened = asyncio.create_task(self._socket.opened.wait())
        try:
            await asyncio.wait({self._task, opened}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            opened.cancel()
        if self._end is not None:
            raise GatewayError(self._end.reason)

    async def stop_channels(self) -> None:  # type: ignore[override]
        """Close the connection. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def wait_for_ready(self, timeout: float | None = None) -> None:
        """Wait for the kernel's first answer. Raises RuntimeError where none comes within so many seconds."""
        try:
            self._handle_kernel_info_reply(await self.kernel_info(reply=True, timeout=timeout))
        except TimeoutError:
            raise RuntimeError(f"the kernel did not answer within {timeout:g} s") from None

    async def is_alive(self) -> bool:
        """Whether messages can still come."""
        return self._end is None

    @property
    def channels_running(self) -> bool:
        """Whether messages can still come."""
        return self._task is not None and self._end is None

    @property
    def shell_channel(self) -> Any:
        """The channel of requests that wait for each other."""
        return self._channels["shell"]

    @property
    def control_channel(self) -> Any:
        """The channel of requests that do not wait."""
        return self._channels["control"]

    @property
    def stdin_channel(self) -> Any:
        """The channel on which the kernel asks."""
        return self._channels["stdin"]

    @property
    def iopub_channel(self) -> Any:
        """The channel of outputs."""
        return self._channels["iopub"]

    def send(self, channel: str, message: dict[str, Any]) -> None:
        """Send a message, now or when there is a connection again. Raises SocketFullError."""
        parts = [*self.session.serialize(message)[-4:], *map(bytes, message.get("buffers") or ())]
        self._socket.send(encode(V1, channel, parts))

    async def _run(self) -> None:
        end = End(UNREACHABLE, "the connection to the gateway failed")
        try:
            end = await self._socket.run()
        finally:
            self._end = end
            for channel in self._channels.values():
                channel.close(end.reason)

    async def _deliver(self, frame: str | bytes) -> None:
        try:
            name, parts = decode(V1, frame, CHANNELS)
            message = self.session.deserialize([b"", *parts])
        except (FrameError, ValueError, TypeError, KeyError) as error:
            _log.warning("a message of the gateway cannot be read: %s", error)
            return
        await self._unread.room()
        self._channels[name].put(message, len(frame))

    def _request(self, position: str) -> HTTPRequest:
        address = f"{self._address}?session_id={url_escape(self.session.session)}"
        if position:
            address += f"&samovar_after={url_escape(position)}"
        return HTTPRequest(
            address,
            headers=self._http_headers,
            connect_timeout=_CONNECT_TIMEOUT,
            request_timeout=_CONNECT_TIMEOUT,
            validate_cert=True,
        )


class _Unread:
    """How many bytes of messages nobody has asked for yet, over all channels of a client."""

    def __init__(self) -> None:
        self._bytes = 0
        self._room = asyncio.Event()
        self._room.set()

    def change(self, size: int) -> None:
        """Count bytes that came (positive) or were read (negative)."""
        self._bytes += size
        if self._bytes > _MAX_UNREAD:
            self._room.clear()
        else:
            self._room.set()

    async def room(self) -> None:
        """Wait until more may come."""
        await self._room.wait()


class _Channel:
    """The messages of one channel, with the interface that jupyter_client's channels have."""

    def __init__(self, client: RemoteKernelClient, name: str, unread: _Unread) -> None:
        self._client = client
        self._name = name
        self._unread = unread
        self._queue: asyncio.Queue[tuple[dict[str, Any], int] | None] = asyncio.Queue()
        self._reason = ""

    def put(self, message: dict[str, Any], size: int) -> None:
        """Add a message that came, of so many bytes."""
        self._unread.change(size)
        self._queue.put_nowait((message, size))

    def close(self, reason: str) -> None:
        """Let readers know that nothing comes after what is there."""
        self._reason = reason
        self._queue.put_nowait(None)

    def send(self, message: dict[str, Any]) -> None:
        """Send a message."""
        self._client.send(self._name, message)

    async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:
        """The next message. Raises queue.Empty after so many seconds, GatewayError where none can come."""
        try:
            async with asyncio.timeout(timeout):
                found = await self._queue.get()
        except TimeoutError:
            raise Empty from None
        if found is None:
            self._queue.put_nowait(None)
            raise GatewayError(f"the kernel is gone: {self._reason}")
        message, size = found
        self._unread.change(-size)
        return message

    async def msg_ready(self) -> bool:
        """Whether a message is there."""
        return not self._queue.empty()

    def is_alive(self) -> bool:
        """Whether messages can come."""
        return self._client.channels_running


def _explained(url: str, error: HTTPClientError) -> str:
    """What an HTTP error means to the person who asked for a kernel."""
    if error.code == HTTPStatus.FORBIDDEN:
        return f"the gateway at {url} does not accept this API key"
    text = error.message
    if error.response is not None:
        with contextlib.suppress(msgspec.MsgspecError):
            text = msgspec.json.decode(error.response.body, type=ErrorBody).message
    return f"the gateway at {url} answered {error.code}: {text}"
