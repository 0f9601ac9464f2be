"""What a person means by a dataset's place: a folder, or a URL, of which what is needed is brought here."""

from __future__ import annotations

from pathlib import Path

from pipeline.rollouts.locate import Located, locate
from pipeline.rollouts.mirror import mirrored
from pipeline.sharing.hub import is_hub
from pipeline.sharing.package import import_dataset
from pipeline.storage.cache import cache_folder, key_of
from pipeline.storage.places import is_url


def bring(place: str | Path, round: int | None = None) -> Located:
    """Resolves a DIR or DATASET of the command line.

    A run's folder stands for its newest round unless `round` says otherwise. Of a URL (fsspec, or `hf://datasets/...`)
    an exported dataset is imported into the cache first, which verifies it; of rollouts that lie there as they were
    written (a run, one of its rounds, what `oapl generate` left) only shards that are read come into the cache.
    Raises RequestError where nothing of the kind is there.
    """
    if not is_url(place):
        return locate(Path(place), round)
    url = str(place)
    if not is_hub(url):
        found = mirrored(url, cache_folder(), round)
        if found is not None:
            return locate(*found)
    kept = cache_folder() / key_of(url)
    import_dataset(url, kept, replace=True)
    return locate(kept, round)
