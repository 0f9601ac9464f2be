"""What a stage reads at a URL: brought into the cache, whole or not at all.

<cache>/
  policies/<hash>/       a policy at a URL; whole, for it was renamed into place when each file had its checksum
  files/<hash>/<name>    one file at a URL
  copies/<hash>/         see working_copy: what is sent to a URL, `--out` of `oapl train` and `oapl evaluate`
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline import snapshots
from pipeline.errors import RequestError, WorkError
from pipeline.prompts import Prompt, write_prompts
from pipeline.rollouts import durable
from pipeline.rollouts.locate import cache_folder
from pipeline.rollouts.objects import Entry, Objects
from pipeline.rollouts.places import local_path
from pipeline.working_copy import FILES_AT_ONCE, Copy, fetch_file, key_of, same, told

PROMPTS = "prompts.parquet"
"""Beside generated rollouts."""


def fetch_policy(place: str | Path) -> Path:
    """The policy's folder on this machine; of a URL it is brought into the cache, once, whoever asks at the same time.

    A snapshot's files are compared with the hashes of its snapshot.json. A plain Hugging Face folder is known again
    by its files' names, sizes and etags. Raises RequestError where no policy is there, WorkError where the store
    refuses or gives other bytes.
    """
    found = local_path(place)
    if found is not None:
        return found
    url = str(place).rstrip("/")
    store = Objects(url)
    with told(url):
        entries = {entry.name: entry for entry in store.entries() if entry.name not in (".", "..")}
        sums: dict[str, str] = {}
        if snapshots.RECORD in entries:
            record = store.read(snapshots.RECORD)
            sums = snapshots.parse_record(record, store.said(snapshots.RECORD)).files
            identity = hashlib.sha256(record).hexdigest()
        elif "config.json" in entries:
            tags = sorted((entry.name, entry.tag) for entry in entries.values())
            identity = hashlib.sha256(json.dumps([url, tags]).encode()).hexdigest()
        else:
            raise RequestError(
                f"no policy at {url}: expected snapshot.json, or config.json, weights and tokenizer; "
                "check the bucket's name and the path"
            )
        folder = cache_folder() / "policies" / identity[:16]
        if not folder.exists():
            with durable.locked(folder.with_name(f".{folder.name}.lock")):
                if not folder.exists():
                    names = [*sums, snapshots.RECORD] if sums else list(entries)
                    _fetch_whole(store, folder, names, sums, entries)
    return folder


def _fetch_whole(
    store: Objects, folder: Path, names: list[str], sums: Mapping[str, str], entries: Mapping[str, Entry]
) -> None:
    """Brings a folder's files; those that an interrupted call brought are not fetched again."""
    partial = folder.with_name(f"{durable.TEMPORARY}{folder.name}")
    partial.mkdir(parents=True, exist_ok=True)

    def bring(name: str) -> None:
        path = partial / name
        if not (name in sums and path.is_file() and durable.sha256_file(path) == sums[name]):
            fetch_file(store, name, path, sums.get(name))
        if not sums and path.stat().st_size != entries[name].bytes:
            raise WorkError(f"{store.said(name)}: changed while it was fetched; run again when it is published")

    with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
        list(threads.map(bring, names))
    partial.rename(folder)
    durable.sync_folder(folder.parent)


def fetch_prompts(place: str | Path) -> Path:
    """The path of a prompt file; one at a URL is brought into the cache, anew when it has changed there."""
    found = local_path(place)
    if found is not None:
        return found
    folder, _, name = str(place).rpartition("/")
    copy = Copy(folder, cache_folder() / "files" / key_of(folder))
    if name not in copy.bring([name]):
        raise RequestError(
            f"no prompt file {place}; give a .jsonl or .parquet file of task, messages (or prompt), and answer or tests"
        )
    return copy.folder / name


def put_prompts(place: str | Path, prompts: Iterable[Prompt]) -> None:
    """Writes `prompts.parquet` into a folder, or to a URL where other ones lie there. Raises WorkError."""
    folder = local_path(place)
    if folder is not None:
        write_prompts(folder / PROMPTS, prompts)
        return
    with told(str(place)), tempfile.TemporaryDirectory(prefix="oapl-") as temporary:
        path, store = Path(temporary) / PROMPTS, Objects(str(place))
        write_prompts(path, prompts)
        there = store.entry(PROMPTS)
        if there is None or not same(there, path):
            store.send(path, PROMPTS)
