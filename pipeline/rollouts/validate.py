"""Is a dataset what it says it is? Every check names the shard and the row group it failed in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import RequestError, WorkError
from pipeline.rollouts.locate import Located
from pipeline.rollouts.mirror import local_copy
from pipeline.rollouts.schema import PROMPTS, ROLLOUTS, SCHEMA_VERSION, STATUSES, UNSCORABLE, VERDICTS, FinishReason
from pipeline.rollouts.store import Manifest, Shard, flaw, group_key, read_manifest, split_groups
from pipeline.rollouts.tables import key64, parquet_batches, verdict_files
from pipeline.storage import durable

Decode = Callable[[list[list[int]]], list[str]]
"""Token ids of completions to their texts without special tokens."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, and where."""

    file: str
    row_group: int | None
    what: str

    def __str__(self) -> str:
        place = self.file if self.row_group is None else f"{self.file}, row group {self.row_group}"
        return f"{place}: {self.what}"


@dataclass(slots=True)
class _Seen:
    """What must hold over the whole dataset: 8 bytes a rollout, and the groups' keys."""

    groups: set[tuple[str, int, str]]
    rollouts: list[np.ndarray[Any, Any]]
    complete: bool = True
    """False once a shard could not be read: what is missing then says nothing about verdicts and prompts."""


def validate(place: Located, decode: Decode | None = None) -> Iterator[Problem]:
    """Problems of a dataset, as they are found; none: it is sound.

    Checked are the manifest and its digest, size and checksum of each shard, schema and version, whole groups in
    one shard each, tokens and log-probabilities, counts, ids that occur twice, text against decoded tokens (with
    `decode`), prompts that are missing, and verdicts of rollouts that are not there.
    Raises RequestError for a folder without a manifest or with one of another schema version.
    """
    manifest = read_manifest(place.rollouts)
    seen = _Seen(set(), [])
    for shard in manifest.shards:
        yield from _shard(place.rollouts / shard.file, shard, manifest, seen, decode)
    totals = [(name, sum(getattr(s, name) for s in manifest.shards)) for name in ("rows", "groups", "tokens")]
    for name, total in totals:
        if getattr(manifest, name) != total:
            yield Problem("manifest.json", None, f"{getattr(manifest, name)} {name}, and its shards add up to {total}")
    keys = np.sort(np.concatenate(seen.rollouts)) if seen.rollouts else np.zeros(0, np.uint64)
    twice = int((keys[1:] == keys[:-1]).sum())
    if twice:
        yield Problem("manifest.json", None, f"{twice} rollout_ids occur more than once")
    yield from _prompts(place, {key[2] for key in seen.groups})
    for path in verdict_files(place.verdicts):
        yield from _verdicts(path, keys if seen.complete else None)


def _shard(path: Path, shard: Shard, manifest: Manifest, seen: _Seen, decode: Decode | None) -> Iterator[Problem]:
    readable, seen.complete = seen.complete, False
    path = local_copy(path)
    if not path.is_file():
        yield Problem(shard.file, None, "is in the manifest and missing in the folder")
        return
    size = path.stat().st_size
    if size != shard.bytes:
        yield Problem(shard.file, None, f"has {size} bytes, and the manifest says {shard.bytes}")
    elif durable.sha256_file(path) != shard.sha256:
        yield Problem(shard.file, None, "its checksum is not the manifest's: bytes were changed")
    number = None
    try:
        with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
            problem = _schema_problem(file.schema_arrow)
            if problem:
                yield Problem(shard.file, None, problem)
                return
            counted = [0, 0, 0]
            for number in range(file.num_row_groups):
                table = file.read_row_group(number, use_threads=False)
                yield from (Problem(shard.file, number, what) for what in _row_group(table, manifest, seen, counted))
                yield from (Problem(shard.file, number, what) for what in _texts(table, decode))
    except (
        OSError,
        ValueError,
        MemoryError,
        pa.ArrowException,
    ) as error:  # damaged bytes: what they did to the reader is the finding
        yield Problem(shard.file, number, f"can't be read: {' '.join(str(error).split())}")
        return
    seen.complete = readable
    for name, found in zip(("rows", "groups", "tokens"), counted, strict=True):
        if found != getattr(shard, name):
            yield Problem(shard.file, None, f"holds {found} {name}, and the manifest says {getattr(shard, name)}")


def _schema_problem(schema: pa.Schema) -> str | None:
    version = (schema.metadata or {}).get(b"oapl.schema_version", b"none").decode(errors="replace")
    if version != str(SCHEMA_VERSION):
        return (
            f"is of schema version {version}, and this program reads {SCHEMA_VERSION}; install the oapl that wrote it"
        )
    for field in ROLLOUTS:
        place = schema.get_field_index(field.name)
        if place < 0:
            return f"has no column {field.name!r}"
        if not _same_type(schema.field(place).type, field.type):
            return f"column {field.name!r} is {schema.field(place).type}, not {field.type}"
    return None


