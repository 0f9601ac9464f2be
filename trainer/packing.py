"""Packed forward passes: sequences one after another, a group's prompt once, nobody attends across a boundary.

Everything but attention works token by token, so a packed stream needs no padding there at all. Attention is told
by a `Layout` who attends to whom: a completion to its own tokens and to its prompt's, which its whole group
shares. The kernels that read it are in `attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
