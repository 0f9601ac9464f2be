"""Files that are either whole and on the disk, or not there: rename, fsync, lock, checksum."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import OaplError, RequestError, WorkError

TEMPORARY = ".tmp-"
"""Start of the name of everything that is still being written; whoever holds the lock may delete it."""


def sync_file(path: Path) -> None:
    """Waits until the file's bytes are on the disk, not only in the kernel's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


sync_folder = sync_file  # a folder's entries (a rename) are synced by the same call on the folder itself


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; on leaving without an exception it becomes `path`, durably.

    With an exception `path` is what it was, and the temporary file is gone.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        yield temporary
        sync_file(temporary)
        temporary.rename(path)
        sync_folder(path.parent)
    except BaseException:
        # A disk that is full or gone may refuse this too; the next writer deletes it then.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_durably(path: Path, data: bytes) -> None:
    """Replaces the file in one step: a reader sees the old bytes or the new ones, never a mixture."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of the file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process, and one thread, at a time; the others wait. The lock (flock) ends with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


_REASONS = {
    errno.ENOSPC: "no space left on the disk; free some and run the command again",
    errno.ENOENT: "the folder is gone; mount or make it again",
    errno.EDQUOT: "the disk quota is used up; free some and run the command again",
    errno.EROFS: "the file system is mounted read-only; remount it or choose another folder",
    errno.EACCES: "permission denied; choose a folder that may be written",
    errno.EPERM: "permission denied; choose a folder that may be written",
    errno.ENOTDIR: "a part of this path is a file; choose another folder",
    errno.EEXIST: "a file has this name; choose another folder",
}


def work_error(path: Path, error: OSError, kept: str = "") -> WorkError:
    """One line for a person about a file system that refused: where, why, and what is safe."""
    reason = _REASONS.get(error.errno or 0) or f"{' '.join(str(error).split())}; mend the file system and run again"
    return WorkError(f"{path}: can't be written: {reason}{kept}")


@contextlib.contextmanager
def told_in_one_line(path: Path) -> Iterator[None]:
    """Turns what the operating system says about `path` into a WorkError."""
    try:
        yield
    except OaplError:
        raise
    except OSError as error:  # the disk, not the program, is at fault: people need the line, not the stack
        raise work_error(path, error) from error


_locks: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderLock:
    """An exclusive lock on a folder, held until `release` or the end of the process, however it ends.

    Raises RequestError where another process holds it. The lock is on an open file (flock), so nothing
    is left to clean up after a SIGKILL.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._descriptor, 32).decode(errors="replace").strip() or "unknown"
            self.drop()
            raise RequestError(
                f"{folder}: another process (id {holder}) is writing here; wait for it or choose another folder"
            ) from None
        except OSError:
            self.drop()
            raise
        _locks.add(self)
        # Who holds it is a courtesy to the refused; on a full disk the lock must work without.
        with contextlib.suppress(OSError):
            self.path.write_text(f"{os.getpid()}\n")

    def drop(self) -> None:
        """Closes this process's copy of the lock's descriptor."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def release(self) -> None:
        _locks.discard(self)
        self.drop()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _drop_in_child() -> None:
    # A forked engine worker that outlives its killed parent must not go on holding the parent's lock.
    for lock in list(_locks):
        lock.drop()


os.register_at_fork(after_in_child=_drop_in_child)
