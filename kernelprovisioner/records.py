"""Records: what a gateway notes of each of its sandboxes, so that the next one can carry on with it after a crash.

One file per sandbox in the owner's directory, `<owner>/<sandbox_id>.json`: readable by the owner alone (it holds the
keys), replaced in one step, and never in the directory that is mounted into the sandbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from kernelprovisioner.images import KernelImage
from kernelprovisioner.launchers.base import Endpoint, Launched
from kernelprovisioner.runtime import OwnerDirectory, is_sandbox_id

VERSION = 1
#: how long whoever needs a record on disk waits for a disk that stands still
_WAIT_SECONDS = 1.0
#: how long after a failure all that is not written is tried again
_RETRY_SECONDS = 5.0
#: a disk that stands still must not make us keep ever more records in memory
_MAX_PENDING = 10_000
_UNFINISHED = ".new"

log = logging.getLogger(__name__)


class RecordError(Exception):
    """A record cannot be read or written; the text says which and why."""


#: Seconds since the epoch that a calendar has.
Moment = Annotated[float, msgspec.Meta(ge=0, lt=250_000_000_000)]


class SandboxRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One sandbox that is warm or claimed, with all that is needed to connect to it again.

    `key` signs the kernel's messages now. `owner` is the pool's owner of a claimed one, `holder` what whoever claimed
    it needs to come back to it. Times are in seconds since the epoch.
    """

    sandbox_id: str
    image: str
    runtime_id: str
    work_directory: str
    transport: str
    isolated: bool
    template: str | None
    key: str
    token: str
    supervisor: Endpoint
    channels: dict[str, Endpoint]
    created_at: Moment
    state: Literal["warm", "claimed"] = "warm"
    claimed_at: Moment | None = None
    kernel_id: str = ""
    owner: str = ""
    holder: dict[str, Any] = {}
    version: int = VERSION

    @classmethod
    def of(cls, launched: Launched, now: float) -> SandboxRecord:
        """Return the record of a sandbox that has become warm."""
        return cls(
            sandbox_id=launched.sandbox_id,
            image=launched.image.name,
            runtime_id=launched.runtime_id,
            work_directory=launched.work_directory,
            transport=launched.transport,
            isolated=launched.isolated,
            template=launched.template,
            key=launched.key.decode(),
            token=launched.token,
            supervisor=launched.supervisor,
            channels=launched.channels,
            created_at=now,
        )

    def launched(self, image: KernelImage, owner: Path) -> Launched:
        """Return the sandbox as its launcher described it; `owner` is the directory that the record lies in."""
        return Launched(
            sandbox_id=self.sandbox_id,
            image=image,
            runtime_id=self.runtime_id,
            directory=owner / self.sandbox_id,
            work_directory=self.work_directory,
            key=self.key.encode(),
            token=self.token,
            supervisor=self.supervisor,
            channels=self.channels,
            transport=self.transport,
            isolated=self.isolated,
            template=self.template,
        )


def record_path(owner: Path, sandbox_id: str) -> Path:
    """Return where the record of a sandbox lies."""
    return owner / f"{sandbox_id}.json"


