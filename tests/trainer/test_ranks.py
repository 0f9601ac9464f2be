"""`python -m trainer` as a user starts it: several ranks, DeepSpeed's stages, and requests that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from learning_parts import Learned, Made, read_log, start_trainer

from pipeline.recipe import Recipe

Recipes = Callable[..., Recipe]


def learned(out: Path) -> Learned:
    summary = json.loads((out / "learning.json").read_text(encoding="utf-8"))
    return Learned(summary, read_log(out / "learning.jsonl"), out)


SETTINGS: dict[str, dict[str, Any]] = {
    "two ranks": {"ranks": 2},
    "ZeRO 1, two ranks": {"ranks": 2, "zero_stage": 1, "micro_batch_tokens": 60},
    "ZeRO 2, optimizer on the host": {"zero_stage": 2, "offload": "optimizer", "activation_checkpointing": True},
    "ZeRO 3, two ranks": {"ranks": 2, "zero_stage": 3},
}


@pytest.fixture(scope="module")
def outcomes(
    tmp_path_factory: pytest.TempPathFactory, recipe: Recipes, dataset: Made, policy: Path
) -> dict[str, Learned]:
    """The same round under each setting, two processes at a time."""

    def run(name: str) -> tuple[str, Learned]:
        out = tmp_path_factory.mktemp("ranks")
        done = start_trainer(recipe(**SETTINGS[name]), dataset.place, policy, out)
        assert done.returncode == 0, done.stderr
        assert "6 steps" in done.stdout or "steps" in done.stdout
        return name, learned(out)

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(run, SETTINGS))


@pytest.mark.parametrize("name", SETTINGS)
def test_however_it_is_split_the_update_is_the_same(
    name: str, outcomes: dict[str, Learned], learn_here: Callable[..., Learned], recipe: Recipes, dataset: Made
) -> None:
    """The loss is a mean over the global batch: ranks, stages and passes change nothing but rounding."""
    reference, other = learn_here(dataset.place, recipe()), outcomes[name]
    assert reference.summary["steps"] == other.summary["steps"] > 2
    for ours, theirs in zip(reference.log, other.log, strict=True):
        for key in ("loss", "grad_norm", "surprise", "log_ratio_abs"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
        assert ours["tokens"] == theirs["tokens"]
    assert reference.summary["logprob_gap"] == pytest.approx(other.summary["logprob_gap"], abs=1e-6)
    for key, value in reference.weights().items():
        torch.testing.assert_close(value, other.weights()[key], rtol=0, atol=2e-5)
