"""Relay: what lies between a websocket's client and its kernel, ours and a stock jupyter_server's, by turns."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import psutil
from tornado.httpclient import HTTPRequest
from tornado.websocket import websocket_connect
from tqdm import tqdm

from benchmarks.bare import CODE, BareClient
from benchmarks.figures import Quantity
from benchmarks.latency import WARM_UP, Samples
from benchmarks.processes import memory
from benchmarks.sockets import KernelSocket
from benchmarks.stage import Stage
from benchmarks.stock_server import StockServer
from gateway.websocket_frames import V1
from kernelprovisioner.records import read_record
from tests.gateway_process import GatewayProcess

IDLE_SOCKETS = 200
_FLOODS = 5
_FLOOD_MB = 40
_FLOOD = f"""\
import sys
lines = ("x" * 99 + "\\n") * 100
for _ in range({_FLOOD_MB * 100}):
    _ = sys.stdout.write(lines)
"""
_SETTLE_SECONDS = 3.0
_FIRST_SOCKETS = 40
_STOCK = "stock jupyter_server's"


@dataclass(frozen=True)
class _Server:
    """A server of kernel websockets, ours or the stock one, and a kernel of it that runs."""

    url: str
    token: str
    kernel: str
    process: psutil.Process

    def connect(self, *, quick_ack: bool = False) -> KernelSocket:
        return KernelSocket(self.url, self.token, self.kernel, quick_ack=quick_ack)


def measure(stage: Stage, gateway: GatewayProcess, rounds: int, idle_seconds: float) -> tuple[list[Quantity], Samples]:
    """Round trips, a flood of output, and websockets at rest, on two kernels that a bare client talks to as well.

    The stock server serves the yardstick's own one. Nothing else may be claimed from the gateway.
    """
    assert gateway.process is not None
    kernel = gateway.call("POST", "/api/kernels", {}).body["id"]
    stock_server = StockServer(stage.directory / "jupyter", stage.stock_kernel.info)
    try:
        stock_kernel = stock_server.start()
        ours = _Server(gateway.url, gateway.key, kernel, psutil.Process(gateway.process.pid))
        stock = _Server(stock_server.url, stock_server.token, stock_kernel, psutil.Process(stock_server.pid))
        with BareClient(_connection(gateway)) as sandbox:
            sandbox.wait_until_ready()
            samples = _round_trips(stage.stock, sandbox, ours, stock, rounds)
            # Before a flood leaves memory behind that websockets would fill.
            quantities = asyncio.run(_at_rest(ours, stock, idle_seconds))
            quantities = _floods(sandbox, ours, stock) + quantities
    finally:
        stock_server.stop()
        gateway.call("DELETE", f"/api/kernels/{kernel}")
    return quantities, samples


def _connection(gateway: GatewayProcess) -> dict[str, Any]:
    """Where the gateway's only claimed kernel listens, and its key: what the next gateway would read, too."""
    records = [read_record(path) for path in gateway.runtime.glob("*/*.json")]
    (record,) = [record for record in records if record.state == "claimed"]
    return {
        "transport": "ipc",
        "key": record.key,
        "ip": str(record.channels["shell"].path).rpartition("-")[0],
        **{f"{name}_port": str(endpoint.path).rpartition("-")[2] for name, endpoint in record.channels.items()},
    }


def _round_trips(bare: BareClient, sandbox: BareClient, ours: _Server, stock: _Server, rounds: int) -> Samples:
    """The same cell over ZeroMQ and over each server's websocket, in another order each time."""
    samples: Samples = defaultdict(list)
    with contextlib.ExitStack() as stack:
        kernels: dict[str, dict[str, BareClient | KernelSocket]] = {
            case: {
                "": direct,
                case: stack.enter_context(server.connect()),
                f"{case}_quick": stack.enter_context(server.connect(quick_ack=True)),
            }
            for case, direct, server in (("websocket", sandbox, ours), ("stock_websocket", bare, stock))
        }
        for number in tqdm(range(WARM_UP + rounds), desc="websockets", disable=None):
            direct: dict[str, float] = {}
            found: dict[str, float] = {}
            for kernel, clients in kernels.items():
                # A kernel that has just worked is faster than one that another has pushed out of the caches.
                for client in clients.values():
                    client.execute(CODE)
                for case in random.sample(list(clients), len(clients)):
                    elapsed = clients[case].execute(CODE)
                    if case:
                        found[case] = elapsed
                    else:
                        direct[kernel] = elapsed
            if number < WARM_UP:
                continue
            for case, elapsed in found.items():
                samples[case].append(elapsed)
                samples[f"{case}_own"].append(elapsed - direct[case.removesuffix("_quick")])
                for each in (case, f"{case}_own"):
                    samples[f"bare beside {each}"].append(direct["stock_websocket"])
    return samples


