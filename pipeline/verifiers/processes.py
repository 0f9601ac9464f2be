"""Processes below a process, from /proc: found, weighed, ended."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path


def descendants(pid: int) -> Iterator[int]:
    """The process and all below it, from /proc; those that end meanwhile are left out."""
    todo = [pid]
    while todo:
        current = todo.pop()
        yield current
        try:
            for task in os.listdir(f"/proc/{current}/task"):  # noqa: PTH208  (speed)
                todo.extend(map(int, Path(f"/proc/{current}/task/{task}/children").read_text().split()))
        except OSError:
            continue


def end_descendants(pid: int) -> None:
    """Ends everything below the process, not the process itself; some of it may be in the middle of forking."""
    for _ in range(100):
        below = [each for each in descendants(pid) if each != pid]
        if not below:
            return
        for each in below:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(each, signal.SIGKILL)
        time.sleep(0.01)


def resident_bytes(pid: int) -> int:
    """Memory that the process and all below it hold; a page shared among some of them counts once."""
    return sum(_proportional_bytes(each) for each in descendants(pid))


def _proportional_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError):
        pass  # not ours to look into, or gone meanwhile
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0
