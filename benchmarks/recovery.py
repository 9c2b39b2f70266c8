"""Recovery: from `kill -9` of the gateway to the answer that an old session gives, with its variables."""

from __future__ import annotations

import time

from tqdm import tqdm

from benchmarks.client import ExecClient
from benchmarks.figures import Quantity
from tests.gateway_process import GatewayProcess

_DEADLINE = 60.0
_PAUSE = 0.01
_MARKER = "4711"


def measure(gateway: GatewayProcess, rounds: int) -> list[Quantity]:
    """Seconds from the kill; the next gateway is started at once, as a service manager would.

    Raises RuntimeError where the session is not found again.
    """
    listening: list[float] = []
    answered: list[float] = []
    client = ExecClient(gateway.url, gateway.key)
    first = client.run(f"marker = {_MARKER}\nprint(marker)", _MARKER)
    if first.failure is not None:
        raise RuntimeError(f"no session to come back to: {first.failure}")
    session = str(first.body["session_id"])
    for _ in tqdm(range(rounds), desc="recovery", disable=None):
        assert gateway.process is not None
        started = time.monotonic()
        gateway.process.kill()
        gateway.process.wait()
        gateway.start()
        listening.append(time.monotonic() - started)
        _wait_for_answer(client, session)
        answered.append(time.monotonic() - started)
    client.end_session(session)
    client.close()
    return [
        Quantity("recovery", "`kill -9` of the gateway to an old session's answer, with its variables", "s", answered),
        Quantity("recovery listening", "– of which until the next gateway listens", "s", listening, "of all", answered),
    ]


def _wait_for_answer(client: ExecClient, session: str) -> None:
    deadline = time.monotonic() + _DEADLINE
    while True:
        reply = client.run("print(marker)", _MARKER, session_id=session)
        if reply.failure is None:
            return
        if not reply.failure.startswith(("HTTP 503", "connection")):
            raise RuntimeError(f"the session did not come back: {reply.failure} {reply.body.get('stderr', '')}".strip())
        if time.monotonic() > deadline:
            raise RuntimeError(f"the session did not come back within {_DEADLINE:g} s: {reply.failure}")
        time.sleep(_PAUSE)
