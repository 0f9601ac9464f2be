"""What a form of another project is to us, and how its rows are read: field by field, each named where it is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import RequestError
from pipeline.prompts.files import Prompt


@dataclass(frozen=True, slots=True)
class Trace:
    """One completion of a foreign file, in words that all forms share."""

    prompt: Prompt
    completion: str
    reward: float | None
    prompt_ids: list[int] | None = None
    completion_ids: list[int] | None = None
    logprobs: list[float] | None = None
    finish_reason: str | None = None
    extras: dict[str, Any] | None = None
    """What the form has of a prompt and our tables have no column for; kept beside them for the way back."""


@dataclass(frozen=True, slots=True)
class Form:
    """One project's columns."""

    read: Callable[[Path, str], Iterator[Trace]]
    """(file, task of rows that do not say) -> its completions in order. Raises RequestError that names the row."""
    rows: Callable[[dict[str, Any], list[dict[str, Any]]], list[dict[str, Any]]]
    """(prompt, its rollouts) -> rows of the form."""
    schema: pa.Schema
    lines: bool = False
    """Written as JSON lines instead of Parquet."""


CHAT = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def rows_of(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a Parquet or JSON lines file, streaming."""
    if source.suffix == ".parquet":
        try:
            with pq.ParquetFile(source) as file:
                number = 0
                for batch in file.iter_batches(batch_size=256):
                    for row in batch.to_pylist():
                        yield f"{source}, row {number}", row
                        number += 1
        except (pa.ArrowException, OSError) as error:
            raise RequestError(f"{source}: not Parquet that can be read ({str(error).splitlines()[0]})") from None
        return
    with source.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise RequestError(f"{source}, line {number}: not JSON ({error.msg})") from None
                if not isinstance(row, dict):
                    raise RequestError(f"{source}, line {number}: expected an object with prompt and completion")
                yield f"{source}, line {number}", row


def messages_of(value: Any, where: str, key: str) -> list[tuple[str, str]]:
    if isinstance(value, str):
        return [("user", value)]
    good = isinstance(value, list) and value and all(isinstance(message, dict) for message in value)
    if not good or not all(isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value):
        raise RequestError(f"{where}: {key!r} must be text or a list of messages with role and content")
    return [(message["role"], message["content"]) for message in value]


def text_of(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if isinstance(value, list) and len(value) == 1:  # TRL's conversational form: one assistant message
        value = value[0].get("content") if isinstance(value[0], dict) else value[0]
    if not isinstance(value, str):
        raise RequestError(f"{where}: {key!r} must be text")
    return value


def reward_of(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(f"{where}: the reward must be a finite number, not {value!r}")
    return float(value)


def numbers_of(value: Any, kind: type, where: str, key: str) -> Any:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(v, kind | int) and not isinstance(v, bool) for v in value):
        raise RequestError(f"{where}: {key!r} must be a list of {'numbers' if kind is float else 'token ids'}")
    return value
