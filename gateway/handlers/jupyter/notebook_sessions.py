"""/api/sessions and /api/sessions/{id}: which kernel runs for which notebook."""

from __future__ import annotations

from http import HTTPStatus

from gateway.handlers.jupyter.base import JupyterHandler
from gateway.jupyter_models import SessionRequest, session_model


class NotebookSessionsHandler(JupyterHandler):
    """The caller's notebook sessions."""

    takes_body = True

    def get(self) -> None:
        found = self.jupyter.notebooks.list(self.owner)
        self.answer([session_model(notebook.kernel, notebook.session) for notebook in found])

    async def post(self) -> None:
        # Not given up where the client hangs up: its next request of the same path finds what this one makes.
        notebook = await self.jupyter.notebooks.open(self.owner, self.body(SessionRequest))
        self.set_header("Location", f"/api/sessions/{notebook.session.id}")
        self.answer(session_model(notebook.kernel, notebook.session), HTTPStatus.CREATED)


class NotebookSessionHandler(JupyterHandler):
    """One notebook session of the caller."""

    takes_body = True

    def get(self, session_id: str) -> None:
        notebook = self.jupyter.notebooks.find(self.owner, session_id)
        self.answer(session_model(notebook.kernel, notebook.session))

    async def patch(self, session_id: str) -> None:
        notebook = await self.jupyter.notebooks.change(self.owner, session_id, self.body(SessionRequest))
        self.answer(session_model(notebook.kernel, notebook.session))

    async def delete(self, session_id: str) -> None:
        await self.jupyter.notebooks.delete(self.owner, session_id)
        self.no_content()
