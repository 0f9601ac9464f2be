"""What it gives to read and lay out passes while others are computed: `python -m benchmarks.learner.ahead`.

Rounds of learning from the same random rollouts, with the thread that works ahead and without, in turn; the fastest
step of each place counts, over all rounds. The two must log the same losses to the last digit. Log-probabilities are
recomputed once and found by the rounds after the first, which is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.learner.long_sequences import SAMPLES, SHAPE
from benchmarks.learner.parts import join_ranks, random_policy, random_rollouts
from pipeline.recipe import load_recipe
from pipeline.rollouts.locate import locate
from trainer import forward
from trainer.learner import learn
from trainer.work import Round


@contextlib.contextmanager
def at_once(source: Generator[Any, None, None], _most: int) -> Iterator[Iterator[Any]]:
    """As `prefetch.ahead`, without a thread: each item when it is asked for."""
    yield source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--median", type=int, default=48)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    join_ranks()
    torch.set_num_threads(arguments.threads)
    ways = {"ahead": forward.ahead, "at once": at_once}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = random_policy(folder / "policy", SHAPE, 9 * arguments.median)
        lengths = np.random.default_rng(0).lognormal(np.log(arguments.median), 0.6, arguments.rows)
        drawn = np.clip(lengths, 2, 8 * arguments.median).astype(int).tolist()
        random_rollouts(folder / "rollouts", policy, drawn, SAMPLES)
        settings = {"batch_size": arguments.batch, "epochs": 1, "learning_rate": 1e-4, "behaviour": "recomputed"}
        (folder / "recipe.yaml").write_text(
            json.dumps({"name": "ahead", "policy": {"model": str(policy)}, "learning": settings})
        )
        recipe, place = load_recipe(str(folder / "recipe.yaml")), locate(folder / "rollouts", None)
        logs: dict[str, list[list[dict[str, float]]]] = {way: [] for way in ways}
        for number in range(arguments.rounds + 1):
            for way, make in ways.items():
                forward.ahead = make
                out = folder / "out"
                learn(Round(recipe, place, policy, out, out / "learning.jsonl", 0))
                lines = (out / "learning.jsonl").read_text().splitlines()
                if number:
                    logs[way].append([json.loads(line) for line in lines])
    losses = {way: [[record["loss"] for record in log] for log in found] for way, found in logs.items()}
    assert losses["ahead"] == losses["at once"], "the losses differ"
    best = {
        way: [min(log[step]["seconds"] for log in found) for step in range(len(found[0]))]
        for way, found in logs.items()
    }
    medians = {way: statistics.median(seconds) for way, seconds in best.items()}
    print(
        f"{arguments.threads} threads of {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}; "
        f"{len(best['ahead'])} steps of {arguments.batch}: a step at once {medians['at once']:.4f} s, ahead "
        f"{medians['ahead']:.4f} s; all steps, ahead over at once: {sum(best['ahead']) / sum(best['at once']):.3f}"
    )


if __name__ == "__main__":
    main()
