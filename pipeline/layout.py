"""Where things lie below a data folder. No other module spells these paths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


def round_key(round: int) -> str:
    """Name of a round in paths and in Dagster's partitions: `0000`, `0001`, ..."""
    return f"{round:04d}"


@dataclass(frozen=True, slots=True)
class Run:
    """One run's folder, `<data>/runs/<name>`."""

    data: Path
    name: str

    @property
    def path(self) -> Path:
        return self.data / "runs" / self.name

    @property
    def recipe(self) -> Path:
        """The run's settings, every value written out, as they were when it began."""
        return self.path / "recipe.yaml"

    @property
    def preflight(self) -> Path:
        """What was tried before anything was generated, on which machine, and what it took."""
        return self.path / "preflight.json"

    @property
    def prompts(self) -> Path:
        """The prompt set, train and held out."""
        return self.path / "prompts.parquet"

    @property
    def snapshots(self) -> Path:
        return self.path / "snapshots"

    def snapshot(self, snapshot_id: str) -> Path:
        return self.snapshots / snapshot_id

    def round_prompts(self, round: int) -> Path:
        """The training prompts of one round, cut from the prompt set."""
        return self.path / "prompts" / f"round={round_key(round)}.parquet"

    def frozen(self, round: int) -> Path:
        """Which snapshot the round was generated with."""
        return self.path / "frozen" / f"round={round_key(round)}.json"

    def rollouts(self, round: int) -> Path:
        return self.path / "rollouts" / f"round={round_key(round)}"

    def verdicts(self, round: int) -> Path:
        return self.path / "verdicts" / f"round={round_key(round)}"

    def reference(self, round: int) -> Path:
        return self.path / "reference" / f"round={round_key(round)}"

    def checkpoints(self, round: int) -> Path:
        return self.path / "checkpoints" / f"round={round_key(round)}"

    def learning_log(self, round: int) -> Path:
        """One JSON object an optimizer step."""
        return self.path / "learning" / f"round={round_key(round)}.jsonl"

    def evaluation(self, round: int | None) -> Path:
        """pass@k of the snapshot that the round published; None: of the start."""
        return self.path / "evaluations" / ("start.parquet" if round is None else f"round={round_key(round)}.parquet")

    def log(self, stage: str, round: int) -> Path:
        """Complete output of a stage's child process."""
        return self.path / "logs" / f"round={round_key(round)}" / f"{stage}.log"

    def stages(self, round: int) -> Path:
        """What each stage of a round was made from, and the seconds that it took."""
        return self.path / "stages" / f"round={round_key(round)}.json"

    def stage_recipe(self, stage: str, round: int) -> Path:
        """The settings that a stage of a round ran under: the run's, and what was changed for that round."""
        return self.path / "stages" / f"round={round_key(round)}.{stage}.yaml"

    def dataset(self, round: int) -> Path:
        """The round as a dataset that can be given away: rollouts, verdicts, prompts and card."""
        return self.path / "datasets" / f"round={round_key(round)}"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def picture(self) -> Path:
        return self.report / "rounds.png"

    @property
    def small_picture(self) -> Path:
        """The same, as wide as a dialogue of Dagster's UI."""
        return self.report / "rounds-small.png"

    @property
    def page(self) -> Path:
        return self.report / "index.html"

    @property
    def summary(self) -> Path:
        return self.report / "summary.json"

    def rounds(self) -> list[int]:
        """Rounds that have rollouts, oldest first."""
        return sorted(int(path.name.removeprefix("round=")) for path in (self.path / "rollouts").glob("round=*"))


def dagster_home(data: Path) -> Path:
    return data / "dagster"
