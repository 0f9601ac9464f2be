"""Between the passes of a step nothing waits for the device; `test_ranks` holds the same for several ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import no_waiting
import pytest
import torch
from learning_parts import Learned, Made

from pipeline.recipe import Recipe
from trainer import learner, losses

Learn = Callable[..., Learned]
Recipes = Callable[..., Recipe]


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner._Learner, "_pass", learner._Learner._pass)  # put back afterwards
    no_waiting.in_passes(learner)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"packing": False},
        {"loss": "grpo", "behaviour": "recomputed", "importance_cap": 2.0, "activation_checkpointing": True},
        {"loss": "sft", "attention": "eager", "lora_rank": 2},
        {"zero_stage": 2, "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_a_step_runs_ahead_of_the_device(
    settings: dict[str, Any], guarded: None, learn_here: Learn, recipe: Recipes, dataset: Made
) -> None:
    assert learn_here(dataset.place, recipe(epochs=1, micro_batch_tokens=60, **settings)).summary["steps"] == 3


@pytest.mark.parametrize(
    "wait",
    [
        lambda batch: batch.logprobs.sum().item(),
        lambda batch: batch.logprobs[batch.mask],
        lambda batch: bool((batch.advantage > 0).any()),
    ],
    ids=["a number", "a mask", "a branch"],
)
def test_a_loss_that_waits_is_found(
    wait: Callable[[losses.Batch], object],
    guarded: None,
    monkeypatch: pytest.MonkeyPatch,
    learn_here: Learn,
    recipe: Recipes,
    dataset: Made,
) -> None:
    def waits(batch: losses.Batch, settings: losses.Settings) -> tuple[torch.Tensor, losses.Metrics]:
        wait(batch)
        return losses.oapl(batch, settings)

    monkeypatch.setitem(losses.LOSSES, "oapl", waits)
    with pytest.raises(no_waiting.Waited):
        learn_here(dataset.place, recipe(epochs=1))
