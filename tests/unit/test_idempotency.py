"""A call with an Idempotency-Key runs once: repeated, at the same time, after a hang-up, after the gateway was lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway import answer_store, idempotency
from gateway.answer_store import AnswerStore, KeyedCall, SentCell, StoreError
from gateway.execution import CellLimits
from gateway.holdings import Holdings
from gateway.idempotency import EXEC, KeyedCalls
from gateway.session import Session
from gateway.sessions import SessionRegistry
from tests.unit.gateway_fakes import FakePool, FakeSandbox, ends_well, keyed_calls
from tests.unit.served_api import Api, served

HEADERS = {"Idempotency-Key": "one"}
CALL = KeyedCall("main", "one", EXEC, b"fingerprint")
CELL = SentCell("/run/a", "session", "sandbox0", "container0", "id0")


class Gate:
    """A cell that runs until it is let go."""

    def __init__(self) -> None:
        self.running: list[tuple[FakeSandbox, str, dict[str, Any]]] = []

    def __call__(self, sandbox: FakeSandbox, msg_id: str, content: dict[str, Any]) -> None:
        self.running.append((sandbox, msg_id, content))

    async def reached(self) -> None:
        async with asyncio.timeout(5):
            while not self.running:  # noqa: ASYNC110 (what is waited for has no event)
                await asyncio.sleep(0.01)

    def open(self) -> None:
        for sandbox, msg_id, content in self.running:
            ends_well(sandbox, msg_id, content)


def sent(api: Api) -> int:
    return sum(len(sandbox.wire.requests) for sandbox in api.pool.made)


async def post(api: Api, path: str = "/exec", headers: dict[str, str] | None = None, **fields: Any) -> Any:
    body = {"code": "code", **({"lang": "py"} if path == "/exec" else {}), **fields}
    return await api.call("POST", path, body, headers=HEADERS if headers is None else headers)


@pytest.mark.parametrize("path", ["/exec", "/api/v1/execute"])
async def test_a_repeated_call_gets_the_answer_that_it_had(path: str, tmp_path: Path) -> None:
    async with served(directory=tmp_path) as api:
        first = await post(api, path)
        assert first.code == 200
        assert (await post(api, path)).body == first.body
        assert sent(api) == 1
    async with served(directory=tmp_path) as api:
        assert (await post(api, path)).body == first.body, "also after a restart"
        assert sent(api) == 0


async def test_the_same_call_may_be_written_otherwise_and_another_one_is_refused(tmp_path: Path) -> None:
    async with served(directory=tmp_path) as api:
        first = await post(api)
        other_order = json.dumps({"lang": "py", "code": "code"}).encode()
        assert (await api.call("POST", "/exec", raw=other_order, headers=HEADERS)).body == first.body
        for path, fields in (("/exec", {"code": "other"}), ("/api/v1/execute", {})):
            refused = await post(api, path, **fields)
            assert refused.code == 422
            assert json.loads(refused.body).get("error_type", "idempotency_key_reused") == "idempotency_key_reused"
        assert sent(api) == 1


async def test_keys_are_their_owners_own_and_calls_without_one_run_each_time(tmp_path: Path) -> None:
    async with served(directory=tmp_path) as api:
        await post(api)
        body = {"code": "code", "lang": "py"}
        mine, theirs = await post(api), await api.call("POST", "/exec", body, key="another-key", headers=HEADERS)
        assert json.loads(mine.body)["session_id"] != json.loads(theirs.body)["session_id"]
        await post(api, headers={})
        await post(api, headers={})
        assert sent(api) == 4


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb"])
async def test_what_is_no_key_is_refused(key: str, tmp_path: Path) -> None:
    async with served(directory=tmp_path) as api:
        assert (await post(api, headers={"Idempotency-Key": key})).code == 422
        assert sent(api) == 0


async def test_calls_at_the_same_time_run_once(tmp_path: Path) -> None:
    gate = Gate()
    async with served(gate, directory=tmp_path) as api:
        calls = [asyncio.create_task(post(api)) for _ in range(5)]
        await gate.reached()
        assert (await post(api, code="other")).code == 422, "also while it runs"
        gate.open()
        bodies = {response.body for response in await asyncio.gather(*calls)}
        assert len(bodies) == 1
        assert sent(api) == 1


async def test_a_client_that_hangs_up_finds_its_answer(tmp_path: Path) -> None:
    gate = Gate()
    async with served(gate, directory=tmp_path) as api:
        body = json.dumps({"code": "code", "lang": "py"}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        head = "POST /exec HTTP/1.1\r\nHost: x\r\nx-api-key: key-of-the-tests\r\nIdempotency-Key: one\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await gate.reached()
        writer.close()
        await asyncio.sleep(0.05)
        retry = asyncio.create_task(post(api))
        await asyncio.sleep(0.05)
        assert not retry.done()
        gate.open()
        assert json.loads((await retry).body)["stdout"] == "code"
        assert (sent(api), gate.running[0][0].interrupts) == (1, 0)
        assert await reader.read() == b""


async def test_a_call_that_did_not_run_may_be_made_again(tmp_path: Path) -> None:
    async with served(directory=tmp_path) as api:
        api.pool.error = answer_error = RuntimeError("x")
        assert (await post(api)).code == 500
        assert (await post(api, "/api/v1/execute", session_id="nobody's")).code == 404
        api.pool.error = None
        assert (await post(api)).code == 200, answer_error
        assert sent(api) == 1


async def test_calls_that_are_under_way_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "MAX_UNDER_WAY", 1)
    gate = Gate()
    async with served(gate, directory=tmp_path) as api:
        first = asyncio.create_task(post(api))
        await gate.reached()
        assert (await post(api, headers={"Idempotency-Key": "two"})).code == 503
        gate.open()
        assert (await first).code == 200


async def test_a_call_that_cannot_be_recorded_does_not_run(tmp_path: Path) -> None:
    async with served(directory=tmp_path / "gone") as api:
        answer = await post(api)
        assert (answer.code, json.loads(answer.body)["error_type"]) == (503, "not_recorded")
        assert sent(api) == 0
        (tmp_path / "gone").mkdir()
        assert (await post(api)).code == 200, "the disk is back"


# --- a gateway that was lost ------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def calls_of(directory: Path, **fields: Any) -> AsyncIterator[tuple[KeyedCalls, SessionRegistry, FakePool]]:
    pool = FakePool()
    holdings = Holdings({"python": pool}, line_timeout=5.0)  # type: ignore[dict-item]
    sessions = SessionRegistry(holdings, CellLimits(0.05, 1000, 10))
    keyed = keyed_calls(sessions, directory, **fields)
    yield keyed, sessions, pool
    await keyed.stop(1.0)


async def never(cancelled: asyncio.Future[None], sending: Any) -> Any:
    raise AssertionError("it runs a second time")


async def ask(keyed: KeyedCalls) -> dict[str, Any]:
    cancelled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    answer: dict[str, Any] = json.loads(await keyed.answer(CALL, never, cancelled))
    return answer


async def lose(directory: Path) -> None:
    store = AnswerStore(directory / "answers.sqlite")
    await store.sent(CALL, CELL)
    await store.close()


@pytest.mark.parametrize("survives", [False, True])
async def test_a_call_whose_gateway_was_lost_has_died_and_never_runs_again(survives: bool, tmp_path: Path) -> None:
    await lose(tmp_path)
    async with calls_of(tmp_path) as (keyed, sessions, _):
        if survives:
            session = sessions.add(Session("main", "python", id="session"))
            session.sandbox = FakeSandbox(0, ends_well)  # type: ignore[assignment]
        answer = await ask(keyed)
        assert (answer["status"], answer["exit_cause"]["cause"]) == ("died", "gateway")
        assert (answer["session_id"], answer["container_id"]) == ("session", "container0")
        assert answer["exit_cause"]["session_lost"] is not survives
        assert "its output is lost" in answer["stderr"]
        assert await ask(keyed) == answer


async def test_a_call_that_another_living_gateway_runs_is_not_touched(tmp_path: Path) -> None:
    await lose(tmp_path)
    async with calls_of(tmp_path, gateway="/run/b", living=("/run/a",)) as (keyed, _, _):
        with pytest.raises(Exception, match="Another gateway"):
            await ask(keyed)
    async with calls_of(tmp_path, gateway="/run/b") as (keyed, _, _):
        assert (await ask(keyed))["status"] == "died"


# --- the store --------------------------------------------------------------------------------------------------------


def call(number: int) -> KeyedCall:
    return KeyedCall("main", str(number), EXEC, b"f")


async def test_the_store_is_bounded_in_number_bytes_and_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_store, "MAX_ANSWERS", 5)
    monkeypatch.setattr(answer_store, "MAX_BYTES", 1000)
    now = 1000.0
    monkeypatch.setattr(answer_store.time, "time", lambda: now)
    store = AnswerStore(tmp_path / "answers.sqlite")

    async def answered(number: int, size: int) -> None:
        nonlocal now
        now += 1
        await store.sent(call(number), CELL)
        await store.answered(call(number), b"x" * size)

    async def there() -> list[int]:
        return [number for number in range(100) if await store.find(call(number)) is not None]

    try:
        for number in range(8):
            await answered(number, 10)
        assert await there() == [3, 4, 5, 6, 7]
        await answered(8, 985)
        assert await there() == [7, 8]
        await store.sent(call(9), CELL)
        assert [kept.call.key for kept in await store.unanswered("/run/a")] == ["9"]
        assert await store.unanswered("/run/b") == []
        now += answer_store.KEPT_SECONDS
        assert await there() == []
        await answered(8, 1)
        assert await there() == [8], "an old key is free again"
    finally:
        await store.close()
    assert (tmp_path / "answers.sqlite").stat().st_mode & 0o777 == 0o600


async def test_who_has_many_answers_costs_others_neither_theirs_nor_a_call_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_store, "MAX_ANSWERS", 50)
    monkeypatch.setattr(answer_store, "MAX_BYTES", 1000)
    store = AnswerStore(tmp_path / "answers.sqlite")
    try:
        kept, running = KeyedCall("ada", "kept", EXEC, b"f"), KeyedCall("ada", "running", EXEC, b"f")
        await store.sent(running, CELL)
        await store.sent(kept, CELL)
        await store.answered(kept, b"x" * 100)
        for number in range(20):
            await store.sent(call(number), CELL)
            await store.answered(call(number), b"x" * 200)
        assert await store.find(kept) is not None
        assert [number for number in range(20) if await store.find(call(number)) is not None] == [16, 17, 18, 19]
        await store.answered(running, b"x" * 500)
        assert await store.find(running) is not None
    finally:
        await store.close()


async def test_a_store_that_was_lost_between_a_call_and_its_answer_says_so_and_takes_the_next_one(
    tmp_path: Path,
) -> None:
    store = AnswerStore(tmp_path / "answers.sqlite")
    with pytest.raises(StoreError, match="not there any more"):
        await store.answered(CALL, b"{}")
    await store.sent(CALL, CELL)
    await store.answered(CALL, b"{}")
    kept = await store.find(CALL)
    assert kept is not None and kept.answer == b"{}"
    await store.close()


async def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / "answers.sqlite")
    await store.close()
    await store.close()
    with pytest.raises(StoreError, match="the gateway stops"):
        await store.find(CALL)


async def test_two_gateways_never_both_send_a_call(tmp_path: Path) -> None:
    first, second = (AnswerStore(tmp_path / "answers.sqlite") for _ in range(2))
    try:
        await first.sent(CALL, CELL)
        with pytest.raises(StoreError):
            await second.sent(CALL, CELL)
        kept = await second.find(CALL)
        assert kept is not None
        assert (kept.call, kept.cell, kept.answer) == (CALL, CELL, None)
    finally:
        await first.close()
        await second.close()


async def test_a_store_of_another_version_is_made_anew_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE calls (something INTEGER)")
    store = AnswerStore(path)
    await store.sent(CALL, CELL)
    await store.close()
    for each in tmp_path.glob("answers.sqlite*"):
        each.write_bytes(b"no database" * 100)
    store = AnswerStore(path)
    with pytest.raises(StoreError, match=r"answers\.sqlite"):
        await store.find(CALL)
    await store.close()
