"""How much arithmetic a training step is: the model's own, as its shape says, whatever computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Floating-point operations of a forward and a backward pass, by what they grow with.

    What checkpointing and attention's kernels compute again is not counted, so that a share of the machine's peak
    is model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B), and the same work counts alike however it is done.
    """

    position: float
    """A position through all layers: products with their weights."""
    target: float
    """A scored token: its product with the output matrix."""
    pair: float
    """A query with one of its keys, in all heads of all layers: two products, and four backward."""

    def of(self, positions: float, targets: float, pairs: float) -> float:
        return self.position * positions + self.target * targets + self.pair * pairs


def of_model(model: Any) -> Arithmetic:
    """Of a transformers model of one kind of attention, adapters included; sliding windows count as whole."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Arithmetic(
        position=sum(_of_linear(module) for module in linear if module is not head),
        target=_of_linear(head),
        pair=12 * config.num_hidden_layers * config.num_attention_heads * size,
    )


def _of_linear(module: Any) -> int:
    """Two operations a weight forward, two for the gradient of what came in, two for its own where it is learned."""
    return (6 if module.weight.requires_grad else 4) * int(module.in_features) * int(module.out_features)
