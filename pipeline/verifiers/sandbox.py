"""Untrusted Python, kept apart: one sandbox a piece of work, all of it gone when the sandbox closes.

Level "bubblewrap": own user, PID, network, IPC, UTS, cgroup and mount namespaces; a read-only root
that holds the Python interpreter, its standard library and the C libraries, nothing else of the
host; /tmp and /dev/shm in memory with a size; empty environment; an unprivileged uid, on the host
as well; limits on CPU, address space, file size, processes and descriptors set by the first
process (`inside/first.py`), and on resident memory and wall clock by the judge outside.
Level "process": the same first process and limits, without the namespaces. The host's files and
network are within the candidate's reach; only an explicit setting admits it.

Whatever comes out of a sandbox is the candidate's word. Expected values never go in.
"""

from __future__ import annotations

import contextlib
import functools
import marshal
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any, Self

from pipeline.errors import WorkError
from pipeline.verifiers import inside
from pipeline.verifiers.bubblewrap import HOW_TO, NOBODY, TMP_BYTES, bubblewrap_command, find_bubblewrap, interpreter
from pipeline.verifiers.processes import resident_bytes
from pipeline.verifiers.seccomp import seccomp_filter

FILE_BYTES = 4 << 20
PROCESSES = 32
OPEN_FILES = 64
GRACE_S = 2.0
"""Seconds past a limit that the first process may take to say so, before the judge ends everything."""

START_S = 20.0
"""A machine under load may take its time to start a process."""


class SandboxDied(Exception):
    """The sandbox ended before it answered: killed from outside, or by the candidate's own doing."""


class OverLimit(Exception):
    """The sandbox used up what it may of "time", "memory" or "output"; it is to be closed."""


class Refused(Exception):
    """The isolation asked for can't be had; the message says how to get it."""


@dataclass(frozen=True, slots=True)
class Limits:
    seconds: float
    memory_bytes: int
    output_bytes: int

    def inside(self, alone: bool) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "memory": self.memory_bytes,
            "output": self.output_bytes,
            "file": max(self.output_bytes + 1, FILE_BYTES),
            "processes": PROCESSES if alone else 0,
            "open_files": OPEN_FILES,
            "alone": alone,
        }


@dataclass(frozen=True, slots=True)
class Ended:
    """How one child ended. `code` is None when its time was over, negative for a signal."""

    code: int | None
    milliseconds: float
    output: bytes
    error: bytes
    result: bytes


_STUB = """
import marshal, os, sys
def read(size):
    data = b""
    while len(data) < size:
        data += os.read(int(sys.argv[1]), size - len(data))
    return data
_VALUES, *_parts = marshal.loads(read(int.from_bytes(read(4), "big")))
for _part in _parts:
    exec(_part, globals())
"""


@functools.cache
def first_process() -> bytes:
    """What runs inside, compiled here, since the Python there is the one that runs this, and compiling costs 3 ms."""
    here = Path(inside.__file__).parent

    def compiled(name: str) -> CodeType:
        text = (here / f"{name}.py").read_text(encoding="utf-8").replace("\nfrom typing import Any\n", "\n")
        return compile(text, f"{name}.py", "exec", dont_inherit=True)

    return marshal.dumps([compiled("values"), *map(compiled, inside.PARTS)])


@functools.cache
def shares_safely() -> bool:
    """Whether two processes of one sandbox can't reach into each other: there is no /proc, and the filter of system
    calls denies the rest. What is left to them is to end one another."""
    return seccomp_filter() is not None


@functools.cache
def why_refused() -> str | None:
    """None when bubblewrap works here; else one line that says what is missing and how to get it."""
    if sys.platform != "linux":
        return f"no isolation: bubblewrap needs Linux; {HOW_TO}"
    if find_bubblewrap() is None:
        return f"no isolation: no bwrap found; {HOW_TO}"
    try:
        with Sandbox("bubblewrap", Limits(5.0, 256 << 20, 1 << 10)) as sandbox:
            ended = sandbox.run(("stdin", "print(input())", "ok\n"))
    except (SandboxDied, OverLimit, OSError, WorkError) as error:
        return f"no isolation: bwrap does not work here ({' '.join(str(error).split())[:200]}); {HOW_TO}"
    return (
        None if ended.output == b"ok\n" else f"no isolation: bwrap does not work here ({ended.error!r:.200}); {HOW_TO}"
    )


def _popen(command: list[str], passed: list[int], folder: str, alone: bool) -> subprocess.Popen[bytes]:
    user: dict[str, Any] = {}
    if os.geteuid() == 0 and alone:
        user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=passed,
        cwd=folder,
        env={},
        start_new_session=not alone,
        **user,
    )


