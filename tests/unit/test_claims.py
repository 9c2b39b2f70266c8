"""The claim socket, both ends, over a pool that is not one."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from samovar_kernel.frames import pack

from kernelprovisioner import claim_connection, claim_server, claims
from kernelprovisioner.claim_server import ClaimServer, SocketInUse
from kernelprovisioner.claims import ClaimAnswer, ClaimConnection, ClaimRefused, Ending, NoGateway
from kernelprovisioner.environment import added_by_caller, allowed_in
from kernelprovisioner.held import GatewaySandbox, Wanted
from kernelprovisioner.images import KernelImage
from kernelprovisioner.launchers.base import Endpoint, Launched, LaunchError
from kernelprovisioner.pool import PoolClaim, PoolFull
from kernelprovisioner.pool_events import Source
from kernelprovisioner.sandbox import ClaimRequest, Sandbox
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from kernelprovisioner.supervisor import KernelExit, SupervisorError

IMAGE = KernelImage("python", "python", "Python", Path("/nowhere"), "base", environment_allow=("A*", "B"))
ENDED = SandboxExit(ExitCause.OUT_OF_MEMORY, None, 9, {"limit_mb": 512})
UNSENT = ({"kind": "text", "name": "stdout", "text": "last \ud800 words ü", "parent": {}},)


class FakeSupervisor:
    def __init__(self) -> None:
        self.asked: list[tuple[str, bytes, dict[str, Any]]] = []
        self.ops = asyncio.Queue[str]()

    async def request(self, op: str, body: bytes = b"", **fields: Any) -> tuple[dict[str, Any], bytes]:
        self.asked.append((op, body, fields))
        self.ops.put_nowait(op)
        if fields.get("path") == "missing":
            raise SupervisorError("no such file: missing")
        return {"id": 99, "ok": True, "size": len(body)}, body[::-1]


class FakeSandbox:
    """As much of a sandbox as its holder's connection touches."""

    def __init__(self, number: int, directory: Path) -> None:
        self.id = f"{number:016x}"
        channels = {"shell": Endpoint(path=directory / "k-1"), "iopub": Endpoint(host="127.0.0.1", port=7)}
        self.launched = Launched(
            self.id, IMAGE, f"container-{number}", directory, "/mnt/data", b"w", "t", channels["shell"], channels
        )
        self.exited: asyncio.Future[SandboxExit] = asyncio.get_running_loop().create_future()
        self.kernel_exit: KernelExit | None = None
        self.last_use: asyncio.Future[None] | None = None
        self.supervisor = FakeSupervisor()
        self.handed_over = False
        self.end_asked = False

    async def recorded(self) -> None:
        await asyncio.sleep(0)

    async def hand_over(self) -> None:
        self.handed_over = True


class FakePool:
    def __init__(self, directory: Path) -> None:
        self.image = IMAGE
        self.directory = directory
        self.claims: list[tuple[str, ClaimRequest, Path | None]] = []
        self.sandboxes: list[FakeSandbox] = []
        self.released: dict[str, SandboxExit] = {}
        self.error: Exception | None = None
        self.delay = 0.0
        self.changed = asyncio.Event()

    async def claim(
        self, owner: str, request: ClaimRequest, *, timeout: float = 120.0, mount: Path | None = None
    ) -> PoolClaim:
        self.claims.append((owner, request, mount))
        await asyncio.sleep(self.delay)
        if self.error is not None:
            raise self.error
        sandbox = FakeSandbox(len(self.sandboxes), self.directory)
        self.sandboxes.append(sandbox)
        return PoolClaim(cast(Sandbox, sandbox), Source.WARM)

    async def release(self, sandbox: Sandbox, cause: SandboxExit) -> None:
        fake = cast(FakeSandbox, sandbox)
        if not fake.exited.done():
            fake.exited.set_result(cause)
        if fake.last_use is not None:
            await asyncio.wait({fake.last_use}, timeout=5)
        self.released[fake.id] = cause
        self.changed.set()

    async def until_released(self, count: int = 1) -> None:
        async with asyncio.timeout(5):
            while len(self.released) < count:
                self.changed.clear()
                await self.changed.wait()


