"""Judges many cases at once: killable workers, replaced when they die, and verdicts as they come.

One event loop in the caller's thread. Bounded at every place: as many cases are taken from the caller's iterable
as keep the workers busy, and known verdicts of equal (reference, answer) pairs are kept up to a number.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import modules
from pipeline.errors import WorkError
from pipeline.verifiers.cases import REWARDS, Case, Outcome, Share, Verdict, Verifier

if TYPE_CHECKING:
    from pipeline.recipe import Verification

REMEMBERED = 1 << 16
"""Verdicts kept for equal pairs."""
SHARED = 1 << 14
"""Cases that may wait for another one's verdict."""
FIRST_WORD_S = 10.0
"""Until a worker says how long its case may take, or that it has to import math-verify first."""
CLOSE_S = 10.0


@dataclass(slots=True)
class _Job:
    """One judgement under way, for all cases that share it."""

    verifier: Verifier
    case: Case
    key: str | None
    ids: list[str]
    deaths: int = 0
    late_ms: float | None = None
    """How long it took when it was ended. The question is then whether reading the reference alone takes too long."""


@dataclass(slots=True)
class _Worker:
    pid: int
    pidfd: int
    pipe: Connection
    jobs: deque[_Job] = field(default_factory=deque)
    deadline: float = 0.0
    began: float = 0.0
    allowed: float = 0.0
    """Seconds of silence that the worker asked for last."""


def worker_count(workers: int) -> int:
    """`workers`, or one for each core this process may use."""
    return workers or len(os.sched_getaffinity(0))


