"""What goes into a sandbox and what comes back: bounds, refusals, conflicts, and names that are hostile."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from kernelprovisioner import workdir
from kernelprovisioner.hostfiles import Bounds, HostDirectory
from kernelprovisioner.supervisor import SupervisorError
from kernelprovisioner.workdir import HostileName, WorkDirectory, beside, checked_name, refusal


class FakeSandbox:
    """A supervisor's files, in memory: what `WorkDirectory` asks it is what a real one is asked."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, int]] = {}
        self.clock = 1_000
        self.gets = 0
        self.full = False

    def write(self, path: str, content: bytes) -> None:
        self.clock += 1
        self.files[path] = (content, self.clock)

    async def __call__(self, op: str, body: bytes = b"", **fields: Any) -> tuple[dict[str, Any], bytes]:
        await asyncio.sleep(0)
        if op == "put":
            if self.full:
                raise SupervisorError("No space left on device")
            before = b"" if fields["offset"] == 0 else self.files[fields["path"]][0]
            self.files[fields["path"]] = (before + body, fields["mtime_ns"])
            return {}, b""
        if op == "get":
            self.gets += 1
            content, mtime_ns = self.files[fields["path"]]
            piece = content[fields["offset"] : fields["offset"] + fields["size"]]
            return {"size": len(content), "mtime_ns": mtime_ns, "eof": True}, piece
        assert op == "list"
        after = fields.get("after", "").split("/")
        names = sorted((name for name in self.files if name.split("/") > after), key=lambda name: name.split("/"))
        page = names[: fields["limit"]]
        entries = [[name, len(self.files[name][0]), self.files[name][1]] for name in page]
        return {"more": len(names) > len(page)}, json.dumps(entries).encode()


@pytest.fixture
def host(tmp_path: Path) -> Path:
    directory = tmp_path / "work"
    directory.mkdir()
    return directory


async def started(host: Path, sandbox: FakeSandbox) -> WorkDirectory:
    work = WorkDirectory(host)
    await work.plan()
    await work.put(sandbox)
    return work


def contents(host: Path) -> dict[str, bytes]:
    return {str(path.relative_to(host)): path.read_bytes() for path in host.rglob("*") if path.is_file()}


async def test_files_go_in_and_changed_ones_come_back(host: Path) -> None:
    (host / "sub").mkdir()
    (host / "data.csv").write_bytes(b"a,b\n")
    (host / "sub" / "empty.txt").write_bytes(b"")
    (host / "big.bin").write_bytes(os.urandom(3 * 1024 * 1024 + 1))
    sandbox = FakeSandbox()
    work = await started(host, sandbox)
    assert {name: content for name, (content, _) in sandbox.files.items()} == contents(host)

    sandbox.write("data.csv", b"a,b\n1,2\n")
    sandbox.write("new/plot.png", b"PNG")
    report = await work.bring_back(sandbox)
    assert sorted(report.written) == ["data.csv", "new/plot.png"]
    assert (host / "data.csv").read_bytes() == b"a,b\n1,2\n"
    assert (host / "new" / "plot.png").read_bytes() == b"PNG"

    gets = sandbox.gets
    assert (await work.bring_back(sandbox)).written == []
    assert sandbox.gets == gets, "what has not changed is not fetched again"
    work.close()


async def test_hidden_names_links_and_special_files_never_go_in(host: Path) -> None:
    (host / ".env").write_text("SECRET=1")
    (host / ".git").mkdir()
    (host / ".git" / "config").write_text("x")
    (host / "__pycache__").mkdir()
    (host / "__pycache__" / "m.pyc").write_text("x")
    (host / "link").symlink_to("/etc/passwd")
    (host / "linked").symlink_to("/etc")
    os.mkfifo(host / "pipe")
    (host / "seen.txt").write_text("x")
    sandbox = FakeSandbox()
    work = WorkDirectory(host)
    notice = await work.plan()
    await work.put(sandbox)
    work.close()
    assert list(sandbox.files) == ["seen.txt"]
    assert notice is not None and "2 links" in notice


