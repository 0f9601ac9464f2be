"""Rollout datasets on a disk: shards of Parquet and the manifest that says which of them exist.

    folder/
      manifest.json        replaced in one step; what it does not list does not exist
      part-00000.parquet   whole groups, sorted by prompt; never rewritten
      .lock                held by the one writer

A group is generated once: it exists from the moment its shard is in the manifest, and a writer that
finds a manifest goes on after it. Reading and writing stream; memory does not grow with the dataset.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import RequestError, WorkError
from pipeline.rollouts import durable
from pipeline.rollouts.packing import Packed, logprob_flaw, pack, packed_flaw, unpack
from pipeline.rollouts.schema import ROLLOUTS, SCHEMA_VERSION, Rollout

MANIFEST = "manifest.json"
GROUP_KEY = ("snapshot_id", "round", "prompt_id")
"""Rows equal in these columns are one group: completions of one prompt by one behaviour policy."""

ROW_GROUP_ROWS = 512
ROW_GROUP_BYTES = 16 << 20
SHARD_BYTES = 128 << 20
"""Long completions close a row group and a shard before the rows do, so that memory stays flat."""

_DICTIONARY = ["snapshot_id", "prompt_id", "finish_reason"]
_SPLIT = ["prompt_tokens.list.element", "completion_tokens.list.element", "logprobs.list.element"]
"""Columns stored with byte-stream-split: bytes of one significance together, which is what zstd can use."""
_LEVELS = {"completion": 3, **dict.fromkeys(_SPLIT, 1)}
"""zstd levels, measured (docs/decisions/store.md): numbers gain nothing by a higher one."""

RESUME_IGNORES = frozenset({"recipe", "code_version", "parents"})
"""Provenance that may differ on resume: none of it changes what a prompt's completions are drawn from."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)


class Provenance(_Part):
    """Where a dataset's rows come from. Written by generation or import; read by whoever is given the data."""

    snapshot_id: str
    snapshot_sha256: str
    snapshot_step: int
    round: int
    sampling: dict[str, Any]
    """samples, temperature, top_p, top_k, max_tokens, and the seed they start from."""
    logprobs_mode: str
    """`processed_logprobs`: after temperature, top-p and top-k; `missing`: to be recomputed before learning."""
    engine: str
    engine_version: str
    tokenizer_sha256: str
    chat_template_sha256: str
    recipe: dict[str, Any] | None = None
    code_version: str
    prompts_sha256: str
    parents: list[dict[str, Any]] = []
    """Datasets this one was cut or joined from, each with its digest and the operation."""
    imported: dict[str, Any] | None = None
    """Of data that came in a foreign format: the format, the source, and whether it was re-tokenised."""


class Shard(_Part):
    file: str
    rows: int
    groups: int
    bytes: int
    sha256: str
    tokens: int
    """Completion tokens, not prompt tokens."""


class Manifest(_Part):
    """All that exists of a dataset. `digest` is over everything else in it, so over every byte of every shard."""

    version: int = SCHEMA_VERSION
    table: Literal["rollouts"] = "rollouts"
    provenance: Provenance
    samples: int | None
    """Completions of each group; null where groups differ (imports, filters)."""
    shards: list[Shard] = []
    rows: int = 0
    groups: int = 0
    tokens: int = 0
    digest: str = ""

    def sealed(self) -> Manifest:
        """The same with its digest."""
        content = json.dumps(self.model_dump(mode="json", exclude={"digest"}), sort_keys=True)
        return self.model_copy(update={"digest": hashlib.sha256(content.encode()).hexdigest()})

    def with_shard(self, shard: Shard) -> Manifest:
        return self.model_copy(
            update={
                "shards": [*self.shards, shard],
                "rows": self.rows + shard.rows,
                "groups": self.groups + shard.groups,
                "tokens": self.tokens + shard.tokens,
            }
        ).sealed()

    def save(self, folder: Path) -> None:
        durable.write_durably(folder / MANIFEST, (self.model_dump_json(indent=1) + "\n").encode())


def read_manifest(folder: Path) -> Manifest:
    """The folder's manifest, its digest checked.

    Raises RequestError in one line where there is none, where it is of another schema version, and where
    it was changed by other hands.
    """
    path = Path(folder) / MANIFEST
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RequestError(f"{folder}: no {MANIFEST} here, so no rollout dataset; give a folder that has one") from None
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{path}: can't be read ({' '.join(str(error).split())}); take the dataset from its source again"
        ) from None
    version = tree.get("version") if isinstance(tree, dict) else None
    if version != SCHEMA_VERSION:
        raise RequestError(
            f"{path}: schema version {version!r}, and this program reads version {SCHEMA_VERSION}; "
            "install the oapl release that wrote it, or export the dataset with that release again"
        )
    try:
        manifest = Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RequestError(f"{path}: {where}: {first['msg']}; take the dataset from its source again") from None
    if manifest.sealed().digest != manifest.digest:
        raise RequestError(f"{path}: its digest does not fit its content; take the dataset from its source again")
    return manifest


