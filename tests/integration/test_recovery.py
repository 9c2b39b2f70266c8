"""A gateway that is killed, upgraded or fails to start: what its sessions, calls and sandboxes come back to."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from tests.gateway_process import Answer, GatewayProcess

pytestmark = pytest.mark.service

SETTINGS = {"CONTAINER_POOL_PY_MIN": "1", "CONTAINER_POOL_PY_MAX": "4", "SAMOVAR_DRAIN_TIMEOUT": "1"}
LOST = "what it had written until then is lost"
#: Counts how often it ran; what it prints last tells that it came to its end.
SLOW = """\
import time
runs = globals().get("runs", 0) + 1
for number in range({tenths}):
    time.sleep(0.1)
    print(number, flush=True)
print("end of run", runs)"""


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
def gateway(docker_url: str, kernel_image: str, directory: Path) -> Iterator[GatewayProcess]:
    """A gateway of the test's own, which it may kill; in the end nothing of it is left."""
    process = GatewayProcess(directory, docker_url, dict(SETTINGS))
    try:
        process.start()
        yield process
    finally:
        end(process)
    assert not list(process.runtime.glob("*/????????????????")), "a sandbox's runtime directory was left"
    assert containers(process) == set()


def end(process: GatewayProcess) -> None:
    """Ctrl-C removes all, whatever is configured; after a crash it takes a start that takes over first."""
    assert process.process is not None
    if process.process.poll() is not None:
        process.start()
    process.process.send_signal(signal.SIGINT)
    assert process.process.wait(60) == 0, process.log.read_text()


def kill(process: GatewayProcess) -> None:
    assert process.process is not None
    process.process.kill()
    process.process.wait()


def containers(process: GatewayProcess) -> set[str]:
    """Ids of the containers of this gateway's owners."""
    client = docker.DockerClient(base_url=process.docker_url, timeout=30)
    try:
        found = client.containers.list(all=True, filters={"label": "com.samovar.managed=true"}, ignore_removed=True)
        root = str(process.runtime)
        return {each.id for each in found if os.path.dirname(each.labels["com.samovar.owner"]) == root}
    finally:
        client.close()


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def pool(process: GatewayProcess) -> dict[str, Any]:
    return dict(process.call("GET", "/metrics/pool").body["pool"]["python"])


class Call(threading.Thread):
    """A POST /exec in the background."""

    def __init__(self, process: GatewayProcess, session: str, code: str, key: str | None = None) -> None:
        super().__init__(daemon=True)
        self.process = process
        self.body = {"code": code, "lang": "py", "session_id": session}
        self.headers = {} if key is None else {"Idempotency-Key": key}
        self.outcome: Answer | Exception | None = None
        self.start()
        model = f"/api/v1/sessions/{session}"
        wait_for(lambda: process.call("GET", model).body["state"] == "busy")
        time.sleep(0.5)

    def run(self) -> None:
        try:
            self.outcome = self.again()
        except OSError as error:
            self.outcome = error

    def again(self) -> Answer:
        return self.process.call("POST", "/exec", self.body, headers=self.headers)

    @property
    def is_broken(self) -> bool:
        self.join(30)
        return isinstance(self.outcome, OSError)


def test_after_a_kill_sessions_cells_and_warm_sandboxes_are_found_again(gateway: GatewayProcess) -> None:
    first = gateway.exec("x = 41", entity_id="one")
    session = first["session_id"]
    wait_for(lambda: pool(gateway)["warm"] >= 1)
    before = containers(gateway)
    call = Call(gateway, session, SLOW.format(tenths=40))
    kill(gateway)
    assert call.is_broken
    gateway.start()
    assert pool(gateway)["warm"] >= 1, "it did not start them anew"
    assert before <= containers(gateway)
    model = gateway.call("GET", f"/api/v1/sessions/{session}").body
    assert (model["state"], model["entity_id"], model["container_id"]) == ("busy", "one", first["container_id"])
    answer = gateway.exec("print(x + 1, runs, number)", entity_id="one")
    assert (answer["stdout"], answer["container_id"]) == ("42 1 39\n", first["container_id"])
    assert "ran when the gateway was lost. It has ended. Output of it is lost." in answer["stderr"]
    assert gateway.exec("pass", session)["stderr"] == ""
    warm = gateway.exec("print('another')")
    assert (warm["source"], warm["container_id"] in before) == ("warm", True)
    kill(gateway)
    gateway.start()
    assert gateway.exec("print(x)", session)["stdout"] == "41\n", "and once more"


def test_a_retry_with_its_key_waits_for_the_cell_that_still_runs_and_never_runs_it_again(
    gateway: GatewayProcess,
) -> None:
    session = gateway.exec("x = 1")["session_id"]
    call = Call(gateway, session, SLOW.format(tenths=40), key="long")
    kill(gateway)
    assert call.is_broken
    gateway.start()
    answer = call.again()
    assert (answer.status, answer.body["status"], answer.body["session_id"]) == (200, "ok", session)
    assert answer.body["stdout"].endswith("39\nend of run 1\n")
    assert LOST in answer.body["stderr"]
    assert call.again().body == answer.body
    assert gateway.exec("print(runs)", session)["stdout"] == "1\n"


def test_a_retry_of_a_cell_that_ended_with_nobody_there_has_died_and_never_runs_again(gateway: GatewayProcess) -> None:
    session = gateway.exec("x = 1")["session_id"]
    call = Call(gateway, session, SLOW.format(tenths=15), key="short")
    kill(gateway)
    assert call.is_broken
    time.sleep(2)
    gateway.start()
    answer = call.again().body
    assert (answer["status"], answer["exit_cause"]["cause"]) == ("died", "gateway")
    assert not answer["exit_cause"]["session_lost"]
    assert call.again().body == answer
    assert gateway.exec("print(runs, x)", session)["stdout"] == "1 1\n"


