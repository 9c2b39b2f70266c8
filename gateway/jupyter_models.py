"""The JSON of the Jupyter interface: requests and answers. The OpenAPI document is made of these, too."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from gateway.errors import RequestError
from gateway.kernel import Kernel
from gateway.kernelspecs import KernelSpec
from gateway.notebook_session import NotebookSession
from kernelprovisioner.kernelspecs import PROVISIONER_NAME

#: Longer ones are nobody's; they are kept as long as their kernel lives, also on disk.
_MAX_PATH = 4096
_MAX_NAME = 255

Path = Annotated[str, Meta(max_length=_MAX_PATH, pattern="^[^\\x00]*$")]
Name = Annotated[str, Meta(max_length=_MAX_NAME, pattern="^[^\\x00]*$")]
Id = Annotated[str, Meta(max_length=_MAX_NAME)]
Time = Annotated[str, Meta(extra_json_schema={"format": "date-time"})]


class KernelRequest(msgspec.Struct):
    """The body of POST /api/kernels."""

    name: Name | None = None
    path: Path | None = None
    env: dict[str, str | None] | None = None
    kernel_id: Id | None = None


class KernelChoice(msgspec.Struct):
    """Which kernel a notebook session is to have: one that runs, or a new one by name. The id counts more."""

    id: Id | None = None
    name: Name | None = None


class LegacyNotebook(msgspec.Struct):
    """How old clients name a notebook session's path."""

    path: Path | None = None
    name: Path | None = None


class SessionRequest(msgspec.Struct):
    """The body of POST /api/sessions, and of PATCH /api/sessions/{id}: what is absent there stays as it is."""

    path: Path | None = None
    name: Path | None = None
    type: Name | None = None
    kernel: KernelChoice | None = None
    notebook: LegacyNotebook | None = None

    def __post_init__(self) -> None:
        if self.notebook is not None:
            self.path = self.notebook.name or self.notebook.path or self.path
            self.type = "notebook"


class KernelModel(msgspec.Struct):
    """A kernel; `execution_state`: starting, idle, busy, restarting, dead. What is optional is there where one died."""

    id: str
    name: str
    last_activity: Time
    execution_state: str
    connections: int
    reason: str | UnsetType = UNSET
    traceback: str | UnsetType = UNSET
    samovar_exit: dict[str, Any] | UnsetType = UNSET


class LegacyNotebookModel(msgspec.Struct):
    """How old clients read a notebook session's path."""

    path: str
    name: str


class SessionModel(msgspec.Struct):
    """A notebook session, and the kernel that runs for it."""

    id: str
    path: str
    name: str
    type: str
    kernel: KernelModel
    notebook: LegacyNotebookModel | UnsetType = UNSET


class SpecFile(msgspec.Struct):
    """What a kernel.json says. `argv` is never run here."""

    argv: list[str]
    env: dict[str, str]
    display_name: str
    language: str
    interrupt_mode: str
    metadata: dict[str, Any]
    kernel_protocol_version: str


class KernelSpecModel(msgspec.Struct):
    """A kernelspec. `resources`: the paths of its logos, by name."""

    name: str
    spec: SpecFile
    resources: dict[str, str]


class KernelSpecsModel(msgspec.Struct):
    """All kernelspecs by name, and which of them is started where none is asked for."""

    default: str
    kernelspecs: dict[str, KernelSpecModel]


class VersionModel(msgspec.Struct):
    """The version of this gateway."""

    version: str


class StatusModel(msgspec.Struct):
    """What the caller has here."""

    started: Time
    last_activity: Time
    connections: int
    kernels: int


class IdentityModel(msgspec.Struct):
    """The owner of the API key."""

    username: str
    name: str
    display_name: str
    initials: str | None = None
    avatar_url: str | None = None
    color: str | None = None


class MeModel(msgspec.Struct):
    """Who the caller is; of the permissions asked for, those that are granted."""

    identity: IdentityModel
    permissions: dict[str, list[str]]


class FieldError(msgspec.Struct):
    """What is wrong with one field."""

    field: str
    message: str
    code: str


class ErrorModel(msgspec.Struct):
    """An error as jupyter_server tells it, with our `code`, `errors` (each names a field) and `request_id`."""

    message: str
    reason: str
    code: str
    errors: list[FieldError]
    request_id: str


def kernel_model(kernel: Kernel) -> KernelModel:
    """A kernel as the interface shows it."""
    return KernelModel(
        id=kernel.id,
        name=kernel.name,
        last_activity=jupyter_time(kernel.last_activity),
        execution_state=kernel.execution_state,
        connections=kernel.connections,
        reason=UNSET if kernel.reason is None else kernel.reason,
        traceback=UNSET if kernel.traceback is None else kernel.traceback,
        samovar_exit=UNSET if kernel.last_exit is None else kernel.last_exit.as_dict(),
    )


def session_model(kernel: Kernel, session: NotebookSession) -> SessionModel:
    """A notebook session as the interface shows it."""
    legacy = LegacyNotebookModel(session.path, session.name) if session.type == "notebook" else UNSET
    return SessionModel(session.id, session.path, session.name, session.type, kernel_model(kernel), legacy)


def kernelspec_model(spec: KernelSpec) -> KernelSpecModel:
    """A kernelspec as the interface shows it."""
    file = SpecFile(
        # The gateway starts the kernel; clients only want a list that is not empty.
        argv=[PROVISIONER_NAME, "{connection_file}"],
        env={},
        display_name=spec.image.display_name,
        language=spec.image.language,
        interrupt_mode="message",
        metadata={"debugger": True} if spec.image.language == "python" else {},
        kernel_protocol_version="5.5",
    )
    resources = {name.rpartition(".")[0]: f"/kernelspecs/{spec.name}/{name}" for name in spec.files}
    return KernelSpecModel(spec.name, file, resources)


def jupyter_body(error: RequestError, request_id: str) -> dict[str, Any]:
    """The error shape of the Jupyter interface; jupyter_server shows people `message` and `reason`."""
    details = [FieldError(detail.field, detail.message, detail.code) for detail in error.details]
    model = ErrorModel(error.message, error.status.phrase, error.code, details, request_id)
    return dict(msgspec.to_builtins(model))


def jupyter_time(moment: datetime) -> str:
    """`2026-01-31T12:00:00.000000Z`: jupyter_server reads no other form, so the microseconds are always there."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
