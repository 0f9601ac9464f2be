"""A dataset's files in an object store, or whatever else fsspec reaches: `s3://bucket/runs/one/rollouts/round=0000`.

A PUT shows a file whole or not at all, so nothing is renamed. There is no lock: on S3 what must not be overwritten is
put on the condition that it is still what was read (`If-Match`). Elsewhere it is compared first, which leaves a moment
between the two. Everything that does not succeed is tried again, with longer and longer pauses.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from pipeline.errors import OaplError, RequestError, WorkError
from pipeline.storage.places import Found, Overtaken

OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss"})
"""These have no folders to make, and making one would make a bucket that was only misspelt."""
_S3 = frozenset({"s3", "s3a"})
TRIES = 7
PAUSE_S = 0.5
"""Before the second try; each further pause is twice as long, give or take a half: half a minute in all."""
_TIMEOUTS = {"connect_timeout": 10, "read_timeout": 30}
_FEW = 32
"""Files of which each is asked for by itself; for more the folder is listed."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a listing."""

    name: str
    bytes: int
    modified: float
    """Seconds since 1970; zero where the store does not say."""
    tag: str
    """Another one means other content, or the same put again."""
    md5: str | None
    """Of the content, in hexadecimal digits; null where the store does not say."""


def filesystem_of(url: str, **options: Any) -> tuple[Any, str]:
    """The fsspec file system that serves a URL, and the path in it. Raises RequestError where none does."""
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise RequestError(f"{url}: {' '.join(str(error).split())}; install the package that serves this URL") from None
    except ValueError as error:
        raise RequestError(
            f"{url}: {' '.join(str(error).split())}; give a folder, an fsspec URL or hf://datasets/OWNER/NAME"
        ) from None
    return filesystem, root.rstrip("/")


def is_object_store(filesystem: Any) -> bool:
    return bool(OBJECT_STORES.intersection(_protocols(filesystem)))


def _protocols(filesystem: Any) -> set[str]:
    return {filesystem.protocol} if isinstance(filesystem.protocol, str) else set(filesystem.protocol)


