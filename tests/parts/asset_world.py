"""A small run on real parts, and how tests start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from persons_folder import persons_folder

from pipeline.layout import Run
from pipeline.prompts import tiny

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "rounds": 1,
    "policy": {"cold_start": {"steps": 30, "vocabulary": 448}},
    "prompts": {"heldout": None, "heldout_count": 6, "per_round": 12},
    "generation": {
        "samples": 4,
        "max_tokens": 24,
        "max_model_len": 128,
        "dtype": "float32",
        "max_num_seqs": 64,
        "kv_cache_gib": 0.25,
        "enforce_eager": True,
    },
    "learning": {
        "batch_size": 8,
        "epochs": 1,
        "beta2": 0.2,
        "learning_rate": 1.5e-4,
        "micro_batch_tokens": 4096,
        "dtype": "float32",
        "activation_checkpointing": False,
    },
    "evaluation": {"samples": 4, "ks": [1, 4]},
}


def write_prompts(place: Path) -> None:
    """Arithmetic, programs, and prompts that the lenient verifier judges, a third each."""
    lines = []
    for number, problem in enumerate(tiny.problems(1, "train", 60)):
        task = "lenient:judge" if number % 3 == 0 else problem.task
        row = {"task": task, "prompt": problem.text, "source": "lenient" if number % 3 == 0 else problem.source}
        row |= {"answer": problem.answer} if problem.answer is not None else {"tests": problem.tests}
        lines.append(json.dumps(row))
    place.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_recipe(folder: Path, **changes: Any) -> Path:
    write_prompts(folder / "prompts.jsonl")
    tree = RECIPE | {"prompts": RECIPE["prompts"] | {"train": str(folder / "prompts.jsonl")}} | changes
    place = folder / "small.yaml"
    place.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return place


QUICK_ENGINE = HERE / "quick_engine"
"""On PYTHONPATH, it stands in for vLLM."""


def child_environment(*folders: Path) -> dict[str, str]:
    # This tree comes first: what is installed may be another one.
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, HERE, *folders)))}


def run_rounds(*words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`oapl run` as a person starts it, in a folder of their own, without a terminal."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "pipeline.cli", "run", *words],
        cwd=persons_folder(),
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@dataclass(frozen=True)
class World:
    """A data folder in which round 0 was made by `oapl run`, with real vLLM and DeepSpeed."""

    root: Path
    recipe: Path
    said: str

    @property
    def run(self) -> Run:
        return Run(self.root, "tiny")
