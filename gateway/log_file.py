"""The log file: JSON lines, bounded and rotating, written by `samovar serve` and read by `samovar logs`."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import queue
import sys
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gateway.cli.terminal import one_line
from gateway.errors import ExitCode, StartError

LOG_FILE_NAME = "samovar.log"
#: older files beside the current one: `samovar.log.1` is the youngest
OLDER_FILES = 4
#: The attribute of a log record that holds more fields for its line: `log.info(…, extra={FIELDS: {…}})`.
FIELDS = "fields"

_MAX_TEXT = 16 * 1024
_MAX_TRACEBACK = 64 * 1024
_MAX_WAITING = 10_000
_CLOSE_SECONDS = 2.0
_FULL = (errno.ENOSPC, errno.EDQUOT)


class JsonFormatter(logging.Formatter):
    """A log record as one line of JSON: time, level, logger, pid, message, and the fields that its caller added."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its line break."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "pid": record.process,
            "message": _cut(record.getMessage(), _MAX_TEXT),
        }
        fields = getattr(record, FIELDS, None)
        if isinstance(fields, Mapping):
            line |= {name: value for name, value in fields.items() if name not in line}
        if record.exc_info:
            line["traceback"] = _cut(self.formatException(record.exc_info), _MAX_TRACEBACK)
        # A lone surrogate (a file's name) stays readable as an escape, which utf-8 itself would refuse.
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """A log record for a person. What a sandbox said in it cannot move their cursor, nor look like a line of ours."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line, without its traceback."""
        record.message = one_line(record.message)
        return super().formatMessage(record)


class LogFile(logging.Handler):
    """Writes JSON lines to a file from a thread of its own: a slow or full disk holds up nobody and breaks nothing.

    What cannot be written is counted and told once the disk takes lines again. Several gateways may write one file.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        """`max_bytes`: where a new file is begun. Raises OSError where the file cannot be opened.

        A full disk is no reason: the file is opened once there is room.
        """
        super().__init__()
        self.path = path
        #: lines that could not be written, all in all
        self.lost = 0
        self._max_bytes = max_bytes
        self._untold = 0
        self._guard = threading.Lock()
        self._half = False
        self._broken = False
        self._closing = False
        self._lines: queue.Queue[bytes | None] = queue.Queue(_MAX_WAITING)
        self.setFormatter(JsonFormatter())
        self._file: int | None = None
        try:
            self._file = _open(path)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self._tell(error)
        self._thread = threading.Thread(target=self._run, name="log file", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Put the record's line into the thread's queue; where that is full the line is lost and counted."""
        try:
            line = self.format(record).encode() + b"\n"
        except Exception:
            self.handleError(record)
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._lose()

    def close(self) -> None:
        """Write what waits (bounded) and close the file. May be called again."""
        if not self._closing:
            self._closing = True
            with contextlib.suppress(queue.Full):
                self._lines.put(None, timeout=_CLOSE_SECONDS)
            self._thread.join(_CLOSE_SECONDS)
        super().close()

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._write(line)
            except OSError as error:
                self._lose()
                self._tell(error)
        if self._file is not None:
            os.close(self._file)

    def _write(self, line: bytes) -> None:
        file = self._current_file()
        if os.fstat(file).st_size + len(line) > self._max_bytes:
            self._rotate(file)
            file = self._reopened()
        with self._guard:
            untold = self._untold
        if untold:
            self._write_whole(file, self._loss(untold))
            with self._guard:
                self._untold -= untold
        self._write_whole(file, line)
        self._broken = False

    def _write_whole(self, file: int, line: bytes) -> None:
        """Write one line. Raises OSError where only a part of it went in; the next line then begins anew."""
        data = b"\n" + line if self._half else line
        written = os.write(file, data)
        self._half = written < len(data)
        if self._half:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _current_file(self) -> int:
        """Another gateway may have begun a new file, and a person may have removed ours."""
        if self._file is not None and self._is_current(self._file):
            return self._file
        return self._reopened()

    def _reopened(self) -> int:
        file = _open(self.path)
        if self._file is not None:
            os.close(self._file)
        self._file, self._half = file, False
        return file

    def _rotate(self, file: int) -> None:
        """Make the file the youngest of the older ones; the oldest one goes."""
        # Of several gateways that find it full at once, one does it.
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            if self._is_current(file):
                for number in range(OLDER_FILES, 0, -1):
                    with contextlib.suppress(FileNotFoundError):
                        os.replace(_older(self.path, number - 1), _older(self.path, number))
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)

    def _is_current(self, file: int) -> bool:
        """Whether the path still leads to this file: whoever has just renamed it makes the next one in a moment."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(file))
        except FileNotFoundError:
            return False

    def _loss(self, count: int) -> bytes:
        text = f"{count} lines of the log could not be written"
        record = logging.LogRecord(__name__, logging.WARNING, "", 0, text, None, None)
        return self.format(record).encode() + b"\n"

    def _lose(self) -> None:
        with self._guard:
            self.lost += 1
            self._untold += 1

    def _tell(self, error: OSError) -> None:
        """Say once that the file cannot be written. Not through the log: that would come back here."""
        if not self._broken:
            self._broken = True
            with contextlib.suppress(OSError, ValueError):
                print(f"samovar: the log file {self.path} cannot be written: {error.strerror}", file=sys.stderr)


def set_up_logging(level: int | str, *, as_json: bool) -> None:
    """Log to standard error, as text for people or as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler])
    # Every request to the engine is one line there.
    logging.getLogger("urllib3").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


@contextlib.contextmanager
def log_to_file(path: Path, max_bytes: int) -> Iterator[None]:
    """Log to the file, too, as long as the context lasts; `max_bytes` 0: do not. Raises StartError."""
    if not max_bytes:
        yield
        return
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handler = LogFile(path, max_bytes)
    except OSError as error:
        raise StartError(
            f"The log file {path} cannot be written: {error.strerror}; set LOG_FILE to another one.",
            ExitCode.UNWRITABLE,
        ) from None
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def log_files(path: Path) -> list[Path]:
    """Return the files of this log that exist, the oldest first."""
    return [file for number in range(OLDER_FILES, -1, -1) if (file := _older(path, number)).is_file()]


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of one file; what is no line of the log (half of one, at a full disk) is left out."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for raw in file:
            if (line := parse(raw)) is not None:
                yield line


def parse(raw: bytes) -> dict[str, Any] | None:
    """Return one line of the log, or None where it is none."""
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("message"), str) else None


def _older(path: Path, number: int) -> Path:
    return path if number == 0 else path.with_name(f"{path.name}.{number}")


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else f"{text[:size]}… ({len(text) - size} more characters)"
