"""The work directory `copy`: what goes into a sandbox at its claim, and what comes back from it.

What comes back was written by code that nobody trusts. It is bounded, hidden names and those that programs run by
themselves stay out, and what changed on the host stays. It still is that code's: a `random.py` shadows the
standard library's for a Python that is started in this directory, a `conftest.py` or `Makefile` is run by whoever runs
it. No list of names could end that: look at what came back before you run it.
"""

from __future__ import annotations

import asyncio
import fnmatch
import json
import logging
import os
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from kernelprovisioner.hostfiles import Bounds, FileState, HostDirectory, IncomingFile, Scan, is_text

MODES = ("copy", "empty", "mount")
MIB = 1024 * 1024
INTO = Bounds(files=2000, total_bytes=64 * MIB, file_bytes=32 * MIB)
#: What a sandbox may leave on the host, directories counted as files: over its whole life, by what lies there. One
#: round spends no more than that on files which then do not come.
BACK = Bounds(files=5000, total_bytes=1024 * MIB, file_bytes=256 * MIB)
_PAGE = 2000
#: Characters of all names that one listing holds: they are in memory together.
_LISTED_CHARACTERS = 8 * MIB
_log = logging.getLogger(__name__)

#: Directories that belong to the machine, not to a notebook: refused themselves.
_MACHINE = frozenset(
    (
        *("/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/lib32", "/lib64", "/media", "/mnt", "/opt", "/proc"),
        *("/root", "/run", "/sbin", "/srv", "/sys", "/tmp", "/usr", "/usr/bin", "/usr/lib", "/usr/local", "/usr/sbin"),
        *("/usr/local/bin", "/usr/local/lib", "/usr/share", "/var", "/var/lib", "/var/log", "/var/run", "/var/tmp"),
        *("/Applications", "/Library", "/System", "/Users", "/Volumes", "/private", "/private/tmp"),
    )
)
#: … and these with everything below them.
_MACHINE_TREES = ("/boot", "/dev", "/etc", "/proc", "/sys")
#: Names that a tool on the host would run by itself when it is next started in this directory: files and directories.
_RUN_BY_TOOLS = (
    "jupyter*config*.py",
    "jupyter*config*.json",
    "jupyter*config*.d",
    "ipython*config*.py",
    "ipython*config*.json",
    "pyvenv.cfg",
)
#: … modules that each Python imports when it starts: source, bytecode, extension or package …
_IMPORTED_BY_PYTHON = frozenset({"sitecustomize", "usercustomize"})
#: … and the directories whose `*.pth` it runs. Elsewhere these are PyTorch's models, which are to come back.
_PACKAGES = frozenset({"site-packages", "dist-packages"})


class Request(Protocol):
    """One operation at the sandbox's supervisor (see samovar_kernel.supervisor): returns header and body."""

    def __call__(self, op: str, body: bytes = b"", **fields: Any) -> Awaitable[tuple[dict[str, Any], bytes]]: ...


class HostileName(ValueError):
    """A name from a sandbox that will not be used on the host."""


def refusal(path: Path, home: Path | None = None) -> str | None:
    """Return why a directory is not given to a sandbox, or None where it may be."""
    path = Path(os.path.realpath(path))
    own = Path(os.path.realpath(home or Path.home()))
    if str(path) in _MACHINE or any(str(path).startswith(tree + "/") for tree in _MACHINE_TREES):
        return f"{path} belongs to the machine"
    if path == own:
        return f"{path} is the home directory"
    if own.is_relative_to(path):
        return f"{path} contains the home directory"
    if path.is_relative_to(own) and any(part.startswith(".") for part in path.relative_to(own).parts):
        return f"{path} is a hidden part of the home directory"
    return None


def checked_name(path: object) -> tuple[str, ...]:
    """Return the parts of a relative path that came from a sandbox. Raises HostileName."""
    if not isinstance(path, str) or not path or len(path) > 1024 or not is_text(path):
        raise HostileName("not a file name")
    parts = tuple(path.split("/"))
    if len(parts) > BACK.depth:
        raise HostileName(f"deeper than {BACK.depth} directories")
    for part in parts:
        if part in ("", ".", ".."):
            raise HostileName("not a relative path below the work directory")
        if part.startswith("."):
            raise HostileName("a hidden name")
        if len(part.encode()) > 255:
            raise HostileName("a name of more than 255 bytes")
        if part.startswith("-") or part != part.strip():
            # a shell's `*` makes an option of it, or two names
            raise HostileName("a name with a dash before it or a blank at its ends")
    if _runs_by_itself([part.casefold() for part in parts]):
        raise HostileName("a name that programs on the host run by themselves")
    return parts


