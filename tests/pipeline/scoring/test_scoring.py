"""A round judged: verdicts joined to rollouts, resumed after a stop, judged again by another version."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import polars
import pytest

from pipeline.errors import RequestError
from pipeline.prompts.files import make_prompt, write_prompts
from pipeline.recipe import Verification
from pipeline.rollouts.schema import VERDICTS, Rollout
from pipeline.rollouts.store import Provenance, RolloutWriter, iter_batches
from pipeline.scoring import score as scoring
from pipeline.scoring.canaries import CANARIES
from pipeline.verifiers import VERIFIERS

SETTINGS = Verification(workers=2)
SAMPLES = 4


def provenance() -> Provenance:
    return Provenance(
        snapshot_id="start", snapshot_sha256="0", snapshot_step=0, round=0,
        sampling={"samples": SAMPLES, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 8},
        logprobs_mode="processed_logprobs", engine="test", engine_version="0", tokenizer_sha256="0",
        chat_template_sha256="0", code_version="0", prompts_sha256="0",
    )  # fmt: skip


def make_round(root: Path, prompts: int = 20, pause_s: float = 0) -> tuple[Path, Path, dict[str, str]]:
    """A round of math and code, whose programs take `pause_s`; returns (rollouts, prompts, each rollout's status)."""
    pause = f"import time\ntime.sleep({pause_s})\n" if pause_s else ""
    expected, made = {}, []
    with RolloutWriter(root / "rollouts", provenance(), samples=SAMPLES, shard_rows=16) as writer:
        for number in range(prompts):
            answer = f"{number}/7"
            if number % 2:
                prompt = make_prompt("math", [("user", f"{number} : 7?")], answer=answer, source="test")
            else:
                tests = json.dumps({"inputs": ["1\n", "5\n"], "outputs": [str(1 + number), str(5 + number)]})
                prompt = make_prompt("code", [("user", f"Add {number}.")], tests=tests, source="test")
            made.append(prompt)
            group = []
            for sample in range(SAMPLES):
                added = number + sample % 2
                program = f"```\n{pause}print(int(input()) + {added})\n```"
                text = rf"\boxed{{\frac{{{added}}}{{7}}}}" if number % 2 else program
                text = "I can't." if sample == 3 and number % 2 else text
                rollout_id = f"{number:08x}{sample:08x}"
                expected[rollout_id] = "no_answer" if text == "I can't." else ("wrong" if sample % 2 else "correct")
                group.append(
                    Rollout(rollout_id, 0, "start", 0, prompt.prompt_id, sample, [1], [2], [-0.5], text, "stop", sample)
                )
            writer.add_group(group)
    write_prompts(root / "prompts.parquet", made)
    return root / "rollouts", root / "prompts.parquet", expected


def test_every_rollout_gets_its_verdict_beside_it(tmp_path: Path) -> None:
    rollouts, prompts, expected = make_round(tmp_path)
    seen: list[tuple[int, int]] = []
    summary = scoring.score(rollouts, prompts, tmp_path / "v", SETTINGS, lambda *counts: seen.append(counts))
    joined = polars.read_parquet(rollouts / "*.parquet").join(
        polars.read_parquet(tmp_path / "v" / "*.parquet"), on="rollout_id"
    )
    assert dict(joined.select("rollout_id", "status").rows()) == expected
    assert joined.height == len(expected) == summary.rows == seen[-1][0]
    assert summary.statuses == {"correct": 40, "wrong": 30, "no_answer": 10}
    assert summary.reward_mean == pytest.approx(0.5)
    assert summary.isolation == {"none": 40, "bubblewrap": 40}
    assert summary.versions == {name: VERIFIERS[name].version() for name in ("math", "code")}
    assert (summary.canaries, summary.flipped_canaries, summary.problems()) == (len(CANARIES), [], [])
    stored = [name for batch in iter_batches(rollouts, ["rollout_id"]) for name in batch[0].to_pylist()]
    for path in (tmp_path / "v").glob("*.parquet"):
        assert polars.read_parquet_schema(path).names() == VERDICTS.names
        # In the rollouts' order, so that two versions can be read side by side.
        ids = polars.read_parquet(path)["rollout_id"].to_list()
        assert ids == [name for name in stored if name in set(ids)]
    some = list(expected)[:5]
    assert {k: status for k, (status, _) in scoring.verdicts_of(tmp_path / "v", some).items()} == {
        name: expected[name] for name in some
    }


class Stopped(Exception):
    pass


def stop_after(count: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= count:
            raise Stopped

    return progress


def test_a_stopped_judging_goes_on_and_a_finished_one_is_not_done_again(tmp_path: Path) -> None:
    rollouts, prompts, expected = make_round(tmp_path)
    with pytest.raises(Stopped):
        scoring.score(rollouts, prompts, tmp_path / "v", SETTINGS, stop_after(30))
    assert list((tmp_path / "v").glob("*.parquet")) == []
    with (tmp_path / "v" / ".scoring.spool").open("ab") as spool:
        spool.write(b'31 {"torn')
    judged: list[int] = []
    summary = scoring.score(rollouts, prompts, tmp_path / "v", SETTINGS, lambda done, _: judged.append(done))
    assert judged[0] > 30
    assert judged[-1] == len(expected)
    found = {
        row["rollout_id"]: row["status"] for batch in scoring.read_verdicts(tmp_path / "v") for row in batch.to_pylist()
    }
    assert found == expected
    again = scoring.score(rollouts, prompts, tmp_path / "v", SETTINGS, stop_after(0))
    assert again == summary == scoring.read_summary(tmp_path / "v")


def test_a_new_version_writes_beside_the_old_and_reports_what_flipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new code verifier is stricter: it has a time limit that nothing meets."""
    rollouts, prompts, _ = make_round(tmp_path, prompts=4, pause_s=0.3)
    scoring.score(rollouts, prompts, tmp_path / "v", SETTINGS)
    before = {path.name: path.read_bytes() for path in (tmp_path / "v").glob("*.parquet")}
    old = VERIFIERS["code"].version()
    monkeypatch.setitem(VERIFIERS, "code", replace(VERIFIERS["code"], version=lambda: "2+stricter"))
    scoring.find_verifier.cache_clear()
    try:
        summary = scoring.score(rollouts, prompts, tmp_path / "v", SETTINGS.model_copy(update={"code_timeout_s": 1e-6}))
        [flips] = summary.flips
        assert (flips.verifier, flips.old_version, flips.new_version) == ("code", old, "2+stricter")
        assert (flips.compared, flips.flipped) == (8, 8)
        assert flips.examples[0]["old"] == "correct"
        assert flips.examples[0]["new"] == "timeout"
        # Canaries flip with it, and so many timeouts are a problem of their own.
        # Which of the canaries, that take next to no time, is a matter of luck.
        assert [line for line in summary.problems() if "canary-code" in line and "timeout instead of correct" in line]
        assert [line for line in summary.problems() if "neither right nor wrong: 8 timeout" in line]
    finally:
        scoring.find_verifier.cache_clear()
    assert {name: (tmp_path / "v" / name).read_bytes() for name in before if name.startswith("code")} == {
        name: data for name, data in before.items() if name.startswith("code")
    }
    assert len(list((tmp_path / "v").glob("code-*.parquet"))) == 2

    def of_code(version: str | None) -> set[str]:
        rows = (row for batch in scoring.read_verdicts(tmp_path / "v", version) for row in batch.to_pylist())
        return {row["verifier_version"] for row in rows if row["verifier"] == "code"}

    assert of_code(None) == {"2+stricter"}
    assert of_code(old) == {old}
    with pytest.raises(RequestError, match="no verdicts of verifier version"):
        list(scoring.read_verdicts(tmp_path / "v", "nonesuch"))


def test_a_rollout_without_its_prompt_is_named(tmp_path: Path) -> None:
    rollouts, _, _ = make_round(tmp_path)
    write_prompts(tmp_path / "other.parquet", [make_prompt("math", [("user", "1?")], answer="1")])
    with pytest.raises(RequestError, match=r"no prompt '[0-9a-f]{16}', which a rollout answers"):
        scoring.score(rollouts, tmp_path / "other.parquet", tmp_path / "v", SETTINGS)
    with pytest.raises(RequestError, match="no verdicts here"):
        list(scoring.read_verdicts(tmp_path / "nothing"))
