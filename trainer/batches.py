"""From stored rollouts to batches: what the learner sees of a dataset, read without holding it.

One streaming pass makes an index of some numbers a completion. Tokens are read again when a batch needs them,
through a small cache of row groups. Groups are shuffled by the seed within windows of row groups, so that memory
stays flat however long the dataset is; a dataset of one window is shuffled as a whole.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from pipeline.advantages import advantages, is_uniform, standardised
from pipeline.errors import RequestError, WorkError
from pipeline.recipe import Learning
from pipeline.rollouts.locate import Located
from pipeline.rollouts.mirror import local_copy
from pipeline.rollouts.store import Manifest, read_manifest, split_groups
from pipeline.rollouts.tables import VerdictIndex
from trainer.packing import Layout, lay_out

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


def split_over_ranks(rows: Sequence[int], sizes: Sizes, ranks: int) -> list[list[int]]:
    """Deals a batch to the ranks so that their token counts are close, rows of a prompt together where that allows it.

    Groups are cut into pieces of at most a quarter of a rank's share; the largest go first, to the least loaded.
    """
    total = sum(sizes.of([row]) for row in rows)
    pieces = _pieces(rows, sizes, total / (4 * ranks) if ranks > 1 else total)
    costs = [sizes.of(piece) for piece in pieces]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for number in sorted(range(len(pieces)), key=lambda number: (-costs[number], pieces[number])):
        rank = min(range(ranks), key=lambda rank: (loads[rank], rank))
        shares[rank] += pieces[number]
        loads[rank] += costs[number]
    return shares


def _pieces(rows: Sequence[int], sizes: Sizes, limit: float) -> list[list[int]]:
    """Rows of one group each, longest first, of at most `limit` tokens unless one row alone is longer."""
    pieces: list[list[int]] = []
    for row in sorted(rows, key=lambda row: (int(sizes.group[row]), -int(sizes.completion[row]), row)):
        last = pieces[-1] if pieces else []
        if last and sizes.group[last[0]] == sizes.group[row] and sizes.of([*last, row]) <= limit:
            last.append(row)
        else:
            pieces.append([row])
    return pieces


def micro_batches(rows: Sequence[int], sizes: Sizes, budget: int) -> list[list[int]]:
    """Cuts rows into forward passes of at most `budget` tokens, padding included; a longer row goes alone.

    Packed, rows of a prompt stay together; padded, rows of like length do, so that next to nothing is padding.
    """
    if sizes.packed:
        order = [row for piece in _pieces(rows, sizes, budget) for row in piece]
    else:
        order = sorted(rows, key=lambda row: (-int(sizes.prompt[row] + sizes.completion[row]), row))
    passes: list[list[int]] = []
    for row in order:
        if passes and sizes.of([*passes[-1], row]) <= budget:
            passes[-1].append(row)
        else:
            passes.append([row])
    return passes


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward pass and what the loss needs of it."""

    ids: torch.Tensor  # [1, tokens] packed, [sequences, tokens] padded on the right
    positions: torch.Tensor | None  # like ids; null where they simply count
    layout: Layout | None  # who attends to whom; null where each row of ids is a sequence
    sources: torch.Tensor  # [completion tokens], places in ids (flattened) whose output predicts them
    targets: torch.Tensor  # [completion tokens]
    behaviour: torch.Tensor  # [sequences, longest completion]
    sampled: torch.Tensor  # [sequences, longest completion]
    mask: torch.Tensor  # [sequences, longest completion]
    advantage: torch.Tensor  # [sequences]
    reward: torch.Tensor  # [sequences]

    def to(self, device: torch.device) -> Pass:
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            moved[field.name] = value if value is None else value.to(device)
        return Pass(**moved)


def collate(examples: Sequence[Example], groups: Sequence[int], pad: int, attention: str | None) -> Pass:
    """Lays examples out for one forward pass; `groups` are neighbours that share a prompt.

    With `attention` (a key of `packing.KERNELS`) they are packed: a prompt once, then its completions without their
    last token, whose output nobody needs. Without it they are padded on the right, where causal attention hides it.
    """
    widest = max(len(e.completion_tokens) for e in examples)
    behaviour, sampled = (np.zeros((len(examples), widest), np.float32) for _ in range(2))
    mask = np.zeros((len(examples), widest), bool)
    for number, example in enumerate(examples):
        length = len(example.completion_tokens)
        behaviour[number, :length] = example.behaviour
        sampled[number, :length] = example.sampled
        mask[number, :length] = True
    ids, positions, layout, sources = _packed(examples, groups, attention) if attention else _padded(examples, pad)
    return Pass(
        torch.from_numpy(ids),
        positions if positions is None else torch.from_numpy(positions),
        layout,
        torch.from_numpy(sources),
        torch.from_numpy(np.concatenate([e.completion_tokens for e in examples]).astype(np.int64)),
        torch.from_numpy(behaviour),
        torch.from_numpy(sampled),
        torch.from_numpy(mask),
        torch.tensor([e.advantage for e in examples], dtype=torch.float32),
        torch.tensor([e.reward for e in examples], dtype=torch.float32),
    )


def shortened(example: Example, longest: int) -> Example:
    """The end of its prompt and the beginning of its completion, at most so many tokens of each."""
    return replace(
        example,
        prompt_tokens=example.prompt_tokens[-longest:],
        completion_tokens=example.completion_tokens[:longest],
        behaviour=example.behaviour[:longest],
        sampled=example.sampled[:longest],
    )


Placed = tuple[Integers, Integers | None, Layout | None, Integers]


def _padded(examples: Sequence[Example], pad: int) -> Placed:
    longest = max(len(e.prompt_tokens) + len(e.completion_tokens) for e in examples)
    ids = np.full((len(examples), longest), pad, np.int64)
    sources = []
    for number, example in enumerate(examples):
        prompt, completion = len(example.prompt_tokens), len(example.completion_tokens)
        ids[number, :prompt] = example.prompt_tokens
        ids[number, prompt : prompt + completion] = example.completion_tokens
        first = number * longest + prompt - 1
        sources.append(np.arange(first, first + completion))
    return ids, None, None, np.concatenate(sources)


def _packed(examples: Sequence[Example], groups: Sequence[int], attention: str) -> Placed:
    ids, positions, sources = [], [], []
    segments: list[tuple[int, int]] = []  # (tokens, which segment is its prefix, or -1)
    end = prompt_segment = prompt_end = 0
    for number, example in enumerate(examples):
        prompt, inputs = example.prompt_tokens, example.completion_tokens[:-1]
        if number == 0 or groups[number] != groups[number - 1]:
            prompt_segment = len(segments)
            segments.append((len(prompt), -1))
            ids.append(prompt)
            positions.append(np.arange(len(prompt)))
            end = prompt_end = end + len(prompt)
        sources.append(np.concatenate([[prompt_end - 1], np.arange(end, end + len(inputs))]))
        if len(inputs):
            segments.append((len(inputs), prompt_segment))
            ids.append(inputs)
            positions.append(np.arange(len(prompt), len(prompt) + len(inputs)))
            end += len(inputs)
    layout = lay_out(segments, attention)
    joined = np.concatenate(ids).astype(np.int64), np.concatenate(positions).astype(np.int64)
    return joined[0][None], joined[1][None], layout, np.concatenate(sources).astype(np.int64)
