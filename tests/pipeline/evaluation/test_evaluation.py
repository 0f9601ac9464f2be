"""pass@k against exhaustive enumeration, and its interval against a simulation."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.evaluation.pass_at_k import estimate, pass_at_k
from pipeline.recipe import Generation


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_all_choices_that_hold_a_right_one(n: int) -> None:
    for c in range(n + 1):
        marks = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            choices = list(itertools.combinations(marks, k))
            expected = sum(any(choice) for choice in choices) / len(choices)
            assert pass_at_k([n], [c], k)[0] == pytest.approx(expected, abs=1e-12)


def test_many_samples_do_not_overflow() -> None:
    assert pass_at_k([100_000], [1], 50_000)[0] == pytest.approx(0.5)
    assert pass_at_k([4], [4], 4)[0] == 1.0
    with pytest.raises(ValueError, match="pass@5"):
        pass_at_k([4], [1], 5)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        chances = rng.beta(1, 1, size=120)  # true mean 0.5
        found = estimate(np.full(120, 8), rng.binomial(8, chances), 1)
        covered += found.low <= 0.5 <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_the_engine_is_started_with_the_sampling_of_evaluation(
    tmp_path: Path, random_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.cli import main as cli
    from pipeline.generation import vllm_engine

    class Started(Exception):
        pass

    def start(policy: Path, settings: Generation, seed: int) -> Any:
        raise Started(settings)

    monkeypatch.setattr(vllm_engine, "VllmEngine", start)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"task": "math", "prompt": "1+1?", "answer": "2"}) + "\n", encoding="utf-8")
    changes = ["temperature=0.6", "top_p=0.95", "max_tokens=99", "samples=3", "ks=[1]"]
    with pytest.raises(Started) as caught:
        cli.evaluate(random_policy, prompts, tmp_path / "out.parquet", set=[f"evaluation.{item}" for item in changes])
    settings = caught.value.args[0]
    assert (settings.temperature, settings.top_p, settings.max_tokens) == (0.6, 0.95, 99)
