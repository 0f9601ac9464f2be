"""Log-probabilities of given tokens without the logits of all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]

CHUNK_ELEMENTS = 1 << 24
"""Logits that are made at a time: 64 MiB in float32."""
KEPT_ELEMENTS = 1 << 27
"""Logits that are kept for the backward pass, 512 MiB in float32; those beyond are computed twice instead."""


def token_logprobs(head: Head, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """log softmax(head(hidden) / temperature) at `targets`: hidden [tokens, width], targets [tokens] -> [tokens].

    The projection is done chunk by chunk. The backward pass needs the logits again: those of the first chunks are
    kept, up to KEPT_ELEMENTS, and those of the others are computed anew, so that memory is bounded however many
    tokens there are and however large the vocabulary is, and a pass that fits computes nothing twice. Softmax and
    sums are in float32 whatever the weights are. Nats.
    """
    rows = max(1, CHUNK_ELEMENTS // getattr(head, "out_features", 1 << 17))
    kept = rows * (KEPT_ELEMENTS // CHUNK_ELEMENTS)
    parts = []
    for start in range(0, max(1, hidden.shape[0]), rows):
        part = hidden[start : start + rows], targets[start : start + rows]
        if torch.is_grad_enabled() and start >= kept:
            parts.append(checkpoint(_logprobs, head, *part, temperature, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_logprobs(head, *part, temperature))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _logprobs(head: Head, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
    found: Tensor = Pick.apply(head(hidden), targets, temperature)  # type: ignore[no-untyped-call]
    return found


class Pick(torch.autograd.Function):
    """log softmax(logits / temperature) at the targets: [tokens, vocabulary], [tokens] -> [tokens], at least float32.

    PyTorch's own way (log_softmax, then gather) keeps the logits and as much again; this keeps the logits and a
    number a token, and its gradient, `onehot - softmax`, is made in one buffer.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        scaled = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if temperature != 1:
            scaled = scaled / temperature
        total = scaled.logsumexp(dim=-1)
        ctx.save_for_backward(logits, targets, total)
        ctx.temperature = temperature
        return scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - total

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, total = ctx.saved_tensors
        each = (gradient / ctx.temperature).unsqueeze(-1)  # [tokens, 1]
        softmax = logits.to(total.dtype) / ctx.temperature  # a buffer of its own: what was saved stays as it is
        softmax.sub_(total.unsqueeze(-1)).exp_().mul_(-each)
        softmax.scatter_add_(-1, targets.unsqueeze(-1), each)
        return softmax.to(logits.dtype), None, None
