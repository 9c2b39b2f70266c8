"""The runtime directory: who may use it, whose is what, and what becomes of a dead owner's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kernelprovisioner.runtime import (
    MAX_SOCKET_PATH,
    OwnerDirectory,
    RuntimeDirectoryError,
    RuntimeRoot,
    check_socket_path,
    default_root,
    owner_lives,
)

SANDBOX = "0123456789abcdef"


@pytest.fixture
def root(short_directory: Path) -> RuntimeRoot:
    return RuntimeRoot.open(short_directory / "run")


@pytest.fixture
def other_process(root: RuntimeRoot) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A process that holds an owner directory with one sandbox in it, until it is killed."""
    program = (
        "import sys; from kernelprovisioner.runtime import RuntimeRoot\n"
        f"owner = RuntimeRoot.open({str(root.path)!r}).owner_directory()\n"
        f"owner.sandbox_directory({SANDBOX!r}); owner.write_kind('test')\n"
        "print(owner.path, flush=True); sys.stdin.read()"
    )
    with ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[2],
            )
        )
        stack.callback(process.kill)
        assert process.stdout is not None
        yield Path(process.stdout.readline().strip()), process


@pytest.mark.parametrize(
    ("environ", "uid", "expected"),
    [
        ({"SAMOVAR_RUNTIME_DIR": "/srv/r"}, 0, "/srv/r"),
        ({"SAMOVAR_RUNTIME_DIR": "/srv/r", "XDG_RUNTIME_DIR": "/"}, 7, "/srv/r"),
        ({"XDG_RUNTIME_DIR": "/"}, 0, "/run/samovar"),
        ({"XDG_RUNTIME_DIR": "/nowhere/at/all"}, 7, "/tmp/samovar-7"),
        ({"XDG_RUNTIME_DIR": "relative"}, 7, "/tmp/samovar-7"),
        ({}, 7, "/tmp/samovar-7"),
    ],
)
def test_where_the_root_is(environ: dict[str, str], uid: int, expected: str) -> None:
    assert default_root(environ, uid) == Path(expected)


def test_the_session_directory_comes_before_tmp(short_directory: Path) -> None:
    assert default_root({"XDG_RUNTIME_DIR": str(short_directory)}, 7) == short_directory / "samovar"


def test_a_new_root_is_ours_alone(root: RuntimeRoot) -> None:
    assert root.path.stat().st_mode & 0o777 == 0o700
    assert root.links.is_dir()
    assert RuntimeRoot.open(root.path).path == root.path


def test_a_root_open_to_others_is_refused(short_directory: Path) -> None:
    path = short_directory / "open"
    path.mkdir()
    path.chmod(0o755)
    with pytest.raises(RuntimeDirectoryError, match=r"open to others \(mode 0755\); run: chmod 700"):
        RuntimeRoot.open(path)


def test_a_link_is_refused(short_directory: Path, root: RuntimeRoot) -> None:
    link = short_directory / "link"
    link.symlink_to(root.path)
    with pytest.raises(RuntimeDirectoryError, match="is a link"):
        RuntimeRoot.open(link)


