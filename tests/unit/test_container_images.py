"""ContainerImages: a container image that is missing is built, and one that cannot be is one clear refusal to start."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import docker
import pytest

from gateway import checks, container_images
from gateway.checks import check_image
from gateway.container_images import ContainerImages
from gateway.errors import ExitCode, StartError
from kernelprovisioner.build_error import BuildError
from kernelprovisioner.image_builder import BuiltImage
from kernelprovisioner.images import find_image

BUILT = BuiltImage("sha256:1", "base", "sha256:0", "t", 1, "2026-01-01T00:00:00Z", current=True)


class Builder:
    """Stands in for ImageBuilder: `there` is what the engine has, `failure` what a build raises."""

    there: BuiltImage | None = None
    failure: BuildError | None = None
    builds = 0

    def __init__(self, *_: object) -> None:
        pass

    def built(self, _: object) -> BuiltImage | None:
        return Builder.there

    def build(self, _: object) -> None:
        Builder.builds += 1
        if Builder.failure is not None:
            raise Builder.failure
        Builder.there = BUILT


class Client:
    """An engine's client; `failure` is what its connecting raises."""

    failure: Exception | None = None

    def __init__(self, **_: object) -> None:
        if Client.failure is not None:
            raise Client.failure

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def builder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("there", None), ("failure", None), ("builds", 0)):
        monkeypatch.setattr(Builder, name, value)
    for module in (container_images, checks):
        monkeypatch.setattr(module, "ImageBuilder", Builder)
    monkeypatch.setattr("docker.DockerClient", Client)


def images(reports: list[str]) -> Any:
    return ContainerImages("unix:///no.sock", Path("/nowhere"), reports.append)


async def test_a_missing_image_is_built_once_and_said_so() -> None:
    reports: list[str] = []
    await images(reports).ensure(find_image("python"))
    await images(reports).ensure(find_image("python"))
    assert Builder.builds == 1
    assert len(reports) == 1 and "is built now" in reports[0]


async def test_an_image_that_is_older_than_its_folder_serves_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Builder, "there", dataclasses.replace(BUILT, current=False))
    reports: list[str] = []
    await images(reports).ensure(find_image("python"))
    assert Builder.builds == 0
    assert "samovar images build python" in reports[0]
    found = check_image("unix:///no.sock", find_image("python"), Path("/nowhere"), 1)
    assert found.status == "degraded" and found.remedy == "run: samovar images build python"


async def test_an_image_that_cannot_be_built_keeps_the_gateway_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Builder, "failure", BuildError("fetching the wheels", "no network", "connect it"))
    with pytest.raises(
        StartError, match=r"(?s)samovar/python:latest .*fetching the wheels failed.*connect it"
    ) as caught:
        await images([]).ensure(find_image("python"))
    assert caught.value.exit_code == ExitCode.NO_INPUT
    found = check_image("unix:///no.sock", find_image("python"), Path("/nowhere"), 1)
    assert found.status == "unhealthy" and found.remedy == "run: samovar images build python"


async def test_an_engine_that_goes_away_meanwhile_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "failure", docker.errors.DockerException("connection refused"))
    with pytest.raises(StartError, match=r"unix:///no\.sock does not answer any more: connection refused") as caught:
        await images([]).ensure(find_image("python"))
    assert caught.value.exit_code == ExitCode.NO_ENGINE
