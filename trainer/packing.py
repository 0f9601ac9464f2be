"""Packed forward passes: sequences one after another, a group's prompt once, nobody attends across a boundary.

Everything but attention works token by token, so a packed stream needs no padding there at all. Attention is told
by a `Layout` who attends to whom: a completion to its own tokens and to its prompt's, which its whole group
shares. The kernels that read it are in `attention`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Segment = tuple[int, int]
"""(tokens, the segment that is its prefix or -1): a prompt, or a completion behind its prompt."""


BLOCK = 128
"""Rows, and columns, of a block of the flex kernel's mask; its kernels take no smaller ones."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Layout:
    """Who attends to whom in a packed stream; each kernel reads its own part, the rest is empty."""

    buckets: tuple[Tensor, ...] = ()
    """sdpa, eager: [sequences, longest] places in the stream of prompt and completion; padded with the last place."""
    back: Tensor | None = None
    """sdpa, eager: [tokens] place of each token among the buckets' outputs, flattened and joined."""
    keys: Tensor | None = None
    """varlen, flash: [keys] places in the stream of each segment's keys, its prefix's before its own; null where these
    are the stream as it is."""
    query_starts: Tensor | None = None
    key_starts: Tensor | None = None
    """varlen, flash: [segments + 1] int32 offsets into the stream and into `keys`."""
    longest_query: int = 0
    longest_key: int = 0
    segment: Tensor | None = None
    prefix: Tensor | None = None
    """flex: [tokens] segment of each token, and the segment that it may see besides."""
    blocks: tuple[Tensor, ...] = ()
    """flex: of each row of blocks, how many are seen in part [rows], which ones [rows, columns], and the same of those
    that are seen whole; int32, of a list the first so many count."""


def lay_out(segments: Sequence[Segment], attention: str) -> Layout:
    """The layout of segments that lie one after another in the stream."""
    if attention in ("varlen", "flash"):
        return _in_segments(_whole(segments))
    lengths = np.array([length for length, _ in segments])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    if attention == "flex":
        return _in_blocks(segments, lengths, starts)
    places = [np.arange(starts[number], starts[number + 1]) for number in range(len(segments))]
    return _in_buckets(segments, places, int(starts[-1]))


def _whole(segments: Sequence[Segment]) -> list[Segment]:
    """A prompt with one completion, right behind it, is one segment with it: its keys need not be repeated then."""
    uses = Counter(prefix for _, prefix in segments)
    joined: list[Segment] = []
    numbers: dict[int, int] = {}  # of segments, before -> after
    for number, (length, prefix) in enumerate(segments):
        if prefix >= 0 and prefix == number - 1 and uses[prefix] == 1 and segments[prefix][1] < 0:
            joined[-1] = joined[-1][0] + length, -1
        else:
            joined.append((length, numbers.get(prefix, -1)))
        numbers[number] = len(joined) - 1
    return joined


def _in_segments(segments: Sequence[Segment]) -> Layout:
    """Keys of a prompt are repeated for each of its completions, in this layer's attention alone: for completions of
    16 K tokens behind prompts of 500 that is 3 % of the keys, and a mask that shares them would cost more."""
    lengths = np.array([length for length, _ in segments])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    places = [np.arange(starts[number], starts[number + 1]) for number in range(len(segments))]
    keys = [places[number] if prefix < 0 else np.concatenate([places[prefix], places[number]])
            for number, (_, prefix) in enumerate(segments)]  # fmt: skip
    key_starts = np.concatenate([[0], np.cumsum([len(part) for part in keys])])
    return Layout(
        keys=torch.from_numpy(np.concatenate(keys)) if key_starts[-1] > starts[-1] else None,
        query_starts=torch.from_numpy(starts.astype(np.int32)),
        key_starts=torch.from_numpy(key_starts.astype(np.int32)),
        longest_query=int(lengths.max()),
        longest_key=max(len(part) for part in keys),
    )


def _in_blocks(segments: Sequence[Segment], lengths: Any, starts: Any) -> Layout:
    """Which blocks of [tokens, tokens] are seen, and which of them whole, counted by pairs: nothing that large is made.

    The pairs of a segment with itself and with its prefix are disjoint, so a block is seen whole where they add up to
    its area. The ragged end is never whole: the kernel looks token by token there.
    """
    count = -(-int(starts[-1]) // BLOCK)
    seen = np.zeros((count, count), np.int64)
    for number, (_, prefix) in enumerate(segments):
        first, rows = _overlaps(starts[number], starts[number + 1])
        last = first + len(rows)
        pairs = np.tril(np.outer(rows, rows), -1)
        pairs[np.diag_indices(len(rows))] = rows * (rows + 1) // 2
        seen[first:last, first:last] += pairs
        if prefix >= 0:
            left, columns = _overlaps(starts[prefix], starts[prefix + 1])
            seen[first:last, left : left + len(columns)] += np.outer(rows, columns)
    whole = seen == BLOCK * BLOCK
    prefixes = [number if prefix < 0 else prefix for number, (_, prefix) in enumerate(segments)]
    return Layout(
        segment=torch.from_numpy(np.repeat(np.arange(len(segments), dtype=np.int32), lengths)),
        prefix=torch.from_numpy(np.repeat(np.array(prefixes, np.int32), lengths)),
        blocks=(*_listed((seen > 0) & ~whole), *_listed(whole)),
    )


def _overlaps(start: int, end: int) -> tuple[int, Any]:
    """The first block that [start, end) reaches into, and how many places it has of this and each following block."""
    first, last = int(start) // BLOCK, -(-int(end) // BLOCK)
    edges = np.clip(np.arange(first, last + 1) * BLOCK, start, end)
    return first, np.diff(edges)


def _listed(blocks: Any) -> tuple[Tensor, Tensor]:
    """[rows, columns] bool -> how many a row has, and their columns in order, before those that it has not."""
    columns = np.argsort(~blocks, axis=1, kind="stable")
    return torch.from_numpy(blocks.sum(1).astype(np.int32)), torch.from_numpy(columns.astype(np.int32))


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
