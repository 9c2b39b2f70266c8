"""WorkFiles: the supervisor's access to the work directory, piece by piece, never through a link.

Standard library only: the supervisor imports this module as PID 1.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

MAX_PIECE = 1024 * 1024
"""Bytes of one put or get."""

MAX_DEPTH = 32
MAX_ENTRIES = 200_000
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# a FIFO or device in place of a file must not make the opening wait
_FILE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class BadPath(ValueError):
    """The path is not one inside the work directory."""


class WorkFiles:
    """Files below one directory."""

    def __init__(self, root: str) -> None:
        self._root = root

    def put(self, path: str, offset: int, data: bytes, *, mtime_ns: int | None) -> None:
        """Write `data` at `offset` of the file, which offset 0 creates or empties. Raises OSError, BadPath."""
        flags = os.O_WRONLY | _FILE | (os.O_CREAT | os.O_TRUNC if offset == 0 else 0)
        with self._open(path, flags, create=offset == 0) as file:
            view = memoryview(data)
            while view:
                written = os.pwrite(file, view, offset)
                offset += written
                view = view[written:]
            if mtime_ns is not None:
                os.utime(file, ns=(mtime_ns, mtime_ns))

    def get(self, path: str, offset: int, size: int) -> tuple[bytes, os.stat_result]:
        """Return up to `size` bytes from `offset`, and the file's status. Raises OSError, BadPath."""
        with self._open(path, os.O_RDONLY | _FILE, create=False) as file:
            return os.pread(file, min(size, MAX_PIECE), offset), os.fstat(file)

    def entries(self, after: str | None, limit: int) -> tuple[list[tuple[str, int, int]], bool]:
        """Return up to `limit` regular files after `after` as (path, size, mtime_ns), and whether there are more.

        The order is that of a walk with sorted names. Hidden names and links are left out.
        """
        start = tuple(after.split("/")) if after else ()
        found: list[tuple[str, int, int]] = []
        for path, status in self._walk(self._root, (), start, [MAX_ENTRIES]):
            if len(found) == limit:
                return found, True
            found.append(("/".join(path), status.st_size, status.st_mtime_ns))
        return found, False

    def _walk(
        self, directory: str, prefix: tuple[str, ...], start: tuple[str, ...], left: list[int]
    ) -> Iterator[tuple[tuple[str, ...], os.stat_result]]:
        try:
            descriptor = os.open(directory, _DIRECTORY)
        except OSError:
            return  # removed or made unreadable meanwhile
        try:
            names = []
            with os.scandir(descriptor) as entries:
                for entry in entries:
                    left[0] -= 1
                    if left[0] < 0:
                        break
                    if not entry.name.startswith("."):
                        names.append(entry.name)
            for name in sorted(names):
                path = (*prefix, name)
                if path < start[: len(path)]:
                    continue
                try:
                    status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                    name.encode()
                except (OSError, UnicodeEncodeError):
                    continue
                if stat.S_ISREG(status.st_mode):
                    if path > start:
                        yield path, status
                elif stat.S_ISDIR(status.st_mode) and len(path) < MAX_DEPTH:
                    yield from self._walk(f"{directory}/{name}", path, start, left)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _open(self, path: str, flags: int, *, create: bool) -> Iterator[int]:
        parts = path.split("/")
        if "\0" in path or any(part in ("", ".", "..") for part in parts) or len(parts) > MAX_DEPTH:
            raise BadPath(f"{path!r} is not a path inside the work directory")
        directory = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in parts[:-1]:
                if create:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o755, dir_fd=directory)
                below = os.open(part, _DIRECTORY, dir_fd=directory)
                os.close(directory)
                directory = below
            file = os.open(parts[-1], flags, 0o644, dir_fd=directory)
        finally:
            os.close(directory)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
            yield file
        finally:
            os.close(file)
