"""A gateway's sandboxes after its death by SIGKILL: adopted by the next one, or removed; and nobody else's."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import docker
import msgspec
import psutil
import pytest

from kernelprovisioner.claim_server import ClaimServer
from kernelprovisioner.claims import ClaimConnection
from kernelprovisioner.images import KernelImage, find_image
from kernelprovisioner.launchers.base import LaunchError, LaunchRequest
from kernelprovisioner.pool import PoolClaim
from kernelprovisioner.records import read_record, record_path
from kernelprovisioner.runtime import RuntimeRoot
from kernelprovisioner.sandbox import ClaimRequest, ProbeError, Sandbox, SandboxState
from kernelprovisioner.sandbox_exit import ExitCause
from kernelprovisioner.sandboxes import Sandboxes
from tests import services
from tests.lost_gateway import TOKEN, LostGateway, make_launcher, run
from tests.stored_records import store_record

ROOT = Path(__file__).parents[2]
Start = Callable[..., LostGateway]


DOCKER = pytest.param("docker", marks=pytest.mark.service)
DOCKER_TCP = pytest.param("docker-tcp", marks=pytest.mark.service)


@pytest.fixture(params=["process", DOCKER])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "process":
        monkeypatch.setenv(services.URL_VARIABLE, request.getfixturevalue("docker_url"))
        request.getfixturevalue("kernel_image")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernel-images'}")
    return str(request.param)


@pytest.fixture
def root(short_directory: Path) -> Path:
    return RuntimeRoot.open(short_directory / "run").path


@pytest.fixture
def lost(kind: str, root: Path) -> Iterator[Start]:
    started: list[LostGateway] = []

    def start(*what: str, at: Path = root, cell_seconds: float = 0.0) -> LostGateway:
        started.append(LostGateway.start(kind, at, *what, cell_seconds=cell_seconds))
        return started[-1]

    yield start
    for each in started:
        each.end()


@pytest.fixture
def image() -> KernelImage:
    return find_image("python")


Successor = Callable[..., AbstractAsyncContextManager[Sandboxes]]


@pytest.fixture
def successor(kind: str, root: Path) -> Successor:
    """The next gateway: `async with successor() as sandboxes`; it must leave nothing in its runtime directory."""

    @asynccontextmanager
    async def start(at: Path = root) -> AsyncIterator[Sandboxes]:
        sandboxes = Sandboxes(make_launcher(kind, at))
        await sandboxes.start(resume=True)
        try:
            yield sandboxes
        finally:
            await sandboxes.stop()

    return start


def nothing_is_left(kind: str, root: Path) -> bool:
    left = sorted(entry.name for entry in root.iterdir())
    return left == ["k"] and not containers_of(kind, root)


def containers_of(kind: str, root: Path) -> set[str]:
    """The sandboxes under a runtime directory that have a container, running or not."""
    if kind == "process":
        return set()
    client = docker.DockerClient(base_url=os.environ[services.URL_VARIABLE])
    try:
        found = client.api.containers(all=True, filters={"label": "com.samovar.managed=true"})
    finally:
        client.close()
    labels = [each["Labels"] for each in found]
    return {each["com.samovar.sandbox"] for each in labels if each["com.samovar.owner"].startswith(str(root))}


async def adopt(sandboxes: Sandboxes, sandbox_id: str, image: KernelImage) -> Sandbox:
    (record,) = [record for record in await sandboxes.recoverable() if record.sandbox_id == sandbox_id]
    return await sandboxes.adopt(record, image, timeout=15)


async def until_idle(sandbox: Sandbox) -> None:
    async with asyncio.timeout(30):
        while (await sandbox.probe(timeout=10)).running is not None:  # noqa: ASYNC110  a probe is a question
            await asyncio.sleep(0.1)


async def test_all_that_lived_is_found_again(
    kind: str, root: Path, lost: Start, successor: Successor, image: KernelImage
) -> None:
    gateway = lost("warm", "session", "holder", "half", cell_seconds=6)
    told = gateway.told
    gateway.kill()
    async with successor() as sandboxes:
        assert str(sandboxes.launcher.owner.path) == told["owner"], "it continues as the same owner"
        states = {record.sandbox_id: record.state for record in await sandboxes.recoverable()}
        assert states == {told["warm"]: "warm", told["holder"]: "claimed", told["session"]: "claimed"}

        session = await adopt(sandboxes, told["session"], image)
        assert session.state is SandboxState.CLAIMED and session.record is not None
        assert (session.record.owner, session.record.kernel_id) == ("main", "kernel-s")
        assert session.record.holder == {"kind": "session", "session_id": "s"}
        assert (await session.probe(timeout=10)).running == told["cell"], "the cell that ran goes on"

        warm = await adopt(sandboxes, told["warm"], image)
        assert warm.state is SandboxState.WARM
        assert warm.template is not None and warm.template == await sandboxes.launcher.template(image)
        assert warm.template != await sandboxes.launcher.template(_other(image))
        await warm.claim(ClaimRequest("kernel-w", b"key-w"))
        assert await run(warm, "print(1 + 1)") == "2\n"

        held = await adopt(sandboxes, told["holder"], image)
        half = sandboxes.launcher.owner.path / told["half"]
        assert half.exists(), "until all is settled nothing is removed"
        await sandboxes.settle()
        assert not half.exists()
        assert told["half"] not in containers_of(kind, root)

        await until_idle(session)
        assert await run(session, "print(value)") == "42\n"
        assert (await held.probe(timeout=10)).execution_count == 1
        assert {sandbox.id for sandbox in sandboxes.live} == {told["warm"], told["session"], told["holder"]}
        await session.destroy()
        assert not record_path(sandboxes.launcher.owner.path, session.id).exists()
    assert nothing_is_left(kind, root)


def _other(image: KernelImage) -> KernelImage:
    return replace(image, environment={**image.environment, "NEW": "setting"})


async def test_a_holder_comes_back_to_the_next_gateway(
    kind: str, root: Path, lost: Start, successor: Successor, image: KernelImage
) -> None:
    gateway = lost("holder")
    gateway.kill()
    async with successor() as sandboxes:
        held = await adopt(sandboxes, gateway.told["holder"], image)
        pool = _Pool(image)
        claims = ClaimServer({"python": pool}, root / "claim.sock")
        claims.restore(pool, held)
        await claims.start()
        try:
            connection = await ClaimConnection.connect(claims.path)
            answer = await connection.resume(held.id, TOKEN)
            assert answer.directory == held.launched.directory
            stats, _ = await connection.request("stats")
            assert stats["rss"] > 0
            await connection.release()
            await asyncio.wait_for(pool.released.wait(), 10)
        finally:
            await claims.stop()
        await sandboxes.settle()
    assert nothing_is_left(kind, root)


class _Pool:
    """As much of a pool as the claim server asks of one for a sandbox that is held."""

    def __init__(self, image: KernelImage) -> None:
        self.image = image
        self.released = asyncio.Event()

    async def claim(self, *_: object, **__: object) -> PoolClaim:
        raise AssertionError("nobody claims here")

    async def release(self, sandbox: Sandbox, cause: object) -> None:
        await sandbox.destroy()
        self.released.set()


async def test_a_claim_that_was_not_recorded_is_not_taken_for_a_warm_one(
    kind: str, root: Path, lost: Start, successor: Successor, image: KernelImage
) -> None:
    gateway = lost("session")
    gateway.kill()
    path = record_path(Path(gateway.told["owner"]), gateway.told["session"])
    claimed = path.read_text()
    # As it was before the claim: state and key.
    path.write_text(claimed.replace('"claimed"', '"warm"').replace('"key-s"', '"the-warm-key"'))
    async with successor() as sandboxes:
        (record,) = await sandboxes.recoverable()
        with pytest.raises(LaunchError, match=r"cannot be taken over: .*did not answer a probe"):
            await sandboxes.adopt(record, image, timeout=3)
        await sandboxes.settle()
        assert await sandboxes.recoverable() == []
        assert not (sandboxes.launcher.owner.path / record.sandbox_id).exists()
    assert nothing_is_left(kind, root)


async def test_a_kernel_that_died_meanwhile_tells_why(
    kind: str, root: Path, lost: Start, successor: Successor, image: KernelImage
) -> None:
    gateway = lost("session", cell_seconds=1)
    sandbox_directory = Path(gateway.told["owner"]) / gateway.told["session"]
    gateway.kill()
    record = read_record(record_path(Path(gateway.told["owner"]), gateway.told["session"]))
    _kill_kernel(kind, record.runtime_id)
    async with successor() as sandboxes:
        session = await adopt(sandboxes, gateway.told["session"], image)
        exit_ = await asyncio.wait_for(asyncio.shield(session.exited), 10)
        assert (exit_.cause, exit_.signal) == (ExitCause.SIGNAL, 9)
        with pytest.raises(ProbeError):
            await session.probe(timeout=5)
        await session.destroy()
        await sandboxes.settle()
        assert not sandbox_directory.exists()
    assert nothing_is_left(kind, root)


def _kill_kernel(kind: str, runtime_id: str) -> None:
    """Kill the one child of a sandbox's supervisor."""
    if kind == "process":
        supervisor = psutil.Process(int(runtime_id.removeprefix("process:")))
    else:
        client = docker.DockerClient(base_url=os.environ[services.URL_VARIABLE])
        supervisor = psutil.Process(client.containers.get(runtime_id).attrs["State"]["Pid"])
        client.close()
    for kernel in supervisor.children():
        kernel.kill()


