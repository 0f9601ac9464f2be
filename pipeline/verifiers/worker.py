"""The processes that judge: a first one that imports once and forks, and the workers it forks.

The first one is started as a program of its own, from any thread and without anything of the parent's memory; it
forks a worker whenever the pool asks for one, which costs a few milliseconds. Workers end with it, it ends with
the pool. What passes between pool and worker is JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import socket
import sys
import time
from dataclasses import asdict
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

from pipeline.verifiers import find_verifier
from pipeline.verifiers.cases import Case, Outcome, Verifier, shorten
from pipeline.verifiers.processes import end_descendants
from pipeline.verifiers.sandbox import allow_nurseries

IMPORT_S = 120.0
"""How long a worker may take to import math-verify, on a machine under load."""
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def nursery(fd: int) -> None:
    """Forks a worker for each socket that arrives on `fd`; the message names modules to import before. Ends when
    the pool hangs up."""
    control = socket.socket(fileno=fd)
    libc = ctypes.CDLL(None, use_errno=True)
    # What a killed worker leaves behind becomes ours, and ignoring SIGCHLD reaps it.
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the pool decides when we end
    mine = os.getpid()
    while True:
        message, fds, _, _ = socket.recv_fds(control, 1 << 16, 1)
        if not message:
            end_descendants(mine)
            return
        for module in json.loads(message):
            importlib.import_module(module)
        pid = os.fork()
        if pid == 0:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != mine:
                os._exit(1)
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _serve(fds[0])
            os._exit(0)
        os.close(fds[0])
        control.sendall(pid.to_bytes(8, "big"))


def _serve(fd: int) -> None:
    """Judges what arrives until the pool hangs up."""
    pool = Connection(fd)
    allow_nurseries()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        settings = SimpleNamespace(**json.loads(pool.recv_bytes()))
        line = _Line(pool)
        while True:
            for fields in line.batch():
                _judge(line, Case(**fields), settings)


class _Line:
    """What the worker says to the pool. The pool lets a case take as long as the last one was allowed, so what
    repeats that at the start of a case is left out."""

    def __init__(self, pool: Connection) -> None:
        self._pool = pool
        self._allowed = 0.0
        self._starting = False
        self.known: set[str] = set()
        """Tasks whose modules are imported."""

    def batch(self) -> list[dict[str, Any]]:
        """The fields of the next cases."""
        self._starting = False
        return list(json.loads(self._pool.recv_bytes()))

    def alive(self, seconds: float) -> None:
        if not (self._starting and seconds == self._allowed):
            self._pool.send_bytes(json.dumps(["alive", seconds]).encode())
        self._allowed, self._starting = seconds, False

    def done(self, outcome: Outcome, wall_ms: float) -> None:
        self._pool.send_bytes(json.dumps(["done", {**asdict(outcome), "wall_ms": wall_ms}]).encode())
        self._starting = True


def _judge(line: _Line, case: Case, settings: Any) -> None:
    if case.task not in line.known:
        line.alive(IMPORT_S)
        for module in find_verifier(case.task).preload:
            importlib.import_module(module)
        line.known.add(case.task)
    verifier = find_verifier(case.task)
    began = time.perf_counter()
    outcome = _limited(verifier, case, settings, line.alive)
    line.done(outcome, (time.perf_counter() - began) * 1000)


def _limited(verifier: Verifier, case: Case, settings: Any, alive: Any) -> Outcome:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        if verifier.memory_bytes is not None:
            most = verifier.memory_bytes if hard == resource.RLIM_INFINITY else min(verifier.memory_bytes, hard)
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        return verifier.judge(case, settings, alive)
    except Exception as error:  # noqa: BLE001  one case's failure, of whatever kind, is that case's verdict
        return Outcome("crashed", shorten(f"{type(error).__name__}: {error}", 300))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[2])
    nursery(int(sys.argv[1]))
