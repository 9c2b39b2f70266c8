"""KernelHearing: takes in what a kernel sends: into the log, and into what is known of its requests."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from gateway.client_sessions import MAX_SESSION_ID, ClientSessions
from gateway.kernel_requests import KernelRequest, KernelRequests
from gateway.kernel_voice import TO_ALL, KernelVoice, header_json
from gateway.output_log import OutputLog
from gateway.stream_limit import StreamLimit, beginning_of
from gateway.websocket_frames import FrameError, header_of
from kernelprovisioner.sandbox import EndedCell
from kernelprovisioner.wire import Message, WireError

#: A dead kernel's unsent output is told from what has come by the ids of so many messages.
_REMEMBERED_STREAM_MESSAGES = 4096
_REMEMBERED_ANSWERS = 64
_MISSED = "[samovar: the gateway was restarted while this cell ran: what it wrote in the meantime is lost]"
_log = logging.getLogger(__name__)


class _Status(msgspec.Struct):
    execution_state: str


class _Input(msgspec.Struct):
    execution_count: int | None = None


class KernelHearing:
    """One kernel's ear. What it sends goes on as it came, but for text past the limit of its cell."""

    def __init__(
        self,
        log: OutputLog,
        requests: KernelRequests,
        sessions: ClientSessions,
        voice: KernelVoice,
        limit: StreamLimit,
        on_change: Callable[[], None],
        on_activity: Callable[[], None],
    ) -> None:
        """`on_change` is told that the kernel may be busy or idle now, `on_activity` that it has said something."""
        #: ids of the stream messages that came last
        self.stream_ids: deque[str] = deque(maxlen=_REMEMBERED_STREAM_MESSAGES)
        #: the client session of the gateway's own requests
        self.own_session = ""
        #: cells of an earlier gateway whose answer was made up
        self._made_up: deque[str] = deque(maxlen=_REMEMBERED_ANSWERS)
        self._log = log
        self._requests = requests
        self._sessions = sessions
        self._voice = voice
        self._limit = limit
        self._on_change = on_change
        self._on_activity = on_activity

    def hear(self, message: Message) -> None:
        """Take in one message. Called by the wire: must neither wait nor raise."""
        if message.channel != "iopub":
            # Without a tag it answers the gateway's own calls: claims, probes, REST.
            if message.tag:
                self._log.append(message.channel, message.parts, message.tag)
                # A question on stdin is no answer: what asks it runs on.
                if message.msg_type.endswith("_reply"):
                    self._requests.replied(message.parent_id)
                self._on_activity()
            return
        request = self._requests.find(message.parent_id)
        if request is not None and request.orphaned:
            self._name(request, message.parts[1])
        match message.msg_type:
            case "stream":
                self._stream(message)
            case "status":
                self._status(message)
            case "iopub_welcome":
                # for whoever subscribed, which was the gateway
                return
            case "execute_input":
                self._executing(message)
                self._log.append("iopub", message.parts)
            case _:
                self._note_error(message)
                self._log.append("iopub", message.parts)
        self._on_activity()

    def _stream(self, message: Message) -> None:
        if len(message.msg_id) <= MAX_SESSION_ID:
            self.stream_ids.append(message.msg_id)
        content = message.parts[3]
        share = self._limit.take(message.parent_id[:MAX_SESSION_ID], len(content))
        if share.passed == len(content):
            self._log.append("iopub", message.parts)
        elif share.cut_begins:
            if (first := beginning_of(content, share.passed)) is not None:
                self._log.append("iopub", (*message.parts[:3], first))
            limit = f"{self._limit.limit / 2**20:.3g} MiB"
            self._voice.stderr(
                f"[samovar: this cell has printed {limit} of text, the limit: what it prints from here on is cut]",
                message.parts[1],
            )

    def tell_cut(self, cell: str, header: bytes) -> None:
        """A cell has ended: say how much of its text was left out."""
        if cut := self._limit.end(cell[:MAX_SESSION_ID]):
            self._voice.stderr(f"[samovar: {cut / 2**20:.1f} MiB of text of this cell were cut]", header)

    def _status(self, message: Message) -> None:
        try:
            state = message.content_as(_Status).execution_state
        except WireError:
            state = ""
        parent = message.parent_id
        if state == "busy" and parent:
            kind = str(message.parent_header.get("msg_type", ""))
            orphaned = kind == "execute_request" and self._sessions.expecting
            begun = self._requests.began(parent, kind, message.parts[1], orphaned=orphaned)
            if begun.orphaned:
                self._name(begun, message.parts[1])
        elif state == "idle":
            self.tell_cut(parent, message.parts[1])
            request = self._requests.find(parent)
            if request is not None:
                self.answer_orphan(request)
        self._log.append("iopub", message.parts)
        if state == "idle":
            self._requests.ended(parent)
        self._on_change()

    def _executing(self, message: Message) -> None:
        request = self._requests.find(message.parent_id)
        if request is not None:
            try:
                request.execution_count = message.content_as(_Input).execution_count
            except WireError as error:
                _log.debug("an execute_input has no count: %s", error)

    def _note_error(self, message: Message) -> None:
        if message.msg_type == "error":
            request = self._requests.find(message.parent_id)
            if request is not None:
                request.failed = True

    def answer_orphan(self, request: KernelRequest) -> None:
        """A cell that an earlier gateway had sent has ended: its reply went there, so that its client needs one."""
        if request.orphaned and request.tag is not None and not request.replied:
            if request.missed:
                self._voice.stderr(_MISSED, request.header)
            self._voice.orphan(request)
            request.replied = True
            self._made_up.append(request.msg_id)

    def make_up(self, cell: EndedCell) -> None:
        """Answer a cell that ended before anybody listened, unless it was heard to end."""
        msg_id = cell.header.get("msg_id")
        if not isinstance(msg_id, str) or msg_id in self._made_up or self._requests.find(msg_id) is not None:
            return
        header = header_json(cell.header)
        if self._is_of_a_client(header):
            if cell.status != "aborted":
                self._voice.stderr(_MISSED, header)
            self._voice.ended(cell, header)

    def suppose(self, unsent: Sequence[Mapping[str, Any]]) -> None:
        """A kernel ended before it was heard what it runs: by its unsent output, that is what it had begun last."""
        header: Mapping[str, Any] = next((record["parent"] for record in reversed(unsent) if record.get("parent")), {})
        msg_id = header.get("msg_id")
        if not isinstance(msg_id, str) or header.get("msg_type") != "execute_request":
            return
        request = self._requests.find(msg_id)
        if request is not None:
            request.begun = True
        elif self._sessions.expecting:
            # An earlier gateway had sent it.
            self._name(self._requests.adopt(msg_id), header_json(header))

    def _name(self, request: KernelRequest, header: bytes) -> None:
        """A cell of an earlier gateway has its header now: from here on its client is answered like any other."""
        self._requests.name(request, header)
        if request.tag is None and self._is_of_a_client(request.header):
            request.tag, request.replied = TO_ALL, False

    def _is_of_a_client(self, header: bytes) -> bool:
        """Whether a request was a client's of an earlier gateway, not that gateway's own."""
        try:
            session = header_of([header]).session
        except FrameError:
            return False
        return 0 < len(session) <= MAX_SESSION_ID and session != self.own_session
