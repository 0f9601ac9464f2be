"""Groups of Python lists into Arrow, as fast as Python lists allow: one pass over the numbers, one join a shard."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.rollouts.schema import ROLLOUTS, Rollout

_LISTS = ("prompt_tokens", "completion_tokens", "logprobs")
_PLAIN = tuple(name for name in ROLLOUTS.names if name not in _LISTS)
_plain = attrgetter(*_PLAIN)
_ID, _SNAPSHOT, _ROUND, _PROMPT, _SAMPLE = map(
    _PLAIN.index, ("rollout_id", "snapshot_id", "round", "prompt_id", "sample")
)


@dataclass(frozen=True, slots=True)
class Packed:
    """A group with its tokens and log-probabilities as machine numbers: a sixth of the memory of Python lists."""

    plain: list[tuple[Any, ...]]
    """The columns that are no lists, a tuple a row."""
    numbers: tuple[array[Any], array[Any], array[Any]]
    """Prompt tokens, completion tokens and log-probabilities of all rows, one row after the other."""
    lengths: tuple[list[int], list[int], list[int | None]]
    """Of each row; null: no log-probabilities."""

    @property
    def rows(self) -> int:
        return len(self.plain)

    @property
    def nbytes(self) -> int:
        texts = sum(len(row[_PLAIN.index("completion")]) for row in self.plain)
        return texts + sum(4 * len(values) for values in self.numbers) + 100 * self.rows

    @property
    def key(self) -> tuple[str, int, str]:
        """(snapshot_id, round, prompt_id)."""
        first = self.plain[0]
        return first[_SNAPSHOT], first[_ROUND], first[_PROMPT]


def pack(rollouts: Sequence[Rollout]) -> Packed:
    prompts = [rollout.prompt_tokens for rollout in rollouts]
    completions = [rollout.completion_tokens for rollout in rollouts]
    logprobs = [rollout.logprobs for rollout in rollouts]
    return Packed(
        list(map(_plain, rollouts)),
        (_joined("i", prompts), _joined("i", completions), _joined("f", logprobs)),
        ([*map(len, prompts)], [*map(len, completions)], [None if row is None else len(row) for row in logprobs]),
    )


def _joined(code: Literal["i", "f"], rows: Sequence[Any]) -> array[Any]:
    values = array(code)
    if rows and isinstance(rows[0], list) and all(row is rows[0] for row in rows):
        values.fromlist(rows[0])  # a group's prompt, most of the time
        return values * len(rows)
    for row in rows:
        if isinstance(row, list):
            values.fromlist(row)
        elif row is not None:
            values.extend(row)
    return values


def packed_flaw(group: Packed, samples: int | None) -> str | None:
    """What is wrong with what should be one whole group; None: nothing. The same as `store.flaw` says of Arrow."""
    rows = group.rows
    if rows == 0:
        return "a group without rows"
    if any((row[_SNAPSHOT], row[_ROUND], row[_PROMPT]) != group.key for row in group.plain):
        return "rows of more than one group"
    if samples is not None and rows != samples:
        return f"{rows} rows where each group has {samples}"
    for place, name in ((_SAMPLE, "sample number"), (_ID, "rollout_id")):
        if len({row[place] for row in group.plain}) != rows:
            return f"a {name} twice"
    for values, name in zip(group.numbers[:2], _LISTS, strict=False):
        least = min(0, int(np.frombuffer(values, np.int32).min(initial=0)))
        if least < 0:
            return f"a negative token id ({least}) in {name}"
    _, completions, logprobs = group.lengths
    if any(found is not None and found != length for found, length in zip(logprobs, completions, strict=True)):
        return "log-probabilities and completion tokens of different lengths"
    return logprob_flaw(np.frombuffer(group.numbers[2], np.float32))


def logprob_flaw(values: np.ndarray[Any, Any]) -> str | None:
    """What can't be a log-probability of a sampled token; None: all can."""
    if not np.isfinite(values).all():
        return "a log-probability that is not finite"
    greatest = float(values.max(initial=-1.0))
    # Log-softmax in float32 may end a rounding above zero.
    return f"a log-probability above zero ({greatest:.3g})" if greatest > 1e-3 else None


def unpack(groups: Sequence[Packed]) -> pa.RecordBatch:
    """All groups as one batch of the schema ROLLOUTS, in their order; at most 2**31 tokens."""
    plain = dict(zip(_PLAIN, zip(*chain.from_iterable(group.plain for group in groups), strict=True), strict=True))
    columns = []
    for field in ROLLOUTS:
        if field.name in _LISTS:
            place = _LISTS.index(field.name)
            lengths = list(chain.from_iterable(group.lengths[place] for group in groups))
            data = b"".join(group.numbers[place] for group in groups)
            columns.append(_list_array(field.type, lengths, data))
        else:
            columns.append(pa.array(plain.get(field.name, ()), field.type))
    return pa.record_batch(columns, schema=ROLLOUTS)


def _list_array(kind: pa.ListType, lengths: list[int | None], data: bytes) -> pa.Array:
    nulls = [length is None for length in lengths]
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum([length or 0 for length in lengths], out=offsets[1:])
    flat = pa.Array.from_buffers(kind.value_type, len(data) // 4, [None, pa.py_buffer(data)])
    mask = pa.array(nulls) if any(nulls) else None
    return pa.ListArray.from_arrays(pa.array(offsets), flat, type=kind, mask=mask)


def as_batch(rollouts: Sequence[Rollout]) -> pa.RecordBatch:
    """The rollouts as one batch of the schema ROLLOUTS."""
    return unpack([pack(rollouts)])