async def test_bounds_are_told(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workdir, "INTO", Bounds(files=3, total_bytes=1000, file_bytes=500))
    for number in range(5):
        (host / f"{number}.txt").write_text("x")
    (host / "large.bin").write_bytes(bytes(501))
    sandbox = FakeSandbox()
    work = WorkDirectory(host)
    notice = await work.plan()
    await work.put(sandbox)
    work.close()
    assert len(sandbox.files) == 3
    assert notice is not None
    assert "large.bin" in notice and "2 past 3 files" in notice


async def test_a_file_that_changed_on_both_sides_is_kept_beside(host: Path) -> None:
    (host / "data.csv").write_text("old")
    sandbox = FakeSandbox()
    work = await started(host, sandbox)
    (host / "data.csv").write_text("host's")
    sandbox.write("data.csv", b"sandbox's")
    report = await work.bring_back(sandbox)
    assert report.kept_beside == {"data.csv": "data.sandbox.csv"}
    assert contents(host) == {"data.csv": b"host's", "data.sandbox.csv": b"sandbox's"}
    # Later versions go to the same place, which nobody else has touched.
    sandbox.write("data.csv", b"sandbox's second")
    await work.bring_back(sandbox)
    assert contents(host) == {"data.csv": b"host's", "data.sandbox.csv": b"sandbox's second"}
    # … and beside that one, once somebody has.
    (host / "data.sandbox.csv").write_text("edited")
    sandbox.write("data.csv", b"third")
    await work.bring_back(sandbox)
    assert contents(host) == {"data.csv": b"host's", "data.sandbox.csv": b"edited", "data.sandbox-2.csv": b"third"}
    work.close()


async def test_a_new_file_never_overwrites_one_of_the_host(host: Path) -> None:
    sandbox = FakeSandbox()
    work = await started(host, sandbox)
    (host / "out.txt").write_text("came meanwhile")
    (host / "same.txt").write_text("equal")
    sandbox.write("out.txt", b"sandbox's")
    sandbox.write("same.txt", b"equal")
    report = await work.bring_back(sandbox)
    assert report.kept_beside == {"out.txt": "out.sandbox.txt"}
    assert contents(host) == {"out.txt": b"came meanwhile", "out.sandbox.txt": b"sandbox's", "same.txt": b"equal"}
    work.close()


async def test_a_file_that_was_deleted_on_the_host_comes_back_when_it_changes(host: Path) -> None:
    (host / "data.csv").write_text("old")
    sandbox = FakeSandbox()
    work = await started(host, sandbox)
    (host / "data.csv").unlink()
    await work.bring_back(sandbox)
    assert contents(host) == {}
    sandbox.write("data.csv", b"new")
    await work.bring_back(sandbox)
    assert contents(host) == {"data.csv": b"new"}
    work.close()


HOSTILE = [
    "/etc/cron.d/x",
    "../up.txt",
    "a/../../up.txt",
    "a//b",
    "./a",
    "a/.",
    "",
    ".bashrc",
    ".git/hooks/post-commit",
    "sub/.ssh/authorized_keys",
    "nul\0byte",
    "new\nline",
    "\x1b[31mred",
    "\ud800",
    "x" * 256,
    "/".join("d" * 17),
    "a" * 2000,
    "jupyter_server_config.py",
    "sub/Jupyter_Notebook_Config.JSON",
    "sub/jupyter_server_config.d/extension.json",
    "IPython_Config.py",
    "sitecustomize.py",
    "sitecustomize.pyc",
    "sitecustomize.cpython-311-x86_64-linux-gnu.so",
    "SiteCustomize/__init__.py",
    "\u017fitecustomize.py",
    "sub/usercustomize/deeper/__init__.py",
    "venv/lib/python3.11/site-packages/run.pth",
    "venv/pyvenv.cfg",
    "-rf",
    "sub/--checkpoint-action=exec=sh x",
    " blank",
    "sub /file",
    "file ",
    "\u202egpj.py",
    7,
    None,
]


