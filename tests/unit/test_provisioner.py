"""What the provisioner launches where no gateway runs: above all that no code leaves its container unasked."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import KernelManager
from jupyter_client.session import Session

from kernelprovisioner import provisioner as module
from kernelprovisioner.claims import NoGateway
from kernelprovisioner.held import Wanted
from kernelprovisioner.launchers.base import EngineUnavailable
from kernelprovisioner.provisioner import NOT_ISOLATED, SandboxProvisioner
from kernelprovisioner.runtime import ENVIRONMENT_NAME


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Wanted]]:
    """What was launched, with no gateway and no container engine."""
    found: list[Wanted] = []

    async def no_gateway(path: Path, wanted: Wanted) -> Any:
        raise NoGateway(str(path))

    async def make_launcher(kind: str, root: Any) -> Any:
        if kind == "docker":
            raise EngineUnavailable("no container engine answers")
        return SimpleNamespace(name="process")

    async def launch(launcher: Any, image: Any, wanted: Wanted) -> Any:
        found.append(wanted)

    monkeypatch.setattr(module.GatewaySandbox, "claim", no_gateway)
    monkeypatch.setattr(module, "make_launcher", make_launcher)
    monkeypatch.setattr(module.OwnSandbox, "launch", launch)
    # Not tmp_path: paths of sockets must be short.
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as directory:
        monkeypatch.setenv(ENVIRONMENT_NAME, directory)
        yield found


WANTED = Wanted("python", "k", b"key", {}, notice="left out: 1 links\n")


async def test_a_fall_back_to_plain_processes_is_told_in_the_first_cell(launched: list[Wanted]) -> None:
    await SandboxProvisioner(kernel_id="k", launcher="auto")._make(WANTED)
    assert launched[0].notice == NOT_ISOLATED + "left out: 1 links\n"


async def test_who_asked_for_plain_processes_is_told_nothing(launched: list[Wanted]) -> None:
    await SandboxProvisioner(kernel_id="k", launcher="process")._make(WANTED)
    assert launched == [WANTED]


async def test_a_kernel_that_was_isolated_is_not_restarted_as_a_plain_process(launched: list[Wanted]) -> None:
    provisioner = SandboxProvisioner(kernel_id="k", launcher="auto")
    provisioner._isolated_before = True
    with pytest.raises(EngineUnavailable):
        await provisioner._make(WANTED)
    assert launched == []


async def test_a_kernel_without_a_signing_key_is_refused() -> None:
    manager = KernelManager(session=Session(key=b""))
    provisioner = SandboxProvisioner(parent=manager, kernel_id="some", kernel_spec=KernelSpec())
    with pytest.raises(RuntimeError, match=r"Session\.key is empty"):
        await provisioner.pre_launch(env={})
