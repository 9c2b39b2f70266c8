"""EndedCells: how the last cells ended, for a gateway that was away when their replies went out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

#: A page may have run that many cells at once while no gateway was there.
_CELLS = 32
_MAX_TEXT = 1000
_MAX_TRACEBACK = 16 * 1024
#: What a gateway was sent so shortly before it went, it may not have sent on. In seconds.
_IN_DOUBT = 1.0


class EndedCells:
    """The last cells that ended, oldest first. Bounded in number and size."""

    def __init__(self) -> None:
        self._cells: deque[tuple[float, dict[str, Any]]] = deque(maxlen=_CELLS)

    def add(self, header: Mapping[str, Any], reply: Mapping[str, Any]) -> None:
        """Note the reply to the request that has this header."""
        cell = {"header": dict(header), "status": reply["status"], "execution_count": reply.get("execution_count")}
        if reply["status"] == "error":
            ename, evalue = (str(reply.get(name, ""))[:_MAX_TEXT] for name in ("ename", "evalue"))
            traceback = [str(line) for line in reply.get("traceback", ())]
            if sum(map(len, traceback)) > _MAX_TRACEBACK:
                traceback = [f"{ename}: {evalue}"]
            cell |= {"ename": ename, "evalue": evalue, "traceback": traceback}
        self._cells.append((time.monotonic(), cell))

    def missed(self, left_at: float | None) -> list[dict[str, Any]]:
        """Return those whose end the last listener, who left at that time (monotonic; None: never), may have missed."""
        return [cell for ended_at, cell in self._cells if left_at is not None and ended_at > left_at - _IN_DOUBT]

    def clear(self) -> None:
        """Forget all."""
        self._cells.clear()
