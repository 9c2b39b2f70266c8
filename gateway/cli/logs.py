"""`samovar logs`: the gateway's log, with or without a living gateway."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import msgspec

from gateway.cli.configuration import add_option, configured
from gateway.cli.terminal import one_line
from gateway.errors import ExitCode, StartError
from gateway.log_file import log_files, parse, read_lines

_POLL_SECONDS = 0.25
#: Fields of an exit that its sentence does not tell.
_EXIT_FIELDS = ("cause", "exit_code", "signal", "evidence", "cell", "session")

Line = Mapping[str, Any]


def main(argv: Sequence[str]) -> int:
    """Print the log's lines that were asked for; return the exit code."""
    parser = argparse.ArgumentParser(prog="samovar logs", description=__doc__)
    parser.add_argument("--follow", "-f", action="store_true", help="go on with the lines that come; Ctrl-C ends it")
    parser.add_argument(
        "--sandbox", metavar="ID", help="only what concerns this sandbox (the id's beginning is enough)"
    )
    parser.add_argument("--session", metavar="ID", help="only what concerns this session (its kernel id)")
    parser.add_argument("--exits", action="store_true", help="only the ends of sandboxes: cause and evidence")
    parser.add_argument("--json", action="store_true", help="the lines as they are in the file, for programs")
    add_option(parser)
    arguments = parser.parse_args(argv)
    try:
        path = configured(arguments).log_path
    except StartError as error:
        print(f"samovar logs: {error}", file=sys.stderr)
        return int(error.exit_code)
    wanted = selection(arguments.sandbox, arguments.session, exits=arguments.exits)
    show = _as_json if arguments.json else as_text
    try:
        files = log_files(path)
        if not files and not arguments.follow:
            print(f"samovar logs: there is no log at {path}: no gateway has written there yet.", file=sys.stderr)
            return int(ExitCode.NO_INPUT)
        lines = _followed(path, files) if arguments.follow else _all(files)
        for line in lines:
            if wanted(line):
                print(show(line), flush=arguments.follow)
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:
        # `samovar logs | head`: what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"samovar logs: {path} cannot be read: {error.strerror}.", file=sys.stderr)
        return int(ExitCode.NO_INPUT)
    return 0


def selection(sandbox: str | None, session: str | None, *, exits: bool) -> Callable[[Line], bool]:
    """Return whether a line is asked for; all that is given must fit. An id may stand in a field or in the message."""

    def wanted(line: Line) -> bool:
        if exits and line.get("event") != "exit":
            return False
        return _concerns(line, "sandbox", sandbox) and _concerns(line, "session", session)

    return wanted


def as_text(line: Line) -> str:
    """Return a line for people: local time, level, logger, message, and what an exit's sentence leaves out."""
    moment = str(line.get("time", ""))
    with suppress(ValueError):
        moment = _local(moment)
    text = f"{moment} {line.get('level', ''):7} {line.get('logger', '')}: {one_line(line['message'])}"
    if line.get("event") == "exit":
        more = {name: line[name] for name in _EXIT_FIELDS if line.get(name) not in (None, "", {})}
        text += "".join(f"\n    {name}: {_plain(value)}" for name, value in more.items())
    if isinstance(line.get("traceback"), str):
        text += "".join(f"\n    {one_line(row)}" for row in line["traceback"].splitlines())
    return text


def _concerns(line: Line, field: str, wanted: str | None) -> bool:
    if wanted is None:
        return True
    if str(line.get(field) or "").startswith(wanted):
        return True
    return re.search(rf"(?<![\w-]){re.escape(wanted)}", line["message"]) is not None


def _as_json(line: Line) -> str:
    return msgspec.json.encode(line).decode()


def _plain(value: Any) -> str:
    return one_line(value if isinstance(value, str) else _as_json(value))


def _local(moment: str) -> str:
    return datetime.fromisoformat(moment).astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def _all(files: Sequence[Path]) -> Iterator[Line]:
    for file in files:
        yield from read_lines(file)


def _followed(path: Path, files: Sequence[Path]) -> Iterator[Line]:
    """All lines, then those that come, across the beginnings of new files. Never ends."""
    yield from _all([file for file in files if file != path])
    current: IO[bytes] | None = None
    rest = b""
    while True:
        if current is None:
            with suppress(FileNotFoundError):
                current = path.open("rb")
            rest = b""
        while current is not None and (raw := current.readline()):
            rest += raw
            if rest.endswith(b"\n"):
                if (line := parse(rest)) is not None:
                    yield line
                rest = b""
        if current is not None and _is_replaced(path, current):
            # What was written before the replacement has been read to its end only if it is looked at once more.
            with current:
                remaining = rest + current.read()
            yield from (line for raw in remaining.splitlines() if (line := parse(raw)) is not None)
            current = None
            continue
        time.sleep(_POLL_SECONDS)


def _is_replaced(path: Path, current: IO[bytes]) -> bool:
    try:
        return not os.path.samestat(path.stat(), os.fstat(current.fileno()))
    except FileNotFoundError:
        return True
