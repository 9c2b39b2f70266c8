"""Memory of warm sandboxes: what each has alone, and its part of what they share."""

from __future__ import annotations

import contextlib

import psutil

from benchmarks.bare import BareClient, StockKernel
from benchmarks.figures import Quantity
from benchmarks.processes import Memory, memory
from benchmarks.stage import Stage
from tests.gateway_process import GatewayProcess

_MB = 2**20


def measure(stage: Stage, gateway: GatewayProcess) -> list[Quantity]:
    """MiB of each sandbox of a gateway whose pool is warm, against a stock kernel with the same imports."""
    first = [psutil.Process(stage.first_process(container)) for container in stage.containers(gateway)]
    found = [memory(_container(process)) for process in first]
    shims = [memory([shim]) for process in first if (shim := process.parent()) is not None]
    stock = _stock(stage)
    private, shared = [one.private for one in found], [one.shared for one in found]
    return [
        _quantity("memory private", "private memory of a warm sandbox (USS)", private, stock.private),
        _quantity("memory shared", "its part of shared memory (PSS − USS)", shared, stock.shared),
        _quantity("memory shim", "the engine's shim beside it (USS)", [one.private for one in shims]),
    ]


def _stock(stage: Stage) -> Memory:
    """A stock kernel of its own: the yardstick keeps its memory as it is."""
    kernel = StockKernel(stage.docker_url, stage.image, stage.directory / "imported")
    with contextlib.ExitStack() as stack:
        stack.callback(kernel.stop)
        client = stack.enter_context(BareClient(kernel.start()))
        client.wait_until_ready()
        client.execute("\n".join(f"import {name}" for name in stage.image.preload) or "pass")
        return memory(_container(psutil.Process(stage.first_process(kernel.container_id))))


def _container(first: psutil.Process) -> list[psutil.Process]:
    return [first, *first.children(recursive=True)]


def _quantity(case: str, what: str, found: list[int], stock: int = 0) -> Quantity:
    against = "a stock kernel's with the same imports" if stock else ""
    return Quantity(case, what, "MiB", [one / _MB for one in found], against, [stock / _MB] if stock else [])
