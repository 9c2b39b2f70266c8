"""Unsent output: a shared ring where the kernel notes what was printed; the supervisor reads it after a death.

Between `print` and a client's screen a text waits in several queues of the kernel process, and all of them die with it.
The kernel therefore copies every text into this ring first (a memory file that both processes map), and notes which
stream message it went out in. The ring holds the newest output only; what it has lost by then was sent long ago.

Standard library only: the supervisor imports this module as PID 1.
"""

from __future__ import annotations

import codecs
import json
import mmap
import os
import struct
from typing import Any

RING_SIZE = 3 * 1024 * 1024
"""Bytes that the ring holds: more than the kernel ever has on the way (its budget and its socket's queue)."""

_HEADER_SIZE = 4096
_POSITIONS = struct.Struct("<QQ")  # head and tail: how many bytes were ever written, and where the oldest record begins
_HEAD = struct.Struct("<Q")
_TAIL_AT = 8
_PARENT_LENGTH = struct.Struct("<I")
_PARENT_LENGTH_AT = 16
_PARENT_AT = 64
_RECORD = struct.Struct("<IB")
_MARK = struct.Struct("<Q")

_PARENT, _STDOUT, _STDERR, _MARKED = range(4)
_KINDS = {"stdout": _STDOUT, "stderr": _STDERR}
_NAMES = {_STDOUT: "stdout", _STDERR: "stderr"}


def create_ring() -> int:
    """Return the descriptor of a new, empty ring (a memory file)."""
    descriptor = os.memfd_create("samovar-unsent", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, _HEADER_SIZE + RING_SIZE)
    return descriptor


class Ring:
    """The writer's end. Not thread-safe: its owner holds a lock around every call."""

    def __init__(self, descriptor: int) -> None:
        self._map = mmap.mmap(descriptor, _HEADER_SIZE + RING_SIZE)
        self._head, self._tail = _POSITIONS.unpack_from(self._map, 0)
        self._parent: bytes | None = None

    def text(self, name: str, parent: bytes, data: bytes) -> int:
        """Note `data`, printed to stream `name` by the request with header `parent`; return the position behind it."""
        if parent is not self._parent:
            self._append(_PARENT, parent if len(parent) <= _HEADER_SIZE - _PARENT_AT else b"{}")
            self._parent = parent
        return self._append(_KINDS[name], data)

    def mark(self, position: int, msg_id: str) -> None:
        """Note that all text before `position` is in stream message `msg_id` or an earlier one."""
        self._append(_MARKED, _MARK.pack(position) + msg_id.encode())

    def clear(self) -> None:
        """Forget everything."""
        self._tail = self._head
        self._parent = None
        _HEAD.pack_into(self._map, _TAIL_AT, self._tail)
        _PARENT_LENGTH.pack_into(self._map, _PARENT_LENGTH_AT, 0)

    def close(self) -> None:
        """Give the mapping back; what was written stays in the memory file."""
        self._map.close()

    def _append(self, kind: int, data: bytes) -> int:
        record = _RECORD.pack(len(data), kind) + data
        if len(record) > RING_SIZE // 4:
            raise ValueError(f"record of {len(record)} bytes, at most {RING_SIZE // 4}")
        head = self._head
        end = head + len(record)
        while end - self._tail > RING_SIZE:
            self._drop_oldest()
        position = head % RING_SIZE
        room = RING_SIZE - position
        if len(record) <= room:
            self._map[_HEADER_SIZE + position : _HEADER_SIZE + position + len(record)] = record
        else:
            self._map[_HEADER_SIZE + position : _HEADER_SIZE + RING_SIZE] = record[:room]
            self._map[_HEADER_SIZE : _HEADER_SIZE + len(record) - room] = record[room:]
        # last, so that a record which a death tore is never seen
        _HEAD.pack_into(self._map, 0, end)
        self._head = end
        return end

    def _drop_oldest(self) -> None:
        length, kind = _RECORD.unpack(_read(self._map, self._tail, _RECORD.size))
        if kind == _PARENT:
            # the texts behind it still belong to this parent
            parent = _read(self._map, self._tail + _RECORD.size, length)
            self._map[_PARENT_AT : _PARENT_AT + length] = parent
            _PARENT_LENGTH.pack_into(self._map, _PARENT_LENGTH_AT, length)
        self._tail += _RECORD.size + length
        _HEAD.pack_into(self._map, _TAIL_AT, self._tail)


def read_records(descriptor: int) -> list[dict[str, Any]]:
    """Return what the ring holds, in order: `{"kind": "text", name, parent, text}` and `{"kind": "mark", msg_id}`.

    A mark stands after the last text that it covers. User code can write into the ring, so nothing in it is trusted:
    reading stops at the first record that cannot be one.
    """
    with mmap.mmap(descriptor, _HEADER_SIZE + RING_SIZE, prot=mmap.PROT_READ) as ring:
        head, position = _POSITIONS.unpack_from(ring, 0)
        (length,) = _PARENT_LENGTH.unpack_from(ring, _PARENT_LENGTH_AT)
        parent = _json_object(ring[_PARENT_AT : min(_PARENT_AT + length, _HEADER_SIZE)]) if length else {}
        if not 0 <= head - position <= RING_SIZE:
            return []
        texts: list[tuple[int, str, dict[str, Any], bytes]] = []
        marks: list[tuple[int, str]] = []
        while head - position >= _RECORD.size:
            length, kind = _RECORD.unpack(_read(ring, position, _RECORD.size))
            end = position + _RECORD.size + length
            if end > head:
                break
            data = _read(ring, position + _RECORD.size, length)
            if kind == _PARENT:
                parent = _json_object(data)
            elif kind in _NAMES:
                texts.append((end, _NAMES[kind], parent, data))
            elif kind == _MARKED and length > _MARK.size:
                marks.append((_MARK.unpack_from(data)[0], data[_MARK.size :].decode(errors="replace")))
            else:
                break
            position = end
    return _merge(texts, marks)


def _merge(texts: list[tuple[int, str, dict[str, Any], bytes]], marks: list[tuple[int, str]]) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in _KINDS}
    following = iter(marks)
    mark = next(following, None)
    for end, name, parent, data in texts:
        # a mark whose position lies before this text covers only what came earlier
        while mark is not None and mark[0] < end:
            records.append({"kind": "mark", "msg_id": mark[1]})
            mark = next(following, None)
        text = decoders[name].decode(data)
        last = records[-1] if records else None
        if last is not None and last["kind"] == "text" and last["name"] == name and last["parent"] is parent:
            last["pieces"].append(text)
        else:
            records.append({"kind": "text", "name": name, "parent": parent, "pieces": [text]})
    while mark is not None:
        records.append({"kind": "mark", "msg_id": mark[1]})
        mark = next(following, None)
    for record in records:
        if record["kind"] == "text":
            record["text"] = "".join(record.pop("pieces"))
    return records


def _read(ring: mmap.mmap, position: int, size: int) -> bytes:
    start = position % RING_SIZE
    first = ring[_HEADER_SIZE + start : _HEADER_SIZE + min(start + size, RING_SIZE)]
    return first if len(first) == size else first + ring[_HEADER_SIZE : _HEADER_SIZE + size - len(first)]


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
