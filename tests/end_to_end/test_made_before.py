"""A run and a dataset that an earlier tree made (see tests/fixtures): read, checked, learned from, gone on with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from asset_world import QUICK_ENGINE, child_environment
from persons_folder import persons_folder

from pipeline.policies import snapshots
from pipeline.rollouts.store import read_manifest

MADE = Path(__file__).parents[1] / "fixtures" / "made-before" / "runs" / "small"
Oapl = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return shutil.copytree(MADE, tmp_path / "data" / "runs" / "small")


@pytest.mark.parametrize("place", ["", "datasets/round=0000"])
def test_it_is_inspected_and_sound(oapl: Oapl, run: Path, place: str) -> None:
    numbers = json.loads(oapl("rollouts", "inspect", run / place, "--json").stdout)
    assert (numbers["rows"], numbers["groups"], numbers["statuses"]["correct"]) == (128, 16, 7)
    recorded = json.loads((MADE / "rollouts/round=0000/manifest.json").read_text())
    assert numbers["digest"] == recorded["digest"] == read_manifest(MADE / "rollouts/round=0000").digest
    policy = run / "snapshots" / recorded["provenance"]["snapshot_id"]
    sound = oapl("rollouts", "validate", run / place, "--tokenizer", policy)
    assert sound.returncode == 0 and "sound; 128 rollouts" in sound.stdout, sound.stderr
    assert "texts too" in sound.stdout
    for snapshot in ("000000-0da5a966", "000016-865b37cd"):
        assert snapshots.verify(run / "snapshots" / snapshot).snapshot_id == snapshot


def test_it_comes_in_again(oapl: Oapl, run: Path, tmp_path: Path) -> None:
    done = oapl("rollouts", "import", run / "datasets/round=0000", "--out", tmp_path / "in")
    assert done.returncode == 0 and "128 rollouts, verified" in done.stdout, done.stderr


def test_its_dataset_is_learned_from_as_its_round_was(oapl: Oapl, run: Path, tmp_path: Path) -> None:
    """The last step's loss is the one that was logged then, rounding apart."""
    policy, out = run / "snapshots" / "000000-0da5a966", tmp_path / "out"
    words = ["--rollouts", run / "datasets/round=0000", "--policy", policy, "--recipe", run / "recipe.yaml"]
    done = oapl("train", *words, "--out", out)
    assert done.returncode == 0, done.stderr
    (made,) = out.glob("0*")
    assert made.name.startswith("000016-")
    logs = MADE / "learning/round=0000.jsonl", out / "learning.jsonl"
    before, after = (json.loads(log.read_text().splitlines()[-1]) for log in logs)
    assert [after[name] for name in ("step", "tokens", "lag")] == [before[name] for name in ("step", "tokens", "lag")]
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-3)


def test_learning_goes_on_from_its_snapshot_and_moments(oapl: Oapl, run: Path) -> None:
    policy, moments = run / "snapshots" / "000016-865b37cd", run / "snapshots" / ".optimizer"
    assert [path.name for path in moments.iterdir()] == [policy.name]
    words = ["--rollouts", run, "--policy", policy, "--behaviour-policy", run / "snapshots" / "000000-0da5a966"]
    done = oapl("train", *words, "--out", run / "snapshots", "--recipe", run / "recipe.yaml")
    assert done.returncode == 0, done.stderr
    (made,) = (run / "snapshots").glob("000032-*")
    assert snapshots.verify(made).parent == policy.name
    assert made.name in {path.name for path in moments.iterdir()}


def test_it_is_gone_on_with(run: Path) -> None:
    words = ["--recipe", str(run / "recipe.yaml"), "--root", str(run.parents[1]), "--set", "rounds=2"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pipeline.cli", "run", *words],
        cwd=persons_folder(),
        env=child_environment(QUICK_ENGINE),
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = done.stderr
    assert "round 0000: was done before" in said, said
    # The engine's stand-in makes six random tokens, so that all answers are wrong: the round ends where it should.
    assert done.returncode == 1 and "oapl: verdicts failed its check reward_spread" in said, said
    manifest = read_manifest(run / "rollouts/round=0001")
    assert (manifest.rows, manifest.provenance.snapshot_id) == (128, "000016-865b37cd")
