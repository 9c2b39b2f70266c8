"""Idle: the first cell in a sandbox that has been warm for a while, against one that has just become so."""

from __future__ import annotations

import time
from collections import defaultdict

from tqdm import tqdm

from benchmarks.bare import CODE
from benchmarks.figures import Quantity
from benchmarks.latency import Samples
from benchmarks.rest import RestClient
from benchmarks.stage import Stage

SHORT = 10.0


def measure(
    stage: Stage, rest: RestClient, members: int, seconds: float, rounds: int
) -> tuple[list[Quantity], Samples]:
    """First cells of `members` sandboxes after 10 s and after `seconds` of nothing, `rounds` times each by turns.

    The pool must have `members` as its minimum and its maximum: none is started while these are taken.
    """
    samples: Samples = defaultdict(list)
    for _ in range(rounds):
        for idle in (SHORT, seconds):
            rest.wait_for_warm(members)
            _wait(idle)
            # They are still there; and the connection, silent for so long, is opened before anything is measured.
            rest.wait_for_warm(members)
            sessions = []
            for _ in range(members):
                samples[f"bare beside {_case(idle)}"].append(stage.stock.execute(CODE))
                elapsed, answer = rest.first_cell()
                samples[_case(idle)].append(elapsed)
                sessions.append(answer["session_id"])
            for session in sessions:
                rest.end(session)
    short, long = samples[_case(SHORT)], samples[_case(seconds)]
    bare = samples[f"bare beside {_case(SHORT)}"]
    return [
        Quantity(
            _case(SHORT),
            f"first cell in a sandbox that was warm for {SHORT:g} s",
            "ms",
            short,
            "the bare round trip",
            bare,
        ),
        Quantity(
            _case(seconds),
            f"first cell in one that was warm for {seconds:g} s",
            "ms",
            long,
            f"that after {SHORT:g} s",
            short,
        ),
    ], samples


def _case(idle: float) -> str:
    return f"first cell after {idle:g} s"


def _wait(seconds: float) -> None:
    end = time.monotonic() + seconds
    with tqdm(total=seconds, desc=f"idle for {seconds:g} s", unit="s", disable=None) as progress:
        while (left := end - time.monotonic()) > 0:
            step = min(1.0, left)
            time.sleep(step)
            progress.update(step)
