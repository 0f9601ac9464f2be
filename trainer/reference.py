"""Recomputed log-probabilities: one forward pass of the trainer over the frozen snapshot, kept beside the rollouts.

    folder/
      ranks-00000.parquet ...   rollout_id, logprobs; row group k of team r is row group k * ranks + r of the dataset
      reference.json            what they were computed from; renamed into place with the folder

All rows of the dataset are computed, whatever the learner's view leaves out, so that another beta1, filter or
verifier version needs no new pass.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from pipeline.progress import Progress
from pipeline.storage import durable
from trainer.dealing import deal
from trainer.forward import Forward
from trainer.prefetch import ahead
from trainer.ranks import wait
from trainer.view import Block, Example, Floats, Sizes

RECORD = "reference.json"
SCHEMA = pa.schema(
    [
        pa.field("rollout_id", pa.string(), nullable=False),
        # Nats, after the temperature that the data was sampled with, before top-p and top-k; one a completion token.
        pa.field("logprobs", pa.list_(pa.field("item", pa.float32(), nullable=False)), nullable=False),
    ]
)


class Stored:
    """Reads what `recompute` wrote, a row group of the dataset at a time."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self._folder, self._ranks = folder, ranks

    def block(self, number: int) -> pa.ChunkedArray:
        row_group, rank = divmod(number, self._ranks)
        with pq.ParquetFile(self._folder / _file(rank), page_checksum_verification=True) as file:
            return file.read_row_group(row_group, columns=["logprobs"])["logprobs"].combine_chunks()


def _file(rank: int) -> str:
    return f"ranks-{rank:05d}.parquet"


def find(folder: Path, identity: dict[str, Any]) -> Stored | None:
    """What is there, if it was computed from the same data by the same policy in the same way."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
    except FileNotFoundError:
        return None
    return Stored(folder, record["ranks"]) if record["identity"] == identity else None


def recompute(folder: Path, identity: dict[str, Any], blocks: Sequence[Block], forward: Forward) -> Stored:
    """Computes and stores the log-probabilities of every row; each team of ranks its share. Whole or not at all.

    Each rank calls it. Under ZeRO-3 ranks meet in each pass, so all make equally many of each turn's row groups.
    """
    team = forward.team
    rank = dist.get_rank()
    partial = folder.with_name(f"{durable.TEMPORARY}{folder.name}")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    wait()
    progress = Progress("recompute", len(blocks), "row groups") if rank == 0 else None
    path = partial / _file(team.number)
    turns = range(team.number, math.ceil(len(blocks) / team.count) * team.count, team.count)
    with (
        _writer(path) if team.leads else contextlib.nullcontext() as writer,
        ahead(_read(blocks, turns, forward), 2) as items,
    ):
        for number, (table, lengths, plan) in zip(turns, items, strict=False):
            computed = _scored(lengths, plan, items, forward)
            if table is not None and writer is not None:
                found = pa.array(computed, SCHEMA.field("logprobs").type)
                writer.write_table(pa.table([table["rollout_id"], found], schema=SCHEMA), row_group_size=1 << 30)
            if progress is not None:
                progress.add(min(team.count, len(blocks) - number), sum(map(len, computed)) * team.count)
    if team.leads:
        durable.sync_file(path)
    wait()
    if rank == 0:
        record = {"ranks": team.count, "identity": identity}
        durable.write_durably(partial / RECORD, (json.dumps(record, indent=1) + "\n").encode())
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        durable.sync_folder(folder.parent)
    wait()
    if progress is not None:
        progress.close()
    return Stored(folder, team.count)


def _writer(path: Path) -> pq.ParquetWriter:
    return pq.ParquetWriter(path, SCHEMA, compression="zstd", write_page_checksum=True)


_COLUMNS = ("rollout_id", "prompt_tokens", "completion_tokens")


def _examples(table: pa.Table) -> Iterator[Example]:
    for prompt, completion in zip(table["prompt_tokens"], table["completion_tokens"], strict=True):
        nothing = np.zeros(len(completion), np.float32)
        yield Example(prompt.values.to_numpy(), completion.values.to_numpy(), nothing, nothing, 0.0, 0.0)


def _read(blocks: Sequence[Block], turns: Iterable[int], forward: Forward) -> Generator[Any, None, None]:
    """(table, tokens of each completion, plan) of each row group, null and empty past the last; then its passes."""
    settings, team = forward.settings, forward.team
    for number in turns:
        table = blocks[number].read(_COLUMNS) if number < len(blocks) else None
        examples = [] if table is None else list(_examples(table))
        prompts = [example.prompt_tokens.tobytes() for example in examples]
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        sizes = Sizes(
            np.array([len(e.prompt_tokens) for e in examples], np.int64),
            np.array([len(e.completion_tokens) for e in examples], np.int64),
            np.array([numbers[prompt] for prompt in prompts], np.int64),
            settings.packing,
        )
        usable = np.flatnonzero((sizes.prompt > 0) & (sizes.completion > 0)).tolist()
        plan = deal(usable, sizes, settings.micro_batch_tokens * team.size, 1, forward.arithmetic)[0]
        yield table, sizes.completion.tolist(), plan
        for rows in plan:
            yield forward.staged([examples[row] for row in rows], sizes.group[rows].tolist())


def _scored(
    lengths: Sequence[int], plan: Sequence[Sequence[int]], passes: Iterator[Any], forward: Forward
) -> list[Floats]:
    """log pi of each completion of a row group, in their order; nothing where there is no token."""
    count = torch.tensor(len(plan), device=forward.device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    # Fetched when all are computed, so that the device is waited for once.
    computed = [forward.logprobs(forward.arrived(next(passes))) for _ in plan]
    for _ in range(int(count) - len(plan)):
        forward.logprobs(forward.arrived(forward.staged([], [])))
    found = [np.zeros(0, np.float32)] * len(lengths)
    for rows, logprobs in zip(plan, computed, strict=True):
        for row, line in zip(rows, logprobs.cpu().numpy(), strict=True):
            found[row] = line[: lengths[row]]
    return found
