"""Hundreds of replicas in one process, on a clock of their own: what a round's real scheduler is driven with.

A replica decodes as many sequences at a time as an engine's batch holds, each as long as a drawn completion, and puts
the real records of its shards; there are no tokens and no shards. It dies at a stated rate, and some are slow.
"""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.generation.fleet import Lost
from pipeline.generation.replica import Report, longest_unsafe
from pipeline.prompts.files import Prompt
from pipeline.rollouts.ledger import COMMITS, Record
from pipeline.rollouts.manifest import Shard

STARTED_S = 120.0
"""An engine's start, on the simulated clock."""
TOGETHER_S = 0.01
"""Calls that end within so long of one another are heard at once, as by a process that was busy meanwhile."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is simulated."""

    replicas: int
    slots: int
    """Sequences that an engine decodes at a time."""
    samples: int
    shard_rows: int
    tokens_per_s: float
    """Of one sequence."""
    deaths_per_hour: float
    """Of one replica."""
    slow: float
    """Share of replicas that are six times as slow."""
    lengths: tuple[int, ...]
    identity: str
    folder: Path


@dataclass(slots=True)
class _Replica:
    name: str
    pace: float
    """Tokens a second of each sequence."""
    dies: float
    """When, on the clock."""
    free: int
    begun: float
    until: float
    """The end of the last call that it was asked."""
    committed: float
    inbox: deque[Prompt] = field(default_factory=deque)
    running: list[tuple[float, str]] = field(default_factory=list)
    """Heap of (when a sequence ends, its prompt)."""
    missing: dict[str, int] = field(default_factory=dict)
    """Sequences that a group still needs."""
    buffer: list[str] = field(default_factory=list)
    shards: int = 0
    recorded: int = 0
    tokens: dict[str, int] = field(default_factory=dict)


class Crew:
    """See `pipeline.generation.fleet.Crew`. A call is its number, and what it comes to is worked out when it ends."""

    needs, place = "room", "machine"

    def __init__(self, told: Cluster) -> None:
        self._told = told
        self._dice = random.Random(0)
        self._now = 0.0
        self._numbers = itertools.count()
        self._ends: list[tuple[float, int]] = []
        self._calls: dict[int, tuple[_Replica, float, str, tuple[Any, ...]]] = {}
        self.heard = self.deaths = self.records = 0

    def now(self) -> float:
        return self._now

    def room(self) -> int:
        return self._told.replicas

    def start(self, name: str) -> _Replica:
        told = self._told
        pace = told.tokens_per_s / (6 if self._dice.random() < told.slow else 1)
        dies = self._now + self._dice.expovariate(told.deaths_per_hour / 3600) if told.deaths_per_hour else float("inf")
        return _Replica(name, pace, dies, told.slots, self._now, self._now, self._now)

    def call(self, replica: Any, method: str, *arguments: Any) -> int:
        begins = max(self._now, replica.until)
        takes = STARTED_S if method == "start" else arguments[2]
        replica.until = begins + takes
        number = next(self._numbers)
        self._calls[number] = replica, begins, method, arguments
        heapq.heappush(self._ends, (min(replica.until, max(self._now, replica.dies)), number))
        return number

    def wait(self, calls: Collection[Any], timeout: float) -> list[int]:
        """Those that end next. All that are under way will be heard, so nothing has to be looked for among `calls`."""
        while self._ends and self._ends[0][1] not in self._calls:
            heapq.heappop(self._ends)
        if not self._ends:
            self._now += timeout
            return []
        self._now = max(self._now, self._ends[0][0])
        limit = self._now + TOGETHER_S
        found = []
        while self._ends and self._ends[0][0] <= limit:
            found.append(heapq.heappop(self._ends)[1])
        return found

    def result(self, call: int) -> Report | None:
        self.heard += 1
        replica, begins, method, arguments = self._calls.pop(call)
        if replica.dies <= self._now:
            self.deaths += 1
            raise Lost("its machine is gone")
        if method == "start":
            return None
        prompts, more, seconds = arguments
        replica.inbox.extend(prompts)
        return self._work(replica, begins, begins + seconds, more)

    def _work(self, replica: _Replica, begins: float, ends: float, more: bool) -> Report:
        report = Report(steps=round((ends - begins) * replica.pace), seconds=ends - begins)
        samples = self._told.samples
        at = begins
        while True:
            while replica.inbox and replica.free > 0:
                self._admit(replica, replica.inbox.popleft(), at)
            if not replica.running or replica.running[0][0] > ends:
                break
            at, prompt_id = heapq.heappop(replica.running)
            replica.free += 1
            replica.missing[prompt_id] -= 1
            report.completions += 1
            if not replica.missing[prompt_id]:
                del replica.missing[prompt_id]
                report.finished.append(prompt_id)
                report.tokens += replica.tokens.pop(prompt_id)
                replica.buffer.append(prompt_id)
                if len(replica.buffer) * samples >= self._told.shard_rows:
                    self._record(replica)
        if ends - replica.committed > longest_unsafe(ends - replica.begun) or (not more and not replica.running):
            replica.committed = ends
            self._record(replica)
        report.recorded = replica.recorded
        return report

    def _admit(self, replica: _Replica, prompt: Prompt, at: float) -> None:
        lengths = random.Random(prompt.prompt_id).choices(self._told.lengths, k=self._told.samples)
        replica.missing[prompt.prompt_id] = len(lengths)
        replica.tokens[prompt.prompt_id] = sum(lengths)
        replica.free -= len(lengths)
        for length in lengths:
            heapq.heappush(replica.running, (at + length / replica.pace, prompt.prompt_id))

    def _record(self, replica: _Replica) -> None:
        """Not made durable: it is the driver's work that is measured."""
        if not replica.buffer:
            return
        name = f"000001-{replica.name}-00000000-{replica.shards:05d}"
        rows = len(replica.buffer) * self._told.samples
        shard = Shard(
            file=f"part-{name}.parquet", rows=rows, groups=len(replica.buffer), bytes=rows, sha256="0" * 64, tokens=rows
        )
        record = Record(epoch=1, identity=self._told.identity, shard=shard, prompt_ids=replica.buffer)
        (self._told.folder / COMMITS / f"{name}.json").write_text(record.model_dump_json())
        replica.recorded += len(replica.buffer)
        replica.shards += 1
        replica.buffer = []
        self.records += 1

    def end(self, replicas: Sequence[Any]) -> None:
        for replica in replicas:
            if replica.dies > self._now:
                self._record(replica)
            self.kill(replica)

    def kill(self, replica: Any) -> None:
        gone = [number for number, (whose, *_) in self._calls.items() if whose is replica]
        for number in gone:
            del self._calls[number]


class TimedCrew(Crew):
    """The same; keeps what the simulation takes of this process's time."""

    def __init__(self, told: Cluster) -> None:
        super().__init__(told)
        self.seconds = self.cpu = 0.0

    @contextmanager
    def _apart(self) -> Iterator[None]:
        began, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - began
        self.cpu += time.process_time() - cpu

    def call(self, replica: Any, method: str, *arguments: Any) -> int:
        with self._apart():
            return super().call(replica, method, *arguments)

    def wait(self, calls: Collection[Any], timeout: float) -> list[int]:
        with self._apart():
            return super().wait(calls, timeout)

    def result(self, call: int) -> Report | None:
        with self._apart():
            return super().result(call)