def read_record(path: Path) -> SandboxRecord:
    """Return the record at `path`. Raises RecordError where it is gone, damaged, or of another version."""
    try:
        record = _decoder.decode(path.read_bytes())
    except OSError as error:
        raise RecordError(f"the record {path} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecordError(f"the record {path} cannot be read: {error}") from None
    if record.version != VERSION:
        raise RecordError(f"the record {path} has version {record.version}, this program reads version {VERSION}")
    if record.sandbox_id != path.stem or not is_sandbox_id(path.stem):
        raise RecordError(f"the record {path} is about another sandbox, {record.sandbox_id!r}")
    return record


def read_records(owner: Path) -> tuple[list[SandboxRecord], list[RecordError]]:
    """Return the records of an owner, oldest first, and what is wrong with those that cannot be read. Blocks."""
    records: list[SandboxRecord] = []
    errors: list[RecordError] = []
    for path in sorted(owner.glob("*.json")):
        try:
            records.append(read_record(path))
        except RecordError as error:
            errors.append(error)
    return sorted(records, key=lambda record: record.created_at), errors


def _replace(path: str, content: bytes) -> None:
    """Write or replace one record in one step. Raises OSError. Blocks.

    Not synced: a machine that goes down takes the sandboxes with it.
    """
    # Little Python: it runs beside a loop that has just claimed a sandbox and wants to use it.
    temporary = path.removesuffix(".json") + _UNFINISHED
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            if os.write(descriptor, content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def remove_record(owner: Path, sandbox_id: str) -> None:
    """Remove a record; one that is not there is fine. Raises OSError. Blocks."""
    record_path(owner, sandbox_id).unlink(missing_ok=True)


def remove_records_but(owner: Path, wanted: Collection[str]) -> None:
    """Remove all records, readable or not, but those of the sandboxes that are `wanted`. Raises OSError. Blocks."""
    for path in (*owner.glob("*.json"), *owner.glob(f"*{_UNFINISHED}")):
        if path.stem not in wanted:
            path.unlink(missing_ok=True)


class RecordStore:
    """The records of one owner, written in the order in which they were asked for, in a thread of their own.

    A record that cannot be written costs its sandbox the recovery, and nothing else: that is logged, told by `failure`,
    and tried again until it is written or its sandbox is gone.
    """

    def __init__(self, owner: OwnerDirectory) -> None:
        self._owner = owner.path
        self._thread = ThreadPoolExecutor(1, "samovar-records")
        self._pending: set[asyncio.Future[None]] = set()
        self._closed = False
        #: by path what is to be there, from when that is asked for until it is; one for each sandbox at most
        self._unwritten: dict[str, bytes] = {}
        self._again: asyncio.TimerHandle | None = None
        #: why not all records are as they should be; None where they are
        self.failure: str | None = None

    async def read(self) -> list[SandboxRecord]:
        """Return all records, oldest first; one that cannot be read is named in the log."""
        records, errors = await asyncio.get_running_loop().run_in_executor(self._thread, read_records, self._owner)
        for error in errors:
            log.warning("%s; its sandbox will be removed", error)
        return records

    def write(self, record: SandboxRecord) -> asyncio.Future[None]:
        """Begin to write a record; the future is done when that was tried, and never fails."""
        try:
            content = _encoder.encode(record)
        except UnicodeEncodeError as error:  # half a surrogate pair in a name that a client chose
            return self._given_up(error)
        return self._begin_writing(str(record_path(self._owner, record.sandbox_id)), content)

    def remove(self, sandbox_id: str) -> asyncio.Future[None]:
        """Begin to remove a record; the future is done when that was tried, and never fails."""
        self._unwritten.pop(str(record_path(self._owner, sandbox_id)), None)
        return self._begin(remove_record, self._owner, sandbox_id)

    def remove_all_but(self, wanted: Iterable[str]) -> asyncio.Future[None]:
        """Begin to remove all records but those of the sandboxes that are `wanted` now."""
        return self._begin(remove_records_but, self._owner, frozenset(wanted))

    async def written(self, writing: asyncio.Future[None]) -> None:
        """Wait for one record; a disk that stands still is not waited for."""
        await asyncio.wait({writing}, timeout=_WAIT_SECONDS)

    async def flush(self) -> None:
        """Wait until all that was asked for is on disk; a disk that stands still is not waited for."""
        if self._pending:
            await asyncio.wait(set(self._pending), timeout=_WAIT_SECONDS)

    async def close(self) -> None:
        """Wait until all is written, bounded, and end the thread; what is asked for later is not done."""
        await self.flush()
        self._closed = True
        if self._again is not None:
            self._again.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _begin_writing(self, path: str, content: bytes) -> asyncio.Future[None]:
        self._unwritten[path] = content

        def written() -> None:
            if self._unwritten.get(path) is content:
                del self._unwritten[path]
            # Not after a removal: that succeeds on a full disk, too.
            if not self._unwritten:
                self.failure = None

        return self._begin(_replace, path, content, done=written)

    def _write_again(self) -> None:
        self._again = None
        if self._pending:
            # A disk that stands still is not asked for more.
            self._try_later()
            return
        # The newest of each, so that nothing is put back to what it was.
        for path, content in list(self._unwritten.items()):
            self._begin_writing(path, content)

    def _try_later(self) -> None:
        if self._again is None and self._unwritten and not self._closed:
            self._again = asyncio.get_running_loop().call_later(_RETRY_SECONDS, self._write_again)

    def _begin(
        self, work: Callable[..., None], *arguments: Any, done: Callable[[], None] = lambda: None
    ) -> asyncio.Future[None]:
        """Run blocking `work` behind what was begun before; `done` is called where it does not fail."""
        if self._closed:
            return self._given_up(None)
        if len(self._pending) >= _MAX_PENDING:
            return self._given_up(OSError("the disk does not keep up"))
        loop = asyncio.get_running_loop()
        tried: asyncio.Future[None] = loop.create_future()
        self._pending.add(tried)

        def finish(trying: asyncio.Future[None]) -> None:
            self._pending.discard(tried)
            if not trying.cancelled():
                error = trying.exception()
                if error is None:
                    done()
                else:
                    self._failed(error)
            tried.set_result(None)

        loop.run_in_executor(self._thread, work, *arguments).add_done_callback(finish)
        return tried

    def _given_up(self, error: Exception | None) -> asyncio.Future[None]:
        if error is not None:
            self._failed(error)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    def _failed(self, error: BaseException) -> None:
        reason = getattr(error, "strerror", None) or str(error)
        failure = f"records of sandboxes cannot be written to {self._owner}: {reason}"
        if failure != self.failure:
            log.warning("%s; a gateway that crashes now would not find these sandboxes again", failure)
        self.failure = failure
        self._try_later()


def _encode_path(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(type(value).__name__)


def _decode_path(kind: type, value: Any) -> Any:
    if kind is Path:
        return Path(value)
    raise NotImplementedError(kind.__name__)


_encoder = msgspec.json.Encoder(enc_hook=_encode_path)
_decoder = msgspec.json.Decoder(SandboxRecord, dec_hook=_decode_path)
