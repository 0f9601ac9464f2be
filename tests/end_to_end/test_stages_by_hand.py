"""Stages run one by one from the command line, on a policy that was never trained."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from pipeline.evaluation.pass_at_k import read_evaluation
from pipeline.policies import snapshots

Oapl = Callable[..., "subprocess.CompletedProcess[str]"]
SMALL = [
    "--set=generation.dtype=float32",
    "--set=generation.max_model_len=96",
    "--set=generation.max_tokens=6",
    "--set=generation.enforce_eager=true",
    "--set=generation.max_num_seqs=32",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts whose answers an untrained policy hits now and then: any single digit is right for some."""
    folder = tmp_path_factory.mktemp("by-hand")
    tests = {"inputs": [""], "outputs": ["0"]}
    lines = [{"task": "math", "prompt": f"Say {n}", "answer": str(n)} for n in range(4)]
    lines.append({"task": "code", "prompt": "Print 0", "tests": tests})
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_generate_verify_and_evaluate(world: Path, random_policy: Path, oapl: Oapl) -> None:
    common = ["--policy", random_policy, "--prompts", world / "prompts.jsonl", *SMALL]
    made = oapl("generate", *common, "--out", world / "rollouts", "--samples", "4")
    assert made.returncode == 0, made.stderr
    judged = oapl("verify", world / "rollouts")
    assert judged.returncode == 0, judged.stderr
    assert "20 verdicts" in judged.stdout
    rollouts = pl.scan_parquet(world / "rollouts" / "part-*.parquet")
    joined = rollouts.join(pl.scan_parquet(world / "rollouts" / "verdicts" / "*.parquet"), on="rollout_id").collect()
    assert len(joined) == 20
    assert joined["reward"].null_count() == 0
    assert set(joined["verifier"]) == {"math", "code"}

    measured = oapl("evaluate", *common, "--samples", "3", "--ks", "1,3", "--out", world / "e.parquet")
    assert measured.returncode == 0, measured.stderr
    table, found = pl.read_parquet(world / "e.parquet"), read_evaluation(world / "e.parquet")
    assert table["samples"].to_list() == [3] * 5
    assert found.pass_at[1] == pytest.approx((table["correct"] / table["samples"]).mean())
    assert found.pass_at[3] == pytest.approx((table["correct"] > 0).mean())
    assert found.snapshot_id == snapshots.load_record(random_policy).snapshot_id

    again = oapl("generate", *common, "--out", world / "rollouts", "--samples", "4")
    assert again.returncode == 0, again.stderr
    assert "0 completions" in again.stdout
    assert "5 groups were there" in again.stdout


def test_nothing_to_learn_is_one_line_and_nothing_is_published(world: Path, random_policy: Path, oapl: Oapl) -> None:
    """An untrained policy never boxes an answer, so no group has variance."""
    before = sorted(random_policy.parent.iterdir())
    done = oapl("train", "--rollouts", world / "rollouts", "--policy", random_policy, "--out", world / "out")
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("oapl: ")
    assert "5 of 5 groups have no variance" in last
    assert not any(world.joinpath("out").glob("0*"))
    assert sorted(random_policy.parent.iterdir()) == before