class Objects:
    """A Place (see `places`) at an fsspec URL."""

    exclusive = False
    parallel = 16

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, self._root = filesystem_of(url, **_options(url))
        if hasattr(self._fs, "retries"):
            self._fs.retries = 1  # they are made here, for all back ends alike
        self._s3 = bool(_S3.intersection(_protocols(self._fs)))

    def said(self, name: str = "") -> str:
        return f"{self.url}/{name}" if name else self.url

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _tried(self, call: Callable[[], Found]) -> Found:
        """What the call returns, some time. Raises OSError when it has failed TRIES times."""
        for number in range(TRIES):
            try:
                return call()
            except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, OaplError):
                raise  # a second try would be told the same
            except Exception as error:  # each back end has its own for a cut connection, a time-out, a 500
                if _refused(error) or number == TRIES - 1:
                    if isinstance(error, OSError):
                        raise
                    raise OSError(" ".join(str(error).split()) or type(error).__name__) from error
                # Spread, so that writers that were cut off together do not all come back together.
                time.sleep(PAUSE_S * 2**number * random.uniform(0.5, 1.5))
        raise AssertionError

    def _each(self, call: Callable[[str], Found], names: Iterable[str]) -> dict[str, Found]:
        """Of the files that are there."""

        def found(name: str) -> tuple[str, Found] | None:
            try:
                return name, self._tried(lambda: call(self._path(name)))
            except FileNotFoundError:
                return None

        with ThreadPoolExecutor(self.parallel) as threads:
            return dict(filter(None, threads.map(found, names)))

    def prepare(self, *folders: str) -> None:
        if not is_object_store(self._fs):
            for name in ("", *folders):
                self._tried(lambda name=name: self._fs.makedirs(self._path(name), exist_ok=True))  # type: ignore[misc]

    def pin(self) -> None:
        """A URL does not lead elsewhere after an unmount."""

    def lock(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def read(self, name: str) -> bytes:
        return self._tried(lambda: bytes(self._fs.cat_file(self._path(name))))

    def read_tagged(self, name: str) -> tuple[bytes, str | None]:
        if not self._s3:
            data = self.read(name)
            return data, _tag(data)
        import fsspec.asyn

        bucket, key, _ = self._fs.split_path(self._path(name))
        found: tuple[bytes, str] = self._tried(
            lambda: fsspec.asyn.sync(self._fs.loop, _get_object, self._fs, bucket, key)
        )
        return found

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        return self._each(lambda path: bytes(self._fs.cat_file(path)), names)

    def parse(self, name: str, parser: Callable[[IO[bytes] | Path], Found]) -> Found:
        def parsed() -> Found:
            with self._fs.open(self._path(name), "rb", cache_type="none") as file:
                return parser(file)

        return self._tried(parsed)

    def write(self, name: str, data: bytes) -> None:
        self._tried(lambda: self._fs.pipe_file(self._path(name), data))

    def replace(self, name: str, data: bytes, seen: str | None) -> str | None:
        try:
            if self._s3:
                return self._tried(lambda: self._put_if(name, data, seen))
            return self._tried(lambda: self._compare_and_put(name, data, seen))
        except (Overtaken, FileNotFoundError) as error:
            if seen is None and not isinstance(error, Overtaken):
                raise  # no bucket
            # A try whose answer was lost may have been ours after all.
            with contextlib.suppress(FileNotFoundError):
                there, tag = self.read_tagged(name)
                if there == data:
                    return tag
            raise Overtaken(f"{self.said(name)}: was replaced by somebody else") from None

    def _put_if(self, name: str, data: bytes, seen: str | None) -> str | None:
        bucket, key, _ = self._fs.split_path(self._path(name))
        condition = {"IfNoneMatch": "*"} if seen is None else {"IfMatch": seen}
        try:
            answer = self._fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
        except Exception as error:  # what became of botocore's ClientError differs between versions of s3fs
            if _code(error) in ("PreconditionFailed", "412"):
                raise _Changed from error
            raise
        self._fs.invalidate_cache(self._path(name))
        tag: str = answer["ETag"]
        return tag

    def _compare_and_put(self, name: str, data: bytes, seen: str | None) -> str | None:
        there = _tag(bytes(self._fs.cat_file(self._path(name)))) if self._fs.exists(self._path(name)) else None
        if there != seen:
            raise _Changed
        self._fs.pipe_file(self._path(name), data)
        return _tag(data)

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="oapl-") as folder:
            local = Path(folder) / name.rpartition("/")[2]
            yield local
            self._tried(lambda: self._fs.put_file(str(local), self._path(name)))

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        wanted = list(names)
        if len(wanted) <= _FEW:
            self._fs.invalidate_cache()
            return self._each(lambda path: int(self._fs.info(path)["size"]), wanted)
        found: dict[str, int] = {}
        for folder in {name.rpartition("/")[0] for name in wanted}:
            prefix = f"{folder}/" if folder else ""
            found |= {prefix + entry.name: entry.bytes for entry in self.entries(folder)}
        return {name: found[name] for name in wanted if name in found}

    def names(self, folder: str = "") -> list[str]:
        return sorted(entry.name for entry in self.entries(folder))

    def entries(self, folder: str = "") -> list[Entry]:
        """The files directly in a folder; none where there is no such folder."""

        def listed() -> list[dict[str, Any]]:
            self._fs.invalidate_cache()
            found: list[dict[str, Any]] = self._fs.ls(self._path(folder), detail=True)
            return found

        try:
            found = self._tried(listed)
        except FileNotFoundError:
            return []
        return [
            _entry(one["name"].rpartition("/")[2], one)
            for one in found
            if one["type"] == "file" and one["name"].rstrip("/") != self._path(folder)
        ]

    def tree(self, folder: str = "") -> list[Entry]:
        """The files in a folder and in those below it, by their names in the place."""

        def listed() -> dict[str, dict[str, Any]]:
            self._fs.invalidate_cache()
            found: dict[str, dict[str, Any]] = self._fs.find(self._path(folder), detail=True)
            return found

        try:
            found = self._tried(listed)
        except FileNotFoundError:
            return []
        before = len(self._root) + 1
        return [_entry(name[before:], one) for name, one in found.items() if one["type"] == "file"]

    def entry(self, name: str) -> Entry | None:
        """One file as a listing has it; null where it is not there."""

        def asked() -> dict[str, Any]:
            self._fs.invalidate_cache()
            found: dict[str, Any] = self._fs.info(self._path(name))
            return found

        try:
            found = self._tried(asked)
        except FileNotFoundError:
            return None
        return _entry(name, found) if found["type"] == "file" else None

    def folders(self, folder: str) -> list[str]:
        """Names of the folders directly in a folder."""
        self._fs.invalidate_cache()
        try:
            found = self._tried(lambda: self._fs.ls(self._path(folder), detail=True))
        except FileNotFoundError:
            return []
        return sorted(one["name"].rstrip("/").rpartition("/")[2] for one in found if one["type"] == "directory")

    def fetch(self, name: str, target: Path) -> None:
        """Copies a file to this machine."""
        self._tried(lambda: self._fs.get_file(self._path(name), str(target)))

    def send(self, source: Path, name: str) -> None:
        """Puts a file of this machine there; an older one of this name is replaced."""
        folder = name.rpartition("/")[0]
        self.prepare(*([folder] if folder else []))
        self._tried(lambda: self._fs.put_file(str(source), self._path(name)))

    def copy(self, name: str, target: str) -> None:
        """Copies a file within the store."""
        self._tried(lambda: self._fs.cp_file(self._path(name), self._path(target)))

    def delete(self, names: Iterable[str]) -> None:
        self._each(lambda path: self._fs.rm_file(path), names)

    def work_error(self, error: OSError, kept: str = "") -> WorkError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return WorkError(
            f"{self.url}: {reason}; check the address, the credentials and the network, then run again{kept}"
        )


