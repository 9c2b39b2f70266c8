"""The same requests to the installed jupyter_server and to the gateway: answers differ only where we say so."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.gateway_process import GatewayProcess, free_port

TOKEN = "token-of-both-servers"
NOWHERE = "00000000-0000-4000-8000-000000000000"


@dataclass
class Server:
    """One of the two, and the ids that it gave."""

    url: str
    kernel_name: str
    ids: dict[str, str] = field(default_factory=dict)

    def call(self, method: str, path: str, body: str | None, token: str) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON and headers of the answer; `{name}` in path and body are ids that were given before."""
        for name, value in {**self.ids, "spec": self.kernel_name, "nowhere": NOWHERE}.items():
            path = path.replace(f"<{name}>", value)
            body = body.replace(f"<{name}>", value) if body is not None else None
        data = body.encode() if body is not None else b"" if method in ("POST", "PATCH") else None
        request = urllib.request.Request(self.url + path, data=data, method=method)
        request.add_header("Content-Type", "application/json")
        if token:
            request.add_header("Authorization", f"token {token}")
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, _decoded(response.read()), dict(response.headers)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _decoded(error.read()), dict(error.headers)


def _decoded(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return None


@dataclass(frozen=True)
class Ask:
    """A request, under which name the answer's id is kept, and where we differ: our status and why."""

    method: str
    path: str
    body: str | None = None
    keep: str = ""
    ours: int | None = None
    token: str = TOKEN


SESSION = '{"path": "a.ipynb", "name": "a.ipynb", "type": "notebook", "kernel": {"name": "<spec>"}}'
#: In this order; each is answered by both with the same status and the same keys, unless it says `ours`.
REQUESTS = (
    Ask("GET", "/api"),
    Ask("GET", "/api", token=""),
    Ask("GET", "/api/status"),
    Ask("GET", "/api/me"),
    Ask("GET", "/api/me?permissions=%7B%22kernels%22:%5B%22read%22%5D%7D"),
    Ask("GET", "/api/me?permissions=x"),
    Ask("GET", "/api/kernelspecs"),
    Ask("GET", "/api/kernelspecs/<spec>"),
    Ask("GET", "/api/kernelspecs/nothing"),
    Ask("GET", "/kernelspecs/<spec>/logo-svg.svg"),
    Ask("GET", "/kernelspecs/<spec>/nothing.png"),
    Ask("GET", "/api/kernels"),
    Ask("GET", "/api/kernels", token=""),
    Ask("GET", "/api/kernels", token="wrong-token"),
    Ask("GET", f"/api/kernels?token={TOKEN}", token=""),
    Ask("POST", "/api/kernels", "", keep="kernel"),
    Ask("GET", "/api/kernels"),
    Ask("GET", "/api/kernels/<kernel>"),
    Ask("GET", "/api/kernels/<nowhere>"),
    Ask("GET", "/api/kernels/<kernel>/channels"),
    Ask("POST", "/api/kernels/<kernel>/interrupt", "{}"),
    Ask("POST", "/api/kernels/<nowhere>/interrupt", "{}"),
    Ask("POST", "/api/kernels/<kernel>/restart", "{}"),
    # Theirs: 500, also for what is only not there, and for what is only a wrong request.
    Ask("POST", "/api/kernels/<nowhere>/restart", "{}", ours=404),
    Ask("POST", "/api/kernels", "[]", ours=400),
    Ask("POST", "/api/kernels", '{"name": "nothing"}', ours=400),
    Ask("POST", "/api/kernels", "{"),
    Ask("GET", "/api/sessions"),
    Ask("POST", "/api/sessions", SESSION, keep="session"),
    Ask("POST", "/api/sessions", SESSION),
    Ask("GET", "/api/sessions"),
    Ask("GET", "/api/sessions/<session>"),
    Ask("GET", "/api/sessions/<nowhere>"),
    Ask(
        "POST",
        "/api/sessions",
        '{"path": "c", "name": "c", "type": "console", "kernel": {"id": "<kernel>"}}',
        keep="console",
    ),
    Ask("POST", "/api/sessions", ""),
    Ask("POST", "/api/sessions", '{"type": "notebook"}'),
    Ask("POST", "/api/sessions", '{"path": "b.ipynb"}'),
    # Theirs: 501 and 500.
    Ask("POST", "/api/sessions", '{"path": "b", "type": "file", "kernel": {"name": "nothing"}}', ours=400),
    Ask("POST", "/api/sessions", '{"path": "b", "type": "file", "kernel": 1}', ours=400),
    Ask("PATCH", "/api/sessions/<session>", '{"path": "b.ipynb", "name": "b.ipynb"}'),
    Ask("PATCH", "/api/sessions/<session>", '{"type": "file"}'),
    Ask("PATCH", "/api/sessions/<session>", '{"kernel": {"name": "<spec>"}}'),
    Ask("PATCH", "/api/sessions/<session>", '{"kernel": {"id": "<kernel>"}}'),
    Ask("PATCH", "/api/sessions/<session>", '{"kernel": {"id": "<nowhere>"}}'),
    Ask("PATCH", "/api/sessions/<nowhere>", "{}"),
    # Theirs: 400 "No JSON data provided"; nothing is to be changed by it.
    Ask("PATCH", "/api/sessions/<session>", "", ours=200),
    Ask("PUT", "/api/sessions/<session>", "{}"),
    Ask("DELETE", "/api/sessions/<nowhere>"),
    Ask("DELETE", "/api/sessions/<session>"),
    Ask("GET", "/api/sessions"),
    Ask("GET", "/api/kernels"),
    Ask("POST", "/api/kernels", '{"name": "<spec>", "path": ""}', keep="kernel"),
    Ask("DELETE", "/api/kernels/<kernel>"),
    Ask("DELETE", "/api/kernels/<kernel>"),
    Ask("GET", "/api/nothing"),
)


@contextmanager
def jupyter_server(directory: Path) -> Iterator[Server]:
    """A stock server with its Python kernel."""
    port = free_port()
    options = [f"--port={port}", "--no-browser", "--allow-root", f"--IdentityProvider.token={TOKEN}"]
    with open(directory / "jupyter.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyter_server", *options, f"--ServerApp.root_dir={directory}"],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env={"PATH": str(Path(sys.executable).parent), "HOME": str(directory), "JUPYTER_NO_CONFIG": "1"},
        )
        try:
            server = Server(f"http://127.0.0.1:{port}", "python3")
            for _ in range(300):
                try:
                    server.call("GET", "/api", None, TOKEN)
                    break
                except OSError:
                    time.sleep(0.1)
            yield server
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def our_gateway(directory: Path) -> Iterator[Server]:
    settings = {"SAMOVAR_LAUNCHER": "process", "CONTAINER_POOL_MAX_SIZE": "10"}
    process = GatewayProcess(directory, None, settings, key=TOKEN)
    try:
        process.start()
        yield Server(process.url, "sandbox")
    finally:
        if process.process is not None:
            assert process.stop() == 0, process.log.read_text()


