"""/api, /api/status, /api/me and /api/spec.yaml."""

from __future__ import annotations

from http import HTTPStatus

import msgspec

from gateway import __version__, openapi
from gateway.errors import Detail, RequestError
from gateway.handlers.jupyter.base import JupyterHandler
from gateway.jupyter_models import IdentityModel, MeModel, StatusModel, VersionModel, jupyter_time

#: What an owner may do here, by resource; there is nobody who may do less.
_GRANTED = {
    "api": ["read"],
    "kernels": ["read", "write", "execute"],
    "kernelspecs": ["read"],
    "sessions": ["read", "write"],
}


class VersionHandler(JupyterHandler):
    """The version; open to everybody, as in jupyter_server."""

    def get(self) -> None:
        self.answer(VersionModel(__version__))


class StatusHandler(JupyterHandler):
    """How many kernels and open connections the caller has."""

    is_activity = False

    def get(self) -> None:
        owner, jupyter = self.owner, self.jupyter
        kernels = jupyter.kernels.list(owner)
        self.answer(
            StatusModel(
                started=jupyter_time(jupyter.started),
                last_activity=jupyter_time(jupyter.last_activity(owner)),
                connections=sum(kernel.connections for kernel in kernels),
                kernels=sum(not kernel.dead for kernel in kernels),
            )
        )


class MeHandler(JupyterHandler):
    """Who the caller is, and which of the permissions asked for he has."""

    def get(self) -> None:
        owner = self.owner
        granted = {
            resource: [action for action in actions if action in _GRANTED.get(resource, [])]
            for resource, actions in self._asked().items()
        }
        # Nothing of an identity can be changed here; JupyterLab looks for the key.
        granted["updatable_fields"] = []
        self.answer(MeModel(IdentityModel(owner, owner, owner), granted))

    def _asked(self) -> dict[str, list[str]]:
        text = self.request.query_arguments.get("permissions", [b""])[-1].strip()
        try:
            return msgspec.json.decode(text or b"{}", type=dict[str, list[str]])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            why = 'permissions should be a JSON dict of {"resource": ["action",]}'
            details = [Detail("permissions", why, "invalid")]
            raise RequestError(HTTPStatus.BAD_REQUEST, "validation", why, details=details) from None


class DocumentHandler(JupyterHandler):
    """The OpenAPI document of this interface."""

    def get(self) -> None:
        _ = self.owner
        names = tuple(spec.name for spec in self.jupyter.specs.list())
        self.set_header("Content-Type", "text/x-yaml")
        self.finish(openapi.document(__version__, names))
