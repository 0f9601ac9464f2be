"""A completion of 32 K tokens on one rank, and shared by two: `python -m benchmarks.learner.long_sequences`.

A random policy learns from completions of so many random tokens, each alone in its pass, by the ordinary command: with
one rank, and with `ranks=2, sequence_parallel=2`. Peak resident memory is a rank's, above that of the same command on
completions of 64 tokens; loss and gradient norm should agree.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.learner.parts import random_policy, random_rollouts
from pipeline.recipe import ColdStart

SHORT, PROMPTS, SAMPLES = 64, 1, 2


SHAPE = ColdStart(vocabulary=300, hidden=128, layers=2, heads=4, kv_heads=2, head_dim=32, mlp=512)


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
        policy = random_policy(folder / "policy", SHAPE, tokens + 1024)
        for length in (SHORT, tokens):
            random_rollouts(folder / f"rollouts-{length}", policy, [length] * PROMPTS * SAMPLES, SAMPLES)
        print("ranks   MiB a rank   seconds          loss     grad norm")
        for ranks in (1, 2):
            before, _, _ = learn(folder, policy, folder / f"rollouts-{SHORT}", ranks, SHORT)
            peak, seconds, log = learn(folder, policy, folder / f"rollouts-{tokens}", ranks, tokens)
            print(f"{ranks:5} {peak - before:12,.0f} {seconds:9.0f} {log['loss']:13.6f} {log['grad_norm']:13.6f}")


if __name__ == "__main__":
    main()
