"""What a kernel gets of its caller's place: files, environment, paths; and that nothing of it stays."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.manager import AsyncKernelManager

from kernelprovisioner.provisioner import SandboxProvisioner
from tests.conformance.conftest import Place
from tests.conformance.test_restart import output_of

pytestmark = pytest.mark.conformance


@asynccontextmanager
async def kernel(
    place: Place, config: dict[str, Any] | None = None, **kwargs: Any
) -> AsyncIterator[tuple[AsyncKernelManager, AsyncKernelClient]]:
    """A kernel with its client; `config` is the kernelspec's for the provisioner."""
    manager = AsyncKernelManager(kernel_name="sandbox")
    if config:
        manager.kernel_spec.metadata["kernel_provisioner"]["config"].update(config)
    await manager.start_kernel(**{"cwd": str(place.directory), **kwargs})
    client = manager.client()
    client.start_channels()
    try:
        await client.wait_for_ready(timeout=30)
        yield manager, client
    finally:
        client.stop_channels()
        await manager.shutdown_kernel()


async def until(true: Callable[[], bool]) -> None:
    """Wait until something on the disk has come true."""
    for _ in range(250):
        if true():
            return
        await asyncio.sleep(0.02)
    pytest.fail("it did not come true within 5 s")


async def test_the_environment_is_only_what_was_added(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVERS_OWN_SECRET", "s3cret")
    given = {**os.environ, "DATA_URL": "db://x", "LD_PRELOAD": "/evil.so", "JPY_SESSION_NAME": "dir/nb.ipynb"}
    async with kernel(place, env=given) as (_, client):
        printed = await output_of(client, "import os\nfor item in sorted(os.environ.items()): print(*item)")
        assert "DATA_URL db://x" in printed
        for word in ("s3cret", "LD_PRELOAD", "SAMOVAR", "DOCKER", "JPY_", str(place.directory)):
            assert word not in printed
        assert await output_of(client, "print(__session__)") == "dir/nb.ipynb\n"


async def test_files_go_in_and_come_back_after_each_cell(place: Place) -> None:
    (place.directory / "sub").mkdir()
    (place.directory / "sub" / "in.csv").write_text("1,2")
    (place.directory / ".secret").write_text("x")
    async with kernel(place) as (_, client):
        assert await output_of(client, "print(open('sub/in.csv').read())") == "1,2\n"
        assert "secret" not in await output_of(client, "import os; print(os.listdir())")
        await output_of(client, "open('sub/out.csv', 'w').write('3,4')")
        await until(lambda: (place.directory / "sub" / "out.csv").exists())
        assert (place.directory / "sub" / "out.csv").read_text() == "3,4"
        (place.directory / "sub" / "in.csv").write_text("changed here")
        await output_of(client, "open('sub/in.csv', 'w').write('changed there')")
    assert (place.directory / "sub" / "in.csv").read_text() == "changed here"
    assert (place.directory / "sub" / "in.sandbox.csv").read_text() == "changed there"


async def test_what_was_left_out_is_told_in_the_first_cell(place: Place) -> None:
    (place.directory / "link").symlink_to("/etc/passwd")
    async with kernel(place) as (_, client):
        assert "left out: 1 links" in await output_of(client, "1")
        assert await output_of(client, "2") == ""


async def test_the_home_directory_is_refused_with_a_notice(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    (place.directory / "private.txt").write_text("x")
    monkeypatch.setenv("HOME", str(place.directory))
    async with kernel(place) as (_, client):
        printed = await output_of(client, "import os; print(os.listdir())")
        assert "home directory" in printed and printed.endswith("[]\n")


async def test_empty(place: Place) -> None:
    (place.directory / "a.txt").write_text("x")
    async with kernel(place, {"work_directory": "empty"}) as (_, client):
        assert await output_of(client, "import os; print(os.listdir()); open('b.txt', 'w').close()") == "[]\n"
    assert sorted(os.listdir(place.directory)) == ["a.txt"]


async def test_mount(place: Place) -> None:
    (place.directory / "a.txt").write_text("x")
    (place.directory / "a.txt").chmod(0o644)
    place.directory.chmod(0o777)
    async with kernel(place, {"work_directory": "mount"}) as (manager, client):
        assert manager.provisioner.claim_source in ("cold", "gateway-cold", "gateway-started")
        assert await output_of(client, "import os; print(os.listdir()); open('b.txt', 'w').write('y')") != ""
        assert (place.directory / "b.txt").read_text() == "y", "it is the directory itself"


async def test_paths_are_resolved_within_the_directory_only(place: Place) -> None:
    (place.directory / "a.py").write_text("")
    (place.directory / "out").symlink_to("/etc")
    async with kernel(place) as (manager, _):
        assert manager.resolve_path("a.py") == str((place.directory / "a.py").resolve())
        for path in ("missing.py", "../run", "/etc/passwd", "out/passwd", "~/x"):
            assert manager.resolve_path(path) is None


async def test_signals_and_exit_codes(place: Place) -> None:
    async with kernel(place) as (manager, _):
        provisioner = manager.provisioner
        assert isinstance(provisioner, SandboxProvisioner)
        assert await provisioner.poll() is None and provisioner.has_process
        await provisioner.kill()
        assert await asyncio.wait_for(provisioner.wait(), 10) != 0
        assert not provisioner.has_process and await provisioner.poll() == 0


async def test_encryption_that_cannot_be_had_is_refused(place: Place) -> None:
    manager = AsyncKernelManager(kernel_name="sandbox", transport_encryption="required")
    manager.kernel_spec.metadata["supported_encryption"] = "curve"
    with pytest.raises(RuntimeError, match="transport_encryption='required' does not work"):
        await manager.start_kernel(cwd=str(place.directory))
    await manager.cleanup_resources()


async def test_cleanup_without_a_launch_and_twice(place: Place) -> None:
    manager = AsyncKernelManager(kernel_name="sandbox")
    provisioner = SandboxProvisioner(kernel_id="k", kernel_spec=manager.kernel_spec, parent=manager)
    await provisioner.cleanup()
    await provisioner.cleanup(restart=True)
    assert await provisioner.poll() == 0 and await provisioner.wait() == 0
    await provisioner.kill()
    await provisioner.send_signal(2)


async def test_an_unknown_image_is_one_clear_sentence(place: Place) -> None:
    manager = AsyncKernelManager(kernel_name="sandbox")
    manager.kernel_spec.metadata["kernel_provisioner"]["config"]["image"] = "cobol"
    with pytest.raises(Exception, match="no kernel image 'cobol'"):
        await manager.start_kernel(cwd=str(place.directory))
    await manager.cleanup_resources()


async def test_nothing_is_left(place: Place) -> None:
    async with kernel(place):  # what a first kernel loads stays loaded
        pass
    threads = set(threading.enumerate())
    descriptors = set(os.listdir("/proc/self/fd"))
    async with kernel(place) as (_, client):
        await output_of(client, "open('x', 'w').write('x')")
    assert set(threading.enumerate()) <= threads
    assert len(os.listdir("/proc/self/fd")) <= len(descriptors)
    assert not Path(place.environment["SAMOVAR_RUNTIME_DIR"], "k").is_symlink()
