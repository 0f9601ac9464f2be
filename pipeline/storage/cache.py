"""What lies at a URL, kept on this machine: where, under which name, and how one file is brought whole."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import WorkError
from pipeline.storage import durable
from pipeline.storage.objects import Objects


def cache_folder() -> Path:
    """Where datasets given by URL are kept: `$OAPL_CACHE`, or `~/.cache/oapl/datasets`."""
    given = os.environ.get("OAPL_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oapl/datasets"


FILES_AT_ONCE = 4
"""Large files that are fetched at a time."""


def key_of(url: str) -> str:
    """A URL as the name of a folder of the cache."""
    return hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


@contextlib.contextmanager
def told(url: str) -> Iterator[None]:
    """Turns what the store, or the cache's disk, refuses into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise durable.work_error(cache_folder(), error) from error
        raise Objects(url).work_error(error) from error


def fetch_file(store: Objects, name: str, path: Path, sha256: str | None) -> None:
    """Brings a file, whole or not at all. Raises WorkError where it is missing or is not what its record says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable.replacing(path) as temporary:
        try:
            store.fetch(name, temporary)
        except FileNotFoundError:
            raise WorkError(f"{store.said(name)}: is missing in the store; publish it again") from None
        if sha256 is not None and durable.sha256_file(temporary) != sha256:
            raise WorkError(f"{store.said(name)}: is not what was published; publish it again")
