"""The first process of a sandbox: forks a fresh child for each piece of work, limits it, and tells how it ended.

Started as code (`python -I -S -c STUB`, which reads it). The work comes in as marshal (from the judge, who is
trusted); what goes out is a status line and raw bytes.

Work: ("stdin", code, input)     run the program on that standard input
      ("call", code, name, args)  call the function once; args and result as in values.py
      ("serve", code, name)       answer calls on a channel until it closes
      ("check", test, name)       run `check(candidate)`, candidate being calls on a channel
"""

# ruff: noqa: BLE001  (candidates raise anything at all)
from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # `signal` itself would import enum
import marshal
import os
import sys
import time

if False:  # typing alone costs 8 ms
    from typing import Any

    from pipeline.verifiers.inside.nest import hung_up, nursery
    from pipeline.verifiers.inside.wire import read_frame, write_frame
    from pipeline.verifiers.inside.work import import_ahead, run_child


Limits = dict[str, "Any"]


def limit_child(limits: Limits) -> None:
    import resource

    memory = limits["memory"]
    seconds = int(limits["seconds"]) + 1
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file"], limits["file"]))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits["open_files"], limits["open_files"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limits["processes"]:
        resource.setrlimit(resource.RLIMIT_NPROC, (limits["processes"], limits["processes"]))


def become_child(limits: Limits, files: list[int], keep: int | None) -> None:
    """In the child: its own session, standard files, no other descriptor, limits that only fall."""
    os.setsid()
    high = [os.dup2(source, 500 + place) for place, source in enumerate([*files, *([] if keep is None else [keep])])]
    for place, source in enumerate(high):
        os.dup2(source, place)
    os.closerange(len(high), 1 << 16)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    limit_child(limits)


def end_all(children: list[int], alone: bool) -> None:
    """Everything that was started is gone when this returns (only in a process namespace of our own)."""
    for child in [-1] if alone else children:
        try:
            os.kill(-1, signal.SIGKILL) if alone else os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:
            continue
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def wait_child(children: dict[int, Any], end: float) -> tuple[Any, int] | None:
    """(who ended, its wait status), or None when the time is over. Orphans of the candidate are reaped."""
    while True:
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in children:
                return children[pid], status
            if pid == 0:
                break
        left = end - time.monotonic()
        if left <= 0 or hung_up():
            return None
        signal.sigtimedwait([signal.SIGCHLD], min(left, LOOK_S))


LOOK_S = 0.05
"""How often the first process looks whether the judge has hung up, while a child runs."""


def contents(fd: int, limit: int) -> bytes:
    size = os.fstat(fd).st_size
    return os.pread(fd, min(size, limit + 1), 0)


def scratch_file(alone: bool) -> int:
    """A file without a name, in memory; in the sandbox below its limit on such memory."""
    if not alone:
        return os.memfd_create("scratch")
    return os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o600)


class Child:
    """A forked piece of work: who it is in the report, its files, and when it began."""

    def __init__(self, kind: str, pid: int, files: list[int]) -> None:
        self.kind, self.pid, self.files, self.began = kind, pid, files, time.monotonic()

    def report(self, control: int, status: int | None, limits: Limits) -> None:
        milliseconds = int((time.monotonic() - self.began) * 1000)
        code = "timeout" if status is None else str(os.waitstatus_to_exitcode(status))
        out = contents(self.files[1], limits["output"])
        error = contents(self.files[2], 1 << 16)[-2048:]
        result = contents(self.files[3], limits["output"])
        head = f"{self.kind} {code} {milliseconds} {len(out)} {len(error)} {len(result)}\n".encode()
        for fd in self.files:
            os.close(fd)
        write_frame(control, head, out, error, result)


def watch(control: int, children: list[Child], limits: Limits) -> None:
    """Reports each child when it ends, or when the time is over; leaves nothing of them behind."""
    end = time.monotonic() + limits["seconds"]
    while children:
        ended = wait_child({child.pid: child for child in children}, end)
        if hung_up():
            end_all([child.pid for child in children], limits["alone"])
            os._exit(0)
        if len(children) == 1 or ended is None:
            end_all([child.pid for child in children], limits["alone"])
        if ended is None:
            for child in children:
                child.report(control, None, limits)
            return
        child, status = ended
        children.remove(child)
        child.report(control, status, limits)


def main(control: int, channels: list[int]) -> tuple[Any, ...]:
    """The first process: takes work until the judge hangs up. Returns the work in a forked child."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for module in ("resource", "_sitebuiltins"):
        __import__(module)
    quitter = sys.modules["_sitebuiltins"].Quitter
    for name in ("exit", "quit"):  # what `site` adds and honest programs call
        setattr(sys.modules["builtins"], name, quitter(name, "Ctrl-D (i.e. EOF)"))
    write_frame(control, b"ready")
    children: list[Child] = []
    while True:
        try:
            limits, work = marshal.loads(read_frame(control))
        except EOFError:
            os._exit(0)  # taking the interpreter down in order would cost as much as starting it
        files = [scratch_file(limits["alone"]) for _ in range(4)]  # standard input, output, error; the result
        if work[0] == "stdin":
            os.pwrite(files[0], work[2].encode("utf-8", "surrogateescape"), 0)
        import_ahead(work[1])
        channel = channels.pop(0) if work[0] in ("serve", "check") else None
        pid = os.fork()
        if pid == 0:
            become_child(limits, files, channel)
            return work  # type: ignore[no-any-return]
        children.append(Child(work[0], pid, files))
        if channel is not None:
            os.close(channel)
        if not channels or channel is None:
            watch(control, children, limits)


def end_like_python(code: int) -> None:
    """What the interpreter does when a program ends, without taking every module down first (5 ms)."""
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        if "atexit" in sys.modules:
            sys.modules["atexit"]._run_exitfuncs()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            code = code or 120
    os._exit(code)


def exit_code(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return (error.code or 0) & 0xFF
    sys.stderr.write(f"{error.code}\n")
    return 1


if __name__ == "__main__":
    if sys.argv[2:] == ["nursery"]:
        _sockets = nursery(int(sys.argv[1]))
    else:
        _sockets = int(sys.argv[1]), [int(_channel) for _channel in sys.argv[2:]]
    _work = main(*_sockets)
    _code = 0
    try:
        run_child(_work)
    except SystemExit as _error:
        _code = exit_code(_error)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        _code = 1
    end_like_python(_code)
