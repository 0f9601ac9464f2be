"""Runs one command and outlives neither it nor whoever asked for it.

    python -I -S leash.py FD -- COMMAND ...

FD is the reading end of a pipe whose writing end only the supervisor holds. When that end closes, on purpose or
because the supervisor was killed, every descendant of the command is ended: SIGTERM first, SIGKILL after GRACE_S.
Descendants that made sessions of their own (launcher ranks, engine workers) are found too, because this process is
the subreaper of all of them. Exits with the command's status, 128 + n where signal n ended it.

Standard library only, and started with -I -S: it must cost nothing next to what it guards.
"""

import ctypes
import os
import select
import signal
import sys
import time

GRACE_S = 5.0
PR_SET_CHILD_SUBREAPER = 36


def _parents() -> dict[int, int]:
    """Parent of each live process. One that ends while being read is left out."""
    found = {}
    for name in os.listdir("/proc"):  # noqa: PTH208  (pathlib takes longer to import than all of this runs)
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            if fields[0] != b"Z":
                found[int(name)] = int(fields[1])
    return found


def descendants() -> list[int]:
    """Live processes below this one, at any depth."""
    parents = _parents()
    below: dict[int, list[int]] = {}
    for child, parent in parents.items():
        below.setdefault(parent, []).append(child)
    found, queue = [], [os.getpid()]
    while queue:
        children = below.get(queue.pop(), [])
        found += children
        queue += children
    return found


def end_all() -> None:
    """Ends everything below this process; returns when nothing is left."""
    deadline = time.monotonic() + GRACE_S
    asked: set[int] = set()
    while pids := descendants():
        late = time.monotonic() > deadline
        for pid in pids:
            if late or pid not in asked:
                asked.add(pid)
                _send(pid, signal.SIGKILL if late else signal.SIGTERM)
        _reap()
        time.sleep(0.05)
    _reap()


def _send(pid: int, number: int) -> None:
    try:  # noqa: SIM105  (contextlib would be one more import)
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it ended by itself


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass  # none is left


def main() -> int:
    held, command = int(sys.argv[1]), sys.argv[3:]
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # Whoever holds the leash decides when it ends; a terminal's Ctrl-C reaches that one, too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.close(held)
        try:
            os.execvp(command[0], command)
        except OSError as error:
            os.write(2, f"oapl: {command[0]} can't be started: {error.strerror}\n".encode())
            os._exit(127)
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([held, ended], [], [])
    status = os.waitpid(child, 0)[1] if ended in ready else None
    end_all()
    if status is None:
        return 128 + signal.SIGTERM
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


if __name__ == "__main__":
    os._exit(main())
