"""A completion of 32 K tokens on one rank, and shared by two: `python -m benchmarks.learner.long_sequences`.

A random policy learns from completions of so many random tokens, each alone in its pass, by the ordinary command: with
one rank, and with `ranks=2, sequence_parallel=2`. Peak resident memory is a rank's, above that of the same command on
completions of 64 tokens; loss and gradient norm should agree.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.policies import snapshots
from pipeline.recipe import ColdStart
from pipeline.rollouts.schema import VERDICTS, Rollout, rollout_id
from pipeline.rollouts.store import Provenance, RolloutWriter
from trainer.policy import make_model, make_tokenizer

SHORT, PROMPTS, SAMPLES = 64, 1, 2


def policy_of(folder: Path, tokens: int) -> Path:
    """A random Qwen3 that has places for so many tokens."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer([f"compute {a} + {b} = {a + b}" for a in range(30) for b in range(5)], 300)
    model = make_model(
        ColdStart(vocabulary=300, hidden=128, layers=2, heads=4, kv_heads=2, head_dim=32, mlp=512), tokenizer
    )
    model.config.max_position_embeddings = tokens + 1024

    def fill(place: Path) -> None:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)

    record = snapshots.publish(folder, fill, parent=None, round=None, step=0, recipe_sha256=None)
    return folder / record.snapshot_id


def rollouts_of(folder: Path, policy: Path, tokens: int) -> None:
    """Groups of completions of so many random tokens, without log-probabilities, and verdicts for them."""
    record, dice = snapshots.load_record(policy), random.Random(0)
    origin = Provenance(
        snapshot_id=record.snapshot_id, snapshot_sha256=record.sha256, snapshot_step=0, round=0,
        sampling={"samples": SAMPLES, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": tokens},
        logprobs_mode="missing", engine="none", engine_version="0", tokenizer_sha256=record.tokenizer_sha256,
        chat_template_sha256=record.chat_template_sha256, code_version="0", prompts_sha256="",
    )  # fmt: skip
    verdicts = []
    with RolloutWriter(folder, origin, samples=SAMPLES) as writer:
        for number in range(PROMPTS):
            name, prompt = f"{number:016x}", [dice.randrange(3, 250) for _ in range(8)]
            group = []
            for sample in range(SAMPLES):
                row = rollout_id(record.snapshot_id, 0, name, sample, sample)
                completion = [dice.randrange(3, 250) for _ in range(tokens)]
                group.append(
                    Rollout(row, 0, record.snapshot_id, 0, name, sample, prompt, completion, None, "", "stop", sample)
                )
                told: dict[str, Any] = {"rollout_id": row, "verifier": "drawn", "verifier_version": "1"}
                told |= {"status": ("correct", "wrong")[sample % 2], "reward": float(sample % 2 == 0), "detail": ""}
                verdicts.append(told | {"wall_ms": 0.0, "isolation": "none"})
            writer.add_group(group)
    (folder / "verdicts").mkdir()
    pq.write_table(pa.Table.from_pylist(verdicts, VERDICTS), folder / "verdicts" / "drawn-1.parquet")


def learn(folder: Path, policy: Path, rollouts: Path, ranks: int, tokens: int) -> tuple[float, float, dict[str, float]]:
    """(peak MiB of the largest rank, seconds, the one step's log)."""
    out = folder / f"out-{ranks}-{tokens}"
    out.mkdir()
    recipe = out / "recipe.yaml"
    settings = {
        "batch_size": PROMPTS * SAMPLES, "epochs": 1, "learning_rate": 1e-4, "behaviour": "recomputed",
        "dtype": "float32", "activation_checkpointing": False, "attention": "sdpa",
        "ranks": ranks, "sequence_parallel": ranks,
        "micro_batch_tokens": (tokens + 64) // ranks,
    }  # fmt: skip
    recipe.write_text(json.dumps({"name": "long", "policy": {"model": str(policy)}, "learning": settings}))
    words = ["--recipe", recipe, "--rollouts", rollouts, "--policy", policy, "--out", out]
    began, peak = time.perf_counter(), 0
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    command = [sys.executable, "-m", "trainer", *map(str, words)]
    with (out / "output").open("w") as output:
        child = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        while child.poll() is None:
            peak = max(peak, *map(_resident, [child.pid, *_below(child.pid)]))
            time.sleep(0.05)
    if child.returncode:
        sys.exit((out / "output").read_text())
    (log,) = (json.loads(line) for line in (out / "learning.jsonl").read_text().splitlines())
    return peak / 2**20, time.perf_counter() - began, log


def _below(process: int) -> list[int]:
    return [child.pid for child in psutil.Process(process).children(recursive=True)]


def _resident(process: int) -> int:
    try:
        return int(psutil.Process(process).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0  # it has just ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768)
    tokens = parser.parse_args().tokens
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.2f}; completions of {tokens:,} tokens")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = policy_of(folder / "policy", tokens)
        for length in (SHORT, tokens):
            rollouts_of(folder / f"rollouts-{length}", policy, length)
        print("ranks   MiB a rank   seconds          loss     grad norm")
        for ranks in (1, 2):
            before, _, _ = learn(folder, policy, folder / f"rollouts-{SHORT}", ranks, SHORT)
            peak, seconds, log = learn(folder, policy, folder / f"rollouts-{tokens}", ranks, tokens)
            print(f"{ranks:5} {peak - before:12,.0f} {seconds:9.0f} {log['loss']:13.6f} {log['grad_norm']:13.6f}")


if __name__ == "__main__":
    main()
