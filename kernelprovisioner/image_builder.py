"""ImageBuilder: makes container images of kernel images, offline, and only where something changed."""

from __future__ import annotations

import contextlib
import fcntl
import io
import re
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import docker

from kernelprovisioner.base_image import find_base
from kernelprovisioner.build_error import BuildError
from kernelprovisioner.images import (
    LABEL_BASE,
    LABEL_BASE_ID,
    LABEL_IMAGE,
    LABEL_STAGE,
    LABEL_TEMPLATE,
    KernelImage,
    build_files,
    template_hash,
)
from kernelprovisioner.launchers.docker_engine import ENGINE_ERRORS, explain
from kernelprovisioner.wheels import fetch_wheels

#: Debian's and Python's names of the processors that wheels are pinned for, by the engine's name.
_MACHINES = {"amd64": ("amd64", "x86_64"), "arm64": ("arm64", "aarch64")}
#: Seconds without a word from the engine: compiling all bytecode on a busy machine takes a minute or two.
_BUILD_SILENCE = 900

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

Report = Callable[[str], None]


@dataclass(frozen=True)
class BuildResult:
    """What `ImageBuilder.build` did: the engine's image id, and whether anything had to be built."""

    image_id: str
    template: str
    base: str
    built: bool
    seconds: float
    size: int  # bytes


@dataclass(frozen=True)
class BuiltImage:
    """A kernel image's container image, as the engine has it."""

    image_id: str
    base: str
    base_id: str
    template: str
    size: int  # bytes
    created: str  # ISO 8601
    #: it was made from what the folder holds now
    current: bool


