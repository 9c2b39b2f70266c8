"""The services that tests and benchmarks need: an own container engine and the kernel images in it.

`python -m tests.services COMMAND …` starts them with visible progress, runs the command with
SAMOVAR_TEST_DOCKER_URL set, stops what it started and passes the command's exit code on.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import docker

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
URL_VARIABLE = "SAMOVAR_TEST_DOCKER_URL"
LABEL = "com.samovar.managed=true"

ENGINE_PROGRAMS = {
    "dockerd": "docker.io",
    "containerd": "containerd",
    "runc": "runc",
    "iptables": "iptables",
    "mmdebstrap": "mmdebstrap",
}
BROWSER_PROGRAM = "chromium"
START_TIMEOUT = 60.0
STOP_TIMEOUT = 30.0


class ServiceMissing(Exception):
    """A service cannot be had on this machine; the text says what is missing."""


def in_ci() -> bool:
    """Return whether this is a CI run, where a skipped service test is a failure."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def say(text: str) -> None:
    """Show one line of progress."""
    print(f"[services] {text}", file=sys.stderr, flush=True)


def answers(url: str) -> bool:
    """Return whether a container engine answers at `url`."""
    try:
        client = docker.DockerClient(base_url=url, timeout=10)
    except docker.errors.DockerException:
        return False
    try:
        return bool(client.ping())
    except (docker.errors.DockerException, OSError):
        return False
    finally:
        client.close()


def install_programs(programs: Mapping[str, str], what: str, instead: str) -> None:
    """Install the packages of those programs that are missing. Raises ServiceMissing where that is not possible.

    `what` they are together, and what a person could do `instead`, stand in its text.
    """
    missing = [package for program, package in programs.items() if shutil.which(program, path=_path()) is None]
    if not missing:
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise ServiceMissing(
            f"no {what}: {', '.join(missing)} not installed, and installing them needs root and apt-get. {instead}"
        )
    say(f"installing {' '.join(missing)}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update", "-q"], ["install", "-y", "-q", "--no-install-recommends", *missing]):
        result = subprocess.run(
            ["apt-get", *arguments], env=environment, stdout=subprocess.PIPE, check=False, text=True
        )
        if result.returncode != 0:
            raise ServiceMissing(f"apt-get {arguments[0]} failed:\n{result.stdout[-2000:]}")


def chromium() -> str:
    """Return the path of a browser for tests, installed where it is missing. Raises ServiceMissing."""
    for program in (BROWSER_PROGRAM, "chromium-browser", "google-chrome"):
        if found := shutil.which(program):
            return found
    install_programs({BROWSER_PROGRAM: BROWSER_PROGRAM}, "browser", "Install Chromium or Chrome.")
    found = shutil.which(BROWSER_PROGRAM)
    if found is None:
        raise ServiceMissing(f"the package {BROWSER_PROGRAM} has no program of that name here")
    return found


def node_modules(project: Path) -> Path:
    """Install what a folder's package-lock.json says into .cache, once for each; return the directory of the modules.

    Nothing of it runs at installation. Raises ServiceMissing.
    """
    install_programs({"node": "nodejs", "npm": "npm"}, "Node.js", "Install Node.js 20 or newer, with npm.")
    lock = (project / "package-lock.json").read_bytes()
    target = CACHE / f"node-{hashlib.sha256(lock).hexdigest()[:16]}"
    if (target / "complete").exists():
        return target / "node_modules"
    say(f"installing the packages of {project.name}/package-lock.json")
    target.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(project / name, target)
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    result = subprocess.run(command, cwd=target, capture_output=True, check=False, text=True, timeout=600)
    if result.returncode != 0:
        raise ServiceMissing(f"npm ci failed:\n{result.stderr[-2000:]}")
    (target / "complete").touch()
    return target / "node_modules"


