"""OutputCollector: a cell's iopub messages in, its nbformat outputs out, within bounds."""

from __future__ import annotations

import io
import json
import logging
import re
from collections import deque
from dataclasses import dataclass
from typing import Any

import msgspec

from kernelprovisioner.wire import Message, WireError

_ERROR_RESERVE = 64 * 1024
_MAX_TRACEBACK_LINES = 1000
#: Marks that a traceback's JSON may have: each pair of them is a string, which costs its reader some 60 bytes more.
_MAX_TRACEBACK_QUOTES = 200_000
_REMEMBERED_STREAM_MESSAGES = 4096
#: Message and display ids that are longer are not remembered: what is kept of a message is bounded, too.
_MAX_ID = 256
#: What an output costs beside its data and metadata.
_BUNDLE_BYTES = 100
_log = logging.getLogger(__name__)
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


@dataclass(frozen=True)
class CellError:
    """The exception that ended a cell; the traceback may carry ANSI colours."""

    ename: str
    evalue: str
    traceback: tuple[str, ...]

    @property
    def plain_traceback(self) -> str:
        """The traceback as lines without ANSI sequences, ending with a line break."""
        text = _ANSI.sub("", "\n".join(self.traceback)) or f"{self.ename}: {self.evalue}"
        return text if text.endswith("\n") else text + "\n"


@dataclass
class _Stream:
    name: str
    text: io.StringIO
    size: int = 0
    cut: int = 0


@dataclass
class _Bundle:
    """A display_data, execute_result or error; `fields` are JSON already, so their size is what they cost."""

    kind: str
    fields: dict[str, bytes]

    @property
    def size(self) -> int:
        return _BUNDLE_BYTES + sum(map(len, self.fields.values()))


class ErrorContent(msgspec.Struct):
    """What is read of an error message and of an error reply."""

    ename: str = ""
    evalue: str = ""
    traceback: msgspec.Raw = msgspec.Raw(b"[]")

    @property
    def lines(self) -> list[str]:
        """The traceback; one line in its place where it is no list of strings, or one of too many."""
        if bytes(self.traceback).count(b'"') > _MAX_TRACEBACK_QUOTES:
            return ["[samovar: the traceback was cut: it has too many lines]"]
        try:
            return msgspec.json.decode(self.traceback, type=list[str])
        except (msgspec.DecodeError, UnicodeDecodeError):
            return []


class _StreamContent(msgspec.Struct):
    name: str
    text: str


class _Transient(msgspec.Struct):
    display_id: str | None = None


class _DisplayContent(msgspec.Struct):
    """Data and metadata are passed on as they came: nobody here needs the objects that they describe."""

    data: msgspec.Raw
    metadata: msgspec.Raw = msgspec.Raw(b"{}")
    transient: _Transient | None = None
    execution_count: int | None = None

    @property
    def display_id(self) -> str | None:
        display_id = self.transient.display_id if self.transient is not None else None
        return display_id if display_id is not None and len(display_id) <= _MAX_ID else None


class _ClearContent(msgspec.Struct):
    wait: bool = False


class _PlainData(msgspec.Struct):
    text: str | None = msgspec.field(name="text/plain", default=None)


