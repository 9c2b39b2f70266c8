"""What the commands print for people: tables, ages, sizes, and text that cannot play tricks on a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Colours may pass to the terminal; what moves its cursor or talks to it may not.
_UNSAFE = re.compile(r"\x1b(?!\[[0-9;]*m)|[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_ONE_DAY = 86400


def harmless(text: str, replacement: str = "\N{REPLACEMENT CHARACTER}") -> str:
    """Return text of a notebook's cells for the terminal: colours and line breaks stay, all other control goes."""
    return _UNSAFE.sub(replacement, text)


def one_line(text: str) -> str:
    """Return text on one line without any control character."""
    return _CONTROL.sub(" ", text)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return the rows (the first is the heading) as columns of equal width, two blanks apart."""
    clean = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*clean, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in clean)
    return "\n".join(lines)


def duration(seconds: float | None) -> str:
    """Return a time span in its two largest units ("3m 07s"); "-" where it is not known."""
    if seconds is None:
        return "-"
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < _ONE_DAY:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // _ONE_DAY}d {whole % _ONE_DAY // 3600:02}h"


def mebibytes(size: int | None) -> str:
    """Return a size in MiB; "-" where it is not known."""
    return "-" if size is None else f"{size / 2**20:.0f} MiB"
