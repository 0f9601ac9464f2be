"""pass@k on held-out prompts: sampled by the engine, judged by the verifiers, estimated without bias."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from pipeline.errors import RequestError, WorkError
from pipeline.policies import snapshots
from pipeline.prompts.files import Prompt, write_prompts
from pipeline.recipe import Recipe
from pipeline.scoring.score import score
from pipeline.storage.durable import replacing
from pipeline.storage.places import local_path
from pipeline.storage.working_copy import copy_of

if TYPE_CHECKING:
    import polars as pl

    from pipeline.generation.engine import Engine

Z95 = 1.959963984540054
_FACTS = b"oapl.evaluation"


def pass_at_k(samples: npt.ArrayLike, correct: npt.ArrayLike, k: int) -> npt.NDArray[np.float64]:
    """The chance that at least one of k samples is right, from n of which c were: `1 - C(n-c, k) / C(n, k)`.

    `samples` n and `correct` c are arrays [prompts]; n >= k. Unbiased, unlike `1 - (1 - c/n)^k`; computed as a
    product, so that no binomial overflows. Source: Chen et al. 2021 (arXiv 2107.03374).
    """
    n = np.asarray(samples, dtype=np.float64)
    c = np.asarray(correct, dtype=np.float64)
    if (n < k).any():
        raise ValueError(f"pass@{k} needs at least {k} samples of each prompt")
    steps = np.arange(k, dtype=np.float64)
    misses = (n[..., None] - c[..., None] - steps) / (n[..., None] - steps)  # [prompts, k]
    chances: npt.NDArray[np.float64] = 1.0 - np.clip(misses, 0.0, 1.0).prod(axis=-1)
    return chances


class Estimate(BaseModel):
    """A mean over prompts with its 95 % interval (normal, over prompts; the samples of a prompt are its own)."""

    model_config = ConfigDict(frozen=True)
    mean: float
    low: float
    high: float


class Evaluation(BaseModel):
    """What is known of one snapshot on the held-out prompts."""

    model_config = ConfigDict(frozen=True)
    snapshot_id: str
    step: int
    prompts: int
    samples: int
    """Completions a prompt."""
    overall: dict[int, Estimate]
    """pass@k by k."""
    by_task: dict[str, dict[int, Estimate]]
    """The same by task (`math`, `code`), and by where the prompts came from."""
    by_source: dict[str, dict[int, Estimate]]
    unscorable: int
    """Completions without a verdict; they count neither way."""
    mean_tokens: float
    seconds: float

    @property
    def pass_at(self) -> dict[int, float]:
        return {k: estimate.mean for k, estimate in self.overall.items()}

    @property
    def ci(self) -> dict[int, tuple[float, float]]:
        return {k: (estimate.low, estimate.high) for k, estimate in self.overall.items()}


def estimate(samples: npt.ArrayLike, correct: npt.ArrayLike, k: int) -> Estimate:
    """pass@k over prompts, with its interval."""
    values = pass_at_k(samples, correct, k)
    mean = float(values.mean())
    half = Z95 * float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 1.0
    return Estimate(mean=mean, low=max(0.0, mean - half), high=min(1.0, mean + half))


def evaluate(
    policy: Path, prompts: Sequence[Prompt], recipe: Recipe, out: Path, start_engine: Callable[[], Engine]
) -> Evaluation:
    """Samples, judges and counts, and writes `out`: Parquet, a row a prompt, the estimates in its metadata.

    The engine is to be started with `recipe.for_evaluation()`, which is not how the policy samples for training.
    Interrupted, it goes on from the groups it had. Raises WorkError where no completion could be judged.
    """
    from pipeline.generation.batch import Work
    from pipeline.generation.generate import generate

    if not prompts:
        raise RequestError("no prompts to evaluate on; give a file whose 'split' is heldout, or has none")
    started = time.monotonic()
    snapshot = snapshots.load_record(policy)
    settings = recipe.evaluation
    work = out.with_name(f".{out.name}.{snapshot.snapshot_id}.work")
    # In the order of their ids, so that what is sampled does not hang on the file's order.
    ordered = sorted(prompts, key=lambda prompt: prompt.prompt_id)
    write_prompts(work / "prompts.parquet", ordered)
    generate(Work(policy, recipe.for_evaluation(), 0, recipe.seed + 1), ordered, work / "rollouts", start_engine)
    score(work / "rollouts", work / "prompts.parquet", work / "verdicts", recipe.verification)
    table = _count(work, ordered)
    evaluation = _estimates(table, snapshot, settings.samples, settings.ks, time.monotonic() - started)
    _write(table, evaluation, out)
    shutil.rmtree(work)
    return evaluation


def evaluate_to(
    place: str, policy: Path, prompts: Sequence[Prompt], recipe: Recipe, start_engine: Callable[[], Engine]
) -> Evaluation:
    """`evaluate`, with a file's path or its URL for `out`.

    What is sent to a URL is made in the cache. Where sending it failed, the same call sends it and measures nothing.
    """
    out = local_path(place)
    if out is not None:
        return evaluate(policy, prompts, recipe, out, start_engine)
    folder, _, name = place.rpartition("/")
    if not name:
        raise RequestError(f"--out {place}: names a folder; give a file's URL, such as {place}evaluation.parquet")
    copy = copy_of(folder)
    settings = recipe.model_dump(mode="json", include={"evaluation", "verification", "generation", "seed"})
    asked = [snapshots.load_record(policy).sha256, sorted(prompt.prompt_id for prompt in prompts), settings]
    task = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    if copy.held(name, task) is None or not (copy.folder / name).is_file():
        evaluate(policy, prompts, recipe, copy.folder / name, start_engine)
        copy.hold(name, task)
    copy.send([name])
    copy.release(name)
    return read_evaluation(copy.folder / name)


def _count(work: Path, prompts: Iterable[Prompt]) -> pl.DataFrame:
    import polars as pl

    rollouts = pl.scan_parquet(work / "rollouts" / "part-*.parquet").select(
        "rollout_id",
        "prompt_id",
        pl.col("completion_tokens").list.len().alias("tokens"),
        (-pl.col("logprobs").list.sum().cast(pl.Float64)).alias("nats"),
    )
    verdicts = pl.scan_parquet(work / "verdicts" / "*.parquet").select("rollout_id", "status", "reward")
    facts = pl.LazyFrame(
        [(p.prompt_id, p.task, p.source) for p in prompts], ["prompt_id", "task", "source"], orient="row"
    )
    return (
        rollouts.join(verdicts, on="rollout_id")
        .group_by("prompt_id")
        .agg(
            pl.col("reward").count().alias("samples"),
            (pl.col("status") == "correct").sum().alias("correct"),
            pl.col("reward").null_count().alias("unscorable"),
            pl.col("tokens").mean(),
            # -log-probability a token under the sampling distribution, whose mean is that distribution's entropy.
            (pl.col("nats").sum() / pl.col("tokens").sum()).alias("entropy"),
        )
        .join(facts, on="prompt_id")
        .sort("prompt_id")
        .collect()
    )


def _estimates(
    table: pl.DataFrame, snapshot: snapshots.Snapshot, samples: int, ks: Sequence[int], seconds: float
) -> Evaluation:
    import polars as pl

    scorable = table.filter(pl.col("samples") >= max(ks))
    if scorable.is_empty():
        raise WorkError(
            f"none of the {len(table)} prompts has {max(ks)} completions with a verdict; "
            "see `oapl verify` on one of them for why"
        )
    return Evaluation(
        snapshot_id=snapshot.snapshot_id,
        step=snapshot.step,
        prompts=len(scorable),
        samples=samples,
        overall={k: estimate(scorable["samples"], scorable["correct"], k) for k in ks},
        by_task=_by(scorable, "task", ks),
        by_source=_by(scorable, "source", ks),
        unscorable=int(table["unscorable"].sum()),
        mean_tokens=float(table["tokens"].mean() or 0.0),  # type: ignore[arg-type]
        seconds=round(seconds, 2),
    )


def _by(table: pl.DataFrame, column: str, ks: Sequence[int]) -> dict[str, dict[int, Estimate]]:
    parts = sorted(table.partition_by(column, as_dict=True).items())
    return {str(key[0]): {k: estimate(p["samples"], p["correct"], k) for k in ks} for key, p in parts}


def _write(table: pl.DataFrame, evaluation: Evaluation, out: Path) -> None:
    import pyarrow.parquet as pq

    arrow = table.to_arrow()
    arrow = arrow.replace_schema_metadata({_FACTS: evaluation.model_dump_json().encode()})
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        pq.write_table(arrow, temporary, compression="zstd")


def read_evaluation(path: Path) -> Evaluation:
    """The estimates in a file that `evaluate` wrote. Raises RequestError where it is not one."""
    import pyarrow.parquet as pq

    if not path.exists():
        raise RequestError(f"no evaluation {path}; make it with `oapl evaluate`")
    metadata: dict[bytes, bytes] = pq.read_schema(path).metadata or {}
    if _FACTS not in metadata:
        raise RequestError(f"{path}: not an evaluation that this program wrote")
    return Evaluation.model_validate(json.loads(metadata[_FACTS]))


def heldout(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The held-out prompts of a set; all of them where none is marked, as in a file made for evaluation."""
    everything = list(prompts)
    marked = [prompt for prompt in everything if prompt.split == "heldout"]
    return marked or [replace(prompt, split="heldout") for prompt in everything]


def as_row(evaluation: Evaluation) -> dict[str, Any]:
    """Flat numbers for a table: `pass@1`, `pass@8`, ... and their intervals' ends."""
    row: dict[str, Any] = {"snapshot_id": evaluation.snapshot_id, "step": evaluation.step}
    for k, found in evaluation.overall.items():
        row |= {f"pass@{k}": found.mean, f"pass@{k}_low": found.low, f"pass@{k}_high": found.high}
    return row
