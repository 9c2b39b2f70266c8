"""History: what a kernel's clients and `%history` ask for, from memory: there is no database (see app.py)."""

from __future__ import annotations

from fnmatch import fnmatchcase
from operator import itemgetter
from typing import Any

_TAIL = 10  # IPython's own default

Entry = tuple[int, int, Any]  # session, line, and the input or (input, output)


class SessionHistory:
    """Answers in place of a `HistoryManager` whose database is off; this session is all that there is."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def get_tail(
        self, n: int | None = _TAIL, raw: bool = True, output: bool = False, include_latest: bool = False
    ) -> list[Entry]:
        """Return the last `n` lines, without the very last one unless `include_latest`."""
        lines: list[Entry] = list(self._manager.get_range(raw=raw, output=output))
        if not include_latest:
            lines = lines[:-1]
        count = _TAIL if n is None else n
        return lines[-count:] if count > 0 else []

    def search(
        self,
        pattern: str = "*",
        raw: bool = True,
        search_raw: bool = True,
        output: bool = False,
        n: int | None = None,
        unique: bool = False,
    ) -> list[Entry]:
        """Return the last `n` lines that match the whole `pattern` (`*`, `?`), of equal ones the latest if `unique`."""
        manager = self._manager
        searched = manager.input_hist_raw if search_raw else manager.input_hist_parsed
        found = [
            entry for entry in manager.get_range(raw=raw, output=output) if fnmatchcase(searched[entry[1]], pattern)
        ]
        if unique:
            found = sorted({searched[entry[1]]: entry for entry in found}.values(), key=itemgetter(1))
        return found if n is None else found[-n:] if n > 0 else []


def keep_in_memory(manager: Any) -> None:
    """Have `manager` answer from memory. Its type stays, and with it what libraries know of it."""
    history = SessionHistory(manager)
    manager.get_tail = history.get_tail
    manager.search = history.search
