"""GET /api/v1/sessions, GET and DELETE /api/v1/sessions/{id}."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from gateway.errors import RequestError
from gateway.handlers.base import BaseHandler
from gateway.session import Session


class SessionsHandler(BaseHandler):
    """The caller's sessions."""

    def get(self) -> None:
        owner = self.owner
        self.answer({"sessions": [session_model(session) for session in self.services.sessions.list(owner)]})


class SessionHandler(BaseHandler):
    """One session of the caller."""

    def get(self, session_id: str) -> None:
        self.answer(session_model(self._find(session_id)))

    async def delete(self, session_id: str) -> None:
        await self.services.sessions.delete(self._find(session_id))
        self.set_status(HTTPStatus.NO_CONTENT)
        self.finish()

    def _find(self, session_id: str) -> Session:
        session = self.services.sessions.find(self.owner, session_id)
        if session is None:
            raise RequestError(HTTPStatus.NOT_FOUND, "session_not_found", "There is no session of this id.")
        return session


def session_model(session: Session) -> dict[str, Any]:
    """A session as the interface shows it."""
    return {
        "session_id": session.id,
        "image": session.image,
        "state": session.state,
        "user_id": session.user_id,
        "entity_id": session.entity_id,
        "created": session.created.isoformat(),
        "last_activity": session.last_activity.isoformat(),
        "executions": session.executions,
        "container_id": session.sandbox.container_id if session.sandbox is not None else None,
        "last_exit": session.last_exit.as_dict() if session.last_exit is not None else None,
    }
