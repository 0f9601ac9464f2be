"""Generation on a Ray cluster: this process hands prompts out and keeps the manifest; replicas do the rest.

Prompts go to whichever replica has room, a group at a time. A replica writes its groups itself; what comes back here
are their ids. A group that was given away and is not in the manifest when its replica is lost is given to another.
"""

from __future__ import annotations

import math
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline import cluster, snapshots
from pipeline.errors import OaplError, RequestError, WorkError
from pipeline.generation.engine import Engine
from pipeline.generation.groups import Work
from pipeline.generation.replica import Replica, Report
from pipeline.progress import Progress
from pipeline.prompts import Prompt
from pipeline.rollouts.store import RolloutWriter

SILENCE_S = 900.0
"""A replica that is at work and reports nothing for so long is taken for lost."""
START_S = 3600.0
"""So long may it be that no replica is at work: the first ones load the policy, or the cluster waits for nodes."""
STOP_S = 60.0
LOOK_S = 5.0
"""How often the cluster is asked for nodes that have come."""
MOST_LOSSES = 4
"""So many replicas may be lost with one group, or fail to start while none is at work, before the round fails."""
STRAGGLES = 4.0
"""A replica that is so many times as slow as an idle one is relieved of its last groups."""


ENOUGH_S = 1.0
"""Seconds of decoding that say how fast a replica is."""


@dataclass(slots=True)
class _Member:
    """One replica as it is seen from here."""

    actor: Any
    name: str
    calls: deque[Any]
    """Calls under way, the oldest first: that of `start`, then of `work`."""
    ready: bool = False
    heard: float = 0.0
    held: dict[str, Prompt] = field(default_factory=dict)
    """Given to it and not in the manifest yet."""
    running: set[str] = field(default_factory=set)
    """Of those, the ones that it has not finished."""
    pace: float = 1.0
    """Groups that it finishes from report to report."""
    seconds: float = 0.0
    steps: int = 0
    """Decoding steps, and the seconds they took."""
    tokens: int = 0
    recorded: int = 0
    """Groups in its shards."""
    counted: int = 0
    """Completions in the progress that no manifest has."""

    def slower_than(self, other: _Member) -> bool:
        """By STRAGGLES, in seconds a step and in tokens a second: neither alone is fair to batches of unlike size."""
        if min(self.seconds, other.seconds) < ENOUGH_S:
            return False
        steps = self.seconds * other.steps > STRAGGLES * other.seconds * self.steps
        return steps and other.tokens * self.seconds > STRAGGLES * self.tokens * other.seconds


def generate_on_ray(
    work: Work,
    snapshot: snapshots.Snapshot,
    start_engine: Callable[[], Engine],
    prompts: Iterator[Prompt],
    wanted: int,
    writer: RolloutWriter,
    progress: Progress,
) -> None:
    """Generates the groups of `prompts`, of which there are `wanted`, into the writer's dataset.

    Memory holds the prompts that are given away and not in the manifest: a shard's worth and an engine's a replica.
    Raises RequestError where a replica finds the request wrong, WorkError where replicas are lost again and again.
    """
    with cluster.connected("generate"):
        fleet = _Fleet(work, start_engine, prompts, wanted, writer, progress)
        try:
            fleet.run()
        finally:
            fleet.stop()


