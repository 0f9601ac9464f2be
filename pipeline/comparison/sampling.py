"""`python -m pipeline.comparison.sampling`: all that a comparison asks of one snapshot, with one start of the engine.

A snapshot is evaluated, and what the next round learns from is sampled from the same snapshot, so that the engine,
whose start takes longer than a small policy's round, is started once for both.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.ending import leave
from pipeline.errors import OaplError
from pipeline.generation.engine import Completion, Engine, Request
from pipeline.generation.vllm_engine import VllmEngine
from pipeline.layout import Run
from pipeline.prompts.files import iter_prompts, read_prompts
from pipeline.recipe import Generation, Recipe
from pipeline.runs.open import run_recipe
from pipeline.runs.stages import START_EVALUATION, note_stage
from pipeline.scoring.score import score


class Sampler(Engine, Protocol):
    """An engine whose sampling can be changed between requests."""

    sampling: Generation


StartEngine = Callable[[Path, Generation, int], Sampler]


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked of one snapshot."""

    run: Run
    policy: Path
    prompts: Path
    """The prompt set, of which the held-out ones are evaluated."""
    evaluation: int | None
    """The round that published the snapshot; None: none did, it is the start."""
    evaluate: bool
    round: int | None
    """The round to be sampled from the snapshot; None: none."""


def sample(job: Job, start_engine: StartEngine) -> None:
    """Evaluates the snapshot and samples and judges the round, each unless it is there already."""
    recipe = _here(run_recipe(job.run))
    engine = _Kept(job.policy, recipe, start_engine)
    try:
        if job.round is not None:
            _round(job, recipe, engine, job.round)
        if job.evaluate and not job.run.evaluation(job.evaluation).exists():
            _evaluate(job, recipe, engine)
    finally:
        engine.end()


def _here(recipe: Recipe) -> Recipe:
    """Without the Ray cluster: one engine, kept from stage to stage, is the point of this module."""
    return recipe.model_copy(update={"generation": recipe.generation.model_copy(update={"engine": "local"})})


def _round(job: Job, recipe: Recipe, engine: _Kept, round: int) -> None:
    from pipeline.generation.batch import Work
    from pipeline.generation.generate import generate

    run = job.run
    prompts = read_prompts(run.round_prompts(round))
    with _timed(run, round, "generate"):
        work = Work(job.policy, recipe.generation, round, recipe.seed, recipe)
        generate(work, prompts, run.rollouts(round), lambda: engine.sampling_as(recipe.generation))
    with _timed(run, round, "verify"):
        score(run.rollouts(round), run.round_prompts(round), run.verdicts(round), recipe.verification)


def _evaluate(job: Job, recipe: Recipe, engine: _Kept) -> None:
    from pipeline.evaluation.pass_at_k import evaluate, heldout

    out = job.run.evaluation(job.evaluation)
    stage = START_EVALUATION if job.evaluation is None else "evaluate"
    with _timed(job.run, job.evaluation or 0, stage):
        settings = recipe.for_evaluation()
        evaluate(job.policy, heldout(iter_prompts(job.prompts)), recipe, out, lambda: engine.sampling_as(settings))


@contextmanager
def _timed(run: Run, round: int, stage: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        note_stage(run, round, stage, seconds=time.monotonic() - started)


class _Kept:
    """One engine for several calls: started when the first needs it, closed by `end`."""

    def __init__(self, policy: Path, recipe: Recipe, start: StartEngine) -> None:
        self._policy, self._recipe, self._start = policy, recipe, start
        self._engine: Sampler | None = None

    def sampling_as(self, settings: Generation) -> Engine:
        if self._engine is None:
            longest = self._recipe.for_evaluation().max_model_len
            size = self._recipe.generation.model_copy(update={"max_model_len": longest})
            self._engine = self._start(self._policy, size, self._recipe.seed)
        self._engine.sampling = settings
        return _Lent(self._engine)

    def end(self) -> None:
        if self._engine is not None:
            self._engine.close()


class _Lent:
    """The engine in the hands of one call, which may not close it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name, self.version, self.logprobs_mode = engine.name, engine.version, engine.logprobs_mode

    def submit(self, request: Request) -> None:
        self._engine.submit(request)

    def step(self) -> list[Completion]:
        return self._engine.step()

    def close(self) -> None:
        pass


def words(job: Job) -> list[str]:
    """The job as arguments of this module."""
    found = ["--data", job.run.data, "--run", job.run.name, "--policy", job.policy, "--prompts", job.prompts]
    if job.evaluate:
        found += ["--evaluate", "start" if job.evaluation is None else job.evaluation]
    if job.round is not None:
        found += ["--round", job.round]
    return list(map(str, found))


def _job() -> Job:
    parser = argparse.ArgumentParser(prog="python -m pipeline.comparison.sampling", description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--evaluate", default=None)
    parser.add_argument("--round", type=int, default=None)
    told = parser.parse_args()
    published = None if told.evaluate in (None, "start") else int(told.evaluate)
    run = Run(told.data, told.run)
    return Job(run, told.policy, told.prompts, published, told.evaluate is not None, told.round)


def main() -> None:
    try:
        sample(_job(), VllmEngine)
    except OaplError as error:
        sys.stderr.write(f"oapl: {error}\n")
        sys.exit(error.exit_code)
    leave()


if __name__ == "__main__":
    main()