class ImageBuilder:
    """Builds kernel images in the engine behind `engine` (a docker.DockerClient).

    Wheels are kept in `data_directory`; `report` gets one line for each thing that happens. All methods block: call
    them from a thread where a loop runs.
    """

    def __init__(self, engine: Any, data_directory: Path, report: Report) -> None:
        self._engine = engine
        self._data = data_directory
        self._report = report

    def built(self, image: KernelImage) -> BuiltImage | None:
        """Return the container image that sandboxes of `image` would start from, None if there is none yet.

        Raises BuildError where the engine does not answer.
        """
        with _engine_errors("asking the engine for its images"):
            try:
                found = self._engine.images.get(image.tag)
            except docker.errors.ImageNotFound:
                return None
            labels = found.labels
            base = labels.get(LABEL_BASE, "")
            template = labels.get(LABEL_TEMPLATE, "")
            return BuiltImage(
                image_id=found.id,
                base=base,
                base_id=labels.get(LABEL_BASE_ID, ""),
                template=template,
                size=int(found.attrs["Size"]),
                created=str(found.attrs["Created"]),
                current=template == template_hash(base, build_files(image)),
            )

    def build(self, image: KernelImage, base: str | None = None) -> BuildResult:
        """Make the container image of `image`, unless what made the one in the engine is unchanged.

        `base` names the image to start from; None takes what is up to date, else image.toml's, else a bootstrapped
        one. Raises BuildError.
        """
        started = time.monotonic()
        with self._alone(image):
            before = self.built(image)
            if before is not None and before.current and base in (None, before.base) and self._base_is_same(before):
                return BuildResult(
                    before.image_id, before.template, before.base, False, time.monotonic() - started, before.size
                )
            with _engine_errors("asking the engine for its architecture"):
                architecture, machine = self._machine()
                base = find_base(self._engine, image.base, base, architecture, self._report)
                base_id = self._id_of(base)
            wheels = self._wheels(image, machine)
            # Read once: what is labelled is what was built, also if somebody edits a file meanwhile.
            files = build_files(image)
            template = template_hash(base, files)
            labels = {
                LABEL_IMAGE: image.name,
                LABEL_TEMPLATE: template,
                LABEL_BASE: base,
                LABEL_BASE_ID: base_id,
            }
            self._report(f"building {image.tag} on {base}, offline")
            with self._context(files, wheels) as context:
                self._run_build(image, context, base, labels)
            with _engine_errors("looking at the finished image"):
                after = self._engine.images.get(image.tag)
                self._remove_replaced(image)
        size = int(after.attrs["Size"])
        return BuildResult(after.id, template, base, True, time.monotonic() - started, size)

    def _base_is_same(self, before: BuiltImage) -> bool:
        """A base that was pulled or made anew under its old name makes a rebuild; one that is gone does not."""
        return self._id_of(before.base) in ("", before.base_id)

    def _id_of(self, reference: str) -> str:
        """The engine's id of an image, "" if it has none of that name."""
        try:
            return str(self._engine.images.get(reference).id)
        except docker.errors.ImageNotFound:
            return ""

    def _machine(self) -> tuple[str, str]:
        """Debian's and Python's name of the engine's processor."""
        architecture = str(self._engine.version()["Arch"])
        if architecture not in _MACHINES:
            raise BuildError(
                "choosing the wheels",
                f"the engine runs on {architecture}, and the images' packages are pinned for {', '.join(_MACHINES)}",
                "use an engine on one of these",
            )
        return _MACHINES[architecture]

    def _wheels(self, image: KernelImage, machine: str) -> Path | None:
        requirements = image.folder / "requirements.txt"
        if image.python is None or not requirements.is_file():
            return None
        return fetch_wheels(
            requirements,
            image=image.name,
            python=image.python,
            machine=machine,
            cache=self._data / "wheels",
            report=self._report,
        )

    @contextlib.contextmanager
    def _alone(self, image: KernelImage) -> Iterator[None]:
        """One build of an image at a time; a second one waits and then finds its work done."""
        path = self._data / f"build-{image.name}.lock"
        try:
            self._data.mkdir(parents=True, exist_ok=True)
            lock = path.open("w")
        except OSError as error:
            raise BuildError(
                "preparing",
                f"{path}: {error.strerror}",
                "make it writable, or set SAMOVAR_DATA_DIR to a directory that is",
            ) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._report(f"waiting for another build of {image.name}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _context(self, files: dict[str, bytes], wheels: Path | None) -> Iterator[IO[bytes]]:
        """The build context as a tar file."""
        with tempfile.TemporaryFile(prefix="samovar-context-", dir=self._data) as file:
            try:
                with tarfile.open(fileobj=file, mode="w") as archive:
                    for name, content in files.items():
                        archive.addfile(_member(name, len(content)), io.BytesIO(content))
                    for wheel in sorted(wheels.iterdir()) if wheels is not None else []:
                        with wheel.open("rb") as source:
                            archive.addfile(_member(f"wheels/{wheel.name}", wheel.stat().st_size), source)
                file.seek(0)
            except OSError as error:
                raise BuildError("packing the build context", str(error), f"check free space in {self._data}") from None
            yield file

    def _run_build(self, image: KernelImage, context: IO[bytes], base: str, labels: dict[str, str]) -> None:
        arguments = {"BASE": base} | ({"PYTHON": image.python} if image.python else {})
        step, output = "sending the build context", [""]
        with _engine_errors(f"building {image.tag}"):
            events = self._engine.api.build(
                fileobj=context,
                custom_context=True,
                tag=image.tag,
                buildargs=arguments,
                labels=labels,
                network_mode="none",
                rm=True,
                forcerm=True,
                decode=True,
                timeout=_BUILD_SILENCE,
            )
            for event in events:
                if "error" in event:
                    raise BuildError(
                        f"building {image.tag}, {step},",
                        "\n".join([*output, str(event["error"])]).strip(),
                        f"see that step in {image.folder / 'Dockerfile'}; the lines above are its last output",
                    )
                for line in _COLOUR.sub("", str(event.get("stream", ""))).splitlines():
                    if re.match(r"Step \d+/\d+ : ", line):
                        step, output = line.replace(" : ", ": ", 1), []
                        self._report(f"  {_brief(line)}")
                    elif line.strip() and not line.startswith((" ---> ", "Removing intermediate")):
                        output = [*output[-14:], line]

    def _remove_replaced(self, image: KernelImage) -> None:
        """Remove what this build replaced: untagged images of the same name, and all but the newest package stage.

        An image that a sandbox still uses stays; the next build removes it.
        """
        replaced = self._engine.images.list(filters={"dangling": True, "label": f"{LABEL_IMAGE}={image.name}"})
        stages = self._engine.images.list(filters={"dangling": True, "label": f"{LABEL_STAGE}={image.name}"})
        stages.sort(key=lambda stage: stage.attrs["Created"])
        for old in [*replaced, *stages[:-1]]:
            with contextlib.suppress(docker.errors.APIError):
                self._engine.images.remove(old.id)


def _brief(line: str) -> str:
    """A Dockerfile's step as one short line."""
    line = " ".join(line.split())
    return line if len(line) <= 100 else line[:97] + "..."


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    member.mode = 0o644
    return member


@contextlib.contextmanager
def _engine_errors(step: str) -> Iterator[None]:
    """Turn what the docker package raises into a BuildError."""
    try:
        yield
    except ENGINE_ERRORS as error:
        # An answer of the engine is about what it was asked; no answer is about the engine.
        answered = isinstance(error, docker.errors.APIError)
        advice = "correct what the engine names" if answered else "check that the engine runs (docker info)"
        raise BuildError(step, explain(error), advice) from None
