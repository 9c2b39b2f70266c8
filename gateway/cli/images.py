"""`samovar images`: build, list and verify the container images of the kernel images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import docker

from gateway.cli.configuration import add_option, configured
from gateway.cli.terminal import table
from gateway.errors import ExitCode, StartError
from kernelprovisioner.build_error import BuildError
from kernelprovisioner.image_builder import ImageBuilder
from kernelprovisioner.image_check import verify_image
from kernelprovisioner.images import ImageError, KernelImage, find_image, read_images
from kernelprovisioner.launchers.docker_engine import ENGINE_ERRORS, explain

_ENGINE_TIMEOUT = 60


def main(argv: Sequence[str]) -> int:
    """Run `samovar images build|list|verify`; return the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        app = configured(arguments)
        images = [find_image(arguments.name)] if arguments.name else list(read_images().values())
    except StartError as error:
        return _fail(str(error), error.exit_code)
    except ImageError as error:
        return _fail(str(error), ExitCode.CONFIGURATION)
    url = app.docker_url
    try:
        with _engine(url) as engine:
            builder = ImageBuilder(engine, app.data_directory, _say)
            command: Callable[..., int] = arguments.run
            return command(arguments, images, builder, engine)
    except BuildError as error:
        return _fail(str(error), ExitCode.FAILED)
    except ENGINE_ERRORS as error:
        sentence = f"no container engine answers at {url}: {explain(error)}; start Docker, or set DOCKER_BASE_URL"
        return _fail(sentence, ExitCode.NO_ENGINE)
    except KeyboardInterrupt:
        return _fail("interrupted; what was built so far is used again by the next build", 130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="samovar images", description=__doc__)
    add_option(parser)
    commands = parser.add_subparsers(required=True, metavar="build|list|verify")
    building = commands.add_parser("build", help="build what changed", description=_build.__doc__)
    building.add_argument("name", nargs="?", metavar="NAME", help="one kernel image; without it, all")
    building.add_argument(
        "--base", metavar="IMAGE", help="start from this image (Debian-like, with the Python that image.toml names)"
    )
    building.set_defaults(run=_build)
    listing = commands.add_parser("list", help="what there is, and whether it is built", description=_list.__doc__)
    listing.set_defaults(run=_list, name=None)
    verifying = commands.add_parser("verify", help="try everything in a sandbox", description=_verify.__doc__)
    verifying.add_argument("name", nargs="?", metavar="NAME", help="one kernel image; without it, all")
    verifying.set_defaults(run=_verify)
    return parser


def _build(arguments: argparse.Namespace, images: list[KernelImage], builder: ImageBuilder, engine: Any) -> int:
    """Build the container images of kernel images. What made them is unchanged: nothing is done."""
    for image in images:
        result = builder.build(image, arguments.base)
        done = "built" if result.built else "nothing to do, it is up to date"
        print(f"{image.tag}: {done} ({result.size / 1e6:.0f} MB, on {result.base}, {result.seconds:.1f} s)")
    return 0


def _list(arguments: argparse.Namespace, images: list[KernelImage], builder: ImageBuilder, engine: Any) -> int:
    """List the kernel images and the state of their container images."""
    rows = [("NAME", "LANGUAGE", "STATE", "SIZE", "BASE", "CREATED")]
    for image in images:
        built = builder.built(image)
        if built is None:
            rows.append((image.name, image.language, "not built", "-", "-", "-"))
        else:
            state = "up to date" if built.current else "outdated"
            size = f"{built.size / 1e6:.0f} MB"
            rows.append((image.name, image.language, state, size, built.base or "-", built.created[:19]))
    print(table(rows))
    return 0


def _verify(arguments: argparse.Namespace, images: list[KernelImage], builder: ImageBuilder, engine: Any) -> int:
    """Start a container as locked down as a sandbox, import every package in it and use the main ones."""
    failed = []
    for image in images:
        print(f"verifying {image.tag}", flush=True)
        if not verify_image(engine, image, lambda line: print(f"  {line}", flush=True)):
            failed.append(image.tag)
    if failed:
        return _fail(f"{', '.join(failed)} failed, see the lines marked FAILED; build it again", ExitCode.FAILED)
    return 0


@contextmanager
def _engine(url: str) -> Iterator[Any]:
    client = docker.DockerClient(base_url=url, timeout=_ENGINE_TIMEOUT)
    try:
        client.ping()
        yield client
    finally:
        client.close()


def _say(line: str) -> None:
    print(line, flush=True)


def _fail(text: str, code: int) -> int:
    print(f"samovar images: {text}", file=sys.stderr)
    return int(code)
