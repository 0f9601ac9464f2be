"""Rows that belong together: where a group begins and ends, and what it is called."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

GROUP_KEY = ("snapshot_id", "round", "prompt_id")
"""Rows equal in these columns are one group: completions of one prompt by one behaviour policy."""


def group_starts(batch: pa.RecordBatch | pa.Table) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Offsets of the rows that begin a group: ascending, the first is 0; empty for no rows."""
    if batch.num_rows == 0:
        return np.zeros(0, np.int64)
    changed = np.zeros(batch.num_rows - 1, bool)
    for name in GROUP_KEY:
        column = batch[name]
        changed |= pc.not_equal(column[1:], column[:-1]).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.flatnonzero(changed) + 1])


def split_groups(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """The batch's groups one by one, as views."""
    starts = [*group_starts(batch).tolist(), batch.num_rows]
    for start, end in itertools.pairwise(starts):
        yield batch.slice(start, end - start)


def group_key(group: pa.RecordBatch) -> tuple[str, int, str]:
    """(snapshot_id, round, prompt_id) of a batch that is one group."""
    return tuple(group[name][0].as_py() for name in GROUP_KEY)  # type: ignore[return-value]
