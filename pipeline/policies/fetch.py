"""A policy by the name that a person gives it: a folder, a URL, a Hub id; brought here whole or not at all.

<cache>/
  policies/<hash>/       a policy at a URL; whole, for it was renamed into place when each file had its checksum
  files/<hash>/<name>    one file at a URL (see prompts/fetch)
  copies/<hash>/         what is sent to a URL, `--out` of `oapl train` and `oapl evaluate` (see storage/working_copy)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.errors import RequestError, WorkError
from pipeline.policies import snapshots
from pipeline.storage import durable
from pipeline.storage.cache import FILES_AT_ONCE, cache_folder, fetch_file, told
from pipeline.storage.objects import Entry, Objects
from pipeline.storage.places import local_path


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


def find_policy(model: str) -> Path:
    """The folder of what a recipe names as its policy: a folder, a URL's, or a Hub id's, which is downloaded.

    Raises RequestError where it is none of these.
    """
    found = fetch_policy(model)
    return found if found.is_dir() else _download(model)


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=[f"*{suffix}" for suffix in snapshots.KEPT]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RequestError(f"policy.model {model}: neither a folder nor to be had from the Hub ({reason})") from None
