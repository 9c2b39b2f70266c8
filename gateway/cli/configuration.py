"""The configuration for subcommands that are not the gateway: read where `samovar serve` reads it."""

from __future__ import annotations

import argparse

from gateway.app import GatewayApp


def add_option(parser: argparse.ArgumentParser) -> None:
    """Let the person name a configuration file, as `samovar serve --config` does."""
    parser.add_argument(
        "--config", metavar="FILE", help="configuration file, as for samovar serve (default: samovar_config.py here)"
    )


def configured(arguments: argparse.Namespace) -> GatewayApp:
    """Return the gateway's configuration from environment and file, for a gateway that is not started.

    Raises StartError for what is wrong in it.
    """
    app = GatewayApp()
    app.configure([] if arguments.config is None else [f"--config={arguments.config}"])
    return app
