"""`oapl ui`: Dagster's web UI and daemon over a data folder, with one code location for each run in it."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import yaml

from assets.running.instance import open_instance, prepare_home
from assets.running.settings import DEFAULT_RUN, Chosen, partitions_name, root_of
from assets.running.supervisor import leashed
from pipeline.errors import OaplError, RequestError, WorkError
from pipeline.layout import Run, round_key
from pipeline.recipe import load_recipe

HOST = "127.0.0.1"
END_S = 20.0
"""Given to web server, daemon and the steps under way to end in order."""
INTERRUPTED = 130
OPENING = ("next_round", "nightly_retraining")
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
        root, url = root_of(arguments.root)
        home = prepare_home(root)
        if url is not None:
            _bring_runs(url)
        runs = locations(root, arguments.recipe, tuple(arguments.set), url)
        workspace = write_workspace(home, runs)
        open_first_rounds(home, runs)
        _say(f"starting Dagster over {url or root}")
        for line in what_is_there(home, runs):
            _say(line)
        _serve(home, workspace, arguments)
    except OaplError as error:
        _say(f"oapl: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone, and that be why all ends
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def what_is_there(home: Path, runs: dict[str, Chosen]) -> Iterator[str]:
    """For the terminal: the runs, and what a person turned on that opens rounds by itself."""
    made = {name: len(list(Run(run.root, name).path.glob("evaluations/round=*.parquet"))) for name, run in runs.items()}
    yield "runs: " + ", ".join(f"{name} ({count} round{'s' * (count != 1)})" for name, count in made.items())
    with open_instance(home) as instance:
        states = instance.all_instigator_state()
    on = [f"{state.name} of {state.repository_selector.location_name}" for state in states if state.is_running]
    if opening := [name for name in on if name.startswith(OPENING)]:
        yield f"rounds open by themselves: {', '.join(opening)}"


def _serve(home: Path, workspace: Path, arguments: argparse.Namespace) -> None:
    """Runs Dagster's web server and daemon until a signal ends them. Raises WorkError where they end by themselves.

    They are in a session of their own, so that they hear of a Ctrl-C once, and go where this process is killed.
    """
    address, log = f"http://{HOST}:{arguments.port}", home / "ui.log"
    if log.exists():
        log.replace(home / "ui.before.log")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a shell starts background jobs with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    # Dagster's own next tool is no part of this project.
    command = [sys.executable, "-P", "-W", "ignore:Function `dev_command`", "-m", "dagster", "dev"]
    command += ["--workspace", str(workspace), "--host", HOST, "--port", str(arguments.port)]
    command += ["--log-level", arguments.log_level]
    with log.open("wb") as file, leashed(command, _environment(home), file) as dagster:
        try:
            while dagster.poll() is None and not _answers(address):
                time.sleep(0.3)
            if dagster.poll() is None:
                _say(f"{address} is up; Dagster's own words go to {log}")
                _say("Ctrl-C ends it, and what it works on")
            code = dagster.wait()
        except KeyboardInterrupt:
            _say("ending Dagster")
            _end(dagster)
            return
    raise WorkError(f"Dagster ended by itself, with status {code}; the reason is in {log}")


def _environment(home: Path) -> dict[str, str]:
    """What Dagster's processes are told beside what this one was.

    While it loads a code location, Dagster drops the first entry of Python's path, which it takes for a script's
    folder. There is none, since the path is safe; so that nothing else goes, Dagster's home stands first, where the
    location's own working directory comes again anyway.
    """
    path = os.pathsep.join(filter(None, [str(home), os.environ.get("PYTHONPATH")]))
    return {"DAGSTER_HOME": str(home), "PYTHONPATH": path}


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/server_info", timeout=5):
            return True
    except OSError:
        return False  # not yet


def _end(dagster: subprocess.Popen[str]) -> None:
    """What a terminal's Ctrl-C does: an interrupt for all of the session. The leash ends what makes light of it."""
    # It may be gone already; or somebody does not want to wait.
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(dagster.pid, signal.SIGINT)
        dagster.wait(END_S)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m assets.running.web", description=__doc__)
    parser.add_argument("--port", type=int, default=3000)
    parser.add_argument("--root", default="data", help="a folder or a URL")
    parser.add_argument("--recipe", default=DEFAULT_RUN)
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE")
    parser.add_argument("--log-level", default="warning")
    return parser.parse_args()


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise RequestError(f"--port {port}: {error.strerror}; give another") from None


def _bring_runs(url: str) -> None:
    from pipeline.runs.at_url import RemoteRun, runs_at

    for name in runs_at(url):
        RemoteRun(url, name).bring()


def locations(root: Path, recipe: str, overrides: tuple[str, ...], url: str | None = None) -> dict[str, Chosen]:
    """The recipe that was asked for, and every run that lies in the data folder, by name.

    Raises RequestError where the asked-for recipe is wrong, or is not what its run began with.
    """
    asked = load_recipe(recipe, overrides)
    place = Path(recipe).absolute() if Path(recipe).suffix in (".yaml", ".yml") else recipe
    found = {asked.name: Chosen(root, str(place), overrides, url)}
    for file in sorted((root / "runs").glob("*/recipe.yaml")):
        if file.parent.name != asked.name or not overrides:
            found[file.parent.name] = Chosen(root, str(Run(root, file.parent.name).recipe), url=url)
    return found


def open_first_rounds(home: Path, runs: dict[str, Chosen]) -> None:
    """Makes round 0 a partition of each run, so that it can be launched; a round that is done opens the next."""
    with open_instance(home) as instance:
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
