"""System calls that Python does not offer, or not as cheaply: they are made at every print.

Both are called without giving up the interpreter lock, which another thread would take and keep for milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import select
from collections.abc import Callable, Collection
from functools import partial

_CLOCK_MONOTONIC = 1
_TIMER_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC
_SOONEST = 1000  # ns; zero would switch the timer off

_libc = ctypes.PyDLL(None, use_errno=True)
_libc.timerfd_create.argtypes = [ctypes.c_int, ctypes.c_int]
_libc.timerfd_settime.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
_libc.poll.argtypes = [ctypes.c_void_p, ctypes.c_ulong, ctypes.c_int]


class _Poll(ctypes.Structure):
    _fields_ = [("descriptor", ctypes.c_int), ("events", ctypes.c_short), ("result", ctypes.c_short)]


class _Timer(ctypes.Structure):
    _fields_ = [
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("s", ctypes.c_long),
        ("ns", ctypes.c_long),
    ]


class Alarm:
    """One Linux timer. An event loop waits for `descriptor` and calls `clear()` whenever it is readable."""

    def __init__(self) -> None:
        self.descriptor: int = _libc.timerfd_create(_CLOCK_MONOTONIC, _TIMER_FLAGS)
        if self.descriptor < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")

    def arm(self, seconds: float) -> None:
        """Become due `seconds` (less than one) from now; an earlier setting is replaced."""
        timer = _Timer(0, 0, 0, max(_SOONEST, int(seconds * 1e9)))
        _libc.timerfd_settime(self.descriptor, 0, ctypes.byref(timer), None)

    def clear(self) -> None:
        """Take note that it was due."""
        try:
            os.read(self.descriptor, 8)
        except BlockingIOError:
            return  # set anew between the wake-up and now

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self.descriptor)


def readable_test(descriptors: Collection[int]) -> Callable[[], int]:
    """Return a function that tells how many of `descriptors` have something to read (or have ended) right now."""
    polls = (_Poll * len(descriptors))(*(_Poll(descriptor, select.POLLIN, 0) for descriptor in descriptors))
    return partial(_libc.poll, ctypes.byref(polls), len(descriptors), 0) if descriptors else int
