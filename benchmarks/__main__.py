"""`make bench`: everything against a bare round trip of a stock ipykernel, interleaved, on a real engine."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import platform
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jupyter_client.manager import KernelManager
from tqdm import tqdm

from benchmarks.bare import BareClient, StockKernel
from benchmarks.report import CASES, README, Result, result, table, write
from kernelprovisioner.images import find_image
from tests.gateway_process import GatewayProcess
from tests.services import URL_VARIABLE

CODE = "print(1)"
WARM_UP = 30
POOL_SIZE = 3
_REFILL_TIMEOUT = 120.0

Samples = dict[str, list[float]]


class RestClient:
    """One kept-alive connection to the gateway, as a service in front of it would hold."""

    def __init__(self, gateway: GatewayProcess) -> None:
        self._key = gateway.key
        self._connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=60)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the JSON answer. Raises RuntimeError for any status but 2xx."""
        headers = {"x-api-key": self._key, "Content-Type": "application/json"}
        self._connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        response = self._connection.getresponse()
        data = response.read()
        if response.status >= 300:
            raise RuntimeError(f"{method} {path}: {response.status} {data.decode(errors='replace')}")
        answer: dict[str, Any] = json.loads(data) if data else {}
        return answer

    def execute(self, session: str | None = None) -> tuple[float, dict[str, Any]]:
        """Run the cell; return milliseconds and answer."""
        body = {"code": CODE, "lang": "py"} | ({"session_id": session} if session else {})
        started = time.perf_counter()
        answer = self.call("POST", "/exec", body)
        elapsed = (time.perf_counter() - started) * 1000
        if answer["stdout"] != "1\n":
            raise RuntimeError(f"a wrong answer: {answer}")
        return elapsed, answer

    def wait_for_warm(self, count: int) -> None:
        """Wait until the pool holds `count` warm sandboxes. Raises TimeoutError."""
        deadline = time.monotonic() + _REFILL_TIMEOUT
        while (pool := self.call("GET", "/metrics/pool")["pool"]["python"])["warm"] < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the pool did not refill: {pool}")
            time.sleep(0.02)


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
    rest.call("DELETE", f"/api/v1/sessions/{session}")
    return samples


def measure_new(rest: RestClient, stock: BareClient, rounds: int) -> Samples:
    """New sessions: one that finds a full pool, then two at once while the pool refills what was taken."""
    samples: Samples = defaultdict(list)
    for _ in tqdm(range(rounds), desc="new sessions", disable=None):
        rest.wait_for_warm(POOL_SIZE)
        # What has just become warm ends what it still does.
        time.sleep(0.2)
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
    elapsed, answer = rest.execute()
    if answer["source"] != "warm":
        raise RuntimeError(f"the sandbox was not a warm one: {answer['source']}")
    rest.call("DELETE", f"/api/v1/sessions/{answer['session_id']}")
    return elapsed, answer


@contextlib.contextmanager
def claimed_kernel(gateway: GatewayProcess, directory: Path) -> Iterator[dict[str, Any]]:
    """A sandbox claimed through the provisioner; yields its connection information."""
    environment = gateway.environment
    os.environ.update({name: environment[name] for name in ("SAMOVAR_RUNTIME_DIR", "DOCKER_BASE_URL")})
    work = directory / "work"
    work.mkdir()
    manager = KernelManager(kernel_name="sandbox")
    manager.start_kernel(cwd=str(work))
    try:
        yield dict(manager.get_connection_info())
    finally:
        manager.shutdown_kernel(now=True)


def versions(engine: str, load: float) -> dict[str, Any]:
    """What the numbers depend on."""
    packages = {name: version(name) for name in ("ipykernel", "jupyter_client", "pyzmq", "tornado", "samovar")}
    return {
        "python": platform.python_version(),
        "engine": engine,
        "linux": platform.release(),
        "cpus": os.cpu_count(),
        "load_before": round(load, 2),
        **packages,
    }


def main() -> int:
    """Measure, write, print the table; return 1 where a bar was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000, help="round trips in a live session")
    parser.add_argument("--sessions", type=int, default=60, help="new sessions on a full pool")
    arguments = parser.parse_args()
    url = os.environ.get(URL_VARIABLE)
    if not url:
        print(f"No container engine: set {URL_VARIABLE}, or use `make bench`.", file=sys.stderr)
        return 69
    samples: Samples = {}
    # Who else used the machine: the numbers of a busy one are worse.
    load = os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp")))
        bounds = {"CONTAINER_POOL_PY_MIN": str(POOL_SIZE), "CONTAINER_POOL_PY_MAX": "8", "LOG_LEVEL": "WARNING"}
        gateway = GatewayProcess(directory, url, bounds)
        stock_kernel = StockKernel(url, find_image("python"), directory / "stock")
        stack.callback(stock_kernel.stop)
        stock = stack.enter_context(BareClient(stock_kernel.start()))
        stock.wait_until_ready()
        gateway.start()
        stack.callback(gateway.stop)
        rest = RestClient(gateway)
        stack.callback(rest.close)
        rest.wait_for_warm(POOL_SIZE)
        with claimed_kernel(gateway, directory) as info, BareClient(info) as sandbox:
            sandbox.wait_until_ready()
            rest.wait_for_warm(POOL_SIZE)
            samples |= measure_live(rest, stock, sandbox, arguments.rounds)
        samples |= measure_new(rest, stock, arguments.sessions)
        found = versions(stock_kernel.engine_version, load)
    results = [result(case, samples[case], samples.get(f"bare beside {case}", samples["bare"])) for case in CASES]
    write(results, samples, found)
    print(table({"versions": found, "results": [vars(row) for row in results]}))
    print(f"\nWritten to {README.name} and benchmarks/results.json.")
    return _verdict(results)


def _verdict(results: list[Result]) -> int:
    missed = [row for row in results if row.held is False]
    for row in missed:
        print(f"missed: {row.case}: p50 {row.ratio_p50:g} × (p99 {row.ratio_p99:g} ×)", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
