"""Records of sandboxes, written as a gateway writes them, for tests."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from kernelprovisioner.records import RecordStore, SandboxRecord
from kernelprovisioner.runtime import OwnerDirectory


async def store_record(owner: Path, record: SandboxRecord) -> None:
    """Write a record into an owner's directory. Raises AssertionError where it cannot be written."""
    store = RecordStore(cast(OwnerDirectory, SimpleNamespace(path=owner)))
    store.write(record)
    await store.close()
    assert store.failure is None, store.failure


def write_record(owner: Path, record: SandboxRecord) -> None:
    """The same where no loop runs."""
    asyncio.run(store_record(owner, record))
