"""A stock Jupyter server as a process, and a small client of its REST interface."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.gateway_process import free_port


class JupyterProcess:
    """`python -m` `command`, once it answers. Its token may be empty: then nobody is asked for one."""

    def __init__(
        self, command: Sequence[str], directory: Path, log: Path, environment: Mapping[str, str], *, token: str
    ) -> None:
        self.port = free_port()
        self.log = log
        self._token = token
        arguments = ("--no-browser", "--allow-root", f"--port={self.port}", "--ServerApp.port_retries=0")
        with open(log, "wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command, *arguments, f"--IdentityProvider.token={token}"],
                env=environment,
                cwd=directory,
                stdout=said,
                stderr=said,
                stdin=subprocess.DEVNULL,
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                self.call("GET", "/api")
                return
            except OSError:
                assert time.monotonic() < deadline and self.process.poll() is None, log.read_text()
                time.sleep(0.1)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """One HTTP call; returns the JSON body. Raises urllib's HTTPError."""
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=data, method=method)
        if self._token:
            request.add_header("Authorization", f"token {self._token}")
        with urllib.request.urlopen(request, timeout=60) as response:
            raw = response.read()
        return json.loads(raw) if raw else None

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The same from a coroutine."""
        return await asyncio.to_thread(self.call, method, path, body)

    def stop(self) -> None:
        """End it as Ctrl-C does."""
        self.process.terminate()
        self.process.wait(60)
