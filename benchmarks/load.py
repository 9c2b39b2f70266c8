"""Load on any server of the /exec family: `python -m benchmarks.load --url URL --key KEY`.

It speaks `POST /exec` (with `session_id` for live sessions), and ends sessions by `DELETE /api/v1/sessions/{id}` where
the server has that call. Every answer is checked; what went wrong is counted by kind. A server that asks to wait
(`Retry-After`) is waited for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tqdm import tqdm

from benchmarks import closed_loop
from benchmarks.client import ExecClient
from benchmarks.closed_loop import LiveSession, NewClient
from benchmarks.levels import Level, errors_of, load_table, summary

CLIENTS = (1, 5, 10, 20, 50)
LEVEL_SECONDS = 6.0
#: Calls of a level of fresh sandboxes are at least so many, and one for each client.
FRESH_CALLS = 6
#: Between two levels, so that a server which refills its pool gets some way.
_REST_SECONDS = 3.0

Step = tuple[str, Callable[[], Level | None]]


def steps(new_client: NewClient, clients: Sequence[int], seconds: float) -> Iterator[Step]:
    """What to do, in this order: the burst, live sessions over what it opened, fresh sandboxes.

    A step returns its level, or None where it only puts things in order.
    """
    sessions = [LiveSession(number) for number in range(max(clients))]
    yield f"burst of {len(sessions)}", partial(closed_loop.burst, new_client, sessions)
    yield "sessions", partial(closed_loop.open_missing, new_client, sessions)
    for count in clients:
        yield f"live, {count} clients", partial(closed_loop.live, new_client, sessions[:count], seconds)
    yield "end of the sessions", partial(closed_loop.end_sessions, new_client, sessions)
    # Most clients first: they use up what the server has ready, so that the rest tells what it can keep up.
    for count in sorted(clients, reverse=True):
        calls = max(FRESH_CALLS, count)
        yield f"fresh, {count} clients", partial(closed_loop.fresh, new_client, count, calls)


def check(client: ExecClient) -> str | None:
    """Why this server cannot be measured, or None: one cell is run and its session ended."""
    reply = client.run("print(6 * 7)", "42")
    if reply.failure is None:
        client.end_session(str(reply.body.get("session_id")))
        return None
    hints = {
        "HTTP 401": "the key is not valid there",
        "HTTP 403": "the key is not valid there",
        "HTTP 404": "there is no /exec; does the URL lack a base path, such as /v1?",
    }
    hint = hints.get(reply.failure, "")
    return f"a first cell failed with {reply.failure!r}{f': {hint}' if hint else ''}"


def _numbers(text: str) -> list[int]:
    numbers = [int(one) for one in text.split(",")]
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError("numbers from 1, such as 1,5,10")
    return numbers


def _shown(work: Iterable[Step]) -> Iterator[Step]:
    progress = tqdm(work, disable=None, unit="step")
    for name, step in progress:
        progress.set_description(name)
        yield name, step


def main() -> int:
    """Measure, print the table, write the raw samples where asked to; return 1 where a call failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True, help="of the server, with its base path: http://127.0.0.1:8000")
    parser.add_argument("--key", required=True, help="API key, sent as x-api-key")
    parser.add_argument(
        "--clients", type=_numbers, default=list(CLIENTS), help="clients at once (default 1,5,10,20,50)"
    )
    parser.add_argument("--seconds", type=float, default=LEVEL_SECONDS, help="of each level of live sessions")
    parser.add_argument("--json", type=Path, help="file for the summary and all raw samples")
    arguments = parser.parse_args()
    new_client = partial(ExecClient, arguments.url, arguments.key)
    try:
        with contextlib.closing(new_client()) as client:
            problem = check(client)
    except ValueError as error:
        parser.error(str(error))
    if problem is not None:
        print(f"{arguments.url} cannot be measured: {problem}.", file=sys.stderr)
        return 69
    levels = []
    for _, step in _shown(steps(new_client, arguments.clients, arguments.seconds)):
        time.sleep(_REST_SECONDS)
        level = step()
        if level is not None:
            levels.append(level)
    rows = [asdict(summary(level)) for level in levels]
    if arguments.json is not None:
        samples = {level.name: level.samples for level in levels}
        document = {"url": arguments.url, "load": rows, "samples": samples}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(load_table(rows))
    return 1 if errors_of(levels) else 0


if __name__ == "__main__":
    sys.exit(main())
