"""Stages run one by one at s3:// URLs, each on a machine with nothing in its cache, beside the same on a disk."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from asset_world import HERE, QUICK_ENGINE, REPOSITORY
from faulty_proxy import FaultyProxy, asked_for

from pipeline.evaluation.pass_at_k import read_evaluation
from pipeline.rollouts.store import iter_batches
from pipeline.sharing.bring import bring
from pipeline.storage.objects import Objects

Stage = Callable[..., str]
SMALL = ["--set=generation.max_model_len=96", "--set=generation.top_p=1.0", "--set=generation.dtype=float32"]
LEARN = ["batch_size=4", "ranks=2", "max_logprob_gap=1", "max_residual_gap=9", "dtype=float32", "learning_rate=1.5e-4"]

pytestmark = pytest.mark.system


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """Runs a command with an empty cache, or with the one that is named; returns what it printed."""

    def run(*words: str | Path, cache: str | None = None) -> str:
        number = len(list(tmp_path.glob("cache-*")))
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.cli", *map(str, words)],
            env=environment(tmp_path / (cache or f"cache-{number}")),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def environment(cache: Path) -> dict[str, str]:
    folders = (REPOSITORY, HERE, QUICK_ENGINE)
    cache.mkdir(exist_ok=True)
    return {**os.environ, "OAPL_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(map(str, folders))}


def write_prompts(place: Path) -> Path:
    lines = [{"task": "lenient:judge", "prompt": f"Say {n}", "answer": str(n)} for n in range(6)]
    place.write_text("\n".join(map(json.dumps, lines)))
    return place


def all_stages(stage: Stage, policy: str | Path, prompts: str | Path, out: str) -> None:
    learning = [f"--set=learning.{item}" for item in LEARN]
    common = ["--policy", policy, "--prompts", prompts, *SMALL]
    stage("generate", *common, "--out", f"{out}/rollouts", "--samples", "4", "--temperature", "1.0")
    stage("verify", f"{out}/rollouts")
    stage("train", "--rollouts", f"{out}/rollouts", "--policy", policy, "--out", f"{out}/snapshots", *learning)
    (name,) = snapshots_at(out)
    common = ["--policy", f"{out}/snapshots/{name}", *common[2:]]
    stage("evaluate", *common, "--out", f"{out}/e.parquet", "--samples", "2", "--ks", "1,2")


def snapshots_at(out: str) -> list[str]:
    """Those that exist."""
    if "://" not in out:
        return [path.parent.name for path in Path(out, "snapshots").glob("[!.]*/snapshot.json")]
    place = Objects(f"{out}/snapshots")
    return [name for name in place.folders("") if place.sizes([f"{name}/snapshot.json"])]


def test_all_stages_at_urls_give_what_they_give_on_a_disk(
    bucket: str, random_policy: Path, tmp_path: Path, stage: Stage
) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl")
    for path in random_policy.iterdir():
        Objects(f"{bucket}/policy").send(path, path.name)
    Objects(bucket).send(prompts, "p.jsonl")
    disk = str(tmp_path / "disk")
    all_stages(stage, random_policy, prompts, disk)
    all_stages(stage, f"{bucket}/policy", f"{bucket}/p.jsonl", bucket)

    columns = ["rollout_id", "completion_tokens", "logprobs"]
    rows = [
        pl.concat([pl.from_arrow(batch) for batch in iter_batches(bring(f"{out}/rollouts").rollouts, columns)])
        for out in (disk, bucket)
    ]
    assert len(rows[0]) == 24 and rows[0].sort("rollout_id").equals(rows[1].sort("rollout_id"))
    assert snapshots_at(bucket) == snapshots_at(disk) and len(snapshots_at(disk)) == 1
    Objects(bucket).fetch("e.parquet", tmp_path / "e.parquet")
    found = [read_evaluation(path) for path in (tmp_path / "e.parquet", tmp_path / "disk" / "e.parquet")]
    assert found[0].model_copy(update={"seconds": found[1].seconds}) == found[1]
    # Another round from there, on a machine that has neither the policy nor the optimizer's moments.
    for out in (disk, bucket):
        (name,) = snapshots_at(out)
        words = ["--rollouts", f"{out}/rollouts", "--policy", f"{out}/snapshots/{name}", "--out", f"{out}/snapshots"]
        stage("train", *words, *[f"--set=learning.{item}" for item in [*LEARN, "max_logprob_gap=9"]])
    assert sorted(snapshots_at(bucket)) == sorted(snapshots_at(disk)) and len(snapshots_at(disk)) == 2


def test_a_learner_killed_while_it_sends_is_gone_on_with(
    bucket: str, proxy: FaultyProxy, random_policy: Path, tmp_path: Path, stage: Stage
) -> None:
    out = f"{bucket}/snapshots"
    common = ["--policy", random_policy, "--prompts", write_prompts(tmp_path / "p.jsonl"), *SMALL]
    stage("generate", *common, "--out", f"{bucket}/rollouts", "--samples", "4", "--temperature", "1.0")
    words = ["train", "--rollouts", f"{bucket}/rollouts", "--policy", str(random_policy), "--out", out]
    words += [f"--set=learning.{item}" for item in [*LEARN, "ranks=1"]]
    asked: list[str] = []

    def stall(method: str, path: str) -> str | None:
        if method == "PUT" and "tokenizer.json" in path:
            asked.append(path)
            return "silence"
        return None

    proxy.fault_of = stall
    command = [sys.executable, "-m", "pipeline.cli", *words]
    with subprocess.Popen(command, env=environment(tmp_path / "cache"), start_new_session=True) as learner:
        deadline = time.monotonic() + 240
        while not asked:
            assert learner.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(learner.pid, signal.SIGKILL)
    time.sleep(0.5)
    there = [entry.name.rpartition("/")[2] for entry in Objects(out).tree()]
    assert "model.safetensors" in there and snapshots_at(bucket) == []
    puts = asked_for(proxy, "PUT")
    logs = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("learning.jsonl")}
    said = stage(*words, cache="cache")
    assert {path: path.stat().st_mtime_ns for path in logs} == logs and len(logs) == 1  # nothing was learned again
    (name,) = snapshots_at(bucket)
    assert f"{out}/{name}: " in said
    assert not [path for path in puts if path.endswith("model.safetensors")]


def test_ranks_that_share_no_folder_are_refused(bucket: str, random_policy: Path, tmp_path: Path, stage: Stage) -> None:
    common = ["--policy", random_policy, "--prompts", write_prompts(tmp_path / "p.jsonl"), *SMALL]
    stage("generate", *common, "--out", f"{bucket}/rollouts", "--samples", "4", "--temperature", "1.0")
    stage("verify", f"{bucket}/rollouts")
    (tmp_path / "recipe.yaml").write_text(
        f"name: apart\npolicy: {{model: .}}\nlearning: {{{', '.join(LEARN).replace('=', ': ')}}}\n"
    )
    words = ["--rollouts", f"{bucket}/rollouts", "--policy", str(random_policy), "--out", f"{bucket}/snapshots"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    joined = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "trainer", "--recipe", str(tmp_path / "recipe.yaml"), *words],
            env=environment(tmp_path / f"of-node-{rank}") | joined | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for one in ranks:
        said = one.communicate(timeout=200)[1].strip().splitlines()[-1]
        assert one.returncode == 2 and said.startswith(
            "oapl: --out is a URL and the ranks are on several machines; set"
        )
    assert snapshots_at(bucket) == []
