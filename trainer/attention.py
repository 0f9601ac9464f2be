"""Attention over a packed stream, five kernels of it: the same result on different machines.

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
from trainer import blocks, sequence, varlen
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


KERNELS: dict[str, Kernel] = {
    "sdpa": _bucketed(_sdpa),
    "eager": _bucketed(_eager),
    "varlen": varlen.over_segments(lambda: varlen.of_torch()),
    "flash": varlen.over_segments(lambda: varlen.of_library()),
    "flex": blocks.attend,
}
"""Attention backends: sdpa everywhere; eager to check others by; varlen, flash and flex on a GPU."""
NAMES = {
    "sdpa": "packed-fused",
    "eager": "packed-plain",
    "varlen": "packed-varlen",
    "flash": "packed-library",
    "flex": "packed-blocks",
}
"""What transformers knows them by. It acts on names that contain flash, flex or sdpa
(`get_correct_attn_implementation`, `is_flash_attention_requested`), and makes no mask for a name that it does not know
(`masking_utils`)."""


def chosen(settings: Learning) -> str:
    """The kernel that `settings.attention` names, or what `auto` stands for on this machine."""
    if settings.attention != "auto":
        return settings.attention
    return "varlen" if settings.packing and settings.dtype == "bfloat16" and varlen.runs_here() else "sdpa"


def refuse_missing(settings: Learning) -> None:
    """Raises RequestError where this machine, or the settings' dtype, has not what the named kernel needs."""
    named = settings.attention
    if named in ("varlen", "flash") and settings.dtype == "float32":
        raise RequestError(f"learning.attention={named} needs learning.dtype=bfloat16; or take sdpa")
    if named == "varlen" and not varlen.runs_here():
        raise RequestError(
            "learning.attention=varlen needs an NVIDIA card, Ampere or newer, and PyTorch 2.10 or newer; take auto"
        )
    if named == "flash":
        varlen.of_library()
    if named == "flex" and not torch.cuda.is_available():
        raise RequestError("learning.attention=flex has no backward pass on a CPU; take sdpa")


def register(attention: str) -> str:
    """Makes the kernel known to transformers; returns the name to load a model with."""
    from transformers import AttentionInterface

    name = NAMES[attention]
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
def plain_attention(model: Any, kernel: str = "sdpa") -> Iterator[None]:
    """Plain causal attention for the time being, on padded passes: transformers' own `sdpa` or `eager`."""
    packed = model.config._attn_implementation
    model.set_attn_implementation(kernel)
    try:
        yield
    finally:
        model.set_attn_implementation(packed)


LEAK = {"float32": 1e-3, "bfloat16": 0.25}
"""Nats a token by which rounding alone may differ; a leak differs by more."""
ROUNDING = 4
"""Times as much as two plain kernels differ on the same tokens may be rounding, too: single tokens of a large policy
are apart by more in bfloat16."""


def refuse_difference(
    packed: Tensor, alone: Sequence[Tensor], again: Sequence[Tensor], settings: Learning, policy: Path
) -> None:
    """Raises RequestError where packed log-probabilities [sequences, tokens] are not those of each sequence alone.

    `alone` and `again` are [tokens] each, of two plain kernels.
    """
    rounding = max((one - other).abs().max().item() for one, other in zip(alone, again, strict=True))
    worst = max((packed[number, : len(one)] - one).abs().max().item() for number, one in enumerate(alone))
    if not worst <= max(LEAK[settings.dtype], ROUNDING * rounding):
        also = "" if settings.sequence_parallel == 1 else " and learning.sequence_parallel=1"
        raise RequestError(
            f"{policy}: packed, its log-probabilities differ by {worst:.3g} nats a token from those of each sequence "
            f"alone (learning.attention={chosen(settings)}); set learning.packing=false{also}"
        )