def test_somebody_elses_root_is_refused(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (short_directory / "theirs").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(RuntimeDirectoryError, match="belongs to uid"):
        RuntimeRoot.open(short_directory / "theirs")


def test_a_file_in_the_way_is_one_sentence(short_directory: Path) -> None:
    (short_directory / "file").touch()
    with pytest.raises(
        RuntimeDirectoryError, match=r"cannot use the runtime directory .*: Not a directory; set SAMOVAR"
    ):
        RuntimeRoot.open(short_directory / "file" / "run")


def test_a_long_root_is_refused_before_anything_is_made(short_directory: Path) -> None:
    path = short_directory / ("x" * 80)
    with pytest.raises(RuntimeDirectoryError, match=r"too long.*SAMOVAR_RUNTIME_DIR"):
        RuntimeRoot.open(path)
    assert not path.exists()


def test_socket_paths_are_counted_in_bytes() -> None:
    fits = Path("/" + "x" * (MAX_SOCKET_PATH - 1))
    assert check_socket_path(fits) == fits
    with pytest.raises(RuntimeDirectoryError, match="has 108 bytes"):
        check_socket_path(Path(f"{fits}x"))
    with pytest.raises(RuntimeDirectoryError, match="bytes, at most 107"):
        check_socket_path(Path("/" + "ü" * 60))


def test_a_sandbox_directory_is_writable_for_another_uid_and_goes(root: RuntimeRoot) -> None:
    owner = root.owner_directory()
    directory = owner.sandbox_directory(SANDBOX)
    assert directory.stat().st_mode & 0o777 == 0o777
    assert owner.sandbox_ids() == [SANDBOX]
    (directory / "k-1").touch()
    directory.chmod(0o555)
    owner.remove_sandbox_directory(SANDBOX)
    owner.remove_sandbox_directory(SANDBOX)
    assert owner.sandbox_ids() == []
    owner.close()
    owner.close()
    assert not owner.path.exists()


def test_removing_a_sandbox_directory_follows_no_link(root: RuntimeRoot, short_directory: Path) -> None:
    kept = short_directory / "kept"
    kept.mkdir()
    (kept / "file").touch()
    owner = root.owner_directory()
    (owner.sandbox_directory(SANDBOX) / "sup").symlink_to(kept)
    owner.remove_sandbox_directory(SANDBOX)
    (owner.path / SANDBOX).symlink_to(kept)
    owner.remove_sandbox_directory(SANDBOX)
    assert (kept / "file").exists()
    owner.close()
    assert not owner.path.exists()


@pytest.mark.parametrize("sandbox_id", ["", "..", "../../etc", SANDBOX.upper(), SANDBOX + "0"])
def test_only_sandbox_ids_become_paths(root: RuntimeRoot, sandbox_id: str) -> None:
    owner = root.owner_directory()
    with pytest.raises(ValueError, match="16 hexadecimal digits"):
        owner.sandbox_directory(sandbox_id)
    owner.close()


def test_a_living_owner_is_not_dead(root: RuntimeRoot, other_process: tuple[Path, subprocess.Popen[str]]) -> None:
    path, _ = other_process
    own = root.owner_directory()
    assert root.dead_owners() == []
    assert OwnerDirectory.take_over(path) is None
    own.close()
    assert path.exists()


def test_a_killed_owner_is_taken_over_once(
    root: RuntimeRoot, other_process: tuple[Path, subprocess.Popen[str]]
) -> None:
    path, process = other_process
    (root.links / "kernel").symlink_to(path / SANDBOX)
    (root.links / "of-another").symlink_to(root.path / "00000000" / SANDBOX)
    process.kill()
    process.wait()
    (dead,) = root.dead_owners()
    assert (dead.path, dead.read_kind()) == (path, "test")
    assert root.dead_owners() == [], "its lock is ours now"
    root.remove_links_into(dead)
    dead.close()
    assert not path.exists()
    assert [link.name for link in root.links.iterdir()] == ["of-another"]


def test_an_owner_that_cannot_be_seen_is_left_alone(short_directory: Path, root: RuntimeRoot) -> None:
    assert OwnerDirectory.take_over(short_directory / "deadbeef") is None
    # One that has no lock is nobody's owner directory, whatever a label may say.
    unrelated = short_directory / "00000000"
    unrelated.mkdir()
    assert OwnerDirectory.take_over(unrelated) is None
    assert OwnerDirectory.take_over(root.path) is None
    (short_directory / "11111111").symlink_to(unrelated)
    assert OwnerDirectory.take_over(short_directory / "11111111") is None


def test_whether_an_owner_lives_can_be_asked_without_touching_it(root: RuntimeRoot) -> None:
    owner = root.owner_directory()
    assert owner_lives(owner.path)
    owner.release()
    assert not owner_lives(owner.path)
    [dead] = root.dead_owners()
    assert dead.path == owner.path, "asking has not taken it"
    dead.close()
    assert not owner_lives(root.path / "0" / "gone")


def test_what_gateways_launched_with_is_known_until_they_are_continued_or_gone(root: RuntimeRoot) -> None:
    provisioner, gateway = root.owner_directory(), root.owner_directory()
    provisioner.write_kind("process")
    gateway.mark_gateway()
    assert root.gateway_kinds() == []
    gateway.write_kind("docker engine")
    gateway.release()
    assert root.gateway_kinds() == ["docker engine"]
    provisioner.close()


def test_damaged_notes_are_nobodys(root: RuntimeRoot) -> None:
    gateway = root.owner_directory()
    for name in ("role", "kind"):
        (gateway.path / name).write_bytes(b"\xff\0")
    assert not gateway.is_gateways and gateway.read_kind() != "process"
    assert root.gateway_kinds() == []
    gateway.close()


def test_an_owner_that_died_before_it_had_a_lock_is_dead(root: RuntimeRoot) -> None:
    (root.path / "22222222").mkdir()
    (dead,) = root.dead_owners()
    assert dead.read_kind() is None
    dead.close()
    assert not (root.path / "22222222").exists()


def test_a_dead_gateway_waits_for_its_successor_only(
    root: RuntimeRoot, other_process: tuple[Path, subprocess.Popen[str]]
) -> None:
    path, process = other_process
    (path / "role").write_text("gateway")
    process.kill()
    process.wait()
    assert root.dead_owners() == []
    assert OwnerDirectory.take_over(path) is None
    (dead,) = root.dead_owners(gateways=True)
    assert dead.path == path and dead.is_gateways
    dead.continue_as_gateway()
    assert not (path / "dead").exists()
    dead.release()
    # Once it has been known to be dead for long enough, nobody waits any more.
    assert root.dead_owners() == []
    os.utime(path / "dead", (0, 0))
    (dead,) = root.dead_owners()
    dead.close()
    assert not path.exists()
