"""How `samovar serve` starts, refuses to start, and stops: exit codes and sentences, drain, and nothing left behind."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from tests import services
from tests.gateway_process import GatewayProcess

NO_ENGINE = "unix:///tmp/there-is-no-engine.sock"


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short path."""
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as path:
        yield Path(path)


def refused(process: GatewayProcess, timeout: float = 30.0) -> tuple[int, str]:
    """Exit code and what was said of a gateway that does not start."""
    command = [sys.executable, "-m", "gateway.cli", "serve", *process.arguments]
    ended = subprocess.run(
        command, env=process.environment, cwd=process.directory, capture_output=True, text=True, timeout=timeout
    )
    return ended.returncode, ended.stderr.strip()


@pytest.mark.parametrize(
    ("settings", "arguments", "code", "words"),
    [
        ({"API_PORT": "many"}, [], 78, "API_PORT"),
        ({}, ["--PoolSettings.max_sise=3"], 78, "max_size"),
        ({"CONTAINER_POOL_PY_MIN": "9", "CONTAINER_POOL_PY_MAX": "3"}, [], 78, "min=9"),
        ({"API_KEY": "short"}, [], 78, "API key"),
        ({}, ["--launcher=docker"], 69, "no container engine"),
        ({}, ["--GatewayApp.images=cobol"], 66, "cobol"),
        ({"SAMOVAR_DATA_DIR": "/proc/nowhere"}, [], 73, "/proc/nowhere"),
        ({"SAMOVAR_RUNTIME_DIR": "/proc/nowhere"}, [], 73, "/proc/nowhere"),
    ],
)
def test_what_keeps_it_from_starting_is_one_sentence_and_an_exit_code(
    directory: Path, settings: dict[str, str], arguments: list[str], code: int, words: str
) -> None:
    found, said = refused(GatewayProcess(directory, NO_ENGINE, settings, arguments))
    assert (found, said.count("\n")) == (code, 0), said
    assert words in said and said.startswith("samovar serve: ")


def test_a_port_in_use_is_told_and_changes_nothing(directory: Path) -> None:
    first = GatewayProcess(directory, None, arguments=["--launcher=process"])
    first.start()
    try:
        second = GatewayProcess(directory, None, {"API_PORT": str(first.port)}, ["--launcher=process"])
        code, said = refused(second)
        assert code == 71 and str(first.port) in said and "in use" in said
        other_port = GatewayProcess(directory, None, arguments=["--launcher=process"])
        code, said = refused(other_port)
        assert code == 71 and "another gateway" in said
        assert first.exec("print(1)")["stdout"] == "1\n"
    finally:
        assert first.stop() == 0


def test_without_an_engine_it_warns_runs_a_first_cell_and_stops_on_ctrl_c(directory: Path) -> None:
    gateway = GatewayProcess(directory, NO_ENGINE, {"API_KEY": ""}, ["--first-cell"])
    gateway.start()
    deadline = time.monotonic() + 30
    while "Ctrl-C stops" not in gateway.log.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    said = gateway.log.read_text()
    key_file = directory / "data" / "api-key"
    gateway.key = key_file.read_text().strip()
    assert "CODE IS NOT ISOLATED" in said
    assert "The sum of 1 to 100 is 5050" in said and "5051" in said
    assert gateway.key in said, "a new key is shown once"
    assert key_file.stat().st_mode & 0o777 == 0o600
    curl = next(line for line in said.splitlines() if line.startswith("curl "))
    assert gateway.key not in curl
    answered = subprocess.run(["sh", "-c", curl], capture_output=True, text=True, timeout=30)
    assert '"stdout":"42\\n"' in answered.stdout
    for client in ("import nbclient", "-m papermill", "-m jupyterlab"):
        assert any(client in line and line.count("\n") == 0 for line in said.splitlines())
    assert gateway.process is not None
    gateway.process.send_signal(signal.SIGINT)
    assert gateway.process.wait(30) == 0
    assert list((directory / "run").glob("*/*")) == []
    second = GatewayProcess(directory, NO_ENGINE, {"API_KEY": ""}, ["--launcher=process"], key=gateway.key)
    second.start()
    assert second.exec("print(1)")["stdout"] == "1\n"
    assert second.stop() == 0
    assert gateway.key not in second.log.read_text().removeprefix(said)


def test_a_cell_that_runs_at_the_stop_is_answered(directory: Path) -> None:
    gateway = GatewayProcess(directory, None, {"SAMOVAR_DRAIN_TIMEOUT": "1.5"}, ["--launcher=process"])
    gateway.start()
    ready = time.monotonic() + 20
    while gateway.call("GET", "/metrics/pool").body["pool"]["python"]["warm"] < 2 and time.monotonic() < ready:
        time.sleep(0.1)
    with concurrent.futures.ThreadPoolExecutor(2) as callers:
        short = callers.submit(gateway.exec, "import time; time.sleep(1); print('done')")
        endless = callers.submit(gateway.exec, "print('begun')\nwhile True: time = 1")
        time.sleep(0.7)
        assert gateway.stop() == 0
        assert short.result()["stdout"] == "done\n"
        cut = endless.result()
    assert (cut["status"], cut["stdout"], cut["exit_cause"]["cause"]) == ("died", "begun\n", "gateway")


