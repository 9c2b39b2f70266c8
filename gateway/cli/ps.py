"""`samovar ps`: the sandboxes of this user's runtime directory and of the engine, with or without a living gateway."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from gateway.cli.configuration import add_option, configured
from gateway.cli.engine import engine_client
from gateway.cli.terminal import duration, mebibytes, table
from gateway.errors import ExitCode, StartError
from kernelprovisioner.inventory import FoundSandbox, Inventory, take_inventory
from kernelprovisioner.runtime import default_root
from kernelprovisioner.usage import Usage, measure

_REFRESH_SECONDS = 2.0
_USAGE_SECONDS = 5.0
_HEADING = ("SANDBOX", "IMAGE", "STATE", "AGE", "FOR", "SESSION", "MEMORY", "CPU", "KEPT BY")
_ORDER = {"claimed": 0, "warm": 1, "starting": 2, "ended": 3}
_CLEAR = "\x1b[H\x1b[2J"


def main(argv: Sequence[str]) -> int:
    """List the sandboxes once, or again and again; return the exit code."""
    parser = argparse.ArgumentParser(prog="samovar ps", description=__doc__)
    parser.add_argument(
        "--watch", action="store_true", help="refresh every 2 s and show CPU in percent; Ctrl-C ends it"
    )
    parser.add_argument("--json", action="store_true", help="for programs; with --watch one line each time")
    add_option(parser)
    arguments = parser.parse_args(argv)
    try:
        app = configured(arguments)
    except StartError as error:
        print(f"samovar ps: {error}", file=sys.stderr)
        return int(error.exit_code)
    root = app.runtime_directory or default_root(os.environ, os.geteuid())
    before: dict[str, tuple[float, Usage]] = {}
    try:
        while True:
            with engine_client(app) as (client, problem):
                found = take_inventory(root, client)
                asked = [sandbox.runtime_id for sandbox in found.sandboxes if sandbox.runtime_id is not None]
                usages = measure(client, asked, _USAGE_SECONDS)
            needs_engine = _needs_engine(app.launcher, found)
            if problem is not None and needs_engine:
                found.problems.insert(0, problem)
            now = time.monotonic()
            percents = cpu_percents(before, usages, now)
            _show(found, usages, percents if arguments.watch else None, arguments)
            if not arguments.watch:
                return int(ExitCode.NO_ENGINE) if needs_engine and not found.engine_lists else 0
            before = {runtime_id: (now, usage) for runtime_id, usage in usages.items()}
            time.sleep(_REFRESH_SECONDS)
    except KeyboardInterrupt:
        return 0


def cpu_percents(
    before: Mapping[str, tuple[float, Usage]], usages: Mapping[str, Usage], now: float
) -> dict[str, float]:
    """Return each sandbox's CPU in percent of one core since it was measured before (monotonic seconds)."""
    percents = {}
    for runtime_id, usage in usages.items():
        then, earlier = before.get(runtime_id, (now, usage))
        if now > then and usage.cpu_seconds is not None and earlier.cpu_seconds is not None:
            percents[runtime_id] = max(0.0, 100 * (usage.cpu_seconds - earlier.cpu_seconds) / (now - then))
    return percents


def rows(
    found: Inventory, usages: Mapping[str, Usage], percents: Mapping[str, float] | None, now: float
) -> list[tuple[str, ...]]:
    """Return the table, heading first; `percents` None: CPU as seconds so far. `now` in seconds since the epoch."""
    lines: list[tuple[str, ...]] = [_HEADING]
    for sandbox in _sorted(found):
        usage = usages.get(sandbox.runtime_id or "", Usage())
        if percents is None:
            cpu = "-" if usage.cpu_seconds is None else f"{usage.cpu_seconds:.1f}s"
        else:
            percent = percents.get(sandbox.runtime_id or "")
            cpu = "-" if percent is None else f"{percent:.0f}%"
        age = None if sandbox.created_at is None else now - sandbox.created_at
        lines.append(
            (
                sandbox.sandbox_id,
                sandbox.image or "-",
                sandbox.state,
                duration(age),
                sandbox.held_for or "-",
                sandbox.session or "-",
                mebibytes(usage.memory),
                cpu,
                str(sandbox.owner),
            )
        )
    return lines


def as_dict(sandbox: FoundSandbox, usage: Usage, percent: float | None) -> dict[str, Any]:
    """Return one sandbox for programs. Its record's keys are nobody's business and stay out."""
    created = sandbox.created_at
    return {
        "sandbox_id": sandbox.sandbox_id,
        "image": sandbox.image,
        "state": sandbox.state,
        "created_at": None if created is None else datetime.fromtimestamp(created, UTC).isoformat(),
        "owner": sandbox.held_for or None,
        "kernel_id": sandbox.session or None,
        "runtime_id": sandbox.runtime_id,
        "memory_bytes": usage.memory,
        "memory_limit_bytes": usage.memory_limit,
        "cpu_seconds": usage.cpu_seconds,
        "cpu_percent": percent,
        "kept_by": {
            "directory": str(sandbox.owner.path),
            "state": sandbox.owner.life.value,
            "gateway": sandbox.owner.is_gateway,
            "pid": sandbox.owner.pid,
            "program": sandbox.owner.program,
        },
    }


def _show(
    found: Inventory, usages: Mapping[str, Usage], percents: Mapping[str, float] | None, arguments: argparse.Namespace
) -> None:
    if arguments.json:
        listed = [
            as_dict(
                sandbox, usages.get(sandbox.runtime_id or "", Usage()), (percents or {}).get(sandbox.runtime_id or "")
            )
            for sandbox in _sorted(found)
        ]
        document = {"sandboxes": listed, "problems": found.problems}
        print(json.dumps(document, indent=None if arguments.watch else 2), flush=True)
        return
    if arguments.watch and sys.stdout.isatty():
        print(_CLEAR, end="")
    if found.sandboxes:
        print(table(rows(found, usages, percents, time.time())))
    print(summary(found), flush=True)
    for problem in found.problems:
        print(f"samovar ps: {problem}", file=sys.stderr)


def summary(found: Inventory) -> str:
    """Return the last line: how many of which state, and what to do about those that nobody keeps."""
    counts = {state: sum(sandbox.state == state for sandbox in found.sandboxes) for state in _ORDER}
    said = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "no sandboxes"
    left = sum(sandbox.owner.life.value == "dead" for sandbox in found.sandboxes)
    if left:
        said += f"; {left} of owners that are gone: the next gateway takes them up or removes them; "
        said += "samovar reap removes them at once"
    return said


def _sorted(found: Inventory) -> list[FoundSandbox]:
    return sorted(
        found.sandboxes,
        key=lambda one: (str(one.owner.path), one.image or "", _ORDER.get(one.state, 9), one.created_at or 0.0),
    )


def _needs_engine(launcher: str, found: Inventory) -> bool:
    return launcher == "docker" or any((owner.kind or "").startswith("docker") for owner in found.owners)
