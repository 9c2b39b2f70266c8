"""KernelVoice: what the gateway itself says to a kernel's clients, in messages as the kernel would send them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from gateway.kernel_requests import KernelRequest, KernelRequests
from gateway.output_log import OutputLog
from gateway.outputs import to_json
from kernelprovisioner.sandbox import EndedCell

#: the parent header of a message that answers nothing
NO_PARENT = b"{}"
#: the tag of what all clients get. A reply to a cell of an earlier gateway: behind a proxy, messages have another
#: session than the websocket that they come by, so that nobody knows whose it is
TO_ALL = b""
_PROTOCOL_VERSION = "5.4"


class KernelVoice:
    """Appends to a kernel's log. `session` is the running kernel's: JupyterLab drops what has another one."""

    def __init__(self, log: OutputLog) -> None:
        self.session = secrets.token_hex(16)
        self._log = log

    def parts(self, msg_type: str, content: Mapping[str, Any], parent: bytes = NO_PARENT) -> tuple[bytes, ...]:
        """Return header, parent header, metadata and content of a new message; `parent` is a header as it came."""
        header = {
            "msg_id": secrets.token_hex(16),
            "msg_type": msg_type,
            "username": "samovar",
            "session": self.session,
            "date": datetime.now(UTC).isoformat(),
            "version": _PROTOCOL_VERSION,
        }
        return to_json(header), parent, b"{}", to_json(content)

    def publish(
        self,
        channel: str,
        msg_type: str,
        content: Mapping[str, Any],
        parent: Mapping[str, Any] | bytes | None = None,
        tag: bytes = TO_ALL,
    ) -> None:
        """Send a message to all clients, or to the one that `tag` names."""
        raw = parent if isinstance(parent, bytes) else NO_PARENT if parent is None else header_json(parent)
        self._log.append(channel, self.parts(msg_type, content, raw), tag)

    def stderr(self, text: str, parent: bytes) -> None:
        """Show a text under the cell that `parent` is the header of."""
        self.publish("iopub", "stream", {"name": "stderr", "text": text.rstrip("\n") + "\n"}, parent)

    def idle(self, parent: bytes) -> None:
        """Say that the kernel is done with a request."""
        self.publish("iopub", "status", {"execution_state": "idle"}, parent)

    def reply(self, request: KernelRequest, content: Mapping[str, Any]) -> None:
        """Answer a client's request; one that has its answer, or is no client's, is left alone."""
        if request.tag is not None and not request.replied:
            msg_type = request.msg_type.removesuffix("_request") + "_reply"
            self.publish(request.channel, msg_type, content, request.header, request.tag)

    def death(self, requests: KernelRequests, text: str, ename: str, traceback: Sequence[str]) -> bool:
        """Tell a death to what ran, and answer what waited; return whether a cell ran to which it was told."""
        error: dict[str, Any] = {"ename": ename, "evalue": text, "traceback": list(traceback)}
        told = False
        for request in requests.running:
            fields: dict[str, Any] = {"status": "error", **error}
            if request.msg_type == "execute_request" and not request.is_over:
                told = True
                self.stderr(text, request.header)
                self.publish("iopub", "error", error, request.header)
                fields |= {"execution_count": request.execution_count, "user_expressions": {}, "payload": []}
            self.reply(request, fields)
            self.idle(request.header)
        self._abort(requests.waiting, text)
        return told

    def restart(self, requests: KernelRequests) -> None:
        """Answer what ran and what waited in a kernel that is given up for a new one."""
        self._abort([*requests.running, *requests.waiting], "The kernel was restarted.")

    def orphan(self, request: KernelRequest) -> None:
        """Answer a cell whose own reply went to a gateway that is no more, as far as its outputs tell how it ended."""
        content: dict[str, Any] = {"status": "ok", "execution_count": request.execution_count}
        if request.failed:
            content |= {"status": "error", "ename": "", "evalue": "", "traceback": []}
        content |= {"user_expressions": {}, "payload": []}
        self.publish("shell", "execute_reply", content, request.header, TO_ALL)

    def ended(self, cell: EndedCell, header: bytes) -> None:
        """Answer a cell that ended while no gateway was there."""
        content: dict[str, Any] = {"status": cell.status, "execution_count": cell.execution_count}
        if cell.status == "error":
            error = {"ename": cell.ename, "evalue": cell.evalue, "traceback": cell.traceback}
            self.publish("iopub", "error", error, header)
            content |= error
        content |= {"user_expressions": {}, "payload": []}
        self.publish("shell", "execute_reply", content, header, TO_ALL)
        self.idle(header)

    def _abort(self, requests: Sequence[KernelRequest], why: str) -> None:
        for request in requests:
            self.reply(request, {"status": "aborted", "ename": "Aborted", "evalue": why, "traceback": []})
            self.idle(request.header)


def header_json(header: Mapping[str, Any]) -> bytes:
    """A header as a sandbox told it, as JSON; none where it cannot be that: user code may have made it up."""
    try:
        return to_json(header)
    except (ValueError, RecursionError):
        return NO_PARENT
