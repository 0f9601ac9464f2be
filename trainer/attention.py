"""Attention over a packed stream, four kernels of it: the same result on different machines.

The learner compares a packed pass with plain causal attention on the policy itself before anything is learned, and
refuses a policy for which they differ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import RequestError
from pipeline.recipe import Learning
from trainer import sequence
from trainer.packing import Kernel, Layout
from trainer.sequence import Share


def _bucketed(causal: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> Kernel:
    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, layout: Layout) -> Tensor:
        outputs = []
        for places in layout.buckets:
            # index_select, not indexing: its backward pass is a plain sum by index and runs on all cores.
            parts = [
                whole.index_select(0, places.flatten()).view(*places.shape, *whole.shape[1:]).transpose(1, 2)
                for whole in (query, key, value)
            ]  # [sequences, heads, longest, size] each
            outputs.append(causal(parts[0], parts[1], parts[2], scale).transpose(1, 2).flatten(0, 1))
        assert layout.back is not None
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return joined.index_select(0, layout.back)

    return attend


def _repeated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value with as many heads as the query."""
    times = query.shape[1] // key.shape[1]
    return key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    if key.shape[1] != query.shape[1]:
        key, value = _repeated(query, key, value)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)


def _eager(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    if key.shape[1] != query.shape[1]:
        key, value = _repeated(query, key, value)
    scores = query @ key.transpose(-1, -2) * scale
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    weights = scores.masked_fill(later, float("-inf")).softmax(
        dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)
    )
    return weights.to(value.dtype) @ value


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float, layout: Layout) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    assert layout.keys is not None
    # Where a segment has more keys than queries, flash aligns the causal mask to the right, as a prefix needs it.
    attended: Tensor = flash_attn_varlen_func(
        query,
        key.index_select(0, layout.keys),
        value.index_select(0, layout.keys),
        layout.query_starts,
        layout.key_starts,
        layout.longest_query,
        layout.longest_key,
        softmax_scale=scale,
        causal=True,
    )
    return attended


def _flex(query: Tensor, key: Tensor, value: Tensor, scale: float, layout: Layout) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    segment, prefix = layout.segment, layout.prefix
    assert segment is not None and prefix is not None

    def allowed(_batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        inside = (segment[column] == segment[row]) | (segment[column] == prefix[row])
        return (column <= row) & inside

    tokens = query.shape[0]
    mask = create_block_mask(allowed, None, None, tokens, tokens, device=str(query.device))
    kernel = torch.compile(flex_attention, dynamic=True) if query.is_cuda else flex_attention
    q, k, v = (whole.transpose(0, 1).unsqueeze(0) for whole in (query, key, value))
    attended: Tensor = kernel(q, k, v, block_mask=mask, scale=scale, enable_gqa=key.shape[1] != query.shape[1])
    return attended.squeeze(0).transpose(0, 1)


KERNELS: dict[str, Kernel] = {"sdpa": _bucketed(_sdpa), "eager": _bucketed(_eager), "flash": _flash, "flex": _flex}
"""Attention backends: sdpa everywhere; eager to check others by; flash (flash-attn) and flex on a GPU."""


def register(attention: str) -> str:
    """Makes the kernel known to transformers; returns the name to load a model with."""
    from transformers import AttentionInterface

    name = f"packed-{'varlen' if attention == 'flash' else 'blocks' if attention == 'flex' else attention}"
    kernel = KERNELS[attention]

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        layout: Layout,
        share: Share | None = None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if sliding_window is not None or softcap is not None:
            raise RequestError(
                "the policy's attention has a window or a cap, which packing does not keep; set learning.packing=false"
            )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        query, key, value = (whole.squeeze(0).transpose(0, 1) for whole in (query, key, value))
        if share is None:
            return kernel(query, key, value, scale, layout).unsqueeze(0), None
        return sequence.attend(kernel, query, key, value, scale, layout, share).unsqueeze(0), None

    AttentionInterface.register(name, attend)
    return name


@contextlib.contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Plain causal attention for the time being, on padded passes."""
    packed = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(packed)


LEAK = {"float32": 1e-3, "bfloat16": 0.25}
"""Nats a token by which rounding alone may differ; a leak differs by more."""


def refuse_difference(packed: Tensor, alone: Sequence[Tensor], settings: Learning, policy: Path) -> None:
    """Raises RequestError where packed log-probabilities [sequences, tokens] are not those of each sequence alone."""
    worst = max((packed[number, : len(one)] - one).abs().max().item() for number, one in enumerate(alone))
    if not worst <= LEAK[settings.dtype]:
        also = "" if settings.sequence_parallel == 1 else " and learning.sequence_parallel=1"
        raise RequestError(
            f"{policy}: packed, its log-probabilities differ by {worst:.3g} nats a token from those of each sequence "
            f"alone (learning.attention={settings.attention}); set learning.packing=false{also}"
        )
