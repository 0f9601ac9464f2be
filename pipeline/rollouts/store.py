"""Rollout datasets on a disk: shards of Parquet and the manifest that says which of them exist.

    folder/
      manifest.json        replaced in one step; what it does not list does not exist
      part-00000.parquet   whole groups, sorted by prompt; never rewritten
      .lock                held by the one writer

A group is generated once: it exists from the moment its shard is in the manifest, and a writer that
finds a manifest goes on after it. Reading and writing stream; memory grows by some bytes a group.
Many processes may write one dataset (`shards`, `ledger`), and it may lie in an object store (`objects`).
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import IO, Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import OaplError, RequestError, WorkError
from pipeline.rollouts.arrow import Packed, logprob_flaw, pack, packed_flaw, unpack
from pipeline.rollouts.groups import GROUP_KEY, group_key, group_starts, split_groups
from pipeline.rollouts.keys import Keys, PromptIds, one_group_key
from pipeline.rollouts.ledger import Ledger
from pipeline.rollouts.manifest import MANIFEST, Manifest, Provenance, Shard, file_metadata, read_manifest
from pipeline.rollouts.mirror import local_copy
from pipeline.rollouts.schema import ROLLOUTS, Rollout
from pipeline.storage import durable
from pipeline.storage.open import place_of
from pipeline.storage.places import Place

__all__ = [
    "GROUP_KEY",
    "MANIFEST",
    "GroupWriter",
    "Manifest",
    "Provenance",
    "RolloutWriter",
    "Shard",
    "file_metadata",
    "flaw",
    "group_key",
    "group_starts",
    "iter_batches",
    "put_shard",
    "read_manifest",
    "split_groups",
    "token_flaw",
    "write_shard",
]

ROW_GROUP_ROWS = 512
ROW_GROUP_BYTES = 16 << 20
SHARD_BYTES = 128 << 20
"""Long completions close a row group and a shard before the rows do, so that memory stays flat."""

_DICTIONARY = ["snapshot_id", "prompt_id", "finish_reason"]
_SPLIT = ["prompt_tokens.list.element", "completion_tokens.list.element", "logprobs.list.element"]
"""Columns stored with byte-stream-split: bytes of one significance together, which is what zstd can use."""
_LEVELS = {"completion": 3, **dict.fromkeys(_SPLIT, 1)}
"""zstd levels, measured (docs/decisions/store.md): numbers gain nothing by a higher one."""


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


class GroupWriter:
    """Takes whole groups and makes shards of them; the face that writers have in common. A context manager.

    A shard is written when it holds at least `shard_rows` rows, by a thread of its own while the next groups come in;
    no second one is begun before it is done, so that memory holds two shards at most. Leaving the context commits
    the rest, also with an exception: a group that is whole is worth keeping.
    """

    def __init__(self, place: Place, provenance: Provenance, samples: int | None, shard_rows: int) -> None:
        self._place, self._provenance = place, provenance
        self._samples, self._shard_rows = samples, shard_rows
        self._buffer: list[Packed | pa.RecordBatch] = []
        self._rows = self._bytes = 0
        self._writing: Future[None] | None = None
        self._hurried = Event()
        self._failed = False
        self._thread = ThreadPoolExecutor(1, "rollout-shard")

    def _groups_taken(self) -> Keys:
        """Of the groups that are there or on their way, which are not taken again."""
        raise NotImplementedError

    def _write(self, groups: list[Packed | pa.RecordBatch]) -> None:
        """Makes a shard of the groups, durably; runs in the background thread."""
        raise NotImplementedError

    def _finish(self) -> None:
        """Settles what `_write` has put off."""

    def _kept(self) -> str:
        """What is safe, for an error's line."""
        return ""

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
        number = one_group_key(key) if key else 0
        taken = self._groups_taken()
        if problem is None and number in taken:
            problem = "the dataset has this group already"
        if problem is not None or key is None:
            prompt = f", prompt {key[2]}" if key else ""
            raise WorkError(f"{self._place.said()}: group refused{prompt}: {problem}; nothing of it was written")
        taken.add(number)
        self._buffer.append(group)
        self._rows += rows
        self._bytes += group.nbytes
        if self._rows >= self._shard_rows or self._bytes >= SHARD_BYTES:
            self._hand_over()
        elif self._writing is not None and self._writing.done():
            self._settle()

    def commit(self) -> None:
        """Makes a shard of what is buffered, and returns when it is committed.

        Raises WorkError where the file system refuses, also for a shard that was begun before.
        """
        self._hand_over()
        self._settle()
        with self._told():
            self._finish()

    def _hand_over(self) -> None:
        """Has the buffered groups written by the one background thread, while the caller goes on generating."""
        self._settle()
        if self._buffer:
            groups, self._buffer, self._rows, self._bytes = self._buffer, [], 0, 0
            self._writing = self._thread.submit(self._write, groups)

    def _settle(self) -> None:
        """Waits for the shard that is being written, if any."""
        if self._failed:
            raise WorkError(f"{self._place.said()}: a shard could not be written before; begin again, and it resumes")
        if self._writing is None:
            return
        self._hurried.set()
        try:
            with self._told():
                self._writing.result()
        finally:
            self._writing = None
            self._hurried.clear()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """A full disk or a lost mount: people need the line, not the stack. Afterwards nothing may be written."""
        try:
            yield
        except OSError as error:
            self._failed = True
            with suppress(OSError, OaplError):  # whole shards that wait are worth keeping, if the disk allows it
                self._finish()
            raise self._place.work_error(error, self._kept()) from error
        except Exception:  # whatever it was, nothing may be written after the gap; an interrupt is none of these
            self._failed = True
            raise

    def close(self) -> None:
        """Gives the folder back without committing what is buffered; a shard that is being written is finished."""
        self._hurried.set()
        self._thread.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if not self._failed:
                self.commit()
        finally:
            self.close()


