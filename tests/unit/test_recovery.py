"""What a starting gateway makes of the records of the one before it, and how sessions come back."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import execution
from gateway.execution import Cell, CellLimits, Status
from gateway.holdings import Holdings
from gateway.kernel import Kernel
from gateway.kernels import KernelRegistry
from gateway.kernelspecs import KernelSpecs
from gateway.log_file import FIELDS
from gateway.notebook_session import NotebookSession
from gateway.recovery import Pool, kernel_holder_of, plan, recover, session_of
from gateway.session import Session
from gateway.sessions import SessionRegistry
from kernelprovisioner.launchers.base import Endpoint, LaunchError
from kernelprovisioner.records import SandboxRecord
from kernelprovisioner.sandbox import Probe, ProbeError
from kernelprovisioner.sandbox_exit import ExitCause, SandboxExit
from tests.unit.gateway_fakes import FakeChannels, FakePool, FakeSandbox, ends_well

LIMITS = CellLimits(grace=0.05, max_output_bytes=1000, max_outputs=10)
#: no record is of one
NO_KERNELS: Any = None
POOLS = {"python": Pool(3, "new"), "other": Pool(2, None)}


def record(number: int, **fields: Any) -> SandboxRecord:
    made: dict[str, Any] = {
        "sandbox_id": f"{number:016x}",
        "image": "python",
        "runtime_id": "",
        "work_directory": "",
        "transport": "ipc",
        "isolated": True,
        "template": "new",
        "key": "",
        "token": "",
        "supervisor": Endpoint(),
        "channels": {},
        "created_at": float(number),
    }
    return SandboxRecord(**{**made, **fields})


def claimed(number: int, holder: dict[str, Any], **fields: Any) -> SandboxRecord:
    return record(number, state="claimed", claimed_at=float(number), holder=holder, **fields)


def session(session_id: str, **fields: Any) -> dict[str, Any]:
    return {**Session("main", "python", id=session_id).holder, **fields}


def kernel(kernel_id: str, **fields: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"kind": "kernel", "id": kernel_id, "owner": "main", "name": "sandbox", "created": 1.0}
    return {**made, **fields}


HOLDERS = st.one_of(
    st.builds(session, st.sampled_from("abc"), owner=st.sampled_from(["main", "other"])),
    st.fixed_dictionaries({"kind": st.just("provisioner"), "token": st.sampled_from(["t", "", 5])}),
    st.builds(kernel, st.sampled_from("ab"), owner=st.sampled_from(["main", "other"])),
    st.sampled_from([{"kind": "kernel"}, kernel("x", created=1e300), kernel("x", notebooks=[{}])]),
    st.sampled_from([{}, {"kind": "session"}, {"kind": "pod"}, session("x", created=1e300), session("x", env=5)]),
)
RECORDS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"template": st.sampled_from(["new", "old", None])}),
        st.fixed_dictionaries(
            {
                "state": st.just("claimed"),
                "claimed_at": st.floats(0, 100),
                "holder": HOLDERS,
                "kernel_id": st.sampled_from(["k", "l"]),
                "template": st.sampled_from(["new", "old", None]),
            }
        ),
    ).flatmap(
        lambda fields: st.sampled_from(["python", "other", "gone"]).map(lambda image: {**fields, "image": image})
    ),
    max_size=12,
).map(lambda chosen: [record(number, **fields) for number, fields in enumerate(chosen)])


@given(RECORDS)
def test_each_sandbox_is_adopted_or_reaped_and_no_place_is_given_twice(records: list[SandboxRecord]) -> None:
    decided = plan(records, POOLS)
    reaped = [each for each, _ in decided.reap]
    assert sorted(each.sandbox_id for each in [*decided.adopt, *reaped]) == [each.sandbox_id for each in records]
    for name, pool in POOLS.items():
        adopted = [each for each in decided.adopt if each.image == name]
        warm = [each for each in adopted if each.state == "warm"]
        assert len(adopted) <= max(pool.maximum, len(adopted) - len(warm)), "warm ones never pass the maximum"
        assert all(pool.template in (None, each.template) for each in warm)
    assert {each.image for each in decided.adopt} <= set(POOLS)
    sessions = [(found.owner, found.id) for each in decided.adopt if (found := session_of(each)) is not None]
    held = [each.kernel_id for each in decided.adopt if each.holder.get("kind") == "provisioner"]
    kernels = [(found.owner, found.id) for each in decided.adopt if (found := kernel_holder_of(each)) is not None]
    for places in (sessions, held, kernels):
        assert len(set(places)) == len(places)
    assert len(sessions) + len(held) + len(kernels) == sum(each.state == "claimed" for each in decided.adopt)


def test_claimed_ones_stay_whatever_their_template_and_the_youngest_warm_ones_that_fit() -> None:
    records = [record(1), record(2), record(3), claimed(4, session("a"), template="old"), record(5, template="old")]
    decided = plan(records, POOLS)
    assert [each.created_at for each in decided.adopt] == [4, 3, 2]
    assert {each.created_at: why for each, why in decided.reap} == {
        1: "the pool is full",
        5: "it is of an older configuration",
    }


def test_a_holder_has_the_newest_one_only() -> None:
    records = [claimed(1, session("a")), claimed(3, session("a")), claimed(2, session("a", owner="other"))]
    decided = plan(records, POOLS)
    assert [each.created_at for each in decided.adopt] == [3, 2]
    assert [(each.created_at, why) for each, why in decided.reap] == [(1, "its holder has a newer one")]


def test_a_session_is_found_again_as_it_was() -> None:
    before = Session("owner", "python", "user", "entity", {"A": "b"}, named=True)
    after = session_of(claimed(1, before.holder))
    assert after is not None
    assert after.holder == before.holder
    assert (after.id, after.image, after.executions, after.sandbox) == (before.id, "python", 1, None)
    assert session_of(record(1)) is None


async def test_a_kernel_is_found_again_as_it_was() -> None:
    notebook = NotebookSession("dir/a.ipynb", "a", "notebook")
    before = Kernel("owner", "id", "python3", "python", FakeChannels(), "dir", {"A": "b"}, "a.ipynb")
    before.notebooks[notebook.id] = notebook
    records = [claimed(1, json.loads(json.dumps(before.holder))), claimed(2, kernel("c")), claimed(3, kernel("lost"))]
    same: Any = Finding(records)
    same.silent.set()
    pools: Any = {"python": FakePool()}
    holdings = Holdings(pools, line_timeout=5.0)
    kernels, sessions = KernelRegistry(holdings, KernelSpecs({}, {}), FakeChannels), SessionRegistry(holdings, LIMITS)
    recovered = await recover(same, {"python": same}, {"python": 3}, sessions, kernels, same, longest_cell=0.01)
    after = kernels.find("owner", "id")
    assert after.holder == before.holder
    assert (after.image, after.sandbox is None) == ("python", False)
    assert recovered.adopted == {"kernel": 2}
    assert sorted(each.id for each in kernels.everything()) == ["c", "id", "lost"]
    await asyncio.sleep(0.01)
    assert kernels.find("main", "lost").dead and not kernels.find("main", "c").dead
    await kernels.stop(5.0)


async def test_sessions_come_back_in_the_order_in_which_they_were_made() -> None:
    records = [claimed(number, session(f"s{number}")) for number in (1, 2, 4)]
    found, pools = Finding(records), {"python": FakePool()}
    same: Any = found
    sessions = SessionRegistry(Holdings(pools, line_timeout=5.0), LIMITS)  # type: ignore[arg-type]
    recovered = await recover(same, {"python": same}, {"python": 3}, sessions, NO_KERNELS, same, longest_cell=0.01)
    await asyncio.gather(*recovered.followed.values(), return_exceptions=True)
    assert [each.id for each in sessions.list("main")] == ["s1", "s2", "s4"]


class Finding:
    """Sandboxes, pool and claim server of a gateway that starts: one sandbox of three never answers."""

    def __init__(self, records: list[SandboxRecord]) -> None:
        self.records, self.image = records, None
        self.silent = asyncio.Event()
        self.adopted: list[str] = []
        self.restored: list[str] = []
        self.launcher = self

    async def template(self, image: object) -> str:
        return "new"

    async def recoverable(self) -> list[SandboxRecord]:
        return self.records

    def adopt(self, *arguments: Any, **more: Any) -> Any:
        # of Sandboxes (a record), and of the pool (a sandbox)
        if isinstance(arguments[0], SandboxRecord):
            return self._adopt(arguments[0])
        self.adopted.append(arguments[0].id)
        return True

    async def _adopt(self, found: SandboxRecord) -> FakeSandbox:
        if found.created_at == 3:
            await self.silent.wait()
            raise LaunchError("it does not answer")
        return FakeSandbox(int(found.created_at), ends_well)

    def restore(self, pool: object, sandbox: FakeSandbox) -> None:
        self.restored.append(sandbox.id)

    async def settle(self) -> None:
        pass


async def test_holders_get_their_sandboxes_back_while_another_one_does_not_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "gateway.recovery")
    holder = {"kind": "provisioner", "token": "t"}
    records = [claimed(number, holder, kernel_id=str(number)) for number in (2, 3, 4)]
    found, sessions = Finding(records), SessionRegistry(Holdings({}, line_timeout=5.0), LIMITS)
    same: Any = found
    recovering = asyncio.create_task(
        recover(same, {"python": same}, {"python": 3}, sessions, NO_KERNELS, same, longest_cell=5.0)
    )
    async with asyncio.timeout(5):
        while len(found.restored) < 2:  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.005)
    assert not recovering.done()
    assert sorted(found.restored) == sorted(found.adopted)
    found.silent.set()
    recovered = await recovering
    assert recovered.adopted == {"provisioner": 2}
    assert [str(why) for _, why in recovered.reaped] == ["it does not answer"]
    # `samovar logs --exits --session 3` finds it.
    fields = [getattr(line, FIELDS) for line in caplog.records if hasattr(line, FIELDS)]
    assert [(one["event"], one["session"], one["cause"]) for one in fields] == [("exit", "3", "gateway")]


async def test_the_age_of_a_claimed_sandbox_counts_from_its_claim() -> None:
    class Aged(Finding):
        ages: list[float]

        def adopt(self, *arguments: Any, **more: Any) -> Any:
            self.ages += [more["age"]] if "age" in more else []
            return super().adopt(*arguments, **more)

    now = time.time()
    holder = {"kind": "provisioner", "token": "t"}
    found: Any = Aged(
        [
            record(1, state="claimed", claimed_at=now - 10.0, holder=holder),
            record(2, created_at=now - 1000.0, template="new"),
        ]
    )
    found.ages = []
    sessions = SessionRegistry(Holdings({}, line_timeout=5.0), LIMITS)
    await recover(found, {"python": found}, {"python": 3}, sessions, NO_KERNELS, found, longest_cell=5.0)
    assert sorted(found.ages) == pytest.approx([10.0, 1000.0], abs=5.0)


# --- sessions with a sandbox that was adopted -------------------------------------------------------------------------


class Adopted(FakeSandbox):
    """A sandbox of an earlier gateway; `says` is what its kernel runs by its own word, an error is raised."""

    def __init__(self, says: str | ProbeError | None) -> None:
        super().__init__(7, ends_well)
        self.says = says

    async def probe(self, *, timeout: float) -> Probe:
        await asyncio.sleep(0)
        if isinstance(self.says, ProbeError):
            raise self.says
        return Probe(self.says, 4)

    def ends(self, **error: Any) -> None:
        if error:
            self.say("old", "iopub", "error", error)
        self.says = None
        self.idle("old")


@pytest.fixture(autouse=True)
def asked_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "_ASKING_SECONDS", 0.02)
    monkeypatch.setattr(execution, "_TRAILING_SECONDS", 0.1)


def restored(sandbox: Adopted, timeout: float = 5.0) -> tuple[SessionRegistry, Session, FakePool, asyncio.Task[Any]]:
    pool = FakePool()
    registry = SessionRegistry(Holdings({"python": pool}, line_timeout=5.0), LIMITS)  # type: ignore[dict-item]
    found = session_of(claimed(1, Session("main", "python").holder))
    assert found is not None
    task = registry.restore(found, sandbox, timeout)  # type: ignore[arg-type]
    return registry, found, pool, task


async def run(registry: SessionRegistry, session: Session, code: str = "code") -> tuple[str, str]:
    """Run a cell; return what it wrote to standard output and standard error."""
    cancelled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    result = (await registry.execute(session, Cell(code, 5.0), cancelled)).result
    return result.outputs.written("stdout"), result.outputs.written("stderr")


async def until_listened(sandbox: Adopted) -> None:
    async with asyncio.timeout(5):
        while "old" not in sandbox.wire.listeners:  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("says", [None, "", "x" * 1000])
async def test_an_idle_session_carries_on(says: str | None) -> None:
    sandbox = Adopted(says)
    registry, session, pool, task = restored(sandbox)
    assert registry.find("main", session.id) is session
    assert await run(registry, session) == ("code", "")
    assert await task is None
    assert session.executions == 4, "three before, and this one"
    assert (session.sandbox, pool.made) == (sandbox, [])
    assert pool.idle[sandbox.id] is not None


async def test_a_cell_that_still_runs_has_the_turn_until_its_end_and_the_next_answer_says_so() -> None:
    sandbox = Adopted("old")
    registry, session, _, task = restored(sandbox)
    await until_listened(sandbox)
    assert session.state == "busy"
    waiting = asyncio.create_task(run(registry, session))
    sandbox.say("old", "iopub", "stream", {"name": "stdout", "text": "rest"})
    await asyncio.sleep(0.05)
    assert not waiting.done() and not sandbox.wire.requests
    sandbox.ends()
    followed = await task
    assert (followed.msg_id, followed.execution.result.status) == ("old", Status.OK)
    assert followed.execution.result.outputs.written("stdout") == "rest"
    assert "what it had written until then is lost" in followed.execution.result.outputs.written("stderr")
    stdout, stderr = await waiting
    assert stdout == "code"
    assert "ran when the gateway was lost. It has ended." in stderr
    assert await run(registry, session) == ("code", "")


async def test_an_end_that_nobody_saw_is_found_by_asking() -> None:
    sandbox = Adopted("old")
    registry, session, _, task = restored(sandbox)
    await until_listened(sandbox)
    sandbox.says = None
    followed = await task
    assert (followed.msg_id, followed.execution.result.status) == ("old", Status.OK)
    assert "ran when the gateway was lost" in (await run(registry, session))[1]


async def test_how_it_ended_is_told() -> None:
    sandbox = Adopted("old")
    registry, session, _, task = restored(sandbox)
    await until_listened(sandbox)
    sandbox.ends(ename="ValueError", evalue="bad", traceback=[])
    assert (await task).execution.result.status is Status.ERROR
    assert "It ended with ValueError: bad." in (await run(registry, session))[1]


@pytest.mark.parametrize("running", ["old", ProbeError("it does not answer")])
async def test_it_has_a_time_limit_also_where_the_kernel_does_not_answer(running: str | ProbeError) -> None:
    sandbox = Adopted(running)
    registry, session, pool, task = restored(sandbox, timeout=0.1)
    followed = await task
    assert followed.execution.result.status is Status.TIMEOUT
    assert sandbox.interrupts == 1
    stdout, stderr = await run(registry, session)
    assert (stdout, len(pool.made)) == ("code", 1)
    assert "did not heed the interrupt" in stderr
    assert [cause.cause for _, cause in pool.released] == [ExitCause.TIME_LIMIT]


async def test_a_sandbox_that_dies_meanwhile_is_told_by_the_next_call() -> None:
    sandbox = Adopted("old")
    registry, session, pool, task = restored(sandbox)
    await until_listened(sandbox)
    sandbox.die(ExitCause.OUT_OF_MEMORY)
    assert (await task).execution.result.status is Status.DIED
    assert session.last_exit is not None
    assert session.last_exit.cause is ExitCause.OUT_OF_MEMORY
    await run(registry, session)
    assert "ran out of memory" in (pool.claims[0][1].notice or "")


async def test_one_that_was_dead_already_ran_no_cell() -> None:
    sandbox = Adopted(None)
    sandbox.die(ExitCause.EXITED, exit_code=3)
    registry, session, pool, task = restored(sandbox)
    await task
    assert session.sandbox is None
    assert (await run(registry, session))[1] == ""
    assert "exit code 3" in (pool.claims[0][1].notice or "")


# --- cells that are left to the next gateway --------------------------------------------------------------------------


async def test_a_gateway_that_leaves_answers_what_runs_and_takes_nothing_more() -> None:
    pool = FakePool(
        lambda sandbox, msg_id, content: sandbox.say(msg_id, "iopub", "stream", {"name": "stdout", "text": "so far"})
    )
    registry = SessionRegistry(Holdings({"python": pool}, line_timeout=5.0), LIMITS)  # type: ignore[dict-item]
    session = registry.add(Session("main", "python"))
    cancelled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    first = asyncio.create_task(registry.execute(session, Cell("first", 5.0), cancelled))
    await pool.claimed.wait()
    second = asyncio.create_task(registry.execute(session, Cell("second", 5.0), cancelled))
    await asyncio.sleep(0.05)
    registry.leave()
    # What lets go of a sandbox says that it ended, too.
    pool.made[0].exited.set_result(SandboxExit(ExitCause.GATEWAY))
    result = (await first).result
    assert (result.status, result.left) == (Status.DIED, True)
    assert result.note is not None
    assert result.note.exit is None, "the session keeps its sandbox"
    assert result.outputs.written("stdout") == "so far"
    with pytest.raises(Exception, match="shutting down"):
        await second
    assert [content["code"] for content in pool.made[0].wire.requests] == ["first"]


async def test_a_followed_cell_is_left_as_well() -> None:
    sandbox = Adopted("old")
    registry, session, _, task = restored(sandbox)
    await until_listened(sandbox)
    await registry.stop(1.0)
    assert (await task).execution.result.left
    assert session.notice == ""
