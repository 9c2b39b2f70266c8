"""The runtime directory: where sandboxes' sockets live, whose they are, and what dead owners left.

<root>/                      0700, ours, no link
<root>/<owner>/lock          held by flock while the owner lives
<root>/<owner>/kind          what launches here: launcher and engine
<root>/<owner>/role          `gateway` where another gateway may continue as this owner
<root>/<owner>/dead          made by who first finds the gateway dead
<root>/<owner>/<sandbox_id>.json  the sandbox's record
<root>/<owner>/<sandbox_id>/ one sandbox: sockets k-1 … k-5 and sup
<root>/k/<kernel_id>         link to a sandbox's directory, moved by the provisioner only
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

ENVIRONMENT_NAME = "SAMOVAR_RUNTIME_DIR"
#: A dead gateway's sandboxes wait so long (in seconds) for the next one; by then they have ended themselves.
GATEWAY_GRACE = 90.0
#: bytes that a Unix socket's path may have (108 with the final NUL)
MAX_SOCKET_PATH = 107

CLAIM_SOCKET = "claim.sock"

_GATEWAY = "gateway"
_OWNER_NAME = re.compile(r"[0-9a-f]{8}")
_SANDBOX_NAME = re.compile(r"[0-9a-f]{16}")
#: whoever only looks waits so long (in seconds) for the root's lock
_GLANCE_SECONDS = 1.0
# The longest path below the root is a kernel's link: /k/<uuid>/sup.
_LONGEST_BELOW_ROOT = len("/k/") + 36 + len("/sup")

log = logging.getLogger(__name__)


class RuntimeDirectoryError(Exception):
    """The runtime directory cannot be used; the text says why and what to do."""


def default_root(environ: Mapping[str, str], uid: int) -> Path:
    """Return the runtime directory that a process with this environment and uid uses."""
    chosen = environ.get(ENVIRONMENT_NAME)
    if chosen:
        return Path(chosen).absolute()
    if uid == 0:
        return Path("/run/samovar")
    session = environ.get("XDG_RUNTIME_DIR")
    if session and os.path.isabs(session) and os.access(session, os.W_OK | os.X_OK):
        return Path(session) / "samovar"
    return Path(f"/tmp/samovar-{uid}")


def check_socket_path(path: Path) -> Path:
    """Return `path`. Raises RuntimeDirectoryError where it is too long for a Unix socket."""
    size = len(os.fsencode(path))
    if size > MAX_SOCKET_PATH:
        raise RuntimeDirectoryError(
            f"the socket path {path} has {size} bytes, at most {MAX_SOCKET_PATH} work; "
            f"set {ENVIRONMENT_NAME} to a shorter directory"
        )
    return path


class RuntimeRoot:
    """The directory that holds all owners of one user."""

    def __init__(self, path: Path) -> None:
        """Use `open()`, which checks the directory first."""
        self.path = path
        self.links = path / "k"
        self.claim_socket = path / CLAIM_SOCKET

    @classmethod
    def open(cls, path: Path | str | None = None) -> RuntimeRoot:
        """Return the root at `path` (None: where `default_root` says), made where it does not exist.

        Raises RuntimeDirectoryError where it is not ours alone, is a link, cannot be made or is too long.
        """
        root = default_root(os.environ, os.geteuid()) if path is None else Path(path).absolute()
        check_length(root)
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_private(root)
            (root / "k").mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise RuntimeDirectoryError(
                f"cannot use the runtime directory {root}: {error.strerror}; set {ENVIRONMENT_NAME} to another one"
            ) from error
        return cls(root)

    def owner_directory(self) -> OwnerDirectory:
        """Return a new owner directory whose lock this process holds. Raises RuntimeDirectoryError."""
        path = self.path / secrets.token_hex(4)
        try:
            # Under the root's lock, so that nobody takes a directory for dead between its making and its locking.
            with _locked_directory(self.path):
                path.mkdir(mode=0o700)
                lock = _open_lock(path, create=True)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeDirectoryError(f"cannot make the owner directory {path}: {error.strerror}") from error
        return OwnerDirectory(path, lock)

    def dead_owners(self, *, gateways: bool = False) -> list[OwnerDirectory]:
        """Return the owners whose process is gone, their locks now held by us: reap, then `close()` each.

        Dead gateways that the next one may continue are only among them with `gateways`.
        """
        dead: list[OwnerDirectory] = []
        with _locked_directory(self.path):
            for entry in sorted(self.path.iterdir()):
                if is_owner_name(entry.name):
                    owner = _take_over(entry, create_lock=True)
                    # Let go of at once, under the root's lock: a gateway that starts must not take it for living.
                    if owner is not None and not gateways and owner.awaits_gateway:
                        owner.release()
                    elif owner is not None:
                        dead.append(owner)
        return dead

    def gateway_kinds(self) -> list[str]:
        """What gateways that live here, or died and were not continued yet, have launched with. Blocks."""
        found = []
        for role in self.path.glob("*/role"):
            with contextlib.suppress(OSError):
                if is_owner_name(role.parent.name) and is_gateways(role.parent):
                    found.append(_note(role.parent / "kind"))
        return found

    def remove_links_into(self, owner: OwnerDirectory) -> None:
        """Remove the kernels' links that lead into this owner's directory."""
        for link in self.links.iterdir():
            with contextlib.suppress(OSError):
                if Path(os.readlink(link)).parent == owner.path:
                    link.unlink()


def owner_lives(path: Path) -> bool | None:
    """Whether a living process owns the owner directory at `path`; None where it cannot be seen. Blocks, bounded."""
    try:
        # Under the root's lock: who starts as this owner, or reaps it, at this moment must not find its lock taken.
        with _glance(path.parent):
            lock = os.open(path / "lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            finally:
                os.close(lock)
    except BlockingIOError:
        return True
    except OSError:  # it is gone, was never there, or is not ours to see
        return None
    return False


def is_gateways(owner: Path) -> bool:
    """Whether a gateway owns, or owned, the owner directory at `owner`."""
    try:
        return _note(owner / "role") == _GATEWAY
    except OSError:
        return False


def is_in_grace(owner: Path) -> bool:
    """Whether the dead gateway whose directory this is may still be continued: found dead lately, or by nobody yet."""
    try:
        return time.time() - (owner / "dead").stat().st_mtime < GATEWAY_GRACE
    except OSError:
        return True


class OwnerDirectory:
    """One owner's directory, with its lock held by this process until `close()` or `release()`."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock: int | None = lock

    @property
    def name(self) -> str:
        """The owner's name: 8 hexadecimal digits."""
        return self.path.name

    @classmethod
    def take_over(cls, path: Path) -> OwnerDirectory | None:
        """Return the owner directory at `path` if its owner is dead; None if it lives or cannot be seen.

        None as well for a dead gateway that the next one may continue.
        """
        if not is_owner_name(path.name):
            return None
        try:
            with _locked_directory(path.parent):
                owner = _take_over(path, create_lock=False)
                if owner is not None and owner.awaits_gateway:
                    owner.release()
                    return None
                return owner
        except OSError:  # the directory around it is gone, or not ours to see
            return None

    def sandbox_directory(self, sandbox_id: str) -> Path:
        """Make and return the directory of one sandbox.

        Its mode is 0777, since the container has another uid; nobody else passes the root's 0700. Raises
        RuntimeDirectoryError.
        """
        path = self._path_of(sandbox_id)
        try:
            path.mkdir(mode=0o700)
            path.chmod(0o777)
        except OSError as error:
            raise RuntimeDirectoryError(f"cannot make the sandbox directory {path}: {error.strerror}") from error
        return path

    def remove_sandbox_directory(self, sandbox_id: str) -> None:
        """Remove the directory of one sandbox with all that is in it; one that is gone is fine."""
        _remove_tree(self._path_of(sandbox_id))

    def write_kind(self, kind: str) -> None:
        """Note what launches here (launcher and engine), so that only its like reaps what is left."""
        (self.path / "kind").write_text(kind)

    def read_kind(self) -> str | None:
        """Return what `write_kind` noted; None if the owner died before."""
        try:
            return _note(self.path / "kind")
        except FileNotFoundError:
            return None

    def mark_gateway(self) -> None:
        """Note that a gateway owns this: after its death the next one may continue as this owner."""
        (self.path / "role").write_text(_GATEWAY)

    @property
    def is_gateways(self) -> bool:
        """Whether `mark_gateway` was called."""
        return is_gateways(self.path)

    def continue_as_gateway(self) -> None:
        """Forget that the gateway that owned this was found dead: it lives again, in us."""
        (self.path / "dead").unlink(missing_ok=True)

    @property
    def awaits_gateway(self) -> bool:
        """Whether the next gateway may still continue as this dead owner; asking notes when that was first asked."""
        if not self.is_gateways:
            return False
        # On a full disk nobody learns since when: then the next gateway has all the time it wants.
        with contextlib.suppress(OSError):
            (self.path / "dead").open("x").close()
        return is_in_grace(self.path)

    def sandbox_ids(self) -> list[str]:
        """Return the sandboxes that have a directory here."""
        return sorted(entry.name for entry in self.path.iterdir() if is_sandbox_id(entry.name))

    def close(self) -> None:
        """Remove the directory with all that is in it and give the lock up. May be called again."""
        if self._lock is not None:
            for sandbox_id in self.sandbox_ids():
                self.remove_sandbox_directory(sandbox_id)
            _remove_tree(self.path)
        self.release()

    def release(self) -> None:
        """Give the lock up and leave the directory as it is. May be called again."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _path_of(self, sandbox_id: str) -> Path:
        if not is_sandbox_id(sandbox_id):
            raise ValueError(f"a sandbox id has 16 hexadecimal digits, not {sandbox_id!r}")
        return self.path / sandbox_id


def is_owner_name(name: str) -> bool:
    """Whether a directory's name in the root is that of an owner."""
    return _OWNER_NAME.fullmatch(name) is not None


