"""DockerLauncher on the real engine: what a container may do, why it ended, and what is left of it.

Most tests use a stand-in for the kernel image, whose PID 1 runs the program that its environment names, so that each
way of dying is exact; the last ones use the real image and its supervisor.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import docker
import pytest

from kernelprovisioner.images import KernelImage, Limits, find_image
from kernelprovisioner.launchers import make_launcher
from kernelprovisioner.launchers.base import EngineUnavailable, Launched, LaunchError, LaunchRequest
from kernelprovisioner.launchers.docker import DockerLauncher
from kernelprovisioner.runtime import RuntimeRoot
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from kernelprovisioner.supervisor import SupervisorClient

pytestmark = pytest.mark.service

ROOT = Path(__file__).parents[2]
WAIT = "import signal; signal.pause()"
# PID 1 must survive what kills its child, as the supervisor does.
DYING_CHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); import signal; signal.pause()"
EAT = "data = bytearray(); [data.extend(b'x' * 1048576) for _ in range(4096)]"


@pytest.fixture(scope="module")
def standin(docker_url: str, kernel_image: str) -> Iterator[KernelImage]:
    """A kernel image whose PID 1 runs the environment's PROGRAM."""
    dockerfile = (
        f"FROM samovar/{kernel_image}:latest\n"
        'ENTRYPOINT ["/opt/kernel/bin/python", "-IBc", "import os; exec(os.environ[\'PROGRAM\'])"]\n'
    )
    client = docker.DockerClient(base_url=docker_url)
    client.images.build(
        fileobj=io.BytesIO(dockerfile.encode()),
        tag="samovar/standin:latest",
        network_mode="none",
        rm=True,
        forcerm=True,
    )
    image = find_image(kernel_image)
    limits = Limits(memory_mb=32, cpus=0.5, pids=20, open_files=256, work_mb=8, tmp_mb=4, shm_mb=4)
    yield replace(image, name="standin", limits=limits)
    client.images.remove("samovar/standin:latest", force=True)
    client.close()


@pytest.fixture
def engine(docker_url: str) -> Iterator[Any]:
    client = docker.DockerClient(base_url=docker_url)
    yield client
    client.close()


class Started:
    """A started launcher and the exits that it told."""

    def __init__(self, launcher: DockerLauncher) -> None:
        self.launcher = launcher
        self.exits: asyncio.Queue[tuple[str, SandboxExit]] = asyncio.Queue()

    async def run(self, image: KernelImage, program: str = WAIT, mount: Path | None = None) -> Launched:
        image = replace(image, environment={"PROGRAM": program})
        return await self.launcher.launch(LaunchRequest(secrets.token_hex(8), image, mount))

    async def exit_of(self, launched: Launched) -> SandboxExit:
        sandbox_id, verdict = await asyncio.wait_for(self.exits.get(), 10)
        assert sandbox_id == launched.sandbox_id
        return verdict


@pytest.fixture
def launching(docker_url: str, short_directory: Path) -> Callable[..., Any]:
    @asynccontextmanager
    async def started(**traits: Any) -> AsyncIterator[Started]:
        launcher = DockerLauncher(RuntimeRoot.open(short_directory / "run"), docker_url=docker_url, **traits)
        result = Started(launcher)
        await launcher.start(lambda sandbox_id, verdict: result.exits.put_nowait((sandbox_id, verdict)))
        try:
            yield result
        finally:
            await launcher.stop()

    return started


def inside(engine: Any, launched: Launched, code: str) -> Any:
    """Run code in the container and return the JSON value that it prints."""
    command = ["/opt/kernel/bin/python", "-c", f"import json, os, sys, socket, errno\n{code}"]
    result = engine.containers.get(launched.runtime_id).exec_run(command)
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


async def until(condition: Callable[[], bool]) -> None:
    """Return once the condition holds. Raises TimeoutError after 10 s."""
    deadline = time.monotonic() + 10
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        await asyncio.sleep(0.02)


