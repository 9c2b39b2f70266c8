"""KernelMonitor: listens to a kernel that others talk to, to know which cell runs and what output has arrived."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from kernelprovisioner.launchers.base import Endpoint
from kernelprovisioner.wire import KernelWire, Message, WireError

#: Status, input and the other messages of the kernel itself, and its output streams; nothing of comms and widgets.
_TOPICS = (b"kernel.", b"stream.")
_MAX_RUNNING = 64
_MAX_REMEMBERED = 4096
#: As jupyter_client's `Session` numbers its messages: session, process, number.
_NUMBERED = re.compile(r"(.+_[0-9]+_)([0-9]{1,12})")
#: Kernels' ids have some fifty characters; one that user code forged is not remembered.
_MAX_ID = 256


@dataclass
class RunningCell:
    """A cell that has begun and has no `idle` yet: its request's header, as its sender wrote it."""

    header: dict[str, Any]
    execution_count: int | None = None


class _Status(msgspec.Struct):
    execution_state: str


class _Input(msgspec.Struct):
    execution_count: int | None = None


class KernelMonitor:
    """A second subscriber of one kernel. Not thread-safe: it belongs to the loop that made it."""

    def __init__(self, wire: KernelWire, on_cell_end: Callable[[], None]) -> None:
        self._wire = wire
        self._on_cell_end = on_cell_end
        self._running: OrderedDict[str, RunningCell] = OrderedDict()
        self._streams: OrderedDict[str, None] = OrderedDict()
        self._ended: OrderedDict[str, None] = OrderedDict()
        #: the last request of each sender who numbers them
        self._senders: OrderedDict[str, tuple[int, dict[str, Any]]] = OrderedDict()
        wire.on_other = self._heard

    @classmethod
    async def connect(
        cls, channels: Mapping[str, Endpoint], key: bytes, on_cell_end: Callable[[], None], *, timeout: float
    ) -> KernelMonitor:
        """Return a monitor that hears; `on_cell_end` is called after each cell's `idle`. Raises WireError."""
        wire = await KernelWire.connect(channels, key, timeout=timeout, names=("iopub",), topics=_TOPICS)
        return cls(wire, on_cell_end)

    def running(self, unsent: Iterable[Mapping[str, Any]] = ()) -> list[RunningCell]:
        """The cells that have begun and not ended, the first one first.

        `unsent` are a dead kernel's last records: they name a cell whose `busy` was lost with the kernel.
        """
        cells = dict(self._running)
        for record in unsent:
            header = record.get("parent")
            if isinstance(header, dict) and header.get("msg_type") == "execute_request":
                msg_id = str(header.get("msg_id"))
                if msg_id not in self._ended:
                    cells.setdefault(msg_id, RunningCell(header))
        return list(cells.values())

    def unheard(self) -> list[RunningCell]:
        """The next request of each sender who has no cell that runs, as its header would be.

        A kernel that died may have taken it along before it said anything of it; only its sender knows.
        """
        waiting = {str(cell.header.get("session")) for cell in self._running.values()}
        return [
            RunningCell({**header, "msg_id": f"{prefix}{number + 1}", "msg_type": "execute_request"})
            for prefix, (number, header) in self._senders.items()
            if str(header.get("session")) not in waiting
        ]

    @property
    def received(self) -> set[str]:
        """Ids of the last stream messages that arrived."""
        return set(self._streams)

    async def close(self) -> None:
        await self._wire.close()

    def _heard(self, message: Message) -> None:
        if max(len(message.msg_id), len(message.parent_id)) > _MAX_ID:
            return
        try:
            self._note(message)
        except WireError:
            # Content that cannot be read tells us nothing; whoever it is meant for will say so.
            return

    def _note(self, message: Message) -> None:
        if message.msg_type == "stream":
            self._streams[message.msg_id] = None
            if len(self._streams) > _MAX_REMEMBERED:
                self._streams.popitem(last=False)
            return
        if message.msg_type == "status":
            self._note_sender(message)
        if message.parent_header.get("msg_type") != "execute_request":
            return
        if message.msg_type == "status":
            self._note_status(message, message.content_as(_Status).execution_state)
        elif message.msg_type == "execute_input" and message.parent_id in self._running:
            self._running[message.parent_id].execution_count = message.content_as(_Input).execution_count

    def _note_sender(self, message: Message) -> None:
        numbered = _NUMBERED.fullmatch(message.parent_id)
        if numbered is None:
            return
        prefix, number = numbered[1], int(numbered[2])
        last, _ = self._senders.pop(prefix, (-1, None))
        self._senders[prefix] = (max(last, number), message.parent_header)
        if len(self._senders) > _MAX_RUNNING:
            self._senders.popitem(last=False)

    def _note_status(self, message: Message, state: str) -> None:
        if state == "busy":
            self._running[message.parent_id] = RunningCell(message.parent_header)
            if len(self._running) > _MAX_RUNNING:
                self._running.popitem(last=False)
        elif state == "idle":
            self._running.pop(message.parent_id, None)
            self._ended[message.parent_id] = None
            if len(self._ended) > _MAX_REMEMBERED:
                self._ended.popitem(last=False)
            self._on_cell_end()
