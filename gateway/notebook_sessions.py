"""NotebookSessions: which notebooks the kernels run for. The entries themselves live in the kernels."""

from __future__ import annotations

import asyncio
import posixpath
from dataclasses import dataclass
from http import HTTPStatus
from weakref import WeakValueDictionary

from gateway.errors import Detail, RequestError, too_many
from gateway.jupyter_models import KernelChoice, SessionRequest
from gateway.kernel import Kernel
from gateway.kernels import KernelRegistry
from gateway.notebook_session import NotebookSession

#: Notebook sessions that one kernel may have: each costs memory, and a line in the record of its sandbox.
MAX_PER_KERNEL = 100
#: What jupyter_server tells a kernel of its notebook, and IPython shows as `__session__`.
_SESSION_NAME = "JPY_SESSION_NAME"


@dataclass(frozen=True)
class OpenNotebook:
    """A notebook session, and the kernel that it lives in."""

    kernel: Kernel
    session: NotebookSession


class NotebookSessions:
    """The notebook sessions of all owners, each visible to its own only."""

    def __init__(self, kernels: KernelRegistry) -> None:
        self._kernels = kernels
        # One POST at a time for each path: the second one finds what the first one made.
        self._turns: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    def list(self, owner: str) -> list[OpenNotebook]:
        """The owner's notebook sessions, in the order of their kernels."""
        return [
            OpenNotebook(kernel, session)
            for kernel in self._kernels.list(owner)
            for session in kernel.notebooks.values()
        ]

    def find(self, owner: str, session_id: str) -> OpenNotebook:
        """The owner's notebook session of that id. Raises RequestError (404)."""
        for notebook in self.list(owner):
            if notebook.session.id == session_id:
                return notebook
        raise RequestError(HTTPStatus.NOT_FOUND, "session_not_found", f"Session not found: {session_id[:80]}")

    async def open(self, owner: str, request: SessionRequest) -> OpenNotebook:
        """The owner's notebook session of the path asked for; a new one, if need be with a new kernel, where none is.

        One whose kernel is dead does not count. Raises RequestError: 400, and what starting a kernel raises.
        """
        path, kind = _present("path", request.path), _present("type", request.type)
        turn = self._turns.setdefault((owner, path), asyncio.Lock())
        async with turn:
            for notebook in self.list(owner):
                if notebook.session.path == path:
                    if not notebook.kernel.dead:
                        return notebook
                    del notebook.kernel.notebooks[notebook.session.id]
            kernel, started = await self._kernel(owner, request.kernel or KernelChoice(), path)
            try:
                return await self._add(kernel, NotebookSession(path, request.name or "", kind))
            except BaseException:
                if started:
                    await self._kernels.shutdown(kernel)
                raise

    async def change(self, owner: str, session_id: str, request: SessionRequest) -> OpenNotebook:
        """Change what the request names. A kernel that no notebook session is left in by that is shut down.

        Raises RequestError: 404, 400 for a kernel that is not there, and what starting a kernel raises.
        """
        notebook = self.find(owner, session_id)
        choice, target, started = request.kernel or KernelChoice(), notebook.kernel, False
        if choice.id:
            target = self._existing(owner, choice.id)
        elif choice.name:
            target, started = await self._kernel(owner, choice, request.path or notebook.session.path)
        try:
            # While a kernel was started, another request may have moved or deleted it.
            notebook = self.find(owner, session_id)
            if target is not notebook.kernel:
                _check_room(target)
        except RequestError:
            if started:
                await self._kernels.shutdown(target)
            raise
        session, before = notebook.session, notebook.kernel
        session.path = request.path or session.path
        session.name = session.name if request.name is None else request.name
        session.type = request.type or session.type
        del before.notebooks[session.id]
        target.notebooks[session.id] = session
        await self._kernels.note(target)
        if target is not before:
            await (self._kernels.note(before) if before.notebooks else self._kernels.shutdown(before))
        return OpenNotebook(target, session)

    async def delete(self, owner: str, session_id: str) -> None:
        """End a notebook session together with its kernel, as jupyter_server does. Raises RequestError (404)."""
        await self._kernels.shutdown(self.find(owner, session_id).kernel)

    async def _add(self, kernel: Kernel, session: NotebookSession) -> OpenNotebook:
        _check_room(kernel)
        kernel.notebooks[session.id] = session
        await self._kernels.note(kernel)
        return OpenNotebook(kernel, session)

    async def _kernel(self, owner: str, choice: KernelChoice, path: str) -> tuple[Kernel, bool]:
        """The kernel that is meant, and whether it was started for this."""
        if choice.id:
            for kernel in self._kernels.list(owner):
                if kernel.id == choice.id:
                    return kernel, False
        try:
            kernel = await self._kernels.start(
                owner,
                name=choice.name or None,
                path=posixpath.dirname(path),
                env={_SESSION_NAME: path},
                kernel_id=choice.id or None,
            )
        except RequestError as error:
            error.details = tuple(_below_kernel(detail) for detail in error.details)
            raise
        return kernel, True

    def _existing(self, owner: str, kernel_id: str) -> Kernel:
        for kernel in self._kernels.list(owner):
            if kernel.id == kernel_id:
                return kernel
        text = f"No such kernel: {kernel_id[:80]}"
        details = [Detail("kernel.id", text, "not_found")]
        raise RequestError(HTTPStatus.BAD_REQUEST, "kernel_not_found", text, details=details)


def _present(field: str, value: str | None) -> str:
    if not value:
        text = f"Missing field in JSON data: {field}"
        raise RequestError(HTTPStatus.BAD_REQUEST, "validation", text, details=[Detail(field, text, "missing")])
    return value


def _check_room(kernel: Kernel) -> None:
    if len(kernel.notebooks) >= MAX_PER_KERNEL:
        raise too_many(f"The kernel has {MAX_PER_KERNEL} sessions already.", "notebook_sessions", 10)


def _below_kernel(detail: Detail) -> Detail:
    """In this body the kernel's name and id stand one level deeper."""
    names = {"name": "kernel.name", "kernel_id": "kernel.id"}
    return Detail(names.get(detail.field, detail.field), detail.message, detail.code)
