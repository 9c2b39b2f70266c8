"""StockServer: a stock jupyter_server in front of a kernel that runs already, to compare the gateway with."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.gateway_process import free_port

_START_TIMEOUT = 60.0


class StockServer:
    """A jupyter_server of its own, with a directory of its own. Its rate limit is off: that would cut the output."""

    def __init__(self, directory: Path, kernel: dict[str, Any]) -> None:
        """`kernel`: the connection information of the kernel that it shall serve."""
        self._directory = directory
        self.token = secrets.token_hex(16)
        self.url = f"http://127.0.0.1:{free_port()}"
        self._kernels = directory / "kernels"
        self._kernels.mkdir(parents=True)
        (self._kernels / "kernel.json").write_text(json.dumps(kernel | {"kernel_name": "python3"}))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> str:
        """Start it; return its kernel's id. Raises RuntimeError with its log where it does not get there."""
        log = self._directory / "server.log"
        directories = {f"JUPYTER_{name}_DIR": str(self._directory) for name in ("CONFIG", "DATA", "RUNTIME")}
        arguments = [
            f"--ServerApp.port={self.url.rpartition(':')[2]}",
            "--ServerApp.ip=127.0.0.1",
            f"--ServerApp.root_dir={self._directory}",
            f"--IdentityProvider.token={self.token}",
            "--ServerApp.allow_external_kernels=True",
            f"--ServerApp.external_connection_dir={self._kernels}",
            "--ZMQChannelsWebsocketConnection.limit_rate=False",
            "--no-browser",
            "--allow-root",
        ]
        with open(log, "wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jupyter_server", *arguments],
                env=os.environ | directories,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + _START_TIMEOUT
        while time.monotonic() < deadline and self._process.poll() is None:
            if (kernel := self._kernel()) is not None:
                return kernel
            time.sleep(0.1)
        self.stop()
        raise RuntimeError(f"jupyter_server did not come up:\n{log.read_text()}")

    def stop(self) -> None:
        """End it. Its kernel is not its own, and stays."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _kernel(self) -> str | None:
        request = urllib.request.Request(f"{self.url}/api/kernels")
        request.add_header("Authorization", f"token {self.token}")
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                kernels: list[dict[str, Any]] = json.load(response)
        except (OSError, urllib.error.URLError):
            return None
        return str(kernels[0]["id"]) if kernels else None
