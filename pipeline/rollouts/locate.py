"""Where the tables of a dataset lie in its folder: a run's, what `oapl generate` left, or an exported dataset's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import RequestError
from pipeline.layout import Run

MANIFEST = "manifest.json"
ROLLOUTS, PROMPTS, VERDICTS = "rollouts", "prompts/prompts.parquet", "verdicts"
"""Where the tables lie in an exported dataset."""
EXTRAS = "origin/prompts.parquet"
"""Of imported data: what its form said of a prompt beyond our columns."""
SUMS = "SHA256SUMS"
"""Of an exported dataset: written last, read first."""
SUMMARY, UNFINISHED = "scoring.json", ".unfinished.json"
"""Of a folder of verdicts: what is sent last, and what is sent first where the other is not there yet."""


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


def locate(folder: Path, round: int | None = None) -> Located:
    """The dataset in a folder: a run's, generated rollouts, or an exported one; see `sharing.bring` for URLs.

    A run's folder stands for its newest round unless `round` says otherwise. Raises RequestError where nothing of the
    kind is there.
    """
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
