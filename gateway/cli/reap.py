"""`samovar reap`: remove what owners that are gone left: containers, networks, processes, directories."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from gateway.app import GatewayApp
from gateway.cli.configuration import add_option, configured
from gateway.cli.engine import engine_client
from gateway.cli.terminal import table
from gateway.errors import ExitCode, StartError
from kernelprovisioner.inventory import Inventory, Owner, take_inventory
from kernelprovisioner.launchers.docker_engine import ENGINE_ERRORS, Engine, explain
from kernelprovisioner.reaping import reap, to_be_reaped
from kernelprovisioner.runtime import RuntimeDirectoryError, RuntimeRoot, default_root

_ENGINE_SECONDS = 60.0


class ReapError(Exception):
    """Nothing could be reaped; one sentence for a person, and the exit code."""

    def __init__(self, text: str, exit_code: ExitCode) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def main(argv: Sequence[str]) -> int:
    """Remove or list what dead owners left; return the exit code: 1 where something stays."""
    parser = argparse.ArgumentParser(
        prog="samovar reap",
        description=f"{__doc__} Sandboxes of a gateway that has crashed are among them: "
        "without this, the next gateway takes them up again. What belongs to somebody who lives is never touched.",
    )
    parser.add_argument("--dry-run", action="store_true", help="only list what would be removed")
    parser.add_argument("--json", action="store_true", help="for programs")
    add_option(parser)
    arguments = parser.parse_args(argv)
    try:
        return _run(configured(arguments), dry_run=arguments.dry_run, as_json=arguments.json)
    except (StartError, ReapError) as error:
        print(f"samovar reap: {error}", file=sys.stderr)
        return int(error.exit_code)


def _run(app: GatewayApp, *, dry_run: bool, as_json: bool) -> int:
    root = app.runtime_directory or default_root(os.environ, os.geteuid())
    with engine_client(app, _ENGINE_SECONDS) as (client, problem):
        if problem is not None and app.launcher == "docker":
            raise ReapError(f"{problem}; start it, or set DOCKER_BASE_URL", ExitCode.NO_ENGINE)
        try:
            engine = None if client is None else Engine(app.docker_url, client)
            found = take_inventory(root, client)
            chosen, elsewhere = to_be_reaped(found, root, None if engine is None else engine.id)
            if dry_run:
                stays = chosen
            else:
                if root.is_dir():
                    reap(RuntimeRoot.open(root), engine)
                after = take_inventory(root, client)
                paths = {owner.path for owner in to_be_reaped(after, root, None if engine is None else engine.id)[0]}
                stays = [owner for owner in chosen if owner.path in paths]
        except RuntimeDirectoryError as error:
            raise ReapError(str(error), ExitCode.UNWRITABLE) from None
        except ENGINE_ERRORS as error:
            raise ReapError(
                f"the container engine at {app.docker_url} fails: {explain(error)}", ExitCode.NO_ENGINE
            ) from None
    outcome = {owner: "would be removed" if dry_run else "stays" if owner in stays else "removed" for owner in chosen}
    why = "another engine has its containers" if engine is not None else problem or "no engine was asked"
    outcome |= dict.fromkeys(elsewhere, f"left: {why}")
    _show(found, outcome, as_json=as_json)
    return 1 if stays and not dry_run else 0


def _show(found: Inventory, outcome: dict[Owner, str], *, as_json: bool) -> None:
    sandboxes = {owner: [one for one in found.sandboxes if one.owner == owner] for owner in outcome}
    if as_json:
        listed = [
            {
                "directory": str(owner.path),
                "gateway": owner.is_gateway,
                "sandboxes": [one.sandbox_id for one in sandboxes[owner]],
                "outcome": said,
            }
            for owner, said in outcome.items()
        ]
        print(json.dumps({"owners": listed, "problems": found.problems}, indent=2))
        return
    if not outcome:
        print("Nothing to remove: no owner that is gone left anything.")
        return
    rows = [("OWNER", "WAS", "SANDBOXES", "OUTCOME")]
    for owner, said in outcome.items():
        claimed = sum(one.state == "claimed" for one in sandboxes[owner])
        count = f"{len(sandboxes[owner])}" + (f" ({claimed} claimed)" if claimed else "")
        rows.append((str(owner.path), "a gateway" if owner.is_gateway else "a program", count, said))
    print(table(rows))
