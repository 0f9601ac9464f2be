"""The measurements of a comparison as one tidy table: a row a measurement.

| column | meaning |
|---|---|
| experiment | name of the comparison's folder |
| variant | the arm: a loss's name, or a variant's |
| loss | `oapl`, `grpo` or `sft` |
| lag | optimizer steps between snapshots |
| seed | of cold start, prompts, sampling and order |
| round | whose learning or snapshot was measured; null: the start |
| step | optimizer steps since the start |
| task | `all`, or a task such as `math` (held-out prompts); `train` for what is of learning or of time |
| metric | see below |
| value, low, high | the value and, where it is a mean over held-out prompts, its 95 % interval |

Held-out prompts: `pass@k`; `entropy`, nats a token of the policy's own samples; `tokens`, a completion's; `gain@1`,
pass@1 less the start's on the same prompts; `against VARIANT@1`, pass@1 less that of the comparison's first variant at
the same lag, seed and round. The latter two are paired by prompt. Learning, a row an optimizer step: `loss`,
`grad_norm`, `surprise` (-log pi a token of the data), `entropy` (nats a token of the policy, on the data), `log_ratio`
and `log_ratio_abs` (nats a sequence), `kl_k3`. Once a round: `reward`, `samples`, and `seconds/generate`, `verify`,
`learn`, `evaluate`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.comparison.grid import Cell
from pipeline.comparison.run import learned
from pipeline.evaluation.pass_at_k import Z95, Estimate, read_evaluation
from pipeline.layout import Run
from pipeline.runs.stages import START_EVALUATION, read_stages
from pipeline.storage.durable import replacing

if TYPE_CHECKING:
    import polars as pl

COLUMNS = (
    "experiment",
    "variant",
    "loss",
    "lag",
    "seed",
    "round",
    "step",
    "task",
    "metric",
    "value",
    "low",
    "high",
)
BY_STEP = ("loss", "surprise", "entropy", "grad_norm", "log_ratio", "log_ratio_abs", "kl_k3")
TRAIN = "train"
FILE = "measurements.parquet"

Row = dict[str, Any]


def measure(cells: Sequence[Cell], out: Path) -> pl.DataFrame:
    """All measurements of the cells, as far as they are made."""
    import polars as pl

    rows = [row for cell in cells for row in _of_cell(cell, cells, out)]
    whole, real = pl.Int64, pl.Float64
    types = {"lag": whole, "seed": whole, "round": whole, "step": whole, "value": real, "low": real, "high": real}
    return pl.DataFrame(rows, schema={name: types.get(name, pl.String) for name in COLUMNS}, orient="row")


def write(table: pl.DataFrame, out: Path) -> Path:
    """Writes the table, whole or not at all."""
    place = out / FILE
    with replacing(place) as temporary:
        table.write_parquet(temporary, compression="zstd")
    return place


def _of_cell(cell: Cell, cells: Sequence[Cell], out: Path) -> Iterator[Row]:
    run, base = Run(out, cell.recipe.name), Run(out, cell.base.name)
    first = next(c for c in cells if (c.lag, c.seed) == (cell.lag, cell.seed))
    lag = cell.lag
    if lag is None and (summary := learned(run, 0)) is not None:
        lag = summary["steps"]
    known = {
        "experiment": out.absolute().name,
        "variant": cell.arm.name,
        "loss": cell.recipe.learning.loss,
        "lag": lag,
        "seed": cell.seed,
    }
    start = base.evaluation(None)
    if start.exists():
        for row in _evaluated(start):
            yield known | {"round": None} | row
        yield known | {"round": None, "step": 0} | _time(base, 0, START_EVALUATION, "evaluate")
    for round in range(cell.recipe.rounds):
        for row in _of_round(run, base, round, stored=cell.lag is None):
            yield known | {"round": round} | row
        there, rival = run.evaluation(round), Run(out, first.recipe.name).evaluation(round)
        if there.exists() and start.exists():
            yield known | {"round": round} | _paired(there, start, "gain@1")
        if there.exists() and rival.exists() and first is not cell:
            yield known | {"round": round} | _paired(there, rival, f"against {first.arm.name}@1")


def _of_round(run: Run, base: Run, round: int, *, stored: bool) -> Iterator[Row]:
    summary = learned(run, round)
    if summary is None:
        return
    of_round = {"step": summary["step"]}
    for line in run.learning_log(round).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for name in BY_STEP:
            if name in record:  # logs of earlier versions have fewer
                yield {"step": int(record["step"])} | _row(TRAIN, name, record[name])
    yield of_round | _row(TRAIN, "reward", summary["reward_mean"])
    yield of_round | _row(TRAIN, "samples", summary["rows"])
    sampled = base if round == 0 else run
    if not stored:
        for stage in ("generate", "verify"):
            yield of_round | _time(sampled, round, stage, stage)
    yield of_round | _time(run, round, "learn", "learn")
    if run.evaluation(round).exists():
        yield of_round | _time(run, round, "evaluate", "evaluate")
        yield from _evaluated(run.evaluation(round))


def _row(task: str, metric: str, value: float, low: float | None = None, high: float | None = None) -> Row:
    return {"task": task, "metric": metric, "value": float(value), "low": low, "high": high}


def _time(run: Run, round: int, stage: str, name: str) -> Row:
    return _row(TRAIN, f"seconds/{name}", read_stages(run, round).get(stage, {}).get("seconds", 0.0))


def _evaluated(path: Path) -> Iterator[Row]:
    import polars as pl

    found = read_evaluation(path)
    table = pl.read_parquet(path)
    for task, estimates in {"all": found.overall, **found.by_task}.items():
        for k, estimate in estimates.items():
            yield {"step": found.step} | _estimated(task, f"pass@{k}", estimate)
        part = table if task == "all" else table.filter(pl.col("task") == task)
        for metric in ("entropy", "tokens"):
            yield {"step": found.step} | _estimated(task, metric, _mean(part[metric].to_list()))


def _estimated(task: str, metric: str, estimate: Estimate) -> Row:
    return _row(task, metric, estimate.mean, estimate.low, estimate.high)


def _mean(values: Sequence[float]) -> Estimate:
    """Mean over prompts with its normal 95 % interval; of a single one the interval is the value."""
    import numpy as np

    array = np.asarray(values, dtype=np.float64)
    middle = float(array.mean())
    half = Z95 * float(array.std(ddof=1)) / len(array) ** 0.5 if len(array) > 1 else 0.0
    return Estimate(mean=middle, low=middle - half, high=middle + half)


def _paired(after: Path, before: Path, metric: str) -> Row:
    """Difference of pass@1 on the same prompts, with the interval of the mean of the prompts' differences."""
    import polars as pl

    found = read_evaluation(after)
    rate = (pl.col("correct") / pl.col("samples")).alias("rate")
    one, other = (
        pl.read_parquet(path).filter(pl.col("samples") > 0).select("prompt_id", rate) for path in (after, before)
    )
    both = one.join(other, on="prompt_id")
    return {"step": found.step} | _estimated("all", metric, _mean((both["rate"] - both["rate_right"]).to_list()))