class _Nursery:
    """An outer sandbox in which a Python waits, all imported, and forks a nested sandbox for each piece of work.

    The nested one has its own PID, mount and IPC namespaces, /tmp and /dev/shm, no capability, and the filter of
    system calls; it shares the outer one's empty network and its read-only root. It costs a fifth of a sandbox that
    starts from nothing: neither bwrap nor Python has to start, and `typing` and its like are there.
    """

    def __init__(self) -> None:
        program = seccomp_filter()
        assert program is not None
        self._line, theirs = socket.socketpair()
        command = [part for part in bubblewrap_command() if part != "--disable-userns"]
        command += ["--cap-add", "CAP_SYS_ADMIN", "--", str(interpreter()), "-I", "-S", "-B", "-X", "utf8", "-c", _STUB]
        with theirs:
            self.process = _popen([*command, str(theirs.fileno()), "nursery"], [theirs.fileno()], "/", True)
        code = first_process()
        head = len(program).to_bytes(4, "big") + TMP_BYTES.to_bytes(8, "big")
        self._line.settimeout(START_S)
        self._line.sendall(len(code).to_bytes(4, "big") + code + head + program)
        if self._line.recv(9, socket.MSG_WAITALL) != b"\0\0\0\5ready":
            self.close()
            raise SandboxDied("the nursery did not start")

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def fork(self, fds: list[int]) -> None:
        """A nested sandbox whose first process holds these sockets."""
        try:
            socket.send_fds(self._line, [b"x"], fds)
        except OSError:
            raise SandboxDied("the nursery ended") from None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        self._line.close()


_nursery: _Nursery | None = None
_nurseries_allowed = False


def allow_nurseries() -> None:
    """Lets this process keep a warm outer sandbox. For processes of one thread that end soon after their work."""
    global _nurseries_allowed
    _nurseries_allowed = shares_safely()


def _warm_nursery() -> _Nursery | None:
    """The one of this process, started again if it ended; None where sandboxes start from nothing."""
    global _nursery, _nurseries_allowed
    if not _nurseries_allowed:
        return None
    if _nursery is None or not _nursery.alive:
        try:
            _nursery = _Nursery()
            with Sandbox("bubblewrap", Limits(5.0, 256 << 20, 1 << 10)) as sandbox:
                if sandbox.run(("stdin", "print(input())", "ok\n")).output != b"ok\n":
                    raise SandboxDied("the nested sandbox does not work")
        except (SandboxDied, OverLimit, OSError):
            # Nested namespaces can't be had here; sandboxes that start from nothing may still work.
            _nurseries_allowed = False
            if _nursery is not None and _nursery.alive:
                _nursery.close()
            return None
    return _nursery


