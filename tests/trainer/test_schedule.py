"""Learning rates by hand, over rounds, and in what a real round logs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from learning_parts import Learned, Made

from pipeline.recipe import Learning, Recipe
from trainer.schedule import learning_rate


def rates(settings: Learning, rounds: int, steps: int) -> list[float]:
    return [
        learning_rate(settings, number, done, steps, number * steps)
        for number in range(rounds)
        for done in range(steps)
    ]


def test_constant() -> None:
    assert rates(Learning(learning_rate=0.01), 2, 3) == [0.01] * 6


def test_linear_over_all_rounds() -> None:
    settings = Learning(learning_rate=0.01, schedule="linear", horizon_rounds=2, final_learning_rate=0.1)
    expected = [0.01 * (0.1 + 0.9 * (1 - step / 8)) for step in range(8)]
    assert rates(settings, 3, 4) == pytest.approx([*expected, *[0.001] * 4])


def test_cosine_has_its_floor() -> None:
    settings = Learning(learning_rate=0.01, schedule="cosine", horizon_rounds=1, final_learning_rate=0.05)
    found = rates(settings, 2, 4)
    assert found[0] == pytest.approx(0.01)
    assert found[2] == pytest.approx(0.01 * (0.05 + 0.95 / 2))
    assert found[3] == pytest.approx(0.01 * (0.05 + 0.95 * (1 + math.cos(0.75 * math.pi)) / 2))
    assert found[4:] == pytest.approx([0.0005] * 4)


def test_anew_in_each_round() -> None:
    settings = Learning(learning_rate=0.01, schedule="linear", horizon_rounds=0, final_learning_rate=0.0)
    assert rates(settings, 2, 2) == pytest.approx([0.01, 0.005, 0.01, 0.005])


def test_warm_up_counts_steps_over_rounds() -> None:
    settings = Learning(learning_rate=0.01, warmup_steps=4)
    assert rates(settings, 3, 2) == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_the_optimizer_steps_by_it(
    learn_here: Callable[..., Learned], recipe: Callable[..., Recipe], dataset: Made
) -> None:
    """What is logged is what moves the weights: less, where the rate falls to nothing."""
    settings = recipe(schedule="cosine", warmup_steps=2, final_learning_rate=0.05, horizon_rounds=1)
    learned = learn_here(dataset.place, settings)
    found = [record["learning_rate"] for record in learned.log]
    assert found == pytest.approx(rates(settings.learning, 1, len(found)))
    still = learn_here(dataset.place, recipe(schedule="linear", final_learning_rate=0.0, horizon_rounds=1))
    constant = learn_here(dataset.place, recipe())
    start = learn_here(dataset.place, recipe(learning_rate=1e-30)).weights()

    def moved(one: Learned) -> float:
        return sum((value - start[key]).square().sum().item() for key, value in one.weights().items())

    assert 0 < moved(still) < moved(constant)