@asynccontextmanager
async def served(directory: Path) -> AsyncIterator[tuple[ClaimServer, FakePool]]:
    pool = FakePool(directory)
    server = ClaimServer({"python": pool}, directory / "claim.sock")
    await server.start()
    try:
        yield server, pool
    finally:
        await server.stop()
        assert not (directory / "claim.sock").exists()


async def claim(connection: ClaimConnection, **fields: Any) -> ClaimAnswer:
    wanted: dict[str, Any] = {"image": "python", "kernel_id": "k", "key": b"key", "env": {}, "timeout": 5.0, **fields}
    return await connection.claim(**wanted)


async def test_a_claim_carries_all_that_a_holder_needs(short_directory: Path) -> None:
    async with served(short_directory) as (server, pool):
        connection = await ClaimConnection.connect(server.path)
        env = {"A1": "x" * 100_000, "B": "ü", "C": "not on the image's list"}
        answer = await claim(connection, env=env, notice="n", hold_ms=250, session_name="nb.ipynb")
        owner, request, mount = pool.claims[0]
        assert owner == f"uid:{os.getuid()}" and mount is None
        assert request == ClaimRequest(
            "k",
            b"key",
            {"A1": env["A1"], "B": "ü"},
            session_name="nb.ipynb",
            notice="n",
            hold_ms=250,
            holder={"kind": "provisioner", "token": answer.token},
        )
        launched = pool.sandboxes[0].launched
        assert pool.sandboxes[0].handed_over
        assert (answer.sandbox_id, answer.container_id) == (launched.sandbox_id, "container-0")
        assert answer.channels == launched.channels and answer.directory == short_directory
        assert answer.source == "warm" and answer.transport == "ipc"
        assert server.held == [answer.sandbox_id]
        await connection.release()
        await pool.until_released()
        assert server.held == []


async def test_requests_are_passed_on_to_the_supervisor(short_directory: Path) -> None:
    async with served(short_directory) as (server, pool):
        connection = await ClaimConnection.connect(server.path)
        await claim(connection)
        supervisor = pool.sandboxes[0].supervisor
        header, body = await connection.request("put", b"abc", path="f", offset=0, final=True, evil="dropped")
        assert (header["size"], body) == (3, b"cba")
        assert supervisor.asked == [("put", b"abc", {"path": "f", "offset": 0, "final": True})]
        with pytest.raises(SupervisorError, match="no such file"):
            await connection.request("get", path="missing")
        with pytest.raises(SupervisorError, match="unknown operation"):
            await connection.request("exit")
        many = await asyncio.gather(*(connection.request("put", bytes(1 << 20), path="f") for _ in range(20)))
        assert len(many) == 20
        await connection.release()


@pytest.mark.parametrize(("signum", "asked"), [(signal.SIGINT, False), (signal.SIGTERM, True), (signal.SIGKILL, True)])
async def test_a_holder_that_ends_its_kernel_has_asked_for_the_end(
    short_directory: Path, signum: int, asked: bool
) -> None:
    async with served(short_directory) as (server, pool):
        connection = await ClaimConnection.connect(server.path)
        await claim(connection)
        await connection.request("signal", signum=int(signum))
        assert pool.sandboxes[0].end_asked is asked
        await connection.release()


async def test_a_death_is_told_and_files_still_come_out(short_directory: Path) -> None:
    async with served(short_directory) as (server, pool):
        connection = await ClaimConnection.connect(server.path)
        await claim(connection)
        sandbox = pool.sandboxes[0]
        sandbox.kernel_exit = KernelExit(None, 9, UNSENT)
        sandbox.exited.set_result(ENDED)
        ending = await asyncio.wait_for(asyncio.shield(connection.ended), 5)
        assert ending == Ending(ENDED, UNSENT)
        await connection.request("list")
        assert sandbox.last_use is not None and not sandbox.last_use.done()
        await connection.release()
        await pool.until_released()
        assert sandbox.last_use.done()


def test_an_ending_that_is_too_large_loses_its_oldest_records() -> None:
    records = tuple({"kind": "text", "name": "stdout", "parent": {}, "text": f"{n} " + "ü" * 500_000} for n in range(9))
    frame = Ending(ENDED, records).frame()
    reader = claims.FrameReader()
    [(header, body)] = reader.feed(frame)
    kept = Ending.of(header, body).unsent
    assert 0 < len(kept) < len(records) and kept[-1] == records[-1]