@pytest.mark.limit(120)
def test_status_codes_and_keys_are_those_of_jupyter_server() -> None:
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as directory:
        (Path(directory) / "stock").mkdir()
        with jupyter_server(Path(directory) / "stock") as stock, our_gateway(Path(directory)) as ours:
            wrong = [text for ask in REQUESTS if (text := difference(ask, stock, ours))]
    assert not wrong, "\n".join(wrong)


def difference(ask: Ask, stock: Server, ours: Server) -> str:
    """What the answers to one request differ in, but for what is allowed to; "" for nothing."""
    answers = [server.call(ask.method, ask.path, ask.body, ask.token) for server in (stock, ours)]
    (their_status, theirs, their_headers), (status, own, headers) = answers
    if ask.keep:
        stock.ids[ask.keep], ours.ids[ask.keep] = theirs["id"], own["id"]
        for server, (_, model, found) in zip((stock, ours), answers, strict=True):
            assert found["Location"].endswith(model["id"]), (server, found)
    what = f"{ask.method} {ask.path} {ask.body or ''}"
    if ask.ours is not None:
        expected = ask.ours
        if their_status == status:
            return f"{what}: both answer {status}: no difference any more"
    else:
        expected = their_status
    if status != expected:
        return f"{what}: {status} instead of {expected}: {own}"
    if expected < 400 and ask.ours is None and shape(theirs) != shape(own):
        return f"{what}: {shape(own)} instead of {shape(theirs)}"
    if expected >= 400 and status != 405 and not {"message", "reason"} <= set(own or {}):
        return f"{what}: {own} is no error body"
    kinds = [found.get("Content-Type", "").partition(";")[0] for found in (their_headers, headers)]
    return "" if kinds[0] == kinds[1] or expected >= 400 else f"{what}: {kinds[1]} instead of {kinds[0]}"


#: Where what stands below the key is a matter of the kernel image, or of what is installed.
OPAQUE = frozenset(
    {"kernelspecs", "resources", "metadata", "argv", "env", "color", "initials", "avatar_url", "updatable_fields"}
)


def shape(value: Any) -> Any:
    """The keys and the kinds of a JSON value, without what it says."""
    if isinstance(value, dict):
        return {key: "…" if key in OPAQUE else shape(inner) for key, inner in sorted(value.items())}
    if isinstance(value, list):
        return [shape(inner) for inner in value]
    return type(value).__name__
