"""What becomes of sessions and pool when the disk of the runtime directory, of the data or of /tmp is full."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway_process import GatewayProcess
from tests.proxies import DelayingProxy
from tests.waiting import until

pytestmark = [
    pytest.mark.service,
    pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting needs root on Linux"),
]

SETTINGS = {"CONTAINER_POOL_PY_MIN": "1", "CONTAINER_POOL_PY_MAX": "4"}
SMALL = "size=64m,nr_inodes=800,mode=0700"


@pytest.fixture
def directory() -> Iterator[Path]:
    """Not in /tmp, which a test may hide."""
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/run") as path:
        yield Path(path)


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A file system of its own at `path`, small enough to be filled."""
    path.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", SMALL, "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@contextlib.contextmanager
def full(disk: Path, what: str) -> Iterator[None]:
    """No room on `disk` for `bytes` or for `files`, until the end of the block."""
    made: list[Path] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                filler = disk / f"filler-{len(made)}"
                with filler.open("wb", buffering=0) as file:
                    made.append(filler)
                    while what == "bytes":
                        # Less than asked for is written at the end: then nothing.
                        file.write(b"\0" * 4096)
        assert made
        yield
    finally:
        for filler in made:
            filler.unlink(missing_ok=True)


@contextlib.contextmanager
def serving(gateway: GatewayProcess) -> Iterator[GatewayProcess]:
    """It runs and has a warm sandbox; in the end it must stop in order."""
    gateway.start()
    try:
        until(lambda: gateway.pool()["warm"] >= 1)
        yield gateway
    finally:
        code = gateway.stop()
    assert code == 0, gateway.log.read_text()
    assert "Traceback" not in gateway.log.read_text()


def services(gateway: GatewayProcess) -> dict[str, Any]:
    found: dict[str, Any] = gateway.call("GET", "/health/detailed").body["services"]
    return found


def heals(gateway: GatewayProcess) -> None:
    """By itself, without a restart: all is well, and a new session gets a warm sandbox."""
    until(lambda: gateway.pool()["warm"] >= 1)
    until(lambda: gateway.call("GET", "/health/detailed").body["status"] == "healthy")
    assert gateway.exec("print('healed')")["stdout"] == "healed\n"


@pytest.mark.parametrize("what", ["files", "bytes"])
def test_a_full_runtime_directory(docker_url: str, kernel_image: str, directory: Path, what: str) -> None:
    with small_disk(directory / "run") as disk, serving(GatewayProcess(directory, docker_url, SETTINGS)) as gateway:
        session = gateway.exec("x = 41")["session_id"]
        until(lambda: gateway.pool()["warm"] >= 1)
        with full(disk, what):
            assert gateway.exec("print('new')")["stdout"] == "new\n"  # the warm one
            assert gateway.exec("print(x + 1)", session)["stdout"] == "42\n"
            found = services(gateway)["directory:runtime"]
            assert found["status"] == "unhealthy" and os.strerror(errno.ENOSPC) in found["error"]
            assert str(disk) in found["remedy"]
            if what == "files":
                # No directory can be made for the successor of the warm one.
                until(lambda: gateway.pool()["failures_in_a_row"] > 0)
                assert os.strerror(errno.ENOSPC) in services(gateway)["pool:python"]["error"]
                assert gateway.exec("print(x + 2)", session)["stdout"] == "43\n"
        heals(gateway)


@pytest.mark.parametrize("what", ["files", "bytes"])
def test_a_full_data_directory(docker_url: str, kernel_image: str, directory: Path, what: str) -> None:
    with small_disk(directory / "data") as disk, serving(GatewayProcess(directory, docker_url, SETTINGS)) as gateway:
        session = gateway.exec("x = 41")["session_id"]
        with full(disk, what):
            assert gateway.exec("print(x + 1)", session)["stdout"] == "42\n"
            assert gateway.exec("print('new')")["stdout"] == "new\n"
            found = services(gateway)["directory:data"]
            assert found["status"] == "degraded" and os.strerror(errno.ENOSPC) in found["error"]
        heals(gateway)


def test_a_full_tmp_of_the_host(docker_url: str, kernel_image: str, directory: Path) -> None:
    # Over the real one, since this checkout or its interpreter may live there: what is new goes to a small disk.
    disk = directory / "disk"
    disk.mkdir()
    mount = (
        f"mount --make-rprivate / && mount -t tmpfs -o {SMALL} tmpfs {disk} && mkdir {disk}/upper {disk}/work &&"
        f' mount -t overlay -o lowerdir=/tmp,upperdir={disk}/upper,workdir={disk}/work overlay /tmp && exec "$@"'
    )
    # The engine's socket may be in /tmp.
    proxy = DelayingProxy(directory / "engine.sock", Path(docker_url.removeprefix("unix://")))
    own_tmp = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    with proxy, serving(GatewayProcess(directory, proxy.url, SETTINGS, starter=own_tmp)) as gateway:
        assert gateway.process is not None
        tmp = Path(f"/proc/{gateway.process.pid}/root/tmp")
        for what in ("files", "bytes"):
            with full(tmp, what):
                session = gateway.exec("x = 41")["session_id"]
                until(lambda: gateway.pool()["warm"] >= 1)  # new sandboxes can be started all the same
                assert gateway.exec("open('/tmp/own', 'w').write('x')\nprint(x + 1)", session)["stdout"] == "42\n"
                found = services(gateway)["directory:temporary"]
                assert found["status"] == "degraded" and os.strerror(errno.ENOSPC) in found["error"]
            heals(gateway)


@pytest.mark.parametrize("name", ["run", "data"])
def test_a_start_on_a_full_disk_is_refused_in_one_sentence(docker_url: str, directory: Path, name: str) -> None:
    gateway = GatewayProcess(directory, docker_url, {**SETTINGS, "API_KEY": ""})
    gateway.runtime.rmdir()
    with small_disk(directory / name) as disk, full(disk, "files"), full(disk, "bytes"):
        command = [sys.executable, "-m", "gateway.cli", "serve"]
        ended = subprocess.run(
            command, env=gateway.environment, cwd=directory, capture_output=True, text=True, timeout=60
        )
    said = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode in (69, 73), ended.stderr
    assert said.startswith("samovar serve: ") and os.strerror(errno.ENOSPC) in said, ended.stderr
    assert "Traceback" not in ended.stderr
