"""The yardstick: a bare round trip to a kernel over ZeroMQ, and a stock ipykernel in the same image to make it to."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import docker
import zmq

from kernelprovisioner.images import KernelImage

#: the cell of all latencies
CODE = "print(1)"
_DELIMITER = b"<IDS|MSG>"
_ANSWER_TIMEOUT = 30.0
_START_TIMEOUT = 60.0
_MIB = 1 << 20


class BareClient:
    """Sends execute_request and waits for reply and idle, with as little of its own as possible."""

    def __init__(self, info: dict[str, Any]) -> None:
        self._context = zmq.Context()
        self._key = info["key"].encode() if isinstance(info["key"], str) else info["key"]
        self._session = uuid.uuid4().hex
        self._shell = self._context.socket(zmq.DEALER)
        self._iopub = self._context.socket(zmq.SUB)
        self._iopub.setsockopt(zmq.SUBSCRIBE, b"")
        for socket, name in ((self._shell, "shell"), (self._iopub, "iopub")):
            socket.setsockopt(zmq.LINGER, 0)
            separator = "-" if info["transport"] == "ipc" else ":"
            socket.connect(f"{info['transport']}://{info['ip']}{separator}{info[f'{name}_port']}")
        self._poller = zmq.Poller()
        self._poller.register(self._shell, zmq.POLLIN)
        self._poller.register(self._iopub, zmq.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._context.destroy(linger=0)

    def execute(self, code: str) -> float:
        """Return the milliseconds from sending `code` to having its reply and its idle."""
        started = time.perf_counter()
        identity = self._send(
            "execute_request",
            {
                "code": code,
                "silent": False,
                "store_history": True,
                "user_expressions": {},
                "allow_stdin": False,
                "stop_on_error": True,
            },
        )
        self._wait(identity, "execute_reply", _ANSWER_TIMEOUT)
        return (time.perf_counter() - started) * 1000

    def wait_until_ready(self) -> None:
        """Ask until the kernel answers and its output arrives. Raises TimeoutError."""
        deadline = time.monotonic() + _START_TIMEOUT
        while time.monotonic() < deadline:
            try:
                self._wait(self._send("kernel_info_request", {}), "kernel_info_reply", 1.0)
                return
            except TimeoutError:
                continue  # not bound yet, or the subscription was not there yet
        raise TimeoutError(f"the kernel was not ready within {_START_TIMEOUT:g} s")

    def _send(self, msg_type: str, content: dict[str, Any]) -> str:
        identity = uuid.uuid4().hex
        header = {
            "msg_id": identity,
            "msg_type": msg_type,
            "username": "bench",
            "session": self._session,
            "date": datetime.now(UTC).isoformat(),
            "version": "5.4",
        }
        parts = [json.dumps(part).encode() for part in (header, {}, {}, content)]
        signature = hmac.new(self._key, digestmod=hashlib.sha256)
        for part in parts:
            signature.update(part)
        self._shell.send_multipart([_DELIMITER, signature.hexdigest().encode(), *parts])
        return identity

    def _wait(self, identity: str, reply: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        replied = idle = False
        while not (replied and idle):
            ready = dict(self._poller.poll(int(max(0.0, deadline - time.monotonic()) * 1000)))
            if not ready:
                raise TimeoutError(f"the kernel did not answer within {timeout:g} s")
            for socket in ready:
                frames = socket.recv_multipart()
                body = frames[frames.index(_DELIMITER) + 2 :]
                if json.loads(body[1]).get("msg_id") != identity:
                    continue
                kind = json.loads(body[0])["msg_type"]
                replied |= kind == reply
                idle |= kind == "status" and json.loads(body[3])["execution_state"] == "idle"


class StockKernel:
    """A stock ipykernel in a container of the same image, as locked down as a sandbox, over ipc."""

    def __init__(self, docker_url: str, image: KernelImage, directory: Path) -> None:
        self._image = image
        self._directory = directory
        self._engine = docker.DockerClient(base_url=docker_url, timeout=60)
        self._container: Any = None
        #: its connection information as seen from here, once it was started
        self.info: dict[str, Any] = {}

    def start(self) -> dict[str, Any]:
        """Start it; return its connection information as seen from here."""
        # Its uid is another one; the directory above is private.
        self._directory.mkdir()
        self._directory.chmod(0o777)
        info = {
            "transport": "ipc",
            "ip": "/samovar/k",
            "key": secrets.token_hex(16),
            "signature_scheme": "hmac-sha256",
            "shell_port": 1,
            "iopub_port": 2,
            "stdin_port": 3,
            "control_port": 4,
            "hb_port": 5,
        }
        (self._directory / "connection.json").write_text(json.dumps(info))
        limits = self._image.limits
        self._container = self._engine.containers.run(
            self._image.tag,
            entrypoint=["/bin/sh", "-c"],
            command=["umask 0; exec /opt/kernel/bin/python -m ipykernel_launcher -f /samovar/connection.json"],
            environment={"HOME": "/tmp", "IPYTHONDIR": "/tmp/ipython", "MPLBACKEND": "agg"},
            user="10001:10001",
            network_mode="none",
            read_only=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            tmpfs={"/tmp": f"size={limits.tmp_mb}m", "/mnt/data": f"size={limits.work_mb}m"},
            working_dir="/tmp",
            volumes={str(self._directory): {"bind": "/samovar", "mode": "rw"}},
            nano_cpus=int(limits.cpus * 1e9),
            mem_limit=limits.container_memory_mb * _MIB,
            pids_limit=limits.pids,
            detach=True,
        )
        self.info = info | {"ip": str(self._directory / "k")}
        return self.info

    def stop(self) -> None:
        """Remove its container."""
        if self._container is not None:
            self._container.remove(force=True, v=True)
            self._container = None
        self._engine.close()

    @property
    def container_id(self) -> str:
        """The engine's id of its container, which runs."""
        return str(self._container.id)

    @property
    def engine_version(self) -> str:
        """The engine's version, as it says."""
        return str(self._engine.version()["Version"])
