"""Building kernel images on the real engine: only what changed is built, and a failure says where."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from gateway.cli import images as command
from kernelprovisioner.build_error import BuildError
from kernelprovisioner.image_builder import ImageBuilder
from kernelprovisioner.images import LABEL_IMAGE, KernelImage, read_image

pytestmark = pytest.mark.service

NAME = "built-by-a-test"
DOCKERFILE = "ARG BASE\nFROM ${BASE}\nCOPY note.txt /note.txt\n"


class Building:
    """One small kernel image on the base that stands in the engine, and what its builds reported."""

    def __init__(self, client: docker.DockerClient, directory: Path, base: str) -> None:
        self.client = client
        self.folder = directory / NAME
        self.folder.mkdir()
        self.write("image.toml", f'language = "python"\ndisplay_name = "Test"\nbase = "{base}"\n')
        self.write("Dockerfile", DOCKERFILE)
        self.write("note.txt", "one\n")
        self.reported: list[str] = []
        self.builder = ImageBuilder(client, directory, self.reported.append)

    @property
    def image(self) -> KernelImage:
        return read_image(self.folder)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)


@pytest.fixture
def building(docker_url: str, kernel_image: str, tmp_path: Path) -> Iterator[Building]:
    client = docker.DockerClient(base_url=docker_url)
    yield Building(client, tmp_path, f"samovar/{kernel_image}:latest")
    for left in client.images.list(filters={"label": f"{LABEL_IMAGE}={NAME}"}):
        client.images.remove(left.id, force=True)
    client.close()


def test_only_what_changed_is_built(building: Building) -> None:
    builder = building.builder
    assert builder.built(building.image) is None
    first = builder.build(building.image)
    assert first.built
    again = builder.build(building.image)
    assert (again.built, again.image_id) == (False, first.image_id)
    assert again.seconds < 2
    building.write("note.txt", "two\n")
    before = builder.built(building.image)
    assert before is not None and not before.current
    changed = builder.build(building.image)
    assert changed.built and changed.image_id != first.image_id
    listed = building.client.images.list(filters={"label": f"{LABEL_IMAGE}={NAME}"})
    assert [image.id for image in listed] == [changed.image_id], "the image that was replaced is still there"


def test_a_failing_step_is_named_with_its_last_output(building: Building) -> None:
    building.write("Dockerfile", DOCKERFILE + "USER root\nRUN echo almost there && exit 3\n")
    with pytest.raises(BuildError, match=r"(?s)Step 5/\d+: RUN .*failed: almost there.*What to do: .*Dockerfile"):
        building.builder.build(building.image)
    assert building.builder.built(building.image) is None


def test_a_build_has_no_network(building: Building) -> None:
    code = "import socket; print([name for _, name in socket.if_nameindex()])"
    building.write("Dockerfile", DOCKERFILE + f'RUN ["python3", "-c", "{code}; raise SystemExit(1)"]\n')
    with pytest.raises(BuildError, match=r"\['lo'\]"):
        building.builder.build(building.image)


def test_the_shipped_image_is_verified_and_listed(
    docker_url: str, kernel_image: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DOCKER_BASE_URL", docker_url)
    assert command.main(["verify", kernel_image]) == 0
    assert "FAILED" not in capsys.readouterr().out
    assert command.main(["list"]) == 0
    assert kernel_image in capsys.readouterr().out
