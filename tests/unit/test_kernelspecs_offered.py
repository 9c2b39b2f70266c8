"""Which kernels the gateway offers, under which names, and to pages of which origins."""

from __future__ import annotations

import dataclasses
import re

import pytest
from traitlets.config import Config

from gateway.cors import CorsPolicy
from gateway.errors import ExitCode, RequestError, StartError
from gateway.jupyter_settings import JupyterSettings
from gateway.kernelspecs import KernelSpecs
from gateway.settings import environment_config
from kernelprovisioner.images import KernelImage, read_images


@pytest.fixture
def images() -> dict[str, KernelImage]:
    """The image for Python, and one for another language."""
    python = read_images()["python"]
    return {"javascript": dataclasses.replace(python, name="javascript", language="javascript"), "python": python}


def settings(**options: object) -> JupyterSettings:
    return JupyterSettings(config=Config(JupyterSettings=options))


def test_each_image_is_offered_by_its_name_and_python_as_sandbox(images: dict[str, KernelImage]) -> None:
    specs = settings(kernel_aliases={"python3": "sandbox"}).kernel_specs(images)
    assert [(spec.name, spec.image.name) for spec in specs.list()] == [
        ("javascript", "javascript"),
        ("sandbox", "python"),
        ("python3", "python"),
    ]
    assert specs.default == "sandbox"
    assert specs.resolve(None).name == specs.resolve("").name == "sandbox"
    assert specs.resolve("python3").name == "python3", "a kernel shows the name under which it was asked for"
    with pytest.raises(RequestError, match=r"'python'.*javascript, sandbox, python3"):
        specs.resolve("python")


def test_the_default_is_one_that_is_there(images: dict[str, KernelImage]) -> None:
    assert settings(default_kernel_name="javascript").kernel_specs(images).default == "javascript"
    del images["python"]
    assert settings().kernel_specs(images).default == "javascript"
    assert KernelSpecs({}, {}).default == ""


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("kernel_aliases", {"python3": "pyton"}, r"kernel_aliases.*'pyton'"),
        ("kernel_aliases", {"python3": 3}, "kernel_aliases"),
        ("kernel_aliases", {"a/b": "sandbox"}, r"'a/b'.*letters, digits"),
        ("default_kernel_name", "pyton", r"default_kernel_name.*'pyton'"),
        ("allow_origin_pat", "(", "allow_origin_pat is no regular expression"),
    ],
)
def test_a_name_or_pattern_that_means_nothing_ends_the_start(
    images: dict[str, KernelImage], name: str, value: object, why: str
) -> None:
    with pytest.raises(StartError, match=why) as caught:
        made = settings(**{name: value})
        assert made.kernel_specs(images) and made.cors
    assert caught.value.exit_code == ExitCode.CONFIGURATION


def test_cors_options_are_those_of_jupyter_server() -> None:
    assert settings().cors == CorsPolicy()
    chosen = settings(allow_origin="*", allow_origin_pat="https://.*", allow_credentials=True).cors
    assert chosen == CorsPolicy("*", re.compile("https://.*"), True)


def test_aliases_come_from_the_environment_too() -> None:
    name = "SAMOVAR_JUPYTER_SETTINGS_KERNEL_ALIASES"
    config, _ = environment_config([JupyterSettings], {name: '{"python3": "sandbox"}'})
    assert JupyterSettings(config=config).kernel_aliases == {"python3": "sandbox"}