class RolloutWriter(GroupWriter):
    """Appends to a folder's dataset, and holds the folder's lock: the dataset's one driver.

    A group exists when its shard is in the manifest, which is written so seldom that it takes at most a twentieth of
    the time. `samples` None admits groups of any size. With `shared` other processes may write, too (see `shards`);
    `adopt` lists what they have made.

    Raises RequestError where another writer holds the folder, or where a dataset of other settings is there
    (it names the difference), and WorkError where the file system refuses; what was committed stays valid.
    """

    def __init__(
        self,
        folder: Path | str,
        provenance: Provenance,
        *,
        samples: int | None,
        shard_rows: int = 4096,
        shared: bool = False,
    ) -> None:
        super().__init__(place_of(folder), provenance, samples, shard_rows)
        self.folder = folder
        with ExitStack() as held:
            try:
                self._place.prepare()
                held.enter_context(self._place.lock())
                self._ledger = Ledger(self._place, provenance, samples, shared, self._rewrite)
            except OSError as error:
                raise self._place.work_error(error) from error
            self._lock = held.pop_all()

    @property
    def manifest(self) -> Manifest:
        """As it was last written."""
        return self._ledger.manifest

    @property
    def committed(self) -> PromptIds:
        """prompt_ids whose whole group is in the manifest; it grows as shards are committed."""
        return self._ledger.committed

    def adopt(self, *, now: bool = False) -> list[str]:
        """Lists the shards that other writers have recorded; returns the prompt_ids that are committed by it.

        To be called often: it does nothing while it would take more than a twentieth of the time, unless `now`.
        Raises WorkError where the file system refuses, where a record is of other settings, and where another driver
        has taken the dataset over.
        """
        self._settle()
        try:
            return self._ledger.adopt(now=now)
        except OSError as error:
            raise self._place.work_error(error, self._kept()) from error

    def _rewrite(self, file: str, name: str, without: set[str]) -> Shard:
        batches = self._place.parse(file, lambda source: list(_file_batches(source, list(ROLLOUTS.names), 1)))
        groups = [batch for batch in batches if group_key(batch)[2] not in without]
        return put_shard(self._place, name, groups, self._provenance)

    def _groups_taken(self) -> Keys:
        return self._ledger.taken

    def _write(self, groups: list[Packed | pa.RecordBatch]) -> None:
        ledger = self._ledger
        shard = put_shard(self._place, ledger.next_name(), groups, self._provenance)
        ledger.add(shard, [key_of(group)[2] for group in groups])
        # Where shards come faster than the manifest may be written, the next one does not wait for it.
        self._hurried.wait(ledger.pace.wait())
        if not ledger.pace.wait():
            ledger.write()

    def _finish(self) -> None:
        if self._ledger.shared and not self._failed:
            self._ledger.adopt(now=True)
        self._ledger.write()

    def _kept(self) -> str:
        manifest = self.manifest
        return f" ({manifest.rows} rows in {len(manifest.shards)} shards are committed and stay valid)"

    def close(self) -> None:
        super().close()
        self._lock.close()


def key_of(group: Packed | pa.RecordBatch) -> tuple[str, int, str]:
    return group.key if isinstance(group, Packed) else group_key(group)


def write_shard(path: Path, groups: Iterable[Packed | pa.RecordBatch], provenance: Provenance) -> Shard:
    """The same as `put_shard`, as a file of this machine."""
    return put_shard(place_of(path.parent), path.name, groups, provenance)


def put_shard(place: Place, name: str, groups: Iterable[Packed | pa.RecordBatch], provenance: Provenance) -> Shard:
    """Writes whole groups as one durable Parquet file, sorted by prompt.

    Row groups hold whole groups. Tokens and log-probabilities are stored with byte-stream-split (the bytes of a
    float's exponent compress among themselves) and go through zstd. Each page has a checksum.
    """
    ordered = sorted(groups, key=lambda group: (key_of(group)[2], *key_of(group)))
    rows = tokens = 0
    with place.new_file(name) as temporary:
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
    return Shard(file=name, rows=rows, groups=len(ordered), bytes=size, sha256=digest, tokens=tokens)


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
        path = folder / shard.file
        try:
            yield from _file_batches(local_copy(path), names, batch_rows)
        except (
            OSError,
            ValueError,
            MemoryError,
            pa.ArrowException,
        ) as error:  # a damaged file is the reader's to mend: say which
            reason = " ".join(str(error).split())
            raise WorkError(f"{path}: can't be read ({reason}); run `oapl rollouts validate`") from error


def _file_batches(source: IO[bytes] | Path, names: list[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
    schema = pa.schema([ROLLOUTS.field(name) for name in names])
    wanted = list(dict.fromkeys([*names, *GROUP_KEY]))
    with pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False) as file:
        for number in range(file.num_row_groups):
            table = file.read_row_group(number, columns=wanted, use_threads=False).combine_chunks()
            bounds = [*group_starts(table).tolist(), table.num_rows]
            table = table.select(names).cast(schema)
            first = 0
            while first < len(bounds) - 1:
                last = max(first + 1, bisect.bisect_right(bounds, bounds[first] + batch_rows) - 1)
                yield from table.slice(bounds[first], bounds[last] - bounds[first]).to_batches()
                first = last