def _floods(sandbox: BareClient, ours: _Server, stock: _Server) -> list[Quantity]:
    """MB of text per second from the call to the end of a cell that prints as fast as it can."""
    rates: Samples = defaultdict(list)
    with ours.connect() as our_client, stock.connect() as stock_client:
        for _ in tqdm(range(_FLOODS), desc="floods of output", disable=None):
            rates["direct"].append(_FLOOD_MB * 1000 / sandbox.execute(_FLOOD))
            for name, client in (("ours", our_client), ("stock", stock_client)):
                elapsed, streams = client.run(_FLOOD)
                arrived = sum(len(json.loads(content)["text"]) for content in streams) / 1e6
                if name == "ours" and arrived != _FLOOD_MB:
                    raise RuntimeError(f"{arrived} of {_FLOOD_MB} MB arrived")
                rates[name].append(arrived * 1000 / elapsed)
    return [
        Quantity(
            "websocket stream",
            f"a cell's text through one websocket ({_FLOOD_MB} MB)",
            "MB/s",
            rates["ours"],
            _STOCK,
            rates["stock"],
            more_is_better=True,
            least=40.0,
        ),
        Quantity(
            "stream",
            "the same from a sandbox's kernel over ZeroMQ",
            "MB/s",
            rates["direct"],
            more_is_better=True,
        ),
    ]


async def _at_rest(ours: _Server, stock: _Server, seconds: float) -> list[Quantity]:
    """CPU and memory of both servers without websockets and with many that are silent; answers to pings included."""
    servers = (ours, stock)
    without = await _cpu(servers, seconds, "no websockets")
    async with contextlib.AsyncExitStack() as stack:
        # They fill what is free in memory already.
        first = await stack.enter_async_context(contextlib.AsyncExitStack())
        await first.enter_async_context(_open(servers, _FIRST_SOCKETS))
        memory_before = [memory([server.process]).private for server in servers]
        await stack.enter_async_context(_open(servers, IDLE_SOCKETS))
        memory_after = [memory([server.process]).private for server in servers]
        await first.aclose()
        held = await _cpu(servers, seconds, f"{IDLE_SOCKETS} websockets")
    each = [(after - before) / IDLE_SOCKETS / 1024 for before, after in zip(memory_before, memory_after, strict=True)]
    return [
        Quantity(
            "websockets none", "CPU of the gateway without websockets, its pool at rest", "% of a core", without[:1]
        ),
        Quantity(
            "websockets idle",
            f"CPU of the gateway with {IDLE_SOCKETS} idle ones",
            "% of a core",
            held[:1],
            _STOCK,
            held[1:],
        ),
        Quantity("stock none", "CPU of stock jupyter_server without websockets", "% of a core", without[1:]),
        Quantity("websocket memory", "memory of each of them (USS)", "KiB", each[:1], _STOCK, each[1:]),
    ]


async def _cpu(servers: tuple[_Server, ...], seconds: float, what: str) -> list[float]:
    """Per cent of a core that each server takes."""
    before = [_used(server) for server in servers]
    started = time.perf_counter()
    for _ in tqdm(range(round(seconds)), desc=what, unit="s", disable=None):
        await asyncio.sleep(1)
    elapsed = time.perf_counter() - started
    return [100 * (_used(server) - earlier) / elapsed for server, earlier in zip(servers, before, strict=True)]


def _used(server: _Server) -> float:
    times = server.process.cpu_times()
    return float(times.user + times.system)


@contextlib.asynccontextmanager
async def _open(servers: tuple[_Server, ...], count: int) -> AsyncIterator[None]:
    """Open `count` websockets to the kernel of each server, one after the other."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(count):
            for server in servers:
                request = HTTPRequest(
                    f"ws{server.url.removeprefix('http')}/api/kernels/{server.kernel}/channels?session_id={uuid.uuid4()}",
                    headers={"Authorization": f"token {server.token}"},
                )
                connection = await websocket_connect(request, on_message_callback=lambda _: None, subprotocols=[V1])
                stack.callback(connection.close)
        await asyncio.sleep(_SETTLE_SECONDS)
        yield
    await asyncio.sleep(_SETTLE_SECONDS)
