"""What health and doctor find out about directories and engines, and that no check ever takes more than one thread."""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from gateway.checks import Finding, check_directory, check_engine
from gateway.service_checks import BlockingCheck, records_check
from kernelprovisioner.records import RecordStore
from kernelprovisioner.runtime import RuntimeRoot


def test_a_directory_that_can_be_written(tmp_path: Path) -> None:
    found = check_directory(tmp_path, "tests")
    assert found.status == "healthy" and found.error is None and found.facts["free_mb"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_gone(tmp_path: Path) -> None:
    found = check_directory(tmp_path / "gone", "tests", when_full="degraded")
    assert found.status == "degraded"
    assert found.error == f"{tmp_path}/gone cannot be written: No such file or directory; it is needed for tests"


def test_a_full_disk_shows_only_when_something_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    found = check_directory(tmp_path, "tests")
    assert found.status == "unhealthy" and "No space left on device" in str(found.error)
    assert found.remedy is not None and str(tmp_path) in found.remedy


@pytest.mark.parametrize(
    ("free_blocks", "free_inodes", "inodes", "status", "words"),
    [
        (100, 10**6, 10**6, "degraded", "0 MB left"),
        (10**6, 3, 10**6, "degraded", "room for 3 files left"),
        (10**6, 0, 0, "healthy", ""),  # a file system that does not count its inodes
    ],
)
def test_a_disk_that_is_nearly_full(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free_blocks: int,
    free_inodes: int,
    inodes: int,
    status: str,
    words: str,
) -> None:
    numbers = (4096, 4096, 10**7, free_blocks, free_blocks, inodes, free_inodes, free_inodes, 0, 255)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(numbers))
    found = check_directory(tmp_path, "tests")
    assert found.status == status and words in str(found.error or "")


def test_no_engine(tmp_path: Path) -> None:
    found = check_engine(f"unix://{tmp_path}/docker.sock", 1)
    assert found.status == "unhealthy"
    assert "there is no such socket" in str(found.error) and "start Docker" in str(found.remedy)


async def test_a_check_that_hangs_takes_one_thread_and_tells_how_long() -> None:
    gate, calls = threading.Event(), []

    def work() -> Finding:
        calls.append(1)
        gate.wait(10)
        return Finding("healthy", facts={"version": "1"})

    check = BlockingCheck("the engine", work, patience=0.4)
    answers = await asyncio.gather(*(check() for _ in range(20)))
    assert len(calls) == 1
    assert {answer["status"] for answer in answers} == {"degraded"}
    assert answers[0]["error"] == "the engine has not answered for 0 s"
    gate.set()
    assert await check() == {"status": "healthy", "version": "1"}
    assert await check() == {"status": "healthy", "version": "1"}
    assert len(calls) == 1, "a fresh finding is as good as a new one"


async def test_what_was_broken_stays_broken_until_it_answers() -> None:
    gate = threading.Event()
    findings = [Finding("unhealthy", "no answer"), Finding("healthy")]

    def work() -> Finding:
        if len(findings) == 1:
            gate.wait(10)
        return findings.pop(0)

    check = BlockingCheck("the engine", work, patience=0.05)
    assert (await check())["status"] == "unhealthy"
    await asyncio.sleep(0.6)
    assert await check() == {"status": "unhealthy", "error": "no answer"}
    gate.set()
    assert (await check())["status"] == "healthy"


async def test_records_that_cannot_be_written_are_told(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = RuntimeRoot.open(short_directory / "run").owner_directory()
    store = RecordStore(owner)
    check = records_check(store)
    assert await check() == {"status": "healthy"}
    monkeypatch.setattr(os, "unlink", full)
    await store.remove("0" * 16)
    found = await check()
    assert found["status"] == "degraded" and "No space left on device" in found["error"]
    assert "would not find these sandboxes again" in found["error"] and "make room" in found["remedy"]
    monkeypatch.undo()
    await store.close()
    owner.close()


async def test_a_check_that_fails_is_a_finding() -> None:
    def work() -> Finding:
        raise RuntimeError("oops")

    found = await BlockingCheck("the engine", work)()
    assert found["status"] == "unhealthy" and "oops" in found["error"]
