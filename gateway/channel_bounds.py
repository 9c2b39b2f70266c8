"""ChannelBounds: bounds on the websockets of one kernel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ChannelBounds:
    """`reconnect_window` in seconds, the others in bytes, and a number of websockets; see JupyterSettings."""

    reconnect_window: float = 600.0
    max_message: int = 64 * 1024 * 1024
    cell_stream: int = 64 * 1024 * 1024
    max_websockets: int = 250
    compression: bool = False
