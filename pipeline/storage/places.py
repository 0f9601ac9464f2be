"""Where a dataset's files lie: a folder of a file system, or what an fsspec URL names. The one module that knows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from pipeline.errors import WorkError
from pipeline.storage import durable

Found = TypeVar("Found")


class Overtaken(OSError):
    """The file is not the one that was seen: somebody else has replaced it."""


class Place(Protocol):
    """A folder of files that are whole or not there. Names are relative to it, with `/` between their parts.

    What the file system or the store refuses is an OSError; FileNotFoundError says that there is no such file.
    """

    exclusive: bool
    """Whether `lock` keeps a second writer out for as long as the first one lives."""

    parallel: int
    """How many reads at a time are worth while."""

    def said(self, name: str = "") -> str:
        """The place, or a file in it, as a person calls it."""

    def prepare(self, *folders: str) -> None:
        """Makes the place, and folders in it, where they have to be made."""

    def pin(self) -> None:
        """Remembers what is there now: writing fails once it is another folder."""

    def lock(self) -> AbstractContextManager[Any]:
        """Keeps other writers out. Raises RequestError where another one is there and `exclusive` holds."""

    def read(self, name: str) -> bytes: ...

    def read_tagged(self, name: str) -> tuple[bytes, str | None]:
        """The same, and a tag of this content for `replace`."""

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """The files that are there."""

    def parse(self, name: str, parser: Callable[[IO[bytes] | Path], Found]) -> Found:
        """What the parser makes of a file, of which it reads what it needs; it may be called more than once."""

    def write(self, name: str, data: bytes) -> None:
        """Puts a file there in one step, durably; an older one of this name is replaced."""

    def replace(self, name: str, data: bytes, seen: str | None) -> str | None:
        """The same, if the file is still the one that was read or written with this tag (null: is not there).

        Returns the new tag. Raises Overtaken; only an `exclusive` place need not compare.
        """

    def new_file(self, name: str) -> AbstractContextManager[Path]:
        """A local path to write to; on leaving without an exception the file is there, durably, as by `write`."""

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of the files that are there."""

    def names(self, folder: str = "") -> list[str]:
        """Names of the files directly in the place, or in a folder of it, without the folder's."""

    def delete(self, names: Iterable[str]) -> None:
        """Deletes files; those that are not there are gone already."""

    def work_error(self, error: OSError, kept: str = "") -> WorkError:
        """One line for a person about a refusal: where, why, and what is safe."""


def is_url(place: str | Path) -> bool:
    return "://" in str(place)


def local_path(place: str | Path) -> Path | None:
    """The path that a person gave, also as `file://`; None for what must be fetched."""
    text = without_scheme(str(place))
    return None if is_url(text) else Path(text)


def without_scheme(place: str) -> str:
    """The same, of `file://` the path."""
    return place.removeprefix("file://")


class Folder:
    """A folder of this machine's file system."""

    exclusive = True
    parallel = 1

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened: tuple[int, int] | None = None

    def said(self, name: str = "") -> str:
        return str(self._path / name)

    def prepare(self, *folders: str) -> None:
        for name in ("", *folders):
            (self._path / name).mkdir(parents=True, exist_ok=True)
        self.pin()

    def pin(self) -> None:
        self._opened = self._identity()

    def lock(self) -> durable.FolderLock:
        return durable.FolderLock(self._path)

    def _identity(self) -> tuple[int, int]:
        """Device and inode: after an unmount the path leads to the empty mount point, where a shard would be lost."""
        status = self._path.stat()
        return status.st_dev, status.st_ino

    def _check(self) -> None:
        if self._opened is not None and self._identity() != self._opened:
            raise FileNotFoundError("the folder is not the one that was opened: was it unmounted or replaced?")

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()

    def read_tagged(self, name: str) -> tuple[bytes, str | None]:
        return self.read(name), None

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        found = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found[name] = self.read(name)
        return found

    def parse(self, name: str, parser: Callable[[IO[bytes] | Path], Found]) -> Found:
        return parser(self._path / name)

    def write(self, name: str, data: bytes) -> None:
        with self.new_file(name) as temporary:
            temporary.write_bytes(data)

    def replace(self, name: str, data: bytes, seen: str | None) -> str | None:
        self.write(name, data)  # under the lock
        return None

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        self._check()
        with durable.replacing(self._path / name) as temporary:
            yield temporary

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        found = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found[name] = (self._path / name).stat().st_size
        return found

    def names(self, folder: str = "") -> list[str]:
        try:
            return sorted(entry.name for entry in (self._path / folder).iterdir())
        except FileNotFoundError:
            return []

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            (self._path / name).unlink(missing_ok=True)

    def work_error(self, error: OSError, kept: str = "") -> WorkError:
        return durable.work_error(self._path, error, kept)
