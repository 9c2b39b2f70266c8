"""What `samovar ps` and `samovar doctor` say of what was found; the finding itself is tested on an engine."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any, ClassVar

import pytest
import requests

from gateway import diagnosis
from gateway.app import GatewayApp
from gateway.checks import Finding
from gateway.cli import doctor, main, ps
from gateway.cli import engine as engine_module
from gateway.cli.terminal import duration, harmless, mebibytes, table
from gateway.diagnosis import (
    check_claim_socket,
    check_place,
    check_port,
    check_runtime_directory,
    check_temporary_directory,
)
from gateway.verdicts import (
    Served,
    Verdict,
    failure,
    good,
    judge_bounds,
    judge_cpus,
    judge_enforcement,
    judge_files,
    judge_health,
    judge_memory,
    judged,
    warning,
    worst,
)
from kernelprovisioner import schedule
from kernelprovisioner.images import KernelImage, Limits, PoolBounds
from kernelprovisioner.inventory import FoundSandbox, Inventory, Life, Owner
from kernelprovisioner.launchers.base import Endpoint
from kernelprovisioner.records import SandboxRecord
from kernelprovisioner.runtime import RuntimeRoot
from kernelprovisioner.usage import Usage, measure, of_process, of_stats
from tests.stored_records import write_record

GIBIBYTE = 2**30
GATEWAY = Owner(Path("/run/samovar/00000000"), Life.ALIVE, True, pid=7, program="python")
CRASHED = Owner(Path("/run/samovar/11111111"), Life.DEAD, True, True)


def record(**fields: Any) -> SandboxRecord:
    known: dict[str, Any] = {
        "sandbox_id": "b" * 16,
        "image": "python",
        "runtime_id": "c" * 64,
        "work_directory": "/mnt/data",
        "transport": "ipc",
        "isolated": True,
        "template": None,
        "key": "SECRET-KEY",
        "token": "SECRET-TOKEN",
        "supervisor": Endpoint(),
        "channels": {},
        "created_at": 100.0,
    }
    return SandboxRecord(**{**known, **fields})


def inventory() -> Inventory:
    claimed = record(state="claimed", kernel_id="my-session", owner="main", holder={"token": "SECRET"})
    return Inventory(
        [GATEWAY, CRASHED],
        [
            FoundSandbox("a" * 16, "python", "warm", GATEWAY, 160.0, "id-a", record(sandbox_id="a" * 16)),
            FoundSandbox("b" * 16, "python", "claimed", GATEWAY, 100.0, "id-b", claimed),
            FoundSandbox("c" * 16, None, "ended", CRASHED),
        ],
    )


def served(most: int = 4, least: int = 2, **limits: Any) -> Served:
    image = KernelImage("python", "python", "Python", Path("/"), "base", limits=Limits(**limits))
    return Served(image, PoolBounds(least, most))


# --- ps -------------------------------------------------------------------------------------------------------------


def test_the_table_of_sandboxes() -> None:
    usages = {"id-a": Usage(100 * 2**20, GIBIBYTE, 1.25), "id-b": Usage(None, None, 70.0)}
    assert ps.rows(inventory(), usages, None, now=220.0)[1:] == [
        ("b" * 16, "python", "claimed", "2m 00s", "main", "my-session", "-", "70.0s", "gateway 7"),
        ("a" * 16, "python", "warm", "1m 00s", "-", "-", "100 MiB", "1.2s", "gateway 7"),
        ("c" * 16, "-", "ended", "-", "-", "-", "-", "-", "gateway (gone)"),
    ]
    watched = ps.rows(inventory(), usages, {"id-a": 49.6}, now=220.0)
    assert [row[7] for row in watched[1:]] == ["-", "50%", "-"]
    assert ps.summary(inventory()).startswith("1 claimed, 1 warm, 1 ended; 1 of owners that are gone")
    assert ps.summary(Inventory()) == "no sandboxes"


def test_percent_is_what_was_used_since_the_last_look() -> None:
    before = {"a": (10.0, Usage(cpu_seconds=1.0)), "b": (10.0, Usage(cpu_seconds=5.0)), "c": (10.0, Usage())}
    now = {name: Usage(cpu_seconds=2.0) for name in "abcd"}
    # "b" was replaced under the same name: less than before is no negative percentage.
    assert ps.cpu_percents(before, now, 12.0) == {"a": 50.0, "b": 0.0}


def test_no_secret_is_shown() -> None:
    document = [ps.as_dict(sandbox, Usage(), None) for sandbox in inventory().sandboxes]
    said = json.dumps([document, ps.rows(inventory(), {}, None, 0.0)])
    assert "SECRET" not in said
    assert document[1]["kernel_id"] == "my-session" and document[1]["kept_by"]["state"] == "alive"


@pytest.mark.parametrize(
    ("memory_stats", "expected"),
    [
        ({"usage": 300, "limit": 900, "stats": {"total_inactive_file": 100, "inactive_file": 50}}, 200),
        ({"usage": 300, "limit": 900, "stats": {"inactive_file": 50}}, 250),
        ({"usage": 10, "limit": 900, "stats": {"inactive_file": 50}}, 0),
    ],
)
def test_memory_without_what_the_kernel_could_drop(memory_stats: dict[str, Any], expected: int) -> None:
    stats = {"memory_stats": memory_stats, "cpu_stats": {"cpu_usage": {"total_usage": 2_500_000_000}}}
    assert of_stats(stats) == Usage(expected, 900, 2.5)


def test_a_container_that_ended_has_no_statistics() -> None:
    assert of_stats({"memory_stats": {}, "cpu_stats": {"cpu_usage": {"total_usage": 0}}}) == Usage(None, None, 0.0)


def test_statistics_are_asked_side_by_side_and_who_is_silent_is_left_out() -> None:
    together = threading.Barrier(3, timeout=10)
    released = threading.Event()

    class Engine:
        def stats(self, container: str, **_: Any) -> dict[str, Any]:
            if container == "silent":
                assert released.wait(10)
            elif container == "gone":
                raise requests.ConnectionError("gone")
            else:
                together.wait()
            return {"memory_stats": {"usage": 1}}

    try:
        found = measure(Engine(), ["one", "two", "three", "silent", "gone", f"process:{os.getpid()}"], 1.0)
    finally:
        released.set()
    assert found.keys() == {"one", "two", "three", f"process:{os.getpid()}"}
    assert (found[f"process:{os.getpid()}"].memory or 0) > 2**20


def test_a_process_that_is_gone() -> None:
    assert of_process(2**22 + 1) is None


# --- what people read -----------------------------------------------------------------------------------------------


def test_tables_are_aligned_and_harmless() -> None:
    lines = table([("NAME", "X"), ("\x1b[2Jlong\nname", "1")]).splitlines()
    assert lines == ["NAME           X", " [2Jlong name  1"]
    assert (
        harmless("\x1b[31mred\x1b[0m \x1b]0;title\x07")
        == "\x1b[31mred\x1b[0m \N{REPLACEMENT CHARACTER}]0;title\N{REPLACEMENT CHARACTER}"
    )


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(None, "-"), (-1, "0s"), (59.9, "59s"), (187, "3m 07s"), (7322, "2h 02m"), (90_000, "1d 01h")],
)
def test_durations(seconds: float | None, expected: str) -> None:
    assert duration(seconds) == expected


def test_sizes() -> None:
    assert (mebibytes(None), mebibytes(3 * 2**19)) == ("-", "2 MiB")


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("ps", "doctor", "reap", "logs"):
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        said = capsys.readouterr().out
        assert said.startswith(f"usage: samovar {name}") and "--json" in said and "--config" in said


def test_whoever_closes_the_pipe_sees_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        ended = subprocess.run([sys.executable, "-m", "gateway.cli", "help"], stdout=closed, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (141, b"")


@pytest.mark.parametrize("name", ["ps", "reap", "logs"])
def test_a_configuration_that_makes_no_sense_is_one_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("API_PORT", "many")
    assert main([name]) == 78
    said = capsys.readouterr().err
    assert said.startswith(f"samovar {name}: Bad configuration") and said.count("\n") == 1


# --- verdicts -------------------------------------------------------------------------------------------------------


def test_the_worst_verdict_counts() -> None:
    assert worst([]) is Verdict.OK
    assert worst([good("a", ""), warning("b", "", "")]) is Verdict.WARNING
    assert worst([failure("a", "", ""), warning("b", "", "")]) is Verdict.FAILURE


@pytest.mark.parametrize(
    ("least", "most", "verdict"), [(2, 4, Verdict.OK), (0, 4, Verdict.WARNING), (4, 4, Verdict.WARNING)]
)
def test_bounds(least: int, most: int, verdict: Verdict) -> None:
    assert judge_bounds(served(most, least)).verdict is verdict


def test_a_schedule_that_asks_for_more_than_there_are_places() -> None:
    entries = (schedule.parse("4 python on Mondays 8:55-10:00"), schedule.parse("5 python on weekdays 8:55-10:00"))
    found = judge_bounds(dataclasses.replace(served(4, 1), schedule=entries))
    assert found.verdict is Verdict.WARNING and "5 python on weekdays 08:55-10:00" in found.text
    assert judge_bounds(dataclasses.replace(served(5, 1), schedule=entries)).verdict is Verdict.OK


@pytest.mark.parametrize(
    ("hard", "most", "verdict"),
    [(None, 10_000, Verdict.OK), (1024, 10, Verdict.OK), (1024, 100, Verdict.FAILURE), (4096, 100, Verdict.OK)],
)
def test_open_files(hard: int | None, most: int, verdict: Verdict) -> None:
    found = judge_files(hard, [served(most)])
    assert found.verdict is verdict and bool(found.mend) is (verdict is not Verdict.OK)


@pytest.mark.parametrize(("gibibytes", "verdict"), [(8, Verdict.OK), (3, Verdict.WARNING), (1, Verdict.FAILURE)])
def test_memory_of_the_machine(gibibytes: int, verdict: Verdict) -> None:
    # 4 places, 2 of them warm, of 1 GiB each
    one = served(memory_mb=1024, work_mb=1, tmp_mb=1, shm_mb=1)
    found = judge_memory([one], gibibytes * GIBIBYTE)
    assert found.verdict is verdict, found


def test_cores() -> None:
    assert judge_cpus(served(cpus=2.0), 2.0).verdict is Verdict.OK
    assert judge_cpus(served(cpus=4.0), 2.0).verdict is Verdict.WARNING


def test_an_engine_that_cannot_lock_a_sandbox_in() -> None:
    fine = {"MemoryLimit": True, "PidsLimit": True, "CpuCfsQuota": True, "SecurityOptions": ["name=seccomp"]}
    assert [one.verdict for one in judge_enforcement(fine)] == [Verdict.OK]
    (found,) = judge_enforcement({**fine, "MemoryLimit": False, "PidsLimit": False})
    assert found.verdict is Verdict.FAILURE and "memory, processes" in found.text
    (found,) = judge_enforcement({**fine, "SecurityOptions": []})
    assert found.verdict is Verdict.FAILURE and "seccomp" in found.text


def test_checks_that_health_makes_too() -> None:
    assert judged("disk", Finding("healthy"), "fine") == good("disk", "fine")
    assert judged("disk", Finding("degraded", "low", "run: df"), "") == warning("disk", "low", "df")
    assert judged("disk", Finding("unhealthy", "full", "make room"), "") == failure("disk", "full", "make room")


def test_what_a_gateway_says_of_itself() -> None:
    body = {
        "services": {
            "engine": {"status": "healthy"},
            "pool:python": {"status": "degraded", "last_error": "no such image"},
            "image:python": {"status": "unhealthy", "error": "missing", "remedy": "run: samovar images build python"},
        }
    }
    pool, image = judge_health(body)
    assert (pool.verdict, pool.text) == (Verdict.WARNING, "degraded: no such image")
    assert (image.verdict, image.mend) == (Verdict.FAILURE, "samovar images build python")
    assert [one.verdict for one in judge_health({"services": {"engine": {"status": "healthy"}}})] == [Verdict.OK]
    assert judge_health({"status": "healthy"}) == []


# --- looking --------------------------------------------------------------------------------------------------------


def test_runtime_directories(short_directory: Path) -> None:
    path = short_directory / "run"
    assert "first start makes it" in check_runtime_directory(path).text
    path.mkdir(mode=0o755)
    path.chmod(0o755)
    assert check_runtime_directory(path).mend == f"chmod 700 {path}"
    path.chmod(0o700)
    assert check_runtime_directory(path).verdict is Verdict.OK
    link = short_directory / "link"
    link.symlink_to(path)
    assert check_runtime_directory(link).verdict is Verdict.FAILURE
    long = check_runtime_directory(short_directory / ("x" * 100))
    assert long.verdict is Verdict.FAILURE and "shorter" in long.mend


def test_places(short_directory: Path) -> None:
    found = check_place("data directory", short_directory, "things", "SAMOVAR_DATA_DIR")
    assert found.verdict is Verdict.OK and "free" in found.text
    assert "first start makes it" in check_place("data", short_directory / "new", "things", "SAMOVAR_DATA_DIR").text
    file = short_directory / "file"
    file.touch()
    found = check_place("data directory", file / "below", "things", "SAMOVAR_DATA_DIR")
    assert found.verdict is Verdict.FAILURE and "SAMOVAR_DATA_DIR" in found.mend


def test_a_temporary_directory_that_is_full_or_gone_is_told_and_no_other_one_looked_at(
    short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", full)
    monkeypatch.setenv("TMPDIR", str(short_directory))
    assert check_temporary_directory().verdict is Verdict.OK
    monkeypatch.setenv("TMPDIR", str(short_directory / "gone"))
    found = check_temporary_directory()
    assert found.verdict is Verdict.FAILURE and f"{short_directory}/gone cannot be written" in found.text
    there = {one.what: one for one in diagnosis.directories(GatewayApp(), short_directory, {})}
    assert there["temporary directory"] == found


def test_claim_sockets(short_directory: Path) -> None:
    path = short_directory / "claim.sock"
    found, pid = check_claim_socket(path)
    assert (found.verdict, pid) == (Verdict.OK, None)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        found, pid = check_claim_socket(path)
        assert (found.verdict, pid) == (Verdict.OK, os.getpid())
    found, pid = check_claim_socket(path)
    assert (found.verdict, pid) == (Verdict.WARNING, None) and "stale" in found.text


class FakeEngine(BaseHTTPRequestHandler):
    """A container engine that has no image, no container, and on request no haste."""

    protocol_version = "HTTP/1.1"
    answers: ClassVar[dict[str, Any]] = {
        "/version": {"Version": "99", "ApiVersion": "1.41", "MinAPIVersion": "1.12"},
        "/info": {"ServerVersion": "99", "SecurityOptions": ["name=seccomp"], "MemTotal": 64 * GIBIBYTE, "NCPU": 8},
        "/containers/json": [],
    }
    pause = 0.0

    def do_GET(self) -> None:
        time.sleep(self.pause)
        path = re.sub(r"^/v[\d.]+", "", self.path.partition("?")[0])
        body = json.dumps(self.answers.get(path, {"message": "No such image"})).encode()
        with suppress(BrokenPipeError):
            self.send_response(200 if path in self.answers else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_: Any) -> None:
        """Nobody reads it."""


class UnixServer(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True


@contextmanager
def engine_at(path: Path, pause: float) -> Iterator[str]:
    handler = type("Handler", (FakeEngine,), {"pause": pause})
    with UnixServer(str(path), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"unix://{path}"
        finally:
            server.shutdown()
            thread.join()


def examined(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **environment: str) -> dict[str, Any]:
    """What `samovar doctor` says in this environment, by what it is about."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code = doctor.main(["--json"])
    found = {one["what"]: one for one in json.loads(capsys.readouterr().out)["found"]}
    assert code == int(any(one["verdict"] == "failure" for one in found.values()))
    return found


