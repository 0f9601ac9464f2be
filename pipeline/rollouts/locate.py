"""What a person means by a dataset's place: a run's folder, what `oapl generate` left, an exported dataset, a URL."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import RequestError
from pipeline.layout import Run
from pipeline.rollouts.places import is_url

MANIFEST = "manifest.json"
ROLLOUTS, PROMPTS, VERDICTS = "rollouts", "prompts/prompts.parquet", "verdicts"
"""Where the tables lie in an exported dataset."""
EXTRAS = "origin/prompts.parquet"
"""Of imported data: what its form said of a prompt beyond our columns."""


@dataclass(frozen=True, slots=True)
class Located:
    """One dataset's three tables and what lies beside them."""

    root: Path
    rollouts: Path
    """Folder with the manifest and the shards."""
    prompts: Path | None
    """Parquet of prompts; null where the place has none."""
    verdicts: Path | None
    """Folder of verdict files; null where nothing was scored yet."""
    round: int | None
    """The round, in a run's folder."""
    snapshots: Path | None = None
    """The run's snapshots, where a tokenizer may be found."""

    @property
    def verdict_folder(self) -> Path:
        """Where verdicts lie, or will."""
        if self.verdicts is not None:
            return self.verdicts
        return self.root / VERDICTS if self.round is None else self.root / VERDICTS / self.rollouts.name


def locate(place: str | Path, round: int | None = None) -> Located:
    """Resolves a DIR or DATASET of the command line.

    A run's folder stands for its newest round unless `round` says otherwise. Of a URL (fsspec, or `hf://datasets/...`)
    an exported dataset is imported into the cache first, which verifies it; of rollouts that lie there as they were
    written (a run, one of its rounds, what `oapl generate` left) only shards that are read come into the cache.
    Raises RequestError where nothing of the kind is there.
    """
    if is_url(place):
        from pipeline.rollouts.hub import is_hub
        from pipeline.rollouts.mirror import mirrored
        from pipeline.rollouts.sharing import import_dataset

        if not is_hub(str(place)):
            found = mirrored(str(place), cache_folder(), round)
            if found is not None:
                return locate(*found)
        kept = cache_folder() / hashlib.sha256(str(place).encode()).hexdigest()[:16]
        import_dataset(str(place), kept, replace=True)
        return locate(kept, round)
    folder = Path(place)
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder; give a run's folder, generated rollouts, or an exported dataset")
    if (folder / MANIFEST).is_file() and not (folder / ROLLOUTS).is_dir():
        return _one_round(folder, folder, folder / "prompts.parquet", folder / VERDICTS, round)
    if (folder / ROLLOUTS / MANIFEST).is_file():
        return _one_round(folder, folder / ROLLOUTS, folder / PROMPTS, folder / VERDICTS, round)
    return _of_run(folder, round)


def _one_round(root: Path, rollouts: Path, prompts: Path, verdicts: Path, round: int | None) -> Located:
    if round is not None:
        raise RequestError(f"{root}: holds one dataset, not a run's rounds; leave --round out")
    return Located(
        root, rollouts, prompts if prompts.is_file() else None, verdicts if verdicts.is_dir() else None, None
    )


def _of_run(folder: Path, round: int | None) -> Located:
    run = Run(folder.absolute().parent.parent, folder.absolute().name)
    # A run's folder that was copied lies elsewhere than below <data>/runs: only what is inside it counts.
    inside = {
        number: folder / run.rollouts(number).relative_to(run.path)
        for number in _rounds(folder)
        if (folder / run.rollouts(number).relative_to(run.path) / MANIFEST).is_file()
    }
    if not inside:
        raise RequestError(
            f"{folder}: no rollouts here; give a run's folder (with rollouts/round=0000), "
            "what `oapl generate --out` left, or an exported dataset"
        )
    number = max(inside) if round is None else round
    if number not in inside:
        raise RequestError(f"{folder}: no round {number} here; it has {', '.join(map(str, sorted(inside)))}")
    prompts = folder / run.round_prompts(number).relative_to(run.path)
    if not prompts.is_file():
        prompts = folder / run.prompts.relative_to(run.path)
    verdicts = folder / run.verdicts(number).relative_to(run.path)
    return Located(
        folder,
        inside[number],
        prompts if prompts.is_file() else None,
        verdicts if verdicts.is_dir() else None,
        number,
        folder / run.snapshots.relative_to(run.path),
    )


def _rounds(folder: Path) -> list[int]:
    names = (path.name.removeprefix("round=") for path in (folder / ROLLOUTS).glob("round=*"))
    return sorted(int(name) for name in names if name.isdigit())


def cache_folder() -> Path:
    """Where datasets given by URL are kept: `$OAPL_CACHE`, or `~/.cache/oapl/datasets`."""
    given = os.environ.get("OAPL_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oapl/datasets"
