"""TRL's columns, as Parquet or JSON lines: prompt, completion, prompt_ids, completion_ids, logprobs, reward."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import RequestError
from pipeline.prompts.files import make_prompt
from pipeline.sharing.exchange.form import CHAT, Form, Trace, messages_of, numbers_of, reward_of, rows_of, text_of


def read(source: Path, task: str) -> Iterator[Trace]:
    for where, row in rows_of(source):
        tests = row.get("tests")
        prompt = make_prompt(
            str(row.get("task") or task),
            messages_of(row.get("prompt", row.get("messages")), where, "prompt"),
            answer=None if row.get("answer") is None else str(row["answer"]),
            tests=tests if tests is None or isinstance(tests, str) else json.dumps(tests, ensure_ascii=False),
            source=str(row.get("source") or source.stem),
        )
        ids = numbers_of(row.get("completion_ids"), int, where, "completion_ids")
        logprobs = numbers_of(row.get("logprobs"), float, where, "logprobs")
        if logprobs is not None and (ids is None or len(ids) != len(logprobs)):
            raise RequestError(f"{where}: 'logprobs' must have one number a token of 'completion_ids'")
        yield Trace(
            prompt,
            text_of(row, "completion", where),
            reward_of(row.get("reward"), where),
            numbers_of(row.get("prompt_ids"), int, where, "prompt_ids"),
            ids,
            logprobs,
            row.get("finish_reason"),
        )


TRL = pa.schema(
    [
        ("prompt", CHAT),
        ("completion", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("reward", pa.float64()),
        ("finish_reason", pa.string()),
        ("task", pa.string()),
        ("answer", pa.string()),
        ("tests", pa.string()),
        ("source", pa.string()),
    ]
)


def rows(prompt: dict[str, Any], rollouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": prompt["messages"],
            "completion": row["completion"],
            "prompt_ids": row["prompt_tokens"],
            "completion_ids": row["completion_tokens"],
            "logprobs": row["logprobs"],
            "reward": row["reward"],
            "finish_reason": row["finish_reason"],
            **{key: prompt[key] for key in ("task", "answer", "tests", "source")},
        }
        for row in rollouts
    ]


FORM = Form(read, rows, TRL)
LINES = Form(read, rows, TRL, lines=True)
"""JSON lines with the same keys."""