class Engine:
    """An own `dockerd`: its images are kept in .cache between runs, everything else ends with it.

    One with a `name` of its own may be killed and restarted: no other test uses it.
    """

    def __init__(self, name: str = "engine") -> None:
        # Socket paths are limited to 107 bytes, a checkout's path is not: what has sockets lives in a short directory.
        checkout = hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]
        self.directory = Path(tempfile.gettempdir()) / f"samovar-{name}-{checkout}"
        self.url = f"unix://{self.directory}/docker.sock"
        self._name = name
        self._lock: IO[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the engine and wait until it answers. Raises ServiceMissing with the end of its log."""
        install_programs(
            ENGINE_PROGRAMS, "container engine", f"Install them, or set {URL_VARIABLE} to an engine that tests may use."
        )
        CACHE.mkdir(exist_ok=True)
        self._lock = (CACHE / f"{self._name}.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another test run of this checkout uses the engine, waiting for it")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._end_leftover()
        _private_directory(self.directory)
        say("starting an own container engine")
        try:
            self.start_again()
        except ServiceMissing:
            self.stop()
            raise

    def start_again(self) -> None:
        """Start the program, the first time or after its end; returns when it answers. Raises ServiceMissing."""
        self._forget_containerd()
        log = CACHE / f"{self._name}.log"
        with log.open("ab" if self._process is not None else "wb") as output:
            self._process = subprocess.Popen(
                [
                    "dockerd",
                    "--iptables=false",
                    "--bridge=none",
                    f"--data-root={CACHE / self._name}",
                    f"--exec-root={self.directory / 'exec'}",
                    f"--host={self.url}",
                    f"--pidfile={self.directory / 'pid'}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | {"PATH": _path()},
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT
        while not answers(self.url):
            if self._process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-2000:]
                raise ServiceMissing(f"the container engine did not start; its log ends with:\n{tail}")
            time.sleep(0.1)

    def _forget_containerd(self) -> None:
        """Wait for the end of a killed engine's containerd; else the new engine would wait for it in vain."""
        noted = self.directory / "exec" / "containerd" / "containerd.pid"
        deadline = time.monotonic() + STOP_TIMEOUT
        with contextlib.suppress(OSError):
            program = Path("/proc") / noted.read_text() / "cmdline"
            while str(self.directory).encode() in program.read_bytes() and time.monotonic() < deadline:
                time.sleep(0.05)
        noted.unlink(missing_ok=True)

    def _end_shims(self) -> None:
        """End what a killed engine was just starting, and the next one knows nothing of."""
        address = str(self.directory / "exec").encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if address in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)

    def kill(self) -> None:
        """End the program at once, as a crash does; its containers go on until it starts again."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(STOP_TIMEOUT)

    def restart(self) -> None:
        """End the program in order and start it again, as an operator does. Raises ServiceMissing."""
        assert self._process is not None
        self._process.terminate()
        self._process.wait(STOP_TIMEOUT)
        self.start_again()

    def stop(self) -> None:
        """Remove all containers, end the engine and what it started, and reap it. Idempotent."""
        if self._process is not None:
            if self._process.returncode == -signal.SIGKILL:
                # Its containers outlived it.
                with contextlib.suppress(ServiceMissing):
                    self.start_again()
            if self._process.poll() is None:
                remove_containers(self.url)
                self._process.terminate()
                try:
                    self._process.wait(STOP_TIMEOUT)
                except subprocess.TimeoutExpired:
                    say("the container engine does not stop, killing it")
                    os.killpg(self._process.pid, signal.SIGKILL)
                    self._process.wait()
            self._process = None
            self._end_shims()
            # A killed engine's mount of its own data is never undone by the next one.
            data = str(CACHE / self._name)
            # os.path.ismount does not see a directory that is mounted on itself.
            while data in [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]:
                subprocess.run(["umount", data], check=True)
        if self.directory.exists():
            shutil.rmtree(self.directory)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _end_leftover(self) -> None:
        """End an engine whose test run was killed before it could stop it (we hold the lock, so it has no user)."""
        try:
            pid = int((self.directory / "pid").read_text())
            program = Path(f"/proc/{pid}/comm").read_text().strip()
        except (OSError, ValueError):
            return
        if program != "dockerd":
            return
        say("ending the engine that a killed test run left behind")
        remove_containers(self.url)
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.1)


def copy_image(source: str, target: str, name: str = "samovar/python:latest") -> None:
    """Bring a container image from one engine into another one, unless it has the same there already."""
    with contextlib.closing(docker.DockerClient(base_url=source, timeout=300)) as giver:
        image = giver.images.get(name)
        with contextlib.closing(docker.DockerClient(base_url=target, timeout=300)) as taker:
            with contextlib.suppress(docker.errors.ImageNotFound):
                if taker.images.get(name).id == image.id:
                    return
            say(f"copying {name} into another engine")
            taker.images.load(image.save(named=name))


def remove_containers(url: str) -> None:
    """Remove every container of the engine at `url`: only for an engine of our own."""
    client = docker.DockerClient(base_url=url, timeout=30)
    try:
        for container in client.containers.list(all=True, ignore_removed=True):
            with contextlib.suppress(docker.errors.NotFound):
                container.remove(force=True, v=True)
    except (docker.errors.DockerException, OSError) as error:
        say(f"containers could not be removed: {error}")
    finally:
        client.close()


@contextlib.contextmanager
def docker_engine() -> Iterator[str]:
    """The URL of an engine for tests: the one named by SAMOVAR_TEST_DOCKER_URL, else an own one, else the user's.

    An own one needs root. Raises ServiceMissing where none can be had.
    """
    named = os.environ.get(URL_VARIABLE)
    if named:
        if not answers(named):
            raise ServiceMissing(f"no container engine answers at {URL_VARIABLE}={named}")
        yield named
    elif os.geteuid() == 0 and sys.platform == "linux":
        engine = Engine()
        try:
            engine.start()
            yield engine.url
        finally:
            engine.stop()
    else:
        url = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
        if not answers(url):
            raise ServiceMissing(f"no container engine answers at {url}, and starting an own one needs root on Linux")
        say(f"using the container engine at {url}")
        yield url


def build_kernel_image(url: str, name: str = "python") -> None:
    """Build a kernel image in the engine at `url`, as `samovar images build` does; quick where nothing changed."""
    # Paths are absolute, so that it runs from a checkout that is not installed too.
    environment = os.environ | {
        "DOCKER_BASE_URL": url,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernel-images")]),
    }
    say(f"kernel image {name}")
    command = [
        sys.executable,
        "-c",
        "import sys; from gateway.cli import main; sys.exit(main())",
        "images",
        "build",
        name,
    ]
    result = subprocess.run(command, env=environment, cwd=ROOT, check=False)
    if result.returncode != 0:
        raise ServiceMissing(f"the kernel image {name} could not be built (exit code {result.returncode}, see above)")


def _path() -> str:
    """PATH with the directories that daemons live in, which a plain user's lacks."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _private_directory(path: Path) -> None:
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise ServiceMissing(f"{path} exists and is not a directory of ours; remove it")


def main(command: list[str]) -> int:
    """Run `command` with the services up; return its exit code."""
    # A terminated run stops its engine too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    environment = dict(os.environ)
    with contextlib.ExitStack() as stack:
        try:
            url = stack.enter_context(docker_engine())
            build_kernel_image(url)
        except ServiceMissing as missing:
            say(str(missing))
            if in_ci():
                return 1
            say("the tests that need it are skipped")
        else:
            environment[URL_VARIABLE] = url
            environment["SAMOVAR_TEST_IMAGES_BUILT"] = "1"
        process = subprocess.Popen(command, env=environment, cwd=ROOT)
        try:
            return process.wait()
        except BaseException:
            # Ctrl-C reaches the command by itself; it gets time to clean up before its engine goes.
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT)
            process.kill()
            process.wait()
            raise


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
