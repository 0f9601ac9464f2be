"""Losses against values worked out by hand, and with their gradients against float64 through a real model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from trainer.losses import LOSSES, Batch, Settings, diagnostics


def batch_by_hand(**fields: Any) -> Batch:
    """Two completions, of two tokens and of one; what lies behind the mask is nonsense on purpose."""
    nonsense = 1e4
    values: dict[str, Any] = {
        "logprobs": torch.tensor([[-1.0, -2.0], [-0.5, -nonsense]], requires_grad=True),
        "behaviour": torch.tensor([[-1.5, -2.25], [-0.25, nonsense]]),
        "mask": torch.tensor([[True, True], [True, False]]),
        "advantage": torch.tensor([0.375, -0.625]),
        "reward": torch.tensor([1.0, 0.0]),
        "sampled": torch.tensor([[-1.5, -2.25], [-0.25, nonsense]]),
    }
    return Batch(**(values | fields))


def test_oapl_by_hand() -> None:
    batch = batch_by_hand()
    losses, metrics = LOSSES["oapl"](batch, Settings(beta2=0.5))
    # Log-ratios: (-3) - (-3.75) = 0.75 and -0.25. Residuals: 0.375 - 0.375 = 0 and -0.125 + 0.625 = 0.5.
    assert losses.tolist() == [0.0, 0.25]
    assert metrics["residual_abs"].item() == 0.5
    losses.sum().backward()
    # d/dlog pi = 2 * beta2 * residual at each token of the completion, nothing elsewhere.
    assert batch.logprobs.grad is not None
    assert batch.logprobs.grad.tolist() == [[0.0, 0.0], [0.5, 0.0]]


def test_oapl_does_not_normalise_by_length() -> None:
    def loss_of(tokens: int) -> float:
        one = torch.full((1, tokens), -1.0)
        batch = Batch(one, one - 0.1, torch.ones(1, tokens, dtype=torch.bool), *torch.zeros(2, 1), one)
        return float(LOSSES["oapl"](batch, Settings(beta2=1.0))[0])

    assert loss_of(10) == pytest.approx(1.0)
    assert loss_of(1000) == pytest.approx(100.0**2, rel=1e-5)


def test_a_perfect_fit_has_no_loss() -> None:
    """Where beta2 * log(pi/mu) = r - V already, the loss and its gradient are zero."""
    batch = batch_by_hand(advantage=torch.tensor([0.75 * 0.2, -0.25 * 0.2]))
    losses, _ = LOSSES["oapl"](batch, Settings(beta2=0.2))
    losses.sum().backward()
    assert losses.max().item() < 1e-12
    assert batch.logprobs.grad is not None and batch.logprobs.grad.abs().max().item() < 1e-6


def test_diagnostics_by_hand() -> None:
    found = {name: value.item() for name, value in diagnostics(batch_by_hand()).items()}
    ratios = [0.5, 0.25, -0.25]
    assert found["log_ratio"] == pytest.approx(0.5)
    assert found["log_ratio_abs"] == pytest.approx(0.75 + 0.25)
    assert found["kl_k1"] == pytest.approx(-0.5)
    assert found["kl_k3"] == pytest.approx(sum(math.exp(r) - 1 - r for r in ratios), rel=1e-6)
    assert found["surprise"] == pytest.approx(3.5)
    assert found["advantage_abs"] == pytest.approx(1.0)


def test_grpo_by_hand() -> None:
    log = math.log
    batch = batch_by_hand(
        logprobs=torch.tensor([[log(1.5), log(1.1)], [log(0.5), 0.0]], requires_grad=True),
        behaviour=torch.zeros(2, 2),
        advantage=torch.tensor([2.0, -1.0]),
    )
    losses, metrics = LOSSES["grpo"](batch, Settings())
    # Better than the mean: 1.5 is clipped to 1.28, 1.1 is not. Worse: 0.5 is clipped to 0.8.
    assert losses.tolist() == pytest.approx([-2.0 * (1.28 + 1.1) / 2, 0.8])
    assert metrics["clipped"].item() == pytest.approx(0.5 + 1.0)
    losses.sum().backward()
    assert batch.logprobs.grad is not None
    # d ratio / d log pi = ratio; nothing where it is clipped.
    assert batch.logprobs.grad.flatten().tolist() == pytest.approx([0.0, -2.0 * 1.1 / 2, 0.0, 0.0])


def test_grpo_clips_only_what_goes_on_the_same_way() -> None:
    """A ratio outside of the bounds is not clipped where the advantage pulls it back: min, not clamp alone."""
    batch = batch_by_hand(
        logprobs=torch.tensor([[math.log(0.5), math.log(0.5)], [math.log(2.0), 0.0]]),
        behaviour=torch.zeros(2, 2),
        advantage=torch.tensor([1.0, -1.0]),
    )
    losses, metrics = LOSSES["grpo"](batch, Settings(clip_low=0.9, clip_high=1.1))
    assert losses.tolist() == pytest.approx([-0.5, 2.0])
    assert metrics["clipped"].item() == 0.0


def test_grpo_truncates_importance_weights() -> None:
    log = math.log
    batch = batch_by_hand(
        logprobs=torch.zeros(2, 2),
        behaviour=torch.zeros(2, 2),
        sampled=torch.tensor([[log(0.25), log(0.8)], [log(2.0), 0.0]]),
        advantage=torch.tensor([1.0, 1.0]),
    )
    losses, _ = LOSSES["grpo"](batch, Settings(importance_cap=2.0))
    # Weights 1/0.25 = 4, capped to 2, and 1/0.8 = 1.25; then 1/2.
    assert losses.tolist() == pytest.approx([-(2.0 + 1.25) / 2, -0.5])


def test_sft_by_hand() -> None:
    batch = batch_by_hand()
    losses, _ = LOSSES["sft"](batch, Settings())
    assert losses.tolist() == [1.5, 0.0]
    losses.sum().backward()
    assert batch.logprobs.grad is not None
    assert batch.logprobs.grad.tolist() == [[-0.5, -0.5], [0.0, 0.0]]
