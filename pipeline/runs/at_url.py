"""A run whose folder lies at a URL: stages work on a copy of it below the cache. What is brought, what is sent, when.

<cache>/roots/<hash of the URL>/     laid out as a data folder, with Dagster's home of this machine
  runs/<name>/                       small files are brought when a step starts; snapshots, shards, moments when needed

Rollouts are not sent: `oapl generate` writes them to the URL. Of the rest a step sends what it made when it ends well:
data, then the records that say that it is whole, then the stage's record. So a reader at the URL, or another
machine that goes on, never finds half a stage.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path

from pipeline.errors import WorkError
from pipeline.layout import Run
from pipeline.policies import snapshots
from pipeline.rollouts.locate import ROLLOUTS, SUMMARY, SUMS
from pipeline.rollouts.manifest import MANIFEST, read_manifest
from pipeline.rollouts.mirror import VERDICT_MARKS, keep_origin
from pipeline.storage.cache import cache_folder, key_of, told
from pipeline.storage.lease import Lease, holding
from pipeline.storage.objects import Objects
from pipeline.storage.working_copy import Copy, Marks, Sent

_ROUND = re.compile(r"round=(\d+)")
_WHEN_NEEDED = ("datasets/", "reference/", "checkpoints/", "report/")
"""Never brought with the small files: large, or made anew."""
_OF_ROUNDS = ("verdicts/", "prompts/", "logs/")
"""Brought for the rounds that a step reads."""
_NOT_SENT = ("rollouts/", "checkpoints/", "logs/dagster.log")
MARKS = Marks(
    records=(*snapshots.MARKS.records, *VERDICT_MARKS.records, SUMS, "reference.json", "learning*.json"),
    later=("stages/*.json", "report/*"),
    unfinished=VERDICT_MARKS.unfinished,
    shown=snapshots.MARKS.shown,
    by_content=snapshots.MARKS.by_content,
)
"""Data first, then what says that it is whole, then a stage's record, then the report on it."""


def working_root(url: str) -> Path:
    """The data folder on this machine that stands for the one at a URL."""
    return cache_folder() / "roots" / key_of(url)


def runs_at(url: str) -> list[str]:
    """Names of the runs in a data folder at a URL. Raises WorkError where the store refuses."""
    with told(url):
        return Objects(url).folders("runs")


class RemoteRun:
    """A run at `<url>/runs/<name>`, and its working copy. Each method raises WorkError where the store refuses."""

    def __init__(self, url: str, name: str) -> None:
        self.root = url.rstrip("/")
        self.run = Run(working_root(url), name)
        self.url = f"{self.root}/runs/{name}"
        self._copy = Copy(self.url, self.run.path, MARKS)

    def at_url(self, path: Path) -> str:
        """The URL of a file or folder of the run."""
        return f"{self.url}/{self._name(path)}"

    def _name(self, path: Path) -> str:
        return path.relative_to(self.run.path).as_posix()

    def held(self, say: Callable[[str], None]) -> AbstractContextManager[Lease]:
        """Keeps other machines from working on the run. Raises RequestError where one does."""
        return holding(self.url, self.run.path, say)

    def bring_recipe(self) -> None:
        self._copy.bring([self._name(self.run.recipe)])

    def send_recipe(self) -> None:
        """As soon as a run is begun: without it another machine would begin the run again."""
        self._copy.send([self._name(self.run.recipe)])

    def bring(self, rounds: Collection[int] = ()) -> None:
        """Brings the run's small files up to date; verdicts, prompts and logs only of these rounds."""
        self._copy.bring(lambda name: _small(name, rounds))
        for manifest in self.run.path.glob(f"rollouts/*/{MANIFEST}"):
            keep_origin(manifest.parent, self.at_url(manifest.parent))

    def bring_rollouts(self, round: int) -> None:
        """The round's manifest; a shard comes when it is read (see `mirror.local_copy`)."""
        folder = self.run.rollouts(round)
        self._copy.bring([self._name(folder / MANIFEST)])
        keep_origin(folder, self.at_url(folder))

    def bring_snapshot(self, snapshot_id: str) -> Path:
        """The folder of a snapshot whose record is here, with its files, each compared with its hash."""
        folder = self.run.snapshot(snapshot_id)
        record = snapshots.load_record(folder)
        sums = {self._name(folder / name): digest for name, digest in record.files.items()}
        missing = [name for name in sums if not (self.run.path / name).exists()]
        gone = set(missing) - self._copy.bring(missing, sums)
        if gone:
            raise WorkError(f"{self.url}/{min(gone)}: is missing in the store; publish the snapshot again")
        return folder

    def bring_kept(self, snapshot_id: str) -> None:
        """What was kept with a snapshot for the round that goes on from it, if anything was."""
        folder = self.run.snapshots / snapshots.MOMENTS / snapshot_id
        self._copy.bring_folder(self._name(folder))
        base = snapshots.kept_base(folder)
        if base is not None:
            self._copy.bring_folder(self._name(self.run.snapshot(base)))

    def bring_reference(self, rounds: Collection[int]) -> None:
        """The recomputed log-probabilities of rounds."""
        for round in rounds:
            self._copy.bring_folder(self._name(self.run.reference(round)))

    def send(self, round: int | None = None) -> Sent:
        """Sends what was made here and is not at the URL yet; of a round's files those of this one, or of all.

        A step sends its own round's: another round may be under way, and its record must not go before its data.
        """
        return self._copy.send(lambda name: self._sendable(name, round), self._twins())

    def _sendable(self, name: str, round: int | None) -> bool:
        if name.startswith(_NOT_SENT) or name.endswith(".lock"):
            return False
        if name.startswith("verdicts/") and not (self.run.path / name).with_name(SUMMARY).is_file():
            return False  # half of them, which a step left that failed
        found = _ROUND.search(name)
        return round is None or found is None or int(found[1]) == round

    def _twins(self) -> dict[str, str]:
        """An exported dataset's shards are copies of the rollouts', which lie at the URL."""
        twins = {}
        for round in self.run.rounds():
            rollouts, exported = self.run.rollouts(round), self.run.dataset(round) / ROLLOUTS
            if exported.is_dir():
                for shard in read_manifest(rollouts).shards:
                    copy = exported / shard.file
                    if copy.is_file() and copy.stat().st_size == shard.bytes:
                        twins[self._name(copy)] = self._name(rollouts / shard.file)
        return twins


def _small(name: str, rounds: Collection[int]) -> bool:
    file = name.rpartition("/")[2]
    if name.startswith("snapshots/"):
        return file == snapshots.RECORD
    if name.startswith("rollouts/"):
        return file == MANIFEST
    if name.startswith(_OF_ROUNDS):
        found = _ROUND.search(name)
        return file == SUMMARY or (found is not None and int(found[1]) in rounds)
    return not name.startswith(_WHEN_NEEDED) and name.count("/") < 2