async def test_a_holder_that_vanishes_gives_its_sandbox_up(
    short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_server, "RESUME_SECONDS", 0.2)
    async with served(short_directory) as (server, pool):
        connection = await ClaimConnection.connect(server.path)
        await claim(connection)
        connection.close()
        await pool.until_released()
        assert "holder went away" in str(pool.released[pool.sandboxes[0].id].evidence)


async def test_a_holder_can_come_back_with_its_token(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim_server, "RESUME_SECONDS", 0.5)
    async with served(short_directory) as (server, pool):
        connection = await ClaimConnection.connect(server.path)
        answer = await claim(connection)
        connection.close()
        await connection.gone
        thief = await ClaimConnection.connect(server.path)
        with pytest.raises(ClaimRefused, match="does not hold"):
            await thief.resume(answer.sandbox_id, "guess")
        thief.close()
        again = await ClaimConnection.connect(server.path)
        assert await again.resume(answer.sandbox_id, answer.token) == answer
        await asyncio.sleep(0.7)
        assert pool.released == {}
        await again.request("stats")
        await again.release()


async def test_claims_that_overlap_on_one_connection_get_one_sandbox(short_directory: Path) -> None:
    async with served(short_directory) as (server, pool):
        pool.delay = 0.1
        connection = await ClaimConnection.connect(server.path)
        answers = await asyncio.gather(claim(connection), claim(connection), return_exceptions=True)
        [refused] = [answer for answer in answers if isinstance(answer, ClaimRefused)]
        assert refused.code == "bad_request"
        assert len(pool.sandboxes) == len(server.held) == 1
        await connection.release()
        await pool.until_released()


async def test_a_claim_that_failed_may_be_tried_again(short_directory: Path) -> None:
    async with served(short_directory) as (server, pool):
        connection = await ClaimConnection.connect(server.path)
        pool.error = PoolFull("the line is full", 7)
        with pytest.raises(ClaimRefused):
            await claim(connection)
        pool.error = None
        await claim(connection)
        await connection.release()


async def test_a_holder_that_does_not_read_keeps_no_dead_sandbox(
    short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_connection, "_AFTER_EXIT_SECONDS", 0.2)
    async with served(short_directory) as (server, pool):
        reader, writer = await asyncio.open_unix_connection(str(server.path), limit=1024)
        wanted = {"op": "claim", "id": 1, "image": "python", "kernel_id": "k", "key": "key"}
        writer.write(pack(wanted, b"{}"))
        assert await asyncio.wait_for(reader.read(1), 5)
        writer.write(b"".join(pack({"op": "put", "id": n}, bytes(1 << 20)) for n in range(2, 6)))
        for _ in range(4):
            await asyncio.wait_for(pool.sandboxes[0].supervisor.ops.get(), 5)
        pool.sandboxes[0].exited.set_result(ENDED)
        await pool.until_released()
        assert server.held == []
        writer.transport.abort()


async def test_a_claim_is_given_up_when_its_asker_hangs_up(short_directory: Path) -> None:
    async with served(short_directory) as (server, pool):
        pool.delay = 0.3
        connection = await ClaimConnection.connect(server.path)
        waiting = asyncio.ensure_future(claim(connection))
        await asyncio.sleep(0.1)
        connection.close()
        with pytest.raises(NoGateway):
            await waiting
        await asyncio.sleep(0.5)
        assert server.held == [] and pool.sandboxes == []


async def test_a_stopping_gateway_tells_its_holders(short_directory: Path) -> None:
    async with served(short_directory) as (server, pool):
        connection = await ClaimConnection.connect(server.path)
        await claim(connection)
        stopping = asyncio.ensure_future(server.stop())
        ending = await asyncio.wait_for(asyncio.shield(connection.ended), 5)
        assert ending.exit.cause is ExitCause.GATEWAY
        await connection.request("list")
        assert not stopping.done(), "the holder's last files come first"
        await connection.release()
        await asyncio.wait_for(stopping, 5)
        assert len(pool.released) == 1


