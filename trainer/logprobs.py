"""Log-probabilities of given tokens without the logits of all of them at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]

CHUNK_ELEMENTS = 1 << 24
"""Logits that exist at a time: 64 MiB in float32."""


def token_logprobs(head: Head, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """log softmax(head(hidden) / temperature) at `targets`: hidden [tokens, width], targets [tokens] -> [tokens].

    The projection is done chunk by chunk, and again in the backward pass, so that no more than CHUNK_ELEMENTS
    logits ever exist. Softmax and sums are in float32 whatever the weights are. Nats.
    """
    vocabulary = getattr(head, "out_features", 1 << 17)
    rows = max(1, CHUNK_ELEMENTS // vocabulary)
    if hidden.shape[0] <= rows:
        return _logprobs(head, hidden, targets, temperature)
    parts = []
    for start in range(0, hidden.shape[0], rows):
        part = hidden[start : start + rows], targets[start : start + rows]
        if torch.is_grad_enabled():
            parts.append(checkpoint(_logprobs, head, *part, temperature, use_reentrant=False))
        else:
            parts.append(_logprobs(head, *part, temperature))
    return torch.cat(parts)


def _logprobs(head: Head, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
    logits = head(hidden).float() / temperature  # [tokens, vocabulary]
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)
