"""`oapl run --root s3://...`: killed on one machine, gone on with on others that have nothing but the URL."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from asset_world import QUICK_ENGINE, REPOSITORY, child_environment, write_recipe
from faulty_proxy import FaultyProxy, asked_for

from pipeline.rollouts.store import iter_batches, read_manifest
from pipeline.sharing.bring import bring
from pipeline.storage.objects import Objects

SMALL: dict[str, Any] = {
    "generation": {"samples": 4, "max_model_len": 128, "dtype": "float32"},
    "learning": {"batch_size": 8, "epochs": 1, "max_logprob_gap": 9, "max_residual_gap": 9},
    "policy": {"cold_start": {"steps": 5, "vocabulary": 448}},
    "evaluation": {"samples": 2, "ks": [1, 2]},
}


def start(recipe: Path, root: str, cache: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", "run", "--recipe", str(recipe), "--root", root, *words],
        cwd=REPOSITORY,
        env=child_environment(QUICK_ENGINE) | {"OAPL_CACHE": str(cache), "OAPL_LEASE_S": "2"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(recipe: Path, root: str, cache: Path, *words: str) -> str:
    """`oapl run` to its end, on a machine with that cache; what it said."""
    with start(recipe, root, cache, *words) as child:
        said = child.communicate(timeout=400)[1]
    assert child.returncode == 0, said[-3000:]
    return said


def kill_when(child: subprocess.Popen[str], proxy: FaultyProxy, part: str) -> None:
    """Ends all of it when it puts a file whose path has `part` in it; that file does not arrive."""
    asked: list[str] = []

    def stall(method: str, path: str) -> str | None:
        if method == "PUT" and part in path:
            asked.append(path)
            return "silence"
        return None

    proxy.fault_of = stall
    deadline = time.monotonic() + 300
    while not asked:
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()[1]
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    time.sleep(3)  # the leash ends what the stage started; a stalled request ends
    proxy.fault_of = lambda method, path: None


def summary(url: str) -> list[dict[str, Any]]:
    found = json.loads(Objects(url).read("report/summary.json"))["rounds"]
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in found]


@pytest.mark.system
def test_rounds_move_from_machine_to_machine(bucket: str, proxy: FaultyProxy, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, **SMALL)
    caches = [tmp_path / name for name in ("first", "second", "third", "fourth")]
    root, url = f"{bucket}/data", f"{bucket}/data/runs/tiny"
    place = Objects(url)

    with start(recipe, root, caches[0]) as child:
        kill_when(child, proxy, "manifest.json")  # while it generates
    assert place.names("snapshots") == [] and len(place.folders("snapshots")) == 1
    with start(recipe, root, caches[1]) as child:
        kill_when(child, proxy, "/scoring.json")  # while it sends what it judged
    assert bring(url).verdicts is None
    digest = read_manifest(f"{url}/rollouts/round=0000").digest
    with start(recipe, root, caches[2]) as child:
        kill_when(child, proxy, "model.safetensors")  # while it sends what it learned
    assert len([name for name in place.folders("snapshots") if place.sizes([f"snapshots/{name}/snapshot.json"])]) == 1

    shutil.copytree(caches[2], tmp_path / "third-again")
    said = run(recipe, root, tmp_path / "third-again")
    assert "learn: started" not in said  # it had been learned, and only waited to be sent
    for cache in caches[:3]:
        shutil.rmtree(cache)
    assert read_manifest(f"{url}/rollouts/round=0000").digest == digest  # generated once

    puts = asked_for(proxy, "PUT")
    assert "round 0000: was done before" in run(recipe, root, caches[3])
    assert [path for path in puts if not path.endswith(".lease.json")] == []
    run(recipe, root, caches[3], "--set", "rounds=2")
    run(recipe, str(tmp_path / "disk"), tmp_path / "unused", "--set", "rounds=2")
    disk = tmp_path / "disk/runs/tiny"
    there = json.loads((disk / "report/summary.json").read_text())["rounds"]
    assert summary(url) == [{name: value for name, value in one.items() if name != "seconds"} for one in there]
    for round in (0, 1):
        ids = [
            [row for batch in iter_batches(bring(run, round).rollouts, ["rollout_id"]) for row in batch[0].to_pylist()]
            for run in (url, disk)
        ]
        assert len(ids[0]) == 48 and sorted(ids[0]) == sorted(ids[1])


def materialised(url: str, cache: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[bool, str]:
    """Asset `prompt_set` of a run at a URL, on a machine with that cache; and what the failed step said."""
    from assets.prompt_set import prompt_set
    from assets.running.settings import Chosen, root_of

    monkeypatch.setenv("OAPL_CACHE", str(cache))
    root, at = root_of(url)
    chosen = Chosen(root, str(recipe), url=at)
    with dg.DagsterInstance.ephemeral() as instance:
        found = dg.materialize([prompt_set], resources={"run_folder": chosen}, instance=instance, raise_on_error=False)
    data = found.failure_data_for_node("prompt_set")
    said = data.user_failure_data.description if data is not None and data.user_failure_data is not None else ""
    return found.success, str(said)


def test_a_step_sends_what_it_made_and_brings_what_is_there(
    bucket: str, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OAPL_LEASE_S", "0.2")
    recipe = write_recipe(tmp_path, **SMALL)
    place = Objects(f"{bucket}/runs/tiny")
    proxy.fault_of = lambda method, path: "500" if method == "PUT" and "prompts.parquet" in path else None
    success, said = materialised(bucket, tmp_path / "first", recipe, monkeypatch)
    assert not success and said.startswith(f"{place.url}: ") and "\n" not in said
    assert place.names() == [".lease.json", "recipe.yaml"]
    proxy.fault_of = lambda method, path: None
    made = next((tmp_path / "first").rglob("prompts.parquet"))
    before = made.stat().st_mtime_ns
    assert materialised(bucket, tmp_path / "first", recipe, monkeypatch) == (True, "")
    assert made.stat().st_mtime_ns == before and place.read("prompts.parquet") == made.read_bytes()
    puts = asked_for(proxy, "PUT")
    assert materialised(bucket, tmp_path / "second", recipe, monkeypatch) == (True, "")
    assert not [path for path in puts if not path.endswith(".lease.json")]  # brought, not made again
    other = write_recipe(tmp_path, **SMALL, seed=7)
    success, said = materialised(bucket, tmp_path / "second", other, monkeypatch)
    assert success  # a run goes on under its own settings


@pytest.mark.parametrize(
    ("root", "code", "said"),
    [("s3://nobody/data", 1, "oapl: s3://nobody/data/runs/tiny: "), ("nonsense://x", 2, "oapl: nonsense://x/runs/t")],
)
def test_a_wrong_root_is_one_line(
    bucket: str, tmp_path: Path, root: str, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from assets import run_rounds

    monkeypatch.setattr(sys, "argv", ["run_rounds", "--root", root])
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        assert run_rounds.main() == code
    assert error.getvalue().startswith(said) and error.getvalue().count("\n") == 1


@pytest.mark.system
def test_the_ui_has_a_location_for_each_run_at_the_url(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from assets.running import web
    from assets.running.instance import prepare_home
    from assets.running.settings import root_of
    from pipeline.recipe import load_recipe
    from pipeline.runs.at_url import RemoteRun
    from pipeline.runs.open import open_run

    elsewhere = RemoteRun(bucket, "mine")
    open_run(elsewhere.run.data, load_recipe("tiny", ["name=mine", "learning.beta2=0.7"]))
    elsewhere.send_recipe()
    monkeypatch.setenv("OAPL_CACHE", str(tmp_path / "here"))
    root, url = root_of(bucket)
    web._bring_runs(bucket)
    runs = web.locations(root, "tiny", (), url)
    assert list(runs) == ["tiny", "mine"] and runs["mine"].settings().learning.beta2 == 0.7
    home = prepare_home(root)
    web.write_workspace(home, runs)
    said = subprocess.run(
        [sys.executable, "-c", SETTINGS, str(home / "locations" / "mine.py")],
        env=child_environment() | {"OAPL_CACHE": str(tmp_path / "code-server")},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert said.stdout.split() == [f"{bucket}", "0.7", "True"], said.stderr


SETTINGS = """
import runpy, sys
runpy.run_path(sys.argv[1])
from assets.rounds import CHOSEN, RECIPE
print(CHOSEN.url, RECIPE.learning.beta2, "code-server" in str(CHOSEN.root))
"""