def file_metadata(provenance: Provenance) -> dict[str, str]:
    """Key-value metadata of every shard, so that a single file still says what it is."""
    return {
        "oapl.schema_version": str(SCHEMA_VERSION),
        "oapl.table": "rollouts",
        "oapl.provenance": provenance.model_dump_json(),
    }


def _differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> list[str]:
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += _differences(before, after, f"{where}{key}.")
        elif before != after:
            lines.append(f"{where}{key}: {before} there, {after} now")
    return lines


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


def flaw(group: pa.RecordBatch, samples: int | None) -> str | None:
    """What is wrong with a batch that should be one whole group; None: nothing. Read by the writer and by validate."""
    rows = group.num_rows
    if rows == 0:
        return "a group without rows"
    if len(group_starts(group)) != 1:
        return "rows of more than one group"
    if samples is not None and rows != samples:
        return f"{rows} rows where each group has {samples}"
    if len(set(group["sample"].to_pylist())) != rows:
        return "a sample number twice"
    if len(set(group["rollout_id"].to_pylist())) != rows:
        return "a rollout_id twice"
    return token_flaw(group)


def token_flaw(batch: pa.RecordBatch) -> str | None:
    """What is wrong with tokens and log-probabilities of any batch of rows; None: nothing."""
    for name in ("prompt_tokens", "completion_tokens"):
        least = pc.min(pc.list_flatten(batch[name])).as_py()
        if least is not None and least < 0:
            return f"a negative token id ({least}) in {name}"
    logprobs = batch["logprobs"]
    if logprobs.null_count < len(logprobs):
        lengths = pc.list_value_length(logprobs), pc.list_value_length(batch["completion_tokens"])
        if pc.any(pc.not_equal(*lengths)).as_py():
            return "log-probabilities and completion tokens of different lengths"
        return logprob_flaw(pc.list_flatten(logprobs).to_numpy(zero_copy_only=False))
    return None


