"""ExecClient: a client of any server that speaks `POST /exec`, over one kept-alive connection."""

from __future__ import annotations

import http.client
import json
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Servers hang up on a silent connection after some seconds (uvicorn: 5), and a call on such a one would fail.
_STALE_SECONDS = 3.0
_LONGEST_PAUSE = 30.0
_ERRORS_OF_A_CONNECTION = (http.client.HTTPException, OSError)


@dataclass(frozen=True)
class Reply:
    """What came of one call: milliseconds until it was read, and `failure`, its kind, or None where it was right."""

    milliseconds: float
    failure: str | None = None
    #: seconds that the server asked to wait before the next call
    pause: float = 0.0
    body: Mapping[str, Any] = field(default_factory=dict)


class ExecClient:
    """One user of the server at `url`, its base path included. Calls never raise for what a server may answer."""

    def __init__(self, url: str, key: str, *, timeout: float = 180.0) -> None:
        """`timeout`: seconds for one call. Raises ValueError for what is no http(s) URL."""
        parts = urllib.parse.urlsplit(url)
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        if parts.scheme not in kinds or not parts.hostname:
            raise ValueError(f"{url!r} is not the URL of a server; it looks like http://127.0.0.1:8000")
        self._base = parts.path.rstrip("/")
        self._headers = {"x-api-key": key, "Content-Type": "application/json", "Accept": "application/json"}
        self._connection = kinds[parts.scheme](parts.hostname, parts.port, timeout=timeout)
        self._used = 0.0

    def close(self) -> None:
        """Close the connection; the next call opens it again."""
        self._connection.close()

    def connect(self) -> None:
        """Open the connection ahead of the first call. Raises OSError."""
        self._connection.close()
        self._connection.connect()
        self._used = time.monotonic()

    def run(self, code: str, expected: str, **fields: Any) -> Reply:
        """Run Python that has to write `expected`, blanks around it aside; `fields` are more keys of the body."""
        body = json.dumps({"code": code, "lang": "py", **fields})
        started = time.perf_counter()
        try:
            response, data = self._call("POST", "/exec", body)
        except TimeoutError:
            return Reply(_since(started), "timeout")
        except _ERRORS_OF_A_CONNECTION as error:
            return Reply(_since(started), f"connection: {type(error).__name__}")
        elapsed = _since(started)
        try:
            answer = json.loads(data)
        except ValueError:
            answer = None
        if response.status >= 300:
            return Reply(elapsed, f"HTTP {response.status}", pause_of(response.getheader("Retry-After")))
        if not isinstance(answer, dict):
            return Reply(elapsed, "no JSON")
        # Not every server of this family says how the cell ended; what it wrote, all of them do.
        status = answer.get("status")
        if isinstance(status, str) and status not in ("ok", "completed", "success"):
            return Reply(elapsed, f"status {status}", body=answer)
        if str(answer.get("stdout")).strip() != expected:
            return Reply(elapsed, "wrong answer", body=answer)
        return Reply(elapsed, body=answer)

    def end_session(self, session_id: str) -> bool:
        """Give a session up, so that its sandbox goes; False where this server has no call for that."""
        path = f"/api/v1/sessions/{urllib.parse.quote(session_id, safe='')}"
        try:
            response, _ = self._call("DELETE", path, None)
        except _ERRORS_OF_A_CONNECTION:
            return False
        return response.status < 300

    def _call(self, method: str, path: str, body: str | None) -> tuple[http.client.HTTPResponse, bytes]:
        if time.monotonic() - self._used > _STALE_SECONDS:
            self._connection.close()
        try:
            self._connection.request(method, self._base + path, body, self._headers)
            response = self._connection.getresponse()
            data = response.read()
        except BaseException:
            # Half a call is on it: of no use for the next one.
            self._connection.close()
            raise
        self._used = time.monotonic()
        return response, data


def pause_of(retry_after: str | None) -> float:
    """Seconds that a Retry-After header asks for, at most 30; 1 where it is a date."""
    if retry_after is None:
        return 0.0
    try:
        return min(_LONGEST_PAUSE, max(0.0, float(retry_after)))
    except ValueError:
        return 1.0


def _since(started: float) -> float:
    return (time.perf_counter() - started) * 1000
