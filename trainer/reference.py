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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from pipeline.progress import Progress
from pipeline.recipe import Learning
from pipeline.storage import durable
from trainer import attention
from trainer.batches import micro_batches
from trainer.passes import Pass, collate
from trainer.sequence import Team
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


def recompute(
    folder: Path,
    identity: dict[str, Any],
    blocks: Sequence[Block],
    settings: Learning,
    pad: int,
    score: Callable[[Pass], torch.Tensor],
    device: torch.device,
    team: Team,
) -> Stored:
    """Computes and stores the log-probabilities of every row; each team of ranks its share. Whole or not at all.

    `score` gives log pi [sequences, tokens] of a forward pass; it is called equally often on all ranks.
    """
    rank = dist.get_rank()
    partial = folder.with_name(f"{durable.TEMPORARY}{folder.name}")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    progress = Progress("recompute", len(blocks), "row groups") if rank == 0 else None
    path = partial / _file(team.number)
    with _writer(path) if team.leads else contextlib.nullcontext() as writer:
        for turn in range(math.ceil(len(blocks) / team.count)):
            number = turn * team.count + team.number
            table = blocks[number].read(_COLUMNS) if number < len(blocks) else None
            examples = [] if table is None else list(_examples(table))
            computed = _scored(examples, settings, pad, score, device, team)
            if table is not None and writer is not None:
                found = pa.array(computed, SCHEMA.field("logprobs").type)
                writer.write_table(pa.table([table["rollout_id"], found], schema=SCHEMA), row_group_size=1 << 30)
            if progress is not None:
                progress.add(min(team.count, len(blocks) - turn * team.count), sum(map(len, computed)) * team.count)
    if team.leads:
        durable.sync_file(path)
    dist.barrier()
    if rank == 0:
        record = {"ranks": team.count, "identity": identity}
        durable.write_durably(partial / RECORD, (json.dumps(record, indent=1) + "\n").encode())
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        durable.sync_folder(folder.parent)
    dist.barrier()
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


def _scored(
    examples: Sequence[Example],
    settings: Learning,
    pad: int,
    score: Callable[[Pass], torch.Tensor],
    device: torch.device,
    team: Team,
) -> list[Floats]:
    """log pi of each example's completion, in their order."""
    prompts = [example.prompt_tokens.tobytes() for example in examples]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    group = np.array([numbers[prompt] for prompt in prompts], np.int64)
    sizes = Sizes(
        np.array([len(e.prompt_tokens) for e in examples], np.int64),
        np.array([len(e.completion_tokens) for e in examples], np.int64),
        group,
        settings.packing,
    )
    found = [np.zeros(0, np.float32)] * len(examples)
    usable = np.flatnonzero((sizes.prompt > 0) & (sizes.completion > 0)).tolist()
    plan = micro_batches(usable, sizes, settings.micro_batch_tokens * team.size)
    count = torch.tensor(len(plan), device=device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    kernel = attention.chosen(settings) if settings.packing else None
    for number in range(int(count)):
        rows = plan[number] if number < len(plan) else []
        taken = [examples[row] for row in rows] or [_FILLER]
        logprobs = score(collate(taken, group[rows].tolist() or [0], pad, kernel).to(device)).cpu().numpy()
        for line, row in enumerate(rows):
            found[row] = logprobs[line, : len(examples[row].completion_tokens)]
    return found


_ONE = np.zeros(1, np.int32)
_FILLER = Example(_ONE, _ONE, np.zeros(1, np.float32), np.zeros(1, np.float32), 0.0, 0.0)
"""Stands in where a rank has nothing left while others compute."""
