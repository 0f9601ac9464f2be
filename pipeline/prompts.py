"""Prompt sets: reading people's files, the embedded tasks, and what a round takes of them."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Literal

from pipeline import tiny
from pipeline.errors import RequestError
from pipeline.recipe import Recipe


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


def build_prompt_set(recipe: Recipe, out: Path) -> dict[str, int]:
    """Writes the run's prompt set, train and held out, and returns the count of each split.

    No prompt is in both: held-out prompts are taken first, and a training prompt with the
    content or the messages of a held-out one is left out. With `prompts.max_tokens`, too long training prompts are
    left out, and counted as `too_long`.
    """
    settings = recipe.prompts
    train = _source(settings.train, "train", recipe)
    if settings.heldout is None:
        train = _shuffled(train, recipe.seed)
        if len(train) <= settings.heldout_count:
            raise RequestError(
                f"{settings.train}: {len(train)} prompts are not enough to hold out {settings.heldout_count}; "
                "lower prompts.heldout_count"
            )
        heldout, train = train[: settings.heldout_count], train[settings.heldout_count :]
    else:
        heldout = _source(settings.heldout, "heldout", recipe)[: settings.heldout_count]
    heldout = [replace(prompt, split="heldout") for prompt in heldout]
    taken = {prompt.prompt_id for prompt in heldout} | {repr(prompt.messages) for prompt in heldout}
    train = [replace(p, split="train") for p in train if p.prompt_id not in taken and repr(p.messages) not in taken]
    if not train:
        raise RequestError(f"{settings.train}: no training prompt is left beside the held-out ones")
    counts = {"heldout": len(heldout)}
    if settings.max_tokens is not None:
        short = _short_enough(train, settings.max_tokens, recipe.policy.model)
        if not short:
            raise RequestError(f"{settings.train}: no training prompt has {settings.max_tokens} tokens or fewer")
        counts["too_long"] = len(train) - len(short)
        train = short
    write_prompts(out, [*train, *heldout])
    return {"train": len(train), **counts}


def _short_enough(prompts: Sequence[Prompt], most: int, model: str | None) -> list[Prompt]:
    if model is None:
        raise RequestError("prompts.max_tokens needs policy.model, whose tokenizer counts; set it to null")
    from transformers import AutoTokenizer

    from pipeline.remote import fetch_policy
    from pipeline.rollouts.places import is_url

    try:
        tokenizer = AutoTokenizer.from_pretrained(fetch_policy(model) if is_url(model) else model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RequestError(f"policy.model {model}: no tokenizer to count prompts.max_tokens with ({reason})") from None
    return [
        prompt
        for prompt in prompts
        if len(tokenizer.apply_chat_template(prompt.chat(), add_generation_prompt=True, return_dict=False)) <= most
    ]


def _source(name: str, split: Literal["train", "heldout"], recipe: Recipe) -> list[Prompt]:
    if name != "tiny":
        from pipeline.remote import fetch_prompts

        found = read_prompts(fetch_prompts(name))
        # A file without marks is all of the split it is named for; a marked one gives its part.
        return [prompt for prompt in found if prompt.split == split] or found
    settings = recipe.prompts
    wanted = settings.heldout_count if split == "heldout" else settings.per_round * max(recipe.rounds, 8)
    return [
        make_prompt(p.task, [("user", p.text)], answer=p.answer, tests=p.tests, source=p.source, split=split)
        for p in tiny.problems(recipe.seed, split, wanted)
    ]


def _shuffled(prompts: list[Prompt], seed: int) -> list[Prompt]:
    order = sorted(prompts, key=lambda prompt: prompt.prompt_id)
    random.Random(seed).shuffle(order)
    return order


def round_prompts(prompt_set: Path, round: int, per_round: int, seed: int) -> list[Prompt]:
    """The training prompts of one round: the next `per_round` of an endless, seeded shuffle.

    Each pass over the set is shuffled anew, so that a prompt comes back only when all others have been used.
    """
    train = [prompt for prompt in iter_prompts(prompt_set) if prompt.split == "train"]
    lap, place = divmod(round * min(per_round, len(train)), len(train))
    stream = chain.from_iterable(_shuffled(train, seed + number) for number in count(lap))
    taken: dict[str, Prompt] = {}
    for prompt in islice(stream, place, None):
        if len(taken) == min(per_round, len(train)):
            break
        taken.setdefault(prompt.prompt_id, prompt)
    return list(taken.values())
