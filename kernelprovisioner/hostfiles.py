"""HostDirectory: the host's side of a work directory, read and written without following one link."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_PIECE = 1024 * 1024
#: What tools leave behind and make again: it never goes in.
_NEVER_IN = frozenset({"__pycache__", "node_modules"})


@dataclass(frozen=True)
class FileState:
    """What tells a changed file from an unchanged one. Size in bytes."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


@dataclass(frozen=True)
class Bounds:
    """How much of a directory is carried. Sizes in bytes; `looked_at` bounds the search itself, in entries."""

    files: int
    total_bytes: int
    file_bytes: int
    depth: int = 16
    looked_at: int = 20_000


@dataclass
class Scan:
    """What a directory holds that may go in, and how much of it was left out for which reason."""

    files: dict[str, FileState] = field(default_factory=dict)
    too_large: list[str] = field(default_factory=list)
    past_bounds: int = 0
    links: int = 0
    unreadable: int = 0
    incomplete: bool = False
    total_bytes: int = 0


class HostDirectory:
    """One directory of the host, held open: what happens to its path later changes nothing.

    Every method blocks on the disk and belongs into a thread. Paths are tuples of names that were checked before.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError where `path` cannot be opened as a directory."""
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # A cancelled caller leaves its thread running: no descriptor may be closed under its hands.
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def scan(self, bounds: Bounds) -> Scan:
        """Return the regular, visible files within `bounds`, nearest to the top first."""
        found = Scan()
        looked_at = 0
        level: list[tuple[str, ...]] = [()]
        for _ in range(bounds.depth):
            below: list[tuple[str, ...]] = []
            for parts in level:
                try:
                    with self._directory(parts) as fd, os.scandir(fd) as entries:
                        for entry in entries:
                            looked_at += 1
                            if looked_at > bounds.looked_at:
                                found.incomplete = True
                                return found
                            with contextlib.suppress(FileNotFoundError):
                                self._look_at(entry, parts, bounds, found, below)
                except OSError:
                    found.unreadable += 1
            level = sorted(below)
        found.incomplete = bool(level)
        return found

    def _look_at(
        self,
        entry: os.DirEntry[str],
        parents: tuple[str, ...],
        bounds: Bounds,
        found: Scan,
        below: list[tuple[str, ...]],
    ) -> None:
        if entry.name.startswith(".") or entry.name in _NEVER_IN or not is_text(entry.name):
            return
        path = "/".join((*parents, entry.name))
        status = entry.stat(follow_symlinks=False)
        if stat.S_ISLNK(status.st_mode):
            found.links += 1
        elif stat.S_ISDIR(status.st_mode):
            below.append((*parents, entry.name))
        elif not stat.S_ISREG(status.st_mode):
            return
        elif status.st_size > bounds.file_bytes:
            found.too_large.append(path)
        elif len(found.files) >= bounds.files or found.total_bytes + status.st_size > bounds.total_bytes:
            found.past_bounds += 1
        else:
            found.files[path] = FileState.of(status)
            found.total_bytes += status.st_size

    def state(self, parts: Sequence[str]) -> FileState | None:
        """Return the state of a regular file, None where nothing has that name. Raises OSError for anything else."""
        try:
            with self._directory(parts[:-1]) as fd:
                status = os.stat(parts[-1], dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{'/'.join(parts)} is no regular file on the host")
        return FileState.of(status)

    def read(self, parts: Sequence[str], limit: int) -> Iterator[bytes]:
        """Yield the file's content in pieces of at most 1 MiB, at most `limit` bytes in all. Raises OSError."""
        with self._directory(parts[:-1]) as directory:
            fd = os.open(parts[-1], _READ, dir_fd=directory)
        with open(fd, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(f"{'/'.join(parts)} is no regular file on the host")
            while limit > 0 and (piece := file.read(min(_PIECE, limit))):
                limit -= len(piece)
                yield piece

    def incoming(self, parts: Sequence[str]) -> IncomingFile:
        """Begin a file that shall become `parts`; a directory that is missing is not made yet. Raises OSError.

        It begins in the nearest directory that is there: on the same file system as its place.
        """
        parents = tuple(parts[:-1])
        there = len(parents)
        while True:
            try:
                with self._directory(parents[:there]) as directory:
                    return IncomingFile(directory, parents, there)
            except FileNotFoundError:
                if there == 0:
                    raise  # the work directory itself was removed
                there -= 1

    @contextlib.contextmanager
    def _directory(self, parts: Sequence[str]) -> Iterator[int]:
        """Open a directory one name after the other, no link followed; closed at the end of the block."""
        with self._lock:
            fd = os.dup(self._fd)
        try:
            for name in parts:
                below = os.open(name, _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = below
            yield fd
        finally:
            os.close(fd)


class IncomingFile:
    """A file that is being written under a hidden name, and takes its place whole or not at all.

    `missing` are the paths of the directories that have to be made for it; none is made before it is placed.
    """

    def __init__(self, directory: int, parents: Sequence[str], there: int) -> None:
        """`directory` is open and is what the first `there` of its `parents` name."""
        self.missing = tuple("/".join(parents[: count + 1]) for count in range(there, len(parents)))
        self.written = 0
        self._directory = os.dup(directory)
        self._place_directory: int | None = None
        self._temporary = f".samovar-{secrets.token_hex(8)}.part"
        self._fd = -1
        self._lock = threading.Lock()
        try:
            self._fd = os.open(self._temporary, _CREATE, 0o666, dir_fd=self._directory)
        except OSError:
            os.close(self._directory)
            raise

    def write(self, piece: bytes) -> None:
        """Raises OSError: the disk is full."""
        with self._lock:
            view = memoryview(piece)
            while view:
                count = os.write(self._fd, view)
                self.written += count
                view = view[count:]

    def equals(self, name: str) -> bool:
        """Whether the file `name` at its place holds the same bytes. Raises OSError."""
        with self._lock:
            return self._equals(self._open_place(), name)

    def _equals(self, directory: int, name: str) -> bool:
        try:
            other = os.open(name, _READ, dir_fd=directory)
        except OSError:
            return False
        with open(other, "rb", buffering=0) as there:
            status = os.fstat(other)
            if not stat.S_ISREG(status.st_mode) or status.st_size != os.fstat(self._fd).st_size:
                return False
            offset = 0
            while piece := there.read(_PIECE):
                if os.pread(self._fd, len(piece), offset) != piece:
                    return False
                offset += len(piece)
        return True

    def place(self, name: str, expected: FileState | None) -> FileState | None:
        """Take the name, if the file there is still the one `expected` (None: if nothing is there).

        Makes the directories that are missing. Returns the new file's state, or None where the name belongs to
        something else by now. Raises OSError.
        """
        with self._lock:
            return self._place(self._open_place(), name, expected)

    def _open_place(self) -> int:
        if self._place_directory is None:
            directory = os.dup(self._directory)
            try:
                for path in self.missing:
                    name = path.rpartition("/")[2]
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, 0o777, dir_fd=directory)
                    below = os.open(name, _DIRECTORY, dir_fd=directory)
                    os.close(directory)
                    directory = below
            except OSError:
                os.close(directory)
                raise
            self._place_directory = directory
        return self._place_directory

    def _place(self, directory: int, name: str, expected: FileState | None) -> FileState | None:
        if expected is None:
            try:
                os.link(self._temporary, name, src_dir_fd=self._directory, dst_dir_fd=directory)
            except FileExistsError:
                return None
            return FileState.of(os.fstat(self._fd))
        try:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return self._place(directory, name, None)
        if not stat.S_ISREG(status.st_mode) or FileState.of(status) != expected:
            return None
        os.fchmod(self._fd, stat.S_IMODE(status.st_mode) & 0o777)
        os.rename(self._temporary, name, src_dir_fd=self._directory, dst_dir_fd=directory)
        return FileState.of(os.fstat(self._fd))

    def close(self) -> None:
        """Remove what did not take a name. May be called twice."""
        with self._lock:
            if self._fd >= 0:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._temporary, dir_fd=self._directory)
                os.close(self._fd)
                os.close(self._directory)
                if self._place_directory is not None:
                    os.close(self._place_directory)
                self._fd = -1


def is_text(name: str) -> bool:
    """Whether a name is plain text that survives the way as JSON: valid Unicode, no control characters."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return name.isprintable() or (" " in name and name.replace(" ", "").isprintable())