def over_seeds(table: pl.DataFrame) -> pl.DataFrame:
    """Where each variant ended at each lag, as a mean over seeds: the interval that tells whether another seed agrees.

    Columns `lag, variant, step, metric, seeds, value, low, high`, of held-out prompts of all tasks. The intervals are
    Student's, at 95 %, over the seeds' values (null where there is one seed); `against VARIANT@1` is the mean of the
    seeds' paired differences.
    """
    import polars as pl

    held = table.filter((pl.col("task") == "all") & pl.col("round").is_not_null())
    held = held.filter(pl.col("metric").str.contains(r"^(pass@|entropy$|gain@|against )"))
    keys = ["lag", "variant", "metric"]
    last = held.sort("step", maintain_order=True).group_by([*keys, "seed"], maintain_order=True).last()
    rows = []
    for (lag, variant, metric), part in last.group_by(keys, maintain_order=True):
        low, high = student(part["value"].to_list())
        if low is not None and high is not None and metric.startswith("pass@"):
            low, high = max(0.0, low), min(1.0, high)
        mean = part["value"].mean()
        rows.append((lag, variant, part["step"].max(), metric, len(part), mean, low, high))
    names = ("lag", "variant", "step", "metric", "seeds", "value", "low", "high")
    real = dict.fromkeys(("value", "low", "high"), pl.Float64)
    return pl.DataFrame(rows, schema={name: real.get(name) for name in names}, orient="row").sort(
        "lag", "metric", maintain_order=True
    )


STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's 97.5 % quantile for 1 to 10 degrees of freedom; beyond, by an expansion."""


def student(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Student's 95 % interval of the mean of some independent values; none of a single one."""
    import numpy as np

    array = np.asarray(values, dtype=np.float64)
    free = len(array) - 1
    if free < 1:
        return None, None
    z = Z95
    expanded = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)  # Cornish-Fisher
    quantile = STUDENT[free - 1] if free <= len(STUDENT) else expanded
    half = quantile * float(array.std(ddof=1)) / len(array) ** 0.5
    return float(array.mean()) - half, float(array.mean()) + half
