"""The HTTP interface over fake sandboxes: shapes of answers and errors, keys, and clients that go away."""

from __future__ import annotations

import asyncio
import json
import logging
import tracemalloc
from typing import Any

import pytest
from tornado.httpclient import AsyncHTTPClient

from gateway.limits import OwnerBounds
from kernelprovisioner.pool import PoolFull
from tests.unit.gateway_fakes import FakeSandbox
from tests.unit.served_api import KEY, served


def result_then_error(sandbox: FakeSandbox, msg_id: str, content: dict[str, Any]) -> None:
    """`value` gives 42 as the last expression's value; all else raises."""
    if content["code"] == "value":
        data = {"data": {"text/plain": "42"}, "metadata": {}, "execution_count": 1}
        sandbox.say(msg_id, "iopub", "execute_result", data)
        sandbox.reply(msg_id)
    else:
        error = {"ename": "E", "evalue": "v", "traceback": ["\x1b[31mTraceback\x1b[0m"]}
        sandbox.say(msg_id, "iopub", "error", error)
        sandbox.reply(msg_id, "error", **error)
    sandbox.idle(msg_id)


async def test_exec_answers_its_whole_shape() -> None:
    async with served() as api:
        answer = await api.exec(code="code", args=["a", 5, None])
        assert set(answer) == {
            *("session_id", "files", "stdout", "stderr", "has_state", "state_size", "state_hash"),
            *("status", "outputs", "execution_count", "exit_cause", "timings", "container_id", "source"),
        }
        assert (answer["stdout"], answer["files"], answer["has_state"]) == ("code", [], False)
        assert api.pool.made[0].wire.metadata[0] == {"samovar": {"argv": ["a", "5", "null"]}}
        again = await api.exec(code="more", session_id=answer["session_id"])
        assert again["container_id"] == answer["container_id"]


async def test_the_last_value_is_stdout_where_nothing_was_written_and_tracebacks_are_plain() -> None:
    async with served(result_then_error) as api:
        assert (await api.exec(code="value"))["stdout"] == "42\n"
        failed = await api.exec(code="raise")
        assert (failed["status"], failed["stdout"], failed["stderr"]) == ("error", "", "Traceback\n")


async def test_execute_answers_outputs_and_error() -> None:
    async with served(result_then_error) as api:
        response = await api.call("POST", "/api/v1/execute", {"code": "raise", "env": {"A": "1"}})
        answer = json.loads(response.body)
        assert answer["error"] == {"ename": "E", "evalue": "v", "traceback": ["\x1b[31mTraceback\x1b[0m"]}
        assert answer["outputs"][0]["output_type"] == "error"
        assert api.pool.claims[0][1].env == {"A": "1"}
        other = await api.call("POST", "/api/v1/execute", {"code": "x", "session_id": answer["session_id"], "env": {}})
        assert other.code == 422 and b"env" in other.body


