"""What docs/evidence.md counts of its measurements, against values by hand."""

from __future__ import annotations

import polars as pl
import pytest

from benchmarks.evidence import experiments
from benchmarks.evidence.tables import by_completions, needed


def measured(variant: str, lag: int, rounds: list[tuple[float, float]], start: float) -> list[dict[str, object]]:
    """A curve of (samples of a round, pass@1 after it), as `oapl compare` tells it."""
    known = {"variant": variant, "lag": lag, "seed": 0}
    rows = [known | {"round": None, "step": 0, "task": "all", "metric": "pass@1", "value": start}]
    for number, (samples, value) in enumerate(rounds):
        of_round = known | {"round": number, "step": (number + 1) * lag}
        rows.append(of_round | {"task": "train", "metric": "samples", "value": samples})
        rows.append(of_round | {"task": "all", "metric": "pass@1", "value": value})
        rows.append(of_round | {"task": "math", "metric": "pass@1", "value": 0.0})
    return rows


def test_completions_until_a_target_is_reached() -> None:
    rows = measured("grpo", 8, [(256.0, 0.6), (256.0, 0.58), (256.0, 0.78)], 0.5)
    rows += measured("oapl-4-epochs", 64, [(512.0, 0.7)], 0.5)
    rows += measured("grpo", 64, [(512.0, 0.9)], 0.5)  # not laid beside fresh samples
    curves = by_completions(pl.DataFrame(rows, infer_schema_length=None))

    grpo = curves.filter(pl.col("variant") == "grpo").sort("completions")
    assert grpo.select("completions", "value").rows() == [(0.0, 0.5), (256.0, 0.6), (512.0, 0.58), (768.0, 0.78)]
    found = {target: needed(curves, target)["completions"].to_list() for target in (0.55, 0.68, 0.75, 0.8)}
    assert found[0.55] == pytest.approx([128, 128])  # half way up one's first line, a quarter up the other's
    assert found[0.68] == pytest.approx([640, 460.8])
    assert found[0.75] == [pytest.approx(729.6), None]
    assert found[0.8] == [None, None]


def test_comparisons_that_only_read_the_same_rollouts_do_not_wait_for_each_other() -> None:
    (betas,), (groups,), (replay,) = (
        list(made()) for made in (experiments.betas, experiments.groups, experiments.replay)
    )
    lag_64, lag_400, _ = experiments.lags()
    assert not experiments.hinders(betas, groups)
    assert experiments.hinders(lag_64, lag_400)  # one folder, one at a time
    assert experiments.hinders(lag_64, betas) and experiments.hinders(betas, lag_64)
    assert not experiments.hinders(lag_64, replay)
