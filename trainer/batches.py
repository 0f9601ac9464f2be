"""From stored rollouts to batches: what the learner sees of a dataset, read without holding it.

One streaming pass makes an index of some numbers a completion. Tokens are read again when a batch needs them,
through a small cache of row groups. Groups are shuffled by the seed within windows of row groups, so that memory
stays flat however long the dataset is; a dataset of one window is shuffled as a whole.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.advantages import advantages, is_uniform
from pipeline.errors import RequestError, WorkError
from pipeline.recipe import Learning
from pipeline.rollouts.locate import Located
from pipeline.rollouts.store import Manifest, read_manifest, split_groups
from pipeline.rollouts.tables import VerdictIndex

if TYPE_CHECKING:
    import pyarrow as pa

WINDOW = 32
"""Row groups among which groups are shuffled, and which the cache holds: at most 512 MiB of tokens."""


@dataclass(frozen=True, slots=True)
class Example:
    """One completion as the learner takes it."""

    prompt_tokens: np.ndarray[Any, np.dtype[np.int32]]
    completion_tokens: np.ndarray[Any, np.dtype[np.int32]]
    behaviour: np.ndarray[Any, np.dtype[np.float32]]
    """log mu of each completion token, nats."""
    advantage: float
    snapshot_step: int


@dataclass(slots=True)
class Counts:
    """What became of the dataset's groups and rows in the learner's view."""

    groups: int = 0
    uniform_groups: int = 0
    """All rewards equal: without variance."""
    rows: int = 0
    unscorable_rows: int = 0
    """Without a reward, and so left out."""
    empty_rows: int = 0
    """Without a completion token."""
    reward_sum: float = 0.0


class View:
    """The rows that are learned from, with lengths and advantages, and access to their tokens.

    Raises RequestError where the dataset has no verdicts, and WorkError where nothing is left to learn from.
    """

    def __init__(self, place: Located, settings: Learning) -> None:
        if place.verdicts is None or not place.verdicts.is_dir():
            raise RequestError(f"{place.root}: rollouts without verdicts; score them before learning")
        self.manifest: Manifest = read_manifest(place.rollouts)
        self.counts = Counts()
        self._folder = place.rollouts
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._blocks: list[tuple[Path, int]] = []
        self._index(VerdictIndex(place.verdicts), settings)
        if not len(self.advantage):
            raise WorkError(_nothing_left(place, self.counts))

    def _index(self, verdicts: VerdictIndex, settings: Learning) -> None:
        parts: list[tuple[int, int, int, int, float]] = []
        arrays: list[np.ndarray[Any, Any]] = []
        group_sizes: list[int] = []
        for block, table in enumerate(self._iterate_blocks()):
            row = 0
            for group in split_groups(table):
                kept = self._view_of(group, verdicts, settings, block, row)
                row += group.num_rows
                if kept:
                    parts += kept
                    group_sizes.append(len(kept))
            if len(parts) > 1 << 16:
                arrays.append(np.array(parts, np.float64))
                parts = []
        table = np.concatenate([*arrays, np.array(parts, np.float64).reshape(-1, 5)])
        self.block, self.row = table[:, 0].astype(np.int32), table[:, 1].astype(np.int32)
        self.prompt_length, self.completion_length = table[:, 2].astype(np.int32), table[:, 3].astype(np.int32)
        self.advantage = table[:, 4].astype(np.float32)
        self.group_starts = np.concatenate([[0], np.cumsum(group_sizes)]).astype(np.int64)

    def _iterate_blocks(self) -> Iterator[pa.RecordBatch]:
        import pyarrow.parquet as pq

        columns = ["rollout_id", "snapshot_id", "round", "prompt_id", "prompt_tokens", "completion_tokens"]
        for shard in self.manifest.shards:
            path = self._folder / shard.file
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                for number in range(file.num_row_groups):
                    self._blocks.append((path, number))
                    table = file.read_row_group(number, columns=columns).combine_chunks()
                    yield table.to_batches()[0]

    def _view_of(
        self, group: pa.RecordBatch, verdicts: VerdictIndex, settings: Learning, block: int, first_row: int
    ) -> list[tuple[int, int, int, int, float]]:
        import pyarrow.compute as pc

        _, rewards = verdicts.lookup(group["rollout_id"].to_pylist())
        lengths = pc.list_value_length(group["completion_tokens"]).to_numpy()
        scorable = np.isfinite(rewards)
        usable = scorable & (lengths > 0)
        counts = self.counts
        counts.groups += 1
        counts.rows += group.num_rows
        counts.unscorable_rows += int((~scorable).sum())
        counts.empty_rows += int((scorable & (lengths == 0)).sum())
        if not usable.any():
            return []
        rewards = rewards[usable].astype(np.float64)
        counts.reward_sum += float(rewards.sum())
        if is_uniform(rewards):
            counts.uniform_groups += 1
            if settings.drop_uniform_groups:
                return []
        prompt_length = len(group["prompt_tokens"][0])
        found = zip(np.flatnonzero(usable), advantages(rewards, settings.beta1), strict=True)
        return [(block, first_row + int(row), prompt_length, int(lengths[row]), float(a)) for row, a in found]

    def __len__(self) -> int:
        return len(self.advantage)

    @property
    def lengths(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Tokens of prompt and completion of each row."""
        total: np.ndarray[Any, np.dtype[np.int32]] = self.prompt_length + self.completion_length
        return total

    def order(self, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Every row once, groups together, shuffled: the same for the same seed and epoch."""
        rng = random.Random(f"{seed}/{epoch}")
        by_block: dict[int, list[int]] = {}
        for group, start in enumerate(self.group_starts[:-1].tolist()):
            by_block.setdefault(int(self.block[start]), []).append(group)
        blocks = list(by_block)
        rng.shuffle(blocks)
        order: list[np.ndarray[Any, np.dtype[np.int64]]] = []
        for first in range(0, len(blocks), WINDOW):
            groups = [group for block in blocks[first : first + WINDOW] for group in by_block[block]]
            rng.shuffle(groups)
            order += [np.arange(self.group_starts[g], self.group_starts[g + 1]) for g in groups]
        return np.concatenate(order)

    def example(self, index: int) -> Example:
        """The tokens of one row; its log-probabilities are NaN where the dataset has none."""
        table = self._table(int(self.block[index]))
        row = int(self.row[index])
        tokens = table["completion_tokens"][row].values.to_numpy()
        stored = table["logprobs"][row]
        behaviour = stored.values.to_numpy() if stored.is_valid else np.full(len(tokens), np.nan, np.float32)
        return Example(
            table["prompt_tokens"][row].values.to_numpy(),
            tokens,
            behaviour,
            float(self.advantage[index]),
            table["snapshot_step"][row].as_py(),
        )

    def _table(self, block: int) -> pa.Table:
        import pyarrow.parquet as pq

        if block in self._cache:
            self._cache.move_to_end(block)
        else:
            path, number = self._blocks[block]
            columns = ["prompt_tokens", "completion_tokens", "logprobs", "snapshot_step"]
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                self._cache[block] = file.read_row_group(number, columns=columns).combine_chunks()
            if len(self._cache) > WINDOW:
                self._cache.popitem(last=False)
        return self._cache[block]


def _nothing_left(place: Located, counts: Counts) -> str:
    if counts.rows and counts.unscorable_rows == counts.rows:
        return f"{place.root}: no rollout has a reward; look at the verdicts with `oapl rollouts inspect`"
    return (
        f"{place.root}: nothing to learn from: {counts.uniform_groups} of {counts.groups} groups have no variance in "
        "reward; take other prompts or more samples, or set learning.drop_uniform_groups=false"
    )


def global_batches(view: View, settings: Learning, seed: int) -> Iterator[list[int]]:
    """Rows of each optimizer step, over all epochs, in order; see `steps_of` for how many there are.

    Epochs follow one another without a gap. What is left at the end and fills no batch is left out, unless there
    is nothing else: an odd small batch would move the policy as far as a full one.
    """
    rest: list[int] = []
    made = 0
    for epoch in range(settings.epochs):
        for index in view.order(seed, epoch).tolist():
            rest.append(index)
            if len(rest) == settings.batch_size:
                yield rest
                made += 1
                rest = []
    if rest and not made:
        yield rest


def steps_of(rows: int, settings: Learning) -> int:
    """Optimizer steps of a round."""
    return max(1, rows * settings.epochs // settings.batch_size)


def split_over_ranks(rows: Sequence[int], lengths: Callable[[int], int], ranks: int) -> list[list[int]]:
    """Deals a batch to the ranks, longest first, so that their token counts are close."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for row in sorted(rows, key=lambda row: (-lengths(row), row)):
        rank = min(range(ranks), key=lambda rank: (loads[rank], rank))
        shares[rank].append(row)
        loads[rank] += lengths(row)
    return shares


def micro_batches(rows: Sequence[int], lengths: Callable[[int], int], budget: int) -> list[list[int]]:
    """Cuts rows into forward passes of at most `budget` tokens, padding included; a longer row goes alone.

    Rows of like length go together, so that next to nothing is padding.
    """
    batches: list[list[int]] = []
    longest = 0
    for row in sorted(rows, key=lambda row: (-lengths(row), row)):
        if batches and longest * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
            longest = lengths(row)
    return batches


@dataclass(frozen=True, slots=True)
class Padded:
    """A forward pass: sequences padded on the right. `selected` marks the positions that predict completion tokens."""

    ids: torch.Tensor  # [sequences, tokens]
    selected: torch.Tensor  # [sequences, tokens], true where the next token is a completion token
    targets: torch.Tensor  # [completion tokens], in the order of `selected`
    behaviour: torch.Tensor  # [sequences, longest completion]
    mask: torch.Tensor  # [sequences, longest completion]
    advantage: torch.Tensor  # [sequences]


def collate(examples: Sequence[Example], pad: int) -> Padded:
    """Lays examples out for one forward pass; no token of one is seen by another, since attention is causal."""
    longest = max(len(e.prompt_tokens) + len(e.completion_tokens) for e in examples)
    widest = max(len(e.completion_tokens) for e in examples)
    ids = np.full((len(examples), longest), pad, np.int64)
    selected = np.zeros((len(examples), longest), bool)
    behaviour = np.zeros((len(examples), widest), np.float32)
    mask = np.zeros((len(examples), widest), bool)
    for number, example in enumerate(examples):
        prompt, completion = len(example.prompt_tokens), len(example.completion_tokens)
        ids[number, :prompt] = example.prompt_tokens
        ids[number, prompt : prompt + completion] = example.completion_tokens
        selected[number, prompt - 1 : prompt + completion - 1] = True
        behaviour[number, :completion] = example.behaviour
        mask[number, :completion] = True
    return Padded(
        torch.from_numpy(ids),
        torch.from_numpy(selected),
        torch.from_numpy(np.concatenate([e.completion_tokens for e in examples]).astype(np.int64)),
        torch.from_numpy(behaviour),
        torch.from_numpy(mask),
        torch.tensor([e.advantage for e in examples], dtype=torch.float32),
    )
