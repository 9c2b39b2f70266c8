"""ContainerImages: whether the engine has the kernel images' container images, and their building at first start."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import docker

from gateway.errors import ExitCode, StartError
from kernelprovisioner.build_error import BuildError
from kernelprovisioner.image_builder import BuiltImage, ImageBuilder
from kernelprovisioner.images import KernelImage
from kernelprovisioner.launchers.docker_engine import ENGINE_ERRORS, explain

_CALL_SECONDS = 10
T = TypeVar("T")
_log = logging.getLogger(__name__)


class ContainerImages:
    """The container images of one engine."""

    def __init__(self, docker_url: str, data_directory: Path, report: Callable[[str], None]) -> None:
        self._url = docker_url
        self._data = data_directory
        self._report = report

    async def ensure(self, image: KernelImage) -> None:
        """Build the container image if the engine does not have it. Raises StartError."""
        try:
            built = await asyncio.to_thread(self._built, image)
            if built is None:
                self._report(f"The container image {image.tag} is not there yet and is built now: a few minutes, once.")
                # An ordinary worker thread would hold up a Ctrl-C until the build has ended.
                await _in_daemon_thread(functools.partial(self._build, image))
            elif not built.current:
                self._report(
                    f"The container image {image.tag} is older than its folder; run: samovar images build {image.name}"
                )
        except BuildError as error:
            raise StartError(
                f"The container image {image.tag} is missing and cannot be built: {error}", ExitCode.NO_INPUT
            ) from None
        except ENGINE_ERRORS as error:
            raise StartError(
                f"The container engine at {self._url} does not answer any more: {explain(error)}.", ExitCode.NO_ENGINE
            ) from None

    def _built(self, image: KernelImage) -> BuiltImage | None:
        client = docker.DockerClient(base_url=self._url, timeout=_CALL_SECONDS)
        try:
            return ImageBuilder(client, self._data, self._report).built(image)
        finally:
            client.close()

    def _build(self, image: KernelImage) -> None:
        client = docker.DockerClient(base_url=self._url)
        try:
            ImageBuilder(client, self._data, self._report).build(image)
        finally:
            client.close()


async def _in_daemon_thread(work: Callable[[], T]) -> T:
    """Return what `work` returns; a caller that is cancelled leaves the thread to end with the process."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            loop.call_soon_threadsafe(settle, None, error)
        else:
            loop.call_soon_threadsafe(settle, result, None)

    threading.Thread(target=run, name="image build", daemon=True).start()
    return await future
