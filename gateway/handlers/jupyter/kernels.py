"""/api/kernels, /api/kernels/{id}, and its /interrupt and /restart."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

from gateway.errors import Detail, RequestError
from gateway.handlers.jupyter.base import JupyterHandler
from gateway.jupyter_models import KernelRequest, kernel_model

#: What an environment may be altogether, in characters: it travels in one message, and stands in a record.
_MAX_ENV = 64 * 1024


class KernelsHandler(JupyterHandler):
    """The caller's kernels."""

    takes_body = True

    def get(self) -> None:
        self.answer([kernel_model(kernel) for kernel in self.jupyter.kernels.list(self.owner)])

    async def post(self) -> None:
        owner, request = self.owner, self.body(KernelRequest)
        kernel = await self.jupyter.kernels.start(
            owner,
            name=request.name or None,
            path=request.path or None,
            env=_checked_env(request.env or {}),
            kernel_id=request.kernel_id or None,
            cancelled=self.hung_up,
        )
        self.set_header("Location", f"/api/kernels/{kernel.id}")
        self.answer(kernel_model(kernel), HTTPStatus.CREATED)


class KernelHandler(JupyterHandler):
    """One kernel of the caller."""

    def get(self, kernel_id: str) -> None:
        self.answer(kernel_model(self.jupyter.kernels.find(self.owner, kernel_id)))

    async def delete(self, kernel_id: str) -> None:
        await self.jupyter.kernels.shutdown(self.jupyter.kernels.find(self.owner, kernel_id))
        self.no_content()


class InterruptHandler(JupyterHandler):
    """Interrupt what a kernel runs."""

    async def post(self, kernel_id: str) -> None:
        await self.jupyter.kernels.interrupt(self.jupyter.kernels.find(self.owner, kernel_id))
        self.no_content()


class RestartHandler(JupyterHandler):
    """Give a kernel a new sandbox; it keeps its id."""

    async def post(self, kernel_id: str) -> None:
        kernel = self.jupyter.kernels.find(self.owner, kernel_id)
        await self.jupyter.kernels.restart(kernel)
        self.set_header("Location", f"/api/kernels/{kernel.id}")
        self.answer(kernel_model(kernel))


def _checked_env(env: Mapping[str, str | None]) -> dict[str, str]:
    """What is set in `env`. Raises RequestError (400) that names what no environment can hold.

    A sandbox would refuse it at its claim, and be lost with that.
    """
    chosen = {name: value for name, value in env.items() if value is not None}
    for name, value in chosen.items():
        if not name or "=" in name or "\0" in name or "\0" in value:
            raise _wrong_env(f"env.{name[:80]}", "is not a possible environment variable")
    if sum(len(name) + len(value) for name, value in chosen.items()) > _MAX_ENV:
        raise _wrong_env("env", f"is larger than {_MAX_ENV} characters")
    return chosen


def _wrong_env(field: str, why: str) -> RequestError:
    details = [Detail(field, why, "invalid")]
    return RequestError(HTTPStatus.BAD_REQUEST, "validation", f"{field}: {why}", details=details)
