"""verl's Parquet: a row a prompt, with a list of responses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import RequestError
from pipeline.sharing.exchange.form import Form, Trace, reward_of, rows_of
from pipeline.sharing.exchange.verl_columns import SHARED, prompt_of, shared_columns


def read(source: Path, task: str) -> Iterator[Trace]:
    for where, row in rows_of(source):
        prompt, extras = prompt_of(row, where, task)
        responses = row.get("responses")
        if not isinstance(responses, list) or not all(isinstance(text, str) for text in responses):
            raise RequestError(f"{where}: 'responses' must be a list of texts, as verl's generation writes it")
        rewards = row.get("rewards") or row.get("scores") or [None] * len(responses)
        if len(rewards) != len(responses):
            raise RequestError(f"{where}: {len(rewards)} rewards of {len(responses)} responses")
        for text, reward in zip(responses, rewards, strict=True):
            yield Trace(prompt, text, reward_of(reward, where), extras=extras)


VERL = pa.schema([*SHARED, ("responses", pa.list_(pa.string())), ("rewards", pa.list_(pa.float64()))])


def rows(prompt: dict[str, Any], rollouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    texts, rewards = [row["completion"] for row in rollouts], [row["reward"] for row in rollouts]
    return [{**shared_columns(prompt), "responses": texts, "rewards": rewards}]


FORM = Form(read, rows, VERL)
