from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rollout_data import dataset, group, groups, verdict, write
from typer.testing import CliRunner, Result

from pipeline.cli.rollouts import app
from pipeline.errors import RequestError
from pipeline.rollouts.locate import locate
from pipeline.rollouts.store import read_manifest


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "140"})


def said(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def test_inspect_prints_numbers_provenance_and_samples(tmp_path: Path) -> None:
    dataset(tmp_path, count=20)
    text = said("inspect", tmp_path, "--samples", "20")
    manifest = read_manifest(tmp_path)
    verdicts = [verdict(number, rollout) for number, rows in enumerate(groups(20)) for rollout in rows]
    rewards = [v["reward"] for v in verdicts if v["reward"] is not None]
    for piece in (
        "80 in 20 groups of 4, of 20 prompts",
        f"{manifest.tokens:,} sampled",
        f"mean {sum(rewards) / len(rewards):.3f} over {len(rewards)} scored",
        manifest.digest,
        "sampling",
        "temperature 1.0",
        "question 13",
        "reference: 13",
    ):
        assert piece in text, piece
    for number in (2, 3):
        for rollout in group(number):
            assert f"{rollout.sample}: {verdict(number, rollout)['status']}" in text
    assert "question" not in said("inspect", tmp_path, "--samples", "0")


def test_inspect_as_json_has_the_numbers(tmp_path: Path) -> None:
    dataset(tmp_path, count=20)
    numbers = json.loads(said("inspect", tmp_path, "--json"))
    rollouts = [rollout for rows in groups(20) for rollout in rows]
    verdicts = [verdict(number, rollout) for number, rows in enumerate(groups(20)) for rollout in rows]
    statuses = [v["status"] for v in verdicts]
    assert numbers["statuses"] == {status: statuses.count(status) for status in sorted(set(statuses))}
    reasons = [rollout.finish_reason for rollout in rollouts]
    assert numbers["finish_reasons"] == {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    lengths = sorted(len(rollout.completion_tokens) for rollout in rollouts)
    assert numbers["tokens"] == sum(lengths) and numbers["lengths"]["max"] == lengths[-1]
    assert numbers["lengths"]["p50"] == pytest.approx(lengths[len(lengths) // 2], rel=0.1)
    every = [value for rollout in rollouts for value in rollout.logprobs or []]
    assert numbers["logprob_mean"] == pytest.approx(sum(every) / len(every), rel=1e-5)
    # Prompts 0, 1 of four are uniform by design; the others are where all that is scorable agrees.
    uniform = sum(len({v["reward"] for v in verdicts[4 * n : 4 * n + 4]} - {None}) == 1 for n in range(20))
    assert (numbers["uniform_groups"], numbers["judged_groups"]) == (uniform, 20)
    assert numbers["tasks"] == {"code": 7, "math": 13}
    assert numbers["provenance"]["engine"] == "fake"


def test_a_dataset_that_was_not_scored_is_shown_as_such(tmp_path: Path) -> None:
    write(tmp_path, count=3)
    text = said("inspect", tmp_path)
    assert "unjudged" in text and "scored" not in text


def test_hostile_text_does_not_steer_the_terminal(tmp_path: Path) -> None:
    from dataclasses import replace

    from rollout_data import provenance

    from pipeline.rollouts.store import RolloutWriter

    with RolloutWriter(tmp_path, provenance(), samples=4) as writer:
        writer.add_group([replace(row, completion="\x1b]0;owned\x07[bold]x[/nothing]") for row in group(0)])
    text = said("inspect", tmp_path)
    assert "\x1b]0" not in text and "\x07" not in text and "[bold]x[/nothing]" in text


def test_validate_says_sound_or_names_shard_and_row_group(tmp_path: Path) -> None:
    place = dataset(tmp_path, count=20)
    assert "sound; 80 rollouts in 5 shards (texts not compared: no tokenizer at hand)" in said("validate", tmp_path)
    path = place.rollouts / "part-00002.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 2
    path.write_bytes(data)
    result = run("validate", tmp_path)
    assert result.exit_code == 1
    assert "part-00002.parquet: its checksum is not the manifest's" in result.output


def test_export_push_import_and_cut_in_a_row(tmp_path: Path) -> None:
    dataset(tmp_path / "a", count=20)
    assert "80 rollouts in 20 groups" in said("export", tmp_path / "a", "--out", tmp_path / "b", "--license", "mit")
    said("push", tmp_path / "b", "--to", tmp_path / "c")
    assert "80 rollouts, verified" in said("import", tmp_path / "c", "--out", tmp_path / "d")
    said("filter", tmp_path / "d", "--min-pass-rate", "0.1", "--max-pass-rate", "0.9", "--out", tmp_path / "e")
    assert 0 < read_manifest(tmp_path / "e/rollouts").groups < 20
    said("filter", tmp_path / "d", "--drop-uniform", "--task", "math", "--where", "tokens > 1", "--out", tmp_path / "f")
    said("merge", tmp_path / "e", tmp_path / "d", "--out", tmp_path / "g")
    assert read_manifest(tmp_path / "g/rollouts").groups == 20
    said("dedupe", tmp_path / "g", "--out", tmp_path / "h", "--by", "completion")
    said("split", tmp_path / "g", "--heldout", "0.2", "--out", tmp_path / "i")
    assert read_manifest(tmp_path / "i/heldout/rollouts").groups == 4
    said("export", tmp_path / "g", "--format", "jsonl", "--out", tmp_path / "j.jsonl")
    assert len((tmp_path / "j.jsonl").read_text().splitlines()) == 80
    said("import", tmp_path / "j.jsonl", "--format", "jsonl", "--out", tmp_path / "k")
    for folder in ("e", "f", "g", "h", "i/train", "i/heldout", "k"):
        assert "sound" in said("validate", tmp_path / folder)
    assert "20 of 20 groups" in said("browse", tmp_path / "g", "--out", tmp_path / "page.html")


def test_a_round_of_a_run_is_chosen_by_its_number(tmp_path: Path) -> None:
    for number, count in ((0, 3), (1, 5)):
        write(tmp_path / "rollouts" / f"round={number:04d}", count=count, round=number)
    assert "12 in 3 groups" in said("inspect", tmp_path, "--round", "0")
    assert "20 in 5 groups" in said("inspect", tmp_path)
    assert isinstance(run("inspect", tmp_path, "--round", "9").exception, RequestError)
    assert locate(tmp_path).round == 1


def test_the_commands_are_there_before_anything_heavy_is_loaded() -> None:
    code = """
import sys
from pipeline.cli.rollouts import app
heavy = {"torch", "polars", "pyarrow", "transformers", "fsspec", "numpy"} & set(sys.modules)
print(sorted(heavy), sorted(command.name or command.callback.__name__ for command in app.registered_commands))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    verbs = ["browse", "dedupe", "export", "filter", "import", "inspect", "merge", "push", "split", "validate"]
    assert result.stdout.strip() == f"[] {verbs}"