@pytest.mark.parametrize("name", HOSTILE, ids=repr)
def test_hostile_names_are_refused(name: object) -> None:
    with pytest.raises(HostileName):
        checked_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("a.txt", "a b/c d.txt", "ü/日本.csv", "a..b", "x/jupyter.txt", "a-b/c-.txt", "(1) ~draft_.md", "model.pth"),
        *("jupyter_config_notes.md", "customize.py", "my_sitecustomize.py"),
    ],
)
def test_plain_names_are_taken(name: str) -> None:
    assert checked_name(name) == tuple(name.split("/"))


async def test_hostile_names_write_nothing(host: Path) -> None:
    sandbox = FakeSandbox()
    work = await started(host, sandbox)
    for name in HOSTILE:
        if isinstance(name, str):
            sandbox.write(name, b"x")
    sandbox.write("good.txt", b"x")
    report = await work.bring_back(sandbox)
    work.close()
    assert report.written == ["good.txt"]
    assert sorted(os.listdir(host)) == ["good.txt"] and sorted(os.listdir(host.parent)) == ["work"]


async def test_no_link_of_the_host_is_followed(host: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "target.txt").write_text("untouched")
    (host / "linked").symlink_to(outside)
    (host / "file.txt").symlink_to(outside / "target.txt")
    sandbox = FakeSandbox()
    work = await started(host, sandbox)
    sandbox.write("linked/new.txt", b"x")
    sandbox.write("file.txt", b"x")
    report = await work.bring_back(sandbox)
    work.close()
    assert os.listdir(outside) == ["target.txt"] and (outside / "target.txt").read_text() == "untouched"
    assert "'linked/new.txt'" in report.refused
    assert (host / "file.txt").is_symlink()
    assert report.kept_beside == {"file.txt": "file.sandbox.txt"}


async def test_what_comes_back_is_bounded_over_the_whole_life(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workdir, "BACK", Bounds(files=3, total_bytes=100, file_bytes=50))
    sandbox = FakeSandbox()
    work = await started(host, sandbox)
    sandbox.write("huge.bin", bytes(51))
    for number in range(3):
        sandbox.write(f"{number}.bin", bytes(40))
        await work.bring_back(sandbox)
    assert sorted(contents(host)) == ["0.bin", "1.bin"]
    sandbox.write("0.bin", bytes(20))  # the same place again is no more
    report = await work.bring_back(sandbox)
    assert report.written == ["0.bin"]
    for number in range(10, 15):
        sandbox.write(f"{number}.bin", b"")
        await work.bring_back(sandbox)
    work.close()
    assert len(contents(host)) == 3


async def test_a_supervisor_that_lies_is_not_believed(host: Path) -> None:
    class Endless(FakeSandbox):
        async def __call__(self, op: str, body: bytes = b"", **fields: Any) -> tuple[dict[str, Any], bytes]:
            if op == "list":
                page = [["a", 3, 1], ["b", "x", 1], ["c"], "d", ["e", -1, 1], ["f", 1 << 60, 1], None]
                return {"more": True}, json.dumps(page).encode()
            return {"size": 3, "mtime_ns": 1}, bytes(1024 * 1024)  # never ends where it says

    work = WorkDirectory(host)
    report = await asyncio.wait_for(work.bring_back(Endless()), 5)
    work.close()
    assert report.written == [] and os.listdir(host) == []


class Liar(FakeSandbox):
    """A supervisor that lists whatever it is told to, and whose files are never what it says."""

    def __init__(self, *pages: list[Any]) -> None:
        super().__init__()
        self.pages = list(pages)
        self.served = b"not what was listed"

    async def __call__(self, op: str, body: bytes = b"", **fields: Any) -> tuple[dict[str, Any], bytes]:
        if op == "list":
            page = self.pages.pop(0) if self.pages else []
            return {"more": bool(self.pages)}, json.dumps(page).encode()
        self.gets += 1
        return {"size": 3, "mtime_ns": 1}, self.served


