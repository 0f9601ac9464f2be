"""`oapl ui`: Dagster's web UI and daemon over a data folder, with one code location for each run in it."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

import yaml

from assets.instance import prepare_home
from assets.settings import DEFAULT_RUN, Chosen, partitions_name
from pipeline.errors import OaplError, RequestError
from pipeline.layout import Run, round_key
from pipeline.recipe import load_recipe

HOST = "127.0.0.1"
LOCATION = """\
# Written by `oapl ui`: the code location of one run.
import os

os.environ.update({environment!r})

from assets.definitions import defs as defs
"""


def main() -> int:
    arguments = _arguments()
    try:
        _require_free(arguments.port)
        root = arguments.root.absolute()
        home = prepare_home(root)
        runs = locations(root, arguments.recipe, tuple(arguments.set))
        workspace = write_workspace(home, runs)
        open_first_rounds(home, runs)
    except OaplError as error:
        sys.stderr.write(f"oapl: {error}\n")
        return error.exit_code
    return _become_dagster(home, workspace, arguments)


def _become_dagster(home: Path, workspace: Path, arguments: argparse.Namespace) -> NoReturn:
    """Replaces this process, so that a signal to `oapl ui` reaches Dagster, which ends all that it started."""
    os.environ["DAGSTER_HOME"] = str(home)
    # A shell starts background jobs with interrupts ignored; a run of Dagster is cancelled by one.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stderr.write(f"Dagster's UI: http://{HOST}:{arguments.port} (Ctrl-C ends it)\n")
    sys.stderr.flush()
    # Dagster's own next tool is no part of this project.
    words = ["-W", "ignore:Function `dev_command`"]
    words += ["-m", "dagster", "dev", "--workspace", str(workspace), "--host", HOST, "--port", str(arguments.port)]
    os.execv(sys.executable, [sys.executable, *words, "--log-level", arguments.log_level])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m assets.web", description=__doc__)
    parser.add_argument("--port", type=int, default=3000)
    parser.add_argument("--root", type=Path, default=Path("data"))
    parser.add_argument("--recipe", default=DEFAULT_RUN)
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE")
    parser.add_argument("--log-level", default="error")
    return parser.parse_args()


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise RequestError(f"--port {port}: {error.strerror}; give another") from None


def locations(root: Path, recipe: str, overrides: tuple[str, ...]) -> dict[str, Chosen]:
    """The recipe that was asked for, and every run that lies in the data folder, by name.

    Raises RequestError where the asked-for recipe is wrong, or is not what its run began with.
    """
    asked = load_recipe(recipe, overrides)
    place = Path(recipe).absolute() if Path(recipe).suffix in (".yaml", ".yml") else recipe
    found = {asked.name: Chosen(root, str(place), overrides)}
    for file in sorted((root / "runs").glob("*/recipe.yaml")):
        if file.parent.name != asked.name or not overrides:
            found[file.parent.name] = Chosen(root, str(Run(root, file.parent.name).recipe))
    return found


def open_first_rounds(home: Path, runs: dict[str, Chosen]) -> None:
    """Makes round 0 a partition of each run, so that it can be launched; a round that is done opens the next."""
    import dagster as dg

    with dg.DagsterInstance.from_config(str(home)) as instance:
        for name in runs:
            if not instance.get_dynamic_partitions(partitions_name(name)):
                instance.add_dynamic_partitions(partitions_name(name), [round_key(0)])


def write_workspace(home: Path, runs: dict[str, Chosen]) -> Path:
    """A workspace file for Dagster below its home, and a module for each run; returns the former.

    A module sets its run's environment before it loads the definitions: Dagster gives a location no variables.
    """
    folder = home / "locations"
    folder.mkdir(exist_ok=True)
    entries = []
    for name, run in runs.items():
        module = folder / f"{name}.py"
        module.write_text(LOCATION.format(environment=run.environment()), encoding="utf-8")
        entries.append({"python_file": {"relative_path": str(module), "location_name": name, "attribute": "defs"}})
    workspace = home / "workspace.yaml"
    workspace.write_text(yaml.safe_dump({"load_from": entries}), encoding="utf-8")
    return workspace


if __name__ == "__main__":
    sys.exit(main())