class Nursery:
    """The first process, which forks the workers. A context manager: leaving it ends all of them."""

    def __init__(self, settings: Verification) -> None:
        self._settings = json.dumps(settings.model_dump(mode="json")).encode()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def _start(self) -> socket.socket:
        self._control, theirs = socket.socketpair()
        program = modules.python("pipeline.verifiers.worker", theirs.fileno(), json.dumps(sys.path))
        home = str(Path(__file__).parents[2])
        paths = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
        with theirs:
            self._process = subprocess.Popen(
                program, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": paths}
            )
        return self._control

    def fork(self, preload: tuple[str, ...]) -> _Worker:
        """A new worker. Raises WorkError where two first processes in a row die before they give one."""
        for _ in range(2):
            control = self._control or self._start()
            ours, theirs = socket.socketpair()
            try:
                with theirs:
                    socket.send_fds(control, [json.dumps(preload).encode()], [theirs.fileno()])
                pid = int.from_bytes(control.recv(8), "big")
                if pid:
                    worker = _Worker(pid, os.pidfd_open(pid), Connection(ours.detach()))
                    worker.pipe.send_bytes(self._settings)
                    return worker
            except (OSError, ProcessLookupError):
                pass  # it was killed from outside: once more, with a fresh one
            ours.close()
            self.close()
        raise WorkError("verifiers: can't start worker processes; is the machine out of memory or processes?")

    def close(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            # It ends by itself when we hang up, and everything below it before.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(CLOSE_S)
            self._process.kill()
            self._process.wait()
            self._process = None


class Pool:
    """`judge` as a generator; see `pipeline.verifiers.judge`."""

    def __init__(self, settings: Verification, find: Callable[[str], Verifier]) -> None:
        self._settings = settings
        self._find = find
        self._nursery = Nursery(settings)
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._most = worker_count(settings.workers)
        self._waiting: deque[_Job] = deque()
        self._sharing: dict[str, _Job] = {}
        self._shared = 0
        self._known: OrderedDict[str, tuple[Outcome, float]] = OrderedDict()
        self._versions: dict[str, str] = {}
        self._out: deque[Verdict] = deque()

    def close(self) -> None:
        for worker in self._workers:
            self._end(worker)
        self._workers.clear()
        self._nursery.close()
        self._selector.close()

    def run(self, cases: Iterable[Case]) -> Iterator[Verdict]:
        source = iter(cases)
        open_source = True
        while True:
            while open_source and len(self._waiting) < 16 * self._most and self._shared < SHARED:
                case = next(source, None)
                if case is None:
                    open_source = False
                else:
                    self._take(case)
                if len(self._out) >= 256:
                    break
            self._dispatch()
            yield from self._drain()
            busy = len(self._workers) > len(self._idle)
            if not busy and not self._waiting and not open_source:
                return
            if busy:
                self._listen()
                yield from self._drain()

    def _drain(self) -> Iterator[Verdict]:
        while self._out:
            yield self._out.popleft()

    # -- cases in -----------------------------------------------------------------------------

    def _take(self, case: Case) -> None:
        verifier = self._find(case.task)
        began = time.perf_counter()
        seen = verifier.glance(case)
        if isinstance(seen, Outcome):
            self._give(verifier, case.id, seen, (time.perf_counter() - began) * 1000)
            return
        if isinstance(seen, Case):
            self._waiting.append(_Job(verifier, seen, None, [case.id]))
            return
        self._take_shared(verifier, case.id, seen)

    def _take_shared(self, verifier: Verifier, case_id: str, share: Share) -> None:
        key = f"{verifier.name}\0{share.key}"
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            self._give(verifier, case_id, *known)
        elif key in self._sharing:
            self._sharing[key].ids.append(case_id)
            self._shared += 1
        else:
            job = _Job(verifier, share.case, key, [case_id])
            self._sharing[key] = job
            self._waiting.append(job)

    # -- verdicts out --------------------------------------------------------------------------

    def _give(self, verifier: Verifier, case_id: str, outcome: Outcome, wall_ms: float) -> None:
        version = self._versions.get(verifier.name)
        if version is None:
            version = self._versions[verifier.name] = verifier.version()
        reward = REWARDS[outcome.status] if outcome.reward is None else outcome.reward
        self._out.append(
            Verdict(case_id, verifier.name, version, outcome.status, reward, outcome.detail, wall_ms, outcome.isolation)
        )

    def _finish(self, job: _Job, outcome: Outcome, wall_ms: float) -> None:
        for case_id in job.ids:
            self._give(job.verifier, case_id, outcome, wall_ms)
        if job.key is not None:
            self._shared -= len(job.ids) - 1
            del self._sharing[job.key]
            if outcome.status not in ("crashed", "refused"):
                self._known[job.key] = outcome, wall_ms
                if len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)

    # -- workers -------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        while self._waiting and (self._idle or len(self._workers) < self._most):
            if not self._idle:
                worker = self._nursery.fork(self._waiting[0].verifier.preload)
                self._workers.append(worker)
                self._idle.append(worker)
                self._selector.register(worker.pipe.fileno(), selectors.EVENT_READ, worker)
            self._hand_over(self._idle.pop())

    def _hand_over(self, worker: _Worker) -> None:
        first = self._waiting[0].verifier
        share = -(-len(self._waiting) // self._most)
        while self._waiting and self._waiting[0].verifier is first and len(worker.jobs) < min(first.batch, share):
            worker.jobs.append(self._waiting.popleft())
        worker.began = time.monotonic()
        worker.deadline = worker.began + max(FIRST_WORD_S, worker.allowed)
        try:
            worker.pipe.send_bytes(json.dumps([asdict(job.case) for job in worker.jobs]).encode())
        except OSError:
            self._died(worker)

    def _listen(self) -> None:
        busy = [worker for worker in self._workers if worker.jobs]
        wait = min((worker.deadline for worker in busy), default=0.0) - time.monotonic()
        for key, _ in self._selector.select(max(0.0, min(wait, 1.0))):
            worker = key.data
            while worker in self._workers and self._hear(worker) and worker.pipe.poll():
                pass
        now = time.monotonic()
        for worker in busy:
            if worker.jobs and now >= worker.deadline and worker in self._workers and not worker.pipe.poll():
                self._late(worker)

    def _hear(self, worker: _Worker) -> bool:
        """One message of the worker's; False where it died instead."""
        try:
            word, what = json.loads(worker.pipe.recv_bytes())
        except (EOFError, OSError, ValueError):
            self._died(worker)
            return False
        worker.began = time.monotonic()
        if word == "alive":
            worker.allowed = what
            worker.deadline = worker.began + what
            return True
        # The next case of the batch may take as long, unless it says otherwise.
        worker.deadline = worker.began + worker.allowed
        job = worker.jobs.popleft()
        if not worker.jobs:
            self._idle.append(worker)
        wall_ms = what.pop("wall_ms")
        outcome = Outcome(**what)
        if job.late_ms is not None:
            wall_ms = job.late_ms
            if outcome.status != "bad_reference":
                outcome = Outcome("timeout", f"no verdict after {wall_ms / 1000:.1f} s")
        self._finish(job, outcome, wall_ms)
        return True

    def _late(self, worker: _Worker) -> None:
        """Ends a worker whose case takes too long; the cases behind it go to the next one."""
        job = worker.jobs.popleft()
        wall_ms = (time.monotonic() - worker.began) * 1000
        self._replace(worker)
        if job.late_ms is not None:
            self._finish(job, Outcome("bad_reference", "reading the reference takes too long"), wall_ms)
            return
        probe = job.verifier.blame(job.case)
        if probe is None:
            self._finish(job, Outcome("timeout", f"no verdict after {wall_ms / 1000:.1f} s"), wall_ms)
        else:
            job.case, job.late_ms = probe, wall_ms
            self._waiting.appendleft(job)

    def _died(self, worker: _Worker) -> None:
        """The case it held is judged once more, then it counts as crashed; the ones behind it lose nothing."""
        job = worker.jobs.popleft() if worker.jobs else None
        wall_ms = (time.monotonic() - worker.began) * 1000
        self._replace(worker)
        if job is None:
            return
        job.deaths += 1
        if job.deaths > 1:
            self._finish(job, Outcome("crashed", "the worker that judged it died, twice"), wall_ms)
        else:
            self._waiting.appendleft(job)

    def _replace(self, worker: _Worker) -> None:
        self._waiting.extendleft(reversed(worker.jobs))
        worker.jobs.clear()
        self._end(worker)
        self._workers.remove(worker)
        if worker in self._idle:
            self._idle.remove(worker)

    def _end(self, worker: _Worker) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(worker.pipe.fileno())
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)
        # Ready once it is dead, and the kernel has ended the sandbox it held.
        selectors_wait(worker.pidfd, 5.0)
        os.close(worker.pidfd)
        worker.pipe.close()


def selectors_wait(fd: int, seconds: float) -> None:
    """Waits until the descriptor can be read."""
    import select

    select.select([fd], [], [], seconds)


def run_pool(cases: Iterable[Case], settings: Any, find: Callable[[str], Verifier]) -> Iterator[Verdict]:
    pool = Pool(settings, find)
    try:
        yield from pool.run(cases)
    finally:
        pool.close()