def entries_below(*directories: str) -> list[Any]:
    return [[f"{directory}/f", 3, 1] for directory in directories]


async def test_no_directory_is_made_for_a_file_that_does_not_come(host: Path) -> None:
    work = WorkDirectory(host)
    deep = [f"d{number:02}/" + "/".join("x" * 14) for number in range(20)]
    report = await work.bring_back(Liar(entries_below(*deep)))
    work.close()
    assert report.written == [] and report.failed == 20
    assert os.listdir(host) == []


async def test_directories_count_like_files(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workdir, "BACK", Bounds(files=6, total_bytes=1000, file_bytes=50))
    (host / "there").mkdir()
    sandbox = FakeSandbox()
    work = await started(host, sandbox)
    sandbox.write("a/b/c/d/e/f/g", b"too deep for what is left")
    sandbox.write("m/n/one", b"1")
    sandbox.write("m/n/two", b"2")
    sandbox.write("there/three", b"3")
    sandbox.write("x/four", b"4")
    report = await work.bring_back(sandbox)
    assert sorted(report.written) == ["m/n/one", "m/n/two", "there/three"]
    assert "6 files and directories" in report.refused["'x/four'"]
    assert sorted(path.name for path in host.rglob("*") if path.is_dir()) == ["m", "n", "there"]
    # What is removed on the host may be made again: it is still no more than that.
    shutil.rmtree(host / "m")
    sandbox.write("m/n/one", b"1 again")
    assert (await work.bring_back(sandbox)).written == ["m/n/one"]
    sandbox.write("five", b"5")
    sandbox.write("six", b"6")
    assert (await work.bring_back(sandbox)).written == ["five"]
    work.close()


async def test_directories_stay_charged_when_their_file_has_no_place(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workdir, "BACK", Bounds(files=9, total_bytes=1000, file_bytes=50))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    sandbox = FakeSandbox()
    work = await started(host, sandbox)
    for number in range(20):
        sandbox.write(f"{number}/a/b/f", b"x")
    with monkeypatch.context() as broken:
        broken.setattr(os, "link", full)
        report = await work.bring_back(sandbox)
    work.close()
    assert report.written == []
    assert len(list(host.rglob("*"))) <= 9