async def test_a_stopping_gateway_does_not_wait_for_a_holder_that_is_away(short_directory: Path) -> None:
    async with served(short_directory) as (server, pool):
        connection = await ClaimConnection.connect(server.path)
        await claim(connection)
        connection.close()
        sandbox = FakeSandbox(7, short_directory)
        cast(Any, sandbox).record = SimpleNamespace(holder={"kind": "provisioner", "token": "t"})
        server.restore(pool, cast(Sandbox, sandbox))
        await asyncio.sleep(0.05)
        await asyncio.wait_for(server.stop(), 2)
        assert len(pool.released) == 2


async def test_a_holder_goes_on_with_the_next_gateway(short_directory: Path) -> None:
    async with served(short_directory) as (server, pool):
        held = await GatewaySandbox.claim(server.path, Wanted("python", "k", b"key", {}))
        await server.stop(keep=True)
        assert pool.released == {} and server.held == []
        (sandbox,) = pool.sandboxes
        # The gateway is away: what is asked for now waits for the next one, unless it cannot wait that long.
        asked = asyncio.ensure_future(held.request("list", timeout=20))
        with pytest.raises(SupervisorError, match="is away"):
            await held.request("signal", timeout=0.3, signum=2)
        assert not held.ended.done() and sandbox.supervisor.asked == []

        following = ClaimServer({"python": pool}, server.path)
        await following.start(closed=True)
        await asyncio.sleep(0.5)
        assert not held.ended.done(), "a gateway that is starting turns no holder away for good"
        _, request, _ = pool.claims[0]
        cast(Any, sandbox).record = SimpleNamespace(holder=request.holder)
        following.restore(pool, cast(Sandbox, sandbox))
        await asyncio.wait_for(asked, 10)
        following.open()
        await held.request("signal", signum=2)
        assert [op for op, _, _ in sandbox.supervisor.asked] == ["list", "signal"]
        sandbox.exited.set_result(ENDED)
        assert (await asyncio.wait_for(asyncio.shield(held.ended), 10)).exit == ENDED
        await held.release()
        await pool.until_released()
        await following.stop()


async def test_a_holder_that_does_not_come_back_to_the_next_gateway_gives_its_sandbox_up(
    short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_server, "RESUME_SECONDS", 0.2)
    async with served(short_directory) as (server, pool):
        sandbox = FakeSandbox(0, short_directory)
        for holder in (
            {},
            {"kind": "session", "token": "t"},
            {"kind": "provisioner"},
            {"kind": "provisioner", "token": 1},
        ):
            cast(Any, sandbox).record = SimpleNamespace(holder=holder)
            with pytest.raises(ValueError, match="names no holder"):
                server.restore(pool, cast(Sandbox, sandbox))
        cast(Any, sandbox).record = SimpleNamespace(holder={"kind": "provisioner", "token": "t"})
        server.restore(pool, cast(Sandbox, sandbox))
        assert server.held == [sandbox.id]
        await pool.until_released()
        assert "holder went away" in str(pool.released[sandbox.id].evidence)


async def test_a_gateway_that_is_about_to_start_takes_holders_back_and_no_claims(short_directory: Path) -> None:
    server = ClaimServer({"python": (pool := FakePool(short_directory))}, short_directory / "claim.sock")
    sandbox = FakeSandbox(0, short_directory)
    cast(Any, sandbox).record = SimpleNamespace(holder={"kind": "provisioner", "token": "t"})
    server.restore(pool, cast(Sandbox, sandbox))
    await server.start(closed=True)
    try:
        holder, other = [await ClaimConnection.connect(server.path) for _ in range(2)]
        assert (await holder.resume(sandbox.id, "t")).sandbox_id == sandbox.id
        with pytest.raises(ClaimRefused) as refused:
            await claim(other)
        assert (refused.value.code, pool.claims) == (claims.STARTING, [])
        server.open()
        await claim(other)
        holder.close()
        other.close()
    finally:
        await server.stop()


