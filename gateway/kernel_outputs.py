"""KernelOutputs: makes the channels of kernels; their output logs share memory and disk."""

from __future__ import annotations

from pathlib import Path

from gateway.channel_bounds import ChannelBounds
from gateway.channels import KernelChannels
from gateway.kernel_bounds import OutputBounds
from gateway.large_frames import LargeFrames
from gateway.output_budget import OutputBudget
from gateway.output_log import OutputLog


class KernelOutputs:
    """Makes channels with a log each; `close` when all of them are closed."""

    def __init__(self, bounds: OutputBounds, channel_bounds: ChannelBounds, directory: Path) -> None:
        """What memory does not hold goes to files without names in `directory`."""
        self._bounds = bounds
        self._channel_bounds = channel_bounds
        self._directory = directory
        self._large, self._incoming = LargeFrames(), LargeFrames()
        self._budget = OutputBudget(memory_bytes=bounds.all_memory, disk_bytes=bounds.all_disk)

    def channels(self) -> KernelChannels:
        """Those of a new kernel."""
        bounds = self._bounds
        log = OutputLog(self._directory, memory_bytes=bounds.memory, disk_bytes=bounds.disk, budget=self._budget)
        return KernelChannels(log, self._channel_bounds, self._large, self._incoming)

    def close(self) -> None:
        """Close every log and end the threads that write."""
        self._budget.close()
