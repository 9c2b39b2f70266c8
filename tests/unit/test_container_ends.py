"""Why a container ended is told once, with what the engine said of it in time; of our own removals nothing is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from kernelprovisioner.images import KernelImage
from kernelprovisioner.launchers import container_ends
from kernelprovisioner.launchers.base import Launched
from kernelprovisioner.launchers.container_ends import Container, ContainerEnds
from kernelprovisioner.launchers.container_spec import LABEL_SANDBOX
from kernelprovisioner.launchers.docker_engine import Engine
from kernelprovisioner.launchers.engine_calls import EngineCalls
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit

SANDBOX = "0" * 16


class FakeEngine:
    """An engine that has one container and may be shutting down."""

    going = False
    words = ""
    found: dict[str, Any] = {}  # noqa: RUF012 (replaced, never changed)

    def ping(self) -> None:
        if self.going:
            raise ConnectionRefusedError

    def last_words(self, sandbox_id: str) -> str:
        return self.words

    def state(self, sandbox_id: str) -> dict[str, Any]:
        return self.found


class Watched:
    """One container that runs, and what is told of its end."""

    def __init__(self, calls: EngineCalls) -> None:
        self.engine = FakeEngine()
        image = KernelImage("python", "python", "Python", Path("/nowhere"), "base")
        self.container = Container(SANDBOX, image, cast(Launched, object()))
        self.told: list[SandboxExit] = []
        self.tasks: list[asyncio.Task[None]] = []
        containers = {SANDBOX: self.container}
        engine = cast(Engine, self.engine)
        self.ends = ContainerEnds(containers, engine, calls, self.own, lambda _, cause: self.told.append(cause))

    def own(self, work: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.create_task(work))

    def hear(self, action: str, sandbox_id: str = SANDBOX, **attributes: str) -> None:
        self.ends.event({"Action": action, "Actor": {"Attributes": {LABEL_SANDBOX: sandbox_id, **attributes}}})

    async def cause(self) -> SandboxExit:
        await asyncio.gather(*self.tasks)
        (cause,) = self.told
        return cause


@asynccontextmanager
async def watched(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    monkeypatch.setattr(container_ends, "_EVIDENCE_SECONDS", 0.1)
    monkeypatch.setattr(container_ends, "_STOP_EVIDENCE_SECONDS", 0.2)
    calls = EngineCalls()
    calls.start("unix:///nowhere", 1)
    threads = calls._threads
    assert threads is not None
    try:
        yield Watched(calls)
    finally:
        calls.stop()
        threads.shutdown()


@pytest.mark.parametrize(("going", "cause"), [(False, ExitCause.REMOVED), (True, ExitCause.ENGINE)])
async def test_a_kill_from_outside_is_the_engines_own_where_that_stops(
    going: bool, cause: ExitCause, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watched(monkeypatch) as one:
        one.engine.going = going
        one.hear("kill", signal="9")
        one.hear("die", exitCode="137")
        one.hear("destroy")
        assert (await one.cause()).cause is cause, "one end, however many events"


@pytest.mark.parametrize(("going", "cause"), [(False, ExitCause.SIGNAL), (True, ExitCause.ENGINE)])
async def test_an_engine_that_stops_may_not_say_that_it_stopped_the_container(
    going: bool, cause: ExitCause, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watched(monkeypatch) as one:
        one.engine.going = going
        one.hear("die", exitCode="143")
        assert (await one.cause()).cause is cause


async def test_an_end_waits_for_the_event_that_explains_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with watched(monkeypatch) as one:
        one.hear("die", exitCode="137")
        await asyncio.sleep(0.01)
        assert not one.told
        one.hear("oom")
        found = await one.cause()
        assert found.cause is ExitCause.OUT_OF_MEMORY and found.evidence["limit_mb"] > 0


async def test_what_pid_1_said_last_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    async with watched(monkeypatch) as one:
        one.engine.words = "no such module"
        one.hear("die", exitCode="1")
        assert (await one.cause()).evidence == {"reason": "no such module"}


async def test_our_own_removals_and_other_containers_are_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    async with watched(monkeypatch) as one:
        one.hear("die", "f" * 16, exitCode="1")
        one.container.removal = asyncio.current_task()
        one.hear("kill", signal="9")
        one.hear("die", exitCode="137")
        await asyncio.gather(*one.tasks)
        assert one.told == []


@pytest.mark.parametrize(
    ("listed", "state", "cause"),
    [
        ({}, {}, ExitCause.REMOVED),
        ({SANDBOX: "exited"}, {"Status": "exited", "ExitCode": 3}, ExitCause.EXITED),
        ({SANDBOX: "running"}, {}, None),
    ],
)
async def test_an_end_whose_event_was_lost_is_found_in_the_engines_list(
    listed: dict[str, str], state: dict[str, Any], cause: ExitCause | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watched(monkeypatch) as one:
        one.engine.found = state
        await one.ends.look_at(one.container, listed)
        await one.ends.look_at(one.container, listed)
        await asyncio.gather(*one.tasks)
        assert [each.cause for each in one.told] == ([] if cause is None else [cause])


async def test_what_is_found_ended_after_a_restart_the_engine_took_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with watched(monkeypatch) as one:
        one.ends.engine_restarted()
        await one.ends.look_at(one.container, {})
        assert (await one.cause()).cause is ExitCause.ENGINE
