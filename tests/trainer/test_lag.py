"""A policy that learned on while rollouts were generated: measured on what wrote them, trained from where it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from learning_parts import Learned, Made, plain_logprobs

from pipeline.errors import WorkError
from pipeline.policies import snapshots
from pipeline.recipe import Recipe

Learn = Callable[..., Learned]
Recipes = Callable[..., Recipe]


@pytest.fixture(scope="module")
def ahead(learn_here: Learn, recipe: Recipes, dataset: Made) -> Learned:
    """The policy that wrote the dataset, three steps on."""
    return learn_here(dataset.place, recipe(epochs=1))


def mean_log_ratio(learned: Path, dataset: Made, behaviour: Callable[[Any], torch.Tensor]) -> float:
    """Mean over sequences of log pi - log mu: float64, one by one, no code of ours. Uniform groups are left out."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(learned, dtype=torch.float64, attn_implementation="eager").eval()
    ratios = []
    with torch.no_grad():
        for group in dataset.groups():
            if len({reward for _, reward in group}) > 1:
                for row, _ in group:
                    pi = plain_logprobs(model, row.prompt_tokens, row.completion_tokens, dataset.temperature)
                    ratios.append((pi.sum() - behaviour(row).sum()).item())
    return sum(ratios) / len(ratios)


@pytest.mark.parametrize("settings", [{}, {"zero_stage": 3}, {"zero_stage": 2, "dtype": "bfloat16"}], ids=str)
def test_the_gap_is_that_of_what_wrote_the_data(
    settings: dict[str, Any], ahead: Learned, learn_here: Learn, recipe: Recipes, dataset: Made, policy: Path
) -> None:
    wanted = recipe(epochs=1, batch_size=100, keep_optimizer=False, **settings)
    at_once = learn_here(dataset.place, wanted)
    lagging = learn_here(dataset.place, wanted, parent=ahead.snapshot, behaviour=policy, number=1)
    assert lagging.summary["logprob_gap"] == pytest.approx(at_once.summary["logprob_gap"], abs=1e-6)
    expected = mean_log_ratio(ahead.snapshot, dataset, lambda row: torch.tensor(row.logprobs))
    assert abs(expected) > 0.01
    assert lagging.log[0]["log_ratio"] == pytest.approx(expected, abs=0.02 if "dtype" in settings else 1e-4)
    assert lagging.log[0]["lag"] == ahead.summary["steps"] + 1
    published = snapshots.verify(lagging.snapshot)
    assert (published.parent, published.step) == (ahead.snapshot.name, ahead.summary["steps"] + 1)


def test_recomputed_by_what_wrote_the_data(
    ahead: Learned, learn_here: Learn, recipe: Recipes, dataset: Made, policy: Path, float64: Any
) -> None:
    wanted = recipe(epochs=1, batch_size=100, keep_optimizer=False, behaviour="recomputed")
    lagging = learn_here(dataset.place, wanted, parent=ahead.snapshot, behaviour=policy, number=1)
    assert lagging.summary["logprob_gap"]["mean_abs"] < 1e-5

    def recomputed(row: Any) -> torch.Tensor:
        return plain_logprobs(float64, row.prompt_tokens, row.completion_tokens, dataset.temperature)

    expected = mean_log_ratio(ahead.snapshot, dataset, recomputed)
    assert lagging.log[0]["log_ratio"] == pytest.approx(expected, abs=1e-4)


def test_without_its_behaviour_policy_the_difference_is_refused(
    learn_here: Learn, recipe: Recipes, dataset: Made, policy: Path
) -> None:
    far = learn_here(dataset.place, recipe(epochs=4, learning_rate=0.02)).snapshot
    wanted = recipe(epochs=1, max_logprob_gap=0.02)
    with pytest.raises(WorkError, match="train the policy that wrote the data"):
        learn_here(dataset.place, wanted, parent=far, number=1)
    learn_here(dataset.place, wanted, parent=far, behaviour=policy, number=1)
