"""Prompts and verdicts beside the rollouts, read in little memory: 13 bytes a verdict, a few words a prompt."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import RequestError, WorkError
from pipeline.rollouts.schema import PROMPTS, STATUSES, VERDICTS

UNJUDGED = len(STATUSES)
"""Status code of a rollout without a verdict."""
STATUS_NAMES = (*STATUSES, "unjudged")

_HEX = frozenset(b"0123456789abcdef")


def key64(ids: Iterable[str]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Rollout ids as 64-bit keys: the id itself where it is 16 hex digits (ours are), else a hash of it."""
    texts = list(ids)
    joined = "".join(texts)
    if all(len(text) == 16 for text in texts) and joined.isascii() and _HEX.issuperset(joined.encode()):
        return np.frombuffer(bytes.fromhex(joined), ">u8").astype(np.uint64)
    return np.array([one_key64(text) for text in texts], np.uint64)


def one_key64(text: str) -> int:
    """The same of one id."""
    if len(text) == 16 and text.isascii() and _HEX.issuperset(text.encode()):
        return int(text, 16)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def parquet_batches(path: Path, columns: Sequence[str] | None, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """One Parquet file, cast to the schema's columns. Raises WorkError that names a file that can't be read."""
    names = list(schema.names if columns is None else columns)
    wanted = pa.schema([schema.field(name) for name in names])
    try:
        with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
            missing = [name for name in names if name not in file.schema_arrow.names]
            if missing:
                raise WorkError(f"{path}: has no column {missing[0]!r}; take the file from its source again")
            for batch in file.iter_batches(batch_size=4096, columns=names, use_threads=False):
                yield from pa.Table.from_batches([batch]).select(names).cast(wanted).to_batches()
    except (
        OSError,
        ValueError,
        MemoryError,
        pa.ArrowException,
    ) as error:  # a damaged file is the reader's to mend: say which
        reason = " ".join(str(error).split())
        raise WorkError(f"{path}: can't be read ({reason}); run `oapl rollouts validate`") from error


def rows_with(batch: pa.RecordBatch, column: str, wanted: Container[str]) -> list[dict[str, Any]]:
    """The batch's rows whose `column` is in `wanted`; the others are never made into Python objects."""
    chosen = [number for number, value in enumerate(batch[column].to_pylist()) if value in wanted]
    rows: list[dict[str, Any]] = batch.take(pa.array(chosen, pa.int64())).to_pylist()
    return rows


def prompt_batches(path: Path | None, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    if path is not None:
        yield from parquet_batches(path, columns, PROMPTS)


@dataclass(frozen=True, slots=True)
class PromptFacts:
    """What statistics and filters need to know of a prompt."""

    task: str
    source: str
    split: str


def prompt_facts(path: Path | None) -> dict[str, PromptFacts]:
    """prompt_id to task, source and split; equal texts are stored once."""
    facts: dict[str, PromptFacts] = {}
    same: dict[PromptFacts, PromptFacts] = {}
    for batch in prompt_batches(path, ["prompt_id", "task", "source", "split"]):
        for prompt_id, *words in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            fact = PromptFacts(*words)
            facts[prompt_id] = same.setdefault(fact, fact)
    return facts


class PromptShelf:
    """Whole prompts by id, kept in a temporary file: memory holds ids and places, not messages and tests."""

    def __init__(self, path: Path | None) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed on leaving the context)
        self._places: dict[str, int] = {}
        for batch in prompt_batches(path):
            for row in batch.to_pylist():
                self._places.setdefault(row["prompt_id"], self._file.tell())
                self._file.write(json.dumps(row).encode() + b"\n")

    def find(self, prompt_id: str) -> dict[str, Any] | None:
        """The row of PROMPTS, or None."""
        if prompt_id not in self._places:
            return None
        self._file.seek(self._places[prompt_id])
        row: dict[str, Any] = json.loads(self._file.readline())
        return row

    def __enter__(self) -> PromptShelf:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


UNKNOWN_PROMPT = PromptFacts("unknown", "unknown", "unknown")


def verdict_files(folder: Path | None) -> list[Path]:
    """Verdict files of a round, newest last: of several verdicts of a rollout the newest file's stands."""
    if folder is None:
        return []
    return sorted(folder.glob("[!.]*.parquet"), key=lambda path: (path.stat().st_mtime_ns, path.name))


def files_of_version(folder: Path | None, version: str) -> list[Path]:
    """The same with those of that verifier version last, so that they stand; other verifiers keep their newest.

    Raises RequestError where no file is of that version.
    """
    files = verdict_files(folder)
    versions = {path: judged_by(path)[1] for path in files}
    chosen = [path for path in files if versions[path] == version]
    if not chosen:
        found = ", ".join(sorted(filter(None, set(versions.values())))) or "none"
        raise RequestError(f"{folder}: no verdicts of verifier version {version!r}; there are {found}")
    return [path for path in files if path not in chosen] + chosen


def judged_by(path: Path) -> tuple[str, str] | tuple[None, None]:
    """Verifier and version of a verdict file, by its first row; of an empty one neither."""
    with pq.ParquetFile(path) as file:
        first = next(file.iter_batches(batch_size=1, columns=["verifier", "verifier_version"]), None)
    return (None, None) if first is None else (str(first[0][0].as_py()), str(first[1][0].as_py()))


def keep_order(files: Sequence[Path]) -> None:
    """Gives copies of verdict files, oldest first, times of change in that order."""
    for number, path in enumerate(files):
        moment = path.stat().st_mtime_ns + number * 1_000_000
        os.utime(path, ns=(moment, moment))


def verdict_batches(
    folder: Path | None, columns: Sequence[str] | None = None, version: str | None = None
) -> Iterator[pa.RecordBatch]:
    """Verdicts of all files, in their order; a rollout may have several, one a verifier version.

    The last one stands: the newest, or that of `version`.
    """
    for path in verdict_files(folder) if version is None else files_of_version(folder, version):
        yield from parquet_batches(path, columns, VERDICTS)


class VerdictIndex:
    """Status and reward by rollout_id in sorted arrays: 13 bytes a verdict, looked up a batch at a time."""

    def __init__(self, folder: Path | None, version: str | None = None) -> None:
        keys, statuses, rewards = [], [], []
        codes = {name: code for code, name in enumerate(STATUSES)}
        for batch in verdict_batches(folder, ["rollout_id", "status", "reward"], version):
            keys.append(key64(batch["rollout_id"].to_pylist()))
            statuses.append(np.array([codes.get(name, UNJUDGED) for name in batch["status"].to_pylist()], np.uint8))
            rewards.append(batch["reward"].to_numpy(zero_copy_only=False).astype(np.float32))
        self.keys = np.concatenate(keys) if keys else np.zeros(0, np.uint64)
        # A stable sort keeps a later verifier's verdict behind an earlier one's, where the search finds it.
        order = np.argsort(self.keys, kind="stable")
        self.keys = self.keys[order]
        self._statuses = np.concatenate(statuses)[order] if keys else np.zeros(0, np.uint8)
        self._rewards = np.concatenate(rewards)[order] if keys else np.zeros(0, np.float32)

    def lookup(self, ids: Iterable[str]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Status codes (see STATUS_NAMES) and rewards (NaN where unscorable or unjudged), one a rollout."""
        wanted = key64(ids)
        if not len(self.keys):
            return np.full(len(wanted), UNJUDGED, np.uint8), np.full(len(wanted), np.nan, np.float32)
        place = np.searchsorted(self.keys, wanted, side="right") - 1
        found = (place >= 0) & (self.keys[place] == wanted)
        statuses = np.where(found, self._statuses[place], UNJUDGED).astype(np.uint8)
        return statuses, np.where(found, self._rewards[place], np.nan).astype(np.float32)
