"""@jupyterlab/services, the library that JupyterLab and VS Code speak through, driven by node/services.mjs."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import services
from tests.gateway_process import GatewayProcess

pytestmark = pytest.mark.conformance

PROJECT = Path(__file__).parent / "node"
SCRIPT = PROJECT / "services.mjs"
#: all checks of the script, in its order: one that is left out there is missed here
CHECKS = (
    "kernelspecs",
    "execution",
    "many_outputs",
    "large_messages",
    "input",
    "introspection",
    "comms_with_buffers",
    "display_updates",
    "interrupt",
    "debugger",
    "subshells",
    "two_clients",
    "restart",
    "cut_connection",
    "death",
    "shutdown",
    "sessions",
)


@pytest.fixture(scope="module")
def modules() -> Path:
    try:
        return services.node_modules(PROJECT)
    except services.ServiceMissing as missing:
        pytest.skip(str(missing))


def run(modules: Path, gateway: GatewayProcess, *checks: str) -> list[dict[str, Any]]:
    """What the script says of these checks."""
    command = ["node", str(SCRIPT), str(modules), f"{gateway.url}/", gateway.key, "sandbox", *checks]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    # The library writes what it does between them.
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert found, done.stdout + done.stderr
    return found


@pytest.mark.parametrize("check", CHECKS)
def test_services(modules: Path, conformance_gateway: GatewayProcess, check: str) -> None:
    [result] = run(modules, conformance_gateway, check)
    assert result["name"] == check
    assert result["ok"], result["error"]
    assert conformance_gateway.call("GET", "/api/kernels").body == []


def test_no_check_is_left_out() -> None:
    named = re.findall(r"^  async (\w+)\(\) \{$", SCRIPT.read_text(), re.MULTILINE)
    assert tuple(named) == CHECKS


def test_the_version_is_pinned(modules: Path) -> None:
    wanted = json.loads((PROJECT / "package.json").read_text())["dependencies"]
    for name, version in wanted.items():
        assert json.loads((modules / name / "package.json").read_text())["version"] == version
    # Whoever installs it does so from where they usually do.
    lock = json.loads((PROJECT / "package-lock.json").read_text())
    assert not any("resolved" in package for package in lock["packages"].values())
