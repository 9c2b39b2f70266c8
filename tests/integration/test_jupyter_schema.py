"""schemathesis against the Jupyter interface's own OpenAPI document: made-up requests, answers as the document says."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.generation.case import Case

from gateway.openapi import OPERATIONS, Operation
from tests.gateway_process import GatewayProcess

#: Whatever else is asked, one of these two is there to be asked about.
KERNEL, NOTEBOOK = "6f1c2f0e-0000-4000-8000-000000000001", "notebook of the tests"
REAL = {"kernel_id": KERNEL, "name": "sandbox", "file": "logo-svg.svg"}
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
#: Of made-up requests; fewer where each takes a sandbox.
EXAMPLES, STARTS = 25, 12
#: How requests that keep to the document may be answered all the same: by 503; by 400, where what they name is no
#: kernel that is there (PATCH), or they are none of a websocket.
PASSED_OVER = [schemathesis.checks.not_a_server_error, schemathesis.checks.positive_data_acceptance]
MAY_BE_400 = ("patch /api/sessions/{session_id}", "get /api/kernels/{kernel_id}/channels")
#: Documented, and no failure of ours where all places are taken; every other 5xx is one.
BUSY = 503


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    """`samovar serve` with plain processes as sandboxes, and room for many."""
    settings = {"SAMOVAR_LAUNCHER": "process", "CONTAINER_POOL_MIN_SIZE": "2", "CONTAINER_POOL_MAX_SIZE": "100"}
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as directory:
        process = GatewayProcess(Path(directory), None, settings)
        try:
            process.start()
            yield process
        finally:
            if process.process is not None:
                assert process.stop() == 0, process.log.read_text()
        log = process.log.read_text()
        assert "Traceback" not in log, log


@pytest.fixture(scope="module")
def document(gateway: GatewayProcess) -> Any:
    """The document, read as any user of it does."""
    return schemathesis.openapi.from_url(f"{gateway.url}/api/spec.yaml", headers={"x-api-key": gateway.key})


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: f"{one.verb} {one.path}")
@pytest.mark.limit(120)
def test_answers_are_as_documented(operation: Operation, document: Any, gateway: GatewayProcess) -> None:
    made_up = document[operation.path][operation.verb]
    examples = STARTS if BUSY in operation.errors or operation.verb == "delete" else EXAMPLES
    passed_over = PASSED_OVER if f"{operation.verb} {operation.path}" in MAY_BE_400 else PASSED_OVER[:1]

    @hypothesis.given(case=hypothesis.strategies.one_of([made_up.as_strategy(generation_mode=mode) for mode in MODES]))
    @hypothesis.settings(max_examples=examples, suppress_health_check=list(hypothesis.HealthCheck), derandomize=True)
    def answer_is_as_documented(case: Case) -> None:
        meet_what_is_there(case, gateway)
        response = case.call(headers={"x-api-key": gateway.key})
        assert response.status_code < 500 or response.json()["code"] == "too_busy", response.text
        case.validate_response(response, excluded_checks=passed_over)
        if response.status_code == 201:
            made = response.json()
            kernel = made.get("kernel", made)["id"]
            if kernel != KERNEL:
                gateway.call("DELETE", f"/api/kernels/{kernel}")

    answer_is_as_documented()


def meet_what_is_there(case: Case, gateway: GatewayProcess) -> None:
    """Half of the made-up names become real ones; the others stay, and are 404s."""
    for name in case.path_parameters or {}:
        if len(str(case.path_parameters[name])) % 2:
            case.path_parameters[name] = existing(gateway) if name == "session_id" else REAL[name]
            if name == "kernel_id":
                existing(gateway)


def existing(gateway: GatewayProcess) -> str:
    """The id of a session that is there, with a kernel that is there."""
    body = {"path": NOTEBOOK, "type": "notebook", "kernel": {"id": KERNEL}}
    answer = gateway.call("POST", "/api/sessions", body)
    assert answer.status == 201, answer
    return str(answer.body["id"])