class RolloutWriter:
    """Appends whole groups to a folder's dataset; a context manager that holds the folder's lock.

    A shard is written when it holds at least `shard_rows` rows, by a thread of its own while the next groups come in;
    no second one is begun before it is committed, so that memory holds two shards at most. Leaving the context commits
    the rest, also with an exception: a group that is whole is worth keeping. `samples` None admits groups of any size.

    Raises RequestError where another writer holds the folder, or where a dataset of other settings is there
    (it names the difference), and WorkError where the file system refuses; what was committed stays valid.
    """

    committed: set[str]
    """prompt_ids whose whole group is in the manifest; it grows as shards are committed."""

    def __init__(self, folder: Path, provenance: Provenance, *, samples: int | None, shard_rows: int = 4096) -> None:
        self.folder = Path(folder)
        self._provenance, self._samples, self._shard_rows = provenance, samples, shard_rows
        self._buffer: list[Packed | pa.RecordBatch] = []
        self._rows = self._bytes = 0
        self._writing: tuple[Future[Manifest], set[str]] | None = None
        self._failed = False
        self._thread = ThreadPoolExecutor(1, "rollout-shard")
        with durable.told_in_one_line(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = durable.FolderLock(self.folder)
        try:
            with durable.told_in_one_line(self.folder):
                self._opened = self._identity()
                self.manifest = self._open()
        except BaseException:
            self._lock.release()
            raise

    def _identity(self) -> tuple[int, int]:
        """Device and inode: after an unmount the path leads to the empty mount point, where a shard would be lost."""
        status = self.folder.stat()
        return status.st_dev, status.st_ino

    def _open(self) -> Manifest:
        """The manifest to go on from: the one that is there, or a new and empty one."""
        self.committed, self._keys = set(), set[tuple[str, int, str]]()
        if not (self.folder / MANIFEST).exists():
            if any(self.folder.glob("part-*.parquet")):
                raise RequestError(f"{self.folder}: holds Parquet files and no {MANIFEST}; choose another folder")
            manifest = Manifest(provenance=self._provenance, samples=self._samples).sealed()
            manifest.save(self.folder)
            return manifest
        manifest = read_manifest(self.folder)
        self._refuse_other_settings(manifest)
        self._sweep(manifest)
        for shard in manifest.shards:
            path = self.folder / shard.file
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise RequestError(f"{path}: not the {shard.bytes} bytes of the manifest; run `oapl rollouts validate`")
            table = pq.read_table(path, columns=list(GROUP_KEY))
            for start in group_starts(table).tolist():
                self._remember(tuple(table[name][start].as_py() for name in GROUP_KEY))  # type: ignore[arg-type]
        return manifest

    def _refuse_other_settings(self, manifest: Manifest) -> None:
        old = manifest.provenance.model_dump(mode="json", exclude=set(RESUME_IGNORES))
        new = self._provenance.model_dump(mode="json", exclude=set(RESUME_IGNORES))
        differences = _differences(old | {"group size": manifest.samples}, new | {"group size": self._samples})
        if differences:
            raise RequestError(
                f"{self.folder}: holds a dataset of other settings ({'; '.join(differences)}); "
                "choose another folder, or the settings it was begun with"
            )

    def _sweep(self, manifest: Manifest) -> None:
        """Deletes what a killed writer left: temporary files, and shards that never came into the manifest."""
        listed = {shard.file for shard in manifest.shards}
        for path in self.folder.iterdir():
            orphan = path.name.startswith("part-") and path.suffix == ".parquet" and path.name not in listed
            if path.name.startswith(durable.TEMPORARY) or orphan:
                path.unlink()

    def _remember(self, key: tuple[str, int, str]) -> None:
        self._keys.add(key)
        self.committed.add(key[2])

    def add_group(self, rollouts: Sequence[Rollout]) -> None:
        """Takes one whole group, in the order of its samples.

        Raises WorkError where it is not one (see `flaw`) or where the dataset has it already.
        """
        group = pack(rollouts)
        self._add(group, group.key if group.rows else None, packed_flaw(group, self._samples), group.rows)

    def add_batch(self, batch: pa.RecordBatch) -> None:
        """Takes one whole group as a batch of the schema ROLLOUTS."""
        rows = batch.num_rows
        self._add(batch, group_key(batch) if rows else None, flaw(batch, self._samples), rows)

    def _add(
        self, group: Packed | pa.RecordBatch, key: tuple[str, int, str] | None, problem: str | None, rows: int
    ) -> None:
        if problem is None and key in self._keys:
            problem = "the dataset has this group already"
        if problem is not None or key is None:
            prompt = f", prompt {key[2]}" if key else ""
            raise WorkError(f"{self.folder}: group refused{prompt}: {problem}; nothing of it was written")
        self._keys.add(key)
        self._buffer.append(group)
        self._rows += rows
        self._bytes += group.nbytes
        if self._rows >= self._shard_rows or self._bytes >= SHARD_BYTES:
            self._hand_over()
        elif self._writing is not None and self._writing[0].done():
            self._settle()

    def commit(self) -> None:
        """Makes a shard of what is buffered, and returns when it is in the manifest.

        Raises WorkError where the file system refuses, also for a shard that was begun before.
        """
        self._hand_over()
        self._settle()

    def _hand_over(self) -> None:
        """Has the buffered groups written by the one background thread, while the caller goes on generating."""
        self._settle()
        if self._buffer:
            groups, self._buffer, self._rows, self._bytes = self._buffer, [], 0, 0
            self._writing = self._thread.submit(self._write, groups), {_key(group)[2] for group in groups}

    def _settle(self) -> None:
        """Waits for the shard that is being written, if any, and takes over what came of it."""
        if self._failed:
            raise WorkError(f"{self.folder}: a shard could not be written before; begin again, and it resumes")
        if self._writing is None:
            return
        future, prompts = self._writing
        try:
            manifest = future.result()
        except (
            Exception
        ) as error:  # whatever it was, nothing may be written after the gap; an interrupt is none of these
            self._writing, self._failed = None, True
            if isinstance(error, OSError):  # a full disk or a lost mount: people need the line, not the stack
                kept = (
                    f" ({self.manifest.rows} rows in {len(self.manifest.shards)} shards are committed and stay valid)"
                )
                raise durable.work_error(self.folder, error, kept) from error
            raise
        self._writing, self.manifest = None, manifest
        self.committed |= prompts

    def _write(self, groups: list[Packed | pa.RecordBatch]) -> Manifest:
        """The manifest with one more shard, durably; runs in the background thread."""
        if self._identity() != self._opened:
            raise FileNotFoundError("the folder is not the one that was opened: was it unmounted or replaced?")
        number = 1 + max((int(shard.file[5:-8]) for shard in self.manifest.shards), default=-1)
        shard = write_shard(self.folder / f"part-{number:05d}.parquet", groups, self._provenance)
        manifest = self.manifest.with_shard(shard)
        manifest.save(self.folder)
        return manifest

    def close(self) -> None:
        """Gives the folder back without committing what is buffered; a shard that is being written is finished."""
        self._thread.shutdown()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if not self._failed:
                self.commit()
        finally:
            self.close()


def _key(group: Packed | pa.RecordBatch) -> tuple[str, int, str]:
    return group.key if isinstance(group, Packed) else group_key(group)


def write_shard(path: Path, groups: Iterable[Packed | pa.RecordBatch], provenance: Provenance) -> Shard:
    """Writes whole groups as one durable Parquet file, sorted by prompt.

    Row groups hold whole groups. Tokens and log-probabilities are stored with byte-stream-split (the bytes of a
    float's exponent compress among themselves) and go through zstd. Each page has a checksum.
    """
    ordered = sorted(groups, key=lambda group: (_key(group)[2], *_key(group)))
    rows = tokens = 0
    with durable.replacing(path) as temporary:
        with pq.ParquetWriter(
            temporary,
            ROLLOUTS.with_metadata(file_metadata(provenance)),
            compression="zstd",
            compression_level=_LEVELS,
            use_dictionary=_DICTIONARY,
            write_statistics=["round", *_DICTIONARY],
            use_byte_stream_split=_SPLIT,
            write_page_checksum=True,
            data_page_version="1.0",
        ) as writer:
            for part in _row_groups(ordered):
                table = pa.Table.from_batches(part, ROLLOUTS)
                rows += table.num_rows
                tokens += pc.sum(pc.list_value_length(table["completion_tokens"])).as_py()
                writer.write_table(table, row_group_size=1 << 30)
        size, digest = temporary.stat().st_size, durable.sha256_file(temporary)
    return Shard(file=path.name, rows=rows, groups=len(ordered), bytes=size, sha256=digest, tokens=tokens)


def _row_groups(groups: Iterable[Packed | pa.RecordBatch]) -> Iterator[list[pa.RecordBatch]]:
    """Batches of each row group in turn."""
    part: list[Packed | pa.RecordBatch] = []
    rows = size = 0
    for group in groups:
        part.append(group)
        rows += group.rows if isinstance(group, Packed) else group.num_rows
        size += group.nbytes
        if rows >= ROW_GROUP_ROWS or size >= ROW_GROUP_BYTES:
            yield _batches(part)
            part, rows, size = [], 0, 0
    if part:
        yield _batches(part)


def _batches(groups: list[Packed | pa.RecordBatch]) -> list[pa.RecordBatch]:
    batches: list[pa.RecordBatch] = []
    for packed, run in itertools.groupby(groups, key=lambda group: isinstance(group, Packed)):
        members: list[Any] = list(run)
        batches += [unpack(members)] if packed else members
    return batches


def iter_batches(
    folder: Path, columns: Sequence[str] | None = None, batch_rows: int = 1024
) -> Iterator[pa.RecordBatch]:
    """The dataset's rows in the manifest's order, columns in the order asked for.

    A batch holds whole groups: as many as fit `batch_rows`, or one group that is larger. Memory is one row group's.
    Raises RequestError for a missing dataset or column, WorkError for a shard that is missing or damaged
    (each page's checksum is compared while it is read).
    """
    names = list(ROLLOUTS.names if columns is None else columns)
    unknown = [name for name in names if name not in ROLLOUTS.names]
    if unknown:
        raise RequestError(f"{folder}: rollouts have no column {unknown[0]!r}; they have {', '.join(ROLLOUTS.names)}")
    for shard in read_manifest(folder).shards:
        path = Path(folder) / shard.file
        try:
            yield from _shard_batches(path, names, batch_rows)
        except (
            OSError,
            ValueError,
            MemoryError,
            pa.ArrowException,
        ) as error:  # a damaged file is the reader's to mend: say which
            reason = " ".join(str(error).split())
            raise WorkError(f"{path}: can't be read ({reason}); run `oapl rollouts validate`") from error


def _shard_batches(path: Path, names: list[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
    schema = pa.schema([ROLLOUTS.field(name) for name in names])
    wanted = list(dict.fromkeys([*names, *GROUP_KEY]))
    with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
        for number in range(file.num_row_groups):
            table = file.read_row_group(number, columns=wanted, use_threads=False).combine_chunks()
            bounds = [*group_starts(table).tolist(), table.num_rows]
            table = table.select(names).cast(schema)
            first = 0
            while first < len(bounds) - 1:
                last = max(first + 1, bisect.bisect_right(bounds, bounds[first] + batch_rows) - 1)
                yield from table.slice(bounds[first], bounds[last] - bounds[first]).to_batches()
                first = last
