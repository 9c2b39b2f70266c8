"""The chaos test's own judgement: what it lets pass, and what it must not."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.chaos.faults import History, Kind, schedule
from tests.chaos.model import (
    SessionModel,
    Violation,
    cell_text,
    check_broken,
    check_notebook_error,
    check_refusal,
)

TAG = "tag-abc"
NEW = "[samovar: The sandbox was killed or removed from outside. This is a new sandbox: the session's former variables and files are gone.]\n"  # noqa: E501


class Client:
    """One session's client; `say` is an answer to its next request."""

    def __init__(self) -> None:
        self.history = History()
        self.model = SessionModel(TAG, self.history, time.monotonic())
        self.number = 0

    def say(self, count: int, **fields: Any) -> str:
        self.number += 1
        nonce = f"nonce-{self.number:x}"
        body = {"status": "ok", "session_id": "s", "container_id": "c1", "exit_cause": None, "notes": ""}
        body["text"] = cell_text(nonce, TAG, count)
        now = time.monotonic()
        return self.model.take(nonce, {**body, **fields}, now, now)

    def die(self, cause: str, *, lost: bool = True) -> str:
        told = {"cause": cause, "text": cause, "session_lost": lost}
        return self.say(0, status="died", text="", exit_cause=told)

    def was_restarted(self, kind: Kind = Kind.GATEWAY_KILL) -> None:
        happening = self.history.begin(kind)
        happening.end = time.monotonic()


def test_answers_in_order() -> None:
    client = Client()
    assert [client.say(1), client.say(2)] == ["ok", "ok"]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_wrong_count_is_seen(count: int) -> None:
    client = Client()
    client.say(1)
    client.say(2)
    with pytest.raises(Violation, match="not one of"):
        client.say(count)


def test_output_of_others_is_seen() -> None:
    with pytest.raises(Violation, match="marks of other"):
        Client().say(1, notes="nonce-feed")


def test_a_second_run_is_seen() -> None:
    with pytest.raises(Violation, match="ran twice"):
        Client().say(1, text="nonce-1 1 tag-abc TWICE\n")


def test_a_loss_needs_its_cause() -> None:
    client = Client()
    client.say(1)
    with pytest.raises(Violation, match="no injected cause"):
        client.say(1, notes=NEW)
    client = Client()
    client.say(1)
    client.history.begin(Kind.CLAIMED, ["another"])
    with pytest.raises(Violation, match="no injected cause"):
        client.say(1, notes=NEW)
    client = Client()
    client.say(1)
    client.history.begin(Kind.CLAIMED, ["c1"])
    assert client.say(1, notes=NEW) == "ok"


def test_a_death_needs_its_own_cause() -> None:
    client = Client()
    client.say(1)
    client.history.begin(Kind.KERNEL, ["c1"])
    with pytest.raises(Violation, match="injected was"):
        client.die("removed")
    client = Client()
    client.say(1)
    client.history.begin(Kind.KERNEL, ["c1"])
    assert client.die("signal") == "died of signal"
    assert client.say(1) == "ok"
    client.was_restarted(Kind.ENGINE_KILL)
    assert client.die("engine") == "died of engine"


def test_a_cell_that_the_gateway_lost_may_have_run_or_not() -> None:
    for count in (2, 3):
        client = Client()
        client.say(1)
        client.was_restarted()
        client.die("gateway", lost=False)
        assert client.say(count) == "ok"
    client = Client()
    client.say(1)
    client.was_restarted()
    with pytest.raises(Violation):
        client.die("gateway", lost=True)


def test_output_may_be_lost_only_with_the_gateway() -> None:
    client = Client()
    client.say(1)
    with pytest.raises(Violation):
        client.say(0, text="nonce-2 end\n", notes="output was lost")
    client = Client()
    client.say(1)
    client.was_restarted()
    assert client.say(0, text="nonce-2 end\n", notes="output was lost") == "ok, output lost"
    assert client.say(3) == "ok"


def test_only_a_gateway_that_was_stopped_forgets_a_living_session() -> None:
    client = Client()
    client.say(1)
    client.was_restarted()
    with pytest.raises(Violation, match="forgotten"):
        client.model.unknown(time.monotonic())
    client.was_restarted(Kind.GATEWAY_STOP)
    client.model.unknown(time.monotonic())
    assert client.say(1, session_id="t") == "ok"


def test_broken_connections_and_refusals_need_their_reason() -> None:
    history = History()
    now = time.monotonic()
    with pytest.raises(Violation):
        check_broken(history, OSError("reset"), now, now)
    with pytest.raises(Violation):
        check_refusal(history, "No sandbox can be started: the engine is away", now, now)
    with pytest.raises(Violation):
        check_refusal(history, "No sandbox of 'python' became free within 120 s.", now, now + 100)
    check_refusal(history, "No sandbox of 'python' became free within 120 s.", now, now + 121)
    history.begin(Kind.GATEWAY_UPGRADE)
    history.begin(Kind.ENGINE_KILL)
    later = time.monotonic()
    check_broken(history, OSError("reset"), now, later)
    check_refusal(history, "No sandbox can be started: the engine is away", now, later)
    check_refusal(history, "The gateway is shutting down.", now, later)


def test_a_notebooks_error_needs_its_cause() -> None:
    history = History()
    began = time.monotonic()
    history.begin(Kind.KERNEL, ["c1"])
    text = "DeadKernelError: The kernel process was killed by signal 9 (SIGKILL)."
    ended = time.monotonic()
    assert check_notebook_error(history, text, ["c1"], began, ended) == "signal"
    with pytest.raises(Violation):
        check_notebook_error(history, text, ["c2"], began, ended)
    with pytest.raises(Violation):
        check_notebook_error(history, "DeadKernelError: Kernel died", ["c1"], began, ended)


def test_a_seed_repeats_its_schedule() -> None:
    faults = schedule(7, 60)
    assert faults == schedule(7, 60) != schedule(8, 60)
    assert {fault.kind for fault in faults} == set(Kind)
    assert [fault.at for fault in faults] == sorted(fault.at for fault in faults)
    assert all(0 <= fault.at <= 60 for fault in faults)


def test_what_ends_while_no_gateway_is_there_may_be_told_as_that() -> None:
    told = NEW.replace(
        "The sandbox was killed or removed from outside", "The gateway that held the sandbox has stopped"
    )
    client = Client()
    client.say(1)
    client.was_restarted()
    client.history.begin(Kind.CLAIMED, ["c1"])
    with pytest.raises(Violation, match="no injected cause"):
        client.say(1, notes=told)
    client = Client()
    client.say(1)
    away = client.history.begin(Kind.GATEWAY_KILL)
    client.history.begin(Kind.CLAIMED, ["c1"])
    away.end = time.monotonic()
    assert client.say(1, notes=told) == "ok"
