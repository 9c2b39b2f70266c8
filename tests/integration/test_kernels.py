"""Kernels of Jupyter clients that come by HTTP: their life as clients see it, at a gateway of their own."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tornado.httpclient import HTTPClientError

from tests.channels_client import ChannelsClient, kinds, text
from tests.gateway_process import Answer, GatewayProcess

DOCKER = pytest.param("docker", marks=pytest.mark.service)
ONE_PLACE = {"CONTAINER_POOL_PY_MIN": "1", "CONTAINER_POOL_PY_MAX": "1"}
BOUNDS = {"CONTAINER_POOL_PY_MIN": "1", "CONTAINER_POOL_PY_MAX": "4", "SAMOVAR_DRAIN_TIMEOUT": "1"}


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture(params=["process", DOCKER])
def docker_url_or_none(request: pytest.FixtureRequest) -> str | None:
    if request.param == "process":
        return None
    request.getfixturevalue("kernel_image")
    return str(request.getfixturevalue("docker_url"))


@asynccontextmanager
async def served(directory: Path, docker_url: str | None, *arguments: str, **settings: str) -> AsyncIterator[Gateway]:
    launcher = "process" if docker_url is None else "docker"
    process = GatewayProcess(
        directory, docker_url, {**BOUNDS, "SAMOVAR_LAUNCHER": launcher, **settings}, list(arguments)
    )
    gateway = Gateway(process)
    try:
        await asyncio.to_thread(process.start)
        yield gateway
    finally:
        await asyncio.to_thread(end, process)
    assert not list(process.runtime.glob("*/????????????????")), "a sandbox's runtime directory was left"


def end(process: GatewayProcess) -> None:
    """Ctrl-C removes all, whatever is configured; after a crash it takes a start that takes over first."""
    if process.process is not None:
        if process.process.poll() is not None:
            process.start()
        process.process.send_signal(signal.SIGINT)
        assert process.process.wait(60) == 0, process.log.read_text()


class Gateway:
    """A gateway process, called from a loop."""

    def __init__(self, process: GatewayProcess) -> None:
        self.process = process

    async def call(self, method: str, path: str, body: Any = None, *, key: str = "") -> Answer:
        headers = {"x-api-key": key or self.process.key}
        return await asyncio.to_thread(self.process.call, method, path, body, headers=headers)

    async def start(self, **body: Any) -> str:
        """Start a kernel and return its id."""
        answer = await self.call("POST", "/api/kernels", body)
        assert answer.status == 201, answer
        return str(answer.body["id"])

    async def model(self, kernel_id: str) -> dict[str, Any]:
        answer = await self.call("GET", f"/api/kernels/{kernel_id}")
        assert answer.status == 200, answer
        model: dict[str, Any] = answer.body
        return model

    async def becomes(self, kernel_id: str, state: str) -> dict[str, Any]:
        """Wait until the model says so."""
        async with asyncio.timeout(30):
            while (model := await self.model(kernel_id))["execution_state"] != state:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        return model

    def client(self, kernel_id: str, session: str | None = None, key: str = "") -> ChannelsClient:
        return ChannelsClient(self.process.url, kernel_id, key or self.process.key, session)


async def test_a_kernel_keeps_its_id_and_tells_the_truth_of_its_state(
    directory: Path, docker_url_or_none: str | None
) -> None:
    async with served(directory, docker_url_or_none) as gateway:
        kernel_id = await gateway.start(name="sandbox", env={"FRUIT": "apple"})
        assert (await gateway.model(kernel_id))["execution_state"] == "idle"
        async with gateway.client(kernel_id) as one, gateway.client(kernel_id) as other:
            assert text(await one.run("import os; a = 5; print(os.environ['FRUIT'])")) == "apple\n"
            running = await one.execute("import time; print('runs', flush=True); time.sleep(1)")
            await one.until(lambda: text(one.of(running)) == "runs\n")
            model = await gateway.model(kernel_id)
            assert (model["execution_state"], model["connections"]) == ("busy", 2)
            await one.finish(running)
            later = await gateway.becomes(kernel_id, "idle")
            assert later["last_activity"] > model["last_activity"]
            one.messages.clear()
            other.messages.clear()
            assert (await gateway.call("POST", f"/api/kernels/{kernel_id}/restart")).status == 200
            for client in (one, other):
                await client.until(lambda client=client: client.states()[-2:] == ["starting", "idle"])
                assert "restarting" not in client.states()
            assert "error" in kinds(await one.run("a")), "it is a new kernel"
            assert text(await other.run("import os; print(os.environ['FRUIT'])")) == "apple\n"
        assert (await gateway.call("DELETE", f"/api/kernels/{kernel_id}")).status == 204
        assert (await gateway.call("GET", f"/api/kernels/{kernel_id}")).status == 404


async def test_a_restart_while_a_cell_runs_releases_whoever_waits(directory: Path) -> None:
    async with served(directory, None) as gateway:
        kernel_id = await gateway.start()
        async with gateway.client(kernel_id) as one, gateway.client(kernel_id) as other:
            running = await one.execute("while True: print('x', flush=True)")
            await one.until(lambda: text(one.of(running)))
            waiting = await other.execute("1")
            # Once this is answered, the cell has come, too.
            await other.finish(await other.send("control", "kernel_info_request", {}))
            answers = await asyncio.gather(
                *(gateway.call("POST", f"/api/kernels/{kernel_id}/restart") for _ in range(2))
            )
            assert [answer.status for answer in answers] == [200, 200]
            for client, msg_id in ((one, running), (other, waiting)):
                told = await client.finish(msg_id)
                (reply,) = [each for each in told if each["header"]["msg_type"] == "execute_reply"]
                assert reply["content"]["status"] == "aborted"
            told = await one.run("print('new')")
            assert text(told) == "new\n"
            began = one.messages.index(told[0])
            assert all(each["parent_header"].get("msg_id") != running for each in one.messages[began:])


async def test_a_death_is_told_in_the_cell_and_the_kernel_starts_again(
    directory: Path, docker_url_or_none: str | None
) -> None:
    async with served(directory, docker_url_or_none, MAX_MEMORY_MB="256") as gateway:
        kernel_id = await gateway.start()
        async with gateway.client(kernel_id) as one, gateway.client(kernel_id) as other:
            if docker_url_or_none is None:
                code, cause = "import os; print('last', flush=True); os.kill(os.getpid(), 9)", "signal 9 (SIGKILL)"
            else:
                code, cause = "print('last', flush=True); b = bytearray(4 << 30)", "out of memory (limit"
            msg_id = await one.execute(code)
            await other.until(lambda: other.states()[-3:] == ["restarting", "starting", "idle"])
            await one.until(lambda: one.states()[-3:] == ["restarting", "starting", "idle"])
            told = kinds(one.of(msg_id))
            assert told[-4:] == ["stream", "error", "execute_reply", "idle"], told
            assert text(one.of(msg_id)) == "last\n" and cause in text(one.of(msg_id), "stderr")
            (reply,) = [each for each in one.of(msg_id) if each["header"]["msg_type"] == "execute_reply"]
            assert (reply["content"]["status"], reply["content"]["ename"]) == ("error", "SandboxDied")
            states = [each for each in one.messages if kinds([each])[0] in ("restarting", "starting")]
            assert one.messages.index(one.of(msg_id)[-1]) < one.messages.index(states[0])
            assert text(await one.run("print(1)")) == text(await other.run("print(1)")) == "1\n"
        model = await gateway.model(kernel_id)
        assert model["execution_state"] == "idle"


async def test_a_kernel_that_stays_dead_closes_its_websockets_and_says_why(directory: Path) -> None:
    async with served(directory, None, SAMOVAR_JUPYTER_SETTINGS_RESTART_LIMIT="0") as gateway:
        kernel_id = await gateway.start()
        async with gateway.client(kernel_id) as one:
            msg_id = await one.execute("import os; os.kill(os.getpid(), 9)")
            await asyncio.wait_for(one.ended.wait(), 30)
            assert kinds(one.of(msg_id))[-2:] == ["execute_reply", "idle"]
            code, reason = one.closed_with
            assert code == 4410 and "SIGKILL" in str(reason)
        model = await gateway.model(kernel_id)
        assert model["execution_state"] == "dead" and "SIGKILL" in model["reason"] and model["traceback"]
        assert model["samovar_exit"]["cause"] == "signal"
        assert kernel_id in [each["id"] for each in (await gateway.call("GET", "/api/kernels")).body]
        with pytest.raises(HTTPClientError) as refused:
            async with gateway.client(kernel_id):
                pass
        assert refused.value.code == 404
        assert (await gateway.call("POST", f"/api/kernels/{kernel_id}/restart")).status == 200
        async with gateway.client(kernel_id) as one:
            assert text(await one.run("print(1)")) == "1\n"
        assert "reason" not in await gateway.model(kernel_id)


@pytest.mark.parametrize("restart", [False, True])
async def test_a_client_may_end_and_restart_its_kernel_by_a_message(directory: Path, restart: bool) -> None:
    async with served(directory, None) as gateway:
        kernel_id = await gateway.start()
        async with gateway.client(kernel_id) as one:
            await one.run("a = 1")
            msg_id = await one.send("control", "shutdown_request", {"restart": restart})
            await one.until(lambda: "shutdown_reply" in kinds(one.of(msg_id)))
            if restart:
                await one.until(lambda: one.states()[-2:] == ["starting", "idle"])
                assert "restarting" not in one.states()
                assert "error" in kinds(await one.run("a")), "it is a new kernel"
            else:
                await asyncio.wait_for(one.ended.wait(), 30)
                assert one.closed_with == (4410, "The kernel was shut down.")
                assert (await gateway.call("GET", f"/api/kernels/{kernel_id}")).status == 404


async def test_a_storm_of_interrupts_ends_the_cell_and_nothing_else(directory: Path) -> None:
    async with served(directory, None) as gateway:
        kernel_id = await gateway.start()
        async with gateway.client(kernel_id) as one:
            await one.run("a = 1")
            running = await one.execute("print('runs', flush=True)\nwhile True: pass")
            await one.until(lambda: text(one.of(running)))
            path = f"/api/kernels/{kernel_id}/interrupt"
            answers = await asyncio.gather(*(gateway.call("POST", path) for _ in range(100)))
            assert {answer.status for answer in answers} == {204}
            (reply,) = [each for each in await one.finish(running) if each["header"]["msg_type"] == "execute_reply"]
            assert reply["content"]["ename"] == "KeyboardInterrupt"
            assert text(await one.run("print(a)")) == "1\n"


async def test_where_all_places_are_taken_a_client_hears_of_it_before_it_gives_up(directory: Path) -> None:
    async with served(directory, None, CONTAINER_POOL_PY_MAX="1", CONTAINER_POOL_PY_MIN="1") as gateway:
        kernel_id = await gateway.start()
        refused = await gateway.call("POST", "/api/kernels", {"env": {"KERNEL_LAUNCH_TIMEOUT": "6"}})
        assert refused.status == 503 and int(refused.headers["retry-after"]) >= 1
        assert [each["id"] for each in (await gateway.call("GET", "/api/kernels")).body] == [kernel_id]
        # Its own place is enough for a restart.
        assert (await gateway.call("POST", f"/api/kernels/{kernel_id}/restart")).status == 200
        waiting = asyncio.create_task(gateway.start())
        await asyncio.sleep(0.2)
        assert (await gateway.call("DELETE", f"/api/kernels/{kernel_id}")).status == 204
        assert await waiting != kernel_id


async def test_nobody_sees_or_touches_the_kernels_of_others(directory: Path) -> None:
    keys = "key-of-ada-lovelace,key-of-bob-the-builder"
    async with served(directory, None, API_KEYS=keys) as gateway:
        ada, bob = keys.split(",")
        chosen = "6f1c2f0e-0000-4000-8000-000000000000"
        assert (await gateway.call("POST", "/api/kernels", {"kernel_id": chosen}, key=ada)).status == 201
        assert (await gateway.call("GET", "/api/kernels", key=bob)).body == []
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/restart"), ("POST", "/interrupt")):
            assert (await gateway.call(method, f"/api/kernels/{chosen}{path}", key=bob)).status == 404
        with pytest.raises(HTTPClientError) as refused:
            async with gateway.client(chosen, key=bob):
                pass
        assert refused.value.code == 404
        assert (await gateway.call("POST", "/api/kernels", {"kernel_id": chosen}, key=bob)).status == 201
        assert (await gateway.call("POST", "/api/kernels", {"kernel_id": chosen}, key=ada)).status == 409
        assert (await gateway.call("DELETE", f"/api/kernels/{chosen}", key=bob)).status == 204
        async with gateway.client(chosen, key=ada) as one:
            assert text(await one.run("print(1)")) == "1\n"


@pytest.mark.parametrize("how", ["killed", "upgraded"])
async def test_kernels_outlive_their_gateway(directory: Path, docker_url_or_none: str | None, how: str) -> None:
    async with served(directory, docker_url_or_none, "--keep-sandboxes") as gateway:
        posted = await gateway.call(
            "POST", "/api/sessions", {"path": "a.ipynb", "type": "notebook", "name": "", "kernel": {"name": "sandbox"}}
        )
        assert posted.status == 201, posted
        kernel_id = posted.body["kernel"]["id"]
        async with gateway.client(kernel_id, "page") as page:
            await page.run("a = 'kept'")
            running = await page.execute("import time; print('begun', flush=True); time.sleep(5); print('end')")
            await page.until(lambda: text(page.of(running)))
            process = gateway.process
            assert process.process is not None
            if how == "killed":
                process.process.kill()
                await asyncio.to_thread(process.process.wait)
            else:
                assert await asyncio.to_thread(process.stop) == 0
            await asyncio.wait_for(page.ended.wait(), 30)
            if how == "upgraded":
                assert page.closed_with[0] == 1012
        await asyncio.to_thread(process.start)
        assert (await gateway.becomes(kernel_id, "busy"))["connections"] == 0
        async with gateway.client(kernel_id, "page") as page:
            told = await page.finish(running)
            assert text(told).endswith("end\n"), told
            assert "the gateway was restarted while this cell ran" in text(told, "stderr")
            (reply,) = [each for each in told if each["header"]["msg_type"] == "execute_reply"]
            assert reply["content"]["status"] == "ok"
            assert text(await page.run("print(a)")) == "kept\n"
        assert (await gateway.model(kernel_id))["execution_state"] == "idle"
        (session,) = (await gateway.call("GET", "/api/sessions")).body
        assert (session["id"], session["path"]) == (posted.body["id"], "a.ipynb")
        assert (await gateway.call("DELETE", f"/api/sessions/{session['id']}")).status == 204


@pytest.mark.parametrize("how", ["restarted", "died"])
async def test_a_gateway_that_is_killed_in_mid_restart_leaves_a_kernel_that_is_known(
    directory: Path, docker_url_or_none: str | None, how: str
) -> None:
    # With one place the next sandbox starts when the former one is gone: between them there is none for a while.
    async with served(directory, docker_url_or_none, **ONE_PLACE) as gateway:
        kernel_id = await gateway.start()
        async with gateway.client(kernel_id) as one:
            await one.run("a = 1")
            if how == "restarted":
                asking = asyncio.create_task(gateway.call("POST", f"/api/kernels/{kernel_id}/restart"))
                await gateway.becomes(kernel_id, "starting")
            else:
                await one.execute("import os; os.kill(os.getpid(), 9)")
                await gateway.becomes(kernel_id, "restarting")
            await asyncio.sleep(0.05)
            process = gateway.process
            assert process.process is not None
            process.process.kill()
            await asyncio.to_thread(process.process.wait)
            if how == "restarted":
                await asyncio.gather(asking, return_exceptions=True)
        await asyncio.to_thread(process.start)
        model = await gateway.model(kernel_id)
        if model["execution_state"] == "dead":
            assert model["samovar_exit"]["cause"] == "gateway"
            assert (await gateway.call("POST", f"/api/kernels/{kernel_id}/restart")).status == 200
        await gateway.becomes(kernel_id, "idle")
        async with gateway.client(kernel_id) as one:
            assert text(await one.run("print('a' in globals())")) in ("True\n", "False\n")
        pool = await asyncio.to_thread(process.pool)
        assert (pool["claimed"], len(list(process.runtime.glob("????????/*.json")))) == (1, 1)


async def test_an_unused_kernel_is_culled(directory: Path) -> None:
    settings = {
        "SAMOVAR_JUPYTER_SETTINGS_CULL_IDLE_TIMEOUT": "2",
        "SAMOVAR_JUPYTER_SETTINGS_CULL_INTERVAL": "0.2",
        "SAMOVAR_JUPYTER_SETTINGS_CULL_CONNECTED": "true",
    }
    async with served(directory, None, **settings) as gateway:
        kernel_id = await gateway.start()
        async with gateway.client(kernel_id) as one:
            msg_id = await one.execute("print(1)")
            await one.finish(msg_id)
            await asyncio.wait_for(one.ended.wait(), 30)
            assert text(one.of(msg_id), "stderr") == "The kernel was not used for 2 s and was shut down.\n"
            assert one.closed_with == (4410, "The kernel was not used for 2 s and was shut down.")
        model = await gateway.model(kernel_id)
        assert (model["execution_state"], model["samovar_exit"]["cause"]) == ("dead", "idle")
        assert model["reason"] == "The kernel was not used for 2 s and was shut down."
