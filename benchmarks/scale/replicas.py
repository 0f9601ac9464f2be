"""Simulated replicas: a fake engine behind a real ShardWriter each. Run in processes beside the driver."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.rollouts import schema
from pipeline.rollouts.schema import Rollout
from pipeline.rollouts.shards import ShardWriter
from pipeline.rollouts.store import Provenance

SNAPSHOT = "000000-scale"


@dataclass(frozen=True, slots=True)
class Load:
    """What is simulated, the same in each process."""

    folder: str
    samples: int
    shard_rows: int
    slots: int
    """Groups that a replica has in its engine at a time."""
    failures: float
    """Deaths of a replica for each group that it makes."""
    lengths: tuple[int, ...]
    """Completion lengths, in tokens, that are drawn from."""
    tokens: int
    """Mean length of what is stored: drawn lengths are scaled to it."""


def provenance(samples: int) -> Provenance:
    same = dict.fromkeys(("snapshot_sha256", "tokenizer_sha256", "chat_template_sha256", "prompts_sha256"), "0" * 64)
    return Provenance(
        snapshot_id=SNAPSHOT, snapshot_step=0, round=0, sampling={"samples": samples},
        logprobs_mode="processed_logprobs", engine="fake", engine_version="0", code_version="0", **same,
    )  # fmt: skip


def prompt_name(number: int) -> str:
    return f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}"


@dataclass(slots=True)
class _Replica:
    writer: ShardWriter
    unrecorded: deque[int] = field(default_factory=deque)
    """Groups that are whole here and in no record yet, oldest first."""
    seen: int = 0
    """How many of the writer's records were taken out of it."""


class Site:
    """The replicas of one process. Time is simulated: a group takes as long as its longest completion has tokens."""

    def __init__(self, load: Load, name: str, replicas: int, first: int, last: int) -> None:
        self._load, self._name, self._origin = load, name, provenance(load.samples)
        self._dice = random.Random(f"{name}/{first}")
        self._waiting = deque(range(first, last))
        self._events: list[tuple[float, int, int]] = []
        self.deaths = self.lost = self.doubled = 0
        tokens = np.random.default_rng(0).integers(100, 30_000, 4096)
        self._tokens, self._logprobs = tokens.tolist(), (-np.ones(4096) / 3).tolist()
        self._scale = load.tokens / (sum(load.lengths) / len(load.lengths))
        self._replicas = [self._begin() for _ in range(replicas)]
        for number in range(replicas):
            for _ in range(load.slots):
                self._next(number, 0.0)

    def run(self) -> tuple[int, int, int]:
        """(deaths, groups lost and made again, groups made twice)."""
        while self._events:
            now, number, group = heapq.heappop(self._events)
            replica = self._replicas[number]
            replica.writer.add_group(self._group(group))
            replica.unrecorded.append(group)
            self._note(replica)
            if self._dice.random() < self._load.failures:
                self._die(number, now)
            self._next(number, now)
        for replica in self._replicas:
            replica.writer.commit()
            replica.writer.close()
        return self.deaths, self.lost, self.doubled

    def _begin(self) -> _Replica:
        load = self._load
        return _Replica(
            ShardWriter(load.folder, self._origin, samples=load.samples, writer=self._name, shard_rows=load.shard_rows)
        )

    def _note(self, replica: _Replica) -> None:
        while replica.seen < replica.writer.recorded:
            replica.seen += 1
            replica.unrecorded.popleft()

    def _die(self, number: int, now: float) -> None:
        """One time of three it had recorded its last shard, which nobody knows yet: those groups come twice."""
        replica = self._replicas[number]
        self.deaths += 1
        again = list(replica.unrecorded)
        if self._dice.random() < 1 / 3:
            replica.writer.commit()
            self.doubled += len(again)
        replica.writer.close()
        self._note(replica)
        kept = [event for event in self._events if event[1] != number]
        again += [group for _, other, group in self._events if other == number]
        self.lost += len(again)
        self._waiting.extendleft(again)
        self._events = kept
        heapq.heapify(self._events)
        self._replicas[number] = self._begin()
        for _ in range(self._load.slots - 1):
            self._next(number, now)

    def _next(self, number: int, now: float) -> None:
        if self._waiting:
            group = self._waiting.popleft()
            heapq.heappush(self._events, (now + max(self._lengths(group)), number, group))

    def _lengths(self, group: int) -> list[int]:
        dice = random.Random(group)
        return [self._load.lengths[dice.randrange(len(self._load.lengths))] for _ in range(self._load.samples)]

    def _group(self, number: int) -> list[Rollout]:
        lengths = [max(1, min(4096, round(length * self._scale))) for length in self._lengths(number)]
        return made_group(number, lengths, self._tokens, self._logprobs)


def made_group(number: int, lengths: Sequence[int], tokens: list[int], logprobs: list[float]) -> list[Rollout]:
    """A group of completions that are the first so many of these tokens; each says the number of its sample."""
    prompt = prompt_name(number)
    return [
        Rollout(
            schema.rollout_id(SNAPSHOT, 0, prompt, sample, sample), 0, SNAPSHOT, 0, prompt, sample,
            tokens[:8], tokens[:length], logprobs[:length], f"It is \\boxed{{{sample}}}.", "stop", sample,
        )
        for sample, length in enumerate(lengths)
    ]  # fmt: skip


def site(load: Load, name: str, replicas: int, first: int, last: int, results: Any) -> None:
    results.put(Site(load, name, replicas, first, last).run())


def log_normal(median: float, sigma: float, longest: int) -> tuple[int, ...]:
    drawn = np.random.default_rng(1).lognormal(np.log(median), sigma, 4096)
    return tuple(int(min(longest, max(1, length))) for length in drawn)


def lengths_of(run: Path) -> tuple[int, ...]:
    """Completion lengths of a run's newest round, at most so many as are drawn from."""
    import pyarrow.compute as pc

    from pipeline.rollouts.locate import locate
    from pipeline.rollouts.store import iter_batches

    found: list[int] = []
    for batch in iter_batches(locate(run).rollouts, ["completion_tokens"]):
        found += pc.list_value_length(batch[0]).to_pylist()
        if len(found) > 1 << 16:
            break
    return tuple(found)


def shares(total: int, parts: int) -> Sequence[tuple[int, int]]:
    bounds = [total * part // parts for part in range(parts + 1)]
    return list(itertools.pairwise(bounds))
