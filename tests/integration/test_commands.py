"""`samovar ps`, `doctor`, `reap` and `logs` beside a real gateway, after one, and over what is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway_process import GatewayProcess

BOUNDS = {"CONTAINER_POOL_PY_MIN": "1", "CONTAINER_POOL_PY_MAX": "3"}
#: A program that has a sandbox of its own, as a provisioner without a gateway has.
COLD = """
import asyncio
from kernelprovisioner.images import find_image
from kernelprovisioner.launchers import DockerLauncher
from kernelprovisioner.launchers.base import LaunchRequest
from kernelprovisioner.runtime import RuntimeRoot
from kernelprovisioner.sandboxes import Sandboxes

async def main():
    sandboxes = Sandboxes(DockerLauncher(RuntimeRoot.open()))
    await sandboxes.start()
    await sandboxes.launch(LaunchRequest("5a" * 8, find_image("python")))
    print("ready", flush=True)
    await asyncio.sleep(120)

asyncio.run(main())
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short path."""
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as path:
        yield Path(path)


def samovar(gateway: GatewayProcess, *arguments: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    """A command under the gateway's configuration."""
    return subprocess.run(
        [sys.executable, "-m", "gateway.cli", *arguments],
        env=gateway.environment,
        cwd=gateway.directory,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def sandboxes(gateway: GatewayProcess) -> list[dict[str, Any]]:
    """What `samovar ps` lists of this gateway's runtime directory (an engine may have those of others, too)."""
    document = json.loads(samovar(gateway, "ps", "--json").stdout)
    ours = str(gateway.runtime)
    return [one for one in document["sandboxes"] if one["kept_by"]["directory"].startswith(ours)]


def diagnosis(gateway: GatewayProcess) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code of `samovar doctor`, and its judgements by what they are about."""
    ended = samovar(gateway, "doctor", "--json")
    return ended.returncode, {one["what"]: one for one in json.loads(ended.stdout)["found"]}


def killed(gateway: GatewayProcess) -> None:
    """End the gateway as a crash does."""
    assert gateway.process is not None
    gateway.process.kill()
    gateway.process.wait(10)


def until_warm(gateway: GatewayProcess, count: int) -> None:
    deadline = time.monotonic() + 60
    while sum(one["state"] == "warm" for one in sandboxes(gateway)) < count:
        assert time.monotonic() < deadline, gateway.log.read_text()
        time.sleep(0.2)


def reapable(gateway: GatewayProcess) -> list[str]:
    """The directories of all owners that `samovar reap` would reap."""
    found = json.loads(samovar(gateway, "reap", "--dry-run", "--json").stdout)["owners"]
    return [one["directory"] for one in found]


@pytest.mark.service
def test_beside_a_gateway(docker_url: str, kernel_image: str, directory: Path) -> None:
    gateway = GatewayProcess(directory, docker_url, BOUNDS)
    gateway.start()
    try:
        answer = gateway.exec("x = bytearray(50 * 2**20)", "lesson")
        until_warm(gateway, 1)
        by_state = {one["state"]: one for one in sandboxes(gateway)}
        claimed = by_state["claimed"]
        assert (claimed["runtime_id"], claimed["image"]) == (answer["container_id"], "python")
        assert (claimed["kernel_id"], claimed["owner"]) == (answer["session_id"], "main")
        assert claimed["memory_bytes"] > 50 * 2**20 < claimed["memory_limit_bytes"]
        assert claimed["cpu_seconds"] > 0
        assert gateway.process is not None
        assert claimed["kept_by"]["gateway"] and claimed["kept_by"]["pid"] == gateway.process.pid
        assert by_state["warm"]["kernel_id"] is None

        table = samovar(gateway, "ps").stdout
        assert answer["session_id"] in table and f"gateway {gateway.process.pid}" in table

        before = reapable(gateway)
        code, found = diagnosis(gateway)
        after = reapable(gateway)
        assert code == 0, found
        assert "is served by Samovar" in found["port"]["text"]
        assert f"process {gateway.process.pid}" in found["claim socket"]["text"]
        assert found["gateway"]["verdict"] == "ok"
        # Other tests' gateways may die on this engine at the same time; of this one nothing is left over.
        assert not [one for one in (*before, *after) if one.startswith(str(directory))]
        assert found["leftovers"]["verdict"] in {"warning" if owners else "ok" for owners in (before, after)}

        assert gateway.exec("import os; os._exit(7)", "dies")["status"] == "died"
        exits = samovar(gateway, "logs", "--exits").stdout
        assert "ended with exit code 7" in exits and "cause: exited" in exits
        of_the_other = samovar(gateway, "logs", "--session", answer["session_id"], "--exits", "--json").stdout
        assert of_the_other == ""
        # Nothing of a living owner is anybody else's to remove.
        assert str(gateway.runtime) not in samovar(gateway, "reap").stdout
        assert gateway.exec("print(len(x))", answer["session_id"])["stdout"] == f"{50 * 2**20}\n"
    finally:
        assert gateway.stop() == 0
    assert sandboxes(gateway) == []


@pytest.mark.service
def test_after_a_crash_the_next_gateway_or_reap(docker_url: str, kernel_image: str, directory: Path) -> None:
    gateway = GatewayProcess(directory, docker_url, BOUNDS)
    cold: subprocess.Popen[str] | None = None
    gateway.start()
    try:
        session = gateway.exec("x = 1")["session_id"]
        killed(gateway)
        assert session in {one["kernel_id"] for one in sandboxes(gateway)}
        assert {one["kept_by"]["state"] for one in sandboxes(gateway)} == {"dead"}
        code, found = diagnosis(gateway)
        assert code == 0, found
        assert "stale" in found["claim socket"]["text"] and "samovar serve" in found["claim socket"]["mend"]
        assert found["leftovers"]["verdict"] == "warning" and "samovar reap" in found["leftovers"]["mend"]

        cold = subprocess.Popen(
            [sys.executable, "-c", COLD], env=gateway.environment, stdout=subprocess.PIPE, text=True
        )
        assert cold.stdout is not None and cold.stdout.readline() == "ready\n"
        before = sandboxes(gateway)
        outcome = samovar(gateway, "reap", "--dry-run", "--json")
        (owner,) = [
            one for one in json.loads(outcome.stdout)["owners"] if one["directory"].startswith(str(gateway.runtime))
        ]
        assert owner["gateway"] and owner["outcome"] == "would be removed"
        assert {one["sandbox_id"] for one in sandboxes(gateway)} == {one["sandbox_id"] for one in before}

        assert samovar(gateway, "reap").returncode == 0
        (left,) = sandboxes(gateway)
        assert (left["sandbox_id"], left["kept_by"]["pid"]) == ("5a" * 8, cold.pid)
        cold.kill()
        cold.wait(10)
        (left,) = sandboxes(gateway)
        assert left["kept_by"]["state"] == "dead" and not left["kept_by"]["gateway"]
        assert samovar(gateway, "reap").returncode == 0
        assert sandboxes(gateway) == []
        assert sorted(entry.name for entry in gateway.runtime.iterdir()) == ["claim.sock", "k"]
    finally:
        if cold is not None:
            cold.kill()
            cold.wait(10)
            assert cold.stdout is not None
            cold.stdout.close()
        killed(gateway)
        samovar(gateway, "reap")


@pytest.mark.limit(90)
def test_without_an_engine_processes_are_seen_and_reaped(directory: Path) -> None:
    gateway = GatewayProcess(directory, None, {**BOUNDS, "SAMOVAR_LAUNCHER": "process"})
    gateway.start()
    try:
        session = gateway.exec("import os; print(os.getpid())")
        kernel = int(session["stdout"])
        (claimed,) = [one for one in sandboxes(gateway) if one["state"] == "claimed"]
        assert claimed["kernel_id"] == session["session_id"] and claimed["memory_bytes"] > 2**20
        killed(gateway)
        assert samovar(gateway, "reap").returncode == 0
        assert sandboxes(gateway) == []
        deadline = time.monotonic() + 10
        while os.path.exists(f"/proc/{kernel}") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not os.path.exists(f"/proc/{kernel}")
    finally:
        killed(gateway)
        samovar(gateway, "reap")


@pytest.mark.limit(90)
def test_the_doctor_finds_what_is_broken(directory: Path) -> None:
    gateway = GatewayProcess(directory, "unix:///tmp/there-is-no-engine.sock", BOUNDS)
    gateway.runtime.chmod(0o755)
    code, found = diagnosis(gateway)
    assert code == 1
    assert found["engine"]["verdict"] == "failure" and "there is no such socket" in found["engine"]["text"]
    assert found["runtime directory"]["mend"] == f"chmod 700 {gateway.runtime}"
    said = samovar(gateway, "doctor").stdout
    assert f"→ chmod 700 {gateway.runtime}" in said and said.endswith("in order.\n")
    reaping = samovar(gateway, "reap")
    assert reaping.returncode == 73 and "chmod 700" in reaping.stderr
    subprocess.run(["sh", "-c", found["runtime directory"]["mend"]], check=True)
    gateway.settings["SAMOVAR_LAUNCHER"] = "process"
    assert diagnosis(gateway)[0] == 0


@pytest.fixture
def small_disk(directory: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = directory / "disk"
    disk.mkdir()
    mounting = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k,mode=0700", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounting.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounting.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.limit(90)
def test_a_full_disk_costs_lines_of_the_log_and_nothing_else(directory: Path, small_disk: Path) -> None:
    log, ballast = small_disk / "samovar.log", small_disk / "ballast"
    gateway = GatewayProcess(
        directory, None, {**BOUNDS, "SAMOVAR_LAUNCHER": "process", "LOG_FILE": str(log), "SAMOVAR_LOG_FILE_MB": "1"}
    )

    def fill() -> None:
        with ballast.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 4096)
            except OSError as error:
                assert error.errno == 28

    fill()
    gateway.start()
    try:
        session = gateway.exec("print(1)")["session_id"]
        assert "cannot be written: No space left on device" in gateway.log.read_text()
        ballast.unlink()
        for number in range(50):
            assert gateway.exec(f"print({number})", session)["stdout"] == f"{number}\n"
        fill()
        assert gateway.exec("print(2)", session)["stdout"] == "2\n"
        ballast.unlink()
        assert gateway.exec("print(3)", session)["stdout"] == "3\n"
    finally:
        assert gateway.stop() == 0
    lines = [json.loads(line) for line in samovar(gateway, "logs", "--json").stdout.splitlines()]
    assert any("lines of the log could not be written" in line["message"] for line in lines)
    assert sum("POST /exec" in line["message"] for line in lines) >= 50
