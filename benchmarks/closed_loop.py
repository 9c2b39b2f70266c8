"""Closed loops: each of `c` clients sends its next call once the last is answered. One thread and connection each."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from benchmarks.client import ExecClient, Reply
from benchmarks.levels import Level

#: How long a session that the burst did not get is tried for before the live levels.
_OPEN_SECONDS = 300.0
_WARM_UP_CALLS = 2

NewClient = Callable[[], ExecClient]
T = TypeVar("T")


class LiveSession:
    """One user's session: opened by its first call, which leaves a variable that later calls look for."""

    def __init__(self, number: int) -> None:
        self.number = number
        #: None until the server has answered its first call
        self.id: str | None = None
        # Servers of this family find a session by its id or by its entity, not all of them by both.
        self._entity = f"load-{secrets.token_hex(8)}"

    def open(self, client: ExecClient) -> Reply:
        """Make the session and its variable."""
        code = f"marker = {self.number}\nprint(marker)"
        reply = client.run(code, str(self.number), entity_id=self._entity)
        if reply.failure is None:
            self.id = str(reply.body.get("session_id"))
        return reply

    def run(self, client: ExecClient, number: int) -> Reply:
        """Run the small cell that is measured."""
        return client.run(f"print({number})", str(number), entity_id=self._entity, session_id=self.id)

    def look(self, client: ExecClient) -> Reply:
        """Look for the variable, which is what makes it a live session."""
        return client.run("print(marker)", str(self.number), entity_id=self._entity, session_id=self.id)

    def end(self, client: ExecClient) -> None:
        """Give the session up."""
        if self.id is not None:
            client.end_session(self.id)
            self.id = None


class _Meter:
    """Counts replies of all threads into one level, from a common start to the last answer."""

    def __init__(self, level: Level) -> None:
        self._level = level
        self._lock = threading.Lock()
        self._number = 0
        self._cpu = 0.0
        self._started = 0.0
        self.barrier = threading.Barrier(level.clients, action=self._start)

    def next_number(self) -> int:
        """A number that no other call of this level prints: an answer that is another's is seen."""
        with self._lock:
            self._number += 1
            return 1000 + self._number

    def add(self, reply: Reply) -> None:
        """Count one reply."""
        with self._lock:
            if reply.failure is None:
                self._level.samples.append(reply.milliseconds)
                if isinstance(source := reply.body.get("source"), str):
                    self._level.sources[source] += 1
            else:
                self._level.failures[reply.failure] += 1
            self._level.seconds = time.perf_counter() - self._started
            self._level.generator_cpu_s = time.process_time() - self._cpu

    @property
    def running(self) -> float:
        """Seconds since the common start."""
        return time.perf_counter() - self._started

    def _start(self) -> None:
        self._cpu = time.process_time()
        self._started = time.perf_counter()


def burst(new_client: NewClient, sessions: list[LiveSession]) -> Level:
    """Open all sessions at the same moment, each once; those that failed stay without an id."""
    level = Level("burst", len(sessions))
    meter = _Meter(level)

    def one(session: LiveSession) -> None:
        with _joined(new_client, meter) as client:
            meter.add(session.open(client))

    _in_threads(sessions, one)
    return level


def open_missing(new_client: NewClient, sessions: list[LiveSession]) -> None:
    """Open the sessions that the burst did not get, one after the other. Raises RuntimeError with the last reason."""
    deadline = time.monotonic() + _OPEN_SECONDS
    with contextlib.closing(new_client()) as client:
        for session in sessions:
            while session.id is None:
                reply = session.open(client)
                if reply.failure is not None and time.monotonic() > deadline:
                    raise RuntimeError(f"no session for each of {len(sessions)} clients: {reply.failure}")
                time.sleep(reply.pause)


def live(new_client: NewClient, sessions: list[LiveSession], seconds: float) -> Level:
    """Small cells in live sessions, one client for each of `sessions`, for `seconds`."""
    level = Level("live", len(sessions))
    meter = _Meter(level)

    def one(session: LiveSession) -> None:
        with contextlib.closing(new_client()) as client:
            lost = session.look(client).failure
            for _ in range(_WARM_UP_CALLS):
                session.run(client, session.number)
            meter.barrier.wait()
            if lost is not None:
                meter.add(Reply(0.0, f"variables lost ({lost})"))
            while meter.running < seconds:
                reply = session.run(client, meter.next_number())
                meter.add(reply)
                time.sleep(reply.pause)

    _in_threads(sessions, one)
    return level


def fresh(new_client: NewClient, clients: int, calls: int) -> Level:
    """`calls` cells, each in a session of its own that ends with its answer, by `clients` at once."""
    level = Level("fresh", clients)
    meter = _Meter(level)
    left = threading.Semaphore(calls)

    def one(_: int) -> None:
        with _joined(new_client, meter) as client:
            while left.acquire(blocking=False):
                number = meter.next_number()
                reply = client.run(f"print({number})", str(number))
                meter.add(reply)
                if isinstance(session_id := reply.body.get("session_id"), str):
                    client.end_session(session_id)
                time.sleep(reply.pause)

    _in_threads(range(clients), one)
    return level


def end_sessions(new_client: NewClient, sessions: list[LiveSession]) -> None:
    """Give all sessions up."""
    with contextlib.closing(new_client()) as client:
        for session in sessions:
            session.end(client)


@contextlib.contextmanager
def _joined(new_client: NewClient, meter: _Meter) -> Iterator[ExecClient]:
    """A connected client whose thread goes on when those of all clients are there."""
    with contextlib.closing(new_client()) as client:
        try:
            client.connect()
        except OSError:
            meter.barrier.abort()
            raise
        meter.barrier.wait()
        yield client


def _in_threads(items: Sequence[T], work: Callable[[T], None]) -> None:
    """Run `work` for each item at once. Raises the first error that is not only another thread's abort."""
    with ThreadPoolExecutor(len(items), "load") as pool:
        futures = [pool.submit(work, item) for item in items]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda one: isinstance(one, threading.BrokenBarrierError)):
        raise error
