"""`oapl ui` before it becomes Dagster: which runs it shows, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import psutil
import pytest
from asset_world import REPOSITORY, World, child_environment, write_recipe
from dagster_site import Site, wait_for
from persons_folder import persons_folder

from assets.running.instance import prepare_home
from assets.running.web import locations, open_first_rounds, what_is_there, write_workspace
from pipeline.layout import Run
from pipeline.recipe import load_recipe
from pipeline.runs.open import open_run

LOAD = """
import json, runpy, sys
defs = runpy.run_path(sys.argv[1])["defs"]
job = defs.resolve_job_def("whole_round")
keys = sorted("/".join(key.path) for key in job.asset_layer.selected_asset_keys)
print(json.dumps([keys, job.partitions_def.name]))
"""


def loaded(module: Path) -> tuple[list[str], str]:
    """Asset keys and partitions of a location, read in a process of its own as Dagster does."""
    words = [sys.executable, "-c", LOAD, str(module)]
    said = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    keys, name = json.loads(said.stdout)
    return keys, name


def test_each_run_is_a_location_of_its_own(tmp_path: Path) -> None:
    run = open_run(tmp_path, load_recipe("tiny", ["name=mine", "learning.beta2=0.7"]))
    home = prepare_home(tmp_path)
    runs = locations(tmp_path, "tiny", ())
    assert list(runs) == ["tiny", "mine"] and runs["mine"].recipe == str(run.recipe)
    write_workspace(home, runs)
    open_first_rounds(home, runs)
    plain, below = loaded(home / "locations" / "tiny.py"), loaded(home / "locations" / "mine.py")
    assert "rollouts" in plain[0] and plain[1] == "rounds" and len(plain[0]) == 7
    assert below == ([f"mine/{key}" for key in plain[0]], "rounds_mine")


def test_a_run_goes_on_under_its_own_settings(tmp_path: Path) -> None:
    open_run(tmp_path, load_recipe("tiny", ["learning.beta2=0.7"]))
    (run,) = locations(tmp_path, "tiny", ()).values()
    assert run.settings().learning.beta2 == 0.7
    assert run.open()[0] == Run(tmp_path, "tiny")


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = ["-m", "assets.running.web", "--root", str(tmp_path), "--port", str(taken.getsockname()[1])]
        refused = subprocess.run(
            [sys.executable, *words], cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True
        )
    assert refused.returncode == 2
    assert refused.stderr.startswith("oapl: --port") and refused.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def below(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@contextmanager
def started(root: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """`oapl ui` in a shell's background, once it is up, and what it said until then."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-P", "-m", "pipeline.cli", "ui", "--root", str(root), "--port", str(port), *words]
    ignoring = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *command]
    process = subprocess.Popen(
        ignoring, cwd=persons_folder(), env=child_environment(), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = []
    try:
        for line in process.stderr:
            said.append(line.rstrip())
            if line.startswith("Ctrl-C"):
                break
        yield process, said
    finally:
        process.kill()
        process.communicate()


def test_the_terminal_says_where_it_is_and_how_it_ends(tmp_path: Path) -> None:
    root = tmp_path / "data"
    with started(root) as (process, said):
        assert said[:2] == [f"starting Dagster over {root}", "runs: tiny (0 rounds)"]
        log = root / "dagster" / "ui.log"
        assert re.fullmatch(rf"http://127.0.0.1:\d+ is up; Dagster's own words go to {log}", said[2])
        assert said[3:] == ["Ctrl-C ends it, and what it works on"] and log.exists()
        family = below(process)
        assert len(family) > 3  # the leash, Dagster, its web server, daemon, and code server
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=40)[1] == "ending Dagster\n"
        assert process.returncode == 0
        assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("module", ["assets.running.web", "assets.run_rounds"])
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("max_concurrent_runs: 4", "max_concurrent_runs: many", 'max_concurrent_runs. Value "many"'),
        ("sqlite:", "postgres:", "postgres"),
        ("telemetry:", "telemetry: ]", "while parsing"),
    ],
)
def test_a_spoilt_instance_file_is_one_line(tmp_path: Path, module: str, old: str, new: str, said: str) -> None:
    file = prepare_home(tmp_path) / "dagster.yaml"
    file.write_text(file.read_text().replace(old, new))
    refused = subprocess.run(
        [sys.executable, "-m", module, "--root", str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    line = refused.stderr.splitlines()[-1]
    assert line.startswith(f"oapl: {file}: ") and said in line


def test_where_dagster_ends_by_itself_the_log_is_named(tmp_path: Path) -> None:
    words = ["-m", "assets.running.web", "--root", str(tmp_path), "--port", "0", "--log-level", "loud"]
    failed = subprocess.run([sys.executable, *words], cwd=REPOSITORY, capture_output=True, text=True)
    log = tmp_path / "dagster" / "ui.log"
    assert failed.returncode == 1 and "'loud'" in log.read_text()
    assert failed.stderr.endswith(f"oapl: Dagster ended by itself, with status 2; the reason is in {log}\n")


def test_what_a_person_turned_on_is_said(tmp_path: Path) -> None:
    from dagster._core.remote_origin import RegisteredCodeLocationOrigin as Location
    from dagster._core.remote_origin import RemoteInstigatorOrigin, RemoteRepositoryOrigin
    from dagster._core.scheduler.instigation import (
        InstigatorState,
        InstigatorStatus,
        InstigatorType,
        SensorInstigatorData,
    )

    home = prepare_home(tmp_path)
    repository = RemoteRepositoryOrigin(Location("tiny"), "__repository__")
    with dg.DagsterInstance.from_config(str(home)) as instance:
        for name in ("known_rounds", "next_round"):
            origin = RemoteInstigatorOrigin(repository, name)
            data = SensorInstigatorData(min_interval=15)
            instance.add_instigator_state(
                InstigatorState(origin, InstigatorType.SENSOR, InstigatorStatus.RUNNING, data)
            )
    assert list(what_is_there(home, locations(tmp_path, "tiny", ()))) == [
        "runs: tiny (0 rounds)",
        "rounds open by themselves: next_round of tiny",
    ]


@pytest.mark.system  # a minute
def test_what_it_works_on_ends_with_it(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, policy={"cold_start": {"steps": 100_000, "vocabulary": 448}})
    root = tmp_path / "data"
    with started(root, "--recipe", str(recipe)) as (process, said):
        site = Site(said[2].split()[0], World(root, recipe, ""))
        run_id = site.launch("whole_round", "0000")
        log = root / "runs" / "tiny" / "logs" / "round=0000" / "start.log"
        wait_for(lambda: log.exists() and "cold start: " in log.read_text(), 100, "the cold start")
        family = below(process)
        assert any("trainer.cold_start" in one.cmdline() for one in family)
        process.send_signal(signal.SIGINT)
        asked = time.monotonic()
        process.communicate(timeout=60)
        assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        assert time.monotonic() - asked < 30
    with dg.DagsterInstance.from_config(str(root / "dagster")) as instance:
        run = instance.get_run_by_id(run_id)
    assert run is not None and run.is_finished, run and run.status