async def test_a_container_that_is_gone_cannot_be_adopted(
    kind: str, root: Path, lost: Start, successor: Successor, image: KernelImage
) -> None:
    gateway = lost("warm")
    gateway.kill()
    record = read_record(record_path(Path(gateway.told["owner"]), gateway.told["warm"]))
    if kind == "process":
        psutil.Process(int(record.runtime_id.removeprefix("process:"))).kill()
    else:
        client = docker.DockerClient(base_url=os.environ[services.URL_VARIABLE])
        client.containers.get(record.runtime_id).remove(force=True)
        client.close()
    async with successor() as sandboxes:
        with pytest.raises(LaunchError, match=f"sandbox {record.sandbox_id} is gone"):
            await sandboxes.adopt(record, image, timeout=10)
        await sandboxes.discard(record)
        await sandboxes.settle()
    assert nothing_is_left(kind, root)


async def test_a_damaged_record_or_directory_costs_its_sandbox_only_and_no_time(
    kind: str, root: Path, lost: Start, successor: Successor, image: KernelImage
) -> None:
    gateway = lost("warm", "session")
    gateway.kill()
    owner = Path(gateway.told["owner"])
    shutil.rmtree(owner / gateway.told["warm"])
    (owner / "copy.pid").write_text("1 1.0")
    (owner / f"{'5' * 16}.pid").mkdir()
    path = record_path(owner, gateway.told["session"])
    await store_record(owner, msgspec.structs.replace(read_record(path), channels={}))
    async with successor() as sandboxes:
        async with asyncio.timeout(5):
            for sandbox_id, error, why in (
                (gateway.told["warm"], LaunchError, "directory is gone"),
                (gateway.told["session"], KeyError, "shell"),
            ):
                with pytest.raises(error, match=why):
                    await adopt(sandboxes, sandbox_id, image)
        await sandboxes.settle()
        assert containers_of(kind, root) == set()
        assert sandboxes.launcher.owner.sandbox_ids() == []
    assert nothing_is_left(kind, root)


