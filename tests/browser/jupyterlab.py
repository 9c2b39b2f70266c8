"""`jupyter lab` as a child process, for tests that look at it in a browser."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.gateway_process import free_port

TOKEN = "token-of-the-browser-tests"
#: Questions and look-ups on the network that a test cannot answer.
DISABLED = ("@jupyterlab/apputils-extension:announcements", "@jupyterlab/extensionmanager-extension:plugin")


@dataclass
class JupyterLab:
    """A user's own JupyterLab. `root` holds the notebooks, `home` its settings, `log` what it says."""

    root: Path
    home: Path
    log: Path
    environment: dict[str, str]
    arguments: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout: float = 60.0) -> None:
        """Start it and wait until it answers. Raises AssertionError with its log where it does not get there."""
        config = self.home / "config"
        (config / "labconfig").mkdir(parents=True)
        page = {"disabledExtensions": dict.fromkeys(DISABLED, True)}
        (config / "labconfig" / "page_config.json").write_text(json.dumps(page))
        command = [
            *(sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root"),
            *("--ServerApp.ip=127.0.0.1", f"--ServerApp.port={self.port}", "--ServerApp.port_retries=0"),
            *(f"--ServerApp.root_dir={self.root}", f"--IdentityProvider.token={TOKEN}", *self.arguments),
        ]
        own = {
            "JUPYTER_CONFIG_DIR": str(config),
            "JUPYTER_DATA_DIR": str(self.home / "data"),
            "JUPYTER_RUNTIME_DIR": str(self.home / "jupyter"),
            "JUPYTERLAB_SETTINGS_DIR": str(self.home / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(self.home / "workspaces"),
        }
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                command,
                env={**self.environment, **own},
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self.log.read_text()
            try:
                self.get("/api/status")
            except OSError:
                time.sleep(0.1)
            else:
                return
        raise AssertionError(f"JupyterLab did not answer within {timeout:g} s:\n{self.log.read_text()}")

    def stop(self, timeout: float = 30.0) -> None:
        """End it as Ctrl-C on its terminal does, with its kernels. Raises AssertionError where it does not go."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            raise AssertionError(f"JupyterLab did not stop within {timeout:g} s:\n{self.log.read_text()}") from None

    def get(self, path: str) -> Any:
        """The JSON answer to a GET. Raises OSError where there is none."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        request.add_header("Authorization", f"token {TOKEN}")
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)

    def kernels(self) -> list[dict[str, Any]]:
        """The models of its running kernels."""
        return list(self.get("/api/kernels"))