async def test_an_entity_comes_back_to_its_session_also_when_both_calls_come_at_once() -> None:
    async with served() as api:
        one, two = await asyncio.gather(
            api.exec(code="1", entity_id="a", user_id="u"), api.exec(code="2", entity_id="a", user_id="u")
        )
        assert one["session_id"] == two["session_id"]
        assert (await api.exec(code="3", entity_id="a"))["session_id"] != one["session_id"]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/exec", {"code": "  ", "lang": "py"}, "code"),
        ("/exec", {"code": "1"}, "lang"),
        ("/exec", {"code": "1", "lang": "rust"}, "lang"),
        ("/exec", {"code": "1", "lang": "py", "entity_id": "a\n"}, "entity_id"),
        ("/exec", {"code": "1", "lang": "py", "entity_id": "a" * 41}, "entity_id"),
        ("/exec", {"code": "1", "lang": "py", "files": [{"id": "f"}]}, "files[0].session_id"),
        ("/exec", {"code": "1", "lang": "py", "files": [{"id": "f", "session_id": "s", "name": "n"}]}, "files[0].id"),
        ("/exec", {"code": "1", "lang": "py", "args": ["x"] * 5000}, "args"),
        ("/api/v1/execute", {"code": "1", "stream": True}, "stream"),
        ("/api/v1/execute", {"code": "1", "timeout": 0}, "timeout"),
        ("/api/v1/execute", {"code": "1", "timeout": 99999}, "timeout"),
        ("/api/v1/execute", {"code": "1", "kernel_name": "nope"}, "kernel_name"),
        ("/api/v1/execute", {"code": "1", "kernel_name": "sandbox", "language": "python"}, "kernel_name"),
        ("/api/v1/execute", {"code": "1", "env": {"LD_PRELOAD": "x"}}, "env.LD_PRELOAD"),
        ("/api/v1/execute", {"code": "1", "env": {"A-B": "x"}}, "env.A-B"),
        ("/api/v1/execute", {"code": "1", "env": {"A": "\0"}}, "env.A"),
    ],
)
async def test_a_bad_field_is_named_in_the_shape_of_its_family(path: str, body: dict[str, Any], field: str) -> None:
    async with served() as api:
        response = await api.call("POST", path, body)
        assert response.code == 422
        answer = json.loads(response.body)
        if path == "/exec":
            assert set(answer) == {"error", "error_type", "details", "request_id", "timestamp"}
            assert answer["details"][0]["field"] == field
        else:
            assert response.headers["Content-Type"] == "application/problem+json"
            assert {"type", "title", "status", "detail"} <= set(answer)
            assert answer["errors"][0]["field"] == field
        assert api.pool.made == []


