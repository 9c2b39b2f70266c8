"""What the handlers of the Jupyter interface share: tokens, bodies and errors as jupyter_server's clients know them."""

from __future__ import annotations

from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

import msgspec
from tornado.httputil import HTTPServerRequest

from gateway.errors import RequestError
from gateway.handlers.base import BaseHandler, Services, StructT
from gateway.jupyter_models import jupyter_body
from gateway.jupyter_services import JupyterServices


def owner_of(services: Services, request: HTTPServerRequest) -> str | None:
    """Whose key the request carries: in its headers, or as `?token=`; None without a valid one."""
    (token, *_) = request.query_arguments.get("token") or [b""]
    return services.keys.owner(request.headers, token.decode(errors="replace"))


def check_origin(jupyter: JupyterServices, request: HTTPServerRequest) -> None:
    """Raises RequestError (403) for a page of another origin than those that are configured, where some are."""
    origin = request.headers.get("Origin")
    if not jupyter.cors.permits(origin, request.headers.get("Host")):
        text = f"Pages of {origin} may not call this gateway (JupyterSettings.allow_origin)."
        raise RequestError(HTTPStatus.FORBIDDEN, "origin", text)


def no_key() -> RequestError:
    """The 403 for a request without a valid key."""
    return RequestError(
        HTTPStatus.FORBIDDEN,
        "authentication",
        "Forbidden: a valid API key is needed, as Authorization: token KEY (or Bearer), as ?token= or in x-api-key.",
    )


class JupyterHandler(BaseHandler):
    """A request of the Jupyter interface. It reads and sets no cookies, so there is nothing to forge across sites."""

    jupyter: JupyterServices
    #: whether a call shows that its owner is there
    is_activity = True
    error_family = staticmethod(jupyter_body)
    error_type = "application/json"

    def initialize(self, services: Services, jupyter: JupyterServices) -> None:  # type: ignore[override]
        super().initialize(services)
        self.jupyter = jupyter

    def prepare(self) -> None:
        super().prepare()
        self._set_cors_headers()

    def find_owner(self) -> str | None:
        return owner_of(self.services, self.request)

    @property
    def owner(self) -> str:
        """Whose key the request carries. Raises RequestError (403)."""
        check_origin(self.jupyter, self.request)
        owner = self.find_owner()
        if owner is None:
            raise no_key()
        if self.is_activity and "no_track_activity" not in self.request.query_arguments:
            self.jupyter.calls[owner] = datetime.now(UTC)
        return owner

    def body(self, kind: type[StructT]) -> StructT:
        """The JSON body as `kind`; empty or null is an empty object. Raises RequestError (400) that names the field."""
        if bytes(self._received).strip() in (b"", b"null"):
            return kind()
        try:
            return super().body(kind)
        except RequestError as error:
            raise RequestError(HTTPStatus.BAD_REQUEST, error.code, error.message, details=error.details) from None

    def answer(self, value: object, status: HTTPStatus = HTTPStatus.OK) -> None:
        super().answer(msgspec.to_builtins(value), status)

    def no_content(self) -> None:
        """Finish with 204."""
        self.set_status(HTTPStatus.NO_CONTENT)
        self.set_header("X-Request-Id", self.request_id)
        self.finish()

    def options(self, *_: str) -> None:
        """The question of a browser whether a page of another origin may call."""
        for name, value in self.jupyter.cors.preflight(self.request.headers.get("Origin")).items():
            self.set_header(name, value)
        self.no_content()

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        # Tornado has just cleared them, and without them a page does not see what is wrong.
        self._set_cors_headers()
        super().write_error(status_code, **kwargs)

    def _set_cors_headers(self) -> None:
        origin = self.request.headers.get("Origin")
        authenticated = origin is not None and self.find_owner() is not None
        for name, value in self.jupyter.cors.headers(origin, authenticated=authenticated).items():
            self.set_header(name, value)


class JupyterNotFoundHandler(JupyterHandler):
    """What jupyter_server has and a gateway for kernels has not: contents, terminals and so on."""

    def _missing(self, *_: str) -> None:
        text = f"There is nothing at {self.request.path}: this gateway serves kernels, kernelspecs and sessions."
        raise RequestError(HTTPStatus.NOT_FOUND, "not_found", text)

    get = head = post = put = patch = delete = _missing
