"""Why a container ended, decided from the engine's events alone."""

from __future__ import annotations

import pytest

from kernelprovisioner.launchers.container_spec import sandbox_uid
from kernelprovisioner.launchers.docker_engine import engine_url, of_an_earlier_boot
from kernelprovisioner.launchers.exits import Evidence, exit_of_code
from kernelprovisioner.sandbox_exit import ExitCause

Events = list[tuple[float, str, dict[str, str]]]
KILL, DIE_137 = {"signal": "9"}, {"exitCode": "137"}


@pytest.mark.parametrize(
    ("events", "cause", "signum"),
    [
        ([(0, "die", {"exitCode": "3"})], ExitCause.EXITED, None),
        ([(0, "die", {"exitCode": "139"})], ExitCause.SIGNAL, 11),
        ([(0, "die", DIE_137)], ExitCause.SIGNAL, 9),
        ([(0, "oom", {}), (0, "die", DIE_137)], ExitCause.OUT_OF_MEMORY, 9),
        ([(0, "die", DIE_137), (0, "oom", {})], ExitCause.OUT_OF_MEMORY, 9),
        # A child was killed for memory earlier; what ended the sandbox is something else.
        ([(0, "oom", {}), (60, "die", {"exitCode": "1"})], ExitCause.EXITED, None),
        ([(50, "kill", KILL), (50, "die", DIE_137)], ExitCause.REMOVED, 9),
        ([(50, "die", DIE_137), (50, "kill", KILL)], ExitCause.REMOVED, 9),
        ([(50, "kill", {"signal": "15"}), (60, "die", {"exitCode": "143"})], ExitCause.REMOVED, 15),
        # Whoever sent a harmless signal long ago has not killed it.
        ([(50, "kill", {"signal": "10"}), (90, "die", {"exitCode": "1"})], ExitCause.EXITED, None),
        ([(50, "destroy", {})], ExitCause.REMOVED, None),
    ],
)
def test_the_verdict_from_events(events: Events, cause: ExitCause, signum: int | None) -> None:
    evidence = Evidence()
    for at, action, attributes in events:
        evidence.add_event(action, attributes, at)
    assert evidence.ended and evidence.verdict().cause is cause and evidence.verdict().signal == signum


@pytest.mark.parametrize(
    ("code", "reason", "attributes"), [("137", "oom", {}), ("137", "kill", KILL), ("143", "kill", {"signal": "15"})]
)
def test_a_killed_container_waits_for_the_reason(code: str, reason: str, attributes: dict[str, str]) -> None:
    evidence = Evidence()
    evidence.add_event("die", {"exitCode": code}, 100)
    assert not evidence.conclusive
    evidence.add_event(reason, attributes, 100)
    assert evidence.conclusive
    assert Evidence(exit_code=1).conclusive


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ({}, ExitCause.REMOVED),
        ({"Status": "exited", "ExitCode": 255}, ExitCause.REMOVED),
        ({"Status": "exited", "ExitCode": 137}, ExitCause.REMOVED),
        ({"Status": "exited", "ExitCode": 137, "OOMKilled": True}, ExitCause.OUT_OF_MEMORY),
        ({"Status": "exited", "ExitCode": 4}, ExitCause.EXITED),
    ],
)
def test_the_verdict_when_events_were_lost(state: dict[str, object], cause: ExitCause) -> None:
    evidence = Evidence()
    evidence.add_state(state)
    assert evidence.ended and evidence.verdict().cause is cause


@pytest.mark.parametrize("status", ["created", "running", "paused", "restarting"])
def test_a_living_container_has_not_ended(status: str) -> None:
    evidence = Evidence()
    evidence.add_state({"Status": status, "ExitCode": 0})
    assert not evidence.ended


def test_exit_codes_of_a_child_process() -> None:
    assert exit_of_code(-9).signal == exit_of_code(137).signal == 9
    assert exit_of_code(0).cause is exit_of_code(128).cause is ExitCause.EXITED


def test_which_engine() -> None:
    assert engine_url({}) == "unix:///var/run/docker.sock"
    assert engine_url({"DOCKER_HOST": "tcp://a:1"}) == "tcp://a:1"
    assert engine_url({"DOCKER_HOST": "tcp://a:1", "DOCKER_BASE_URL": "unix:///b"}) == "unix:///b"


def test_a_sandbox_never_has_the_gateways_uid() -> None:
    assert sandbox_uid(0) == 10001
    assert sandbox_uid(10001) == 10002


@pytest.mark.parametrize(
    ("label", "current", "expected"),
    [
        ("m/1", "m/2", True),
        ("m/2", "m/2", False),
        ("other/1", "m/2", False),
        (None, "m/2", False),
        ("m/1", None, False),
    ],
)
def test_owners_of_an_earlier_boot_are_dead(label: str | None, current: str | None, expected: bool) -> None:
    assert of_an_earlier_boot(label, current) is expected
