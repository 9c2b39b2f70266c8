"""JupyterSettings: traits of the Jupyter interface."""

from __future__ import annotations

import re
from collections.abc import Mapping

from traitlets import Bool, Dict, Integer, Unicode
from traitlets.config import Configurable

from gateway.channel_bounds import ChannelBounds
from gateway.cors import CorsPolicy
from gateway.culling import CullBounds
from gateway.kernel_bounds import LifeBounds, OutputBounds
from gateway.kernelspecs import KernelSpecs
from gateway.settings import bad_configuration
from kernelprovisioner.images import KernelImage
from kernelprovisioner.traits import FiniteFloat


class JupyterSettings(Configurable):
    """Kernels that Jupyter clients start by HTTP (`jupyter lab --gateway-url`, VS Code, …)."""

    cull_idle_timeout = FiniteFloat(
        0.0, min=0, help="Seconds without activity after which a kernel is shut down; 0: never."
    ).tag(config=True)
    cull_interval = FiniteFloat(300.0, min=0.1, help="Seconds between two looks for kernels to shut down.").tag(
        config=True
    )
    cull_connected = Bool(False, help="Whether a kernel with open connections is shut down, too.").tag(config=True)
    cull_busy = Bool(False, help="Whether a kernel that runs a cell is shut down, too.").tag(config=True)
    restart_limit = Integer(
        5,
        min=0,
        help="How often in a row a kernel that died is restarted by itself; the row ends with one that lives for 10 s. "
        "0: a kernel that died stays dead.",
    ).tag(config=True)

    kernel_aliases = Dict(
        help='Further names for kernels: {"python3": "sandbox"} lets notebooks of a plain JupyterLab open here.'
    ).tag(config=True)
    default_kernel_name = Unicode(
        help="The kernel that is started where none is asked for; empty: sandbox, which is Python."
    ).tag(config=True)
    allow_origin = Unicode(
        help="The origin (https://…) whose pages may call from a browser, * for any; others are refused then. Empty, "
        "and no allow_origin_pat: any that knows a token."
    ).tag(config=True)
    allow_origin_pat = Unicode(
        help="A regular expression that such origins match from end to end; without effect where allow_origin is set."
    ).tag(config=True)
    allow_credentials = Bool(False, help="Answer pages of other origins with Access-Control-Allow-Credentials.").tag(
        config=True
    )

    output_memory_mb = FiniteFloat(
        8.0, min=1, help="MiB of each kernel's newest output that are kept in memory for clients that are slow or away."
    ).tag(config=True)
    output_disk_mb = FiniteFloat(
        512.0, min=0, help="MiB of each kernel's older output that are kept on disk for them; past it the oldest goes."
    ).tag(config=True)
    all_output_memory_mb = FiniteFloat(256.0, min=1, help="The same in memory for all kernels together.").tag(
        config=True
    )
    all_output_disk_mb = FiniteFloat(4096.0, min=0, help="The same on disk for all kernels together.").tag(config=True)

    reconnect_window = FiniteFloat(
        600.0, min=0, help="Seconds that a client may be away and get what it missed when it reconnects."
    ).tag(config=True)
    max_message_mb = FiniteFloat(
        64.0, min=0.1, max=512, help="Largest message in MiB that a client may send to a kernel."
    ).tag(config=True)
    cell_stream_mb = FiniteFloat(
        64.0,
        min=0.1,
        max=1 << 20,
        help="Most text in MiB that one cell may print to notebooks; the rest is cut, and a notice says how much.",
    ).tag(config=True)
    max_websockets = Integer(250, min=1, help="Most websockets to one kernel at once.").tag(config=True)
    compression = Bool(False, help="Compress websocket messages (permessage-deflate) for clients that can.").tag(
        config=True
    )

    @property
    def channel_bounds(self) -> ChannelBounds:
        return ChannelBounds(
            self.reconnect_window,
            int(self.max_message_mb * 2**20),
            int(self.cell_stream_mb * 2**20),
            self.max_websockets,
            self.compression,
        )

    @property
    def life_bounds(self) -> LifeBounds:
        return LifeBounds(self.restart_limit)

    @property
    def cull_bounds(self) -> CullBounds:
        return CullBounds(self.cull_idle_timeout, self.cull_interval, self.cull_connected, self.cull_busy)

    @property
    def output_bounds(self) -> OutputBounds:
        of_each = int(self.output_memory_mb * 2**20), int(self.output_disk_mb * 2**20)
        return OutputBounds(*of_each, int(self.all_output_memory_mb * 2**20), int(self.all_output_disk_mb * 2**20))

    @property
    def cors(self) -> CorsPolicy:
        """Which pages may call. Raises StartError where the pattern is none."""
        try:
            pattern = re.compile(self.allow_origin_pat) if self.allow_origin_pat else None
        except re.error as error:
            raise bad_configuration(f"JupyterSettings.allow_origin_pat is no regular expression: {error}") from None
        return CorsPolicy(self.allow_origin, pattern, self.allow_credentials)

    def kernel_specs(self, images: Mapping[str, KernelImage]) -> KernelSpecs:
        """The kernels that are offered. Raises StartError for a name that means nothing."""
        return KernelSpecs(images, self.kernel_aliases, self.default_kernel_name)
