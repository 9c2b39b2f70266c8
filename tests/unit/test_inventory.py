"""What a runtime directory and an engine have, as it is found without touching anything; what of it can be reaped."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from kernelprovisioner import inventory as inventory_module
from kernelprovisioner.images import LABEL_IMAGE
from kernelprovisioner.inventory import FoundSandbox, Inventory, Life, state_of, take_inventory
from kernelprovisioner.launchers.base import Endpoint
from kernelprovisioner.launchers.container_spec import LABEL_BOOT, LABEL_OWNER, LABEL_SANDBOX
from kernelprovisioner.reaping import reap, to_be_reaped
from kernelprovisioner.records import SandboxRecord
from kernelprovisioner.runtime import GATEWAY_GRACE, OwnerDirectory, RuntimeRoot
from tests.stored_records import write_record

ENGINE = "docker ENGINE"


@pytest.fixture
def root(short_directory: Path) -> RuntimeRoot:
    return RuntimeRoot.open(short_directory / "run")


@pytest.fixture
def owner(root: RuntimeRoot) -> Iterator[OwnerDirectory]:
    """A living owner: this process."""
    owner = root.owner_directory()
    yield owner
    owner.release()


class FakeEngine:
    """The part of docker's client that is asked for a list."""

    def __init__(self, *containers: dict[str, Any]) -> None:
        self.listed = list(containers)
        self.error: Exception | None = None

    def containers(self, **_: Any) -> list[dict[str, Any]]:
        if self.error is not None:
            raise self.error
        return self.listed


def container(owner: Path, sandbox_id: str, state: str = "running", **labels: str) -> dict[str, Any]:
    own = {LABEL_OWNER: str(owner), LABEL_SANDBOX: sandbox_id, LABEL_IMAGE: "python", **labels}
    return {"Id": f"{sandbox_id}{'0' * 48}", "State": state, "Created": 1000, "Labels": own}


def record(directory: Path, sandbox_id: str, **fields: Any) -> None:
    known: dict[str, Any] = {
        "image": "python",
        "runtime_id": "c" * 64,
        "work_directory": "/mnt/data",
        "transport": "ipc",
        "isolated": True,
        "template": None,
        "key": "the-key",
        "token": "the-token",
        "supervisor": Endpoint(),
        "channels": {},
        "created_at": 2000.0,
    }
    write_record(directory, SandboxRecord(sandbox_id=sandbox_id, **{**known, **fields}))


def found_in(root: RuntimeRoot, engine: Any | None) -> dict[str, FoundSandbox]:
    return {sandbox.sandbox_id: sandbox for sandbox in take_inventory(root.path, engine).sandboxes}


@pytest.mark.parametrize(
    ("recorded", "runs", "expected"),
    [
        (None, True, "starting"),
        (None, None, "starting"),
        (None, False, "ended"),
        ("warm", True, "warm"),
        ("claimed", None, "claimed"),
        ("claimed", False, "ended"),
    ],
)
def test_states(recorded: str | None, runs: bool | None, expected: str) -> None:
    assert state_of(recorded, runs) == expected


def test_records_and_containers_are_brought_together(root: RuntimeRoot, owner: OwnerDirectory) -> None:
    owner.write_kind(ENGINE)
    owner.mark_gateway()
    ids = {name: f"{number:016x}" for number, name in enumerate(("half", "warm", "claimed", "exited", "lost"))}
    for sandbox_id in ids.values():
        owner.sandbox_directory(sandbox_id)
    record(owner.path, ids["warm"])
    record(owner.path, ids["claimed"], state="claimed", kernel_id="kernel", owner="main")
    record(owner.path, ids["exited"], state="claimed", kernel_id="other", owner="main")
    record(owner.path, ids["lost"])
    engine = FakeEngine(
        container(owner.path, ids["half"]),
        container(owner.path, ids["warm"]),
        container(owner.path, ids["claimed"]),
        container(owner.path, ids["exited"], "exited"),
    )
    found = found_in(root, engine)
    assert {name: found[sandbox_id].state for name, sandbox_id in ids.items()} == {
        "half": "starting",
        "warm": "warm",
        "claimed": "claimed",
        "exited": "ended",
        "lost": "ended",
    }
    claimed = found[ids["claimed"]]
    assert (claimed.session, claimed.held_for, claimed.created_at) == ("kernel", "main", 2000.0)
    assert claimed.runtime_id == f"{ids['claimed']}{'0' * 48}"
    assert found[ids["half"]].created_at == 1000
    assert str(claimed.owner) == f"gateway {os.getpid()}"
    # The engine does not answer: what was noted counts.
    engine.error = requests.ConnectionError("gone")
    silent = take_inventory(root.path, engine)
    assert {one.sandbox_id: one.state for one in silent.sandboxes}[ids["lost"]] == "warm"
    assert silent.problems and "does not list" in silent.problems[0]


