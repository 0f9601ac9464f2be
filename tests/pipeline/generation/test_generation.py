"""Generation: the continuous loop on a fake engine, and the real engine against transformers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from fake_engine import FakeEngine

from pipeline.errors import RequestError
from pipeline.generation.batch import Work
from pipeline.generation.engine import Completion
from pipeline.generation.generate import generate
from pipeline.prompts.files import Prompt, make_prompt
from pipeline.recipe import Generation
from pipeline.rollouts.store import read_manifest

Oapl = Callable[..., "subprocess.CompletedProcess[str]"]


def _prompts(count: int) -> list[Prompt]:
    return [make_prompt("math", [("user", f"What is {n} + 1?")], answer=str(n + 1)) for n in range(count)]


def _settings(**changes: object) -> Generation:
    return Generation.model_validate({"samples": 4, "max_num_seqs": 8, "shard_rows": 16, "max_tokens": 8, **changes})


def test_every_completion_is_asked_for_once_and_groups_are_whole(tmp_path: Path, random_policy: Path) -> None:
    engine = FakeEngine()
    totals = generate(Work(random_policy, _settings(), 3, 11), _prompts(30), tmp_path / "g", lambda: engine)
    assert (totals.groups, totals.completions, totals.tokens) == (30, 120, 360)
    assert set(engine.seen.values()) == {1}
    assert len(engine.seen) == 120
    assert engine.widest <= 16 + 4  # two engines' worth and a group, however many prompts there are
    assert engine.closed
    rows = pl.read_parquet(tmp_path / "g" / "part-*.parquet")
    assert rows["rollout_id"].n_unique() == 120
    assert rows["seed"].n_unique() == 120
    assert set(rows["round"]) == {3}
    assert rows.group_by("prompt_id").agg(pl.col("sample").sort())["sample"].to_list() == [[0, 1, 2, 3]] * 30


def test_what_is_committed_is_not_asked_for_again(tmp_path: Path, random_policy: Path) -> None:
    work = Work(random_policy, _settings(), 0, 11)

    class Failing(FakeEngine):
        def step(self) -> list[Completion]:
            if len(self.seen) > 60:
                raise RuntimeError("engine died")
            return super().step()

    with pytest.raises(RuntimeError, match="engine died"):
        generate(work, _prompts(30), tmp_path / "g", Failing)
    kept = read_manifest(tmp_path / "g").groups
    assert 0 < kept < 30
    engine = FakeEngine()
    totals = generate(work, _prompts(30), tmp_path / "g", lambda: engine)
    assert (totals.skipped_groups, totals.groups, len(engine.seen)) == (kept, 30 - kept, 4 * (30 - kept))
    whole = tmp_path / "whole"
    generate(work, _prompts(30), whole, FakeEngine)
    columns = ["rollout_id", "seed", "completion_tokens"]
    resumed, undisturbed = (
        pl.read_parquet(folder / "part-*.parquet").select(columns).sort("rollout_id")
        for folder in (tmp_path / "g", whole)
    )
    assert resumed.equals(undisturbed)

    def never() -> FakeEngine:
        raise AssertionError("the engine was started for nothing")

    assert generate(work, _prompts(30), whole, never).groups == 0


def test_another_snapshot_or_sampling_is_refused_by_name(tmp_path: Path, random_policy: Path) -> None:
    generate(Work(random_policy, _settings(), 0, 11), _prompts(2), tmp_path / "g", FakeEngine)
    with pytest.raises(RequestError, match=r"sampling\.temperature: 1\.0 there, 0\.5 now"):
        generate(Work(random_policy, _settings(temperature=0.5), 0, 11), _prompts(2), tmp_path / "g", FakeEngine)


def test_a_prompt_longer_than_the_model_is_named(tmp_path: Path, random_policy: Path) -> None:
    prompts = [make_prompt("math", [("user", "word " * 300)], answer="1", source="book")]
    with pytest.raises(RequestError, match=r"\(book\) has \d+ tokens, and generation\.max_model_len is 256"):
        generate(Work(random_policy, _settings(), 0, 0), prompts, tmp_path / "g", FakeEngine)


@pytest.fixture(scope="module")
def real_rollouts(tmp_path_factory: pytest.TempPathFactory, random_policy: Path, oapl: Oapl) -> Path:
    """Rollouts that the real engine made at temperature 0.7, through the command line."""
    folder = tmp_path_factory.mktemp("real")
    lines = [{"task": "math", "prompt": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(6)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = [
        "--policy",
        random_policy,
        "--prompts",
        folder / "prompts.jsonl",
        "--out",
        folder / "out",
        "--samples",
        "4",
    ]
    more = [
        "--temperature",
        "0.7",
        "--max-tokens",
        "12",
        "--round",
        "2",
        "--seed",
        "5",
        "--set",
        "generation.dtype=float32",
    ]
    small = [
        "--set",
        "generation.max_model_len=128",
        "--set",
        "generation.enforce_eager=true",
        "--set",
        "generation.max_num_seqs=16",
    ]
    done = oapl("generate", *words, *more, *small)
    assert done.returncode == 0, done.stderr
    assert "24 completions in 6 groups" in done.stdout
    return folder / "out"


def test_the_engines_log_probabilities_are_those_of_the_model(real_rollouts: Path, random_policy: Path) -> None:
    """Stored log-probabilities against a plain forward pass of transformers at the same temperature."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(random_policy, dtype=torch.float64)
    rows = pl.read_parquet(real_rollouts / "part-*.parquet")
    assert len(rows) == 24
    for row in rows.iter_rows(named=True):
        ids = torch.tensor([row["prompt_tokens"] + row["completion_tokens"]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(row["prompt_tokens"]) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1)[torch.arange(len(logits)), ids[0, len(row["prompt_tokens"]) :]]
        assert torch.tensor(row["logprobs"], dtype=torch.float64) == pytest.approx(expected, abs=2e-4)
        ended = row["completion_tokens"][-1] == model.config.eos_token_id
        assert row["finish_reason"] == ("stop" if ended else "length")
        assert len(row["completion_tokens"]) <= 12


def test_samples_of_a_group_differ_and_the_file_says_where_it_comes_from(real_rollouts: Path) -> None:
    rows = pl.read_parquet(real_rollouts / "part-*.parquet")
    assert all(group["completion"].n_unique() > 1 for _, group in rows.group_by("prompt_id"))
    manifest = read_manifest(real_rollouts)
    assert manifest.provenance.engine == "vllm"
    assert manifest.provenance.sampling["temperature"] == 0.7
    assert manifest.provenance.round == 2
    assert (real_rollouts / "prompts.parquet").exists()


def test_what_vllm_refuses_is_one_line(tmp_path: Path, random_policy: Path, oapl: Oapl) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"task": "math", "prompt": "What is 1 + 1?", "answer": "2"}))
    words = ["--policy", random_policy, "--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "out"]
    done = oapl("generate", *words, "--set", "generation.max_model_len=100000")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        f"oapl: vLLM refuses {random_policy} with these settings: User-specified max_model_len (100000)"
    )
    assert "Traceback" not in done.stderr
