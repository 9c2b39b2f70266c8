"""POST /exec: the code interpreter's call."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any

import msgspec

from gateway.errors import invalid_field
from gateway.execution import Cell, CellResult, Status
from gateway.handlers.base import LANGUAGES, ExecFamilyHandler, Services
from gateway.idempotency import EXEC
from gateway.session import Execution, Sending, Session
from kernelprovisioner.images import KernelImage

_MAX_ARGS = 1000


class ExecFile(msgspec.Struct):
    """A file that the code is to find in its working directory."""

    id: str
    session_id: str
    name: str
    restore_state: bool = False


class ExecRequest(msgspec.Struct):
    """The body of POST /exec; keys that are not listed are ignored, as other servers of this family do."""

    code: str
    lang: str
    args: Any = None
    user_id: Annotated[str, msgspec.Meta(max_length=200)] | None = None
    entity_id: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,40}\Z")] | None = None
    session_id: Annotated[str, msgspec.Meta(max_length=200)] | None = None
    files: list[ExecFile] | None = None


class ExecHandler(ExecFamilyHandler):
    """Run code in a session, answer with what it wrote."""

    takes_body = True

    async def post(self) -> None:
        owner = self.owner
        request = self.body(ExecRequest)
        if not request.code.strip():
            raise invalid_field("code", "is empty", "empty")
        if request.files:
            raise invalid_field("files[0].id", f"no file {request.files[0].id!r} is known", "not_found")
        image = _image(self.services, request.lang)
        cell = Cell(request.code, self.services.max_execution_time, argv=arguments(request.args))
        sessions = self.services.sessions

        async def run(cancelled: asyncio.Future[None], sending: Sending | None) -> Execution:
            session = sessions.resolve(
                owner, session_id=request.session_id, user_id=request.user_id, entity_id=request.entity_id
            )
            if session is None or session.image != image.name:
                named = request.session_id is not None
                session = sessions.add(Session(owner, image.name, request.user_id, request.entity_id, named=named))
            return await sessions.execute(session, cell, cancelled, sending)

        await self.run_cell(EXEC, request, run)


def arguments(args: Any) -> list[str]:
    """`sys.argv[1:]` for the JSON value `args`: a list's elements, or one value. Raises RequestError."""
    values = args if isinstance(args, list) else [] if args is None else [args]
    if len(values) > _MAX_ARGS:
        raise invalid_field("args", f"has {len(values)} elements, at most {_MAX_ARGS} are possible")
    return [value if isinstance(value, str) else json.dumps(value) for value in values]


def exec_answer(execution: Execution) -> dict[str, Any]:
    """The whole answer of POST /exec."""
    result = execution.result
    return {
        "session_id": execution.session.id,
        "files": [],
        "stdout": _stdout(result),
        "stderr": _stderr(result),
        "has_state": False,
        "state_size": None,
        "state_hash": None,
        "status": result.status.value,
        "outputs": result.outputs.outputs(),
        "execution_count": result.execution_count,
        "exit_cause": exit_cause(result),
        "timings": result.timings,
        "container_id": execution.container_id,
        "source": execution.source,
    }


def exit_cause(result: CellResult) -> dict[str, Any] | None:
    """Why a cell did not end by itself: `cause`, `text`, and how its kernel ended where it did; else None."""
    note = result.note
    if note is None:
        return None
    ended = note.exit
    return {
        "cause": note.cause,
        "text": note.text,
        "exit_code": ended.exit_code if ended is not None else None,
        "signal": ended.signal if ended is not None else None,
        "evidence": ended.evidence if ended is not None else {},
        "at": ended.at.isoformat() if ended is not None else None,
        "cell": ended.cell.as_dict() if ended is not None and ended.cell is not None else None,
        "session_lost": ended is not None,
    }


def _stdout(result: CellResult) -> str:
    return result.outputs.written("stdout") or _line(result.outputs.result_text)


def _stderr(result: CellResult) -> str:
    text = result.outputs.written("stderr")
    if result.error is not None and not (result.status is Status.TIMEOUT and not result.error.traceback):
        text = _line(text) + result.error.plain_traceback
    if result.note is not None:
        text = _line(text) + result.note.text + "\n"
    return text


def _line(text: str | None) -> str:
    """`text` ending with a line break, unless it is empty."""
    return (text or "") if not text or text.endswith("\n") else text + "\n"


def _image(services: Services, lang: str) -> KernelImage:
    image = services.image_for(lang)
    if image is None:
        shorts = {name: short for short, name in LANGUAGES.items()}
        there = sorted(shorts.get(known.language, known.language) for known in services.images.values())
        raise invalid_field(
            "lang", f"{lang[:40]!r} has no kernel image here; there is: {', '.join(there)}", "unsupported"
        )
    return image