@pytest.mark.parametrize(
    ("error", "code", "retry_after"),
    [
        (PoolFull("the line is full", 7), "full", 7),
        (LaunchError("no engine"), "failed", None),
        (RuntimeError("nobody thought of that"), "failed", None),
    ],
)
async def test_a_no_says_why(short_directory: Path, error: Exception, code: str, retry_after: int | None) -> None:
    async with served(short_directory) as (server, pool):
        pool.error = error
        connection = await ClaimConnection.connect(server.path)
        with pytest.raises(ClaimRefused, match=str(error)) as refused:
            await claim(connection)
        assert (refused.value.code, refused.value.retry_after) == (code, retry_after)
        connection.close()


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"image": "cobol"}, "unknown_image"),
        ({"hold_ms": "long"}, "bad_request"),
        ({"mount": "relative"}, "bad_request"),
        ({"mount": "/"}, "bad_request"),
        ({"mount": "/etc/ssl"}, "bad_request"),
    ],
    ids=str,
)
async def test_bad_claims_are_refused(short_directory: Path, fields: dict[str, Any], code: str) -> None:
    async with served(short_directory) as (server, pool):
        connection = await ClaimConnection.connect(server.path)
        with pytest.raises(ClaimRefused) as refused:
            await claim(connection, **fields)
        assert refused.value.code == code and pool.claims == []
        with pytest.raises(SupervisorError, match="holds no sandbox"):
            await connection.request("stats")
        connection.close()


async def test_torn_and_forged_frames_end_their_own_connection(short_directory: Path) -> None:
    async with served(short_directory) as (server, pool):
        for garbage in (b"\xff" * 16, pack({"op": "claim"}) + b"\x00", b"GET / HTTP/1.1\r\n\r\n"):
            reader, writer = await asyncio.open_unix_connection(str(server.path))
            writer.write(garbage)
            await asyncio.wait_for(writer.drain(), 5)
            writer.write_eof()
            await asyncio.wait_for(reader.read(), 5)
            writer.close()
        connection = await ClaimConnection.connect(server.path)
        await claim(connection)
        await connection.release()
        assert len(pool.claims) == 1


async def test_a_stale_socket_is_replaced_and_a_living_one_is_not(short_directory: Path) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(short_directory / "claim.sock"))
    stale.close()
    async with served(short_directory) as (server, pool):
        assert server.path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(SocketInUse, match="another gateway"):
            await ClaimServer({"python": pool}, server.path).start()
        connection = await ClaimConnection.connect(server.path)
        connection.close()


async def test_other_users_are_turned_away(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(short_directory) as (server, pool):
        monkeypatch.setattr(claim_server, "peer_is_ours", lambda connection: False)
        connection = await ClaimConnection.connect(server.path)
        with pytest.raises(NoGateway):
            await claim(connection)
        assert pool.claims == []
        monkeypatch.setattr(claims, "peer_is_ours", lambda connection: False)
        with pytest.raises(NoGateway, match="another user"):
            await ClaimConnection.connect(server.path)


async def test_no_gateway(short_directory: Path) -> None:
    with pytest.raises(NoGateway):
        await ClaimConnection.connect(short_directory / "claim.sock")


def test_the_environment_is_what_was_added_for_the_kernel() -> None:
    own = {"PATH": "/bin", "AWS_SECRET_ACCESS_KEY": "s", "LANG": "C", "HOME": "/root"}
    given = {**own, "LANG": "de_DE.UTF-8", "DATA_URL": "x", "JPY_SESSION_NAME": "n", "LD_PRELOAD": "e", "PATH": "/b2"}
    assert added_by_caller(given, own, {}) == {"LANG": "de_DE.UTF-8", "DATA_URL": "x"}
    assert added_by_caller({"LATIN": "\udce4"}, {}, {}) == {}, "bytes that are no UTF-8 cannot travel in a message"
    assert added_by_caller({**own, "PYTHONPATH": "/x"}, own, {"PYTHONPATH": "/x"}) == {"PYTHONPATH": "/x"}
    assert added_by_caller(dict(own), own, {}) == {}
    assert added_by_caller({"BIG": "x" * 10**6, "OK": "1"}, own, {}) == {"OK": "1"}


def test_an_image_may_allow_less() -> None:
    assert allowed_in(IMAGE, {"A1": "1", "B": "2", "BC": "3"}) == {"A1": "1", "B": "2"}
    assert allowed_in(dataclasses.replace(IMAGE, environment_allow=("*",)), {"X": "1"}) == {"X": "1"}
