"""Wait in tests for what comes to be by itself."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(condition: Callable[[], bool], timeout: float = 140.0) -> None:
    """Return once the condition holds. Raises AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"it did not come to be within {timeout:g} s"
        time.sleep(0.1)
