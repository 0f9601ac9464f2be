"""Prompts, and the files they come in: JSON lines and Parquet, each row checked."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import RequestError


@dataclass(frozen=True, slots=True)
class Prompt:
    """One task put to the policy; the fields of `schema.PROMPTS` in Python types."""

    prompt_id: str
    task: str
    source: str
    split: str
    messages: tuple[tuple[str, str], ...]
    """(role, content) pairs, as the chat template takes them."""
    answer: str | None = None
    tests: str | None = None

    def chat(self) -> list[dict[str, str]]:
        """Messages in the form that `apply_chat_template` takes."""
        return [{"role": role, "content": content} for role, content in self.messages]


def make_prompt(
    task: str,
    messages: Sequence[tuple[str, str]],
    *,
    answer: str | None = None,
    tests: str | None = None,
    source: str = "",
    split: str = "train",
) -> Prompt:
    """A prompt whose id is the hash of its content: task, messages and reference."""
    content = json.dumps([task, [list(pair) for pair in messages], answer, tests], ensure_ascii=False)
    prompt_id = hashlib.sha256(content.encode()).hexdigest()[:16]
    return Prompt(prompt_id, task, source, split, tuple(messages), answer, tests)


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> int:
    """Writes Parquet with `schema.PROMPTS`, beside its place and renamed into it; returns the rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.rollouts.schema import PROMPTS, SCHEMA_VERSION

    path.parent.mkdir(parents=True, exist_ok=True)
    # Not as `durable` names it: beside rollouts, a driver that begins there would delete that.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    schema = PROMPTS.with_metadata({b"oapl.schema_version": str(SCHEMA_VERSION).encode()})
    rows = 0
    try:
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            for batch in _batches(prompts, 4096):
                columns = [{name: getattr(prompt, name) for name in PROMPTS.names} for prompt in batch]
                for row, prompt in zip(columns, batch, strict=True):
                    row["messages"] = prompt.chat()
                writer.write_table(pa.Table.from_pylist(columns, schema=schema))
                rows += len(batch)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)  # of prompts that broke off
    return rows


def _batches(prompts: Iterable[Prompt], size: int) -> Iterator[list[Prompt]]:
    batch: list[Prompt] = []
    for prompt in prompts:
        batch.append(prompt)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def iter_prompts(path: Path) -> Iterator[Prompt]:
    """Prompts of a JSONL or Parquet file, in order, each checked.

    Raises RequestError that names the file and the line (or row) of the first bad one.
    """
    _refuse_missing(path)
    if path.suffix == ".parquet":
        rows: Iterable[tuple[str, Any]] = _parquet_rows(path)
    elif path.suffix in (".jsonl", ".json"):
        rows = _json_lines(path)
    else:
        raise RequestError(
            f"{path}: prompts are read from .jsonl or .parquet, not {path.suffix or 'a file without suffix'}"
        )
    empty = True
    for where, row in rows:
        empty = False
        yield _checked(row, where, path.stem)
    if empty:
        raise RequestError(f"{path}: no prompts in it")


def _refuse_missing(path: Path) -> None:
    if not path.exists():
        raise RequestError(
            f"no prompt file {path}; give a .jsonl or .parquet file of task, messages (or prompt), and answer or tests"
        )


@dataclass(frozen=True, slots=True)
class PromptFile:
    """The prompts of a file without repeats, read anew each time they are gone through; see `iter_prompts` for errors.

    Memory holds their ids.
    """

    path: Path

    def __post_init__(self) -> None:
        _refuse_missing(self.path)

    def __iter__(self) -> Iterator[Prompt]:
        seen = set[str]()
        for prompt in iter_prompts(self.path):
            if prompt.prompt_id not in seen:
                seen.add(prompt.prompt_id)
                yield prompt


def read_prompts(path: Path) -> list[Prompt]:
    """All prompts of a file without repeats; see `iter_prompts` for errors."""
    return list({prompt.prompt_id: prompt for prompt in iter_prompts(path)}.values())


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8", errors="strict") as lines:
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}, line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise RequestError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
        except UnicodeDecodeError:
            raise RequestError(f"{path}, after line {number}: not UTF-8") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield f"{path}, row {number}", row
                number += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise RequestError(f"{path}: not a Parquet file that can be read ({str(error).splitlines()[0]})") from None


def _checked(row: Any, where: str, source: str) -> Prompt:
    if not isinstance(row, dict):
        raise RequestError(f"{where}: expected an object with task, messages (or prompt), and answer or tests")
    task = row.get("task")
    if not isinstance(task, str) or not task:
        raise RequestError(f"{where}: 'task' must name a verifier, such as math or code")
    messages = _messages(row, where)
    answer, tests = row.get("answer"), row.get("tests")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if answer is not None and not isinstance(answer, str):
        raise RequestError(f"{where}: 'answer' must be text or a number")
    if isinstance(tests, dict):
        tests = json.dumps(tests, ensure_ascii=False)
    if tests is not None and not isinstance(tests, str):
        raise RequestError(f"{where}: 'tests' must be an object or its JSON text")
    if answer is None and tests is None:
        raise RequestError(f"{where}: needs 'answer' (math) or 'tests' (code) to be judged by")
    split = row.get("split") or "train"
    if split not in ("train", "heldout"):
        raise RequestError(f"{where}: 'split' is train or heldout, not {split!r}")
    made = make_prompt(task, messages, answer=answer, tests=tests, source=row.get("source") or source, split=split)
    given = row.get("prompt_id")
    return replace(made, prompt_id=given) if isinstance(given, str) and given else made


def _messages(row: dict[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    messages = row.get("messages") or row.get("prompt")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise RequestError(f"{where}: needs 'messages' (a list of role and content) or 'prompt' (text)")
    return tuple((message["role"], message["content"]) for message in messages)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