async def test_what_is_fetched_for_nothing_is_bounded_in_each_round(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [[f"{number:03}", 3, 1] for number in range(200)]
    work = WorkDirectory(host)
    monkeypatch.setattr(workdir, "BACK", Bounds(files=10, total_bytes=10_000, file_bytes=50))
    liar = Liar(names)
    await work.bring_back(liar)
    assert liar.gets == 10
    monkeypatch.setattr(workdir, "BACK", Bounds(files=1000, total_bytes=10_000, file_bytes=50))
    liar = Liar(names)
    liar.served = bytes(1000)
    await work.bring_back(liar)
    assert liar.gets == 10
    # the next round begins anew
    good = FakeSandbox()
    good.write("good", b"x")
    assert (await work.bring_back(good)).written == ["good"]
    work.close()


async def test_a_listing_holds_each_name_once_and_not_too_many_characters(host: Path) -> None:
    work = WorkDirectory(host)
    liar = Liar([["same", 3, number] for number in range(50)] + [["aa", 3, 1], ["z", 3, 1]], [["same", 3, 1]])
    await work.bring_back(liar)
    assert liar.gets == 2
    huge = Liar(*([[f"{number:03}" + "x" * workdir.MIB, 3, 1]] for number in range(100)))
    await work.bring_back(huge)
    work.close()
    assert len(huge.pages) > 80


async def test_what_is_remembered_of_other_names_does_not_grow(host: Path) -> None:
    work = WorkDirectory(host)
    for number in range(5):
        await work.bring_back(Liar([[f".hidden-{number}-{file}", 3, 1] for file in range(10)]))
    assert len(work._seen) == 10
    work.close()


async def test_a_listing_of_many_pages_loses_no_name(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workdir, "_PAGE", 1)
    sandbox = FakeSandbox()
    for name in ("a/x", "a/y", "a.txt", "b"):  # a walk's order; as strings, `a.txt` would come first
        sandbox.write(name, b"x")
    work = WorkDirectory(host)
    assert (await work.bring_back(sandbox)).written == ["a/x", "a/y", "a.txt", "b"]
    work.close()


async def test_a_full_sandbox_is_told(host: Path) -> None:
    (host / "a.txt").write_text("x")
    sandbox = FakeSandbox()
    sandbox.full = True
    work = WorkDirectory(host)
    await work.plan()
    with pytest.raises(SupervisorError, match="No space left"):
        await work.put(sandbox)
    work.close()


async def test_a_cancelled_round_leaves_no_temporary_file(host: Path) -> None:
    class Slow(FakeSandbox):
        async def __call__(self, op: str, body: bytes = b"", **fields: Any) -> tuple[dict[str, Any], bytes]:
            if op == "get":
                await asyncio.sleep(60)
            return await super().__call__(op, body, **fields)

    sandbox = Slow()
    sandbox.write("a.txt", b"x")
    work = WorkDirectory(host)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(work.bring_back(sandbox), 0.2)
    work.close()
    assert os.listdir(host) == []


def test_a_file_keeps_its_mode_and_new_ones_are_not_executable(host: Path) -> None:
    (host / "run.sh").write_text("x")
    (host / "run.sh").chmod(0o750)

    async def check() -> None:
        sandbox = FakeSandbox()
        work = await started(host, sandbox)
        sandbox.write("run.sh", b"changed")
        sandbox.write("new.sh", b"new")
        await work.bring_back(sandbox)
        work.close()

    asyncio.run(check())
    assert (host / "run.sh").stat().st_mode & 0o777 == 0o750
    assert not (host / "new.sh").stat().st_mode & 0o111


@pytest.mark.parametrize("path", ["/", "/etc", "/etc/ssh", "/tmp", "/home", "/proc/self", "/usr/lib"])
def test_directories_of_the_machine_are_refused(path: str) -> None:
    assert refusal(Path(path), Path("/home/ada")) is not None


def test_the_home_directory_and_what_is_hidden_in_it_are_refused(tmp_path: Path) -> None:
    home = tmp_path / "people" / "ada"
    (home / ".ssh").mkdir(parents=True)
    (home / "notebooks" / ".hidden").mkdir(parents=True)
    assert "home directory" in str(refusal(home, home))
    assert "contains" in str(refusal(home.parent, home))
    assert "hidden" in str(refusal(home / ".ssh", home))
    assert "hidden" in str(refusal(home / "notebooks" / ".hidden", home))
    assert refusal(home / "notebooks", home) is None
    assert refusal(tmp_path / "elsewhere", home) is None
    (tmp_path / "way-home").symlink_to(home)
    assert refusal(tmp_path / "way-home", home) is not None


def test_names_beside() -> None:
    assert beside("a/b.tar.gz", 1) == "a/b.tar.sandbox.gz"
    assert beside("noext", 2) == "noext.sandbox-2"


def test_a_search_is_bounded_in_depth_and_entries(host: Path) -> None:
    deep = host
    for _ in range(5):
        deep = deep / "d"
        deep.mkdir()
        (deep / "f").write_text("x")
    directory = HostDirectory(host)
    try:
        assert len(directory.scan(Bounds(100, 100, 100, depth=3)).files) == 2
        assert directory.scan(Bounds(100, 100, 100, depth=3)).incomplete
        assert directory.scan(Bounds(100, 100, 100, looked_at=4)).incomplete
        assert len(directory.scan(Bounds(100, 100, 100)).files) == 5
    finally:
        directory.close()
