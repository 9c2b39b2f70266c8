"""Message: one Jupyter message as it came from a kernel."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import msgspec

#: JSON makes objects of twenty times its size, so only small parts are decoded as a whole.
MAX_HEADER_BYTES = 64 * 1024
_MAX_LENIENT_BYTES = 1024 * 1024
_decode_header = msgspec.json.Decoder(dict[str, Any]).decode

StructT = TypeVar("StructT", bound=msgspec.Struct)


class WireError(Exception):
    """A kernel's channels cannot be used: not reachable in time, closed, or not reading."""


class Message:
    """One Jupyter message as it came; content and metadata are decoded when somebody looks."""

    __slots__ = ("__dict__", "channel", "header", "parent_header", "parts", "tag")

    def __init__(
        self,
        channel: str,
        parts: Sequence[bytes],
        header: dict[str, Any],
        parent: dict[str, Any],
        tag: bytes = b"",
    ) -> None:
        """`parts`: header, parent header, metadata, content and buffers as they came."""
        self.channel = channel
        self.header = header
        self.parent_header = parent
        self.parts = parts
        #: the last frame before the delimiter: a reply's route tag, what iopub has as its topic, or nothing
        self.tag = tag

    @property
    def msg_type(self) -> str:
        return str(self.header.get("msg_type", ""))

    @property
    def msg_id(self) -> str:
        return str(self.header.get("msg_id", ""))

    @property
    def parent_id(self) -> str:
        return str(self.parent_header.get("msg_id", ""))

    @cached_property
    def content(self) -> dict[str, Any]:
        """Decoded as a whole, however large that makes it: `content_as` is for what user code may have sent.

        Raises WireError where it is not a JSON object.
        """
        return decode_object(self.parts[3])

    def content_as(self, kind: type[StructT]) -> StructT:
        """The content's fields that `kind` has; all others are skipped, and no objects are made of them.

        Raises WireError where it is not JSON, or a field is missing or of another type.
        """
        part = self.parts[3]
        try:
            if not part.isascii():
                str(part, "utf-8")  # what is skipped, or kept as msgspec.Raw, is not checked for this by msgspec
            return msgspec.json.decode(part, type=kind)
        except msgspec.ValidationError as error:
            raise WireError(f"the content of {self.msg_type!r} cannot be read: {error}") from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            if len(part) > _MAX_LENIENT_BYTES:
                raise WireError(f"the content of {self.msg_type!r} is not JSON: {error}") from None
        try:
            return msgspec.json.decode(_repaired(part), type=kind)
        except (ValueError, RecursionError) as error:
            raise WireError(f"the content of {self.msg_type!r} cannot be read: {error}") from None

    @property
    def buffers(self) -> Sequence[bytes]:
        return self.parts[4:]


Listener = Callable[[Message], None]


def decode_object(part: bytes) -> dict[str, Any]:
    """A part of a message as a JSON object, of what some kernels take for JSON, too. Raises WireError."""
    try:
        return _decode_header(part)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _decode_leniently(part)


def _decode_leniently(part: bytes) -> dict[str, Any]:
    """NaN, lone surrogates and invalid bytes are no JSON, but kernels of other languages do send them."""
    try:
        value = json.loads(part.decode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        raise WireError(f"a part of the message is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise WireError("a part of the message is not a JSON object")
    return value


def _repaired(part: bytes) -> bytes:
    """JSON that any decoder reads: NaN and infinities become null, invalid bytes and lone surrogates U+FFFD."""
    value = json.loads(part.decode("utf-8", "replace"), parse_constant=lambda _: None)
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
