"""The log file: lines that programs read, bounded, and no harm from a disk that is full."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway import log_file
from gateway.errors import StartError
from gateway.log_file import (
    FIELDS,
    OLDER_FILES,
    JsonFormatter,
    LogFile,
    TextFormatter,
    log_files,
    log_to_file,
    read_lines,
)


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """A logger whose lines go nowhere else."""
    logger = logging.Logger("test")
    yield logger
    for handler in logger.handlers:
        handler.close()


def attached(logger: logging.Logger, path: Path, max_bytes: int = 2**20) -> LogFile:
    handler = LogFile(path, max_bytes)
    logger.addHandler(handler)
    return handler


def messages(path: Path) -> list[str]:
    return [line["message"] for file in log_files(path) for line in read_lines(file)]


def test_a_line_has_the_fields_that_its_caller_added(logger: logging.Logger, tmp_path: Path) -> None:
    handler = attached(logger, tmp_path / "log")
    logger.info("sandbox %s ended", "5a", extra={FIELDS: {"event": "exit", "sandbox": "5a", "message": "not this"}})
    try:
        raise ValueError("the reason")
    except ValueError:
        logger.exception("it failed")
    handler.close()
    first, second = read_lines(tmp_path / "log")
    assert (first["message"], first["event"], first["sandbox"]) == ("sandbox 5a ended", "exit", "5a")
    assert (first["level"], first["pid"]) == ("INFO", os.getpid()) and first["time"].endswith("+00:00")
    assert "ValueError: the reason" in second["traceback"]
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_what_cells_print_cannot_break_a_line(logger: logging.Logger, tmp_path: Path) -> None:
    handler = attached(logger, tmp_path / "log")
    text = "one\ntwo \x1b[2J \ud800 \x00"
    logger.info("%s", text)
    logger.info("x" * 2**20)
    handler.close()
    first, second = read_lines(tmp_path / "log")
    assert first["message"] == text
    assert len(second["message"]) < 20_000 and "more characters" in second["message"]


def test_it_is_bounded_and_the_youngest_lines_stay(logger: logging.Logger, tmp_path: Path) -> None:
    path, size = tmp_path / "log", 4096
    handler = attached(logger, path, size)
    for number in range(500):
        logger.info("line %d", number)
    handler.close()
    files = log_files(path)
    assert len(files) == OLDER_FILES + 1
    assert all(file.stat().st_size <= size for file in files)
    numbers = [int(message.split()[1]) for message in messages(path)]
    assert numbers == list(range(numbers[0], 500)) and numbers[0] > 0


def test_two_gateways_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    loggers = [logging.Logger("one"), logging.Logger("two")]
    handlers = [attached(logger, path, 16_384) for logger in loggers]

    def write(logger: logging.Logger) -> None:
        for number in range(150):
            logger.info("%s %d", logger.name, number)

    threads = [threading.Thread(target=write, args=(logger,)) for logger in loggers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handler in handlers:
        handler.close()
    found = messages(path)
    assert sorted(found) == sorted(f"{name} {number}" for name in ("one", "two") for number in range(150))


def test_a_file_that_was_removed_is_made_again(logger: logging.Logger, tmp_path: Path) -> None:
    path = tmp_path / "log"
    handler = attached(logger, path)
    logger.info("one")
    while not messages(path):
        time.sleep(0.01)
    path.unlink()
    logger.info("two")
    handler.close()
    assert messages(path) == ["two"]


class FullDisk:
    """os.write of a disk that takes only so many bytes more."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.refused = threading.Event()
        self._write = os.write

    def __call__(self, descriptor: int, data: bytes) -> int:
        if self.room <= 0:
            self.refused.set()
            raise OSError(28, "No space left on device")
        part = data[: self.room]
        self.room -= len(part)
        return self._write(descriptor, part)


def test_a_full_disk_is_told_once_and_loses_only_lines(
    logger: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    handler = attached(logger, path)
    disk = FullDisk(200)
    monkeypatch.setattr(log_file.os, "write", disk)
    for number in range(10):
        logger.info("line %d", number)
    assert disk.refused.wait(5)
    while handler.lost < 9:
        time.sleep(0.01)
    disk.room = 2**20
    logger.info("room again")
    handler.close()
    assert messages(path) == ["line 0", "9 lines of the log could not be written", "room again"]
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_a_disk_that_stands_still_holds_up_nobody(
    logger: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = attached(logger, tmp_path / "log")
    goes_on = threading.Event()
    write = os.write

    def stuck(descriptor: int, data: bytes) -> int:
        assert goes_on.wait(10)
        return write(descriptor, data)

    monkeypatch.setattr(log_file.os, "write", stuck)
    for number in range(log_file._MAX_WAITING + 100):
        logger.info("line %d", number)
    assert handler.lost >= 99
    goes_on.set()
    handler.close()


def test_the_context_takes_its_handler_along(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log"
    before = list(logging.getLogger().handlers)
    with log_to_file(path, 2**20):
        logging.getLogger("some").warning("inside")
    logging.getLogger("some").warning("outside")
    assert messages(path) == ["inside"]
    assert logging.getLogger().handlers == before
    assert path.parent.stat().st_mode & 0o777 == 0o700
    with log_to_file(tmp_path / "none", 0):
        pass
    assert not (tmp_path / "none").exists()


def test_a_path_that_cannot_be_opened_is_one_sentence() -> None:
    with (
        pytest.raises(StartError, match="/proc/nowhere/log cannot be written"),
        log_to_file(Path("/proc/nowhere/log"), 1),
    ):
        pass


def test_half_a_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log"
    record = logging.LogRecord("name", logging.INFO, "", 0, "whole", None, None)
    whole = JsonFormatter().format(record)
    path.write_text(f"{whole[:20]}\n{whole}\n[1]\n{json.dumps({'message': 1})}\n")
    assert messages(path) == ["whole"]


def test_what_a_sandbox_said_stays_on_its_line_of_the_text_log() -> None:
    words = "\x1b[2J\n2026-01-01 INFO forged: all is well"
    said = logging.LogRecord("a", logging.WARNING, "", 0, "it said: %s", (words,), None)
    (line,) = TextFormatter().format(said).splitlines()
    assert "\x1b" not in line and "WARNING a: it said:  [2J 2026-01-01 INFO forged" in line
