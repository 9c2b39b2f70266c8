"""The OpenAPI document of the Jupyter interface, made from the models that its handlers use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec

from gateway.jupyter_models import (
    ErrorModel,
    KernelModel,
    KernelRequest,
    KernelSpecModel,
    KernelSpecsModel,
    MeModel,
    SessionModel,
    SessionRequest,
    StatusModel,
    VersionModel,
)

_REFERENCE = "#/components/schemas/{name}"
#: What goes wrong, as this interface answers it.
_ERRORS = {
    400: "A field is wrong or missing; the answer names it.",
    403: "No valid API key, or a page of an origin that may not call.",
    404: "There is none of this name or id, or it is another owner's.",
    409: "A kernel of the caller has this id.",
    429: "The owner has as many kernels as it may have.",
    503: "All places are taken, or no sandbox can be started: come back after the seconds in Retry-After.",
}
#: What a key holder whose request is right may meet where a kernel is started.
_STARTS = (400, 409, 429, 503)


def _optional(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


_UUID = {"type": "string", "format": "uuid", "pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"}
_ENVIRONMENT = {
    "type": "object",
    "propertyNames": {"minLength": 1, "pattern": "^[^=\\x00]*$"},
    "additionalProperties": _optional({"type": "string", "pattern": "^[^\\x00]*$"}),
    "description": "Variables of the kernel's environment; KERNEL_LAUNCH_TIMEOUT: seconds until the client gives up.",
}
_SCHEMES = {
    "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    "bearer": {"type": "http", "scheme": "bearer", "description": "Also as `Authorization: token KEY`."},
    "token": {"type": "apiKey", "in": "query", "name": "token"},
}


@dataclass(frozen=True)
class Operation:
    """One verb of one path."""

    path: str
    verb: str
    summary: str
    status: int = 200
    #: what the answer is; None: it has no body
    answer: Any = None
    body: type[msgspec.Struct] | None = None
    #: the fields that the body needs
    required: tuple[str, ...] = ()
    errors: tuple[int, ...] = ()
    is_open: bool = False
    media: str = "application/json"


OPERATIONS = (
    Operation("/api", "get", "The version of the gateway", answer=VersionModel, is_open=True),
    Operation("/api/status", "get", "What the caller has here", answer=StatusModel),
    Operation("/api/me", "get", "Who the caller is, and what he may do", answer=MeModel, errors=(400,)),
    Operation("/api/spec.yaml", "get", "This document", answer=dict[str, Any], media="text/x-yaml"),
    Operation("/api/kernelspecs", "get", "The kernels that can be started", answer=KernelSpecsModel),
    Operation("/api/kernelspecs/{name}", "get", "One of them", answer=KernelSpecModel, errors=(404,)),
    Operation("/kernelspecs/{name}/{file}", "get", "A logo", answer=str, errors=(404,), media="image/svg+xml"),
    Operation("/api/kernels", "get", "The caller's kernels", answer=list[KernelModel]),
    Operation("/api/kernels", "post", "Start a kernel", 201, KernelModel, body=KernelRequest, errors=_STARTS),
    Operation("/api/kernels/{kernel_id}", "get", "A kernel", answer=KernelModel, errors=(404,)),
    Operation("/api/kernels/{kernel_id}", "delete", "Shut a kernel down", 204, errors=(404,)),
    Operation("/api/kernels/{kernel_id}/interrupt", "post", "Interrupt what it runs", 204, errors=(404, 503)),
    Operation(
        "/api/kernels/{kernel_id}/restart",
        "post",
        "Start it anew; it keeps its id",
        answer=KernelModel,
        errors=(404, 429, 503),
    ),
    Operation(
        "/api/kernels/{kernel_id}/channels",
        "get",
        "The kernel's channels, as a websocket (v1.kernel.websocket.jupyter.org, or JSON)",
        101,
        errors=(400, 404),
    ),
    Operation("/api/sessions", "get", "The caller's notebook sessions", answer=list[SessionModel]),
    Operation(
        "/api/sessions",
        "post",
        "Open a notebook session; the one of this path where there is one",
        201,
        SessionModel,
        body=SessionRequest,
        required=("path", "type"),
        errors=_STARTS,
    ),
    Operation("/api/sessions/{session_id}", "get", "A notebook session", answer=SessionModel, errors=(404,)),
    Operation(
        "/api/sessions/{session_id}",
        "patch",
        "Rename it, or give it another kernel",
        answer=SessionModel,
        body=SessionRequest,
        errors=(404, *_STARTS),
    ),
    Operation("/api/sessions/{session_id}", "delete", "End it, and its kernel", 204, errors=(404,)),
)
_PARAMETERS: dict[str, tuple[dict[str, Any], ...]] = {
    "/api/me": (
        {
            "name": "permissions",
            "in": "query",
            "description": 'What is asked for: {"resource": ["action"]}.',
            "content": {
                "application/json": {
                    "schema": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "string"}}}
                }
            },
        },
    ),
    "/api/kernels/{kernel_id}/channels": (
        {"name": "session_id", "in": "query", "schema": {"type": "string", "maxLength": 255}},
        {
            "name": "samovar_after",
            "in": "query",
            "description": "Messages after this number of the kernel's log are sent again, each once.",
            "schema": {"type": "string"},
        },
    ),
}


@lru_cache(maxsize=1)
def document(version: str, kernel_names: tuple[str, ...]) -> bytes:
    """The document, for a gateway that has these kernelspecs, as YAML."""
    paths: dict[str, dict[str, Any]] = {}
    models = [SessionRequest, KernelRequest, ErrorModel, *(one.answer for one in OPERATIONS if one.answer is not None)]
    _, schemas = msgspec.json.schema_components(models, ref_template=_REFERENCE)
    for name in ("KernelRequest", "KernelChoice"):
        schemas[name]["properties"]["name"] = {"enum": [*kernel_names, None], "description": "A kernelspec's name"}
    schemas["KernelRequest"]["properties"]["kernel_id"] = schemas["KernelChoice"]["properties"]["id"] = _optional(_UUID)
    schemas["KernelRequest"]["properties"]["env"] = _optional(_ENVIRONMENT)
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.verb] = _operation(operation, schemas)
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "Samovar: the Jupyter interface",
            "version": version,
            "description": "Kernels, kernelspecs and sessions as jupyter_server has them, over warm sandboxes.",
        },
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": _SCHEMES},
        "security": [{name: []} for name in _SCHEMES],
    }
    # JSON is YAML, and there is nobody who could not read it.
    return json.dumps(document, indent=1).encode()


def _operation(operation: Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"summary": operation.summary, "operationId": _operation_id(operation)}
    names = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}} for name in names
    ]
    parameters += _PARAMETERS.get(operation.path, ())
    if parameters:
        found["parameters"] = parameters
    if operation.body is not None:
        schema = {"$ref": _REFERENCE.format(name=operation.body.__name__)}
        if operation.required:
            schema = _requiring(schemas[operation.body.__name__], operation.required)
        content = {"application/json": {"schema": schema}}
        found["requestBody"] = {"content": content, "required": bool(operation.required)}
    answer: dict[str, Any] = {"description": operation.summary}
    if operation.answer is not None:
        schema = _schema_of(operation.answer)
        answer["content"] = {operation.media: {"schema": schema}}
    if operation.status == 201:
        answer["headers"] = {"Location": {"description": "Where it is", "schema": {"type": "string"}}}
    found["responses"] = {str(operation.status): answer}
    errors = set(operation.errors) if operation.is_open else {403, *operation.errors}
    for status in sorted(errors):
        found["responses"][str(status)] = _error(status)
    if operation.is_open:
        found["security"] = []
    return found


def _error(status: int) -> dict[str, Any]:
    described: dict[str, Any] = {
        "description": _ERRORS[status],
        "content": {"application/json": {"schema": {"$ref": _REFERENCE.format(name=ErrorModel.__name__)}}},
    }
    if status in (429, 503):
        described["headers"] = {"Retry-After": {"description": "Seconds", "schema": {"type": "integer"}}}
    return described


def _schema_of(answer: Any) -> dict[str, Any]:
    ((schema,), _) = msgspec.json.schema_components([answer], ref_template=_REFERENCE)
    return dict(schema)


def _requiring(schema: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """`schema` with these properties there and not null; every one of them is a text."""
    properties = dict(schema["properties"])
    for name in names:
        (text,) = (choice for choice in properties[name]["anyOf"] if choice != {"type": "null"})
        properties[name] = text | {"minLength": 1}
    return schema | {"properties": properties, "required": list(names)}


def _operation_id(operation: Operation) -> str:
    words = [part.strip("{}") for part in operation.path.split("/") if part]
    return "_".join([operation.verb, *words]).replace(".", "_")