@pytest.mark.parametrize("raw", [b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"code": "\\ud800"}'])
async def test_a_body_that_is_no_object_is_a_4xx(raw: bytes) -> None:
    async with served() as api:
        for path in ("/exec", "/api/v1/execute"):
            assert (await api.call("POST", path, raw=raw)).code in (400, 422)


async def test_without_key_nothing_runs_and_sessions_of_others_are_not_there() -> None:
    async with served() as api:
        for path in ("/exec", "/api/v1/execute"):
            response = await api.call("POST", path, {"code": "1", "lang": "py"}, key="")
            assert response.code == 401 and "WWW-Authenticate" in response.headers
        session = (await api.exec(code="1"))["session_id"]
        for method in ("GET", "DELETE"):
            assert (await api.call(method, f"/api/v1/sessions/{session}", key="")).code == 401
            assert (await api.call(method, f"/api/v1/sessions/{session}", key="another-key")).code == 404
        assert json.loads((await api.call("GET", "/api/v1/sessions", key="another-key")).body) == {"sessions": []}
        assert (await api.call("DELETE", f"/api/v1/sessions/{session}")).code == 204
        assert (await api.call("GET", f"/api/v1/sessions/{session}")).code == 404


async def test_a_full_line_is_a_503_with_retry_after() -> None:
    async with served() as api:
        api.pool.error = PoolFull("all places are taken", 7)
        for path in ("/exec", "/api/v1/execute"):
            body = {"code": "1", **({"lang": "py"} if path == "/exec" else {})}
            response = await api.call("POST", path, body)
            assert (response.code, response.headers["Retry-After"]) == (503, "7")


async def test_a_client_that_hangs_up_interrupts_its_cell() -> None:
    async with served(lambda *_: None) as api:
        _, writer = await asyncio.open_connection("127.0.0.1", api.port)
        body = b'{"code": "1", "lang": "py"}'
        head = f"POST /exec HTTP/1.1\r\nHost: x\r\nx-api-key: {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        async with asyncio.timeout(2):
            await api.pool.claimed.wait()
            writer.close()
            await api.pool.given_back.wait()
        assert api.pool.made[0].interrupts == 1
        await api.sessions.drain(2.0, asyncio.Event())


async def test_health_is_open_and_its_details_are_open_to_this_host_only_where_configured() -> None:
    async def broken() -> dict[str, Any]:
        raise OSError("no engine")

    async with served(check=broken) as api:
        assert json.loads((await api.call("GET", "/health", key="")).body)["status"] == "healthy"
        detailed = await api.call("GET", "/health/detailed", key="")
        assert detailed.code == 503
        assert json.loads(detailed.body)["services"]["engine"]["error"] == "no engine"
        assert (await api.call("GET", "/metrics/pool", key="")).code == 200
    async with served(local_monitoring=False) as api:
        for path in ("/health/detailed", "/metrics/pool"):
            assert (await api.call("GET", path, key="")).code == 401
            assert (await api.call("GET", path)).code == 200


async def test_unknown_paths_and_wrong_methods_have_the_shape_of_errors() -> None:
    async with served() as api:
        for method, path, code in (("GET", "/nothing", 404), ("GET", "/exec", 405), ("DELETE", "/api/v1/execute", 405)):
            response = await api.call(method, path)
            assert response.code == code
            assert "request_id" in json.loads(response.body)


@pytest.mark.parametrize("path", ["/exec", "/nothing"])
async def test_of_a_stranger_s_body_nothing_is_kept(path: str) -> None:
    async with served() as api:
        tracemalloc.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 8000000\r\n\r\n".encode())
        for _ in range(80):
            writer.write(b"x" * 100_000)
            await writer.drain()
        status = (await asyncio.wait_for(reader.readline(), 5)).split()[1]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert status == (b"401" if path == "/exec" else b"404")
        assert peak < 4_000_000
        writer.close()
        await writer.wait_closed()


async def test_a_form_is_no_json_and_is_not_taken_apart_as_one() -> None:
    async with served() as api:
        headers = {"x-api-key": KEY, "Content-Type": "multipart/form-data"}
        url = f"http://127.0.0.1:{api.port}/exec"
        response = await AsyncHTTPClient().fetch(url, method="POST", body=b"a=1", headers=headers, raise_error=False)
        assert (response.code, json.loads(response.body)["error_type"]) == (400, "invalid_json")


async def test_a_client_that_goes_away_in_the_middle_of_its_body_leaves_nothing() -> None:
    async with served() as api:
        before = asyncio.all_tasks()
        _, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(f"POST /exec HTTP/1.1\r\nHost: x\r\nx-api-key: {KEY}\r\nContent-Length: 100\r\n\r\n{{".encode())
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()
        await writer.wait_closed()
        await asyncio.sleep(0.05)
        assert asyncio.all_tasks() <= before
        assert api.pool.made == []


async def test_more_executions_than_an_owner_may_have_are_a_429_that_names_the_limit() -> None:
    async with served(lambda *_: None, owner_bounds=OwnerBounds(executions=1)) as api:
        running = asyncio.create_task(api.call("POST", "/api/v1/execute", {"code": "1", "timeout": 0.2}))
        async with asyncio.timeout(5):
            await api.pool.claimed.wait()
        first = await api.call("POST", "/exec", {"code": "1", "lang": "py"})
        second = await api.call("POST", "/api/v1/execute", {"code": "1"})
        for response in (first, second):
            assert (response.code, response.headers["Retry-After"]) == (429, "1")
            assert b"OwnerLimits.max_executions" in response.body
        assert json.loads(first.body)["error_type"] == "limit_reached"
        assert json.loads(second.body)["type"] == "urn:samovar:problem:limit-reached"
        assert (await running).code == 200


async def test_a_flood_does_not_fill_the_log_with_errors(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tornado.access")
    async with served() as api:
        api.pool.error = PoolFull("all places are taken", 7)
        assert (await api.call("POST", "/exec", {"code": "1", "lang": "py"})).code == 503
        api.pool.error = ValueError("broken")
        assert (await api.call("POST", "/exec", {"code": "1", "lang": "py"})).code == 500
    requests = [record for record in caplog.records if record.name == "tornado.access"]
    levels = [(record.levelname, record.getMessage()[:3]) for record in requests]
    assert levels == [("INFO", "503"), ("ERROR", "500")]
