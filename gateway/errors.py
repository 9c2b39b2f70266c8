"""What goes wrong and how it is told: to a client by HTTP, at the terminal by one sentence and an exit code."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

import msgspec

#: the code of a 503 that passes by itself: places are taken, a line is full
TOO_BUSY = "too_busy"


class StartError(Exception):
    """The gateway cannot start: one sentence for a person, and the exit code."""

    def __init__(self, text: str, exit_code: ExitCode) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class ExitCode(enum.IntEnum):
    """What `samovar` exits with, after sysexits.h."""

    NO_INPUT = 66
    NO_ENGINE = 69
    PORT_IN_USE = 71
    UNWRITABLE = 73
    FAILED = 70
    CONFIGURATION = 78


@dataclass(frozen=True)
class Detail:
    """One thing that is wrong with a request: the field ("" = the body as a whole), why, and a code for programs."""

    field: str
    message: str
    code: str


class RequestError(Exception):
    """A request that is answered with an error: HTTP status, a code for programs, a sentence for people."""

    def __init__(
        self,
        status: HTTPStatus,
        code: str,
        message: str,
        *,
        details: Sequence[Detail] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.details = tuple(details)
        self.retry_after = retry_after


def invalid_field(field: str, message: str, code: str = "invalid") -> RequestError:
    """A 422 that names one field."""
    return RequestError(
        HTTPStatus.UNPROCESSABLE_ENTITY,
        "validation",
        f"{field}: {message}" if field else message,
        details=[Detail(field, message, code)],
    )


def too_busy(message: str, retry_after: float) -> RequestError:
    """A 503 that says when to come back."""
    return RequestError(HTTPStatus.SERVICE_UNAVAILABLE, TOO_BUSY, message, retry_after=retry_after)


def too_many(message: str, limit: str, retry_after: float) -> RequestError:
    """A 429 that names the limit of its owner and says when to come back."""
    return RequestError(
        HTTPStatus.TOO_MANY_REQUESTS,
        "limit_reached",
        message,
        details=[Detail("", message, limit)],
        retry_after=retry_after,
    )


def from_validation(error: msgspec.ValidationError) -> RequestError:
    """A 422 from msgspec's text, which names the place as "... - at `$.files[0].id`"."""
    text = str(error)
    place = re.search(r" - at `\$\.?(.*?)`$", text)
    message = text[: place.start()] if place else text
    field = place.group(1) if place else ""
    named = re.search(r"(missing required|unknown) field `(.*?)`", message)
    if named:
        field = f"{field}.{named.group(2)}" if field else named.group(2)
        message = "is missing" if named.group(1).startswith("missing") else "is not known here"
        return invalid_field(field, message, "missing" if named.group(1).startswith("missing") else "unknown")
    return invalid_field(field, message)


def exec_body(error: RequestError, request_id: str) -> dict[str, Any]:
    """The error shape of the /exec family."""
    return {
        "error": error.message,
        "error_type": error.code,
        "details": [
            {"field": detail.field, "message": detail.message, "code": detail.code} for detail in error.details
        ],
        "request_id": request_id,
        "timestamp": timestamp(),
    }


def problem_body(error: RequestError, request_id: str) -> dict[str, Any]:
    """Problem details as in RFC 9457, with our `errors` (each names a field) and `request_id`."""
    return {
        "type": f"urn:samovar:problem:{error.code.replace('_', '-')}",
        "title": error.status.phrase,
        "status": int(error.status),
        "detail": error.message,
        "errors": [{"field": detail.field, "message": detail.message, "code": detail.code} for detail in error.details],
        "request_id": request_id,
    }


def timestamp() -> str:
    """Now, in UTC with milliseconds and `Z`."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
