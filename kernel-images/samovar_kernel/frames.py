"""Length-prefixed frames: how host and supervisor, and claim holder and gateway, talk over one stream.

A frame is two big-endian unsigned 32-bit lengths (header, body), the header as UTF-8 JSON object, the body as bytes.
Both lengths are bounded before anything is allocated, so a forged length costs the reader nothing.
Standard library only: the supervisor imports this module as PID 1.
"""

from __future__ import annotations

import json
import struct
from typing import Any

MAX_HEADER = 64 * 1024
MAX_BODY = 4 * 1024 * 1024

_PREFIX = struct.Struct(">II")


class FrameError(ValueError):
    """The peer sent something that is not a frame; the stream cannot be used any further."""


def pack(header: dict[str, Any], body: bytes = b"") -> bytes:
    """Return one frame as bytes. Raises FrameError where a bound is passed."""
    encoded = json.dumps(header, separators=(",", ":")).encode()
    if len(encoded) > MAX_HEADER:
        raise FrameError(f"frame header of {len(encoded)} bytes, at most {MAX_HEADER}")
    if len(body) > MAX_BODY:
        raise FrameError(f"frame body of {len(body)} bytes, at most {MAX_BODY}")
    return _PREFIX.pack(len(encoded), len(body)) + encoded + body


class FrameReader:
    """Turns pieces of a stream into whole frames; holds at most one unfinished frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[dict[str, Any], bytes]]:
        """Return the frames that `data` completes, as (header, body). Raises FrameError on anything else."""
        self._buffer += data
        frames: list[tuple[dict[str, Any], bytes]] = []
        start = 0
        while len(self._buffer) - start >= _PREFIX.size:
            header_size, body_size = _PREFIX.unpack_from(self._buffer, start)
            if header_size > MAX_HEADER or body_size > MAX_BODY:
                raise FrameError(f"frame of {header_size} + {body_size} bytes, at most {MAX_HEADER} + {MAX_BODY}")
            header_start = start + _PREFIX.size
            end = header_start + header_size + body_size
            if len(self._buffer) < end:
                break
            frames.append(
                (
                    _decode(bytes(self._buffer[header_start : header_start + header_size])),
                    bytes(self._buffer[header_start + header_size : end]),
                )
            )
            start = end
        del self._buffer[:start]
        return frames


def _decode(encoded: bytes) -> dict[str, Any]:
    try:
        header = json.loads(encoded)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"frame header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise FrameError("frame header is not a JSON object")
    return header
