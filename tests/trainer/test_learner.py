"""One round of the real DeepSpeed learner against an independent PyTorch computation, and against itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning_parts import Learned, Made, folder_hash, plain_logprobs, write_dataset, write_verdicts

from pipeline.errors import RequestError
from pipeline.policies import snapshots
from pipeline.recipe import Recipe

Learn = Callable[..., Learned]
Recipes = Callable[..., Recipe]


def naive_advantages(rewards: list[float], beta1: float) -> list[float]:
    value = beta1 * np.log(np.mean(np.exp(np.array(rewards) / beta1)))
    return [reward - value for reward in rewards]


def all_sequences(dataset: Made, beta1: float) -> list[tuple[list[int], list[int], list[float], float]]:
    """Prompt, completion, behaviour and advantage of every completion that should be learned from."""
    found = []
    for group in dataset.groups():
        rewards = [reward for _, reward in group]
        if len(set(rewards)) > 1:
            found += [
                (row.prompt_tokens, row.completion_tokens, row.logprobs, a)
                for (row, _), a in zip(group, naive_advantages(rewards, beta1), strict=True)
            ]
    return found


def one_step_by_hand(model: Any, dataset: Made, settings: Any) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, gradient norm and new weights after one AdamW step on the whole dataset: float64, one by one."""
    model.zero_grad()
    rows = all_sequences(dataset, settings.beta1)
    total = 0.0
    for prompt, completion, behaviour, advantage in rows:
        logprobs = plain_logprobs(model, prompt, completion, dataset.temperature)
        # As stored: log-probabilities are float32 in the dataset.
        mu = torch.tensor(behaviour, dtype=torch.float32).double()
        loss = (settings.beta2 * (logprobs.sum() - mu.sum()) - advantage) ** 2 / len(rows)
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip).item()
    weights = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        # AdamW's first step: both moments divided by their corrections are the gradient and its square.
        update = gradient / (gradient.abs() + settings.adam_epsilon)
        decayed = parameter.detach() * (1 - settings.learning_rate * settings.weight_decay)
        weights[name] = decayed - settings.learning_rate * update
    return total, norm, weights


def test_one_step_equals_an_independent_float64_step(
    learn_here: Learn, recipe: Recipes, dataset: Made, float64: Any
) -> None:
    whole = recipe(batch_size=len(all_sequences(dataset, 0.5)), epochs=1, beta1=0.5, weight_decay=0.1, clip=0.3)
    learned = learn_here(dataset.place, whole)
    loss, norm, expected = one_step_by_hand(float64, dataset, whole.learning)
    assert norm > whole.learning.clip  # so that clipping is part of what is compared
    assert learned.log[0]["loss"] == pytest.approx(loss, rel=1e-6)
    assert learned.log[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    weights = learned.weights()
    start = dict(float64.named_parameters())
    for name, value in weights.items():
        moved = (expected[name] - start[name]).abs().max().item()
        difference = (value.double() - expected[name]).abs().max().item()
        assert difference <= 2e-5 * moved + 1e-7, name  # 1e-7: weights of size one, rounded to float32


def test_a_round_counts_what_it_read(learn_here: Learn, recipe: Recipes, dataset: Made, policy: Path) -> None:
    before = folder_hash(policy)
    learned = learn_here(dataset.place, recipe())
    summary, rows = learned.summary, all_sequences(dataset, 1.0)
    uniform = sum(len({reward for _, reward in group}) == 1 for group in dataset.groups())
    assert summary["rows"] == 24 and summary["groups"] == 6
    assert summary["uniform_groups"] == uniform
    assert summary["sequences"] == len(rows)
    assert summary["steps"] == len(rows) * 2 // 8 == len(learned.log)
    rewards = [reward for _, reward in dataset.rows]
    assert summary["reward_mean"] == pytest.approx(sum(rewards) / len(rewards))
    published = snapshots.verify(learned.snapshot)
    assert (published.step, published.round, published.parent) == (summary["steps"], 0, policy.name)
    assert folder_hash(policy) == before
    assert [record["lag"] for record in learned.log] == list(range(1, summary["steps"] + 1))


def test_the_gap_is_the_engines_noise(learn_here: Learn, recipe: Recipes, dataset: Made, float64: Any) -> None:
    gap = learn_here(dataset.place, recipe(epochs=1)).summary["logprob_gap"]
    differences = np.concatenate(
        [
            plain_logprobs(float64, prompt, completion, dataset.temperature).detach().numpy() - np.float32(behaviour)
            for prompt, completion, behaviour, _ in all_sequences(dataset, 1.0)
        ]
    )
    assert gap["tokens"] == len(differences)
    assert gap["mean"] == pytest.approx(differences.mean(), abs=1e-6)
    assert gap["mean_abs"] == pytest.approx(np.abs(differences).mean(), abs=1e-6)
    assert gap["max_abs"] == pytest.approx(np.abs(differences).max(), abs=1e-5)


def test_the_same_round_gives_the_same_weights(learn_here: Learn, recipe: Recipes, dataset: Made) -> None:
    first, second = (learn_here(dataset.place, recipe()) for _ in range(2))
    assert first.summary["snapshot_id"] == second.summary["snapshot_id"]


def test_the_recipe_picks_the_verifiers_version(
    learn_here: Learn, recipe: Recipes, policy: Path, float64: Any, tmp_path: Path
) -> None:
    """A newer version says the opposite of each completion. It counts, unless the older one is named."""
    made = write_dataset(tmp_path / "rollouts", policy, float64)
    before = learn_here(made.place, recipe(epochs=1))
    opposite = [(row, None if reward is None else 1 - reward) for row, reward in made.rows]
    write_verdicts(made.place / "verdicts", opposite, version="2")
    newest = learn_here(made.place, recipe(epochs=1))
    picked = learn_here(made.place, recipe(epochs=1, verifier_version="1"))
    assert newest.summary["reward_mean"] == pytest.approx(1 - before.summary["reward_mean"])
    assert [line["loss"] for line in picked.log] == [line["loss"] for line in before.log]
    with pytest.raises(RequestError, match="no verdicts of verifier version '3'; there are 1, 2"):
        learn_here(made.place, recipe(verifier_version="3"))


def test_moments_are_carried_into_the_next_round(learn_here: Learn, recipe: Recipes, dataset: Made) -> None:
    """Two rounds of one epoch with moments kept equal one of two epochs, the order of its batches aside."""
    whole = recipe(batch_size=len(all_sequences(dataset, 1.0)), epochs=2, max_logprob_gap=9.0, max_residual_gap=None)
    in_one = learn_here(dataset.place, whole)
    half = recipe(batch_size=len(all_sequences(dataset, 1.0)), epochs=1, max_logprob_gap=9.0, max_residual_gap=None)
    first = learn_here(dataset.place, half)
    second = learn_here(dataset.place, half, parent=first.snapshot, out=first.out, number=1)
    assert second.summary["step"] == 2
    for name, value in in_one.weights().items():
        torch.testing.assert_close(value, second.weights()[name], rtol=0, atol=2e-6)
    without = learn_here(
        dataset.place, half.model_copy(update={"learning": half.learning.model_copy(update={"keep_optimizer": False})}),
        parent=first.snapshot, number=1,
    )  # fmt: skip
    apart = max((without.weights()[name] - value).abs().max().item() for name, value in in_one.weights().items())
    assert apart > 1e-4
