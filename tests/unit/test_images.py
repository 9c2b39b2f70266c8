"""image.toml: what it means, and how mistakes are told; the template hash; pip's arguments; the seccomp profile."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gateway.cli import images as command
from kernelprovisioner import images as images_module
from kernelprovisioner import wheels as wheels_module
from kernelprovisioner.base_image import BOOTSTRAPPED, find_base
from kernelprovisioner.build_error import BuildError
from kernelprovisioner.images import (
    ImageError,
    Limits,
    PoolBounds,
    build_files,
    find_image,
    kernel_images_folder,
    read_image,
    read_images,
    template_hash,
)
from kernelprovisioner.wheels import fetch_wheels, pip_arguments

SMALL = 'language = "python"\ndisplay_name = "Small"\nbase = "base:1"\n'


def folder(tmp_path: Path, text: str = SMALL, name: str = "small") -> Path:
    path = tmp_path / name
    path.mkdir()
    (path / "image.toml").write_text(text)
    return path


def test_the_shipped_image_is_valid() -> None:
    image = read_images()["python"]
    assert image.tag == "samovar/python:latest"
    assert image.preload == ("numpy", "pandas", "matplotlib.pyplot")
    assert image.python == "3.11"
    assert image.limits.container_memory_mb == 512 + 256 + 64 + 64


def test_what_is_not_said_has_a_default(tmp_path: Path) -> None:
    image = read_image(folder(tmp_path))
    assert (image.limits, image.pool, image.preload, image.environment) == (Limits(), PoolBounds(), (), {})
    assert image.environment_allow == ("*",)


def test_everything_can_be_said(tmp_path: Path) -> None:
    text = SMALL + (
        'python = "3.12"\npreload = ["a.b"]\nlimits = {cpus = 2, pids = 9}\npool.min = 0\npool.max = 1\n'
        '[environment]\nallow = ["API_URL"]\n[environment.set]\nTZ = "UTC"\n'
    )
    image = read_image(folder(tmp_path, text))
    assert (image.python, image.preload, image.limits.cpus, image.limits.pids) == ("3.12", ("a.b",), 2, 9)
    assert image.pool == PoolBounds(0, 1)
    assert (image.environment, image.environment_allow) == ({"TZ": "UTC"}, ("API_URL",))


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (SMALL + "[limits]\nmemory_md = 512\n", 5, "limits.memory_md is not a known key; did you mean 'memory_mb'?"),
        (SMALL + "zzz = 1\n", 4, "zzz is not a known key; known here: base, "),
        (SMALL + '[limits]\n\nmemory_mb = "lots"\n', 6, "must be a whole number from 64 to 1,048,576, not 'lots'"),
        (SMALL + "[limits]\npids = 1.5\n", 5, "limits.pids must be a whole number"),
        (SMALL + "[limits]\npids = true\n", 5, "limits.pids must be a whole number"),
        (SMALL + "[limits]\ncpus = nan\n", 5, "limits.cpus must be a number from 0.05 to 1,024, not nan"),
        (SMALL + "limits = {cpus = 0}\n", 4, "limits.cpus must be a number"),
        (SMALL + "limits.cpus = 0\n", 4, "limits.cpus must be a number"),
        (SMALL + "limits = 3\n", 4, "limits must be a table"),
        (SMALL + "[pool]\nmin = 5\nmax = 2\n", 5, "pool.min must not be above pool.max (2), not 5"),
        (SMALL + 'preload = ["os; x"]\n', 4, "preload must hold only texts that are a module's name, not 'os; x'"),
        (SMALL + 'preload = "os"\n', 4, "preload must be a list of texts, not 'os'"),
        (SMALL + 'python = "3"\n', 4, "python must be a version"),
        (SMALL + '[environment]\nallow = ["A B"]\n', 5, "environment.allow must hold only"),
        (SMALL + "[environment.set]\nA = 1\n", 5, "environment.set.A must be a text, not 1"),
        (SMALL + "[pool\n", 4, "not valid TOML"),
        ('language = ""\n', 1, "language must be a text of one line, not empty"),
        ('language = "python"\nbase = "b"\n', 1, "display_name is missing"),
        (SMALL + 'language = "x"\n', 4, "not valid TOML: Cannot overwrite a value"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    path = folder(tmp_path, text)
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path / 'image.toml'}:{line}: ")
    assert said in str(caught.value)


def test_a_missing_file_and_a_bad_name_are_told(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="cannot be read"):
        read_image(tmp_path / "absent")
    with pytest.raises(ImageError, match="named with lower-case letters"):
        read_image(folder(tmp_path, name="Bad_Name"))
    with pytest.raises(ImageError, match=r"there is no kernel image '\.\./x' in .*; there are: python"):
        find_image("../x")


def test_wheels_need_a_python(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "requirements.txt").write_text("")
    with pytest.raises(ImageError, match="python is missing"):
        read_image(path)


def test_the_template_hash_covers_all_that_makes_the_image(tmp_path: Path) -> None:
    shutil.copytree(kernel_images_folder() / "python", tmp_path / "python")
    image = read_image(tmp_path / "python")

    def current() -> str:
        return template_hash("base:1", build_files(image))

    before = current()
    assert template_hash("base:2", build_files(image)) != before
    names = build_files(image)
    assert {"Dockerfile", "image.toml", "requirements.txt", "samovar_kernel/frames.py"} <= names.keys()
    for name in ("Dockerfile", "image.toml", "requirements.txt", "install.sh"):
        path = tmp_path / "python" / name
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        assert current() != before, name
        path.write_bytes(content)
    for name in ("README.md", "verify.py", "__pycache__/x.pyc", ".hidden"):
        path = tmp_path / "python" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"changed")
        assert current() == before, name


def test_the_template_hash_tells_names_from_contents() -> None:
    assert template_hash("b", {"a": b"xy", "c": b""}) != template_hash("b", {"a": b"x", "yc": b""})


def test_a_change_of_samovar_kernel_changes_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = find_image("python")
    before = template_hash("b", build_files(image))
    shutil.copytree(images_module.samovar_kernel_folder(), tmp_path / "samovar_kernel")
    monkeypatch.setattr(images_module, "samovar_kernel_folder", lambda: tmp_path / "samovar_kernel")
    assert template_hash("b", build_files(image)) == before
    (tmp_path / "samovar_kernel" / "frames.py").write_text("# other\n")
    assert template_hash("b", build_files(image)) != before


def test_every_pin_has_hashes_and_no_registry_is_named() -> None:
    text = (kernel_images_folder() / "python" / "requirements.txt").read_text()
    pins = [line for line in text.splitlines() if line and not line.startswith(("#", " "))]
    assert len(pins) > 50
    assert all(" \\" in pin and "==" in pin for pin in pins)
    assert "://" not in text
    assert "--index" not in text


def test_pip_is_told_to_take_nothing_but_pinned_wheels(tmp_path: Path) -> None:
    arguments = pip_arguments(tmp_path / "r.txt", tmp_path / "w", "3.12", "aarch64")
    assert {"--require-hashes", "--no-deps", "--only-binary=:all:", "--abi=cp312"} <= set(arguments)
    assert "--platform=manylinux_2_36_aarch64" in arguments
    assert not any("x86_64" in argument for argument in arguments)


def test_a_set_of_wheels_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(requirements: Path, target: Path, *rest: object) -> None:
        asked.append(requirements.read_text())
        (target / "a.whl").write_bytes(b"")

    monkeypatch.setattr(wheels_module, "_download", download)
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("a==1 \\\n  --hash=x\n")

    def fetch() -> Path:
        return fetch_wheels(
            requirements, image="p", python="3.11", machine="x86_64", cache=tmp_path / "c", report=lambda _: None
        )

    first = fetch()
    assert (fetch(), len(asked)) == (first, 1)
    requirements.write_text("a==2 \\\n  --hash=x\n")
    second = fetch()
    assert second != first
    assert [path.name for path in (tmp_path / "c").iterdir()] == [second.name]


def test_an_interrupted_download_leaves_no_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels_module, "_download", download)
    (tmp_path / "r.txt").write_text("a==1\n")
    with pytest.raises(KeyboardInterrupt):
        fetch_wheels(
            tmp_path / "r.txt", image="p", python="3.11", machine="x86_64", cache=tmp_path / "c", report=lambda _: None
        )
    assert list((tmp_path / "c").iterdir()) == []


def test_a_failing_pip_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    (tmp_path / "r.txt").write_text("a==1\n")
    with pytest.raises(BuildError, match=r"(?s)fetching the wheels failed: .*What to do: check that pip reaches"):
        fetch_wheels(
            tmp_path / "r.txt", image="p", python="3.11", machine="x86_64", cache=tmp_path / "c", report=lambda _: None
        )
    assert list((tmp_path / "c").iterdir()) == []


class FakeEngine:
    """As much of a docker client as find_base uses."""

    def __init__(self, present: set[str], pullable: set[str]) -> None:
        self.present = present
        self.pullable = pullable
        self.pulled: list[str] = []
        self.timeout = 60
        self.images = self.api = self

    def get(self, reference: str) -> None:
        import docker

        if reference not in self.present:
            raise docker.errors.ImageNotFound(reference)

    def pull(self, repository: str, tag: str, **_: object) -> list[dict[str, str]]:
        reference = f"{repository}:{tag}"
        self.pulled.append(reference)
        if reference not in self.pullable:
            return [{"error": "no route to the registry"}]
        self.present.add(reference)
        return [{"status": "Pull complete", "id": "abc"}]


@pytest.mark.parametrize(
    ("present", "pullable", "asked", "found", "pulled"),
    [
        ({"official:1"}, set(), None, "official:1", []),
        ({"official:1", BOOTSTRAPPED}, set(), None, "official:1", []),
        ({BOOTSTRAPPED}, {"official:1"}, None, BOOTSTRAPPED, []),
        (set(), {"official:1"}, None, "official:1", ["official:1"]),
        (set(), set(), None, "made here", ["official:1"]),
        ({"mine:2", "official:1"}, set(), "mine:2", "mine:2", []),
        (set(), {"host:5000/mine:2"}, "host:5000/mine:2", "host:5000/mine:2", ["host:5000/mine:2"]),
        ({"official:1"}, set(), BOOTSTRAPPED, "made here", []),
    ],
)
def test_where_the_base_comes_from(
    monkeypatch: pytest.MonkeyPatch,
    present: set[str],
    pullable: set[str],
    asked: str | None,
    found: str,
    pulled: list[str],
) -> None:
    made: list[str] = []
    monkeypatch.setattr("kernelprovisioner.base_image._bootstrap", lambda *_: made.append(BOOTSTRAPPED))
    engine = FakeEngine(set(present), pullable)
    base = find_base(engine, "official:1", asked, "amd64", lambda _: None)
    assert base == (BOOTSTRAPPED if found == "made here" else found)
    assert made == ([BOOTSTRAPPED] if found == "made here" else [])
    assert engine.pulled == pulled
    assert engine.timeout == 60


def test_a_base_that_was_asked_for_is_never_replaced() -> None:
    with pytest.raises(BuildError, match=r"pulling the base mine:2 failed: no route to the registry"):
        find_base(FakeEngine({BOOTSTRAPPED}, set()), "official:1", "mine:2", "amd64", lambda _: None)


def test_without_mmdebstrap_the_advice_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(BuildError, match="apt-get install mmdebstrap"):
        find_base(FakeEngine(set(), set()), "official:1", None, "amd64", lambda _: None)


def test_the_seccomp_profile_denies_by_default_and_lets_no_dangerous_call_through() -> None:
    profile = json.loads((kernel_images_folder() / "seccomp.json").read_text())
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    allowed = [name for rule in profile["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]]
    unconditional = {
        name
        for rule in profile["syscalls"]
        if rule["action"] == "SCMP_ACT_ALLOW" and not rule.get("args")
        for name in rule["names"]
    }
    dangerous = (
        "ptrace mount umount2 bpf keyctl add_key request_key userfaultfd io_uring_setup unshare setns perf_event_open "
        "process_vm_readv process_vm_writev kexec_load init_module finit_module open_by_handle_at pivot_root chroot "
        "clone3 seccomp reboot"
    )
    assert not set(allowed) & set(dangerous.split())
    # These are safe only with the arguments that the profile names.
    assert not unconditional & {"clone", "socket", "socketpair", "personality", "prctl"}
    assert len(unconditional) == sum(name in unconditional for name in allowed), "a call stands there twice"


def test_the_command_tells_mistakes_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("DOCKER_BASE_URL", f"unix://{tmp_path}/no.sock")
    assert command.main(["build", "nonesuch"]) == 78
    assert "there is no kernel image 'nonesuch'" in capsys.readouterr().err
    assert command.main(["list"]) == 69
    assert "there is no such socket; start Docker, or set DOCKER_BASE_URL" in capsys.readouterr().err
