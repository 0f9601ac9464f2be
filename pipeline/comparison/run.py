"""Going through a comparison cell by cell; what is done is not done again.

OUT/
  runs/start-lag64-seed0/    the start, its prompts, its evaluation and the samples of round 0, shared by all arms
  runs/oapl-lag64-seed0/     a cell: a run's folder, with its snapshots, later rounds, learning logs and evaluations
  cells.json                 the cells that were asked for so far, in this order
  measurements.parquet       one row a measurement, of all of them
  lag-0064.png, index.html   pictures
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.comparison.grid import Arm, Cell, Stored
from pipeline.comparison.sampling import Job
from pipeline.comparison.stages import Stages
from pipeline.errors import RequestError, WorkError
from pipeline.layout import Run
from pipeline.policies import snapshots
from pipeline.prompts.files import write_prompts
from pipeline.prompts.sets import build_prompt_set, round_prompts
from pipeline.recipe import Recipe
from pipeline.rollouts.locate import SUMMARY, locate
from pipeline.runs.open import changed_settings, open_run, run_recipe
from pipeline.storage import durable

Say = Callable[[str], None]

CELLS = "cells.json"


@contextlib.contextmanager
def alone(out: Path) -> Iterator[int]:
    """Keeps others out of the folder, until the last child of this process has ended, too; gives the lock's number."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"{out}: another comparison works in this folder; wait for it") from None
        yield lock.fileno()


def compare(cells: Sequence[Cell], out: Path, stages: Stages, say: Say, data: Stored | None = None) -> None:
    """Makes all that is missing of the cells.

    A cell that fails (a loss that diverges, say) does not keep the others from being made; WorkError at the end names
    those that failed. Raises RequestError before anything starts where the folder was begun under other settings.
    """
    refuse_other_settings(cells, out)
    remember(cells, out)
    bases = {cell.base.name: _base(cell, out, data) for cell in cells}
    failed = []
    for number, cell in enumerate(cells, 1):
        run = open_run(out, cell.recipe)
        title = f"{number}/{len(cells)} {run.name}"
        try:
            base = bases[cell.base.name]
            base.prepare(stages, say)
            _make(cell, run, base, stages, lambda text, title=title: say(f"{title}: {text}"))  # type: ignore[misc]
        except WorkError as error:
            say(f"{title}: failed: {error}")
            failed.append(run.name)
    if failed:
        raise WorkError(f"{len(failed)} of {len(cells)} cells failed: {', '.join(failed)}; the others are done")


def refuse_other_settings(cells: Sequence[Cell], out: Path) -> None:
    wanted = {recipe.name: recipe for cell in cells for recipe in (cell.base, cell.recipe)}
    for recipe in wanted.values():
        run = Run(out, recipe.name)
        if changed := changed_settings(run, recipe):
            raise RequestError(f"{run.path}: was begun under other settings ({'; '.join(changed)}); give a new --out")


def remember(cells: Sequence[Cell], out: Path) -> None:
    """Adds the cells to those of earlier calls, so that a folder's table has them all, each beside its rivals."""
    known = _remembered(out)
    new = [
        {"arm": cell.arm.name, "changes": cell.arm.changes, "lag": cell.lag, "run": run, "base": cell.base.name}
        for cell in cells
        if (run := cell.recipe.name) not in {told["run"] for told in known}
    ]
    out.mkdir(parents=True, exist_ok=True)
    durable.write_durably(out / CELLS, (json.dumps([*known, *new], indent=1) + "\n").encode())


def all_cells(out: Path) -> list[Cell]:
    """Every cell that was begun in the folder, in the order in which they were asked for."""
    return [
        Cell(Arm(told["arm"], tuple(told["changes"])), told["lag"], run_recipe(run), run_recipe(base))
        for told in _remembered(out)
        if (run := Run(out, told["run"])).recipe.exists() and (base := Run(out, told["base"])).recipe.exists()
    ]


def _remembered(out: Path) -> list[dict[str, Any]]:
    place = out / CELLS
    found: list[dict[str, Any]] = json.loads(place.read_bytes()) if place.exists() else []
    return found


