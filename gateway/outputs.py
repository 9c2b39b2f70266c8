"""OutputCollector: a cell's iopub messages in, its nbformat outputs out, within bounds."""

from __future__ import annotations

import io
import json
import re
from collections import deque
from dataclasses import dataclass
from typing import Any

import msgspec

from kernelprovisioner.wire import Message

_ERROR_RESERVE = 64 * 1024
_REMEMBERED_STREAM_MESSAGES = 4096
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
    """A display_data, execute_result or error, encoded as it will be answered: its size is then what it costs."""

    kind: str
    encoded: bytes
    display_id: str | None = None


class OutputCollector:
    """Keeps what a notebook would show of one cell, within `max_bytes` and `max_outputs`; counts and tells what is cut.

    Beside it, `written("stdout")` is all that went to a stream, also where `clear_output` took it from view.
    Everything that comes in was made by a sandbox: shapes are checked, what does not fit is left out.
    """

    def __init__(self, *, max_bytes: int, max_outputs: int) -> None:
        self._max_bytes = max_bytes
        self._max_outputs = max_outputs
        self._outputs: list[_Stream | _Bundle] = []
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
        """Take in one iopub message. Raises WireError, RecursionError or ValueError where it makes no sense."""
        content = message.content
        match message.msg_type:
            case "stream":
                self._stream_ids.append(message.msg_id)
                self.write(content.get("name"), content.get("text"))
            case "display_data" | "execute_result":
                self._take_bundle(message.msg_type, content)
            case "update_display_data":
                self._update(content)
            case "error":
                self._take_error(content)
            case "clear_output":
                if content.get("wait"):
                    self._clear_next = True
                else:
                    self._clear()

    def write(self, name: object, text: object) -> None:
        """Add `text` to a stream ("stdout" or "stderr"); text after text of the same stream is one output."""
        if name not in ("stdout", "stderr") or not isinstance(text, str) or not isinstance(name, str) or not text:
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

    def outputs(self) -> list[dict[str, Any] | msgspec.Raw]:
        """The outputs as nbformat has them, ready for the JSON encoder; last the notice of outputs that were cut."""
        listed: list[dict[str, Any] | msgspec.Raw] = []
        for output in self._outputs:
            if isinstance(output, _Bundle):
                listed.append(msgspec.Raw(output.encoded))
            else:
                listed.append(_stream_output(output.name, _text(output, self._max_bytes)))
        if self._cut_outputs:
            many = "1 more output was" if self._cut_outputs == 1 else f"{self._cut_outputs} more outputs were"
            notice = f"[samovar: {many} cut; {self._limits()}]\n"
            listed.append(_stream_output("stderr", notice))
        return listed

    def _limits(self) -> str:
        return f"the limits are {_size(self._max_bytes)} and {self._max_outputs} outputs"

    def _take_bundle(self, kind: str, content: dict[str, Any]) -> None:
        data, metadata = content.get("data"), content.get("metadata")
        if not isinstance(data, dict):
            return
        output: dict[str, Any] = {"output_type": kind, "data": data, "metadata": _dict(metadata)}
        if kind == "execute_result":
            output["execution_count"] = _count(content.get("execution_count"))
            plain = data.get("text/plain")
            self.result_text = _head(plain, self._max_bytes)[0] if isinstance(plain, str) else self.result_text
        self._clear_if_due()
        self._add(_Bundle(kind, to_json(output), _display_id(content)))

    def _take_error(self, content: dict[str, Any]) -> None:
        error = cell_error(content)
        self._clear_if_due()
        output = {
            "output_type": "error",
            "ename": error.ename,
            "evalue": error.evalue,
            "traceback": list(error.traceback),
        }
        # Its size is bounded by cell_error: why a cell failed is kept, however much it printed before.
        self._add(_Bundle("error", to_json(output)), reserve=2 * _ERROR_RESERVE)

    def _add(self, bundle: _Bundle, reserve: int = 0) -> None:
        limit = self._max_outputs + (1 if reserve else 0)
        if len(self._outputs) >= limit or self._used + len(bundle.encoded) > self._max_bytes + reserve:
            self._cut_outputs += 1
            return
        self._outputs.append(bundle)
        self._used += len(bundle.encoded)

    def _update(self, content: dict[str, Any]) -> None:
        display_id, data = _display_id(content), content.get("data")
        if display_id is None or not isinstance(data, dict):
            return
        for output in self._outputs:
            if not isinstance(output, _Bundle) or output.display_id != display_id:
                continue
            updated = msgspec.json.decode(output.encoded)
            updated["data"], updated["metadata"] = data, _dict(content.get("metadata"))
            encoded = to_json(updated)
            if self._used + len(encoded) - len(output.encoded) > self._max_bytes:
                self._cut_outputs += 1
                continue
            self._used += len(encoded) - len(output.encoded)
            output.encoded = encoded

    def _clear_if_due(self) -> None:
        if self._clear_next:
            self._clear()

    def _clear(self) -> None:
        self._outputs.clear()
        self._used = 0
        self._cut_outputs = 0
        self._clear_next = False


def cell_error(content: dict[str, Any]) -> CellError:
    """The exception of an error message or an error reply, cut to some 64 KiB."""
    frames = content.get("traceback")
    lines = [line for line in frames if isinstance(line, str)] if isinstance(frames, list) else []
    kept: deque[str] = deque()
    room = _ERROR_RESERVE // 2
    # The end of a traceback tells the most: it is kept, the beginning is cut.
    for line in reversed(lines):
        if room <= 0:
            kept.appendleft("[samovar: the beginning of the traceback was cut]")
            break
        kept.appendleft(_short(line, max(room, 200)))
        room -= len(kept[0])
    return CellError(_short(content.get("ename"), 500), _short(content.get("evalue"), 8000), tuple(kept))


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


def _short(value: object, limit: int) -> str:
    text = value if isinstance(value, str) else ""
    return text if len(text) <= limit else f"{text[:limit]} … [samovar: {len(text) - limit} more characters were cut]"


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _display_id(content: dict[str, Any]) -> str | None:
    display_id = _dict(content.get("transient")).get("display_id")
    return display_id if isinstance(display_id, str) else None
