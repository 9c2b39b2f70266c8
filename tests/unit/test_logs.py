"""`samovar logs`: what is selected, how it reads, and that following survives the beginning of a new file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gateway.cli.logs import as_text, main, selection

EXIT = {
    "time": "2026-03-02T09:00:00.000+00:00",
    "level": "INFO",
    "logger": "pool",
    "message": "sandbox 0123456789abcdef of python ended: The kernel ran out of memory (limit 512 MiB) and was killed.",
    "event": "exit",
    "sandbox": "0123456789abcdef",
    "session": "11111111-2222-3333-4444-555555555555",
    "cause": "out_of_memory",
    "signal": 9,
    "exit_code": None,
    "evidence": {"limit_mb": 512, "peak_mb": 511},
}
PLAIN = {"time": "2026-03-02T09:00:01.000+00:00", "level": "INFO", "logger": "gateway", "message": "a word"}
MENTION = {**PLAIN, "message": "could not remove sandbox 0123456789abcdef yet"}


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The log's path in the configuration."""
    monkeypatch.setenv("LOG_FILE", str(tmp_path / "log"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "log"


def write(path: Path, *lines: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


@pytest.mark.parametrize(
    ("sandbox", "session", "exits", "expected"),
    [
        (None, None, False, [EXIT, PLAIN, MENTION]),
        (None, None, True, [EXIT]),
        ("0123", None, False, [EXIT, MENTION]),
        ("0123456789abcdef", None, True, [EXIT]),
        ("4567", None, False, []),
        (None, "11111111-2222-3333-4444-555555555555", False, [EXIT]),
        ("ffff", "11111111", False, []),
    ],
)
def test_what_is_selected(
    sandbox: str | None, session: str | None, exits: bool, expected: list[dict[str, Any]]
) -> None:
    wanted = selection(sandbox, session, exits=exits)
    assert [line for line in (EXIT, PLAIN, MENTION) if wanted(line)] == expected


def test_an_exit_is_told_with_its_evidence_and_without_tricks_on_the_terminal() -> None:
    said = as_text({**EXIT, "message": "it ended: \x1b[2J\nforged", "traceback": "one\n\x1b]0;two"})
    assert "\x1b" not in said
    assert "it ended:  [2J forged" in said
    assert "    cause: out_of_memory" in said and '    evidence: {"limit_mb":512,"peak_mb":511}' in said
    assert "exit_code" not in said


def test_all_files_are_read_the_oldest_first(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(log.with_name("log.2"), {**PLAIN, "message": "first"})
    write(log.with_name("log.1"), {**PLAIN, "message": "second"})
    write(log, EXIT)
    assert main([]) == 0
    said = capsys.readouterr().out
    assert said.index("first") < said.index("second") < said.index("out of memory")
    assert main(["--exits", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == EXIT


def test_no_log_is_said(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 66
    assert f"there is no log at {log}" in capsys.readouterr().err


def test_following_goes_on_in_the_next_file(log: Path) -> None:
    write(log, {**PLAIN, "message": "before"})
    command = [sys.executable, "-m", "gateway.cli", "logs", "--follow", "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert json.loads(process.stdout.readline())["message"] == "before"
            with log.open("a") as file:
                line = json.dumps({**PLAIN, "message": "in two halves"}) + "\n"
                file.write(line[:30])
                file.flush()
                time.sleep(0.5)
                file.write(line[30:])
            assert json.loads(process.stdout.readline())["message"] == "in two halves"
            write(log, {**PLAIN, "message": "last of the old"})
            log.rename(log.with_name("log.1"))
            write(log, {**PLAIN, "message": "first of the new"})
            assert json.loads(process.stdout.readline())["message"] == "last of the old"
            assert json.loads(process.stdout.readline())["message"] == "first of the new"
        finally:
            process.terminate()
