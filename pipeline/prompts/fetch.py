"""Prompts at a URL: brought into the cache when they are read, put beside generated rollouts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import RequestError
from pipeline.prompts.files import Prompt, write_prompts
from pipeline.storage.cache import cache_folder, key_of, told
from pipeline.storage.objects import Objects
from pipeline.storage.places import local_path
from pipeline.storage.working_copy import Copy, same

PROMPTS = "prompts.parquet"
"""Beside generated rollouts."""


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