def test_owners_are_alive_dead_or_not_seen(root: RuntimeRoot, owner: OwnerDirectory, tmp_path: Path) -> None:
    dead = root.owner_directory()
    dead.mark_gateway()
    dead.release()
    unlocked = root.path / "0123abcd"
    unlocked.mkdir()
    elsewhere = tmp_path / "deadbeef"
    found = take_inventory(root.path, FakeEngine(container(elsewhere, "f" * 16)))
    assert {each.path: each.life for each in found.owners} == {
        owner.path: Life.ALIVE,
        dead.path: Life.DEAD,
        unlocked: Life.DEAD,
        elsewhere: Life.UNSEEN,
    }
    assert {str(each) for each in found.owners} >= {"gateway (gone)", "owner (gone)", "not seen from here"}


def test_looking_takes_nobody_for_alive(root: RuntimeRoot) -> None:
    """Whoever reaps at the same moment finds the same dead owners: our look's lock is under the root's lock."""
    dead = root.owner_directory()
    dead.release()
    for _ in range(20):
        take_inventory(root.path, None)
        (taken,) = root.dead_owners()
        taken.release()
    # A root that is locked for long holds nobody up.
    descriptor = os.open(root.path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert [owner.life for owner in take_inventory(root.path, None).owners] == [Life.DEAD]
    finally:
        os.close(descriptor)


def test_without_proc_locks_a_living_owner_is_still_alive(
    root: RuntimeRoot, owner: OwnerDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory_module, "_lock_holders", dict)
    (found,) = take_inventory(root.path, None).owners
    assert (found.life, found.pid) == (Life.ALIVE, None)


def test_a_record_that_cannot_be_read_is_a_problem_and_no_more(root: RuntimeRoot, owner: OwnerDirectory) -> None:
    (owner.path / f"{'a' * 16}.json").write_text("{")
    record(owner.path, "b" * 16)
    found = take_inventory(root.path, None)
    assert [one.sandbox_id for one in found.sandboxes] == ["b" * 16]
    assert any("a" * 16 in problem for problem in found.problems)


def test_nothing_is_made(tmp_path: Path) -> None:
    assert take_inventory(tmp_path / "run", None) == Inventory()
    assert not list(tmp_path.iterdir())


def process(owner: OwnerDirectory, sandbox_id: str) -> subprocess.Popen[bytes]:
    """A process as the process launcher notes it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    owner.sandbox_directory(sandbox_id)
    (owner.path / f"{sandbox_id}.pid").write_text(f"{child.pid} {psutil.Process(child.pid).create_time()!r}")
    return child


def test_processes_are_found_and_reaped_with_their_dead_owner(root: RuntimeRoot, owner: OwnerDirectory) -> None:
    owner.write_kind("process")
    dead = root.owner_directory()
    dead.write_kind("process")
    dead.mark_gateway()
    children = [process(owner, "1" * 16), process(dead, "2" * 16)]
    (root.links / "kernel").symlink_to(dead.path / ("2" * 16))
    try:
        dead.release()
        found = found_in(root, None)
        assert found["2" * 16].runtime_id == f"process:{children[1].pid}"
        assert [one.state for one in found.values()] == ["starting", "starting"]
        reap(root, None)
        children[1].wait(10)
        assert list(found_in(root, None)) == ["1" * 16]
        assert children[0].poll() is None
        assert not dead.path.exists() and not list(root.links.iterdir())
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_what_can_be_reaped_from_here(
    root: RuntimeRoot, owner: OwnerDirectory, short_directory: Path, tmp_path: Path
) -> None:
    kinds = {"process": "process", "here": ENGINE, "there": "docker OTHER", "early": None}
    dead = {name: root.owner_directory() for name in kinds}
    for name, each in dead.items():
        if kinds[name] is not None:
            each.write_kind(str(kinds[name]))
    dead["here"].mark_gateway()
    other = RuntimeRoot.open(short_directory / "other")
    theirs = other.owner_directory()
    theirs.mark_gateway()
    for each in (*dead.values(), theirs):
        each.release()
    engine = FakeEngine(container(theirs.path, "3" * 16), container(tmp_path / "gone" / "deadbeef", "4" * 16))
    reaped, left = to_be_reaped(take_inventory(root.path, engine), root.path, "ENGINE")
    assert {each.path for each in reaped} == {dead[name].path for name in ("process", "here", "early")}
    assert [each.path for each in left] == [dead["there"].path]
    # Another directory's gateway keeps its grace, and no longer.
    mark = theirs.path / "dead"
    mark.touch()
    os.utime(mark, (time.time() - GATEWAY_GRACE - 1,) * 2)
    reaped, _ = to_be_reaped(take_inventory(root.path, engine), root.path, "ENGINE")
    assert theirs.path in {each.path for each in reaped}


def test_a_container_of_an_earlier_boot_has_no_living_owner(
    tmp_path: Path, root: RuntimeRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory_module, "boot_label", lambda: "machine/now")
    paths = [tmp_path / name for name in ("aaaaaaaa", "bbbbbbbb", "cccccccc")]
    boots = ["machine/before", "machine/now", "other/before"]
    listed = [
        container(path, f"{number:016x}", **{LABEL_BOOT: boot})
        for number, (path, boot) in enumerate(zip(paths, boots, strict=True))
    ]
    found = take_inventory(root.path, FakeEngine(*listed))
    assert [each.life for each in found.owners] == [Life.DEAD, Life.UNSEEN, Life.UNSEEN]