def is_sandbox_id(name: str) -> bool:
    """Whether a file's name is that of a sandbox, and not of something that a person put there."""
    return _SANDBOX_NAME.fullmatch(name) is not None


def check_length(root: Path) -> None:
    """Raise RuntimeDirectoryError where sockets below this runtime directory would have too long paths."""
    longest = len(os.fsencode(root)) + _LONGEST_BELOW_ROOT
    if longest > MAX_SOCKET_PATH:
        raise RuntimeDirectoryError(
            f"the runtime directory {root} is too long: socket paths in it would have {longest} bytes, "
            f"at most {MAX_SOCKET_PATH} work; set {ENVIRONMENT_NAME} to a shorter one"
        )


def check_private(root: Path) -> None:
    """Raise RuntimeDirectoryError where the runtime directory is not ours alone, and OSError where it is not there."""
    found = root.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise RuntimeDirectoryError(
            f"the runtime directory {root} is a link or no directory; remove it or choose another one"
        )
    if found.st_uid != os.geteuid():
        raise RuntimeDirectoryError(
            f"the runtime directory {root} belongs to uid {found.st_uid}, not to {os.geteuid()}; "
            f"set {ENVIRONMENT_NAME} to one of your own"
        )
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        raise RuntimeDirectoryError(
            f"the runtime directory {root} is open to others (mode {mode:04o}); run: chmod 700 {root}"
        )


