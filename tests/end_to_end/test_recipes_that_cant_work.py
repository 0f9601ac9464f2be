"""Recipes that can't work: each told in one line by `oapl run`, and nothing is generated."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from asset_world import QUICK_ENGINE, child_environment
from learning_parts import make_policy

LIMIT_S = 120
BUSY_S = 600
"""Of a trial on a machine that others compute on, too. Two minutes are meant for one that is idle."""
QWEN = {"policy": {"model": "Qwen/Qwen3-4B-Thinking-2507"}}
LONG = {"generation": {"samples": 2, "max_tokens": 8192, "max_model_len": 16384}}
NOTHING_TO_LEARN = "oapl: verdicts failed its check reward_spread: "


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policies"), 1)


def small(policy: Path, **parts: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "policy": {"model": str(policy)},
        "prompts": {"train": "tiny", "heldout": "tiny", "per_round": 4, "heldout_count": 4},
        "generation": {"samples": 2, "max_tokens": 16, "max_model_len": 96, "dtype": "float32", "enforce_eager": True},
        "learning": {"batch_size": 8, "dtype": "float32", "micro_batch_tokens": 256, "learning_rate": 1e-4},
        "evaluation": {"samples": 2, "ks": [1, 2]},
    }
    return {name: tree.get(name, {}) | parts.get(name, {}) for name in tree}


def run(
    tree: dict[str, Any],
    folder: Path,
    *words: str,
    command: str = "run",
    quick: bool = True,
    limit: float = LIMIT_S,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": "mine"} | tree))
    return subprocess.run(
        [
            *(sys.executable, "-P", "-m", "pipeline.cli", command),
            *("--recipe", str(folder / "recipe.yaml"), "--root", str(folder / "data"), *words),
        ],
        env=child_environment(*([QUICK_ENGINE] if quick else [])) | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )


def refused(done: subprocess.CompletedProcess[str], folder: Path, code: int) -> str:
    """The one line; and nothing was sampled."""
    said = [line for line in done.stderr.splitlines() if line.startswith("oapl: ")]
    assert done.returncode == code, done.stderr
    assert len(said) == 1 and "Traceback" not in done.stderr, done.stderr
    assert not list(folder.rglob("part-*.parquet")) and not list(folder.rglob("rollouts/round=*"))
    return said[0]


@pytest.mark.parametrize(
    ("tree", "cards", "said"),
    [
        (QWEN | LONG | {"learning": {"ranks": 8}}, "4x80", "learning.ranks=8 want 8 cards, and 4 are in sight"),
        (QWEN | LONG | {"learning": {"ranks": 1}}, "1x24", "a rank takes 83.1 GiB, and 90% of a card's 24 GiB"),
        (QWEN | {"generation": LONG["generation"] | {"max_model_len": 300_000}}, "8x80", "policy knows 262,144"),
        (QWEN | {"generation": LONG["generation"] | {"tensor_parallel": 3}}, "8x80", "32 attention heads in gener"),
        (QWEN | LONG, "0", "learner's memory: 1 rank of the learner"),
    ],
)
def test_what_can_be_told_at_once(tree: dict[str, Any], cards: str, said: str, tmp_path: Path) -> None:
    line = refused(run(tree, tmp_path, OAPL_CARDS=cards, OAPL_HOST_MEMORY="32"), tmp_path, 2)
    assert said in line, line
    assert not (tmp_path / "data" / "runs").exists()  # no run was begun


def test_a_policy_that_the_learner_would_compute_wrongly(policy: Path, tmp_path: Path) -> None:
    """Only a trial shows it; a round would have been generated and judged before."""
    scaled = tmp_path / "scaled"
    shutil.copytree(policy, scaled)
    config = json.loads((scaled / "config.json").read_text())
    (scaled / "config.json").write_text(json.dumps(config | {"logits_scaling": 2.0}))
    line = refused(run(small(scaled), tmp_path, limit=BUSY_S), tmp_path, 2)
    assert "preflight learner: " in line and "its logits are scaled (logits_scaling)" in line


def test_a_recipe_that_works(policy: Path, tmp_path: Path) -> None:
    """The command of its own: the table, and what the trials took."""
    done = run(small(policy), tmp_path, command="preflight", limit=BUSY_S)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "the engine starts in" in said and "a step of the learner at 96 tokens takes" in said
    assert said.count(" fits ") >= 5 and list((tmp_path / "data").iterdir()) == []


@pytest.mark.system
def test_a_run_is_tried_once(policy: Path, tmp_path: Path) -> None:
    tree = small(policy, learning={"max_logprob_gap": 9, "drop_uniform_groups": False})
    done = run(tree, tmp_path, limit=BUSY_S)
    # A random policy is right nowhere, so that the round goes as far as its verdicts.
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(NOTHING_TO_LEARN), done.stderr
    (said,) = [line for line in done.stderr.splitlines() if "· preflight: " in line]
    assert "the engine starts in" in said and "a step of the learner at 96 tokens takes" in said
    mark = tmp_path / "data/runs/mine/preflight.json"
    told = json.loads(mark.read_text())
    assert told["trials"]["learner"]["peak_bytes"] > 0 and told["trials"]["learner"]["planned_bytes"] > 0
    before = mark.stat().st_mtime_ns
    again = run(tree, tmp_path, "--rounds", "2", limit=BUSY_S)
    assert again.returncode == 1 and again.stderr.splitlines()[-1].startswith(NOTHING_TO_LEARN), again.stderr
    assert "preflight engine: started" not in again.stderr and mark.stat().st_mtime_ns == before


@pytest.mark.system
def test_an_engine_that_starts_and_can_not_sample(policy: Path, tmp_path: Path) -> None:
    """vLLM on a CPU has no attention for heads 8 wide."""
    line = refused(run(small(policy), tmp_path, quick=False, limit=BUSY_S), tmp_path, 1)
    assert "preflight engine: vLLM starts with " in line and "can't sample" in line
