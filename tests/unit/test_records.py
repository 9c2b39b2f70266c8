"""Records: what is noted of a sandbox survives being read again, damage is told, and a full disk costs nothing else."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelprovisioner import records
from kernelprovisioner.exit_log import ExitLog
from kernelprovisioner.images import KernelImage
from kernelprovisioner.launchers.base import Endpoint, Launched
from kernelprovisioner.launchers.configurable import ipc_endpoints
from kernelprovisioner.records import (
    RecordError,
    RecordStore,
    SandboxRecord,
    read_record,
    read_records,
    record_path,
)
from kernelprovisioner.runtime import OwnerDirectory, RuntimeRoot
from kernelprovisioner.sandbox import ClaimRequest, Sandbox, SandboxState
from tests.stored_records import write_record

IMAGE = KernelImage("python", "python", "Python", Path("/nowhere"), "base")


@pytest.fixture
def owner(short_directory: Path) -> Iterator[OwnerDirectory]:
    owner = RuntimeRoot.open(short_directory / "run").owner_directory()
    yield owner
    owner.close()


def launched(owner: Path, number: int = 0) -> Launched:
    sandbox_id = f"{number:016x}"
    channels, supervisor = ipc_endpoints(owner / sandbox_id)
    return Launched(
        sandbox_id, IMAGE, "container", owner / sandbox_id, "/mnt/data", b"key", "token", supervisor, channels
    )


def record(directory: Path, number: int = 0, **fields: Any) -> SandboxRecord:
    return msgspec.structs.replace(SandboxRecord.of(launched(directory, number), now=1.0 + number), **fields)


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.text(),
    st.dictionaries(st.text(), _json, max_size=4),
    st.sampled_from([Endpoint(path=Path("/a b/ü")), Endpoint(host="127.0.0.1", port=1)]),
)
def test_a_record_reads_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, text: str, holder: dict[str, Any], endpoint: Endpoint
) -> None:
    directory = tmp_path_factory.getbasetemp()
    written = record(directory, kernel_id=text, owner=text, holder=holder, channels={"shell": endpoint})
    write_record(directory, written)
    assert read_record(record_path(directory, written.sandbox_id)) == written


def test_a_record_is_the_owners_alone_and_tells_how_it_was_launched(owner: OwnerDirectory) -> None:
    write_record(owner.path, record(owner.path))
    path = record_path(owner.path, "0" * 16)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_record(path).launched(IMAGE, owner.path) == launched(owner.path)
    assert [entry.name for entry in owner.path.iterdir() if entry.suffix == ".new"] == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read"),
        (b'{"sandbox_id": "0', "cannot be read"),
        (b"\xff", "cannot be read"),
        (b"[]", "cannot be read"),
        (b'{"sandbox_id": 5}', "cannot be read"),
        (b'{"holder": ' + b"[" * 100_000, "cannot be read"),
        ("moment", "cannot be read"),
        ("other", "is about another sandbox"),
        ("version", "has version 99"),
        (None, "No such file"),
    ],
)
def test_what_cannot_be_read_is_told_and_hides_no_other(
    owner: OwnerDirectory, content: bytes | str | None, words: str
) -> None:
    path = record_path(owner.path, "0" * 16)
    if content == "other":
        content = msgspec.json.encode(record(owner.path, 7), enc_hook=str)
    elif content == "moment":
        content = msgspec.json.encode(record(owner.path, created_at=1e300), enc_hook=str)
    elif content == "version":
        content = msgspec.json.encode(record(owner.path, version=99), enc_hook=str)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.symlink_to(owner.path / "nothing")
    for number in (2, 1):
        write_record(owner.path, record(owner.path, number))
    found, errors = read_records(owner.path)
    assert [each.sandbox_id for each in found] == [f"{number:016x}" for number in (1, 2)], "oldest first"
    (error,) = errors
    assert words in str(error) and str(path) in str(error)
    with pytest.raises(RecordError, match=words):
        read_record(path)


def test_a_copy_that_somebody_made_is_no_sandbox(owner: OwnerDirectory) -> None:
    write_record(owner.path, msgspec.structs.replace(record(owner.path), sandbox_id="copy"))
    found, (error,) = read_records(owner.path)
    assert found == [] and "is about another sandbox" in str(error)


async def test_what_is_asked_for_happens_in_order_beside_the_loop(
    owner: OwnerDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()
    replace = os.replace

    def noting(*arguments: Any) -> None:
        threads.add(threading.current_thread().name)
        replace(*arguments)

    monkeypatch.setattr(os, "replace", noting)
    store = RecordStore(owner)
    for number in range(5):
        store.write(record(owner.path, number))
        store.write(record(owner.path, number, state="claimed"))
    store.remove(f"{0:016x}")
    await store.flush()
    assert [(each.sandbox_id[-1], each.state) for each in await store.read()] == [
        (str(n), "claimed") for n in range(1, 5)
    ]
    (owner.path / "damaged.json").write_text("{")
    store.remove_all_but([f"{2:016x}"])
    assert [each.sandbox_id[-1] for each in await store.read()] == ["2"]
    assert not (owner.path / "damaged.json").exists()
    await store.close()
    await store.write(record(owner.path, 9))
    assert not record_path(owner.path, f"{9:016x}").exists()
    assert len(threads) == 1 and threads.pop().startswith("samovar-records")


async def test_a_full_disk_is_told_once(
    owner: OwnerDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def replacing(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", replacing)
    store = RecordStore(owner)
    for number in range(3):
        await store.write(record(owner.path, number))
    assert store.failure is not None and "No space left on device" in store.failure
    assert len(caplog.records) == 1
    assert [entry.suffix for entry in owner.path.iterdir() if entry.suffix in (".new", ".json")] == []
    await store.remove(f"{9:016x}")
    assert "No space left on device" in store.failure, "what can be removed does not prove that there is room"
    await store.write(record(owner.path, kernel_id="\ud800"))
    assert "surrogates not allowed" in store.failure
    await store.close()


async def test_a_claim_that_is_acknowledged_while_its_sandbox_goes_leaves_no_record(owner: OwnerDirectory) -> None:
    store, unused = RecordStore(owner), cast(Any, None)
    sandbox = Sandbox(launched(owner.path), unused, unused, cast(Any, SimpleNamespace(records=store)))
    sandbox.record = record(owner.path)
    for state, written in ((SandboxState.CLAIMED, True), (SandboxState.GONE, False)):
        sandbox.state = state
        await store.remove(sandbox.id)
        sandbox._note_claim(ClaimRequest("kernel", b"key"))
        await sandbox.recorded()
        assert record_path(owner.path, sandbox.id).exists() is written
    await store.close()


async def test_a_record_may_outlive_its_sandbox_until_its_holder_forgets_it(owner: OwnerDirectory) -> None:
    store, unused = RecordStore(owner), cast(Any, SimpleNamespace(close=_nothing))

    class Life(SimpleNamespace):
        def run(self, work: Any) -> asyncio.Task[None]:
            return asyncio.create_task(work)

    launcher = SimpleNamespace(destroy=_nothing)
    life = Life(records=store, launcher=launcher, keeping=False, forget=lambda _: None, exits=ExitLog())
    sandbox = Sandbox(launched(owner.path), SimpleNamespace(close=lambda: None), unused, cast(Any, life))
    await store.write(record(owner.path))
    sandbox.record_stays = True
    await sandbox.destroy()
    await store.flush()
    assert record_path(owner.path, sandbox.id).exists()
    sandbox.forget_record()
    await store.flush()
    assert not record_path(owner.path, sandbox.id).exists()
    await store.close()


async def _nothing(*_: object) -> None:
    pass


async def test_what_could_not_be_written_is_tried_again_as_it_is_by_then(
    owner: OwnerDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = True
    replace = os.replace

    def replacing(*arguments: Any) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(*arguments)

    monkeypatch.setattr(os, "replace", replacing)
    monkeypatch.setattr(records, "_RETRY_SECONDS", 0.05)
    store = RecordStore(owner)
    store.write(record(owner.path, 1))
    store.write(record(owner.path, 1, state="claimed"))
    store.write(record(owner.path, 2))
    await store.remove(f"{2:016x}")
    await asyncio.sleep(0.2)
    assert len(caplog.records) == 1, "a disk that stays full is told once"
    full = False
    await store.write(record(owner.path, 3))
    assert store.failure is not None, "one is still missing"
    async with asyncio.timeout(5):
        while store.failure is not None:  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.01)
    assert [(each.sandbox_id[-1], each.state) for each in await store.read()] == [
        ("1", "claimed"),
        ("3", "warm"),
    ]
    await store.close()