def _same_type(found: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_list(found) and pa.types.is_list(wanted):  # Parquet names the items "element", Arrow "item"
        return bool(found.value_type == wanted.value_type)
    return bool(found == wanted)


def _row_group(table: pa.Table, manifest: Manifest, seen: _Seen, counted: list[int]) -> Iterator[str]:
    table = table.select(ROLLOUTS.names)
    for name in ROLLOUTS.names:
        if not ROLLOUTS.field(name).nullable and table[name].null_count:
            yield f"column {name!r} has nulls"
            return
    counted[0] += table.num_rows
    (batch,) = table.cast(ROLLOUTS).combine_chunks().to_batches()
    for group in split_groups(batch):
        counted[1] += 1
        counted[2] += len(pc.list_flatten(group["completion_tokens"]))
        key = group_key(group)
        problem = flaw(group, manifest.samples)
        if problem is None and key in seen.groups:
            problem = "the group's rows are not together: it has others elsewhere"
        if problem is not None:
            yield f"prompt {key[2]}: {problem}"
        seen.groups.add(key)
    reasons = set(batch["finish_reason"].unique().to_pylist()) - set(get_args(FinishReason))
    if reasons:
        yield f"finish_reason {sorted(reasons)[0]!r} is none of {', '.join(get_args(FinishReason))}"
    ours = manifest.provenance
    if not ours.parents and not ours.imported:
        for name in ("snapshot_id", "round", "snapshot_step"):
            others = set(batch[name].unique().to_pylist()) - {getattr(ours, name)}
            if others:
                yield f"{name} {sorted(others)[0]!r}, and the manifest says {getattr(ours, name)!r}"
    seen.rollouts.append(key64(batch["rollout_id"].to_pylist()))


def _texts(table: pa.Table, decode: Decode | None) -> Iterator[str]:
    if decode is None:
        return
    texts = decode(table["completion_tokens"].to_pylist())
    for stored, decoded, name in zip(
        table["completion"].to_pylist(), texts, table["rollout_id"].to_pylist(), strict=True
    ):
        # An engine holds back the bytes of a character that is cut in two at the end; a decoder shows U+FFFD.
        if stored.rstrip("\ufffd") != decoded.rstrip("\ufffd"):
            yield f"rollout {name}: its text is not its decoded tokens"
            return


def _prompts(place: Located, used: set[str]) -> Iterator[Problem]:
    if place.prompts is None:
        yield Problem("prompts.parquet", None, "is missing: nothing can be scored or read without the prompts")
        return
    name, missing = place.prompts.name, set(used)
    twice, known = 0, set[str]()
    try:
        for batch in parquet_batches(place.prompts, ["prompt_id"], PROMPTS):
            for prompt_id in batch["prompt_id"].to_pylist():
                twice += prompt_id in known
                known.add(prompt_id)
    except WorkError as error:
        yield Problem(name, None, str(error))
        return
    missing -= known
    if missing:
        yield Problem(name, None, f"{len(missing)} prompts of the rollouts are missing, such as {min(missing)}")
    if twice:
        yield Problem(name, None, f"{twice} prompt_ids occur more than once")


def _verdicts(path: Path, keys: np.ndarray[Any, Any] | None) -> Iterator[Problem]:
    orphans, example, parts = 0, "", []
    try:
        for number, batch in enumerate(parquet_batches(path, None, VERDICTS)):
            names = batch["rollout_id"].to_pylist()
            found = key64(names)
            parts.append(found)
            lost = np.zeros(len(found), bool) if keys is None else ~np.isin(found, keys)
            if lost.any():
                orphans, example = orphans + int(lost.sum()), example or names[int(lost.argmax())]
            yield from (Problem(path.name, number, what) for what in _verdict_values(batch))
    except (WorkError, RequestError) as error:
        yield Problem(path.name, None, str(error))
        return
    if orphans:
        yield Problem(path.name, None, f"{orphans} verdicts of rollouts that are not there, such as {example}")
    every = np.sort(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)
    twice = int((every[1:] == every[:-1]).sum())
    if twice:
        yield Problem(path.name, None, f"{twice} rollouts are judged more than once in one file")


def _verdict_values(batch: pa.RecordBatch) -> Iterator[str]:
    unknown = set(batch["status"].unique().to_pylist()) - set(STATUSES)
    if unknown:
        yield f"status {sorted(unknown)[0]!r} is none of {', '.join(STATUSES)}"
    unscorable = pc.is_in(batch["status"], pa.array(UNSCORABLE))
    if pc.any(pc.not_equal(unscorable, pc.is_null(batch["reward"]))).as_py():
        yield f"reward is null exactly for {' and '.join(UNSCORABLE)}, and some row breaks this"
    if not pc.all(pc.is_finite(pc.drop_null(batch["reward"])), min_count=0).as_py():
        yield "a reward that is not finite"


def decoder(place: Located, policy: Path | None, manifest: Manifest | None = None) -> Decode | None:
    """The tokenizer's decoding without special tokens: of `policy`, else of the run's snapshot; None: none is at hand.

    Raises RequestError where `policy` has no tokenizer.json.
    """
    from tokenizers import Tokenizer

    folder = policy
    if folder is None and place.snapshots is not None:
        folder = place.snapshots / (manifest or read_manifest(place.rollouts)).provenance.snapshot_id
    if folder is None or (policy is None and not (folder / "tokenizer.json").is_file()):
        return None
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise RequestError(f"{folder}: no tokenizer.json here; give the folder of the policy that made the rollouts")
    tokenizer = Tokenizer.from_file(str(path))
    return lambda rows: list(tokenizer.decode_batch(rows, skip_special_tokens=True))
