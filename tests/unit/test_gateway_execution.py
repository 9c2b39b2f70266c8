"""run_cell: exactly one result, whatever the sandbox does."""

from __future__ import annotations

import asyncio
from typing import Any

from gateway.execution import Cell, CellLimits, CellResult, Status, Waiting, run_cell
from kernelprovisioner.sandbox_exit import ExitCause
from kernelprovisioner.supervisor import KernelExit
from tests.unit.gateway_fakes import FakeSandbox, Script, ends_well

LIMITS = CellLimits(grace=0.1, max_output_bytes=1000, max_outputs=10)


async def run(script: Script, *, timeout: float = 5.0, cancel_after: float | None = None, **fields: Any) -> CellResult:
    sandbox = FakeSandbox(0, script)
    return await run_in(sandbox, timeout=timeout, cancel_after=cancel_after, **fields)


async def run_in(
    sandbox: FakeSandbox, *, timeout: float = 5.0, cancel_after: float | None = None, **fields: Any
) -> CellResult:
    loop = asyncio.get_running_loop()
    cancelled: asyncio.Future[None] = loop.create_future()
    if cancel_after is not None:
        loop.call_later(cancel_after, cancelled.set_result, None)
    waiting = Waiting(cancelled, loop.create_future())
    cell = Cell("code", timeout, **fields)
    result = await run_cell(sandbox, cell, LIMITS, waiting, msg_id="id")  # type: ignore[arg-type]
    assert not sandbox.wire.listeners, "a listener was left on the wire"
    return result


async def test_a_cell_that_ends() -> None:
    result = await run(ends_well)
    assert (result.status, result.note, result.error) == (Status.OK, None, None)
    assert result.outputs.written("stdout") == "code"


async def test_neither_reply_nor_idle_alone_is_the_end() -> None:
    def script(sandbox: FakeSandbox, msg_id: str, _: dict[str, Any]) -> None:
        sandbox.idle(msg_id)
        loop = asyncio.get_running_loop()
        loop.call_later(0.05, sandbox.say, msg_id, "iopub", "stream", {"name": "stdout", "text": "late"})
        loop.call_later(0.06, sandbox.reply, msg_id)

    result = await run(script)
    assert result.outputs.written("stdout") == "late"


async def test_an_error_is_in_the_result() -> None:
    def script(sandbox: FakeSandbox, msg_id: str, _: dict[str, Any]) -> None:
        sandbox.reply(msg_id, "error", ename="ValueError", evalue="v", traceback=["line"])
        sandbox.idle(msg_id)

    result = await run(script)
    assert result.status is Status.ERROR
    assert result.error is not None and result.error.ename == "ValueError"


async def test_stdin_is_never_allowed_and_arguments_travel_as_metadata() -> None:
    sandbox = FakeSandbox(0, ends_well)
    await run_in(sandbox, argv=["a"], store_history=False)
    assert sandbox.wire.requests[0]["allow_stdin"] is False
    assert sandbox.wire.requests[0]["store_history"] is False
    assert sandbox.wire.metadata == [{"samovar": {"argv": ["a"]}}]


async def test_a_time_limit_interrupts() -> None:
    def script(sandbox: FakeSandbox, msg_id: str, _: dict[str, Any]) -> None:
        def interrupted() -> None:
            sandbox.reply(msg_id, "error", ename="KeyboardInterrupt", evalue="", traceback=[])
            sandbox.idle(msg_id)

        sandbox.on_interrupt = interrupted

    result = await run(script, timeout=0.05)
    assert result.status is Status.TIMEOUT
    assert result.note is not None and result.note.exit is None
    assert "0.05 s" in result.note.text and "keeps" in result.note.text


async def test_a_cell_that_does_not_heed_the_interrupt_costs_its_sandbox() -> None:
    sandbox = FakeSandbox(0, lambda *_: None)
    result = await run_in(sandbox, timeout=0.05)
    assert (result.status, sandbox.interrupts) == (Status.TIMEOUT, 1)
    assert result.note is not None and result.note.exit is not None
    assert result.note.exit.cause is ExitCause.TIME_LIMIT


async def test_a_client_that_goes_away_interrupts() -> None:
    sandbox = FakeSandbox(0, lambda *_: None)
    result = await run_in(sandbox, cancel_after=0.05)
    assert (result.status, sandbox.interrupts) == (Status.CANCELLED, 1)


async def test_a_reply_without_idle_is_not_waited_for_for_ever_and_interrupts_nothing() -> None:
    sandbox = FakeSandbox(0, lambda sandbox, msg_id, _: sandbox.reply(msg_id))
    result = await run_in(sandbox, timeout=0.05)
    assert (result.status, sandbox.interrupts) == (Status.OK, 0)


async def test_a_death_is_told_with_the_output_that_had_not_left() -> None:
    def script(sandbox: FakeSandbox, msg_id: str, _: dict[str, Any]) -> None:
        sandbox.say(msg_id, "iopub", "stream", {"name": "stdout", "text": "sent "}, "s1")
        ours = {"msg_id": msg_id}
        sandbox.kernel_exit = KernelExit(
            1,
            None,
            (
                {"kind": "text", "name": "stdout", "parent": {"msg_id": "earlier"}, "text": "of another cell"},
                {"kind": "text", "name": "stdout", "parent": ours, "text": "sent "},
                {"kind": "mark", "msg_id": "s1"},
                {"kind": "text", "name": "stdout", "parent": ours, "text": "unsent"},
            ),
        )
        sandbox.die(ExitCause.EXITED, exit_code=1)

    result = await run(script)
    assert result.status is Status.DIED
    assert result.outputs.written("stdout") == "sent unsent"
    assert result.note is not None and result.note.text == "The kernel process ended with exit code 1."


async def test_a_death_during_the_grace_period_is_told_as_what_it_was() -> None:
    def script(sandbox: FakeSandbox, _: str, __: dict[str, Any]) -> None:
        sandbox.on_interrupt = lambda: sandbox.die(ExitCause.SIGNAL, signal=11)

    result = await run(script, timeout=0.05)
    assert result.status is Status.DIED
    assert result.note is not None and result.note.cause == ExitCause.SIGNAL


async def test_forged_messages_do_no_harm() -> None:
    def script(sandbox: FakeSandbox, msg_id: str, _: dict[str, Any]) -> None:
        for channel in ("iopub", "shell", "stdin", "control"):
            for kind in ("status", "execute_reply", "stream", "error", "display_data", "input_request"):
                for content in ({"status": []}, {"execution_state": {}}, {"text": 1, "name": 2}, {"traceback": 5}):
                    if (channel, kind) != ("shell", "execute_reply"):
                        sandbox.say(msg_id, channel, kind, content)
        ends_well(sandbox, msg_id, {"code": "true"})

    result = await run(script)
    assert (result.status, result.outputs.written("stdout")) == (Status.OK, "true")
