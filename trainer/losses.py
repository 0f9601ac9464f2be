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
    """log mu of the same tokens, as the behaviour policy sampled them. [sequences, tokens]"""
    mask: Tensor
    """True at completion tokens, the end-of-sequence token among them. [sequences, tokens]"""
    advantage: Tensor
    """r - V(x). [sequences]"""


@dataclass(frozen=True, slots=True)
class Settings:
    """What losses are tuned by."""

    beta2: float


def oapl(batch: Batch, settings: Settings) -> tuple[Tensor, Metrics]:
    """OAPL's squared residual of each sequence: `(beta2 * (sum log pi - sum log mu) - (r - V))^2`. [sequences]

    Sums, not means, over completion tokens; no importance ratio, no clipping: the optimum of the KL-regularised
    objective satisfies `beta2 * log(pi/mu) = r - V` for every completion, whoever sampled it, so regressing on it
    stays sound far off-policy. Source: arXiv 2602.19362.
    """
    ratio = log_ratio(batch)
    residual = settings.beta2 * ratio - batch.advantage
    return residual.square(), {"residual_abs": residual.detach().abs().sum()}


def log_ratio(batch: Batch) -> Tensor:
    """`sum_t log pi - log mu` of each sequence in nats, summed in float32. [sequences]"""
    difference = (batch.logprobs.float() - batch.behaviour.float()).masked_fill(~batch.mask, 0.0)
    return difference.sum(dim=-1)


LOSSES: dict[str, Callable[[Batch, Settings], tuple[Tensor, Metrics]]] = {"oapl": oapl}


def diagnostics(batch: Batch) -> Metrics:
    """What every loss logs, as sums over the batch's sequences or tokens; the learner divides by the counts.

    kl_k1 and kl_k3 estimate KL(mu || pi) a token from mu's own samples (Schulman's estimators); `surprise` is
    -log pi a token, an estimate of the cross-entropy of the policy against its data.
    """
    with torch.no_grad():
        difference = (batch.logprobs.float() - batch.behaviour.float()).masked_fill(~batch.mask, 0.0)
        return {
            "log_ratio": difference.sum(),
            "log_ratio_abs": difference.sum(dim=-1).abs().sum(),
            "kl_k1": -difference.sum(),
            "kl_k3": (difference.exp() - 1 - difference).sum(),
            "surprise": -batch.logprobs.float().masked_fill(~batch.mask, 0.0).sum(),
            "advantage_abs": batch.advantage.abs().sum(),
        }
