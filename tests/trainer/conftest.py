"""Fixtures of the learner's tests; what they are made of lies in learning_parts.py."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from learning_parts import RECIPE, Learned, Made, make_policy, read_log, write_dataset

from pipeline.recipe import Recipe, load_recipe
from pipeline.rollouts.locate import locate
from trainer.learner import learn
from trainer.work import Round


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"), 1)


@pytest.fixture(scope="session")
def float64(policy: Path) -> Any:
    """The same weights as an ordinary Hugging Face model in float64 with its plain attention."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float64, attn_implementation="eager").eval()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, policy: Path, float64: Any) -> Made:
    """24 completions of 6 prompts at temperature 0.8: 3 optimizer steps an epoch with RECIPE."""
    return write_dataset(tmp_path_factory.mktemp("dataset") / "rollouts", policy, float64)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """The small recipe, with `learning` settings replaced."""
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(RECIPE, encoding="utf-8")

    def make(**learning: Any) -> Recipe:
        return load_recipe(str(path), [f"learning.{key}={json.dumps(value)}" for key, value in learning.items()])

    return make


@pytest.fixture(scope="session")
def group_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """torch.distributed with this process as its only rank, so that `learn` runs where the test does."""
    import deepspeed

    before = dict(os.environ)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors, and a machine that is shared: two threads would wait for each other
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        os.environ.pop(name)
    os.environ |= {name: before[name] for name in before if os.environ.get(name) != before[name]}
    yield
    torch.set_num_threads(threads)
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def learn_here(group_of_one: None, tmp_path_factory: pytest.TempPathFactory, policy: Path) -> Callable[..., Learned]:
    """`learn` in this process, on a place of rollouts, into a fresh folder unless one is given."""

    def run(
        place: Path,
        recipe: Recipe,
        *,
        parent: Path = policy,
        out: Path | None = None,
        number: int = 0,
        behaviour: Path | None = None,
    ) -> Learned:
        out = out or tmp_path_factory.mktemp("learned")
        found = locate(place, number if (place / "rollouts").is_dir() else None)
        work = Round(recipe, found, parent, out, out / "learning.jsonl", number, behaviour)
        os.environ["LOCAL_RANK"] = "0"
        try:
            summary = learn(work)
        finally:
            os.environ.pop("LOCAL_RANK", None)
        return Learned(summary, read_log(work.log), out)

    return run
