"""NotebookSession: which notebook or console a kernel runs for. It lives in its kernel, and goes with it."""

from __future__ import annotations

import uuid

import msgspec


def _new_id() -> str:
    return str(uuid.uuid4())


class NotebookSession(msgspec.Struct):
    """One entry of Jupyter's `/api/sessions`. `path` is the client's own name for it: no file of this machine."""

    path: str
    name: str
    type: str
    id: str = msgspec.field(default_factory=_new_id)
