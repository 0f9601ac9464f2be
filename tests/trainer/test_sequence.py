"""Ranks that share sequences: exact losses and gradients, a share of the memory, and clear refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from learning_parts import Learned, Made, trainer_environment
from sequence_rank import KEY_HEADS

from pipeline.errors import RequestError
from pipeline.recipe import Recipe
from trainer.sequence import Team, refuse_uneven_heads

Recipes = Callable[..., Recipe]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks printed."""
    store = tmp_path_factory.mktemp("team") / "store"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("sequence_rank.py")), str(store)],
            env=trainer_environment(RANK=str(rank), WORLD_SIZE="2", PYTHONPATH=os.pathsep.join(sys.path)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [rank.communicate(timeout=240) for rank in ranks]
    codes = [rank.returncode for rank in ranks]
    assert codes == [0, 0], "\n".join([str(codes), *(words[-2000:] for _, words in told)])
    return [json.loads(output.splitlines()[-1]) for output, _ in told]  # DeepSpeed says things before


@pytest.mark.parametrize("heads", KEY_HEADS)
@pytest.mark.parametrize("loss", ["oapl", "grpo"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen"])
def test_shared_equals_one_by_one(attention: str, loss: str, heads: str, found: list[dict[str, Any]]) -> None:
    """1e-6 relative in float32 against float64, as packing promises for one rank: on each rank."""
    for rank in found:
        errors = rank[f"{attention}, {loss}, {heads}"]
        assert errors["loss"] < 1e-6 and errors["gradients"] < 1e-6


def test_kernels_that_read_the_packed_stream_read_it_without_what_fills_it_up(found: list[dict[str, Any]]) -> None:
    assert all(rank["flex"] < 3e-6 for rank in found)


def test_a_rank_keeps_its_share_of_the_activations(found: list[dict[str, Any]]) -> None:
    for rank in found:
        alone, shared = rank["bytes"]
        assert alone > 4_000_000
        assert shared < 0.56 * alone


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ranks": 3, "batch_size": 9, "sequence_parallel": 2}, "ranks 3 must be a multiple of sequence_parallel 2"),
        ({"ranks": 2, "sequence_parallel": 2, "packing": False}, "sequence_parallel splits packed batches"),
        ({"ranks": 6, "sequence_parallel": 2}, "batch_size 8 must be a multiple of 3"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(settings: dict[str, Any], words: str, recipe: Recipes) -> None:
    with pytest.raises(RequestError, match=words):
        recipe(**settings)


def test_fewer_ranks_than_a_team(learn_here: Callable[..., Learned], recipe: Recipes, dataset: Made) -> None:
    with pytest.raises(RequestError, match=r"sequence_parallel=2 does not divide the 1 ranks that were started"):
        learn_here(dataset.place, recipe(ranks=2, sequence_parallel=2))


def test_heads_that_a_team_can_not_share() -> None:
    refuse_uneven_heads(16, Team(size=8), "policy")
    with pytest.raises(RequestError, match=r"policy: its 28 attention heads can't be shared by .*=8 ranks"):
        refuse_uneven_heads(28, Team(size=8), "policy")