def test_a_connection_that_breaks_and_a_retry_with_the_same_key_are_one_run(gateway: GatewayProcess) -> None:
    session = gateway.exec("x = 1")["session_id"]
    body = {"code": SLOW.format(tenths=20), "lang": "py", "session_id": session}
    with contextlib.suppress(TimeoutError):
        gateway.call("POST", "/exec", body, headers={"Idempotency-Key": "one"}, timeout=0.7)
    answer = gateway.call("POST", "/exec", body, headers={"Idempotency-Key": "one"}).body
    assert answer["stdout"].splitlines() == [*map(str, range(20)), "end of run 1"]
    assert gateway.exec("print(runs)", session)["stdout"] == "1\n"


def test_a_sandbox_that_went_while_no_gateway_was_there_is_told(gateway: GatewayProcess, docker_url: str) -> None:
    first = gateway.exec("x = 1")
    call = Call(gateway, first["session_id"], SLOW.format(tenths=50), key="gone")
    kill(gateway)
    client = docker.DockerClient(base_url=docker_url, timeout=30)
    client.containers.get(first["container_id"]).remove(force=True)
    client.close()
    gateway.start()
    retry = call.again().body
    assert (retry["status"], retry["exit_cause"]["session_lost"]) == ("died", True)
    answer = gateway.exec("print('x' in globals())", first["session_id"])
    assert (answer["stdout"], answer["session_id"]) == ("False\n", first["session_id"])
    assert "the next one did not find it" in answer["stderr"]
    assert "former variables and files are gone" in answer["stderr"]


def test_a_stop_leaves_nothing_and_with_keep_sandboxes_everything(gateway: GatewayProcess) -> None:
    session = gateway.exec("x = 1")["session_id"]
    assert gateway.stop() == 0
    assert containers(gateway) == set()
    gateway.settings["SAMOVAR_KEEP_SANDBOXES"] = "1"
    gateway.start()
    assert gateway.call("GET", f"/api/v1/sessions/{session}").status == 404
    first = gateway.exec("x = 2")
    session = first["session_id"]
    wait_for(lambda: pool(gateway)["warm"] >= 1)
    before = containers(gateway)
    call = Call(gateway, session, SLOW.format(tenths=60), key="over")
    assert gateway.stop() == 0
    call.join(30)
    assert isinstance(call.outcome, Answer), "it was accepted, so it is answered"
    assert (call.outcome.body["status"], call.outcome.body["exit_cause"]["cause"]) == ("died", "gateway")
    assert not call.outcome.body["exit_cause"]["session_lost"]
    assert "goes on in its sandbox" in call.outcome.body["stderr"]
    assert before == containers(gateway)
    gateway.start()
    assert call.again().body["stdout"].endswith("59\nend of run 1\n")
    assert gateway.exec("print(x, runs)", session)["stdout"] == "2 1\n"
    assert before <= containers(gateway)


def test_a_gateway_beside_it_is_not_touched_and_a_second_one_in_its_place_is_refused(
    gateway: GatewayProcess, docker_url: str
) -> None:
    session = gateway.exec("x = 1")["session_id"]
    second = GatewayProcess(gateway.directory, docker_url, dict(SETTINGS))
    with pytest.raises(AssertionError, match=r"(?s)ended with 71.*another gateway serves"):
        second.start()
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as path:
        # The data directory is shared, which is the default.
        settings = {**SETTINGS, "SAMOVAR_DATA_DIR": str(gateway.directory / "data")}
        beside = GatewayProcess(Path(path), docker_url, settings)
        try:
            beside.start()
            other = beside.exec("x = 2")["session_id"]
            call = Call(beside, other, SLOW.format(tenths=30), key="beside")
            kill(gateway)
            gateway.start()
            elsewhere = gateway.call("POST", "/exec", call.body, headers=call.headers)
            assert (elsewhere.status, elsewhere.body["error_type"]) == (409, "running_elsewhere")
            call.join(30)
            assert isinstance(call.outcome, Answer)
            assert call.outcome.body["stdout"].endswith("end of run 1\n")
            assert beside.exec("print(x)", other)["stdout"] == "2\n"
        finally:
            end(beside)
    assert gateway.exec("print(x)", session)["stdout"] == "1\n"


def test_a_start_that_fails_takes_nothing_down(gateway: GatewayProcess) -> None:
    session = gateway.exec("x = 1")["session_id"]
    kill(gateway)
    [kind] = gateway.runtime.glob("????????/kind")
    another = gateway.runtime / "aaaaaaaa"
    another.mkdir()
    (another / "kind").write_text(kind.read_text())
    claim_socket = gateway.runtime / "claim.sock"
    claim_socket.unlink()
    claim_socket.mkdir()
    with pytest.raises(AssertionError, match="ended with 73"):
        gateway.start()
    claim_socket.rmdir()
    engine, gateway.docker_url = gateway.docker_url, "unix:///tmp/there-is-no-engine.sock"
    # Not as plain processes, which is what it would do where there never was an engine.
    with pytest.raises(AssertionError, match="ended with 69"):
        gateway.start()
    gateway.docker_url = engine
    gateway.start()
    assert gateway.exec("print(x)", session)["stdout"] == "1\n"
    wait_for(lambda: not another.exists())
