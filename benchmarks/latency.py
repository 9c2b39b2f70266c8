"""Latency of one user: a live session, the claim, new sessions, each interleaved with the yardstick."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jupyter_client.manager import KernelManager
from tqdm import tqdm

from benchmarks.bare import CODE, BareClient
from benchmarks.rest import RestClient
from benchmarks.stage import Stage, settle
from tests.gateway_process import GatewayProcess

Samples = dict[str, list[float]]
WARM_UP = 30
POOL_SIZE = 3
_POOL_MAX = 8


def measure(stage: Stage, rounds: int, sessions: int) -> Samples:
    """`rounds` in a live session, `sessions` new ones from a full pool and twice as many while it refills."""
    with stage.gateway(POOL_SIZE, _POOL_MAX) as (gateway, rest):
        with claimed_kernel(gateway, stage.directory) as info, BareClient(info) as sandbox:
            sandbox.wait_until_ready()
            rest.wait_for_warm(POOL_SIZE)
            samples = measure_live(rest, stage.stock, sandbox, rounds)
        return samples | measure_new(rest, stage.stock, sessions)


def measure_live(rest: RestClient, stock: BareClient, sandbox: BareClient, rounds: int) -> Samples:
    """A live session over REST, and a sandbox's kernel without gateway, interleaved with the yardstick."""
    samples: Samples = defaultdict(list)
    session = rest.execute()[1]["session_id"]
    for round_number in tqdm(range(WARM_UP + rounds), desc="live session", disable=None):
        bare, ours, (live, _) = stock.execute(CODE), sandbox.execute(CODE), rest.execute(session)
        if round_number >= WARM_UP:
            samples["bare"].append(bare)
            samples["sandbox"].append(ours)
            samples["live"].append(live)
            samples["gateway"].append(live - ours)
    rest.end(session)
    return samples


def measure_new(rest: RestClient, stock: BareClient, rounds: int) -> Samples:
    """New sessions: one that finds a full pool, then two at once while the pool refills what was taken."""
    samples: Samples = defaultdict(list)
    for _ in tqdm(range(rounds), desc="new sessions", disable=None):
        rest.wait_for_warm(POOL_SIZE)
        settle()
        samples["bare beside first"].append(stock.execute(CODE))
        elapsed, answer = _new_session(rest)
        samples["first"].append(elapsed)
        # Where its time goes, as the gateway saw it: only kept among the raw samples.
        for stage, spent in answer["timings"].items():
            samples[f"first: {stage}"].append(spent)
        for _ in range(POOL_SIZE - 1):
            bare = stock.execute(CODE)
            elapsed, answer = _new_session(rest)
            for case, spent in (("claim", answer["timings"]["claim_ms"]), ("first_refilling", elapsed)):
                samples[f"bare beside {case}"].append(bare)
                samples[case].append(spent)
    return samples


def _new_session(rest: RestClient) -> tuple[float, dict[str, Any]]:
    elapsed, answer = rest.first_cell()
    rest.end(answer["session_id"])
    return elapsed, answer


@contextlib.contextmanager
def claimed_kernel(gateway: GatewayProcess, directory: Path) -> Iterator[dict[str, Any]]:
    """A sandbox claimed through the provisioner; yields its connection information."""
    environment = gateway.environment
    os.environ.update({name: environment[name] for name in ("SAMOVAR_RUNTIME_DIR", "DOCKER_BASE_URL")})
    work = directory / "work"
    work.mkdir(exist_ok=True)
    manager = KernelManager(kernel_name="sandbox")
    manager.start_kernel(cwd=str(work))
    try:
        yield dict(manager.get_connection_info())
    finally:
        manager.shutdown_kernel(now=True)