async def test_a_living_gateway_is_left_alone_and_a_provisioner_leaves_a_dead_one_to_its_successor(
    kind: str, root: Path, short_directory: Path, lost: Start, successor: Successor, image: KernelImage
) -> None:
    dead = lost("warm")
    dead.kill()
    living = lost("warm", at=RuntimeRoot.open(short_directory / "another").path)
    # A provisioner that launches for itself while no gateway runs.
    cold = Sandboxes(make_launcher(kind, root))
    await cold.start()
    assert str(cold.launcher.owner.path) != dead.told["owner"]
    await cold.stop()
    async with successor(short_directory / "another") as beside:
        assert str(beside.launcher.owner.path) != living.told["owner"]
        assert await beside.recoverable() == []
        await beside.settle()
    assert living.process.poll() is None
    assert record_path(Path(living.told["owner"]), living.told["warm"]).exists()
    async with successor() as sandboxes:
        warm = await adopt(sandboxes, dead.told["warm"], image)
        await warm.claim(ClaimRequest("kernel-w", b"key-w"))
        assert await run(warm, "print('here')") == "here\n"
        await sandboxes.settle()
    assert nothing_is_left(kind, root)
    living.kill()
    async with successor(short_directory / "another") as sandboxes:
        warm = await adopt(sandboxes, living.told["warm"], image)
        assert (await warm.probe(timeout=10)).running is None, "nobody had touched it"
        await sandboxes.settle()
    assert nothing_is_left(kind, short_directory / "another")


@pytest.mark.parametrize("kind", [DOCKER_TCP], indirect=True)
async def test_ports_and_their_network_are_found_again(
    kind: str, root: Path, lost: Start, successor: Successor, image: KernelImage
) -> None:
    gateway = lost("warm")
    gateway.kill()
    async with successor() as sandboxes:
        networks = networks_of(root)
        warm = await adopt(sandboxes, gateway.told["warm"], image)
        await warm.claim(ClaimRequest("kernel-w", b"key-w"))
        assert await run(warm, "print('here')") == "here\n"
        fresh = await sandboxes.launch(LaunchRequest("2" * 16, image), timeout=120)
        assert fresh.template == warm.template
        assert len(networks) == 1 and networks_of(root) == networks
        await sandboxes.settle()
    assert networks_of(root) == [] and nothing_is_left(kind, root)


def networks_of(root: Path) -> list[str]:
    client = docker.DockerClient(base_url=os.environ[services.URL_VARIABLE])
    try:
        found = client.networks.list(filters={"label": "com.samovar.managed=true"})
        return [each.id for each in found if each.attrs["Labels"]["com.samovar.owner"].startswith(str(root))]
    finally:
        client.close()


async def test_a_gateway_that_keeps_its_sandboxes_leaves_them_to_the_next_one(
    kind: str, root: Path, successor: Successor, image: KernelImage
) -> None:
    first = Sandboxes(make_launcher(kind, root))
    await first.start(resume=True)
    session = await first.launch(LaunchRequest("0" * 16, image), timeout=120)
    gone = await first.launch(LaunchRequest("1" * 16, image), timeout=120)
    await session.claim(ClaimRequest("kernel-s", b"key-s", owner="main", holder={"kind": "session"}))
    await run(session, "value = 42")
    await gone.destroy()
    first.keep_all()
    await session.destroy()
    await first.stop()
    async with successor() as sandboxes:
        assert [record.sandbox_id for record in await sandboxes.recoverable()] == [session.id]
        again = await adopt(sandboxes, session.id, image)
        assert await run(again, "print(value)") == "42\n"
        await sandboxes.settle()
    assert nothing_is_left(kind, root)