def test_an_answer_that_is_on_its_way_at_the_stop_arrives_whole(directory: Path) -> None:
    gateway = GatewayProcess(directory, NO_ENGINE, {"CONTAINER_POOL_PY_MIN": "1"})
    gateway.start()
    session = gateway.exec("1")["session_id"]
    body = json.dumps({"code": "print('x' * 8_000_000)", "lang": "py", "session_id": session}).encode()
    head = f"POST /exec HTTP/1.1\r\nHost: x\r\nx-api-key: {gateway.key}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as client:
        client.sendall(head.encode() + body)
        received = client.recv(1000)
        assert gateway.process is not None
        gateway.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        while piece := client.recv(1 << 20):
            received += piece
    answer_head, _, answer = received.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(answer)}\r\n".encode() in answer_head + b"\r\n"
    assert len(answer) > 16_000_000
    assert gateway.process.wait(30) == 0


@pytest.mark.service
def test_an_evicted_session_starts_anew_and_says_so(directory: Path, docker_url: str, kernel_image: str) -> None:
    gateway = GatewayProcess(directory, docker_url, {"CONTAINER_POOL_PY_MIN": "1", "CONTAINER_POOL_PY_MAX": "1"})
    gateway.start()
    try:
        first = gateway.exec("kept = 1")
        other = gateway.exec("print('in its place')")
        assert other["container_id"] != first["container_id"]
        again = gateway.exec("print('kept' in globals())", first["session_id"])
        assert again["stdout"] == "False\n"
        assert "gave its sandbox up" in again["stderr"]
        assert gateway.exec("1", first["session_id"])["stderr"] == ""
    finally:
        assert gateway.stop() == 0


@pytest.mark.service
def test_a_full_line_is_refused_with_retry_after(directory: Path, docker_url: str, kernel_image: str) -> None:
    settings = {"CONTAINER_POOL_PY_MIN": "1", "CONTAINER_POOL_PY_MAX": "1", "SAMOVAR_POOL_SETTINGS_LINE_BOUND": "1"}
    gateway = GatewayProcess(directory, docker_url, settings)
    gateway.start()
    try:
        with concurrent.futures.ThreadPoolExecutor(6) as callers:
            body = {"code": "import time; time.sleep(2); print(1)", "lang": "py"}
            answers = list(callers.map(lambda _: gateway.call("POST", "/exec", body), range(6)))
        refusals = [answer for answer in answers if answer.status == 503]
        assert refusals and all(int(answer.headers["retry-after"]) >= 1 for answer in refusals)
        assert all(answer.body["stdout"] == "1\n" for answer in answers if answer.status == 200)
        assert len(refusals) < 6
    finally:
        assert gateway.stop() == 0


@pytest.mark.service
def test_what_a_killed_gateway_left_belongs_to_the_next_one_and_goes_with_it(
    directory: Path, docker_url: str, kernel_image: str
) -> None:
    settings = {"CONTAINER_POOL_PY_MIN": "1", "CONTAINER_POOL_PY_MAX": "3"}
    killed = GatewayProcess(directory, docker_url, settings)
    killed.start()
    old = killed.exec("1")["container_id"]
    assert killed.process is not None
    killed.process.kill()
    killed.process.wait()
    client = docker.DockerClient(base_url=docker_url)
    try:
        following = GatewayProcess(directory, docker_url, settings)
        following.start()
        try:
            assert following.exec("print(1)")["stdout"] == "1\n"
            assert client.containers.list(filters={"id": old})
        finally:
            assert following.stop() == 0
        own = {"label": [services.LABEL]}
        left = [found for found in client.containers.list(all=True, filters=own) if str(directory) in str(found.labels)]
        assert left == []
    finally:
        client.close()
    assert not any(re.fullmatch("[0-9a-f]{8}", name) for name in os.listdir(directory / "run"))


@pytest.mark.service
def test_detailed_health_knows_engine_pool_and_image(directory: Path, docker_url: str, kernel_image: str) -> None:
    gateway = GatewayProcess(directory, docker_url, {"CONTAINER_POOL_PY_MIN": "1", "CONTAINER_POOL_PY_MAX": "1"})
    gateway.start()
    try:
        report = gateway.call("GET", "/health/detailed", headers={"x-api-key": ""})
        assert report.status == 200
        directories = {f"directory:{name}" for name in ("runtime", "data", "temporary")}
        assert set(report.body["services"]) == {"engine", "pool:python", "image:python", "records", *directories}
        assert report.body["services"]["engine"]["isolated"] is True
        pool = gateway.call("GET", "/metrics/pool", headers={"x-api-key": ""}).body["pool"]["python"]
        assert (pool["min"], pool["max"]) == (1, 1)
    finally:
        assert gateway.stop() == 0
