"""Standing: whether somebody is at work in a session, and so what another claim of its owner may cost it."""

from __future__ import annotations

import enum

#: Whoever has not used a session for so many seconds is not at work in it.
AT_WORK_SECONDS = 600.0


class Standing(enum.IntEnum):
    """How likely somebody comes back to a session; the higher keeps its sandbox before the lower."""

    PASSING = 0  # its call named nobody, and nobody has come back to it
    NAMED = 1  # its call named a user, an entity or a session
    KEPT = 2  # somebody has come back to it, or holds it


def standing_now(standing: Standing, idle_seconds: float) -> Standing:
    """Return what `standing` is worth after `idle_seconds` without use."""
    return standing if idle_seconds < AT_WORK_SECONDS else Standing.PASSING
