"""OpenWebsockets: how many websockets each owner has, over all kernels, so that nobody takes the room of the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from gateway.errors import too_busy
from gateway.limits import counted

#: When to come back, in seconds: websockets stay open for long.
_RETRY = 10.0


class OpenWebsockets:
    """Counts websockets from before their handshake until they are closed.

    An owner may have as many as are still free: half of the room if it is alone, a third where two want all that they
    get, and so on. So there is always room for one more owner, and for requests.
    """

    def __init__(self, room: int) -> None:
        """`room`: connections of all owners together."""
        self._room = room
        self._open: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """How many are open, or about to be."""
        return self._open.total()

    @contextmanager
    def one(self, owner: str) -> Iterator[None]:
        """Count one websocket of `owner` until the end of the block. Raises RequestError (503): one too many."""
        mine = self._open[owner]
        if mine >= self._room - self.total:
            raise too_busy(
                f"The owner of this API key has {mine} websockets open; the gateway has room for no more of them "
                "beside those of others. Close some, or come back later.",
                _RETRY,
            )
        with counted(self._open, owner):
            yield