def test_an_image_that_is_not_there(
    short_directory: Path, runtime_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SAMOVAR_DATA_DIR", str(short_directory / "data"))
    with engine_at(short_directory / "engine.sock", 0.0) as url:
        found = examined(monkeypatch, capsys, DOCKER_BASE_URL=url, API_PORT="0")
    assert found["engine"]["verdict"] == found["engine limits"]["verdict"] == found["memory"]["verdict"] == "ok"
    image = found["image python"]
    assert (image["verdict"], image["mend"]) == ("failure", "samovar images build python")
    assert not (short_directory / "data").exists() and not list(runtime_directory.iterdir())


def test_an_engine_that_takes_too_long(
    short_directory: Path, runtime_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SAMOVAR_DATA_DIR", str(short_directory / "data"))
    monkeypatch.setattr(diagnosis, "_ENGINE_SECONDS", 0.3)
    monkeypatch.setattr(engine_module, "ENGINE_SECONDS", 0.3)
    with engine_at(short_directory / "engine.sock", 1.0) as url:
        found = examined(monkeypatch, capsys, DOCKER_BASE_URL=url, API_PORT="0")
    assert found["engine"]["text"] == f"no container engine answers at {url}: it does not answer in time"
    assert found["engine"]["verdict"] == "failure"
    assert "image python" not in found
    # The rest is looked at all the same.
    assert found["runtime directory"]["verdict"] == "ok"


@contextmanager
def web(status: int, body: bytes) -> Iterator[int]:
    """A program that answers everything in the same way."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Nobody reads it."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield int(server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


def app_at(port: int) -> GatewayApp:
    return GatewayApp(port=port, api_key="test-key-of-the-doctor")


def test_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = int(probe.getsockname()[1])
    assert [one.verdict for one in check_port(app_at(free), runs=False)] == [Verdict.OK]
    assert [one.verdict for one in check_port(app_at(free), runs=True)] == [Verdict.WARNING]
    assert "free one" in check_port(app_at(0), runs=False)[0].text
    with web(200, b"<html>hello</html>") as port:
        (found,) = check_port(app_at(port), runs=False)
        assert found.verdict is Verdict.FAILURE and "another program" in found.text
    with web(200, json.dumps({"version": "1", "services": {"engine": {"status": "unhealthy"}}}).encode()) as port:
        assert [one.verdict for one in check_port(app_at(port), runs=True)] == [Verdict.OK, Verdict.FAILURE]
    monkeypatch.setattr(diagnosis, "_HTTP_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        (found,) = check_port(app_at(int(silent.getsockname()[1])), runs=False)
        assert found.verdict is Verdict.FAILURE and "nothing is answered" in found.text


def test_the_report_names_the_way_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = [good("one", "fine"), failure("second", "broken\x1b[2J", "mend it")]
    assert doctor.as_text(found, colour=False).splitlines() == [
        "ok       one     fine",
        "failure  second  broken [2J",
        "                 → mend it",
        "",
        "1 failure, 0 warnings, 1 in order.",
    ]
    monkeypatch.setenv("API_PORT", "many")
    assert doctor.main(["--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["verdict"] == "failure" and "API_PORT" in document["found"][0]["text"]
    assert document["found"][0].keys() == {field.name for field in dataclasses.fields(found[0])}


def test_leftovers_tell_what_a_gateway_would_take_up() -> None:
    assert [one.verdict for one in diagnosis.leftovers(Inventory([GATEWAY]))] == [Verdict.OK]
    (found,) = diagnosis.leftovers(inventory())
    assert found.verdict is Verdict.WARNING and "samovar serve" in found.mend and "samovar reap" in found.mend
    assert found.text == "1 owner is gone and left 1 sandbox"
    gone = dataclasses.replace(CRASHED, is_awaited=False)
    assert diagnosis.leftovers(Inventory([gone]))[0].mend == "samovar reap"


def test_ps_says_when_the_states_are_only_those_noted(
    runtime_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DOCKER_BASE_URL", "unix:///tmp/there-is-no-engine.sock")
    # Nobody ever used an engine here: none is missed.
    assert main(["ps"]) == 0
    assert capsys.readouterr().err == ""
    owner = RuntimeRoot.open(runtime_directory).owner_directory()
    try:
        owner.write_kind("docker ENGINE")
        write_record(owner.path, record(state="claimed", kernel_id="my-session"))
        assert main(["ps"]) == 69
        said = capsys.readouterr()
        assert "my-session" in said.out and "claimed" in said.out
        assert said.err == (
            "samovar ps: no container engine answers at unix:///tmp/there-is-no-engine.sock: there is no such socket\n"
        )
    finally:
        owner.close()
