"""Crowd: the load of benchmarks.load on a gateway of our own, with bare round trips before and after each level."""

from __future__ import annotations

from functools import partial

from tqdm import tqdm

from benchmarks.client import ExecClient
from benchmarks.figures import Quantity
from benchmarks.latency import Samples
from benchmarks.levels import Level
from benchmarks.load import steps
from benchmarks.rest import RestClient
from benchmarks.stage import Stage, settle
from tests.gateway_process import GatewayProcess

#: For one call: fifty sandboxes are started behind it on a machine with few cores.
_TIMEOUT = 600.0


def measure(
    stage: Stage, gateway: GatewayProcess, rest: RestClient, clients: list[int], seconds: float
) -> tuple[list[Level], Samples]:
    """All levels, and for each the bare round trips beside it."""
    new_client = partial(ExecClient, gateway.url, gateway.key, timeout=_TIMEOUT)
    levels: list[Level] = []
    bare: Samples = {}
    progress = tqdm(list(steps(new_client, clients, seconds)), desc="load", unit="step", disable=None)
    for name, step in progress:
        progress.set_description(name)
        if not name.startswith("fresh"):
            # Those measure what is started while they run: they begin with what the last one left.
            rest.wait_until_quiet()
            settle()
        around = stage.bare()
        level = step()
        if level is not None:
            levels.append(level)
            bare[f"bare beside {level.name}"] = around + stage.bare()
    return levels, bare


def start_rate(levels: list[Level]) -> Quantity:
    """Sandboxes started per second while calls wait for them, from the burst."""
    rates = [level.sources["started"] / level.seconds for level in levels if level.kind == "burst" and level.seconds]
    return Quantity("burst rate", "sandboxes started per second while a burst waits", "/s", rates, more_is_better=True)