class OutputCollector:
    """Keeps what a notebook would show of one cell, within `max_bytes` and `max_outputs`; counts and tells what is cut.

    Beside it, `written("stdout")` is all that went to a stream, also where `clear_output` took it from view.
    Everything that comes in was made by a sandbox: shapes are checked, what does not fit is left out.
    """

    def __init__(self, *, max_bytes: int, max_outputs: int) -> None:
        self._max_bytes = max_bytes
        self._max_outputs = max_outputs
        self._outputs: list[_Stream | _Bundle] = []
        self._displays: dict[str, list[_Bundle]] = {}
        self._used = 0
        self._cut_outputs = 0
        self._clear_next = False
        self._written = {name: _Stream(name, io.StringIO()) for name in ("stdout", "stderr")}
        self._stream_ids: deque[str] = deque(maxlen=_REMEMBERED_STREAM_MESSAGES)
        self.result_text: str | None = None

    @property
    def stream_ids(self) -> set[str]:
        """Ids of the stream messages that came last: what needs no reading out after a death."""
        return set(self._stream_ids)

    def take(self, message: Message) -> None:
        """Take in one iopub message."""
        try:
            self._take(message)
        except WireError as error:
            _log.debug("output left out: %s", error)

    def _take(self, message: Message) -> None:
        match message.msg_type:
            case "stream":
                if len(message.msg_id) <= _MAX_ID:
                    self._stream_ids.append(message.msg_id)
                stream = message.content_as(_StreamContent)
                self.write(stream.name, stream.text)
            case "display_data" | "execute_result":
                self._take_display(message.msg_type, message.content_as(_DisplayContent))
            case "update_display_data":
                self._update(message.content_as(_DisplayContent))
            case "error":
                self._take_error(message)
            case "clear_output":
                if message.content_as(_ClearContent).wait:
                    self._clear_next = True
                else:
                    self._clear()

    def write(self, name: str, text: str) -> None:
        """Add `text` to a stream ("stdout" or "stderr"); text after text of the same stream is one output."""
        if name not in ("stdout", "stderr") or not text:
            return
        whole = self._written[name]
        whole.cut += _append(whole, text, self._max_bytes - whole.size)
        self._clear_if_due()
        last = self._outputs[-1] if self._outputs else None
        if not (isinstance(last, _Stream) and last.name == name):
            if len(self._outputs) >= self._max_outputs:
                self._cut_outputs += 1
                return
            last = _Stream(name, io.StringIO())
            self._outputs.append(last)
        before = last.size
        last.cut += _append(last, text, self._max_bytes - self._used)
        self._used += last.size - before

    def written(self, name: str) -> str:
        """All that was written to a stream, with the notice of what was cut."""
        return _text(self._written[name], self._max_bytes)

    def outputs(self) -> list[dict[str, Any]]:
        """The outputs as nbformat has them, ready for the JSON encoder; last the notice of outputs that were cut."""
        listed: list[dict[str, Any]] = []
        for output in self._outputs:
            if isinstance(output, _Bundle):
                fields = {name: msgspec.Raw(encoded) for name, encoded in output.fields.items()}
                listed.append({"output_type": output.kind, **fields})
            else:
                listed.append(_stream_output(output.name, _text(output, self._max_bytes)))
        if self._cut_outputs:
            many = "1 more output was" if self._cut_outputs == 1 else f"{self._cut_outputs} more outputs were"
            notice = f"[samovar: {many} cut; {self._limits()}]\n"
            listed.append(_stream_output("stderr", notice))
        return listed

    def _limits(self) -> str:
        return f"the limits are {_size(self._max_bytes)} and {self._max_outputs} outputs"

    def _take_display(self, kind: str, content: _DisplayContent) -> None:
        if not _is_object(content.data):
            return
        fields = _display_fields(content)
        if kind == "execute_result":
            fields["execution_count"] = to_json(content.execution_count)
            plain = _plain_text(content.data)
            self.result_text = self.result_text if plain is None else _head(plain, self._max_bytes)[0]
        self._clear_if_due()
        bundle = _Bundle(kind, fields)
        if self._add(bundle) and content.display_id is not None:
            self._displays.setdefault(content.display_id, []).append(bundle)

    def _take_error(self, message: Message) -> None:
        try:
            content = message.content_as(ErrorContent)
        except WireError:
            # That the cell failed is told in any case.
            content = ErrorContent()
        error = cell_error(content)
        self._clear_if_due()
        output = {"ename": error.ename, "evalue": error.evalue, "traceback": list(error.traceback)}
        # Its size is bounded by cell_error: why a cell failed is kept, however much it printed before.
        self._add(_Bundle("error", {name: to_json(value) for name, value in output.items()}), 2 * _ERROR_RESERVE)

    def _add(self, bundle: _Bundle, reserve: int = 0) -> bool:
        limit = self._max_outputs + (1 if reserve else 0)
        if len(self._outputs) >= limit or self._used + bundle.size > self._max_bytes + reserve:
            self._cut_outputs += 1
            return False
        self._outputs.append(bundle)
        self._used += bundle.size
        return True

    def _update(self, content: _DisplayContent) -> None:
        shown = self._displays.get(content.display_id or "", [])
        if not shown or not _is_object(content.data):
            return
        fields = _display_fields(content)
        added = sum(map(len, fields.values())) * len(shown)
        added -= sum(len(bundle.fields["data"]) + len(bundle.fields["metadata"]) for bundle in shown)
        if self._used + added > self._max_bytes:
            self._cut_outputs += 1
            return
        self._used += added
        for bundle in shown:
            bundle.fields.update(fields)

    def _clear_if_due(self) -> None:
        if self._clear_next:
            self._clear()

    def _clear(self) -> None:
        self._outputs.clear()
        self._displays.clear()
        self._used = 0
        self._cut_outputs = 0
        self._clear_next = False


