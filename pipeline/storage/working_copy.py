"""A folder of this machine that stands for one at a URL: what changed there is brought, what changed here is sent.

Data are sent before the record that says that they are whole. Nothing at a URL is renamed or deleted here, and bytes
that are there already are not sent again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeAlias

from pipeline.errors import WorkError
from pipeline.storage import durable
from pipeline.storage.cache import FILES_AT_ONCE, cache_folder, fetch_file, key_of, told
from pipeline.storage.objects import Entry, Objects
from pipeline.storage.places import local_path

FEW = 32
"""Files of which each is asked for by itself; for more the folder is listed."""
STATE, LOCKS = ".copy.jsonl", ".copy.locks"
Wanted: TypeAlias = Sequence[str] | Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Marks:
    """What the files of a folder mean to who reads them at the URL: told by who knows, since nothing here does.

    Names are glob patterns (`fnmatch`), of a whole name or of its last part.
    """

    records: tuple[str, ...] = ()
    """Files that say that those beside them are whole: sent after them."""
    later: tuple[str, ...] = ()
    """Files that are sent after the records, in this order."""
    unfinished: Mapping[str, str] = field(default_factory=dict)
    """By a record's file name, the file that is put there before anything else until the record is."""
    shown: tuple[str, ...] = ()
    """Folders that are sent although their names begin with a dot."""
    by_content: tuple[str, ...] = ()
    """Records beside which files lie below the hash of their content, so that the size alone tells them apart."""

    def rank(self, name: str) -> int:
        """Files of a higher rank are sent later."""
        for number, pattern in enumerate(self.later):
            if fnmatchcase(name, pattern):
                return 2 + number
        last = name.rpartition("/")[2]
        return int(any(fnmatchcase(name, pattern) or fnmatchcase(last, pattern) for pattern in self.records))

    def hides(self, name: str) -> bool:
        return any(part.startswith(".") and part not in self.shown for part in name.split("/"))


@dataclass(frozen=True, slots=True)
class Known:
    """A file of a Copy as it was when it was last brought or sent, so that here and there are the same."""

    tag: str
    bytes: int
    changed: int
    """Nanoseconds since 1970."""
    sha256: str


@dataclass(slots=True)
class Sent:
    """What a call of `send` came to."""

    files: int = 0
    bytes: int = 0