class Sandbox:
    """One sandbox, a context manager: leaving it ends every process in it, and waits until they are gone.

    `channels`: our ends of sockets; the first work "serve" or "check" holds the other end of the first, and so on.
    Raises SandboxDied and OverLimit from `run`.
    """

    def __init__(self, level: str, limits: Limits, channels: int = 0) -> None:
        self.level = level
        self.limits = limits
        self.alone = level == "bubblewrap"
        self._stack = contextlib.ExitStack()
        self._control, theirs = socket.socketpair()
        self._stack.callback(self._control.close)
        pairs = [socket.socketpair() for _ in range(channels)]
        self.channels = [ours for ours, _ in pairs]
        far = [theirs, *(other for _, other in pairs)]
        for channel in self.channels:
            self._stack.callback(channel.close)
        self._nursery = _warm_nursery() if self.alone else None
        self._process: subprocess.Popen[bytes] | None = None
        try:
            fds = [end.fileno() for end in far]
            if self._nursery is not None:
                self._nursery.fork(fds)
            else:
                self._process = self._start(fds)
        except BaseException:
            self._stack.close()
            raise
        finally:
            for end in far:
                end.close()
        self._reports: dict[str, Ended] = {}
        self._started = self.closed = False
        if self._process is not None:
            self._send(first_process())

    def _start(self, passed: list[int]) -> subprocess.Popen[bytes]:
        python = ["-I", "-S", "-B", "-X", "utf8", "-c", _STUB, *map(str, passed)]
        if self.alone:
            command, folder = [*bubblewrap_command(), *self._filter(passed), "--", str(interpreter()), *python], "/"
        else:
            folder = tempfile.mkdtemp(prefix="oapl-")
            self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
            command = [str(interpreter()), *python]
        return _popen(command, passed, folder, self.alone)

    def _filter(self, passed: list[int]) -> list[str]:
        """Option of bwrap that loads the filter of system calls; its descriptor joins `passed`."""
        program = seccomp_filter()
        if program is None:
            return []
        read, write = os.pipe()
        os.write(write, program)
        os.close(write)
        passed.append(read)
        self._stack.callback(os.close, read)
        return ["--seccomp", str(read)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends everything inside; returns when the kernel has taken the last process down."""
        if self.closed:
            return
        self.closed = True
        for channel in self.channels:
            channel.close()
        if self._process is not None:
            # A bwrap that is ended while it starts leaves a child that waits for it for ever.
            with contextlib.suppress(SandboxDied, OverLimit):
                self.ready()
            if self._process.poll() is None:
                if not self.alone:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(self._process.pid, signal.SIGKILL)
                self._process.kill()
            self._process.wait()
            assert self._process.stderr is not None
            self._process.stderr.close()
        # The first process held the other end: its end of file says that the namespace is empty.
        gone = False
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
            self._control.settimeout(GRACE_S)
            while self._control.recv(1 << 16):
                pass
            gone = True
        if self._nursery is not None and not gone:
            self._nursery.close()
        self._stack.close()

    def send(self, work: tuple[Any, ...]) -> None:
        """Hands over the work; `finish` waits for its end."""
        self._send(marshal.dumps((self.limits.inside(self.alone), work)))

    def _send(self, data: bytes) -> None:
        """Blocks when the socket is full, at most the limit and a grace: a stopped sandbox counts as dead."""
        try:
            self._control.settimeout(self.limits.seconds + GRACE_S + START_S)
            self._control.sendall(len(data).to_bytes(4, "big") + data)
        except OSError:
            raise SandboxDied(self._last_words()) from None

    def ready(self) -> None:
        """Waits until the first process runs: what it takes to start is not the candidate's time."""
        if not self._started:
            self._frame(time.monotonic() + START_S, 16)
            self._started = True

    def say(self, channel: socket.socket, frame: bytes, end: float) -> None:
        """A frame to the child. One that has ended hears nothing; `hear` tells."""
        channel.settimeout(max(0.01, end - time.monotonic()))
        try:
            channel.sendall(len(frame).to_bytes(4, "big") + frame)
        except TimeoutError:
            raise OverLimit("time") from None
        except OSError:
            return

    def hear(self, channel: socket.socket, end: float, largest: int) -> bytes | None:
        """A frame from the child, or None where it has ended."""
        channel.settimeout(None)
        try:
            size = int.from_bytes(self._receive(channel, 4, end), "big")
            if size > largest:
                raise OverLimit("output")
            return self._receive(channel, size, end)
        except EOFError:
            return None

    def finish(self, kind: str) -> Ended:
        """Waits until the child with that work has ended, at most the limit and a grace."""
        self.ready()
        end = time.monotonic() + self.limits.seconds + GRACE_S
        while kind not in self._reports:
            frame = self._frame(end, 3 * self.limits.output_bytes + (1 << 16))
            try:
                head, _, body = frame.partition(b"\n")
                who, code, milliseconds, *sizes = head.decode("ascii").split(" ")
                out, err, result = (int(size) for size in sizes)
                exit_code = None if code == "timeout" else int(code)
                parts = body[:out], body[out : out + err], body[out + err : out + err + result]
                self._reports[who] = Ended(exit_code, float(milliseconds), *parts)
            except ValueError:
                raise SandboxDied("the first process spoke nonsense") from None
        return self._reports.pop(kind)

    def run(self, work: tuple[Any, ...]) -> Ended:
        self.send(work)
        return self.finish(work[0])

    def _frame(self, end: float, largest: int) -> bytes:
        try:
            size = int.from_bytes(self._receive(self._control, 4, end), "big")
            if size > largest:
                raise SandboxDied("the first process sent more than it may")
            return self._receive(self._control, size, end)
        except EOFError:
            raise SandboxDied(self._last_words()) from None

    def _receive(self, source: socket.socket, size: int, end: float) -> bytes:
        parts = []
        while size:
            self._wait_readable(source, end)
            try:
                part = source.recv(min(size, 1 << 20))
            except OSError:
                part = b""
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _wait_readable(self, source: socket.socket, end: float) -> None:
        """Raises OverLimit when the time or the memory is used up before there is something to read."""
        step = 0.2
        while True:
            left = end - time.monotonic()
            if select.select([source], [], [], max(0.0, min(left, step)))[0]:
                return
            if left <= 0:
                raise OverLimit("time")
            self.check_memory()
            step = 0.1

    def check_memory(self) -> None:
        """All processes of the sandbox together may hold what one may, and what their /tmp may."""
        process = self._process or (self._nursery and self._nursery.process)
        if process and resident_bytes(process.pid) > self.limits.memory_bytes + TMP_BYTES:
            raise OverLimit("memory")

    def _last_words(self) -> str:
        """Why the sandbox ended, as bwrap or Python put it."""
        if self._process is None:
            return "the nested sandbox ended"
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)
        if self._process.poll() is None:
            return "the sandbox hung up"
        assert self._process.stderr is not None
        os.set_blocking(self._process.stderr.fileno(), False)
        words = (self._process.stderr.read(4096) or b"").decode("utf-8", "replace").strip()
        return words.splitlines()[-1] if words else f"the sandbox ended with {self._process.returncode}"
