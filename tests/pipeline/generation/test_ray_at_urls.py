"""A Ray cluster of two nodes whose policy, prompts and rollouts lie in a real S3-compatible store."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from ray_parts import two_nodes

from pipeline.rollouts.store import iter_batches, read_manifest
from pipeline.sharing.bring import bring
from pipeline.storage.objects import Objects

pytestmark = pytest.mark.system

Oapl = Callable[..., "subprocess.CompletedProcess[str]"]
SAME = ["rollout_id", "prompt_id", "sample", "seed", "prompt_tokens"]


@pytest.fixture(scope="module")
def cluster(s3: str) -> Iterator[Any]:
    """Its nodes know the credentials from where they were started, as machines do."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret")):
            patch.setenv(f"AWS_{name}", value)
        with two_nodes() as nodes:
            patch.setenv("AWS_ENDPOINT_URL", s3)
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            yield nodes


def test_two_replicas_write_to_the_store_what_one_engine_writes_to_a_disk(
    cluster: Any, tmp_path: Path, random_policy: Path, oapl: Oapl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OAPL_CACHE", str(tmp_path / "cache"))
    root = "s3://bucket/on-ray"
    lines = [{"task": "math", "prompt": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(12)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    store = Objects(root)
    for path in [tmp_path / "prompts.jsonl", *(path for path in random_policy.iterdir() if path.is_file())]:
        store.send(path, path.name if path.suffix == ".jsonl" else f"policy/{path.name}")
    changes = ("dtype=float32", "max_model_len=128", "enforce_eager=true", "max_num_seqs=8", "max_tokens=12")
    words = [word for change in changes for word in ("--set", f"generation.{change}")] + ["--samples", "4"]

    def generate(policy: str | Path, prompts: str | Path, out: str | Path, engine: str) -> None:
        places = ("--policy", policy, "--prompts", prompts, "--out", out)
        done = oapl("generate", *places, *words, "--set", f"generation.engine={engine}")
        assert done.returncode == 0, done.stderr
        assert "48 completions in 12 groups" in done.stdout

    generate(random_policy, tmp_path / "prompts.jsonl", tmp_path / "here", "local")
    generate(f"{root}/policy", f"{root}/prompts.jsonl", f"{root}/rollouts", "ray")
    there = pl.concat([pl.from_arrow(batch) for batch in iter_batches(bring(f"{root}/rollouts").rollouts)])  # type: ignore[type-var]
    here = pl.read_parquet(tmp_path / "here" / "part-*.parquet")
    assert there.sort("rollout_id").select(SAME).equals(here.sort("rollout_id").select(SAME))  # type: ignore[union-attr]
    assert len({shard.file.split("-")[2] for shard in read_manifest(f"{root}/rollouts").shards}) == 2  # two writers
    judged = oapl("verify", f"{root}/rollouts", "--set", "verification.engine=ray")
    assert judged.returncode == 0, judged.stderr
    assert "48 verdicts" in judged.stdout
    assert "scoring.json" in Objects(f"{root}/rollouts/verdicts").names()