class Copy:
    """A folder of this machine that stands for one at a URL: stages work on it, and then it is sent.

    What changed there since the last time is brought, what changed here is sent; where both did, `bring` lets the
    store's stand. Several processes of this machine may use it at once. `wanted` is a list of names, or what tells
    whether a name is.
    """

    def __init__(self, url: str, folder: Path, marks: Marks = Marks()) -> None:
        self.url, self.folder, self._marks = url.rstrip("/"), folder, marks
        self._store = Objects(self.url)
        self._known: dict[str, Known] = {}
        self._read = 0
        """Bytes of the state that are in `_known`."""
        self._reading = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def bring(self, wanted: Wanted, sums: Mapping[str, str] | None = None, below: str = "") -> set[str]:
        """Fetches those of the wanted files that are new or have changed there; returns those that are there.

        `sums` are SHA-256s that they must have. Where `wanted` tells of a name, only the folder `below` is listed.
        Raises WorkError where the store refuses.
        """
        with told(self.url):
            if callable(wanted):
                there = self._store.tree(below)
                entries = [entry for entry in there if not self._marks.hides(entry.name) and wanted(entry.name)]
            else:
                entries = list(self._there(wanted).values())
            changed = [entry.name for entry in entries if not self._is_here(entry)]
            with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
                list(threads.map(lambda name: self._bring(name, (sums or {}).get(name)), changed))
        return {entry.name for entry in entries}

    def bring_folder(self, folder: str) -> None:
        """All files in a folder of it, and in those below."""
        self.bring(lambda name: True, below=folder)

    def _there(self, names: Sequence[str]) -> dict[str, Entry]:
        """Those of the files that are at the URL."""
        if len(names) > FEW:
            wanted = set(names)
            return {entry.name: entry for entry in self._store.tree() if entry.name in wanted}
        with ThreadPoolExecutor(self._store.parallel) as threads:
            return {entry.name: entry for entry in threads.map(self._store.entry, names) if entry is not None}

    def _is_here(self, entry: Entry) -> bool:
        known = self._state().get(entry.name)
        return known is not None and known.tag == entry.tag and (self.folder / entry.name).exists()

    def _bring(self, name: str, sha256: str | None) -> None:
        path = self.folder / name
        with durable.locked(self._lock_of(name)):
            # Asked once more: another process may have brought or sent it since the listing.
            entry = self._store.entry(name)
            if entry is None or self._is_here(entry):
                return
            if not (path.is_file() and self._same(entry, path)):
                fetch_file(self._store, name, path, sha256)
                os.utime(path, (entry.modified, entry.modified))  # which orders verdict files and snapshots
            self._note(name, entry.tag, path.stat(), durable.sha256_file(path))

    def send(self, wanted: Wanted, twins: Mapping[str, str] | None = None) -> Sent:
        """Puts those of the wanted files that are new or have changed here, records after what they are of.

        `twins` names, for some of the files, one at the URL that has the same bytes: the store copies it. Raises
        WorkError where the store refuses; the same call then goes on with what is missing.
        """
        sent = Sent()
        with told(self.url):
            chosen = wanted if callable(wanted) else set(wanted).__contains__
            names = sorted(
                (name for name in self._names() if chosen(name)), key=lambda name: (self._marks.rank(name), name)
            )
            there = self._there(names)
            for name in names:
                folder, slash, record = name.rpartition("/")
                if name not in there and (mark := self._marks.unfinished.get(record)) is not None:
                    self._store.write(f"{folder}{slash}{mark}", b"{}\n")
            for name in names:
                with durable.locked(self._lock_of(name)):
                    self._send(name, there.get(name), (twins or {}).get(name), sent)
        return sent

    def _names(self) -> Iterator[str]:
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if not self._marks.hides(name) and path.is_file():
                yield name

    def _send(self, name: str, there: Entry | None, twin: str | None, sent: Sent) -> None:
        path = self.folder / name
        try:
            status = path.stat()
        except FileNotFoundError:
            return  # gone since it was listed
        known = self._state().get(name)
        if there is not None and known is not None and (known.bytes, known.changed) == _looks(status):
            return
        digest = durable.sha256_file(path)
        if there is not None and known is not None and known.sha256 == digest:
            tag = known.tag  # what has changed there since is brought, not overwritten
        elif there is not None and self._same(there, path):
            tag = there.tag
        else:
            tag = self._put(name, twin)
            sent.files += 1
            sent.bytes += status.st_size
        self._note(name, tag, status, digest)

    def _same(self, entry: Entry, path: Path) -> bool:
        return same(entry, path, self._marks.by_content)

    def _put(self, name: str, twin: str | None) -> str:
        """Puts a file there and returns its tag."""
        if twin is None:
            self._store.send(self.folder / name, name)
        else:
            self._store.copy(twin, name)
        there = self._store.entry(name)
        if there is None:
            raise WorkError(f"{self._store.said(name)}: was put there and is gone; who else writes there?")
        return there.tag

    def _lock_of(self, name: str) -> Path:
        """A lock a file, so that a large one that is under way keeps nobody from a small one."""
        return self.folder / LOCKS / key_of(name)

    def _state(self) -> Mapping[str, Known]:
        """By name; lines that another process has added are read when this is asked for."""
        with self._reading:
            with contextlib.suppress(FileNotFoundError), (self.folder / STATE).open("rb") as file:
                file.seek(self._read)
                data = file.read()
                data = data[: data.rfind(b"\n") + 1]
                self._read += len(data)
                for line in data.splitlines():
                    with contextlib.suppress(ValueError):  # torn when a machine went down
                        name, fields = json.loads(line)
                        self._known[name] = Known(**fields)
            return self._known

    def _note(self, name: str, tag: str, status: os.stat_result, digest: str) -> None:
        size, changed = _looks(status)
        line = json.dumps([name, asdict(Known(tag, size, changed, digest))])
        with durable.locked(self.folder / LOCKS / "state"), (self.folder / STATE).open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")  # what was torn before ends here

    def held(self, what: str, task: str) -> dict[str, str] | None:
        """What `hold` noted of it for this very task, where it was not sent yet."""
        try:
            found = json.loads(self._unsent(what).read_bytes())
        except FileNotFoundError:
            return None
        facts: dict[str, str] = found["facts"]
        return facts if found["task"] == task else None

    def hold(self, what: str, task: str, **facts: str) -> None:
        """Notes that work is done and has to be sent; `task` says what it was made from."""
        durable.write_durably(self._unsent(what), json.dumps({"task": task, "facts": facts}).encode())

    def release(self, what: str) -> None:
        """It was sent."""
        self._unsent(what).unlink(missing_ok=True)

    def _unsent(self, what: str) -> Path:
        return self.folder / f".unsent-{what}.json"


def copy_of(url: str, marks: Marks = Marks()) -> Copy:
    """The Copy that stands for a folder at a URL which a stage writes to."""
    return Copy(url, cache_folder() / "copies" / key_of(url), marks)


def working_folder(out: str | Path) -> Path:
    """Where a stage works whose `--out` that is: the folder itself, or what stands for a URL."""
    return local_path(out) or copy_of(str(out)).folder


def same(entry: Entry, path: Path, by_content: Sequence[str] = ()) -> bool:
    """Whether a file has the bytes that lie there, as far as the store can tell.

    Of what it has no MD5 of (it came in many parts) nothing is known, but for files that lie below the hash of their
    content, beside a record named in `by_content`: of them the size is enough.
    """
    if path.stat().st_size != entry.bytes:
        return False
    if entry.md5 is None:
        return any((path.parent / record).is_file() for record in by_content)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == entry.md5


def _looks(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
