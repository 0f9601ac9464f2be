"""Judging on a real Ray cluster of two nodes, against judging on one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from persons_folder import fill
from ray_parts import two_nodes
from test_scoring import SETTINGS, Stopped, make_round, provenance, stop_after

from pipeline.errors import RequestError
from pipeline.prompts.files import make_prompt, write_prompts
from pipeline.recipe import Verification
from pipeline.rollouts.schema import Rollout
from pipeline.rollouts.store import RolloutWriter
from pipeline.scoring import score as scoring
from pipeline.scoring.canaries import CANARIES

pytestmark = pytest.mark.system
ON_RAY = Verification(engine="ray", workers=1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_nodes() as nodes:
        yield nodes


def verdicts(folder: Path) -> dict[str, pl.DataFrame]:
    return {path.name: pl.read_parquet(path).drop("wall_ms") for path in sorted(folder.glob("*.parquet"))}


def test_the_same_verdicts_as_on_one_machine_also_after_a_stop(cluster: Any, tmp_path: Path) -> None:
    rollouts, prompts, expected = make_round(tmp_path)
    plain = scoring.score(rollouts, prompts, tmp_path / "plain", SETTINGS)
    with pytest.raises(Stopped):
        scoring.score(rollouts, prompts, tmp_path / "ray", ON_RAY, stop_after(1))
    assert verdicts(tmp_path / "ray") == {}
    [parts] = (tmp_path / "ray").glob(".scoring-*")
    kept = {path: path.stat().st_ino for path in parts.glob("part-*.jsonl")}
    assert kept
    seen: list[tuple[int, int]] = []
    summary = scoring.score(rollouts, prompts, tmp_path / "ray", ON_RAY, lambda *counts: seen.append(counts))
    assert seen[0][0] > 16 * len(kept) - 1  # what was judged before is not judged again
    assert seen[-1] == (len(expected), len(expected))
    assert not parts.exists()
    ours, theirs = verdicts(tmp_path / "ray"), verdicts(tmp_path / "plain")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equals(theirs[name]) for name in ours)
    assert asdict(summary) == asdict(plain)
    assert (summary.canaries, summary.flipped_canaries) == (len(CANARIES), [])
    # Whoever judges, a finished judging is finished.
    assert scoring.score(rollouts, prompts, tmp_path / "ray", SETTINGS, stop_after(0)) == summary


def test_a_shard_whose_worker_dies_is_judged_again(cluster: Any, tmp_path: Path) -> None:
    prompts = [
        make_prompt("deadly:judge", [("user", f"{number}?")], answer=str(tmp_path / "killed")) for number in range(8)
    ]
    with RolloutWriter(tmp_path / "rollouts", provenance(), samples=4, shard_rows=8) as writer:
        for place, prompt in enumerate(prompts):
            writer.add_group(
                [
                    Rollout(
                        f"{place:08x}{n:08x}", 0, "start", 0, prompt.prompt_id, n, [1], [2], [-0.5], "x" * n, "stop", n
                    )
                    for n in range(4)
                ]
            )
    write_prompts(tmp_path / "prompts.parquet", prompts)
    summary = scoring.score(tmp_path / "rollouts", tmp_path / "prompts.parquet", tmp_path / "v", ON_RAY)
    assert (tmp_path / "killed").exists()
    assert (summary.rows, summary.statuses) == (32, {"correct": 16, "wrong": 16})


def test_a_rollout_without_its_prompt_is_named(cluster: Any, tmp_path: Path) -> None:
    rollouts, prompts, _ = make_round(tmp_path, prompts=4)
    write_prompts(tmp_path / "other.parquet", [make_prompt("math", [("user", "1?")], answer="1")])
    with pytest.raises(RequestError, match=r"no prompt '[0-9a-f]{16}', which a rollout answers"):
        scoring.score(rollouts, tmp_path / "other.parquet", tmp_path / "v", ON_RAY)
    with pytest.raises(RequestError, match=r"no node of the Ray cluster has 64 CPU; see verification\.workers"):
        scoring.score(rollouts, prompts, tmp_path / "v", ON_RAY.model_copy(update={"workers": 64}))


def test_workers_take_nothing_of_a_persons_folder_for_ours(tmp_path: Path) -> None:
    """On a cluster that starts with the command, at relative paths, with a verifier that lies in the folder."""
    folder = fill(tmp_path)
    (folder / "mine.py").write_text("def judge(completion, reference):\n    return completion.response == 'x'\n")
    prompt = make_prompt("mine:judge", [("user", "?")], answer="x")
    write_prompts(folder / "made" / "prompts.parquet", [prompt])
    with RolloutWriter(folder / "made", provenance(), samples=4) as writer:
        writer.add_group(
            [
                Rollout(f"{n:016x}", 0, "start", 0, prompt.prompt_id, n, [1], [2], [-0.5], "x" * n, "stop", n)
                for n in range(4)
            ]
        )
    words = ["verify", "made", "--set", "verification.engine=ray", "--set", "verification.workers=1"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pipeline.cli", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 verdicts, 1 correct, 3 wrong" in done.stdout
