"""What a comparison has others do: a start, samples, learning, each in a process of its own."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pipeline import modules
from pipeline.comparison import sampling
from pipeline.errors import RequestError, WorkError
from pipeline.layout import Run
from pipeline.policies import snapshots
from pipeline.policies.fetch import find_policy
from pipeline.runs.open import run_recipe
from pipeline.runs.stages import START, note_stage


class Stages(Protocol):
    """Each leaves its result in the run's folder, whole or not at all, and raises WorkError where it fails."""

    def start(self, run: Run) -> None:
        """The first snapshot, below `run.snapshots`."""
        ...

    def sample(self, job: sampling.Job) -> None:
        """The evaluation and the round that the job asks for."""
        ...

    def learn(self, run: Run, round: int, data: Path, data_round: int, policy: Path) -> None:
        """The round's snapshot, learned from a round of the run `data`; the summary beside the log comes last."""
        ...


class Children:
    """The real stages. `lock`, a file's descriptor, is handed down: it stays locked until the last child has ended."""

    def __init__(self, lock: int) -> None:
        self._lock = lock

    def start(self, run: Run) -> None:
        policy = run_recipe(run).policy
        if policy.model is not None:
            snapshots.adopt(find_policy(policy.model), run.snapshots)
        else:
            self._run("trainer.cold_start", ["--recipe", run.recipe, "--out", run.snapshots], run, 0, START)

    def sample(self, job: sampling.Job) -> None:
        self._run("pipeline.comparison.sampling", sampling.words(job), job.run, job.evaluation or 0, "sample")

    def learn(self, run: Run, round: int, data: Path, data_round: int, policy: Path) -> None:
        words: list[object] = ["--recipe", run.recipe, "--rollouts", data, "--round", data_round]
        words += ["--policy", policy, "--out", run.snapshots, "--log", run.learning_log(round)]
        started = time.monotonic()
        self._run("trainer", words, run, round, "learn")
        note_stage(run, round, "learn", seconds=time.monotonic() - started)

    def _run(self, module: str, words: Sequence[object], run: Run, round: int, stage: str) -> None:
        log = run.log(stage, round)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as output:
            output.write(f"$ {module} {' '.join(map(str, words))}\n")
            output.flush()
            child = subprocess.Popen(
                modules.python(module, *words),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(self._lock,),
            )
            try:
                code = child.wait()
            finally:
                if child.poll() is None:
                    child.terminate()
                    child.wait()
        if code:
            raise _failure(code, stage, log)


def _failure(code: int, stage: str, log: Path) -> WorkError | RequestError:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = next((line.removeprefix("oapl: ") for line in reversed(lines) if line.startswith("oapl: ")), None)
    if said is None:
        said = f"{stage} ended with status {code}; its output is in {log}"
    return RequestError(said) if code == RequestError.exit_code else WorkError(said)
