"""Losses: pure functions of tensors that return each sequence's loss and what to log. Each row is one completion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Metrics = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Batch:
    """What a loss sees of some completions: [sequences, tokens] padded on the right, masked where not theirs."""

    logprobs: Tensor
    """log pi of each completion token under the policy that learns, nats. [sequences, tokens]"""
    behaviour: Tensor
    """log mu of the same tokens under the behaviour policy, the engine's or recomputed. [sequences, tokens]"""
    mask: Tensor
    """True at completion tokens, the end-of-sequence token among them. [sequences, tokens]"""
    advantage: Tensor
    """r - V(x) for oapl and sft, (r - mean) / std for grpo. [sequences]"""
    reward: Tensor
    """r. [sequences]"""
    sampled: Tensor
    """What the engine said of the same tokens; not a number where the data has nothing. [sequences, tokens]"""


@dataclass(frozen=True, slots=True)
class Settings:
    """What losses are tuned by; see the settings of the same names in `pipeline.recipe.Learning`."""

    beta2: float = 1.0
    clip_low: float = 0.8
    clip_high: float = 1.28
    importance_cap: float | None = None


def oapl(batch: Batch, settings: Settings) -> tuple[Tensor, Metrics]:
    """OAPL's squared residual of each sequence: `(beta2 * (sum log pi - sum log mu) - (r - V))^2`. [sequences]

    Sums, not means, over completion tokens; no importance ratio, no clipping: the optimum of the KL-regularised
    objective satisfies `beta2 * log(pi/mu) = r - V` for every completion, whoever sampled it, so regressing on it
    stays sound far off-policy. Source: arXiv 2602.19362.
    """
    residual = settings.beta2 * log_ratios(batch).sum(dim=-1) - batch.advantage
    return residual.square(), {"residual_abs": residual.detach().abs().sum()}


def grpo(batch: Batch, settings: Settings) -> tuple[Tensor, Metrics]:
    """GRPO with importance sampling: `-mean_t min(ratio * A, clip(ratio) * A)` of each sequence. [sequences]

    The ratio pi/mu is a token's, clipped to [clip_low, clip_high]; above further than below, so that rare tokens can
    grow (DAPO, arXiv 2503.14476). The mean over a completion's own tokens is GRPO's (arXiv 2402.03300). With
    `importance_cap`, mu is the trainer's recomputation and each token is weighted by how much likelier it was to the
    trainer than to the engine that sampled it, at most by the cap (truncated importance sampling).
    """
    difference = log_ratios(batch)
    ratio = difference.exp()
    advantage = batch.advantage.unsqueeze(-1)
    clipped = ratio.clamp(settings.clip_low, settings.clip_high) * advantage
    gain = torch.minimum(ratio * advantage, clipped)
    if settings.importance_cap is not None:
        weight = (batch.behaviour - batch.sampled).float().exp().clamp(max=settings.importance_cap)
        gain = gain * weight
    outside = (clipped < ratio * advantage) & batch.mask
    shares = outside.sum(dim=-1) / batch.mask.sum(dim=-1)
    return -_mean(gain, batch.mask), {"clipped": shares.sum()}


def sft(batch: Batch, settings: Settings) -> tuple[Tensor, Metrics]:
    """Imitation of what was right: `-r * mean_t log pi` of each sequence; without reward, without loss. [sequences]

    Known as rejection-sampling fine-tuning. Wrong completions stay in the batch, so that the batches are the other
    losses' batches and a comparison compares losses.
    """
    return -batch.reward * _mean(batch.logprobs.float(), batch.mask), {}


def log_ratios(batch: Batch) -> Tensor:
    """`log pi - log mu` of each token in nats, float32, zero outside of the mask. [sequences, tokens]"""
    return (batch.logprobs.float() - batch.behaviour.float()).masked_fill(~batch.mask, 0.0)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Over each sequence's own tokens. [sequences, tokens] -> [sequences]"""
    return values.masked_fill(~mask, 0.0).sum(dim=-1) / mask.sum(dim=-1)


LOSSES: dict[str, Callable[[Batch, Settings], tuple[Tensor, Metrics]]] = {"oapl": oapl, "grpo": grpo, "sft": sft}

EXTRA = {"oapl": ("residual_abs",), "grpo": ("clipped",), "sft": ()}
"""What each loss logs besides `diagnostics`, as sums over sequences."""


def diagnostics(batch: Batch) -> Metrics:
    """What every loss logs, as sums over the batch's sequences or tokens; the learner divides by the counts.

    kl_k1 and kl_k3 estimate KL(mu || pi) a token from mu's own samples (Schulman's estimators); `surprise` is
    -log pi a token, an estimate of the cross-entropy of the policy against its data.
    """
    with torch.no_grad():
        difference = log_ratios(batch)
        return {
            "log_ratio": difference.sum(),
            "log_ratio_abs": difference.sum(dim=-1).abs().sum(),
            "kl_k1": -difference.sum(),
            "kl_k3": (difference.exp() - 1 - difference).sum(),
            "surprise": -batch.logprobs.float().masked_fill(~batch.mask, 0.0).sum(),
            "advantage_abs": batch.advantage.abs().sum(),
        }