def _runs_by_itself(parts: list[str]) -> bool:
    if any(part.partition(".")[0] in _IMPORTED_BY_PYTHON for part in parts):
        return True
    if any(fnmatch.fnmatchcase(part, pattern) for part in parts for pattern in _RUN_BY_TOOLS):
        return True
    return parts[-1].endswith(".pth") and not _PACKAGES.isdisjoint(parts[:-1])


def beside(path: str, number: int) -> str:
    """Return the name under which a file is kept beside the one it must not overwrite."""
    pure = PurePosixPath(path)
    return str(pure.with_name(f"{pure.stem}.sandbox{f'-{number}' if number > 1 else ''}{pure.suffix}"))


def notice_of(scan: Scan, directory: Path) -> str | None:
    """Return one line for the person about what did not go in, or None where all of it did."""
    reasons = []
    if scan.too_large:
        names = ", ".join(scan.too_large[:3]) + (", …" if len(scan.too_large) > 3 else "")
        reasons.append(f"{len(scan.too_large)} of more than {INTO.file_bytes // MIB} MiB ({names})")
    if scan.past_bounds:
        reasons.append(f"{scan.past_bounds} past {INTO.files} files or {INTO.total_bytes // MIB} MiB in all")
    if scan.links:
        reasons.append(f"{scan.links} links")
    if scan.unreadable:
        reasons.append(f"{scan.unreadable} directories that cannot be read")
    if scan.incomplete:
        reasons.append("what lies deeper or later than the search goes")
    if not reasons:
        return None
    copied = f"{len(scan.files)} files of {directory} were copied into the sandbox"
    return f"samovar: {copied}; left out: {'; '.join(reasons)}.\n"


@dataclass
class Returned:
    """What one round of bringing back did: paths written, kept beside (with which name), not taken (and why).

    `failed` files were fetched for nothing, `failed_bytes` in all: they changed meanwhile, or had no place.
    """

    written: list[str] = field(default_factory=list)
    kept_beside: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    failed: int = 0
    failed_bytes: int = 0