def cell_error(content: ErrorContent) -> CellError:
    """The exception of an error message or an error reply, cut to some 64 KiB."""
    kept: deque[str] = deque()
    room = _ERROR_RESERVE // 2
    # The end of a traceback tells the most: it is kept, the beginning is cut.
    for line in reversed(content.lines):
        if room <= 0 or len(kept) >= _MAX_TRACEBACK_LINES:
            kept.appendleft("[samovar: the beginning of the traceback was cut]")
            break
        kept.appendleft(_short(line, max(room, 200)))
        room -= len(kept[0])
    return CellError(_short(content.ename, 500), _short(content.evalue, 8000), tuple(kept))


def to_json(value: object) -> bytes:
    """`value` as JSON; a lone surrogate in a string, which UTF-8 cannot carry, becomes its escape.

    Raises RecursionError or ValueError where it cannot be JSON.
    """
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        return json.dumps(value, default=_raw, allow_nan=False).encode()


def _raw(value: object) -> object:
    return json.loads(bytes(value)) if isinstance(value, msgspec.Raw) else str(value)


def _append(stream: _Stream, text: str, room: int) -> int:
    """Append what fits into `room` bytes; return how many bytes did not."""
    if stream.cut:
        # Once something was cut nothing follows it: the text that is kept has no holes.
        return _bytes(text)
    kept, size, cut = _head(text, room)
    stream.text.write(kept)
    stream.size += size
    return cut


def _head(text: str, room: int) -> tuple[str, int, int]:
    """The beginning of `text` that has at most `room` bytes of UTF-8: it, its size, and the size of the rest."""
    if text.isascii():
        kept = text[: max(room, 0)]
        return kept, len(kept), len(text) - len(kept)
    encoded = text.encode("utf-8", "surrogatepass")
    if len(encoded) <= room:
        return text, len(encoded), 0
    end = max(room, 0)
    while end and encoded[end] & 0xC0 == 0x80:
        end -= 1
    return encoded[:end].decode("utf-8", "surrogatepass"), end, len(encoded) - end


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _text(stream: _Stream, limit: int) -> str:
    text = stream.text.getvalue()
    if not stream.cut:
        return text
    notice = (
        f"[samovar: {stream.name} was cut here, {_size(stream.cut)} more were written; the limit is {_size(limit)}]\n"
    )
    return text + ("" if text.endswith("\n") or not text else "\n") + notice


def _stream_output(name: str, text: str) -> dict[str, Any]:
    return {"output_type": "stream", "name": name, "text": text}


def _size(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … [samovar: {len(text) - limit} more characters were cut]"


def _is_object(raw: msgspec.Raw) -> bool:
    return bytes(memoryview(raw)[:1]) == b"{"


def _display_fields(content: _DisplayContent) -> dict[str, bytes]:
    return {"data": bytes(content.data), "metadata": bytes(content.metadata) if _is_object(content.metadata) else b"{}"}


def _plain_text(data: msgspec.Raw) -> str | None:
    try:
        return msgspec.json.decode(data, type=_PlainData).text
    except msgspec.ValidationError:
        return None