async def test_what_a_sandbox_is_locked_out_of(
    launching: Callable[..., Any], standin: KernelImage, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_GATEWAY", "hidden")
    async with launching() as started:
        launched = await started.run(standin)
        facts = inside(
            engine,
            launched,
            """
def attempt(function, *arguments):
    try:
        function(*arguments)
        return "possible"
    except OSError as error:
        return errno.errorcode[error.errno]
status = dict(line.rstrip().split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
def fill(directory):
    path = os.path.join(directory, "filler")
    try:
        with open(path, "wb", buffering=0) as file:
            while file.write(b"x" * 65536): pass
    except OSError as error:
        size = os.path.getsize(path)
        os.unlink(path)
        return [errno.errorcode[error.errno], size >> 20]
print(json.dumps({
    "uid": os.getuid(), "gid": os.getgid(), "groups": os.getgroups(), "hostname": socket.gethostname(),
    "capabilities": {name: status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")},
    "no_new_privs": status["NoNewPrivs"], "seccomp": status["Seccomp"],
    "interfaces": [name for _, name in socket.if_nameindex()],
    "connect": attempt(socket.create_connection, ("192.0.2.1", 80), 2),
    "root": attempt(open, "/new", "w"), "image": attempt(open, "/opt/kernel/new", "w"),
    "resolv": attempt(open, "/etc/resolv.conf", "a"),
    "full": {name: fill(name) for name in ("/tmp", "/mnt/data", "/dev/shm")},
    "setuid": attempt(os.setuid, 0), "chmod": attempt(os.chmod, "/samovar", 0o777),
    "environment": dict(os.environ), "mounts": open("/proc/self/mountinfo").read(),
    "cpus": os.environ["OMP_NUM_THREADS"],
}))
""",
        )
        assert facts["uid"] == facts["gid"] == 10001 != os.getuid()
        assert facts["groups"] in ([], [10001])
        assert facts["hostname"] == "sandbox"
        assert set(facts["capabilities"].values()) == {"0" * 16}
        assert (facts["no_new_privs"], facts["seccomp"]) == ("1", "2")
        assert facts["interfaces"] == ["lo"]
        assert facts["connect"] == "ENETUNREACH"
        assert facts["root"] == facts["image"] == "EROFS"
        assert facts["resolv"] in ("EROFS", "EACCES")
        assert {name: reason for name, (reason, _) in facts["full"].items()} == dict.fromkeys(facts["full"], "ENOSPC")
        # Some kilobytes of /tmp may be taken already.
        assert [size for _, size in facts["full"].values()] in ([4, 8, 4], [3, 8, 4])
        assert facts["setuid"] == facts["chmod"] == "EPERM"
        assert facts["cpus"] == "1"
        assert "hidden" not in json.dumps(facts)
        assert "docker.sock" not in facts["mounts"]
        config = engine.containers.get(launched.runtime_id).attrs["HostConfig"]
        assert config["Memory"] == config["MemorySwap"] == 48 * 2**20
        assert (config["PidsLimit"], config["NanoCpus"], config["Init"]) == (20, 500_000_000, False)
        assert config["LogConfig"]["Config"] == {"max-file": "1", "max-size": "256k"}
        assert config["CpuShares"] == 128
        await started.launcher.warmed(launched)
        assert engine.containers.get(launched.runtime_id).attrs["HostConfig"]["CpuShares"] == 1024
        await started.launcher.destroy(launched)
        await started.launcher.warmed(launched)


async def test_many_empty_files_end_in_enospc(launching: Callable[..., Any], standin: KernelImage, engine: Any) -> None:
    async with launching() as started:
        launched = await started.run(standin)
        code = """
count = 0
try:
    while True:
        open(f"/mnt/data/{count}", "w").close()
        count += 1
except OSError as error:
    print(json.dumps([errno.errorcode[error.errno], count]))
"""
        reason, count = inside(engine, launched, code)
        assert reason == "ENOSPC" and 4000 < count < 4100
        assert not started.launcher.was_out_of_memory(launched, within=60)


async def test_processes_are_limited(launching: Callable[..., Any], standin: KernelImage, engine: Any) -> None:
    async with launching() as started:
        launched = await started.run(standin)
        code = """
import subprocess
children = []
try:
    while len(children) < 100:
        children.append(subprocess.Popen(["sleep", "5"]))
except OSError as error:
    print(json.dumps([errno.errorcode[error.errno], len(children)]))
for child in children: child.kill(); child.wait()
"""
        reason, count = inside(engine, launched, code)
        assert reason == "EAGAIN" and 10 <= count < 20


@pytest.mark.parametrize(
    ("program", "cause", "code", "signum"),
    [
        ("import os; os._exit(3)", ExitCause.EXITED, 3, None),
        ("import sys; sys.exit(0)", ExitCause.EXITED, 0, None),
        ("import os; os._exit(139)", ExitCause.SIGNAL, None, 11),
        (EAT, ExitCause.OUT_OF_MEMORY, 137, 9),
        ("import os; os._exit(137)", ExitCause.SIGNAL, None, 9),
    ],
)
async def test_why_pid_1_ended(
    launching: Callable[..., Any],
    standin: KernelImage,
    program: str,
    cause: ExitCause,
    code: int | None,
    signum: int | None,
) -> None:
    async with launching() as started:
        # The pause lets launch() return first, else the end is a LaunchError.
        launched = await started.run(standin, f"import time; time.sleep(1)\n{program}")
        verdict = await started.exit_of(launched)
        assert (verdict.cause, verdict.exit_code, verdict.signal) == (cause, code, signum)
        if cause is ExitCause.OUT_OF_MEMORY:
            assert verdict.evidence["limit_mb"] == 48
        await started.launcher.destroy(launched)
        assert started.exits.empty(), "each exit is told once"


async def test_a_child_out_of_memory_is_counted_while_pid_1_lives(
    launching: Callable[..., Any], standin: KernelImage
) -> None:
    async with launching() as started:
        launched = await started.run(standin, DYING_CHILD.format(child=EAT))
        await until(lambda: started.launcher.was_out_of_memory(launched, within=60))
        assert started.exits.empty()


@pytest.mark.parametrize("how", ["kill", "remove", "stop", "signal"])
async def test_somebody_else_ends_it(
    launching: Callable[..., Any], standin: KernelImage, engine: Any, how: str
) -> None:
    async with launching() as started:
        launched = await started.run(standin, f"print('ready', flush=True); {WAIT}")
        container = engine.containers.get(launched.runtime_id)
        # PID 1 is deaf to signals until Python has taken them over.
        await until(lambda: bool(container.logs()))
        actions: dict[str, Callable[[], Any]] = {
            "kill": container.kill,
            "remove": lambda: container.remove(force=True),
            "stop": lambda: container.stop(timeout=1),
            "signal": lambda: container.kill("SIGINT"),
        }
        begin = time.monotonic()
        await asyncio.to_thread(actions[how])
        verdict = await started.exit_of(launched)
        assert time.monotonic() - begin < 5
        assert verdict.cause is ExitCause.REMOVED
        assert str(verdict) == "The sandbox was killed or removed from outside."
        await started.launcher.destroy(launched)
        assert not launched.directory.exists()


async def test_what_we_destroy_ourselves_is_not_told(
    launching: Callable[..., Any], standin: KernelImage, engine: Any
) -> None:
    async with launching() as started:
        launched = await started.run(standin)
        await asyncio.gather(*(started.launcher.destroy(launched) for _ in range(3)))
        with pytest.raises(docker.errors.NotFound):
            engine.containers.get(launched.runtime_id)
        assert not launched.directory.exists()
        await started.launcher.destroy(launched)
        await asyncio.sleep(0.7)
        assert started.exits.empty()


async def test_a_cancelled_launch_leaves_nothing(
    launching: Callable[..., Any], standin: KernelImage, engine: Any
) -> None:
    async with launching() as started:
        for pause in (0.0, 0.02, 0.1, 0.2):
            task = asyncio.create_task(started.run(standin))
            await asyncio.sleep(pause)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        owner = started.launcher.owner.path
    assert not owner.exists()
    assert not engine.containers.list(all=True, filters={"label": f"com.samovar.owner={owner}"})


async def test_failed_launches_say_why_and_leave_nothing(
    launching: Callable[..., Any], standin: KernelImage, engine: Any, short_directory: Path
) -> None:
    async with launching() as started:
        with pytest.raises(LaunchError, match=r"samovar/absent:latest does not exist.*samovar images build absent$"):
            await started.run(replace(standin, name="absent"))
        with pytest.raises(LaunchError, match=r"the engine could not start a sandbox of standin: .*emory"):
            await started.run(replace(standin, limits=Limits(memory_mb=1, work_mb=1, tmp_mb=1, shm_mb=1)))
        with pytest.raises(LaunchError, match="cannot be mounted: No such file"):
            await started.run(standin, mount=short_directory / "absent")
        program = "import sys; sys.exit('no kernel today')"
        try:
            launched = await started.run(standin, program)
        except LaunchError as error:
            assert str(error) == "the sandbox ended at once (exit code 1): no kernel today"
        else:
            assert (await started.exit_of(launched)).evidence == {"reason": "no kernel today"}
            await started.launcher.destroy(launched)
        assert started.launcher.owner.sandbox_ids() == []
        owner = started.launcher.owner.path
        assert not engine.containers.list(all=True, filters={"label": f"com.samovar.owner={owner}"})


async def test_a_mounted_work_directory(
    launching: Callable[..., Any], standin: KernelImage, engine: Any, short_directory: Path
) -> None:
    mount = short_directory / "my data: 2"
    mount.mkdir()
    (mount / "in.txt").write_text("hello")
    os.chown(mount, -1, 4242) if os.getuid() == 0 else None
    mount.chmod(0o2770)
    async with launching() as started:
        launched = await started.run(standin, mount=mount)
        code = "open('/mnt/data/out.txt', 'w').write(open('/mnt/data/in.txt').read()); print(json.dumps(os.getgid()))"
        assert inside(engine, launched, code) == mount.stat().st_gid
    assert (mount / "out.txt").read_text() == "hello"
    assert (mount / "out.txt").stat().st_uid == 10001
    mount.chmod(0o700)
    async with launching() as started:
        with pytest.raises(LaunchError, match=r"its group may not read it; run `chmod g\+rwxs"):
            await started.run(standin, mount=mount)


async def test_no_engine_is_one_sentence(short_directory: Path) -> None:
    runtime = RuntimeRoot.open(short_directory / "run")
    launcher = DockerLauncher(runtime, docker_url=f"unix://{short_directory}/absent.sock")
    with pytest.raises(
        EngineUnavailable, match=r"^no container engine answers at unix://\S+: there is no such socket; start Docker"
    ):
        await launcher.start(lambda *_: None)
    assert [entry.name for entry in runtime.path.iterdir()] == ["k"]


OTHER_GATEWAY = """
import asyncio, sys
from dataclasses import replace
from pathlib import Path
from kernelprovisioner.images import find_image
from kernelprovisioner.launchers.base import LaunchRequest
from kernelprovisioner.launchers.docker import DockerLauncher
from kernelprovisioner.runtime import RuntimeRoot

async def main(url, directory, program):
    launcher = DockerLauncher(RuntimeRoot.open(directory), docker_url=url, transport="tcp")
    await launcher.start(lambda *_: None)
    image = replace(find_image("python"), name="standin", environment={"PROGRAM": program})
    launched = await launcher.launch(LaunchRequest("0123456789abcdef", image))
    print(launcher.owner.path, launched.runtime_id, flush=True)
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("same_root", [True, False])
async def test_only_the_dead_are_reaped(
    launching: Callable[..., Any],
    standin: KernelImage,
    engine: Any,
    docker_url: str,
    short_directory: Path,
    same_root: bool,
) -> None:
    root = short_directory / ("run" if same_root else "other")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernel-images'}"}
    other = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", OTHER_GATEWAY, docker_url, str(root), WAIT),
        stdout=subprocess.PIPE,
        env=environment,
    )
    try:
        assert other.stdout is not None
        owner, container_id = (await asyncio.wait_for(other.stdout.readline(), 30)).decode().split()
        labels = {"com.samovar.managed": "true", "com.samovar.owner": f"{short_directory}/unseen/aaaaaaaa"}
        command = ["/bin/sleep", "60"]
        unseen = engine.containers.create("samovar/standin:latest", entrypoint=command, labels=labels)
        try:
            async with launching():
                assert engine.containers.get(container_id).status == "running"
                assert engine.containers.get(unseen.id)
                assert engine.networks.list(names=[f"samovar-{Path(owner).name}"])
            assert Path(owner).is_dir()
            other.kill()
            await other.wait()
            async with launching():
                with pytest.raises(docker.errors.NotFound):
                    engine.containers.get(container_id)
                assert not engine.networks.list(names=[f"samovar-{Path(owner).name}"])
                assert Path(owner).exists() is not same_root
                assert engine.containers.get(unseen.id)
        finally:
            unseen.remove(force=True)
    finally:
        if other.returncode is None:
            other.kill()
            await other.wait()


async def test_what_the_engine_has_and_nobody_knows_is_removed(
    launching: Callable[..., Any], standin: KernelImage, engine: Any
) -> None:
    async with launching() as started:
        launched = await started.run(standin)
        lost = started.launcher._containers.pop(launched.sandbox_id)
        started.launcher._look_again.set()
        label = f"com.samovar.sandbox={lost.sandbox_id}"
        await until(lambda: not engine.containers.list(all=True, filters={"label": label}))


async def test_a_death_whose_events_were_lost_is_found(
    launching: Callable[..., Any], standin: KernelImage, engine: Any
) -> None:
    async with launching() as started:
        dead, gone = await started.run(standin), await started.run(standin)
        await started.launcher._watch.stop()
        engine.containers.get(dead.runtime_id).kill()
        started.launcher._look_again.set()
        verdict = await started.exit_of(dead)
        assert verdict.cause is ExitCause.REMOVED
        engine.containers.get(gone.runtime_id).remove(force=True)
        started.launcher._look_again.set()
        verdict = await started.exit_of(gone)
        assert verdict.cause is ExitCause.REMOVED


async def test_the_event_stream_is_connected_again(
    launching: Callable[..., Any], standin: KernelImage, engine: Any
) -> None:
    async with launching() as started:
        launched = await started.run(standin)
        started.launcher._watch._close_stream()
        engine.containers.get(launched.runtime_id).kill()
        assert (await started.exit_of(launched)).cause is ExitCause.REMOVED


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
async def test_the_real_supervisor_answers(
    launching: Callable[..., Any], kernel_image: str, engine: Any, transport: str
) -> None:
    async with launching(transport=transport) as started:
        image = replace(find_image(kernel_image), preload=())
        launched = await started.launcher.launch(LaunchRequest(secrets.token_hex(8), image))
        assert launched.transport == transport
        assert set(launched.channels) == {"shell", "iopub", "stdin", "control", "hb"}
        client = await SupervisorClient.connect(launched.supervisor, launched.token, timeout=20)
        header, _ = await client.request("stats")
        assert header["rss"] > 0
        client.close()
        if transport == "tcp":
            bindings = engine.containers.get(launched.runtime_id).attrs["NetworkSettings"]["Ports"]
            assert {outer["HostIp"] for outers in bindings.values() for outer in outers} == {"127.0.0.1"}


async def test_auto_takes_the_engine_that_answers(docker_url: str, short_directory: Path, monkeypatch: Any) -> None:
    runtime = RuntimeRoot.open(short_directory / "run")
    monkeypatch.setenv("DOCKER_BASE_URL", docker_url)
    assert (await make_launcher("auto", runtime)).name == "docker"
    monkeypatch.setenv("DOCKER_BASE_URL", f"unix://{short_directory}/absent.sock")
    assert (await make_launcher("auto", runtime)).name == "process"
