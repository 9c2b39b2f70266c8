"""Refill: how fast a pool gets its warm sandboxes back, and what a live session notices of it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable

from tqdm import tqdm

from benchmarks.bare import CODE, BareClient
from benchmarks.figures import Quantity
from benchmarks.latency import Samples
from benchmarks.rest import RestClient
from benchmarks.stage import Stage, settle

_ROUNDS = 200
_WARM_UP = 20


def measure(
    stage: Stage, rest: RestClient, new_client: Callable[[], RestClient], warm: int
) -> tuple[list[Quantity], Samples]:
    """Empty a pool of `warm` sandboxes twice: once with nothing else going on, once beside a live session."""
    live = rest.execute()[1]["session_id"]
    rest.wait_until_quiet()
    settle()
    taken = _take(rest, warm)
    started = time.monotonic()
    rest.wait_for_warm(warm)
    rate = warm / (time.monotonic() - started)
    _give_up(rest, taken)
    rest.wait_until_quiet()
    settle()
    samples = _rounds(rest, stage.stock, live, "live_quiet", _ROUNDS)
    taken = _take(rest, warm)
    with contextlib.closing(new_client()) as watching:
        samples |= _until_warm(rest, watching, stage.stock, live, warm)
    _give_up(rest, taken)
    rest.end(live)
    what = "warm sandboxes per second while the pool refills, nobody waiting"
    return [Quantity("refill rate", what, "/s", [rate], more_is_better=True)], samples


def _take(rest: RestClient, count: int) -> list[str]:
    return [rest.first_cell()[1]["session_id"] for _ in range(count)]


def _give_up(rest: RestClient, sessions: list[str]) -> None:
    for session in sessions:
        rest.end(session)


def _rounds(rest: RestClient, stock: BareClient, session: str, case: str, rounds: int) -> Samples:
    samples: Samples = defaultdict(list)
    for number in tqdm(range(_WARM_UP + rounds), desc="live, no refill", disable=None):
        _round(samples if number >= _WARM_UP else defaultdict(list), rest, stock, session, case)
    return samples


def _until_warm(rest: RestClient, watching: RestClient, stock: BareClient, session: str, warm: int) -> Samples:
    """Rounds until the pool is warm again; another thread watches, so that asking costs no round its pace."""
    full = threading.Event()

    def watch() -> None:
        try:
            while watching.pool()["warm"] < warm and not full.wait(0.2):
                pass
        finally:
            full.set()

    samples: Samples = defaultdict(list)
    watcher = threading.Thread(target=watch, name="watch the pool")
    watcher.start()
    try:
        with tqdm(desc="live, while the pool refills", disable=None) as progress:
            while not full.is_set():
                _round(samples, rest, stock, session, "live_refilling")
                progress.update()
    finally:
        full.set()
        watcher.join()
    return samples


def _round(samples: Samples, rest: RestClient, stock: BareClient, session: str, case: str) -> None:
    samples[f"bare beside {case}"].append(stock.execute(CODE))
    samples[case].append(rest.execute(session)[0])
