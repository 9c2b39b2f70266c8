"""The supervisor, run for real as a plain process: greeting, files, statistics, and how it tells a death."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from samovar_kernel.frames import pack
from samovar_kernel.workfiles import BadPath, WorkFiles

from tests.unit.local_sandbox import TOKEN, LocalSandbox

SLEEPER = ["/bin/sleep", "60"]


def test_only_a_holder_of_the_token_gets_in(short_directory: Path) -> None:
    with LocalSandbox(short_directory, kernel=SLEEPER) as sandbox:
        assert sandbox.hello["ok"] and sandbox.hello["protocol"] == 1
        first = sandbox.stream
        for frame in (pack({"op": "hello", "token": "wrong"}), pack({"op": "stats", "id": 1}), b"\xff" * 8):
            with sandbox.connect() as stranger:
                stranger.sendall(frame)
                assert stranger.recv(100) == b""
        assert sandbox.request("stats")[0]["ok"]
        sandbox.stream = sandbox.connect()
        sandbox.greet(TOKEN)
        assert first.recv(100) == b"", "the newest connection wins"
        first.close()
        assert sandbox.request("stats")[0]["ok"]


def test_files_in_and_out(short_directory: Path) -> None:
    with LocalSandbox(short_directory, kernel=SLEEPER) as sandbox:
        put = sandbox.request("put", b"hello", path="a/b.txt", offset=0, final=False)[0]
        assert put["ok"]
        sandbox.request("put", b" world", path="a/b.txt", offset=5, final=True, mtime_ns=5_000_000_000)
        assert (sandbox.work / "a" / "b.txt").read_text() == "hello world"
        header, body = sandbox.request("get", path="a/b.txt", offset=6, size=100)
        assert (body, header["size"], header["eof"], header["mtime_ns"]) == (b"world", 11, True, 5_000_000_000)
        header, body = sandbox.request("list", limit=10)
        assert (body, header["more"]) == (b'[["a/b.txt", 11, 5000000000]]', False)
        assert sandbox.request("get", path="nothing", offset=0, size=1)[0]["errno"] == "ENOENT"
        assert "inside the work directory" in sandbox.request("put", b"", path="../x", offset=0, final=True)[0]["error"]
        assert not sandbox.request("nonsense")[0]["ok"]
        assert not sandbox.request("signal", signum="9")[0]["ok"]
        stats = sandbox.request("stats")[0]
        assert stats["rss"] > 0 and stats["cpu_seconds"] >= 0
        sandbox.process.terminate()
        assert sandbox.process.wait(5) == 143


@pytest.mark.parametrize("path", ["", "/etc/passwd", "..", "a/../b", "a//b", "./a", "a\0b", "/".join("a" * 40)])
def test_paths_that_lead_outside(short_directory: Path, path: str) -> None:
    with pytest.raises(BadPath):
        WorkFiles(str(short_directory)).put(path, 0, b"", mtime_ns=None)


def test_no_link_is_followed(short_directory: Path) -> None:
    work, outside = short_directory / "work", short_directory / "outside"
    work.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (work / "directory").symlink_to(outside)
    (work / "file").symlink_to(outside / "secret")
    os.mkfifo(work / "fifo")
    files = WorkFiles(str(work))
    for path in ("directory/secret", "file", "fifo"):
        with pytest.raises(OSError):
            files.get(path, 0, 10)
        with pytest.raises(OSError):
            files.put(path, 0, b"changed", mtime_ns=None)
    assert (outside / "secret").read_text() == "secret"
    assert files.entries(None, 10) == ([], False)


def test_list_goes_on_where_it_ended(short_directory: Path) -> None:
    for name in ("a/x", "a/y", "a.txt", "b/c/d", "b/e", ".hidden", "z"):
        path = short_directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    files = WorkFiles(str(short_directory))
    found: list[str] = []
    more = True
    while more:
        page, more = files.entries(found[-1] if found else None, 2)
        found += [path for path, _, _ in page]
    assert found == ["a/x", "a/y", "a.txt", "b/c/d", "b/e", "z"]


def unseen(records: list[dict[str, Any]], received: dict[str, str]) -> str:
    """The text of `records` behind the last stream message that was received."""
    marks = [number for number, record in enumerate(records) if record.get("msg_id") in received]
    rest = records[marks[-1] + 1 :] if marks else records
    return "".join(record["text"] for record in rest if record["kind"] == "text")


@pytest.mark.parametrize(
    ("end", "code", "signum"),
    [
        ("os._exit(3)", 3, None),
        ("os.kill(os.getpid(), 9)", None, 9),
        ("import ctypes; ctypes.string_at(0)", None, 11),
        ("print('x' * 300_000); os._exit(1)", 1, None),
    ],
)
def test_a_death_loses_no_output(short_directory: Path, end: str, code: int | None, signum: int | None) -> None:
    with LocalSandbox(short_directory) as sandbox:
        sandbox.open()
        cell = sandbox.start_cell(f"import os\nprint('first')\nos.write(1, b'raw\\n')\nprint('last')\n{end}")
        event, records = sandbox.exit_event()
        assert (event["code"], event["signal"]) == (code, signum)
        received: dict[str, str] = {}
        while sandbox.sockets["iopub"].poll(200):
            _, message = sandbox.session.recv(sandbox.sockets["iopub"], 0)
            if message is not None and message["msg_type"] == "stream":
                received[message["header"]["msg_id"]] = message["content"]["text"]
        text = "".join(received.values()) + unseen(records, received)
        assert text == "first\nraw\nlast\n" + ("x" * 300_000 + "\n" if "x" in end and code == 1 else "")
        assert all(record["parent"]["msg_id"] == cell for record in records if record["kind"] == "text")
        # whoever comes later hears of it too
        sandbox.stream.close()
        sandbox.stream = sandbox.connect()
        sandbox.events.clear()
        sandbox.greet(TOKEN)
        assert sandbox.exit_event()[0]["event"] == "exit"
        sandbox.process.terminate()
        assert sandbox.process.wait(5) == (code if code is not None else 128 + (signum or 0))


@pytest.mark.parametrize("end", ["os.kill(os.getppid(), 15); time.sleep(60)", "time.sleep(60)"])
def test_a_supervisor_that_is_stopped_tells_what_the_kernel_had_not_sent(short_directory: Path, end: str) -> None:
    with LocalSandbox(short_directory) as sandbox:
        sandbox.open()
        cell = sandbox.start_cell(f"import os, time\nos.write(1, b'raw ')\nprint('pre', end='')\n{end}")
        received: dict[str, str] = {}
        if end.startswith("time"):
            message = sandbox.receive("iopub", lambda message: message["msg_type"] == "stream")
            received[message["header"]["msg_id"]] = message["content"]["text"]
            sandbox.process.terminate()
        event, records = sandbox.exit_event()
        assert (event["code"], event["signal"], event["stopped"]) == (None, 9, True), "this is how the kernel ended"
        while sandbox.sockets["iopub"].poll(200):
            _, message = sandbox.session.recv(sandbox.sockets["iopub"], 0)
            if message is not None and message["msg_type"] == "stream":
                received[message["header"]["msg_id"]] = message["content"]["text"]
        assert "".join(received.values()) + unseen(records, received) == "raw pre"
        assert all(record["parent"]["msg_id"] == cell for record in records if record["kind"] == "text")
        assert sandbox.process.wait(5) == 143, "and this is why"
        assert not Path(f"/proc/{sandbox.hello['pid']}").exists()


def test_a_stop_does_not_change_how_a_kernel_had_ended(short_directory: Path) -> None:
    with LocalSandbox(short_directory, kernel=["/bin/sh", "-c", "exit 7"]) as sandbox:
        assert sandbox.exit_event()[0]["code"] == 7
        sandbox.process.terminate()
        assert sandbox.process.wait(5) == 7
    other = short_directory / "other"
    other.mkdir()
    with LocalSandbox(other, kernel=SLEEPER) as sandbox:
        sandbox.request("signal", signum=9)
        event = sandbox.exit_event()[0]
        assert (event["signal"], event["stopped"]) == (9, False)
        sandbox.process.terminate()
        assert sandbox.process.wait(5) == 137


def test_a_host_that_does_not_read_cannot_hold_up_the_end(short_directory: Path) -> None:
    with LocalSandbox(short_directory, kernel=SLEEPER) as sandbox:
        (sandbox.work / "large").write_bytes(bytes(1 << 20))
        for number in range(4):
            sandbox.stream.sendall(pack({"op": "get", "id": number, "path": "large", "offset": 0, "size": 1 << 20}))
        time.sleep(0.2)
        began = time.monotonic()
        sandbox.process.terminate()
        assert sandbox.process.wait(5) == 143
        assert time.monotonic() - began < 1.9, "a process launcher waits 2 s"


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything; tests/integration looks from a sandbox")
def test_its_own_user_sees_into_the_kernel_but_not_into_the_supervisor(short_directory: Path) -> None:
    with LocalSandbox(short_directory) as sandbox:
        sandbox.open()
        for name in ("environ", "mem", "maps"):
            with pytest.raises(PermissionError):
                os.open(f"/proc/{sandbox.process.pid}/{name}", os.O_RDONLY)
            os.close(os.open(f"/proc/{sandbox.hello['pid']}/{name}", os.O_RDONLY))
        stats = sandbox.request("stats")[0]
        assert stats["rss"] > 0 and stats["cpu_seconds"] > 0


def test_the_kernel_goes_before_the_supervisor_when_memory_runs_out(short_directory: Path) -> None:
    with LocalSandbox(short_directory, kernel=SLEEPER) as sandbox:
        assert Path(f"/proc/{sandbox.hello['pid']}/oom_score_adj").read_text() == "500\n"


def test_a_kernel_that_cannot_start_says_why(short_directory: Path) -> None:
    with LocalSandbox(short_directory, preload=["no_such_module"]) as sandbox:
        event, records = sandbox.exit_event()
        assert event["code"] == 1
        text = "".join(record.get("text", "") for record in records)
        assert "preload module 'no_such_module' cannot be imported" in text


def test_shutdown_is_an_exit_with_code_0(short_directory: Path) -> None:
    with LocalSandbox(short_directory) as sandbox:
        sandbox.open()
        assert sandbox.ask("control", "shutdown_request", {"restart": False})["status"] == "ok"
        assert sandbox.exit_event()[0]["code"] == 0


def test_the_kernel_does_not_outlive_its_supervisor(short_directory: Path) -> None:
    with LocalSandbox(short_directory) as sandbox:
        sandbox.open()
        pid = sandbox.hello["pid"]
        sandbox.process.kill()
        sandbox.process.wait()
        deadline = time.monotonic() + 5
        while Path(f"/proc/{pid}/stat").exists() and time.monotonic() < deadline:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                break
            time.sleep(0.02)
        else:
            assert not Path(f"/proc/{pid}/stat").exists()


def test_children_of_the_kernel_die_with_it(short_directory: Path) -> None:
    with LocalSandbox(short_directory) as sandbox:
        sandbox.open()
        started = sandbox.run("import subprocess; print(subprocess.Popen(['sleep', '60']).pid)")
        sandbox.request("signal", signum=9)
        assert sandbox.exit_event()[0]["signal"] == 9
        child = Path(f"/proc/{int(started.text())}/status")
        assert not child.exists() or "zombie" in child.read_text()
