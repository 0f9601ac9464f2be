"""The scheduler of a round on many engines: who is given which groups, and who makes those of a lost replica.

Prompts go to whichever replica has room, a group at a time. A replica writes its groups itself; what comes back here
are their ids. A group that was given away and is not in the manifest when its replica is lost is given to another.
How replicas are started and called is the business of a Crew: of Ray's in `on_ray`.
"""

from __future__ import annotations

import math
import sys
import uuid
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from pipeline.errors import RequestError, WorkError
from pipeline.generation.replica import Report
from pipeline.prompts.files import Prompt
from pipeline.recipe import Generation

SILENCE_S = 900.0
"""A replica that is at work and reports nothing for so long is taken for lost."""
START_S = 3600.0
"""So long may it be that no replica is at work: the first ones load the policy, or the cluster waits for nodes."""
LOOK_S = 5.0
"""How often the cluster is asked for nodes that have come."""
SLICE_S, BETWEEN_REPORTS_S = 0.2, 0.01
"""How long a replica works before it reports: so long, but with many replicas longer, for this process takes some
milliseconds to hear one of them and to give it more."""
MOST_LOSSES, EVEN_SO = 4, 16
"""Replicas that may be lost with one group, or fail to start while none is at work, before the round fails. A group
that is there at four losses of many has had bad luck, on machines that come and go: then it may be sixteen."""
STRAGGLES = 4.0
"""A replica that is so many times as slow as an idle one is relieved of its last groups."""
ENOUGH_S = 1.0
"""Seconds of decoding that say how fast a replica is."""


class Lost(Exception):
    """The replica, its node, or the way to it is gone."""


class Crew(Protocol):
    """Starts replicas and carries calls to them. A replica and a call are whatever the crew takes them for."""

    needs: str
    """What a replica reserves, for an error's line."""
    place: str
    """Where replicas run, for the same."""

    def now(self) -> float:
        """Seconds on some clock."""

    def room(self) -> int:
        """Replicas that all nodes together have room for now."""

    def start(self, name: str) -> Any:
        """A replica in a process of its own; `name` is its writer's."""

    def call(self, replica: Any, method: str, *arguments: Any) -> Any:
        """Has it do `Replica.<method>` after what it was asked before."""

    def wait(self, calls: Collection[Any], timeout: float) -> Iterable[Any]:
        """Those of the calls that have ended; after the timeout none."""

    def result(self, call: Any) -> Report | None:
        """What the ended call came to. Raises Lost, and the OaplError that the replica raised."""

    def end(self, replicas: Sequence[Any]) -> None:
        """Has replicas that are at work commit the groups that are whole, and ends them."""

    def kill(self, replica: Any) -> None: ...


class Listing(Protocol):
    """Of a RolloutWriter what is asked here."""

    @property
    def committed(self) -> Any:
        """prompt_ids whose groups are in the manifest."""

    def adopt(self, *, now: bool = False) -> list[str]:
        """Lists what replicas have recorded, if it is time for that; returns the prompt_ids."""


class Counter(Protocol):
    """Of a Progress what is asked here."""

    def add(self, count: int, tokens: int = 0) -> None: ...


@dataclass(slots=True)
class _Member:
    """One replica as it is seen from here."""

    replica: Any
    name: str
    calls: deque[Any]
    """Calls under way, the oldest first: that of `start`, then of `work`."""
    ready: bool = False
    heard: float = 0.0
    held: dict[str, Prompt] = field(default_factory=dict)
    """Given to it and not in the manifest yet."""
    running: set[str] = field(default_factory=set)
    """Of those, the ones that it has not finished."""
    open: int = 0
    """Completions that it has been asked for and has not told of: fewer than its groups have, as most of a group's are
    done long before its longest."""
    pace: float = 0.0
    """Completions that it makes from report to report."""
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


