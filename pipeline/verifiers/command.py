"""`oapl verify`: judges a file of cases without a model."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import RequestError
from pipeline.storage.durable import replacing
from pipeline.verifiers import find_verifier, judge
from pipeline.verifiers.cases import Case
from pipeline.verifiers.spool import Spool

if TYPE_CHECKING:
    from pipeline.recipe import Verification

COLUMNS = ("id", "status", "reward", "detail", "wall_ms", "verifier", "isolation")


def verify_file(
    file: Path, out: Path, settings: Verification, progress: Callable[[int, int], None] | None = None
) -> dict[str, int]:
    """Judges each line of a JSONL file; writes JSONL or Parquet (by the ending of `out`) in the input's order.

    All lines are read before the first is judged: one that is no case raises RequestError with its number, and
    nothing is written. `progress(done, total)` is called now and then. Returns the number of cases by status.
    """
    if out.suffix not in (".jsonl", ".parquet"):
        raise RequestError(f"{out}: the output must end in .jsonl or .parquet")
    total = sum(1 for _ in _read(file))
    if not out.parent.is_dir():
        raise RequestError(f"{out}: no folder {out.parent}; make it first")
    counts: Counter[str] = Counter()
    with Spool(out.with_name(f".{out.name}.{os.getpid()}.spool")) as spool:
        cases = (Case(str(number), *fields) for number, (_, *fields) in enumerate(_read(file)))
        with contextlib.closing(judge(cases, settings)) as verdicts:  # type: ignore[type-var]
            for verdict in verdicts:
                spool.add(verdict)
                counts[verdict.status] += 1
                if progress is not None:
                    progress(counts.total(), total)
        rows = (
            {**fields, "id": case_id} for (case_id, *_), (_, fields) in zip(_read(file), spool.in_order(), strict=True)
        )
        with replacing(out) as temporary:
            (_write_parquet if out.suffix == ".parquet" else _write_jsonl)(temporary, rows)
    return dict(counts)


def _read(file: Path) -> Iterator[tuple[str, str, str, str | None, Any]]:
    """(id, task, response, answer, tests) of each line. Raises RequestError with the line's number."""
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _fields(line, f"{file}, line {number}")
    except OSError as error:
        raise RequestError(f"{file}: {error.strerror or error}") from None


def _fields(line: bytes, where: str) -> tuple[str, str, str, str | None, Any]:
    try:
        case = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise RequestError(f"{where}: not JSON ({reason})") from None
    if not isinstance(case, dict):
        raise RequestError(f"{where}: expected an object with id, task, response and answer or tests")
    for name in ("id", "task", "response"):
        if name not in case:
            raise RequestError(f"{where}: no {name!r}")
    case_id, task, response = case["id"], case["task"], case["response"]
    if isinstance(case_id, bool) or not isinstance(case_id, str | int):
        raise RequestError(f"{where}: id must be a text or a whole number")
    for name in ("task", "response"):
        if not isinstance(case[name], str):
            raise RequestError(f"{where}: {name} must be a text")
    try:
        find_verifier(task)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from None
    answer, tests = case.get("answer"), case.get("tests")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = json.dumps(answer)
    if answer is not None and not isinstance(answer, str):
        raise RequestError(f"{where}: answer must be a text or a number")
    if tests is not None and not isinstance(tests, str | dict):
        raise RequestError(f"{where}: tests must be an object or its JSON text")
    if (task == "math" and answer is None) or (task == "code" and tests is None):
        raise RequestError(f"{where}: no {'answer' if task == 'math' else 'tests'!r}, which {task} needs")
    return str(case_id), task, response, answer, tests


def _write_jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({name: row[name] for name in COLUMNS}, ensure_ascii=False) + "\n")


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = {"reward": pa.float32(), "wall_ms": pa.float32()}
    schema = pa.schema([(name, numbers.get(name, pa.string())) for name in COLUMNS])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while some := list(itertools.islice(rows, 4096)):
            writer.write_table(pa.Table.from_pylist(some, schema=schema))
