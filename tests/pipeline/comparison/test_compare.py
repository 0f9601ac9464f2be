"""Comparisons: which cells there are, that what is done is not done again, and what the table says."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from fake_engine import FakeEngine

from pipeline.comparison import grid, sampling, table
from pipeline.comparison.pictures import draw
from pipeline.comparison.run import all_cells, alone, compare
from pipeline.errors import RequestError, WorkError
from pipeline.evaluation.pass_at_k import Evaluation, estimate
from pipeline.layout import Run
from pipeline.policies import snapshots
from pipeline.recipe import Generation
from pipeline.rollouts.locate import SUMMARY
from pipeline.runs.open import run_recipe
from pipeline.runs.stages import note_stage

Oapl = Callable[..., "subprocess.CompletedProcess[str]"]

SMALL = ("learning.batch_size=16", "prompts.heldout_count=4", "evaluation.samples=4", "evaluation.ks=[1,4]")


def _cells(
    losses: str = "oapl,grpo",
    variants: Sequence[str] = (),
    lags: Sequence[int] = (4,),
    seeds: Sequence[int] = (0,),
    steps: int = 8,
    told: Sequence[str] = SMALL,
) -> list[grid.Cell]:
    return grid.fresh("tiny", told, grid.arms(losses, variants), lags, seeds, steps)


class Fakes:
    """Stages that leave what the real ones leave, as far as the comparison looks at it, and remember what was asked."""

    def __init__(self, rates: dict[str, float] | None = None, fail: str = "") -> None:
        self.done: list[str] = []
        self.rates = rates or {}
        self.fail = fail

    def _note(self, text: str) -> None:
        if text == self.fail:
            raise KeyboardInterrupt
        self.done.append(text)

    def _publish(self, run: Run, parent: str | None, round: int | None, step: int) -> snapshots.Snapshot:
        def fill(folder: Path) -> None:
            (folder / "config.json").write_text(f'{{"of": "{run.name} {step}"}}', encoding="utf-8")
            (folder / "model.safetensors").write_bytes(b"weights")

        return snapshots.publish(run.snapshots, fill, parent=parent, round=round, step=step, recipe_sha256=None)

    def start(self, run: Run) -> None:
        self._note(f"start {run.name}")
        self._publish(run, None, None, 0)

    def sample(self, job: sampling.Job) -> None:
        of = "start" if job.evaluation is None else job.evaluation
        what = (
            f"{f'evaluate {of}' if job.evaluate else ''} {'' if job.round is None else f'sample {job.round}'}".strip()
        )
        self._note(f"{job.run.name}: {what}")
        if job.round is not None:
            job.run.verdicts(job.round).mkdir(parents=True, exist_ok=True)
            (job.run.verdicts(job.round) / SUMMARY).write_text("{}", encoding="utf-8")
            note_stage(job.run, job.round, "generate", seconds=2.0)
        if job.evaluate:
            snapshot = snapshots.load_record(job.policy)
            correct = [1, 1, 2, 2] if job.evaluation is None else [1, 2, 3, 4]
            if job.run.name.startswith("grpo"):
                correct = [1, 1, 3, 4]
            write_evaluation(job.run.evaluation(job.evaluation), snapshot, correct)

    def learn(self, run: Run, round: int, data: Path, data_round: int, policy: Path) -> None:
        self._note(f"{run.name}: learn {round} from {data.name} {data_round} on {policy.parents[1].name}")
        parent = snapshots.load_record(policy)
        rounds = run_recipe(run).rounds
        made = self._publish(run, parent.snapshot_id, round, parent.step + 8 // rounds)
        log = run.learning_log(round)
        log.parent.mkdir(parents=True, exist_ok=True)
        steps = range(parent.step + 1, made.step + 1)
        log.write_text(
            "".join(json.dumps({"step": s, **{name: s / 10 for name in table.BY_STEP}}) + "\n" for s in steps),
            encoding="utf-8",
        )
        summary = {"snapshot_id": made.snapshot_id, "step": made.step, "steps": len(steps), "seconds": 1.0}
        summary |= {"reward_mean": 0.25, "rows": 64}
        log.with_suffix(".json").write_text(json.dumps(summary), encoding="utf-8")


def write_evaluation(path: Path, snapshot: snapshots.Snapshot, correct: Sequence[int]) -> None:
    """Four samples of each prompt, so many of them right; the first half are math prompts."""
    tasks = ["math"] * (len(correct) // 2) + ["code"] * (len(correct) - len(correct) // 2)
    rows = [(f"p{n}", 4, c, 0, 10.0, 0.5 + n, t, t) for n, (c, t) in enumerate(zip(correct, tasks, strict=True))]
    names = ["prompt_id", "samples", "correct", "unscorable", "tokens", "entropy", "task", "source"]
    found = pl.DataFrame(rows, names, orient="row")

    def of(part: pl.DataFrame) -> dict[int, Any]:
        return {k: estimate(part["samples"], part["correct"], k) for k in (1, 4)}

    by = {t: of(found.filter(pl.col("task") == t)) for t in ("math", "code")}
    facts = Evaluation(
        snapshot_id=snapshot.snapshot_id,
        step=snapshot.step,
        prompts=len(rows),
        samples=4,
        overall=of(found),
        by_task=by,
        by_source=by,
        unscorable=0,
        mean_tokens=10.0,
        seconds=1.0,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    arrow = found.to_arrow().replace_schema_metadata({b"oapl.evaluation": facts.model_dump_json().encode()})
    pq.write_table(arrow, path)


def _quiet(text: str) -> None:
    pass


def test_cells_share_samples_and_steps_and_differ_in_the_loss_alone() -> None:
    cells = _cells(variants=["grpo:learning.learning_rate=1e-4"], lags=[4, 8], seeds=[3, 5])
    assert len(cells) == 2 * 2 * 2
    for cell in cells:
        recipe = cell.recipe
        assert recipe.rounds * (cell.lag or 0) == 8
        assert recipe.prompts.per_round * recipe.generation.samples == (cell.lag or 0) * 16
        assert (recipe.learning.epochs, recipe.learning.drop_uniform_groups) == (1, False)
        assert recipe.learning.learning_rate == (1e-4 if recipe.learning.loss == "grpo" else 3e-4)
        assert recipe.generation == cell.base.generation
    assert {cell.seed for cell in cells} == {3, 5}
    assert len({cell.base.name for cell in cells}) == 4


def test_more_epochs_sample_less() -> None:
    (cell,) = _cells("oapl", told=[*SMALL, "learning.epochs=2"])
    assert cell.recipe.prompts.per_round == 4 * 16 // (2 * 8)


def test_a_cell_learns_from_its_own_rounds_and_all_from_one_start(tmp_path: Path) -> None:
    stages = Fakes()
    compare(_cells(), tmp_path, stages, _quiet)
    assert stages.done == [
        "start start-seed0",
        "start-lag4-seed0: evaluate start sample 0",
        "oapl-lag4-seed0: learn 0 from start-lag4-seed0 0 on start-seed0",
        "oapl-lag4-seed0: evaluate 0 sample 1",
        "oapl-lag4-seed0: learn 1 from oapl-lag4-seed0 1 on oapl-lag4-seed0",
        "oapl-lag4-seed0: evaluate 1",
        "grpo-lag4-seed0: learn 0 from start-lag4-seed0 0 on start-seed0",
        "grpo-lag4-seed0: evaluate 0 sample 1",
        "grpo-lag4-seed0: learn 1 from grpo-lag4-seed0 1 on grpo-lag4-seed0",
        "grpo-lag4-seed0: evaluate 1",
    ]
    for place in ("round_prompts", "prompts"):
        ours, theirs = (Run(tmp_path, f"{arm}-lag4-seed0") for arm in ("oapl", "grpo"))
        paths = [run.round_prompts(1) if place == "round_prompts" else run.prompts for run in (ours, theirs)]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    whole = Fakes()
    compare(_cells(), tmp_path / "whole", whole, _quiet)
    killed = Fakes(fail="grpo-lag4-seed0: learn 1 from grpo-lag4-seed0 1 on grpo-lag4-seed0")
    with pytest.raises(KeyboardInterrupt):
        compare(_cells(), tmp_path / "killed", killed, _quiet)
    again = Fakes()
    compare(_cells(), tmp_path / "killed", again, _quiet)
    assert killed.done + again.done == whole.done
    nothing = Fakes()
    compare(_cells(), tmp_path / "killed", nothing, _quiet)
    assert nothing.done == []
    more = Fakes()
    compare(_cells("oapl,grpo,sft"), tmp_path / "killed", more, _quiet)
    assert {line.partition("-")[0] for line in more.done} == {"sft"}


def test_other_settings_and_a_second_process_are_refused(tmp_path: Path) -> None:
    compare(_cells("oapl"), tmp_path, Fakes(), _quiet)
    with pytest.raises(RequestError, match=r"other settings \(learning.beta2: 0.2 -> 0.5\); give a new --out"):
        compare(_cells("oapl", told=[*SMALL, "learning.beta2=0.5"]), tmp_path, Fakes(), _quiet)
    with alone(tmp_path), pytest.raises(RequestError, match="another comparison"), alone(tmp_path):
        pass


def test_a_cell_that_fails_does_not_keep_the_others_from_being_made(tmp_path: Path) -> None:
    class Diverging(Fakes):
        def learn(self, run: Run, round: int, data: Path, data_round: int, policy: Path) -> None:
            if run.name.startswith("oapl"):
                raise WorkError("loss nan")
            super().learn(run, round, data, data_round, policy)

    stages, said = Diverging(), list[str]()
    with pytest.raises(WorkError, match="1 of 2 cells failed: oapl-lag4-seed0"):
        compare(_cells(), tmp_path, stages, said.append)
    assert "grpo-lag4-seed0: evaluate 1" in stages.done
    assert "1/2 oapl-lag4-seed0: failed: loss nan" in said


def test_more_prompts_than_there_are_is_said_before_anything_starts(tmp_path: Path) -> None:
    stages = Fakes()
    with pytest.raises(RequestError, match=r"a round needs 8,000 prompts and there are 1,536"):
        compare(_cells("oapl", lags=[4000], steps=4000), tmp_path, stages, _quiet)
    assert stages.done == []


def test_the_table_is_tidy_and_its_values_are_those_of_the_files(tmp_path: Path) -> None:
    cells = _cells()
    compare(cells, tmp_path / "tiny-test", Fakes(), _quiet)
    found = table.measure(cells, tmp_path / "tiny-test")
    assert tuple(found.columns) == table.COLUMNS
    keys = ["variant", "lag", "seed", "round", "step", "task", "metric"]
    assert found.select(keys).is_unique().all()
    assert set(found["experiment"]) == {"tiny-test"}
    assert set(found["lag"]) == {4}

    def value(variant: str, round: int | None, task: str, metric: str) -> tuple[float, float, float]:
        rows = found.filter(
            (pl.col("variant") == variant)
            & pl.col("round").eq_missing(round)
            & (pl.col("task") == task)
            & (pl.col("metric") == metric)
        )
        assert len(rows) == 1
        return rows["value"][0], rows["low"][0], rows["high"][0]

    # Of four samples 1, 1, 2, 2 are right at the start; then 1, 2, 3, 4 under oapl and 1, 1, 3, 4 under grpo.
    assert value("oapl", None, "all", "pass@1")[0] == pytest.approx(0.375)
    assert value("oapl", 1, "all", "pass@1")[0] == pytest.approx(0.625)
    assert value("oapl", 1, "math", "pass@1")[0] == pytest.approx(0.375)
    assert value("oapl", 1, "code", "pass@1")[0] == pytest.approx(0.875)
    gains = np.array([0, 0.25, 0.25, 0.5])
    half = 1.959964 * gains.std(ddof=1) / 2
    assert value("oapl", 1, "all", "gain@1") == pytest.approx((0.25, 0.25 - half, 0.25 + half), abs=1e-6)
    half = 1.959964 * np.array([0, -0.25, 0, 0]).std(ddof=1) / 2
    assert value("grpo", 1, "all", "against oapl@1") == pytest.approx(
        (-0.0625, -0.0625 - half, -0.0625 + half), abs=1e-6
    )
    assert value("oapl", 0, "all", "entropy")[0] == pytest.approx(2.0)
    assert value("oapl", 1, "train", "reward")[0] == 0.25
    assert value("oapl", 0, "train", "seconds/generate")[0] == 2.0
    norms = found.filter((pl.col("variant") == "grpo") & (pl.col("metric") == "grad_norm"))
    assert norms["step"].to_list() == list(range(1, 9))
    assert norms["round"].to_list() == [0] * 4 + [1] * 4
    assert norms["value"].to_list() == pytest.approx([s / 10 for s in range(1, 9)])


def test_a_folder_knows_the_cells_of_earlier_calls(tmp_path: Path) -> None:
    compare(_cells(), tmp_path, Fakes(), _quiet)
    more = Fakes()
    longer = _cells("sft", lags=[8], steps=8, told=[*SMALL, "generation.samples=16"])
    compare(longer, tmp_path, more, _quiet)
    assert not any(line.startswith("start start") for line in more.done), "one start serves all lags of a seed"
    cells = all_cells(tmp_path)
    assert [(cell.arm.name, cell.lag) for cell in cells] == [("oapl", 4), ("grpo", 4), ("sft", 8)]
    assert cells[2].recipe == longer[0].recipe
    assert set(table.measure(cells, tmp_path)["variant"]) == {"oapl", "grpo", "sft"}


def test_means_over_seeds_carry_students_interval() -> None:
    rows = [
        {"lag": 8, "variant": "grpo", "seed": seed, "round": round, "step": 8 * (round + 1), "task": "all"}
        | {"metric": "against oapl@1", "value": value}
        for round, values in ((0, (9.0, 9.0, 9.0)), (1, (-0.1, -0.2, -0.3)))
        for seed, value in enumerate(values)
    ]
    (found,) = table.over_seeds(pl.DataFrame(rows)).to_dicts()
    assert (found["seeds"], found["step"]) == (3, 16)
    half = 4.303 * 0.1 / 3**0.5
    assert (found["value"], found["low"], found["high"]) == pytest.approx((-0.2, -0.2 - half, -0.2 + half))
    assert table.student([0.5]) == (None, None)
    low, high = table.student([0.0, 1.0] * 6)
    assert low is not None and high is not None
    # 2.201 is Student's quantile for eleven degrees of freedom; half the values differ by one from the other half.
    assert (high - low) / 2 == pytest.approx(2.201 * (3 / 11) ** 0.5 / 12**0.5, rel=2e-3)


def test_pictures_are_drawn_of_each_lag_and_of_all(tmp_path: Path) -> None:
    cells = _cells(lags=[4, 8], seeds=[0, 1])
    compare(cells, tmp_path, Fakes(), _quiet)
    made = draw(table.measure(cells, tmp_path), tmp_path)
    assert [path.name for path in made] == ["lag-0004.png", "lag-0008.png", "lags.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)
    assert "lags.png" in (tmp_path / "index.html").read_text(encoding="utf-8")


class Resampled(FakeEngine):
    """Remembers how each request was to be sampled."""

    def __init__(self, settings: Generation) -> None:
        super().__init__()
        self.size = self.sampling = settings
        self.told: list[tuple[float, int]] = []

    def submit(self, request: Any) -> None:
        self.told.append((self.sampling.temperature, self.sampling.samples))
        super().submit(request)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory, random_policy: Path) -> tuple[sampling.Job, list[Resampled]]:
    """A start that was evaluated and sampled, and the engines that were started for it."""
    told = [*SMALL, "evaluation.temperature=0.5", "generation.max_model_len=200", "verification.workers=1"]
    (cell,) = _cells("oapl", lags=[2], steps=2, told=told)
    out = tmp_path_factory.mktemp("sampled")
    run = Run(out, cell.base.name)
    with pytest.raises(KeyboardInterrupt):
        compare([cell], out, Fakes(fail="start start-seed0"), _quiet)
    shutil.copytree(random_policy, Run(out, "beside").snapshot(random_policy.name))
    job = sampling.Job(run, random_policy, run.prompts, None, evaluate=True, round=0)
    engines: list[Resampled] = []
    sampling.sample(job, lambda policy, settings, seed: engines.append(Resampled(settings)) or engines[-1])  # type: ignore[func-returns-value]
    return job, engines


def test_one_engine_evaluates_and_samples_the_next_round(sampled: tuple[sampling.Job, list[Resampled]]) -> None:
    job, engines = sampled
    (engine,) = engines
    assert engine.closed
    assert engine.size.max_model_len == 200
    assert engine.told == [(1.0, 8)] * (4 * 8) + [(0.5, 4)] * (4 * 4)
    entropy = pl.read_parquet(job.run.evaluation(None))["entropy"].to_list()
    assert entropy == pytest.approx([1.75 / 3] * 4)
    assert (job.run.verdicts(0) / SUMMARY).exists()

    def never(policy: Path, settings: Generation, seed: int) -> Resampled:
        raise AssertionError("the engine was started for nothing")

    sampling.sample(job, never)


def test_a_stored_round_is_learned_by_each_arm_without_sampling(
    tmp_path: Path, sampled: tuple[sampling.Job, list[Resampled]]
) -> None:
    run = sampled[0].run
    arms = grid.arms(None, ["b1:learning.beta2=0.1", "b2:learning.beta2=0.3,learning.epochs=2"])
    cells = grid.stored(str(run.recipe), SMALL, arms, [7])
    assert [cell.recipe.learning.beta2 for cell in cells] == [0.1, 0.3]
    stages, data = Fakes(), grid.Stored(run.path, 0)
    compare(cells, tmp_path, stages, _quiet, data)
    assert stages.done == [
        "start-seed7: evaluate start",
        f"b1-seed7: learn 0 from {run.name} 0 on beside",
        "b1-seed7: evaluate 0",
        f"b2-seed7: learn 0 from {run.name} 0 on beside",
        "b2-seed7: evaluate 0",
    ]
    assert set(table.measure(cells, tmp_path)["lag"]) == {8}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"losses": "oapl,,grpo"}, "something is missing between the commas"),
        ({"losses": ""}, "nothing to compare"),
        ({"lags": [64], "steps": 100}, "--steps 100: not a multiple of lag 64"),
        ({"told": ["seed=3"]}, "--set seed: the comparison decides it"),
        ({"told": ["learning.batch_size=3"], "lags": [1]}, "no whole number of groups of 8"),
        ({"told": ["learning.replay_rounds=1"]}, "learning.replay_rounds"),
        ({"told": ["learning.drop_uniform_groups=true"]}, "learning.drop_uniform_groups"),
        ({"variants": ["a:prompts.per_round=3"]}, "no learning.key=value"),
        ({"variants": ["a:learning.epochs=3"]}, "learning.epochs would give it other samples"),
        ({"variants": ["a:learning.betta=3"]}, "learning.betta: no such setting"),
        ({"variants": ["nothing"]}, "expected name:learning.key=value"),
    ],
)
def test_a_grid_that_would_not_compare_like_with_like_is_refused(words: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        _cells(**words)
    assert said in str(caught.value)
