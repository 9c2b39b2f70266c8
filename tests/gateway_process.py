"""A real `samovar serve` as a child process, and a small client of its REST interface, for tests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KEY = "test-key-of-the-integration-tests"


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Answer:
    """An HTTP answer: status, headers and the JSON body."""

    status: int
    headers: dict[str, str]
    body: Any


@dataclass
class GatewayProcess:
    """`samovar serve` with an own port, key, runtime and data directory. `settings` are environment variables."""

    directory: Path
    docker_url: str | None
    settings: dict[str, str] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    key: str = KEY
    #: a program that starts it, with its arguments
    starter: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = self.directory / "gateway.log"
        self.runtime = self.directory / "run"
        self.runtime.mkdir(mode=0o700, exist_ok=True)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the gateway, also right for a client that shall find its claim socket."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SAMOVAR_", "API_"))}
        environment.update(
            API_HOST="127.0.0.1",
            API_PORT=str(self.port),
            API_KEY=self.key,
            SAMOVAR_DATA_DIR=str(self.directory / "data"),
            SAMOVAR_RUNTIME_DIR=str(self.runtime),
            PYTHONPATH=os.pathsep.join((str(ROOT), str(ROOT / "kernel-images"))),
        )
        if self.docker_url is not None:
            environment["DOCKER_BASE_URL"] = self.docker_url
        environment.update(self.settings)
        return environment

    def start(self, timeout: float = 60.0) -> None:
        """Start it and wait until it is healthy. Raises AssertionError with its log where it does not get there."""
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*self.starter, sys.executable, "-m", "gateway.cli", "serve", *self.arguments],
                env=self.environment,
                cwd=self.directory,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the gateway ended with {self.process.returncode}:\n{self.log.read_text()}")
            try:
                if self.call("GET", "/health").status == 200:
                    return
            except OSError:
                time.sleep(0.05)
        raise AssertionError(f"the gateway was not healthy within {timeout:g} s:\n{self.log.read_text()}")

    def stop(self, timeout: float = 60.0) -> int:
        """End it as an operator does and return its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the gateway did not stop within {timeout:g} s:\n{self.log.read_text()}") from None

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
        timeout: float = 180.0,
        raw: bytes | None = None,
    ) -> Answer:
        """One HTTP call with the key; 4xx and 5xx are answers, too."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, method=method)
        for name, value in {"x-api-key": self.key, "Content-Type": "application/json", **(headers or {})}.items():
            request.add_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return _answer(response.status, dict(response.headers), response.read())
        except urllib.error.HTTPError as error:
            with error:
                return _answer(error.code, dict(error.headers), error.read())

    def pool(self) -> dict[str, Any]:
        """What it says of its one pool."""
        [pool] = self.call("GET", "/metrics/pool").body["pool"].values()
        return dict(pool)

    def exec(self, code: str, session_id: str | None = None, **fields: Any) -> dict[str, Any]:
        """Run Python through `POST /exec` and return the 200 answer."""
        body = {"code": code, "lang": "py", **fields}
        if session_id is not None:
            body["session_id"] = session_id
        answer = self.call("POST", "/exec", body)
        assert answer.status == 200, answer
        assert isinstance(answer.body, dict)
        return answer.body

    def memory(self) -> int:
        """Resident bytes of the gateway process now."""
        assert self.process is not None
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _answer(status: int, headers: dict[str, str], raw: bytes) -> Answer:
    try:
        body = json.loads(raw) if raw else None
    except ValueError:
        body = raw
    return Answer(status, {name.lower(): value for name, value in headers.items()}, body)