class _Base:
    """What the arms of one lag and seed share: start, prompts, and the samples of round 0, made here or stored."""

    def __init__(self, recipe: Recipe, out: Path, data: Stored | None) -> None:
        self._out = out
        self._recipe = recipe
        self.run = Run(out, recipe.name)
        self.data = data or Stored(self.run.path, 0)
        self.stored = data is not None

    @property
    def prompts(self) -> Path:
        return Run(self.data.run.absolute().parent.parent, self.data.run.absolute().name).prompts

    @property
    def policy(self) -> Path:
        if self.stored:
            return _policy_of(self.data)
        return self._start.snapshot(_newest_start(self._start).snapshot_id)

    @property
    def _start(self) -> Run:
        """Lags of one seed share the start."""
        return Run(self._out, f"start-seed{self._recipe.seed}")

    def check(self) -> None:
        """Writes the prompts. Raises RequestError where there are not enough for a round."""
        if self.stored:
            if not self.prompts.is_file():
                raise RequestError(f"{self.prompts}: no such prompts; give a run's folder, as `oapl run` leaves it")
            open_run(self._out, self._recipe)
            return
        recipe = self._recipe
        open_run(self._out, recipe)
        self._open_start()
        if not self.prompts.exists():
            build_prompt_set(recipe, self.prompts)
        wanted = recipe.prompts.per_round
        taken = round_prompts(self.prompts, 0, wanted, recipe.seed)
        if len(taken) < wanted:
            raise RequestError(
                f"a round needs {wanted:,} prompts and there are {len(taken):,}; take a smaller --lag or "
                "learning.batch_size, more generation.samples, or learning.epochs"
            )
        if not self.run.round_prompts(0).exists():
            write_prompts(self.run.round_prompts(0), taken)

    def _open_start(self) -> None:
        """Of a start that is there, what it is made from counts, and not the defaults of when it was begun."""
        told = _start_recipe(self._recipe, self._start.name)
        if self._start.recipe.exists():
            made_from = {"seed": told.seed, "policy": told.policy}
            told = run_recipe(self._start).model_copy(update=made_from)
        open_run(self._out, told)

    def prepare(self, stages: Stages, say: Say) -> None:
        """The start, its evaluation, and the samples of round 0."""
        if not self.stored and snapshots.newest(self._start, None) is None:
            stages.start(self._start)
            say(f"{self._start.name}: the policy that all start from is made")
        sampled = self.stored or (self.run.verdicts(0) / SUMMARY).exists()
        evaluated = self.run.evaluation(None).exists()
        if not (sampled and evaluated):
            stages.sample(Job(self.run, self.policy, self.prompts, None, not evaluated, None if sampled else 0))
            say(f"{self.run.name}: evaluated" + ("" if self.stored else ", and sampled for round 0"))


def _start_recipe(recipe: Recipe, name: str) -> Recipe:
    """What a start is made from, the same for all lags of a seed: how it is sampled and learned from does not count."""
    return Recipe(name=name, seed=recipe.seed, policy=recipe.policy)


def _base(cell: Cell, out: Path, data: Stored | None) -> _Base:
    base = _Base(cell.base, out, data)
    base.check()
    return base


def _newest_start(run: Run) -> snapshots.Snapshot:
    found = snapshots.newest(run, None)
    assert found is not None, "the start is made before it is asked for"
    return found


def _policy_of(data: Stored) -> Path:
    """The snapshot that wrote the round: in the run's folder, or, as in a comparison, in one beside it."""
    from pipeline.rollouts.store import read_manifest

    name = read_manifest(locate(data.run, data.round).rollouts).provenance.snapshot_id
    beside = sorted(data.run.absolute().parent.glob(f"*/snapshots/{name}"))
    here = [path for path in beside if path.parents[1] == data.run.absolute()]
    if not beside:
        raise RequestError(f"{data.run}: the snapshot {name}, which wrote round {data.round}, is not there any more")
    return (here or beside)[0]


def _make(cell: Cell, run: Run, base: _Base, stages: Stages, say: Say) -> None:
    """The rounds of a cell: learn; then evaluate, and sample for the next round, with one start of the engine."""
    policy = base.policy
    rounds = cell.recipe.rounds
    if not run.prompts.exists():  # so that a cell is a run's folder like any other
        with durable.replacing(run.prompts) as partial:
            shutil.copyfile(base.prompts, partial)
    for round in range(rounds):
        data = base.data if round == 0 else Stored(run.path, round)
        if learned(run, round) is None:
            stages.learn(run, round, data.run, data.round, policy)
            say(_steps(cell, run, round))
        summary = learned(run, round)
        assert summary is not None, "learning ends with its summary"
        policy = run.snapshot(summary["snapshot_id"])
        more = round + 1 if round + 1 < rounds else None
        if more is not None:
            _take_prompts(cell, run, base, more)
        sampled = more is None or (run.verdicts(more) / SUMMARY).exists()
        evaluated = run.evaluation(round).exists()
        if not (sampled and evaluated):
            stages.sample(Job(run, policy, base.prompts, round, not evaluated, None if sampled else more))
            say(f"round {round}: evaluated" + ("" if sampled else f", and sampled for round {more}"))


def _take_prompts(cell: Cell, run: Run, base: _Base, round: int) -> None:
    if not run.round_prompts(round).exists():
        taken = round_prompts(base.prompts, round, cell.recipe.prompts.per_round, cell.seed)
        write_prompts(run.round_prompts(round), taken)


def _steps(cell: Cell, run: Run, round: int) -> str:
    summary = learned(run, round)
    assert summary is not None
    steps: int = summary["steps"]
    short = "" if cell.lag in (None, steps) else f" instead of {cell.lag}, as some samples have no reward"
    return f"round {round}: learned {steps} steps{short} in {summary['seconds']:.1f} s"


def learned(run: Run, round: int) -> dict[str, Any] | None:
    """The summary that learning a round ends with; None before that."""
    path = run.learning_log(round).with_suffix(".json")
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    return found
