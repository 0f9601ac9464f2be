"""Sandboxes inside a sandbox: an outer first process stays, all imported, and forks a nested one for each work."""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # `signal` itself would import enum
import os

if False:  # typing alone costs 8 ms
    from typing import Any

    from pipeline.verifiers.inside.wire import read_exactly, write_frame
    from pipeline.verifiers.inside.work import _COMMON, load_values


_LINE: Any = None
_NEW_PID = 0x20000000
_NEW_MOUNTS_AND_IPC = 0x00020000 | 0x08000000
_NO_SUID_NO_DEVICES = 2 | 4
_PRIVATE = 0x4000 | 0x40000  # MS_REC, MS_PRIVATE


def hung_up() -> bool:
    """Whether the judge is gone or has seen enough. Only a nested first process looks: any other is killed."""
    return _LINE is not None and bool(_LINE.poll(0))


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
