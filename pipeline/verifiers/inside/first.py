"""What runs inside a sandbox, as its first process: forks a fresh child for each piece of work.

Started as code (`python -I -S -c STUB`, which reads it), so it imports only what is built in. Nothing in here is a
secret, and nothing that comes out of a sandbox is believed: whoever reads its frames treats them
as the candidate's own words. The work comes in as marshal (from the judge, who is trusted); what
goes out is a status line and raw bytes.

Work: ("stdin", code, input)     run the program on that standard input
      ("call", code, name, args)  call the function once; args and result as in values.py
      ("serve", code, name)       answer calls on a channel until it closes
      ("check", test, name)       run `check(candidate)`, candidate being calls on a channel
A candidate and the test that calls it may live in one sandbox: each work takes the next channel, and the candidate
is forked before the test is heard of.
"""

# ruff: noqa: BLE001  (candidates raise anything at all)
from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # `signal` itself would import enum
import marshal
import os
import sys
import time

if False:  # typing alone costs 8 ms; of values.py, sandbox.py passes the text, for the children that need it
    from typing import Any

    from pipeline.verifiers.values import CantCross, dumps, loads


def load_values() -> None:
    space = globals()
    exec(compile(space["_VALUES"], "values.py", "exec", dont_inherit=True), space)


Limits = dict[str, "Any"]
_NAME = "solution.py"


def read_exactly(fd: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def read_frame(fd: int) -> bytes:
    return read_exactly(fd, int.from_bytes(read_exactly(fd, 4), "big"))


def write_frame(fd: int, *parts: bytes) -> None:
    rest = memoryview(b"".join((sum(map(len, parts)).to_bytes(4, "big"), *parts)))
    while rest:
        rest = rest[os.write(fd, rest) :]


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


def hung_up() -> bool:
    """Whether the judge is gone or has seen enough. Only a nested first process looks: any other is killed."""
    return _LINE is not None and bool(_LINE.poll(0))


_LINE: Any = None


def contents(fd: int, limit: int) -> bytes:
    size = os.fstat(fd).st_size
    return os.pread(fd, min(size, limit + 1), 0)


def scratch_file(alone: bool) -> int:
    """A file without a name, in memory; in the sandbox below its limit on such memory."""
    if not alone:
        return os.memfd_create("scratch")
    return os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o600)


def prepare_main(code: str) -> tuple[Any, dict[str, Any]]:
    """The compiled program and the fresh `__main__` it runs in."""
    module = type(sys)("__main__")
    module.__dict__.update(__file__=_NAME, __builtins__=sys.modules["builtins"])
    sys.modules["__main__"] = module
    sys.argv[:] = [_NAME]
    return compile(code, _NAME, "exec", dont_inherit=True), module.__dict__


def find_function(space: dict[str, Any], name: str) -> Any:
    if name in space:
        return space[name]
    solution = space.get("Solution")
    if solution is not None and hasattr(solution, name):
        return getattr(solution(), name)
    raise NameError(f"no function {name!r} in the answer")


_LENT = {
    "typing": "List Dict Set Tuple Optional Any Union Deque DefaultDict Iterable Iterator Callable",
    "collections": "defaultdict deque Counter OrderedDict namedtuple",
    "heapq": "heappush heappop heapify heapreplace heappushpop nlargest nsmallest",
    "bisect": "bisect bisect_left bisect_right insort",
    "functools": "cache lru_cache reduce cmp_to_key",
    "itertools": "accumulate chain combinations permutations product groupby pairwise zip_longest",
    "math": "inf gcd lcm sqrt ceil floor comb log2 isqrt",
}
_LENT_MODULES = {
    "math",
    "heapq",
    "bisect",
    "itertools",
    "functools",
    "collections",
    "random",
    "re",
    "string",
    "operator",
}


