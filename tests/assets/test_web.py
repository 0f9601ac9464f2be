"""`oapl ui` before it becomes Dagster: which runs it shows, and what it refuses."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from asset_world import REPOSITORY

from assets.instance import prepare_home
from assets.web import locations, open_first_rounds, write_workspace
from pipeline.layout import Run
from pipeline.recipe import load_recipe
from pipeline.runs import open_run

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
        words = ["-m", "assets.web", "--root", str(tmp_path), "--port", str(taken.getsockname()[1])]
        refused = subprocess.run(
            [sys.executable, *words], cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True
        )
    assert refused.returncode == 2
    assert refused.stderr.startswith("oapl: --port") and refused.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
