"""`samovar doctor`: looks at engine, images, directories, limits and sockets; says what is wrong and how to mend it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence

from gateway.cli.configuration import add_option, configured
from gateway.cli.engine import engine_client
from gateway.cli.terminal import one_line
from gateway.diagnosis import diagnose
from gateway.errors import StartError
from gateway.verdicts import Judgement, Verdict, counted, failure, worst
from kernelprovisioner.runtime import default_root

_COLOURS = {Verdict.OK: "32", Verdict.WARNING: "33", Verdict.FAILURE: "31"}


def main(argv: Sequence[str]) -> int:
    """Print what was found; return 1 where something is a failure, else 0."""
    parser = argparse.ArgumentParser(prog="samovar doctor", description=f"{__doc__} It changes nothing.")
    parser.add_argument("--json", action="store_true", help="for programs")
    add_option(parser)
    arguments = parser.parse_args(argv)
    try:
        app = configured(arguments)
        with engine_client(app) as (client, _):
            root = app.runtime_directory or default_root(os.environ, os.geteuid())
            found = diagnose(app, root, client)
    except StartError as error:
        found = [failure("configuration", str(error), "see docs/configuration.md, and samovar --help-all")]
    verdict = worst(found)
    if arguments.json:
        print(json.dumps({"verdict": verdict, "found": [dataclasses.asdict(one) for one in found]}, indent=2))
    else:
        print(as_text(found, colour=sys.stdout.isatty()))
    return 1 if verdict is Verdict.FAILURE else 0


def as_text(found: Sequence[Judgement], *, colour: bool) -> str:
    """Return one line for each judgement, below it how to mend it, and last the sum."""
    width = max((len(one.what) for one in found), default=0)
    lines = []
    for one in found:
        verdict = f"{one.verdict.value:7}"
        shown = f"\x1b[{_COLOURS[one.verdict]}m{verdict}\x1b[0m" if colour else verdict
        lines.append(f"{shown}  {one.what:{width}}  {one_line(one.text)}")
        if one.mend:
            lines.append(f"{'':7}  {'':{width}}  → {one_line(one.mend)}")
    counts = {verdict: sum(one.verdict is verdict for one in found) for verdict in Verdict}
    wrong = f"{counted(counts[Verdict.FAILURE], 'failure')}, {counted(counts[Verdict.WARNING], 'warning')}"
    lines.append(f"\n{wrong}, {counts[Verdict.OK]} in order.")
    return "\n".join(lines)
