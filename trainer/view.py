"""What the learner sees of stored rollouts, read without holding it.

One streaming pass makes an index of some numbers a completion. Tokens are read again when a batch needs them,
through a small cache of row groups. Groups are shuffled by the seed within windows of row groups, so that memory
stays flat however long the dataset is; a dataset of one window is shuffled as a whole.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.advantages import advantages, is_uniform, standardised
from pipeline.errors import RequestError, WorkError
from pipeline.recipe import Learning
from pipeline.rollouts.locate import Located
from pipeline.rollouts.mirror import local_copy
from pipeline.rollouts.store import Manifest, read_manifest, split_groups
from pipeline.rollouts.tables import VerdictIndex

if TYPE_CHECKING:
    import pyarrow as pa


WINDOW = 32
"""Row groups among which groups are shuffled, and which the cache holds: at most 512 MiB of tokens."""


Floats = np.ndarray[Any, np.dtype[np.float32]]


Integers = np.ndarray[Any, np.dtype[np.int64]]


Row = tuple[int, int, int, int, float, float, int]


class Reference(Protocol):
    """Recomputed log-probabilities of a dataset, laid out as its row groups are."""

    def block(self, number: int) -> pa.ChunkedArray: ...


@dataclass(frozen=True, slots=True)
class Example:
    """One completion as the learner takes it."""

    prompt_tokens: np.ndarray[Any, np.dtype[np.int32]]
    completion_tokens: np.ndarray[Any, np.dtype[np.int32]]
    behaviour: Floats
    """log mu of each completion token, nats: the engine's, or recomputed, as the recipe asks."""
    sampled: Floats
    """The engine's log-probabilities whatever the recipe asks; NaN where the dataset has none."""
    advantage: float
    reward: float


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
    """Without a token of prompt or completion."""
    reward_sum: float = 0.0


@dataclass(frozen=True, slots=True)
class Block:
    """A row group of a shard: what is read at a time."""

    path: Path
    row_group: int
    place: int
    number: int
    """Within its dataset, over all shards."""

    def read(self, columns: Sequence[str]) -> pa.Table:
        import pyarrow.parquet as pq

        with pq.ParquetFile(local_copy(self.path), page_checksum_verification=True) as file:
            return file.read_row_group(self.row_group, columns=list(columns)).combine_chunks()


