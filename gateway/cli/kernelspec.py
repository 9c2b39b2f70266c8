"""`samovar kernelspec install`: makes the `sandbox` kernel known to Jupyter."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from gateway.errors import ExitCode
from kernelprovisioner.kernelspecs import install


def main(argv: Sequence[str]) -> int:
    """Install the kernelspec; print where."""
    parser = argparse.ArgumentParser(prog="samovar kernelspec", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    installing = commands.add_parser("install", help="install the kernelspec `sandbox`")
    where = installing.add_mutually_exclusive_group()
    where.add_argument("--sys-prefix", action="store_true", help="for this Python environment (the default)")
    where.add_argument("--user", action="store_true", help="for this user")
    where.add_argument("--prefix", help="below this directory")
    arguments = parser.parse_args(argv)
    try:
        directory = install(user=arguments.user, prefix=arguments.prefix)
    except OSError as error:
        print(f"samovar kernelspec: the kernelspec cannot be installed: {error}; try --user.", file=sys.stderr)
        return int(ExitCode.UNWRITABLE)
    print(f"The kernel 'sandbox' is installed in {directory}.")
    return 0