def lend_imports(program: Any, space: dict[str, Any]) -> None:
    """Starter code with `List` and friends takes their imports for granted, as LiveCodeBench's harness does."""
    names, todo = set(), [program]
    while todo:
        code = todo.pop()
        names.update(code.co_names)
        todo.extend(item for item in code.co_consts if isinstance(item, type(program)))
    for module, lent in _LENT.items():
        wanted = names.intersection(lent.split()) - {module}
        if wanted:
            __import__(module)
            space.update((name, getattr(sys.modules[module], name)) for name in wanted)
    for module in names & _LENT_MODULES:
        if module not in space:
            space[module] = __import__(module)


def describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except BaseException:
        return "an exception that can't be printed"


def call_once(function: Any, frame: bytes) -> bytes:
    """One answer of the candidate's: `=` and the value, `!` and the exception, `?` and why it can't cross."""
    try:
        arguments, named = loads(frame.decode())
        value = function(*arguments, **named)
    except BaseException as error:
        return f"!{type(error).__name__}\n{describe(error)}".encode("utf-8", "replace")
    try:
        return b"=" + dumps(value).encode()
    except BaseException as error:
        return b"?" + describe(error).encode("utf-8", "replace")


def serve(space: dict[str, Any], name: str) -> None:
    function = find_function(space, name)
    while True:
        try:
            frame = read_frame(4)
        except EOFError:
            return
        write_frame(4, call_once(function, frame))


class Remote(Exception):
    """What the candidate raised and has no name among the built-in exceptions."""


def remote_candidate(raised: list[BaseException], heard: list[int]) -> Any:
    import builtins

    def candidate(*arguments: Any, **named: Any) -> Any:
        write_frame(4, b"c", dumps([arguments, named]).encode())
        answer = read_frame(4)
        heard.append(len(answer))
        kind, text = answer[:1], answer[1:].decode("utf-8", "replace")
        if kind == b"=":
            return loads(text)
        name, _, said = text.partition("\n")
        known = getattr(builtins, name, None) if kind == b"!" else None
        if not (isinstance(known, type) and issubclass(known, Exception)):
            known = Remote
        try:
            error = known(said.partition(": ")[2] if known is not Remote else (said or text))
        except Exception:
            error = Remote(said)
        raised.append(error)
        raise error

    return candidate


def check(test: str, name: str) -> None:
    """Runs the test code; its last frame is `p` (passed), `f` (failed) or `b` (the test is at fault)."""
    load_values()
    raised: list[BaseException] = []
    heard: list[int] = []
    try:
        program, space = prepare_main(test)
        space["candidate"] = space[name] = candidate = remote_candidate(raised, heard)
        exec(program, space)
        function = space["check"]
    except BaseException as error:
        write_frame(4, b"b", describe(error).encode("utf-8", "replace"))
        return
    try:
        function(candidate)
    except AssertionError as error:
        line = _failing_line(error, test)
        write_frame(4, b"f", f"{describe(error)}{line}".encode("utf-8", "replace"))
    except BaseException as error:
        # A value that can't cross is the test's own only before the candidate has had a say.
        mine = isinstance(error, NameError | ImportError) or (isinstance(error, CantCross) and not heard)
        mine = mine and not any(error is other for other in raised)
        write_frame(
            4, b"b" if mine else b"f", (describe(error) + _failing_line(error, test)).encode("utf-8", "replace")
        )
    else:
        write_frame(4, b"p")


def _failing_line(error: BaseException, test: str) -> str:
    number, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _NAME:
            number = trace.tb_lineno
        trace = trace.tb_next
    lines = test.split("\n")
    return f" (test line {number}: {lines[number - 1].strip()[:160]})" if 0 < number <= len(lines) else ""


def run_child(work: tuple[Any, ...]) -> None:
    """In the child. Returns or raises like a program would, so that Python ends as it always does."""
    if work[0] == "check":
        # SIGINT stays ignored: what shares the sandbox shall not interrupt a test at a place of its choice.
        return check(work[1], work[2])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        program, space = prepare_main(work[1])
    except BaseException as error:
        os.write(3, b"s" + describe(error).encode("utf-8", "replace"))
        raise SystemExit(1) from None
    if work[0] == "stdin":
        os.close(3)
        exec(program, space)
        return None
    load_values()
    lend_imports(program, space)
    space["__name__"] = "solution"
    sys.modules["solution"] = sys.modules["__main__"]
    exec(program, space)
    if work[0] == "serve":
        return serve(space, work[2])
    answer = call_once(find_function(space, work[2]), work[3].encode())
    result = os.dup(3)
    write_frame(result, answer)
    return None


