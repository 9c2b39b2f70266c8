"""`make bench`: everything against a bare round trip of a stock ipykernel in the same run, on a real engine."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import crowd, idle, latency, memory, page, recovery, refill, relay, starts
from benchmarks.figures import Quantity, figure
from benchmarks.levels import Level, summary
from benchmarks.load import CLIENTS, LEVEL_SECONDS
from benchmarks.report import CASES, README, Measured, result, samples_text, table, write
from benchmarks.rest import RestClient
from benchmarks.stage import Stage
from gateway import __version__
from tests.services import URL_VARIABLE

SECTIONS = ("latency", "starts", "pool", "load", "idle", "recovery", "relay", "page")
#: The pool that a burst and a refill meet.
_WARM = 10
_IDLE_MEMBERS = 6
_RECOVERIES = 5


@dataclass
class Findings:
    """Raw results of all sections of a run."""

    samples: latency.Samples = field(default_factory=dict)
    levels: list[Level] = field(default_factory=list)
    quantities: list[Quantity] = field(default_factory=list)

    def measured(self, versions: dict[str, Any]) -> Measured:
        """All of it summed up."""
        samples = dict(self.samples)
        rows = [
            result(case, samples[case], samples.get(f"bare beside {case}") or samples["bare"])
            for case in CASES
            if case in samples
        ]
        load = []
        for level in self.levels:
            load.append(summary(level, median(samples[f"bare beside {level.name}"]), os.cpu_count() or 1))
            samples[level.name] = level.samples
        for quantity in self.quantities:
            samples.setdefault(quantity.case, list(quantity.samples))
        return Measured(versions, rows, load, [figure(one) for one in self.quantities], samples)


def measure(stage: Stage, arguments: argparse.Namespace, sections: set[str]) -> Findings:
    """Run the chosen sections."""
    found = Findings()
    if "latency" in sections:
        found.samples |= latency.measure(stage, arguments.rounds, arguments.sessions)
    if "starts" in sections:
        found.quantities += starts.measure(stage, arguments.starts)
    if sections & {"pool", "load"}:
        # Room for a session of each client, or for those that empty the pool, beside the warm ones.
        with stage.gateway(_WARM, _WARM + max(*CLIENTS, _WARM + 1)) as (gateway, rest):
            if "pool" in sections:
                found.quantities += memory.measure(stage, gateway)
                quantities, samples = refill.measure(stage, rest, lambda: RestClient(gateway), _WARM)
                found.quantities += quantities
                found.samples |= samples
            if "load" in sections:
                levels, samples = crowd.measure(stage, gateway, rest, list(CLIENTS), arguments.seconds)
                found.levels += levels
                found.quantities.append(crowd.start_rate(levels))
                found.samples |= samples
    if "idle" in sections:
        with stage.gateway(_IDLE_MEMBERS, _IDLE_MEMBERS) as (_, rest):
            quantities, samples = idle.measure(stage, rest, _IDLE_MEMBERS, arguments.idle, arguments.idle_rounds)
            found.quantities += quantities
            found.samples |= samples
    if "recovery" in sections:
        with stage.gateway(2, 8) as (gateway, _):
            found.quantities += recovery.measure(gateway, _RECOVERIES)
    if "relay" in sections:
        with stage.gateway(2, 8) as (gateway, _):
            quantities, samples = relay.measure(stage, gateway, arguments.rounds // 4, arguments.idle)
            found.quantities += quantities
            found.samples |= samples
    if "page" in sections:
        with stage.gateway(2, 8) as (gateway, rest):
            found.quantities += page.measure(stage, gateway, rest)
    return found


def versions(engine: str, load: float) -> dict[str, Any]:
    """What the numbers depend on."""
    packages = {name: version(name) for name in ("ipykernel", "jupyter_client", "pyzmq", "tornado")}
    return {
        "python": platform.python_version(),
        "engine": engine,
        "linux": platform.release(),
        "cpus": os.cpu_count(),
        "load_before": round(load, 2),
        **packages,
        "samovar": __version__,
    }


def main() -> int:
    """Measure, write, print the tables; return 1 where a bar was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000, help="round trips in a live session")
    parser.add_argument("--sessions", type=int, default=24, help="new sessions on a full pool")
    parser.add_argument("--starts", type=int, default=6, help="single starts of each kind, for the CPU that they take")
    parser.add_argument("--seconds", type=float, default=LEVEL_SECONDS, help="of each level of load on live sessions")
    parser.add_argument("--idle", type=float, default=30.0, help="seconds that warm sandboxes wait (600: ten minutes)")
    parser.add_argument("--idle-rounds", type=int, default=1, help="rounds of six sandboxes of each idle time")
    parser.add_argument(
        "--only",
        choices=SECTIONS,
        action="append",
        help="measure this alone (may be repeated): nothing is written but what --json names",
    )
    parser.add_argument("--json", type=Path, help="another file for the results and all raw samples")
    arguments = parser.parse_args()
    url = os.environ.get(URL_VARIABLE)
    if not url:
        print(f"No container engine: set {URL_VARIABLE}, or use `make bench`.", file=sys.stderr)
        return 69
    # Who ends this ends its gateway and its containers, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Who else used the machine: the numbers of a busy one are worse.
    load = os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp")))
        stage = Stage(url, directory)
        stack.callback(stage.stop)
        stage.start()
        found = measure(stage, arguments, set(arguments.only or SECTIONS))
        measured = found.measured(versions(stage.stock_kernel.engine_version, load))
    print(table(measured.document))
    if arguments.json is not None:
        document = measured.document | {"samples": json.loads(samples_text(measured.samples))}
        arguments.json.write_text(json.dumps(document) + "\n", encoding="utf-8")
    if not arguments.only:
        write(measured)
        print(f"\nWritten to {README.name} and benchmarks/results.json.")
    for line in measured.missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if measured.missed else 0


if __name__ == "__main__":
    sys.exit(main())
