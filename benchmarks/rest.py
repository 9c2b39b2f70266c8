"""RestClient: a client of our own gateway that stops the run at anything unexpected."""

from __future__ import annotations

import http.client
import json
import time
from typing import Any

from benchmarks.bare import CODE
from tests.gateway_process import GatewayProcess

_REFILL_TIMEOUT = 600.0
#: The gateway hangs up on a connection that is silent for longer.
_SILENT_SECONDS = 60.0


class RestClient:
    """One kept-alive connection to the gateway, as a service in front of it would hold."""

    def __init__(self, gateway: GatewayProcess) -> None:
        self._key = gateway.key
        self._connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=600)
        self._used = 0.0

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the JSON answer. Raises RuntimeError for any status but 2xx."""
        headers = {"x-api-key": self._key, "Content-Type": "application/json"}
        if time.monotonic() - self._used > _SILENT_SECONDS:
            self._connection.close()
        self._connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        response = self._connection.getresponse()
        data = response.read()
        self._used = time.monotonic()
        if response.status >= 300:
            raise RuntimeError(f"{method} {path}: {response.status} {data.decode(errors='replace')}")
        answer: dict[str, Any] = json.loads(data) if data else {}
        return answer

    def execute(
        self, session: str | None = None, code: str = CODE, stdout: str = "1\n"
    ) -> tuple[float, dict[str, Any]]:
        """Run a cell; return milliseconds and answer. Raises RuntimeError where it does not write `stdout`."""
        body = {"code": code, "lang": "py"} | ({"session_id": session} if session else {})
        started = time.perf_counter()
        answer = self.call("POST", "/exec", body)
        elapsed = (time.perf_counter() - started) * 1000
        if answer["stdout"] != stdout:
            raise RuntimeError(f"a wrong answer: {answer}")
        return elapsed, answer

    def first_cell(self) -> tuple[float, dict[str, Any]]:
        """Run the cell in a new session that finds a warm sandbox. Raises RuntimeError where there was none."""
        elapsed, answer = self.execute()
        if answer["source"] != "warm":
            raise RuntimeError(f"the sandbox was not a warm one: {answer['source']}")
        return elapsed, answer

    def end(self, session: str) -> None:
        """End a session; its sandbox is gone then."""
        self.call("DELETE", f"/api/v1/sessions/{session}")

    def pool(self) -> dict[str, Any]:
        """What the pool says of itself."""
        found: dict[str, Any] = self.call("GET", "/metrics/pool")["pool"]["python"]
        return found

    def wait_for_warm(self, count: int) -> None:
        """Wait until the pool holds `count` warm sandboxes. Raises TimeoutError."""
        deadline = time.monotonic() + _REFILL_TIMEOUT
        while (pool := self.pool())["warm"] < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the pool did not refill: {pool}")
            time.sleep(0.02)

    def wait_until_quiet(self) -> None:
        """Wait until the pool starts and removes nothing. Raises TimeoutError."""
        deadline = time.monotonic() + _REFILL_TIMEOUT
        while (pool := self.pool())["starting"] or pool["removing"] or pool["warm"] < pool["want"]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the pool does not come to rest: {pool}")
            time.sleep(0.1)