_COMMON = (
    "typing", "collections", "re", "itertools", "functools", "heapq", "bisect", "math", "string", "random", "copy",
    "operator", "datetime", "decimal", "fractions", "statistics", "hashlib", "json",
)  # fmt: skip


def import_ahead(text: str) -> None:
    """Imports what the text names of the common modules, so that each forked child finds it there: `typing` alone
    costs as much as starting Python."""
    if "import" in text or text.startswith("class Solution"):
        for module in _COMMON:
            if module in text and module not in sys.modules:
                __import__(module)


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


_NEW_PID = 0x20000000
_NEW_MOUNTS_AND_IPC = 0x00020000 | 0x08000000
_NO_SUID_NO_DEVICES = 2 | 4
_PRIVATE = 0x4000 | 0x40000  # MS_REC, MS_PRIVATE


def nursery(fd: int) -> tuple[int, list[int]]:
    """Stays in an outer sandbox, with everything imported, and forks a nested sandbox for each set of sockets that
    arrives, until the judge hangs up. Returns those sockets in the nested first process."""
    import ctypes
    import gc
    import select
    import socket

    for module in (*_COMMON, "resource", "_sitebuiltins"):
        __import__(module)
    load_values()
    libc = ctypes.CDLL(None, use_errno=True)
    size = int.from_bytes(read_exactly(fd, 4), "big")
    tmp_bytes = int.from_bytes(read_exactly(fd, 8), "big")
    program = read_exactly(fd, size)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    line = socket.socket(fileno=fd)
    myself = os.pidfd_open(os.getpid())
    write_frame(fd, b"ready")
    while True:
        message, fds, _, _ = socket.recv_fds(line, 16, 8)
        if not message:
            os._exit(0)
        # The next child is the first process of a new PID namespace; those after it are not.
        if libc.unshare(_NEW_PID) != 0:
            os._exit(99)
        child = os.fork()
        if child and libc.setns(myself, _NEW_PID) != 0:
            os._exit(99)
        if child == 0:
            line.close()
            nest(libc, program, tmp_bytes)
            global _LINE
            _LINE = select.poll()
            _LINE.register(fds[0], select.POLLHUP | select.POLLRDHUP)
            return fds[0], fds[1:]
        for passed in fds:
            os.close(passed)


def nest(libc: Any, program: bytes, tmp_bytes: int) -> None:
    """Called by the first process of a new PID namespace; gives it new mount and IPC namespaces, fresh /tmp and
    /dev/shm, no capability, and the filter of system calls. Any step that fails ends the process."""
    import ctypes

    def must(result: int) -> None:
        if result != 0:
            os._exit(99)

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    must(libc.unshare(_NEW_MOUNTS_AND_IPC))
    must(libc.prctl(1, signal.SIGKILL, 0, 0, 0))  # PR_SET_PDEATHSIG
    must(libc.mount(None, b"/", None, _PRIVATE, None))
    for folder in (b"/tmp", b"/dev/shm"):
        options = b"mode=1777,size=%d" % tmp_bytes
        must(libc.mount(b"tmpfs", folder, b"tmpfs", _NO_SUID_NO_DEVICES, options))
    os.chdir("/tmp")
    must(libc.prctl(47, 4, 0, 0, 0))  # PR_CAP_AMBIENT, CLEAR_ALL
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    must(libc.capset(header, none))
    must(libc.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
    buffer = ctypes.create_string_buffer(program, len(program))

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_void_p))

    loaded = Filter(len(program) // 8, ctypes.addressof(buffer))
    must(libc.prctl(22, 2, ctypes.byref(loaded), 0, 0))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


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
