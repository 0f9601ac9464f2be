"""The place that a person's words for a folder name: a disk's folder, or an object store's."""

from __future__ import annotations

from pathlib import Path

from pipeline.storage.objects import Objects
from pipeline.storage.places import Folder, Place, local_path


def place_of(folder: Path | str) -> Place:
    """The place that a folder's path or an fsspec URL names. Raises RequestError where nothing serves the URL."""
    path = local_path(folder)
    if path is not None:
        return Folder(path)
    return Objects(str(folder))
