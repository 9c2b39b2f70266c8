"""How an engine that is away is noticed, and how one that was restarted is told from one that was not."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Iterator
from typing import Any

import pytest

from kernelprovisioner.launchers.docker_events import EventWatch
from kernelprovisioner.launchers.engine_state import SLOW_SECONDS, EngineState
from kernelprovisioner.launchers.exits import Evidence
from kernelprovisioner.sandbox_exit import ExitCause

Event = dict[str, Any]
_END = object()


class FakeEngine:
    """An engine that remembers its events until it is restarted."""

    def __init__(self) -> None:
        self.remembered: list[Event] = []
        self.streams: list[queue.Queue[Any]] = []
        self.refused = 0

    def happen(self, action: str, at: int) -> None:
        event = {"Action": action, "timeNano": at}
        self.remembered.append(event)
        for stream in self.streams:
            stream.put(event)

    def break_off(self, error: Exception | None = None) -> None:
        streams, self.streams = self.streams, []
        for stream in streams:
            stream.put(error or _END)

    def client(self) -> FakeClient:
        if self.refused:
            self.refused -= 1
            raise ConnectionRefusedError(111, "Connection refused")
        return FakeClient(self)


class FakeClient:
    """docker's low-level client, as far as EventWatch uses it."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine

    def events(self, *, since: str | None, until: str | None = None, **_: Any) -> Any:
        first = 0 if since is None else int(since.replace(".", ""))
        last = None if until is None else int(until.replace(".", ""))
        past = [e for e in self._engine.remembered if since is not None and e["timeNano"] >= first]
        if last is not None:
            return [event for event in past if event["timeNano"] <= last]
        stream: queue.Queue[Any] = queue.Queue()
        for event in past:
            stream.put(event)
        self._engine.streams.append(stream)
        return FakeStream(stream)

    def close(self) -> None:
        return


class FakeStream:
    def __init__(self, stream: queue.Queue[Any]) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[Event]:
        while (event := self._stream.get()) is not _END:
            if isinstance(event, Exception):
                raise event
            yield event

    def close(self) -> None:
        self._stream.put(_END)


class Heard:
    """A watch of a fake engine and all that it told, in order."""

    def __init__(self, engine: FakeEngine) -> None:
        self.said: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self.watch = EventWatch(
            engine.client,
            "label",
            lambda event: self.said.put_nowait(("event", event["Action"])),
            lambda restarted: self.said.put_nowait(("connected", restarted)),
            lambda reason: self.said.put_nowait(("lost", reason)),
        )

    async def next(self) -> tuple[str, Any]:
        return await asyncio.wait_for(self.said.get(), 5)


async def test_a_stream_that_breaks_off_is_taken_up_without_a_gap() -> None:
    engine = FakeEngine()
    heard = Heard(engine)
    await heard.watch.start(5)
    try:
        assert await heard.next() == ("connected", False)
        engine.happen("start", 1_000_000_001)
        assert await heard.next() == ("event", "start")
        engine.break_off()
        engine.happen("die", 1_000_000_002)
        assert await heard.next() == ("lost", "it closed the stream of its events")
        assert [await heard.next(), await heard.next()] == [("connected", False), ("event", "die")]
    finally:
        await heard.watch.stop()


async def test_events_of_the_same_moment_are_heard_in_any_order_and_once() -> None:
    engine = FakeEngine()
    heard = Heard(engine)
    await heard.watch.start(5)
    try:
        engine.happen("die", 10_000_000_002)
        engine.happen("kill", 10_000_000_001)
        assert [(await heard.next())[1] for _ in range(3)] == [False, "die", "kill"]
        engine.break_off()
        # What was told late, while nobody listened.
        engine.happen("oom", 9_900_000_000)
        assert [(await heard.next())[0] for _ in range(2)] == ["lost", "connected"]
        engine.happen("destroy", 10_000_000_003)
        assert [(await heard.next())[1] for _ in range(2)] == ["oom", "destroy"]
    finally:
        await heard.watch.stop()


async def test_an_engine_that_forgot_was_restarted() -> None:
    engine = FakeEngine()
    heard = Heard(engine)
    await heard.watch.start(5)
    try:
        engine.happen("start", 1_000_000_001)
        assert [await heard.next(), await heard.next()] == [("connected", False), ("event", "start")]
        engine.remembered.clear()
        engine.refused = 2
        engine.break_off(ConnectionResetError(104, "Connection reset by peer"))
        said = [await heard.next() for _ in range(4)]
        assert [kind for kind, _ in said] == ["lost", "lost", "lost", "connected"]
        assert said[1] == ("lost", "nobody listens there") and said[3] == ("connected", True)
    finally:
        await heard.watch.stop()


async def test_without_an_event_to_know_it_by_a_refusal_counts_as_a_restart() -> None:
    engine = FakeEngine()
    heard = Heard(engine)
    await heard.watch.start(5)
    try:
        assert await heard.next() == ("connected", False)
        engine.refused = 1
        engine.break_off()
        assert [(await heard.next())[0] for _ in range(2)] == ["lost", "lost"]
        assert await heard.next() == ("connected", True)
    finally:
        await heard.watch.stop()


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ({}, ExitCause.ENGINE),
        ({"Status": "exited", "ExitCode": 137}, ExitCause.ENGINE),
        ({"Status": "exited", "ExitCode": 143}, ExitCause.ENGINE),
        ({"Status": "exited", "ExitCode": 255}, ExitCause.ENGINE),
        ({"Status": "exited", "ExitCode": 137, "OOMKilled": True}, ExitCause.OUT_OF_MEMORY),
        ({"Status": "exited", "ExitCode": 4}, ExitCause.EXITED),
    ],
)
def test_the_verdict_after_a_restart_of_the_engine(state: dict[str, object], cause: ExitCause) -> None:
    evidence = Evidence(engine_restarted=True)
    evidence.add_state(state)
    assert evidence.verdict().cause is cause


def test_the_engine_itself_kills_what_it_finds_at_its_start() -> None:
    evidence = Evidence(engine_restarted=True)
    evidence.add_event("kill", {"signal": "15"}, 1)
    evidence.add_event("die", {"exitCode": "0"}, 1)
    assert evidence.verdict().cause is ExitCause.ENGINE


def test_a_container_that_outlived_the_restart_ends_by_what_comes_later() -> None:
    evidence = Evidence(engine_restarted=True)
    evidence.add_state({"Status": "running"})
    evidence.add_event("kill", {"signal": "9"}, 1)
    evidence.add_event("die", {"exitCode": "137"}, 1)
    assert evidence.verdict().cause is ExitCause.REMOVED


def test_the_state_of_an_engine() -> None:
    state = EngineState()
    assert state.connected(0) is None and state.available
    assert state.lost(10, "gone") and not state.lost(11, "still gone") and not state.available
    assert (state.away_since, state.reason) == (10, "still gone")
    assert state.connected(15) == 5 and state.available
    assert state.waiting(20) == 0
    state.began(20)
    assert state.waiting(20 + SLOW_SECONDS) == SLOW_SECONDS
    assert state.ended(21) is None
    for now, told in ((0, SLOW_SECONDS + 1), (100, None)):  # told once
        state.began(now)
        assert state.ended(now + SLOW_SECONDS + 1) == told
