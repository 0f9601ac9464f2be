"""V(x) against the naive formula where that holds, and at both ends of beta1."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.advantages import advantages, is_uniform, standardised, value


@pytest.mark.parametrize("beta1", [0.05, 0.3, 1.0, 7.0, 100.0])
def test_value_equals_the_naive_formula(beta1: float) -> None:
    rewards = np.random.default_rng(0).uniform(0, 1, (50, 8))
    naive = [beta1 * math.log(sum(math.exp(r / beta1) for r in row) / len(row)) for row in rewards.tolist()]
    np.testing.assert_allclose(value(rewards, beta1), naive, rtol=1e-12 * max(1, beta1))


def test_hand_values() -> None:
    # Half of the group right, beta1 = 1: V = log((e + 1) / 2).
    expected = math.log((math.e + 1) / 2)
    assert value([1, 0, 1, 0], 1.0) == pytest.approx(expected, abs=1e-15)
    np.testing.assert_allclose(advantages([1, 0], 1.0), [1 - expected, -expected], atol=1e-15)
    np.testing.assert_allclose(advantages([1, 0], 1.0), [0.38, -0.62], atol=0.005)


@pytest.mark.parametrize("beta1", [1e-2, 1e-3, 1e-6, 1e-300])
def test_towards_zero_it_is_the_best_reward(beta1: float) -> None:
    rewards = [0.0, 1.0, 0.25, 1.0]
    # Two of four are best: V = max + beta1 * log(2/4), where every exponential below the best vanishes.
    assert value(rewards, beta1) == pytest.approx(1.0 + beta1 * math.log(0.5), abs=1e-15)
    with np.errstate(over="raise", invalid="raise"):
        assert np.isfinite(advantages(rewards, beta1)).all()


@pytest.mark.parametrize("beta1", [1e3, 1e6, 1e9, 1e12])
def test_towards_infinity_it_is_the_mean(beta1: float) -> None:
    rewards = [0.0, 1.0, 0.25, 0.5]
    # The next term is half the variance over beta1.
    expected = np.mean(rewards) + np.var(rewards) / (2 * beta1)
    assert value(rewards, beta1) == pytest.approx(expected, abs=0.1 / beta1**2 + 1e-12)


def test_value_does_not_move_with_an_offset_of_rewards() -> None:
    rewards = np.array([0.0, 1.0, 0.25])
    np.testing.assert_allclose(value(rewards + 1e4, 0.02) - 1e4, value(rewards, 0.02), atol=1e-9)


def test_equal_rewards_have_no_advantage() -> None:
    for reward in (0.0, 1.0, 0.3):
        np.testing.assert_array_equal(advantages([reward] * 5, 0.7), np.zeros(5))
        assert is_uniform([reward] * 5)
    assert not is_uniform([0.3, 0.3, 0.30001])
    assert is_uniform([0.4])


def test_standardised_by_hand() -> None:
    # Mean 1/4, deviation sqrt(3)/4.
    expected = [0.75, -0.25, -0.25, -0.25] / (np.sqrt(3) / 4 + 1e-6)
    np.testing.assert_allclose(standardised([1, 0, 0, 0]), expected, rtol=1e-12)
    np.testing.assert_array_equal(standardised([1, 1]), [0.0, 0.0])