class Fleet:
    """A round's replicas, from the first one's start to the last group's listing.

    Memory holds the prompts that are given away and not in the manifest: a shard's worth and an engine's a replica.
    """

    def __init__(
        self,
        crew: Crew,
        settings: Generation,
        prompts: Iterator[Prompt],
        wanted: int,
        writer: Listing,
        progress: Counter,
    ) -> None:
        self._crew, self._settings, self._writer, self._progress = crew, settings, writer, progress
        self._prompts = prompts
        self._left = wanted
        """Groups that nobody has been given yet."""
        self._again: deque[Prompt] = deque()
        """Groups of lost replicas, which go first."""
        self._members: list[_Member] = []
        self._waiting: dict[Any, _Member] = {}
        """Members by the call that is to end next."""
        self._owners: dict[str, _Member] = {}
        """Who holds a group, by its prompt_id."""
        self._running = self._ready = 0
        """Groups that members have and have not finished; members at work."""
        self._unlisted = False
        """Whether replicas have recorded groups that are not in the manifest."""
        self._lost = 0
        """Replicas."""
        self._losses: dict[str, tuple[int, int]] = {}
        """Of groups that were being made: losses with it, and all losses before the first of those."""
        self._failed_starts = 0
        self._fewer = 0
        """Replicas that are not replaced: their machines are broken, or too slow."""
        self._looked, self._room = -math.inf, 0
        self._begun = False
        self._heard = crew.now()
        self._samples = settings.samples
        self._full = max(settings.max_num_seqs, self._samples)
        """Completions that fill an engine."""

    def run(self) -> None:
        """Until every group is in the manifest.

        Raises RequestError where a replica finds the request wrong, WorkError where replicas are lost again and again.
        """
        while self._left or self._again or self._owners:
            self._look()
            for call in self._crew.wait(self._waiting, 1.0):
                if call in self._waiting:  # else the member was lost meanwhile
                    self._hear(self._waiting[call])
            if self._unlisted:
                self._adopt(now=not self._open_groups())
            self._relieve()
        # The manifest may have listed groups before their replica's last report told of them.
        self._progress.add(-sum(member.counted for member in self._members))

    def _open_groups(self) -> int:
        """Groups that are not whole yet, as far as is known here."""
        return self._left + len(self._again) + self._running

    # -- replicas come and go --------------------------------------------------------------------

    def _look(self) -> None:
        """Now and then: has who is silent replaced, and starts replicas where nodes have come."""
        now = self._crew.now()
        if now - self._looked < LOOK_S:
            return
        for member in [m for m in self._members if m.ready and now - m.heard > SILENCE_S]:
            self._lose(member, f"nothing heard for {SILENCE_S:.0f} s")
        if now - self._heard > START_S:
            needs = self._crew.needs
            raise WorkError(
                f"no replica has been at work for {START_S:.0f} s; does the cluster still have {needs} free?"
            )
        self._looked = now
        self._recruit()

    def _recruit(self) -> None:
        """As many replicas as were asked for, or as there is room for; never more than groups."""
        self._room = self._crew.room()
        asked = self._settings.replicas
        if not self._room and not asked and not self._begun:
            place, needs = self._crew.place, self._crew.needs
            raise RequestError(f"no {place} has {needs} for a replica; see generation.replica_cpus")
        unfinished = self._left + len(self._again) + len(self._owners)
        self._begun = True
        wanted = max(1, min(asked or self._room, unfinished) - self._fewer)
        for _ in range(wanted - len(self._members)):
            # A lost replica is not restarted under its name: what it still writes must not be taken for the new one's.
            name = uuid.uuid4().hex[:12]
            replica = self._crew.start(name)
            member = _Member(replica, name, deque([self._crew.call(replica, "start")]))
            self._members.append(member)
            self._waiting[member.calls[0]] = member

    def _lose(self, member: _Member, why: str) -> None:
        """Gives what it had not committed to others, and fails the round where that has been tried often enough."""
        self._crew.kill(member.replica)
        self._part_with(member)
        self._looked = -math.inf
        self._adopt(now=True)
        for prompt_id in member.running:
            times, before = self._losses.get(prompt_id, (0, self._lost))
            self._losses[prompt_id] = times + 1, before
        self._lost += 1
        often = any(map(self._is_deadly, member.running))
        self._take_back(member, f"lost ({why})")
        if not member.ready:
            self._failed_starts += 1
            if self._failed_starts >= MOST_LOSSES:
                # Others may be at work: then it is one machine that is broken, and the round can do without it.
                self._failed_starts, self._fewer = 0, self._fewer + 1
                often |= not self._ready
        if often:
            raise WorkError(
                f"{MOST_LOSSES} replicas were lost one after another, the last one: {why}; what was committed is kept"
            )

    def _is_deadly(self, prompt_id: str) -> bool:
        """Whether replicas seem to be lost because of the group."""
        times, before = self._losses[prompt_id]
        return times >= EVEN_SO or (times >= MOST_LOSSES and 2 * times >= self._lost - before)

    def _part_with(self, member: _Member) -> None:
        self._members.remove(member)
        del self._waiting[member.calls[0]]
        self._ready -= member.ready

    def _take_back(self, member: _Member, what: str) -> None:
        self._finished(member, list(member.running))
        for prompt_id, prompt in member.held.items():
            del self._owners[prompt_id]
            self._again.append(prompt)
        self._progress.add(-member.counted)
        _say(f"replica {member.name} {what}; {len(member.held)} groups are given to others")

    # -- work and reports ------------------------------------------------------------------------

    def _hear(self, member: _Member) -> None:
        try:
            report = self._crew.result(member.calls[0])
        except Lost as lost:
            self._lose(member, str(lost))
            return
        del self._waiting[member.calls.popleft()]
        member.heard = self._heard = self._crew.now()
        if report is not None:
            self._note(member, report)
        else:
            member.ready, self._failed_starts = True, 0
            self._ready += 1
            self._send(member)
        self._send(member)
        self._waiting[member.calls[0]] = member

    def _note(self, member: _Member, report: Report) -> None:
        self._progress.add(report.completions, tokens=report.tokens)
        member.counted += report.completions
        self._finished(member, report.finished)
        member.open -= report.completions
        if report.completions:
            member.pace = 0.7 * member.pace + 0.3 * report.completions
        member.steps += report.steps
        member.seconds += report.seconds
        member.tokens += report.tokens
        self._unlisted |= report.recorded > member.recorded
        member.recorded = report.recorded

    def _finished(self, member: _Member, prompt_ids: Iterable[str]) -> None:
        before = len(member.running)
        member.running.difference_update(prompt_ids)
        self._running -= before - len(member.running)

    def _adopt(self, now: bool) -> None:
        """Has the manifest list what replicas have recorded, if it is time for that."""
        for prompt_id in self._writer.adopt(now=now):
            self._unlisted = False
            self._losses.pop(prompt_id, None)
            member = self._owners.pop(prompt_id, None)
            if member is not None:
                del member.held[prompt_id]
                self._finished(member, [prompt_id])
                member.counted -= self._samples

    def _send(self, member: _Member) -> None:
        prompts = [prompt for _ in range(self._share(member)) if (prompt := self._next()) is not None]
        for prompt in prompts:
            member.held[prompt.prompt_id] = prompt
            self._owners[prompt.prompt_id] = member
            member.running.add(prompt.prompt_id)
        self._running += len(prompts)
        member.open += len(prompts) * self._samples
        more = bool(self._left or self._again)
        seconds = max(SLICE_S, BETWEEN_REPORTS_S * len(self._members))
        member.calls.append(self._crew.call(member.replica, "work", prompts, more, seconds))

    def _share(self, member: _Member) -> int:
        """Groups to give now: what fills the engine and lasts until the next call, and no more than a fair share.

        The share is of all that is not finished, among all replicas, so that towards the end none holds what another
        could begin.
        """
        sharers = max(self._ready, min(self._room, len(self._members)))
        fair = math.ceil(self._open_groups() / sharers)
        ahead = self._full + max(self._samples, 2 * member.pace) - member.open
        return max(0, min(math.ceil(ahead / self._samples), fair - len(member.running)))

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
            self._part_with(member)
            self._fewer += 1
            self._crew.end([member.replica])
            self._adopt(now=True)
            self._take_back(member, f"stopped (more than {STRAGGLES:.0f} times as slow as an idle one)")

    def stop(self) -> None:
        """Ends the replicas, and keeps the groups that are whole, however this ends."""
        self._crew.end([member.replica for member in self._members if member.ready])
        for member in self._members:
            self._crew.kill(member.replica)


def _bare(prompt: Prompt) -> Prompt:
    return replace(prompt, answer=None, tests=None)


def _say(text: str) -> None:
    sys.stderr.write(f"generate: {text}\n")
    sys.stderr.flush()