class _Changed(Overtaken, OaplError):
    """Not to be tried again."""


def _options(url: str) -> dict[str, Any]:
    """Settings of fsspec's own that a person may have made stay; the retries are ours, so botocore makes none."""
    if url.partition("://")[0] not in _S3:
        return {}
    import fsspec.config

    given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    return {"config_kwargs": {**_TIMEOUTS, "retries": {"max_attempts": 0}, **given}, "use_listings_cache": False}


async def _get_object(filesystem: Any, bucket: str, key: str) -> tuple[bytes, str]:
    answer = await filesystem._call_s3("get_object", Bucket=bucket, Key=key)
    async with answer["Body"] as body:
        return await body.read(), answer["ETag"]


def _code(error: BaseException | None) -> str:
    """S3's name of what went wrong, wherever in the chain of exceptions it is said."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict) and "Error" in response:
            return str(response["Error"].get("Code", ""))
        error = error.__cause__
    return ""


def _refused(error: BaseException) -> bool:
    """Whether the store understood and said no: another try would hear the same."""
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"):
        return True  # nobody was asked
    return _code(error) in (
        "NoSuchBucket",
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "AccessDenied",
        "InvalidBucketName",
    )


def _entry(name: str, found: dict[str, Any]) -> Entry:
    size, modified = int(found["size"] or 0), _moment(found)
    etag = str(found.get("ETag") or found.get("etag") or "").strip('"')
    md5 = etag if re.fullmatch(r"[0-9a-f]{32}", etag) else None
    if md5 is None and isinstance(found.get("md5Hash"), str):
        md5 = base64.b64decode(found["md5Hash"]).hex()
    return Entry(name, size, modified, f"{size}-{etag or modified}", md5)


def _moment(entry: dict[str, Any]) -> float:
    for name in ("LastModified", "mtime", "created", "updated"):
        value = entry.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return 0.0


def _tag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
