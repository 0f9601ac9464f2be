"""What steps are given: the run's folder and settings, and the way to run a stage as a process of its own."""

from __future__ import annotations

import contextlib
import fcntl
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import dagster as dg
from pydantic import ValidationError

from assets.config import CONFIGS, StepConfig
from assets.rounds import PREFIX, TAGS, round_of
from assets.running.settings import Chosen
from assets.running.supervisor import ChildFailed, run_child
from pipeline import modules
from pipeline.errors import OaplError, RequestError
from pipeline.layout import Run
from pipeline.recipe import Recipe, load_recipe
from pipeline.runs.stages import note_stage

if TYPE_CHECKING:
    from pipeline.runs.at_url import RemoteRun

MOST_RETRIES = 1
FIRST_WAIT_S = 5.0
"""A device that was lost for a moment should not cost a night; what was committed before is not made again."""


RunFolder: TypeAlias = dg.ResourceParam[Chosen]
"""The run that the assets are about. It has no config: the launchpad would show its paths among what one changes."""


@dataclass(frozen=True, slots=True)
class Step:
    """One asset's work on one round."""

    context: dg.AssetExecutionContext
    run: Run
    recipe: Recipe
    """The run's settings with what the launchpad changed for this step."""
    round: int
    remote: RemoteRun | None = None
    """Where the run's folder lies, if it is at a URL; `run` is then its working copy."""

    def snapshot(self, snapshot_id: str) -> Path:
        """The folder of a snapshot, with all its files."""
        return self.run.snapshot(snapshot_id) if self.remote is None else self.remote.bring_snapshot(snapshot_id)

    def replayed(self) -> range:
        """The rounds that learning reads."""
        return range(max(0, self.round - self.recipe.learning.replay_rounds), self.round + 1)

    def say(self, text: str) -> None:
        """A line in the run's log, seen in the UI and on the terminal while the step runs."""
        self.context.log.info(text)

    def recipe_file(self, stage: str) -> Path:
        """The step's settings as a file, for a child process."""
        file = self.run.stage_recipe(stage, self.round)
        file.parent.mkdir(parents=True, exist_ok=True)
        self.recipe.save(file)
        return file

    @contextlib.contextmanager
    def timed(self, stage: str, **facts: Any) -> Iterator[None]:
        """Adds the seconds spent inside to the stage's; `facts` are remembered when it ends well."""
        started = time.monotonic()
        try:
            yield
        except BaseException:  # time is spent whatever ends the stage; the error goes on
            note_stage(self.run, self.round, stage, seconds=time.monotonic() - started)
            raise
        note_stage(self.run, self.round, stage, seconds=time.monotonic() - started, **facts)

    def start(
        self,
        stage: str,
        module: str,
        words: Sequence[object],
        hear: Callable[[str], None] | None = None,
        *,
        again: bool = True,
    ) -> None:
        """Runs `python -m module words...` to its end. Raises dagster.Failure with the child's one line.

        `hear` is called with each line of progress, which is said besides. `again`: work that fails is tried twice.
        """

        def tell(line: str) -> None:
            self.say(line)
            if hear is not None:
                hear(line)

        log = self.run.log(stage, self.round)
        command = modules.python(*module.split(), *words)
        self.say(f"{stage}: started; its whole output goes to {log}")
        try:
            run_child(command, log, tell, copy_to=sys.stderr)
        except ChildFailed as failed:
            if again:
                self._try_again(stage, failed)
            raise dg.Failure(
                description=f"{stage}: {failed.message}",
                metadata={
                    "exit_code": failed.code,
                    "log": dg.MetadataValue.path(str(log)),
                    "last lines": dg.MetadataValue.md("```\n" + "\n".join(failed.tail) + "\n```"),
                },
            ) from None

    def _try_again(self, stage: str, failed: ChildFailed) -> None:
        """Has Dagster run the step once more, unless that was done or the request was wrong and stays so.

        A RetryPolicy on the asset would do the same after a cancel, too, and so undo it.
        """
        tried = self.context.retry_number
        if failed.code != RequestError.exit_code and tried < MOST_RETRIES:
            wait = FIRST_WAIT_S * 4**tried
            self.say(f"{stage}: {failed.message}; it is tried again in {wait:.0f} s")
            raise dg.RetryRequested(max_retries=MOST_RETRIES, seconds_to_wait=wait) from failed

    def log_metadata(self, stage: str) -> dict[str, Any]:
        log = self.run.log(stage, self.round)
        return {"log": dg.MetadataValue.path(str(log))} if log.exists() else {}


@contextlib.contextmanager
def step(context: dg.AssetExecutionContext, folder: RunFolder, config: StepConfig | None = None) -> Iterator[Step]:
    """The work at hand. What is meant for a person becomes a Failure with that one line."""
    try:
        _refuse_nonsense(context, folder)
        if not TAGS.items() <= context.run.tags.items():
            # Launched from the lineage, and so by a job of Dagster's own: what opens rounds must see it.
            context.instance.add_run_tags(context.run.run_id, TAGS)
        run, recipe = folder.open()
        if config is not None and (overrides := config.overrides()):
            recipe = load_recipe(str(run.recipe), overrides)
        round = round_of(context.partition_key) if context.has_partition_key else 0
        work = Step(context, run, recipe, round, folder.remote(run.name))
        with _alone(run, context.asset_key.path[-1], round), _brought_and_sent(work):
            yield work
    except OaplError as error:
        raise dg.Failure(
            description=str(error),
            metadata={"exit_code": error.exit_code},
            allow_retries=error.exit_code != RequestError.exit_code,
        ) from None


@contextlib.contextmanager
def _brought_and_sent(work: Step) -> Iterator[None]:
    """Of a run at a URL: its files as they are now, and, where the step ends well, what it made."""
    if work.remote is None:
        yield
        return
    with work.remote.held(work.say) as lease:
        work.remote.bring(work.replayed())
        yield
        lease.check()
        sent = work.remote.send(work.round)
    if sent.files:
        work.say(f"sent {sent.files} files, {sent.bytes / 1e6:,.1f} MB, to {work.remote.url}")


@contextlib.contextmanager
def _alone(run: Run, asset: str, round: int) -> Iterator[None]:
    """One step at a time makes an asset of a round, whoever launched it; a lock ends with its process."""
    place = run.stages(round).with_suffix(f".{asset}.lock")
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"{asset} of round {round} is being made by another run; wait for it") from None
        yield


def _refuse_nonsense(context: dg.AssetExecutionContext, folder: RunFolder) -> None:
    """Checks the configs of all the run's steps, so that a wrong beta2 is not found out after hours of generation."""
    ops = context.run.run_config.get("ops", {}) if isinstance(context.run.run_config, dict) else {}
    run, _ = folder.open()
    for name, kind in CONFIGS.items():
        values = ops.get("__".join([*PREFIX, name]), {}).get("config", {})
        try:
            overrides = kind(**values).overrides()
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise RequestError(f"{name}, {where}: {first['msg']}, not {first['input']!r}") from None
        load_recipe(str(run.recipe), overrides)