class View:
    """The rows that are learned from, with lengths and advantages, and access to their tokens.

    `places` are the round's dataset and, where older rounds are replayed, theirs behind it. Raises RequestError
    where a dataset has no verdicts, and WorkError where nothing is left to learn from.
    """

    def __init__(self, places: Sequence[Located], settings: Learning) -> None:
        for place in places:
            if place.verdicts is None or not place.verdicts.is_dir():
                raise RequestError(f"{place.root}: rollouts without verdicts; score them before learning")
        self.places = list(places)
        self.manifests: list[Manifest] = [read_manifest(place.rollouts) for place in places]
        self.counts = Counts()
        self._references: dict[int, Reference] = {}
        self.largest_token = 0
        self._cache: OrderedDict[int, tuple[pa.Table, pa.ChunkedArray | None]] = OrderedDict()
        self.blocks: list[Block] = []
        self._index(settings)
        if not len(self.advantage):
            raise WorkError(_nothing_left(places[0], self.counts))

    def _index(self, settings: Learning) -> None:
        parts: list[Row] = []
        arrays: list[np.ndarray[Any, Any]] = []
        group_sizes: list[int] = []
        for place in range(len(self.places)):
            verdicts = VerdictIndex(self.places[place].verdicts, settings.verifier_version)
            for table in self._iterate_blocks(place):
                row = 0
                for group in split_groups(table):
                    kept = self._view_of(group, verdicts, settings, row)
                    row += group.num_rows
                    if kept:
                        parts += kept
                        group_sizes.append(len(kept))
                if len(parts) > 1 << 16:
                    arrays.append(np.array(parts, np.float64))
                    parts = []
        table = np.concatenate([*arrays, np.array(parts, np.float64).reshape(-1, 7)])
        self.block, self.row = table[:, 0].astype(np.int32), table[:, 1].astype(np.int32)
        self.advantage, self.reward = table[:, 4].astype(np.float32), table[:, 5].astype(np.float32)
        self.snapshot_step = table[:, 6].astype(np.int64)
        self.group_starts = np.concatenate([[0], np.cumsum(group_sizes)]).astype(np.int64)
        group = np.repeat(np.arange(len(group_sizes)), group_sizes)
        prompt, completion = table[:, 2].astype(np.int64), table[:, 3].astype(np.int64)
        self.sizes = Sizes(prompt, completion, group, settings.packing)

    def _iterate_blocks(self, place: int) -> Iterator[pa.RecordBatch]:
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        columns = ["rollout_id", "snapshot_id", "snapshot_step", "round", "prompt_id"]
        columns += ["prompt_tokens", "completion_tokens"]
        number = 0
        for shard in self.manifests[place].shards:
            path = self.places[place].rollouts / shard.file
            with pq.ParquetFile(local_copy(path), page_checksum_verification=True) as file:
                for row_group in range(file.num_row_groups):
                    self.blocks.append(Block(path, row_group, place, number))
                    number += 1
                    table = file.read_row_group(row_group, columns=columns).combine_chunks()
                    for name in ("prompt_tokens", "completion_tokens"):
                        largest = pc.max(pc.list_flatten(table[name])).as_py()
                        self.largest_token = max(self.largest_token, largest or 0)
                    yield from table.to_batches()

    def _view_of(self, group: pa.RecordBatch, verdicts: VerdictIndex, settings: Learning, first_row: int) -> list[Row]:
        import pyarrow.compute as pc

        _, rewards = verdicts.lookup(group["rollout_id"].to_pylist())
        lengths = pc.list_value_length(group["completion_tokens"]).to_numpy()
        prompt_length = len(group["prompt_tokens"][0])
        scorable = np.isfinite(rewards)
        usable = scorable & (lengths > 0) & (prompt_length > 0)
        counts = self.counts
        counts.groups += 1
        counts.rows += group.num_rows
        counts.unscorable_rows += int((~scorable).sum())
        counts.empty_rows += int((scorable & ~usable).sum())
        if not usable.any():
            return []
        rewards = rewards[usable].astype(np.float64)
        counts.reward_sum += float(rewards.sum())
        if is_uniform(rewards):
            counts.uniform_groups += 1
            if settings.drop_uniform_groups:
                return []
        wanted = standardised(rewards) if settings.loss == "grpo" else advantages(rewards, settings.beta1)
        block, step = len(self.blocks) - 1, group["snapshot_step"][0].as_py()
        return [
            (block, first_row + int(row), prompt_length, int(lengths[row]), float(a), float(r), step)
            for row, a, r in zip(np.flatnonzero(usable), wanted, rewards, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.advantage)

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
        """The tokens of one row; its log-probabilities are not numbers where the dataset has none."""
        table, reference = self._table(int(self.block[index]))
        row = int(self.row[index])
        tokens = table["completion_tokens"][row].values.to_numpy()
        stored = table["logprobs"][row]
        sampled = stored.values.to_numpy() if stored.is_valid else np.full(len(tokens), np.nan, np.float32)
        behaviour = sampled if reference is None else reference[row].values.to_numpy()
        return Example(
            table["prompt_tokens"][row].values.to_numpy(),
            tokens,
            behaviour,
            sampled,
            float(self.advantage[index]),
            float(self.reward[index]),
        )

    def learnable(self, index: int) -> Example:
        """The same. Raises RequestError where there are no log-probabilities to learn from."""
        example = self.example(index)
        if np.isnan(example.behaviour[0]):
            place = self.places[self.blocks[int(self.block[index])].place]
            raise RequestError(f"{place.root}: rollouts without log-probabilities; set learning.behaviour=recomputed")
        return example

    def attach(self, place: int, reference: Reference) -> None:
        """Lets recomputed log-probabilities stand for the behaviour policy of one of the datasets."""
        self._references[place] = reference
        self._cache.clear()

    def newest(self) -> Integers:
        """Rows of the round itself, without those replayed from older ones."""
        place = np.array([block.place for block in self.blocks])
        return np.flatnonzero(place[self.block] == 0)

    def _table(self, number: int) -> tuple[pa.Table, pa.ChunkedArray | None]:
        if number in self._cache:
            self._cache.move_to_end(number)
        else:
            block = self.blocks[number]
            reference = self._references.get(block.place)
            self._cache[number] = (
                block.read(["prompt_tokens", "completion_tokens", "logprobs"]),
                reference.block(block.number) if reference else None,
            )
            if len(self._cache) > WINDOW:
                self._cache.popitem(last=False)
        return self._cache[number]


def _nothing_left(place: Located, counts: Counts) -> str:
    if counts.rows and counts.unscorable_rows == counts.rows:
        return f"{place.root}: no rollout has a reward; look at the verdicts with `oapl rollouts inspect`"
    return (
        f"{place.root}: nothing to learn from: {counts.uniform_groups} of {counts.groups} groups have no variance in "
        "reward; take other prompts or more samples, or set learning.drop_uniform_groups=false"
    )


@dataclass(frozen=True, slots=True)
class Sizes:
    """How long each row is, and which rows share their prompt."""

    prompt: Integers
    completion: Integers
    group: Integers
    packed: bool
    """Rows of a group in one forward pass compute their prompt once."""

    def of(self, rows: Sequence[int]) -> int:
        """Positions that a forward pass over these rows computes."""
        taken = np.asarray(rows, np.int64)
        if not self.packed:
            return int((self.prompt[taken] + self.completion[taken]).max(initial=0)) * len(rows)
        _, first = np.unique(self.group[taken], return_index=True)
        return int((self.completion[taken] - 1).sum() + self.prompt[taken[first]].sum())

    def useful(self, rows: Sequence[int]) -> int:
        """Positions that have to be computed at the least where prompts are not shared."""
        taken = np.asarray(rows, np.int64)
        return int((self.prompt[taken] + self.completion[taken]).sum())
