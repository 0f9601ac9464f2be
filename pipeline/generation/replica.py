"""One engine of several: an actor that generates the groups it is given and writes them where all others write."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipeline.errors import RequestError
from pipeline.generation.batch import ContinuousBatch, Work
from pipeline.generation.engine import Engine
from pipeline.generation.provenance import engine_version
from pipeline.policies import snapshots
from pipeline.policies.fetch import fetch_policy
from pipeline.prompts.files import Prompt
from pipeline.rollouts.shards import ShardWriter
from pipeline.rollouts.store import Provenance

COMMIT_S, COMMIT_SHARE = 300.0, 0.1


def longest_unsafe(age: float) -> float:
    """Seconds for which a group that is whole may wait for its shard, in a replica that was begun `age` seconds ago.

    Five minutes, or a tenth of its age, so that a round of days does not end in a hundred thousand small shards, and
    no more than a tenth of a replica's work is ever lost.
    """
    return max(COMMIT_S, COMMIT_SHARE * age)


@dataclass(slots=True)
class Report:
    """What a replica did since the report before."""

    completions: int = 0
    tokens: int = 0
    finished: list[str] = field(default_factory=list)
    """prompt_ids of the groups that became whole."""
    recorded: int = 0
    """Groups whose shard is durable, in all; the driver may list them."""
    steps: int = 0
    seconds: float = 0.0
    """Spent in those steps."""


class Replica:
    """Lives in a process of its own, on another machine perhaps; only prompts and reports go to and fro."""

    def __init__(
        self,
        work: Work,
        start_engine: Callable[[], Engine],
        folder: str,
        origin: Provenance,
        writer: str,
    ) -> None:
        self._work, self._start_engine = work, start_engine
        self._folder, self._origin, self._name = folder, origin, writer
        self._inbox: deque[Prompt] = deque()
        self._report = Report()
        self._buffered = 0
        self._begun = self._committed_at = time.monotonic()

    def start(self) -> None:
        """Loads the policy. Raises RequestError where this machine does not see what the others do."""
        where = f"node {socket.gethostname()}"
        settings = self._work.settings
        if self._work.origin is not None and (found := fetch_policy(self._work.origin)) != self._work.policy:
            raise RequestError(f"{where} keeps the policy in {found}; set OAPL_CACHE to the same path on all nodes")
        if not (self._work.policy / "config.json").exists():
            raise RequestError(f"{where} does not see {self._work.policy}; put the policy where all nodes can read it")
        version = engine_version()
        if version != self._origin.engine_version:
            raise RequestError(
                f"{where} has vLLM {version}, and the dataset is of {self._origin.engine_version}; "
                "install the same on all nodes"
            )
        try:
            self._writer = ShardWriter(
                self._folder, self._origin, samples=settings.samples, writer=self._name, shard_rows=settings.shard_rows
            )
        except RequestError as error:  # only here is it known on which machine
            raise RequestError(f"{where}: {error} (rollouts go to a folder that all nodes share)") from None
        snapshot = snapshots.load_record(self._work.policy)
        # What waits in an engine's queue can't be taken by an idle one: it is kept just full.
        limit = max(settings.max_num_seqs, settings.samples)
        self._groups = ContinuousBatch(self._work, snapshot, self._start_engine, self._count, limit)
        self._groups.start()

    def work(self, prompts: Sequence[Prompt], more: bool, seconds: float) -> Report:
        """Works for so long on what it has and on `prompts`. `more` False: no others wait, so commit when idle.

        Two calls are always under way, so that it never waits for the next.
        """
        self._inbox.extend(prompts)
        deadline = time.monotonic() + seconds
        while (began := time.monotonic()) < deadline:
            while self._inbox and self._groups.room:
                self._groups.add(self._inbox.popleft())
            if not self._groups.in_flight:
                if not more:
                    self._commit()
                if not self._report.finished:
                    time.sleep(deadline - began)
                break
            for group in self._groups.step():
                self._writer.add_group(group)
                self._buffered += 1
                self._report.finished.append(group[0].prompt_id)
            self._report.steps += 1
            self._report.seconds += time.monotonic() - began
        now = time.monotonic()
        if now - self._committed_at > longest_unsafe(now - self._begun):
            self._commit()
        report, self._report = self._report, Report()
        report.recorded = self._writer.recorded
        return report

    def stop(self) -> None:
        """Commits the groups that are whole; those in the engine are given up."""
        try:
            with self._writer:
                pass
        finally:
            self._groups.close()

    def _commit(self) -> None:
        self._committed_at = time.monotonic()
        if self._buffered:
            self._writer.commit()
            self._buffered = 0

    def _count(self, completions: int, tokens: int) -> None:
        self._report.completions += completions
        self._report.tokens += tokens
