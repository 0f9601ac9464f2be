"""Frames: how the judge, the first process and its children speak to each other."""

from __future__ import annotations

import os


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
