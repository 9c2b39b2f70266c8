"""The first cell: what `make run` shows, run through the gateway's own interface, and commands to go on with."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
from tornado.httpclient import AsyncHTTPClient, HTTPClientError

from gateway.auth import KEY_FILE
from kernelprovisioner.kernelspecs import KERNELSPEC_NAME
from kernelprovisioner.launchers import DockerLauncher
from kernelprovisioner.launchers.docker_engine import engine_url
from kernelprovisioner.runtime import ENVIRONMENT_NAME, default_root

if TYPE_CHECKING:
    from gateway.server import Gateway

_CODE = """import platform, sys
print("Hello from Python", sys.version.split()[0], "on", platform.node())
total = sum(range(101))
print("The sum of 1 to 100 is", total)"""
_SECOND_CODE = "total + 1"
_CELL_SECONDS = 150.0


async def run(gateway: Gateway) -> None:
    """Run the first cell, print its answer and timings, and one command line for each kind of client."""
    try:
        print(f"\nThe first cell, by POST /exec:\n{_indented(_CODE)}", flush=True)
        answer = await _post(gateway, {"code": _CODE, "lang": "py"})
        print(_shown(answer), flush=True)
        print(f"\nAnother one in the same session:\n{_indented(_SECOND_CODE)}", flush=True)
        answer = await _post(gateway, {"code": _SECOND_CODE, "lang": "py", "session_id": answer["session_id"]})
        print(_shown(answer), flush=True)
    except (HTTPClientError, OSError) as error:
        body = (
            error.response.body.decode(errors="replace")
            if isinstance(error, HTTPClientError) and error.response
            else ""
        )
        print(f"It failed: {error} {body}", flush=True)
        return
    print(_commands(gateway), flush=True)


async def _post(gateway: Gateway, body: dict[str, Any]) -> dict[str, Any]:
    response = await AsyncHTTPClient().fetch(
        f"{_url(gateway)}/exec",
        method="POST",
        body=json.dumps(body),
        headers={"Content-Type": "application/json", "x-api-key": gateway.key.value},
        request_timeout=_CELL_SECONDS,
    )
    answer: dict[str, Any] = json.loads(response.body)
    return answer


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _shown(answer: dict[str, Any]) -> str:
    timings = answer["timings"]
    source = {"started": "started for it, none was warm yet"}.get(answer["source"], answer["source"])
    return (
        f"Answer:\n{_indented(answer['stdout'] + answer['stderr'])}\n"
        f"Status {answer['status']}, sandbox {str(answer['container_id'])[:12]} ({source}): "
        f"wait {timings['wait_ms']:.1f} ms, claim {timings['claim_ms']:.1f} ms, run {timings['run_ms']:.1f} ms, "
        f"total {timings['total_ms']:.1f} ms"
    )


def _commands(gateway: Gateway) -> str:
    example = _example_notebook(gateway.settings.data_directory)
    notebook, done = shlex.quote(str(example)), shlex.quote(str(example.with_stem(f"{example.stem}-done")))
    python = shlex.quote(sys.executable)
    body = shlex.quote(json.dumps({"lang": "py", "code": "print(6 * 7)"}))
    curl = f"curl -s {_url(gateway)}/exec -H {_key_header(gateway)} -H 'Content-Type: application/json' -d {body}"
    here = _same_runtime(gateway) + _same_engine(gateway)
    nbclient = (
        "import nbclient, nbformat as f; n = f.v4.new_notebook(cells=[f.v4.new_code_cell('print(6 * 7)')]); "
        f"nbclient.NotebookClient(n, kernel_name='{KERNELSPEC_NAME}').execute(); print(n.cells[0].outputs[-1].text)"
    )
    root = " --allow-root" if os.geteuid() == 0 else ""
    return "\n".join(
        [
            "",
            "Now try, in a second terminal:",
            *_missing_kernelspec(),
            "",
            "# curl",
            curl,
            "# nbclient",
            f'{here}{python} -c "{nbclient}"',
            "# papermill",
            f"{_installed('papermill', python)}{here}{python} -m papermill -k {KERNELSPEC_NAME} --log-output "
            f"{notebook} {done}",
            "# JupyterLab: choose the kernel Python 3 (sandbox)",
            f"{_installed('jupyterlab', python)}{here}{python} -m jupyterlab{root}",
            "",
            "Ctrl-C stops the gateway.",
        ]
    )


def _example_notebook(directory: Path) -> Path:
    """A small notebook that the printed commands can run, kept in the data directory."""
    path = directory / "first-cell.ipynb"
    cell: dict[str, Any] = {
        "cell_type": "code",
        "id": "first",
        "execution_count": None,
        "metadata": {},
        "outputs": [],
        "source": _CODE,
    }
    notebook = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(notebook, indent=1) + "\n", encoding="utf-8")
    return path


def _url(gateway: Gateway) -> str:
    host = gateway.settings.host
    if host in ("", "0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{gateway.port}" if ":" in host else f"http://{host}:{gateway.port}"


def _key_header(gateway: Gateway) -> str:
    """The key itself is not printed: it is read from its file."""
    return f'"x-api-key: $(cat {shlex.quote(str(_key_file(gateway)))})"'


def _key_file(gateway: Gateway) -> Path:
    """Where the key is kept; one that was configured is copied to where only this user reads it, until the stop.

    The second terminal may not have the variable that it came from. Not in the data directory: whoever configures a key
    keeps it elsewhere, and expects no copy on the disk.
    """
    if gateway.key.path is not None:
        return gateway.key.path
    path = gateway.launcher.owner.path / KEY_FILE
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as file:
        file.write(gateway.key.value + "\n")
    return path


def _same_runtime(gateway: Gateway) -> str:
    """What a client needs to find the claim socket where it is not in the usual place."""
    path = gateway.runtime.path
    plain = {name: value for name, value in os.environ.items() if name != ENVIRONMENT_NAME}
    return "" if path == default_root(plain, os.geteuid()) else f"{ENVIRONMENT_NAME}={shlex.quote(str(path))} "


def _same_engine(gateway: Gateway) -> str:
    """What a client needs to find the engine by itself, should the gateway not run: else its code were not isolated."""
    launcher = gateway.launcher
    if not isinstance(launcher, DockerLauncher) or launcher.docker_url == engine_url({}):
        return ""
    return f"DOCKER_BASE_URL={shlex.quote(launcher.docker_url)} "


def _installed(module: str, python: str) -> str:
    if importlib.util.find_spec(module) is not None:
        return ""
    return f"{python} -m pip install -q --disable-pip-version-check {module} && "


def _missing_kernelspec() -> list[str]:
    try:
        KernelSpecManager().get_kernel_spec(KERNELSPEC_NAME)
    except NoSuchKernel:
        return [
            f"# once, so that Jupyter finds the kernel\n{shlex.quote(sys.executable)} -m gateway.cli kernelspec install"
        ]
    return []
