"""ContainerMaker: makes one owner's containers in one engine; every call blocks."""

from __future__ import annotations

import os
import secrets
from dataclasses import replace

from kernelprovisioner.images import LABEL_IMAGE, LABEL_TEMPLATE, KernelImage, seccomp_profile
from kernelprovisioner.launchers.base import Endpoint, Launched, LaunchError, LaunchRequest
from kernelprovisioner.launchers.configurable import CHANNELS, ipc_endpoints, runtime_errors_as_launch_errors
from kernelprovisioner.launchers.container_spec import (
    LABEL_BOOT,
    LABEL_MANAGED,
    LABEL_MANAGED_ALIAS,
    LABEL_OWNER,
    LABEL_SANDBOX,
    TCP_PORTS,
    WORK_DIRECTORY,
    ContainerSpec,
    mount_group,
)
from kernelprovisioner.launchers.docker_engine import Engine, boot_label
from kernelprovisioner.runtime import OwnerDirectory


class ContainerMaker:
    """What all containers of one owner have in common, and how one is made. Raises ENGINE_ERRORS where it asks."""

    def __init__(self, engine: Engine, owner: OwnerDirectory, transport: str) -> None:
        self._engine = engine
        self._owner = owner
        self._transport = transport
        #: the bridge that the containers of a `tcp` launcher are on
        self.network = f"samovar-{owner.name}" if transport == "tcp" else None

    def prepare(self) -> None:
        """Make the network, where one is needed."""
        if self.network is not None:
            self._engine.ensure_network(self.network, self._labels())

    def make(self, request: LaunchRequest) -> Launched:
        """Start the container. Raises LaunchError, ImageError; what was half made is then the caller's to remove."""
        image, sandbox_id = request.image, request.sandbox_id
        image_id = self._engine.image(image.tag, image.name)
        mount = None if request.mount is None else request.mount.resolve()
        with runtime_errors_as_launch_errors():
            directory = self._owner.sandbox_directory(sandbox_id)
        spec = replace(
            self._plain_spec(image, image_id),
            sandbox_id=sandbox_id,
            directory=directory,
            key=secrets.token_hex(32),
            token=secrets.token_hex(32),
            mount=mount,
            mount_gid=None if mount is None else mount_group(mount),
        )
        template = self._engine.template(spec)
        own_labels = {LABEL_IMAGE: image.name, LABEL_SANDBOX: sandbox_id, LABEL_TEMPLATE: template}
        container_id = self._engine.start_container(replace(spec, labels=self._labels() | own_labels))
        channels, supervisor = self._endpoints(spec, container_id)
        return Launched(
            sandbox_id=sandbox_id,
            image=image,
            runtime_id=container_id,
            directory=directory,
            work_directory=WORK_DIRECTORY,
            key=spec.key.encode(),
            token=spec.token,
            supervisor=supervisor,
            channels=channels,
            transport=self._transport,
            template=template,
        )

    def template(self, image: KernelImage) -> str:
        """Return the template that a container would have now. Raises LaunchError, ImageError."""
        return self._engine.template(self._plain_spec(image, self._engine.image(image.tag, image.name)))

    def _plain_spec(self, image: KernelImage, image_id: str) -> ContainerSpec:
        """Return what all sandboxes of an image have in common."""
        return ContainerSpec(
            sandbox_id="",
            image=image,
            image_id=image_id,
            labels={},
            directory=self._owner.path,
            key="",
            token="",
            host_uid=os.geteuid(),
            host_cpus=self._engine.cpus,
            transport=self._transport,
            network=self.network,
            seccomp=seccomp_profile(),
        )

    def _labels(self) -> dict[str, str]:
        labels = {LABEL_MANAGED: "true", LABEL_MANAGED_ALIAS: "true", LABEL_OWNER: str(self._owner.path)}
        boot = boot_label()
        return labels if boot is None else labels | {LABEL_BOOT: boot}

    def _endpoints(self, spec: ContainerSpec, container_id: str) -> tuple[dict[str, Endpoint], Endpoint]:
        if self._transport == "ipc":
            with runtime_errors_as_launch_errors():
                return ipc_endpoints(spec.directory)
        ports = self._engine.published_ports(container_id)
        try:
            found = {name: Endpoint(host="127.0.0.1", port=ports[inner]) for name, inner in TCP_PORTS.items()}
        except KeyError:
            raise LaunchError("the engine has published no ports for the sandbox; it may have ended at once") from None
        return {name: found[name] for name in CHANNELS}, found["supervisor"]