@contextlib.contextmanager
def _locked_directory(path: Path) -> Iterator[None]:
    """Hold the lock of a directory itself; it is only ever held for a moment."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _note(path: Path) -> str:
    """Return a line that an owner wrote; a damaged one is none that anybody looks for. Raises OSError."""
    return path.read_text(errors="replace")


@contextlib.contextmanager
def _glance(root: Path) -> Iterator[None]:
    """Hold a share of the root's lock for a moment; whoever keeps all of it for long is not waited for."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _GLANCE_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _open_lock(owner: Path, *, create: bool) -> int:
    flags = os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    return os.open(owner / "lock", flags, 0o600)


def _take_over(path: Path, *, create_lock: bool) -> OwnerDirectory | None:
    try:
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            return None
        lock = _open_lock(path, create=create_lock)
    except OSError:  # gone meanwhile, or not ours to see
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever reaped it before us removed the file that we opened.
        current = os.stat(path / "lock", follow_symlinks=False)
        if os.path.samestat(current, os.fstat(lock)):
            return OwnerDirectory(path, lock)
    except OSError:  # held: its owner lives; or removed by another reaper
        os.close(lock)
        return None
    os.close(lock)
    return None


def _remove_tree(path: Path) -> None:
    """Remove a directory or whatever else is there; what cannot be removed is named in the log."""
    try:
        if path.is_symlink():
            path.unlink()
            return
        # A warm sandbox's directory has lost its write bit.
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            os.fchmod(descriptor, 0o700)
        finally:
            os.close(descriptor)
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("could not remove %s: %s", path, error)