class _Fleet:
    def __init__(
        self,
        work: Work,
        start_engine: Callable[[], Engine],
        prompts: Iterator[Prompt],
        wanted: int,
        writer: RolloutWriter,
        progress: Progress,
    ) -> None:
        self._work, self._start_engine, self._writer, self._progress = work, start_engine, writer, progress
        self._prompts = prompts
        self._left = wanted
        """Groups that nobody has been given yet."""
        self._again: deque[Prompt] = deque()
        """Groups of lost replicas, which go first."""
        self._members: list[_Member] = []
        self._owners: dict[str, _Member] = {}
        """Who holds a group, by its prompt_id."""
        self._unlisted = False
        """Whether replicas have recorded groups that are not in the manifest."""
        self._losses: dict[str, int] = {}
        self._failed_starts = 0
        self._fewer = 0
        """Replicas that are not replaced: their machines are broken, or too slow."""
        self._looked, self._room = -math.inf, 0
        self._begun = False
        self._heard = time.monotonic()
        self._samples = work.settings.samples
        self._full = math.ceil(max(work.settings.max_num_seqs, self._samples) / self._samples)
        """Groups that fill an engine."""
        self._needs = _needs(work)

    def run(self) -> None:
        """Until every group is in the manifest."""
        while self._left or self._again or any(member.held for member in self._members):
            self._recruit()
            for member in self._listen():
                self._hear(member)
            if self._unlisted:
                self._adopt(now=not self._open_groups())
            self._relieve()
        # The manifest may have listed groups before their replica's last report told of them.
        self._progress.add(-sum(member.counted for member in self._members))

    def _open_groups(self) -> int:
        """Groups that are not whole yet, as far as is known here."""
        return self._left + len(self._again) + sum(len(member.running) for member in self._members)

    # -- replicas come and go --------------------------------------------------------------------

    def _recruit(self) -> None:
        """As many replicas as were asked for, or as there is room for; never more than groups."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        self._room = sum(cluster.nodes(self._needs).values())
        asked = self._work.settings.replicas
        if not self._room and not asked and not self._begun:
            raise RequestError(
                f"no node of the Ray cluster has {_words(self._needs)} for a replica; see generation.replica_cpus"
            )
        unfinished = self._left + len(self._again) + sum(len(member.held) for member in self._members)
        self._begun = True
        wanted = max(1, min(asked or self._room, unfinished) - self._fewer)
        self._members += [self._start() for _ in range(wanted - len(self._members))]

    def _start(self) -> _Member:
        import ray

        name = uuid.uuid4().hex[:12]
        # A lost replica is not restarted under its name: whatever it still writes must not be taken for the new one's.
        actor = (
            ray.remote(Replica)
            .options(
                num_cpus=self._needs["CPU"],
                num_gpus=self._needs.get("GPU", 0),
                max_restarts=0,
                scheduling_strategy="SPREAD",
            )
            .remote(self._work, self._start_engine, str(self._writer.folder), self._writer.manifest.provenance, name)
        )
        return _Member(actor, name, deque([actor.start.remote()]))

    def _lose(self, member: _Member, why: str) -> None:
        """Gives what it had not committed to others, and fails the round where that has been tried often enough."""
        import ray

        ray.kill(member.actor)
        self._members.remove(member)
        self._looked = -math.inf
        self._adopt(now=True)
        for prompt_id in member.held:
            self._losses[prompt_id] = self._losses.get(prompt_id, 0) + 1
        often = max((self._losses[prompt_id] for prompt_id in member.held), default=0) >= MOST_LOSSES
        self._take_back(member, f"lost ({why})")
        if not member.ready:
            self._failed_starts += 1
            if self._failed_starts >= MOST_LOSSES:
                # Others may be at work: then it is one machine that is broken, and the round can do without it.
                self._failed_starts, self._fewer = 0, self._fewer + 1
                often |= not any(other.ready for other in self._members)
        if often:
            raise WorkError(
                f"{MOST_LOSSES} replicas were lost one after another, the last one: {why}; what was committed is kept"
            )

    def _take_back(self, member: _Member, what: str) -> None:
        for prompt_id, prompt in member.held.items():
            del self._owners[prompt_id]
            self._again.append(prompt)
        self._progress.add(-member.counted)
        _say(f"replica {member.name} {what}; {len(member.held)} groups are given to others")

    # -- work and reports ------------------------------------------------------------------------

    def _listen(self) -> list[_Member]:
        """Replicas whose oldest call has ended, or that have been silent for too long."""
        import ray

        waiting = {member.calls[0]: member for member in self._members}
        ended, _ = ray.wait(list(waiting), num_returns=1, timeout=1.0)
        if ended:
            ended, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        now = time.monotonic()
        for member in [m for m in self._members if m.ready and now - m.heard > SILENCE_S]:
            self._lose(member, f"nothing heard for {SILENCE_S:.0f} s")
        if now - self._heard > START_S:
            words = _words(self._needs)
            raise WorkError(
                f"no replica has been at work for {START_S:.0f} s; does the cluster still have {words} free?"
            )
        return [waiting[call] for call in ended if waiting[call] in self._members]

    def _hear(self, member: _Member) -> None:
        import ray

        try:
            report = ray.get(member.calls[0])
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, OaplError):
                raise error.cause from None
            self._lose(member, " ".join(str(error.cause).split())[:300])
            return
        except ray.exceptions.RayError as error:  # the process, its node, or the way to it is gone
            self._lose(member, _reason(error))
            return
        member.calls.popleft()
        member.heard = self._heard = time.monotonic()
        if report is not None:
            self._note(member, report)
        else:
            member.ready, self._failed_starts = True, 0
            self._send(member)
        self._send(member)

    def _note(self, member: _Member, report: Report) -> None:
        self._progress.add(report.completions, tokens=report.tokens)
        member.counted += report.completions
        member.running.difference_update(report.finished)
        if report.finished:
            member.pace = 0.7 * member.pace + 0.3 * len(report.finished)
        member.steps += report.steps
        member.seconds += report.seconds
        member.tokens += report.tokens
        self._unlisted |= report.recorded > member.recorded
        member.recorded = report.recorded

    def _adopt(self, now: bool) -> None:
        """Has the manifest list what replicas have recorded, if it is time for that."""
        for prompt_id in self._writer.adopt(now=now):
            self._unlisted = False
            self._losses.pop(prompt_id, None)
            member = self._owners.pop(prompt_id, None)
            if member is not None:
                del member.held[prompt_id]
                member.running.discard(prompt_id)
                member.counted -= self._samples

    def _send(self, member: _Member) -> None:
        prompts = [prompt for _ in range(self._share(member)) if (prompt := self._next()) is not None]
        for prompt in prompts:
            member.held[prompt.prompt_id] = prompt
            self._owners[prompt.prompt_id] = member
            member.running.add(prompt.prompt_id)
        more = bool(self._left or self._again)
        member.calls.append(member.actor.work.remote(prompts, more))

    def _share(self, member: _Member) -> int:
        """Groups to give now: what fills the engine and lasts until the next call, and no more than a fair share.

        The share is of all that is not finished, among all replicas, so that towards the end none holds what another
        could begin.
        """
        sharers = max(sum(m.ready for m in self._members), min(self._room, len(self._members)))
        fair = math.ceil(self._open_groups() / sharers)
        ahead = self._full + max(1, math.ceil(2 * member.pace))
        return max(0, min(ahead, fair) - len(member.running))

    def _next(self) -> Prompt | None:
        while self._again:
            lost = self._again.popleft()
            if lost.prompt_id not in self._writer.committed:
                return lost
        prompt = next(self._prompts, None)
        self._left = 0 if prompt is None else self._left - 1
        # Answers and tests stay here: they may be large, and a replica must not need them.
        return prompt and _bare(prompt)

    def _relieve(self) -> None:
        """At the end, a replica on a slow machine is stopped where an idle one would be done sooner.

        A group begins anew elsewhere, which pays only where the machine is several times as fast.
        """
        if self._left or self._again or len(self._members) < 2:
            return
        idle = [member for member in self._members if member.ready and not member.running]
        slow = [m for m in self._members if m.running and any(m.slower_than(other) for other in idle)]
        for member in slow[:1]:
            self._members.remove(member)
            self._fewer += 1
            self._end([member])
            self._adopt(now=True)
            self._take_back(member, f"stopped (more than {STRAGGLES:.0f} times as slow as an idle one)")

    def stop(self) -> None:
        """Ends the replicas, and keeps the groups that are whole, however this ends."""
        self._end(self._members)

    def _end(self, members: list[_Member]) -> None:
        import ray

        calls = [member.actor.stop.remote() for member in members if member.ready]
        if calls:
            ray.wait(calls, num_returns=len(calls), timeout=STOP_S)
        for member in members:
            ray.kill(member.actor)


def _needs(work: Work) -> dict[str, float]:
    """What a replica reserves on its node; known once the cluster is."""
    needs: dict[str, float] = {"CPU": work.settings.replica_cpus}
    if cluster.has_gpus():
        needs["GPU"] = work.settings.tensor_parallel
    return needs


def _words(needs: dict[str, float]) -> str:
    return " and ".join(f"{number} {name}" for name, number in needs.items())


def _bare(prompt: Prompt) -> Prompt:
    return replace(prompt, answer=None, tests=None)


def _reason(error: Exception) -> str:
    return type(error).__name__ + ": " + " ".join(str(error).split())[:200]


def _say(text: str) -> None:
    sys.stderr.write(f"generate: {text}\n")
    sys.stderr.flush()
