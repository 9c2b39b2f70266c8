"""Many executions in sessions that come and go: does the gateway stay as small as it was?

`python -m tests.chaos.soak docs/soak.svg` runs 10,000, draws what was sampled, and fails where it grows.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median

from tests import services
from tests.chaos import census
from tests.gateway_process import GatewayProcess

EXECUTIONS = 10_000
CELLS_PER_SESSION = 100
CLIENTS = 4
SAMPLES = 100
SETTINGS = {"CONTAINER_POOL_PY_MIN": "2", "CONTAINER_POOL_PY_MAX": "8"}
#: How much the second half may have more than what came before it: share of the memory, number of the others.
MEMORY_SHARE = 0.08
COUNT_MORE = 6


@dataclass(frozen=True)
class Sample:
    """The gateway after so many executions. Memory in MB, resident."""

    executions: int
    memory: float
    descriptors: int
    threads: int
    containers: int


class Soak:
    """Runs cells from several clients at once, and samples in between."""

    def __init__(self, gateway: GatewayProcess, executions: int, report: Callable[[str], None]) -> None:
        self.samples: list[Sample] = []
        self.sessions = 0
        self._gateway = gateway
        self._wanted = executions
        self._report = report
        self._done = 0
        self._lock = threading.Lock()

    def run(self) -> None:
        """Raises AssertionError where an answer is not right."""
        began = time.monotonic()
        with ThreadPoolExecutor(CLIENTS) as clients:
            for client in [clients.submit(self._client) for _ in range(CLIENTS)]:
                client.result()
        self._report(f"{self._done} executions in {self.sessions} sessions, {time.monotonic() - began:.0f} s")

    def _client(self) -> None:
        while self._session():
            pass

    def _session(self) -> bool:
        """One session from its first to its last cell; return whether more are wanted."""
        session = None
        for count in range(1, CELLS_PER_SESSION + 1):
            if not self._take_turn():
                break
            answer = self._gateway.exec("n = globals().get('n', 0) + 1\nprint(n)", session)
            assert answer["stdout"] == f"{count}\n", answer
            session = answer["session_id"]
        if session is not None:
            assert self._gateway.call("DELETE", f"/api/v1/sessions/{session}").status == 204
        with self._lock:
            self.sessions += session is not None
            return self._done < self._wanted

    def _take_turn(self) -> bool:
        with self._lock:
            if self._done >= self._wanted:
                return False
            if self._done % max(1, self._wanted // SAMPLES) == 0:
                self._sample()
            self._done += 1
            return True

    def _sample(self) -> None:
        gateway = self._gateway
        assert gateway.process is not None
        found = census.usage(gateway.process.pid)
        there = census.containers(str(gateway.docker_url), gateway.runtime)
        sample = Sample(self._done, found.memory / 2**20, found.descriptors, found.threads, len(there))
        self.samples.append(sample)
        if len(self.samples) % 10 == 1:
            self._report(str(sample))


def growth(samples: Sequence[Sample]) -> list[str]:
    """Compare the last half with the quarter before it (the first one warms up); one line for each that grew."""
    quarter = len(samples) // 4
    before, after = samples[quarter : 2 * quarter], samples[2 * quarter :]
    lines = []
    usual, now = median(sample.memory for sample in before), median(sample.memory for sample in after[quarter:])
    if now > usual * (1 + MEMORY_SHARE):
        lines.append(f"memory grew from {usual:.1f} to {now:.1f} MB")
    for name in ("descriptors", "threads", "containers"):
        usual, now = (max(getattr(sample, name) for sample in part) for part in (before, after))
        if now > usual + COUNT_MORE:
            lines.append(f"{name} grew from {usual} to {now}")
    return lines


def draw(samples: Sequence[Sample], sessions: int, path: Path) -> None:
    """Draw the samples as SVG, one panel for each thing."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "samovar"
    from matplotlib import pyplot

    names = [field.name for field in fields(Sample)][1:]
    labels = {"memory": "memory (MB resident)", "containers": "containers in the engine"}
    figure, panels = pyplot.subplots(len(names), 1, sharex=True, figsize=(8, 7))
    for name, panel in zip(names, panels, strict=True):
        values = [getattr(sample, name) for sample in samples]
        panel.plot([sample.executions for sample in samples], values, lw=1.2)
        panel.set_ylabel(labels.get(name, name))
        panel.set_ylim(0, 1.15 * max(values))
        panel.yaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    panels[0].set_title(f"The gateway over {EXECUTIONS:,} executions in {sessions} sessions")
    panels[-1].set_xlabel("executions")
    figure.align_ylabels()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main(path: Path) -> int:
    """Run the whole soak in a gateway of its own and draw it; return the exit code."""
    with services.docker_engine() as url, tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as directory:
        gateway = GatewayProcess(Path(directory), url, SETTINGS)
        gateway.start()
        try:
            soak = Soak(gateway, EXECUTIONS, services.say)
            soak.run()
        finally:
            gateway.stop()
    draw(soak.samples, soak.sessions, path)
    services.say(f"drawn in {path}")
    lines = growth(soak.samples)
    for line in lines:
        services.say(line)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
