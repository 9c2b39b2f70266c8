"""POST /api/v1/execute: run a cell, answer with nbformat outputs."""

from __future__ import annotations

import asyncio
import re
from http import HTTPStatus
from typing import Annotated, Any

import msgspec

from gateway.errors import Detail, RequestError, invalid_field
from gateway.execution import Cell
from gateway.handlers.base import BaseHandler, Services
from gateway.handlers.exec import exit_cause
from gateway.idempotency import EXECUTE
from gateway.session import Execution, Sending, Session
from kernelprovisioner.environment import allowed_in, denied
from kernelprovisioner.images import KernelImage

_DEFAULT_LANGUAGE = "python"
#: The kernelspec that Jupyter clients know, and the image behind it.
_KERNEL_NAMES = {"sandbox": "python"}
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MAX_ENV_BYTES = 64 * 1024


class ExecuteRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /api/v1/execute. `timeout` in seconds; `env` is set when the session is made."""

    code: str
    language: str | None = None
    kernel_name: str | None = None
    session_id: str | None = None
    timeout: Annotated[float, msgspec.Meta(gt=0)] | None = None
    store_history: bool = True
    stop_on_error: bool = True
    env: dict[str, str] | None = None


class ExecuteHandler(BaseHandler):
    """Run a cell and wait for its end."""

    takes_body = True

    async def post(self) -> None:
        owner = self.owner
        request = self.body(ExecuteRequest)
        if not request.code.strip():
            raise invalid_field("code", "is empty", "empty")
        longest = self.services.max_execution_time
        if request.timeout is not None and request.timeout > longest:
            raise invalid_field("timeout", f"is more than this server's limit of {longest:g} s")
        cell = Cell(
            request.code,
            request.timeout or longest,
            store_history=request.store_history,
            stop_on_error=request.stop_on_error,
        )

        async def run(cancelled: asyncio.Future[None], sending: Sending | None) -> Execution:
            session = self._session(owner, request)
            return await self.services.sessions.execute(session, cell, cancelled, sending)

        await self.run_cell(EXECUTE, request, run)

    def _session(self, owner: str, request: ExecuteRequest) -> Session:
        image = _image(self.services, request)
        if request.session_id is None:
            env = checked_env(image, request.env or {})
            return self.services.sessions.add(Session(owner, image.name, env=env))
        session = self.services.sessions.find(owner, request.session_id)
        if session is None:
            raise RequestError(
                HTTPStatus.NOT_FOUND,
                "session_not_found",
                "There is no session of this id.",
                details=[Detail("session_id", "is not known", "not_found")],
            )
        named = request.language is not None or request.kernel_name is not None
        if named and session.image != image.name:
            field = "language" if request.language is not None else "kernel_name"
            raise invalid_field(field, f"the session runs {session.image}", "conflict")
        if request.env is not None and request.env != session.env:
            raise invalid_field("env", "is set when a session is made; this one has another", "conflict")
        return session


def checked_env(image: KernelImage, env: dict[str, str]) -> dict[str, str]:
    """Return `env` if all of it may go into a sandbox of this image. Raises RequestError that names the variable."""
    allowed = allowed_in(image, env)
    for name, value in env.items():
        if not _VARIABLE.fullmatch(name) or "\0" in value:
            raise invalid_field(f"env.{name[:80]}", "is not a possible environment variable")
        if name not in allowed or denied(name):
            raise invalid_field(f"env.{name[:80]}", "may not be set in a sandbox", "forbidden")
    if sum(len(name) + len(value) for name, value in env.items()) > _MAX_ENV_BYTES:
        raise invalid_field("env", f"is larger than {_MAX_ENV_BYTES} bytes", "too_large")
    return env


def execute_answer(execution: Execution) -> dict[str, Any]:
    """The whole answer of POST /api/v1/execute."""
    result = execution.result
    error = result.error
    return {
        "session_id": execution.session.id,
        "status": result.status.value,
        "outputs": result.outputs.outputs(),
        "execution_count": result.execution_count,
        "error": None
        if error is None
        else {"ename": error.ename, "evalue": error.evalue, "traceback": list(error.traceback)},
        "exit_cause": exit_cause(result),
        "timings": result.timings,
        "container_id": execution.container_id,
        "source": execution.source,
    }


def _image(services: Services, request: ExecuteRequest) -> KernelImage:
    if request.language is not None and request.kernel_name is not None:
        raise invalid_field("kernel_name", "give either language or kernel_name")
    if request.kernel_name is not None:
        found = services.images.get(_KERNEL_NAMES.get(request.kernel_name, request.kernel_name))
        field, given, there = "kernel_name", request.kernel_name, [*_KERNEL_NAMES, *services.images]
    else:
        field, given = "language", request.language or _DEFAULT_LANGUAGE
        found = services.image_for(given)
        there = [image.language for image in services.images.values()]
    if found is None:
        names = ", ".join(sorted(set(there)))
        raise invalid_field(field, f"{given[:40]!r} has no kernel image here; there is: {names}", "unsupported")
    return found
