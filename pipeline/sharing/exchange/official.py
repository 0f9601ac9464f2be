"""The OAPL repository's Parquet: a row a response, with the group's rewards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.sharing.exchange.form import Form, Trace, reward_of, rows_of, text_of
from pipeline.sharing.exchange.verl_columns import SHARED, prompt_of, shared_columns


def read(source: Path, task: str) -> Iterator[Trace]:
    for where, row in rows_of(source):
        prompt, extras = prompt_of(row, where, task)
        reward = reward_of(row.get("precomputed_reward"), where)
        yield Trace(prompt, text_of(row, "response", where), reward, extras=extras)


OFFICIAL = pa.schema(
    [
        *SHARED,
        ("response", pa.string()),
        ("precomputed_reward", pa.float64()),
        ("response_rewards", pa.list_(pa.float64())),
    ]
)
"""Columns of the official repository's `verl/trainer/generate_offline_dataset.py` (danieldritter/OAPL)."""


def rows(prompt: dict[str, Any], rollouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    shared, rewards = shared_columns(prompt), [row["reward"] for row in rollouts]
    return [
        {**shared, "response": row["completion"], "precomputed_reward": row["reward"], "response_rewards": rewards}
        for row in rollouts
    ]


FORM = Form(read, rows, OFFICIAL)
