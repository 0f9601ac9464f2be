"""Packed forward passes: sequences one after another, a group's prompt once, nobody attends across a boundary.

Everything but attention works token by token, so a packed stream needs no padding there at all. Attention is told
by a `Layout` who attends to whom: a completion to its own tokens and to its prompt's, which its whole group
shares. Four kernels do the same on different machines; the learner compares a packed pass with plain causal
attention on the policy itself before anything is learned, and refuses a policy for which they differ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import RequestError
from pipeline.recipe import Learning
from trainer import sequence
from trainer.sequence import Share

Segment = tuple[int, int]
"""(tokens, the segment that is its prefix or -1): a prompt, or a completion behind its prompt."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Who attends to whom in a packed stream; each kernel reads its own part, the rest is empty."""

    buckets: tuple[Tensor, ...] = ()
    """sdpa, eager: [sequences, longest] places in the stream of prompt and completion; padded with the last place."""
    back: Tensor | None = None
    """sdpa, eager: [tokens] place of each token among the buckets' outputs, flattened and joined."""
    keys: Tensor | None = None
    """flash: [keys] places in the stream of each segment's keys, its prefix's before its own."""
    query_starts: Tensor | None = None
    key_starts: Tensor | None = None
    """flash: [segments + 1] int32 offsets into the stream and into `keys`."""
    longest_query: int = 0
    longest_key: int = 0
    segment: Tensor | None = None
    prefix: Tensor | None = None
    """flex: [tokens] segment of each token, and the segment that it may see besides."""

    def to(self, device: torch.device) -> Layout:
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                value = tuple(part.to(device) for part in value)
            moved[field.name] = value.to(device) if isinstance(value, Tensor) else value
        return Layout(**moved)


def lay_out(segments: Sequence[Segment], attention: str) -> Layout:
    """The layout of segments that lie one after another in the stream."""
    lengths = np.array([length for length, _ in segments])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    places = [np.arange(starts[number], starts[number + 1]) for number in range(len(segments))]
    if attention == "flash":
        return _for_flash(segments, places, starts)
    if attention == "flex":
        prefixes = [number if prefix < 0 else prefix for number, (_, prefix) in enumerate(segments)]
        owner = np.repeat(np.arange(len(segments)), lengths)
        return Layout(segment=torch.from_numpy(owner), prefix=torch.from_numpy(np.repeat(prefixes, lengths)))
    return _in_buckets(segments, places, int(starts[-1]))


def _for_flash(segments: Sequence[Segment], places: Sequence[np.ndarray[Any, Any]], starts: Any) -> Layout:
    keys = [places[number] if prefix < 0 else np.concatenate([places[prefix], places[number]])
            for number, (_, prefix) in enumerate(segments)]  # fmt: skip
    key_starts = np.concatenate([[0], np.cumsum([len(part) for part in keys])])
    return Layout(
        keys=torch.from_numpy(np.concatenate(keys)),
        query_starts=torch.from_numpy(starts.astype(np.int32)),
        key_starts=torch.from_numpy(key_starts.astype(np.int32)),
        longest_query=max(length for length, _ in segments),
        longest_key=max(len(part) for part in keys),
    )


def _in_buckets(segments: Sequence[Segment], places: Sequence[np.ndarray[Any, Any]], tokens: int) -> Layout:
    """Whole sequences (prompt, then completion) gathered into rows of like length.

    A prompt's attention is computed once a completion here, which is little beside the layers that are not: the
    kernels need no mask for it, and are fast without one.
    """
    used = {prefix for _, prefix in segments if prefix >= 0}
    rows = []
    for number, (_, prefix) in enumerate(segments):
        if prefix >= 0:
            rows.append((np.concatenate([places[prefix], places[number]]), len(places[prefix])))
        elif number not in used:
            rows.append((places[number], 0))
    rows.sort(key=lambda row: -len(row[0]))
    back = np.full(tokens, -1, np.int64)
    buckets: list[Tensor] = []
    first = offset = 0
    while first < len(rows):
        longest = len(rows[first][0])
        last = first
        while last < len(rows) and len(rows[last][0]) * 5 // 4 + 32 >= longest:
            last += 1
        bucket = np.empty((last - first, longest), np.int64)
        for line, (row, prefix_length) in enumerate(rows[first:last]):
            bucket[line, : len(row)] = row
            bucket[line, len(row) :] = row[-1]
            place = offset + line * longest + np.arange(len(row))
            back[row[prefix_length:]] = place[prefix_length:]
            if prefix_length and back[row[0]] < 0:
                back[row[:prefix_length]] = place[:prefix_length]
        buckets.append(torch.from_numpy(bucket))
        offset += bucket.size
        first = last
    return Layout(buckets=tuple(buckets), back=torch.from_numpy(back))


Kernel = Callable[[Tensor, Tensor, Tensor, float, Layout], Tensor]
"""(query [tokens, heads, size], key and value [tokens, key heads, size], scale, layout) -> [tokens, heads, size]"""


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