class WorkDirectory:
    """One sandbox's copy of one directory of the host. Host I/O runs in threads; one round at a time."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where the directory cannot be opened."""
        self.path = path
        self._host = HostDirectory(path)
        self._plan: dict[str, FileState] = {}
        self._seen: dict[str, tuple[int, int]] = {}  # as they were last in the sandbox
        self._synced: dict[str, FileState] = {}  # the host's files at the same moment
        self._target: dict[str, str] = {}  # sandbox path → host path, where they differ
        self._returned: dict[str, int] = {}  # host path → bytes that came back
        self._made: set[str] = set()  # the host's directories that were made for them
        self._told: set[str] = set()
        self._round = asyncio.Lock()

    async def plan(self) -> str | None:
        """Decide what goes in; return the notice about the rest."""
        scan = await asyncio.to_thread(self._host.scan, INTO)
        self._plan = scan.files
        return notice_of(scan, self.path)

    async def put(self, request: Request) -> None:
        """Carry the planned files in. One that cannot be read is left out; raises what `request` raises."""
        async with self._round:
            for path, state in self._plan.items():
                parts = tuple(path.split("/"))
                pieces = iter(self._host.read(parts, state.size))
                offset = 0
                try:
                    piece = await asyncio.to_thread(next, pieces, b"")
                    while True:
                        following = await asyncio.to_thread(next, pieces, b"") if piece else b""
                        await request(
                            "put", piece, path=path, offset=offset, final=not following, mtime_ns=state.mtime_ns
                        )
                        offset += len(piece)
                        if not following:
                            break
                        piece = following
                except OSError as error:
                    _log.warning("%s stays out of the sandbox: %s", path, error)
                    continue
                self._synced[path] = state
            for path, size, mtime_ns in await _list(request):
                if path in self._synced:
                    self._seen[path] = (size, mtime_ns)

    async def bring_back(self, request: Request) -> Returned:
        """Write new and changed files back. Raises what `request` raises; what was written by then stays."""
        async with self._round:
            report = Returned()
            listed = await _list(request)
            # Else a sandbox that has other names in each round would fill our memory with them.
            self._seen = {path: self._seen[path] for path, _, _ in listed if path in self._seen}
            for path, size, mtime_ns in listed:
                if self._seen.get(path) == (size, mtime_ns):
                    continue
                if report.failed >= BACK.files or report.failed_bytes >= BACK.total_bytes:
                    _log.warning("%d files of a sandbox were fetched for nothing: the rest has to wait", report.failed)
                    break
                try:
                    await self._bring_one(request, path, size, mtime_ns, report)
                except HostileName as error:
                    self._refuse(report, path, str(error))
                    self._seen[path] = (size, mtime_ns)
                except OSError as error:
                    self._refuse(report, path, str(error))
            for path, name in report.kept_beside.items():
                _log.warning("%s changed in the sandbox and on the host: the sandbox's is kept as %s", path, name)
            return report

    def close(self) -> None:
        self._host.close()

    async def _bring_one(self, request: Request, path: str, size: int, mtime_ns: int, report: Returned) -> None:
        parts = checked_name(path)
        if size > BACK.file_bytes:
            raise HostileName(f"larger than {BACK.file_bytes // MIB} MiB")
        target = self._target.get(path, path)
        others = sum(self._returned.values()) - self._returned.get(target, 0)
        if others + size > BACK.total_bytes or not self._has_room(target):
            raise HostileName(f"past {BACK.files} files and directories or {BACK.total_bytes // MIB} MiB in all")
        incoming = await asyncio.to_thread(self._host.incoming, parts)
        placed = None
        try:
            if not self._has_room(target, incoming.missing):
                raise HostileName(f"past {BACK.files} files and directories or {BACK.total_bytes // MIB} MiB in all")
            if not await _fetch(request, path, size, mtime_ns, incoming.write):
                return  # it changed while it was read: the next round has it
            # Before they are made: whatever comes of the file, they stay.
            self._made.update(incoming.missing)
            placed = await asyncio.to_thread(self._place, incoming, path, target)
        finally:
            if placed is None:
                report.failed += 1
                report.failed_bytes += incoming.written
            await asyncio.to_thread(incoming.close)
        self._seen[path] = (size, mtime_ns)
        self._returned[placed] = size
        if placed != path:
            self._target[path] = placed
        if placed == target:
            report.written.append(placed)
        else:
            report.kept_beside[path] = placed

    def _has_room(self, target: str, missing: Collection[str] = ()) -> bool:
        """Whether a file and the directories that are missing for it may be added to what lies on the host."""
        new = (target not in self._returned) + sum(path not in self._made for path in missing)
        return new == 0 or len(self._returned) + len(self._made) + new <= BACK.files

    def _place(self, incoming: IncomingFile, path: str, target: str) -> str:
        """Put the file where it belongs, or beside what must not be overwritten; return its path on the host."""
        number = 0
        name = target
        while True:
            base = name.rpartition("/")[2]
            state = incoming.place(base, self._synced.get(name))
            if state is None and incoming.equals(base):
                state = self._host.state(name.split("/"))
            if state is not None:
                self._synced[name] = state
                return name
            number += 1
            if number > 100:
                raise OSError("a hundred versions of it are kept beside already")
            name = beside(path, number)

    def _refuse(self, report: Returned, path: object, why: str) -> None:
        text = repr(path)[:200]
        report.refused[text] = why
        if text not in self._told and len(self._told) < 1000:
            self._told.add(text)
            _log.warning("%s does not come back from the sandbox: %s", text, why)


async def _fetch(request: Request, path: str, size: int, mtime_ns: int, write: Callable[[bytes], None]) -> bool:
    """Carry one file out; return whether it was the same file from its first to its last piece."""
    offset = 0
    while True:
        header, body = await request("get", path=path, offset=offset, size=MIB)
        if header.get("size") != size or header.get("mtime_ns") != mtime_ns or len(body) > MIB:
            return False
        await asyncio.to_thread(write, body)
        offset += len(body)
        if offset >= size:
            return offset == size
        if not body:
            return False


async def _list(request: Request) -> list[tuple[str, int, int]]:
    """Return what the sandbox says lies in its work directory, bounded; what is no entry at all is dropped.

    So is what is not behind its predecessor in the order of a walk: no name comes twice.
    """
    entries: list[tuple[str, int, int]] = []
    after: str | None = None
    last: list[str] = []
    characters = 0
    while len(entries) < BACK.looked_at and characters < _LISTED_CHARACTERS:
        fields: dict[str, Any] = {"limit": _PAGE} if after is None else {"limit": _PAGE, "after": after}
        header, body = await request("list", **fields)
        try:
            page = json.loads(body)
        except (ValueError, RecursionError):
            break
        if not isinstance(page, list):
            break
        before = len(entries)
        for entry in page[:_PAGE]:
            match entry:
                case [str(path), int(size), int(mtime_ns)] if size >= 0 and path.split("/") > last:
                    entries.append((path, size, mtime_ns))
                    last = path.split("/")
                    characters += len(path)
        if not header.get("more") or len(entries) == before:
            break
        after = entries[-1][0]
    return entries
