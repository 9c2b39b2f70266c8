"""What all handlers share: whose key it is, bodies as typed structs, errors in the shape of their family."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TypeVar

import msgspec
from tornado.web import HTTPError, RequestHandler, stream_request_body

from gateway.access_log import shown_uri
from gateway.answers import Answers
from gateway.auth import KeyCheck
from gateway.cancellation import Cancelled
from gateway.errors import Detail, RequestError, exec_body, from_validation, problem_body
from gateway.health import Health
from gateway.idempotency import HEADER, KeyedCalls, Run, keyed_call
from gateway.outputs import to_json
from gateway.sessions import SessionRegistry
from kernelprovisioner.images import KernelImage
from kernelprovisioner.pool import SandboxPool

StructT = TypeVar("StructT", bound=msgspec.Struct)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Services:
    """What the handlers answer with."""

    keys: KeyCheck
    sessions: SessionRegistry
    pools: dict[str, SandboxPool]
    images: dict[str, KernelImage]
    health: Health
    keyed: KeyedCalls
    max_execution_time: float
    local_monitoring: bool
    answers: Answers = field(default_factory=Answers)

    def image_for(self, language: str) -> KernelImage | None:
        """The kernel image for a language or its short name."""
        name = LANGUAGES.get(language, language)
        return next((image for image in self.images.values() if image.language == name), None)


#: The short names of the /exec family, and the languages that kernel images name.
LANGUAGES = {
    "py": "python",
    "js": "javascript",
    "ts": "typescript",
    "go": "go",
    "java": "java",
    "c": "c",
    "cpp": "cpp",
    "php": "php",
    "rs": "rust",
    "r": "r",
    "f90": "fortran",
    "d": "d",
    "bash": "bash",
}


@stream_request_body
class BaseHandler(RequestHandler):
    """A request of one of our families; `error_family` chooses the shape of its errors.

    Bodies come in pieces (Tornado's streaming), so that no byte of a stranger's is kept or parsed.
    """

    services: Services
    #: whether the body matters: then that of a key holder is kept
    takes_body = False
    error_family: Callable[[RequestError, str], dict[str, Any]] = staticmethod(problem_body)
    error_type = "application/problem+json"

    def initialize(self, services: Services) -> None:
        self.services = services
        self.request_id = secrets.token_hex(8)
        self.hung_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._received = bytearray()

    def prepare(self) -> None:
        # A stranger's is read to its end all the same: else he sees a broken connection instead of his answer.
        self._kept = self.takes_body and self.find_owner() is not None

    def data_received(self, chunk: bytes) -> None:
        if self._kept:
            self._received += chunk

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Cache-Control", "no-store")

    def on_connection_close(self) -> None:
        super().on_connection_close()
        if not self.hung_up.done():
            self.hung_up.set_result(None)

    def find_owner(self) -> str | None:
        """Whose key the request carries; None without a valid one."""
        return self.services.keys.owner(self.request.headers)

    @property
    def owner(self) -> str:
        """Whose key the request carries. Raises RequestError (401)."""
        owner = self.find_owner()
        if owner is None:
            raise RequestError(
                HTTPStatus.UNAUTHORIZED,
                "authentication",
                "A valid API key is needed, in the x-api-key header or as Authorization: Bearer.",
            )
        return owner

    def check_monitoring(self) -> None:
        """Monitoring is open to the same host (where configured so), and to key holders. Raises RequestError."""
        if not (self.services.local_monitoring and _is_loopback(self.request.remote_ip or "")):
            _ = self.owner

    def body(self, kind: type[StructT]) -> StructT:
        """The JSON body as `kind`. Raises RequestError that names the field."""
        try:
            return msgspec.json.decode(self._received or b"{}", type=kind)
        except msgspec.ValidationError as error:
            raise from_validation(error) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            text = f"The body is not JSON: {error}"
            raise RequestError(
                HTTPStatus.BAD_REQUEST, "invalid_json", text, details=[Detail("", text, "json")]
            ) from None

    async def run_cell(self, kind: str, request: msgspec.Struct, run: Run) -> None:
        """Answer with what `run` returns; with an Idempotency-Key it runs once, however often the request comes."""
        keyed = self.services.keyed
        call = keyed_call(self.owner, self.request.headers.get(HEADER), kind, request)
        if call is None:
            self.answer(keyed.shapes[kind](await run(self.hung_up, None)))
        else:
            self.answer(msgspec.Raw(await keyed.answer(call, run, self.hung_up)))

    def answer(self, value: object, status: HTTPStatus = HTTPStatus.OK) -> None:
        """Finish with `value` as JSON."""
        self._finish(value, status, "application/json")

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs.get("exc_info", (None, None, None))[1]
        if isinstance(error, Cancelled):
            # Nobody listens; the status is what the log shows.
            self.set_status(499, "Client Closed Request")
            self.finish()
            return
        if not isinstance(error, RequestError):
            error = _unexpected(status_code, error)
        if error.status == HTTPStatus.UNAUTHORIZED:
            self.set_header("WWW-Authenticate", "Bearer")
        if error.status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.set_header("Allow", ", ".join(self._verbs()))
        if error.retry_after is not None:
            self.set_header("Retry-After", str(max(1, round(error.retry_after))))
        family = type(self).error_family
        self._finish(family(error, self.request_id), error.status, type(self).error_type)

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        if not isinstance(value, RequestError | Cancelled | HTTPError):
            # Not as Tornado does it: its text has the query, and that may have a key.
            request = self.request
            _log.error(
                "%s %s failed: %s", request.method, shown_uri(request.uri), typ.__name__, exc_info=(typ, value, tb)
            )

    def _verbs(self) -> list[str]:
        """The methods that this resource has."""
        names = ((verb, verb.lower()) for verb in self.SUPPORTED_METHODS)
        return [verb for verb, name in names if getattr(type(self), name) is not getattr(RequestHandler, name)]

    def _finish(self, value: object, status: HTTPStatus, content_type: str) -> None:
        self.set_status(status)
        self.set_header("Content-Type", content_type)
        self.set_header("X-Request-Id", self.request_id)
        encoded = to_json(value)
        self.services.answers.add(self.finish(encoded), len(encoded), self._hang_up)

    def _hang_up(self) -> None:
        stream = getattr(self.request.connection, "stream", None)
        if stream is not None:
            stream.close()


class ExecFamilyHandler(BaseHandler):
    """A handler whose errors have the shape of the /exec family."""

    error_family = staticmethod(exec_body)
    error_type = "application/json"


class NotFoundHandler(BaseHandler):
    """Every path that is not there."""

    def _missing(self) -> None:
        raise RequestError(HTTPStatus.NOT_FOUND, "not_found", f"There is nothing at {self.request.path}.")

    get = head = post = put = patch = delete = options = _missing


def _unexpected(status_code: int, error: BaseException | None) -> RequestError:
    try:
        status = HTTPStatus(status_code)
    except ValueError:
        status = HTTPStatus.INTERNAL_SERVER_ERROR
    text = status.phrase
    if isinstance(error, HTTPError) and error.log_message and status < HTTPStatus.INTERNAL_SERVER_ERROR:
        text = error.log_message % error.args if error.args else error.log_message
    return RequestError(status, status.phrase.lower().replace(" ", "_"), text)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        # A Unix socket has no address: whoever reaches it is on this host.
        return True
