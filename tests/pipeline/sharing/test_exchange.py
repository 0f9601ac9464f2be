from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rollout_data import dataset, group, groups, verdict

from pipeline.errors import RequestError
from pipeline.rollouts.locate import locate
from pipeline.rollouts.store import iter_batches, read_manifest
from pipeline.rollouts.validate import validate
from pipeline.sharing.exchange.exporting import export_foreign
from pipeline.sharing.exchange.importing import import_foreign
from pipeline.sharing.exchange.official import OFFICIAL
from pipeline.sharing.package import export_dataset, import_dataset


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of single characters with a chat template, as a policy's folder has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {"<unk>": 0, "<|user|>": 1, "<|assistant|>": 2}
    letters |= {chr(code): len(letters) + code - 32 for code in range(32, 127)} | {"\n": 200}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    marks = ["<|user|>", "<|assistant|>"]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", additional_special_tokens=marks)
    fast.chat_template = (
        "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    folder = tmp_path_factory.mktemp("policy")
    fast.save_pretrained(folder)
    return folder


def official_rows() -> list[dict[str, Any]]:
    """As the official generator writes them: a row a response, code called "math", a prompt that occurs twice."""
    rows = []
    for index, (text, truth) in enumerate(
        [("2+2?", "4"), ("Sort.", '{"inputs": ["2 1"], "outputs": ["1 2"]}'), ("3+3?", "6"), ("2+2?", "4")]
    ):
        rewards = [float((index + sample) % 2) for sample in range(3)]
        for sample, reward in enumerate(rewards):
            rows.append(
                {
                    "data_source": "data/train.parquet",
                    "prompt": [{"role": "user", "content": text}],
                    "ability": "math",
                    "reward_model": {"style": "rule", "ground_truth": truth},
                    "extra_info": {"split": "train", "index": 7 * index},
                    "response": f"answer {sample} of {text} is {index}",
                    "precomputed_reward": reward,
                    "response_rewards": rewards,
                }
            )
    return rows


def test_official_columns_survive_a_round_trip(tmp_path: Path, policy: Path) -> None:
    rows = official_rows()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    import_foreign(tmp_path / "train.parquet", tmp_path / "in", "official", tokenizer=policy)
    # Also over a shared copy: what our columns have no place for travels beside them.
    export_dataset(locate(tmp_path / "in"), tmp_path / "shared")
    import_dataset(str(tmp_path / "shared"), tmp_path / "back")
    assert export_foreign(locate(tmp_path / "back"), tmp_path / "out.parquet", "official") == 12
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.equals(OFFICIAL)
    found = sorted(table.to_pylist(), key=lambda row: (row["extra_info"]["index"], row["response"]))
    assert found == rows


def test_what_was_tokenised_again_is_marked_and_has_no_logprobs(tmp_path: Path, policy: Path) -> None:
    pq.write_table(pa.Table.from_pylist(official_rows()), tmp_path / "train.parquet")
    import_foreign(tmp_path / "train.parquet", tmp_path / "in", "official", tokenizer=policy)
    place = locate(tmp_path / "in")
    assert list(validate(place)) == []
    manifest = read_manifest(place.rollouts)
    assert (manifest.groups, manifest.rows, manifest.provenance.logprobs_mode) == (4, 12, "missing")
    assert manifest.provenance.imported is not None
    assert manifest.provenance.imported["retokenised"] is True
    assert manifest.provenance.imported["format"] == "official"
    rows = [row for batch in iter_batches(place.rollouts) for row in batch.to_pylist()]
    assert all(row["logprobs"] is None for row in rows)
    one = next(row for row in rows if row["completion"] == "answer 1 of 3+3? is 2")
    assert one["completion_tokens"] == [ord(letter) - 29 for letter in one["completion"]]
    assert one["prompt_tokens"] == [1, *(ord(letter) - 29 for letter in "3+3?"), 2]
    card = (tmp_path / "in" / "README.md").read_text()
    assert "**Re-tokenised.**" in card
    assert "**12 completions have no behaviour log-probabilities.** They are recomputed" in card
    assert pq.read_table(place.root / "prompts/prompts.parquet")["task"].to_pylist() == ["math", "code", "math", "math"]


def test_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(official_rows()), tmp_path / "train.parquet")
    with pytest.raises(RequestError, match="has text without token ids; give --tokenizer DIR"):
        import_foreign(tmp_path / "train.parquet", tmp_path / "in", "official", tokenizer=None)
    with pytest.raises(RequestError, match="no tokenizer that can be read"):
        import_foreign(tmp_path / "train.parquet", tmp_path / "in", "official", tokenizer=tmp_path)
    assert not (tmp_path / "in").exists()


@pytest.mark.parametrize(("form", "name"), [("trl", "out.parquet"), ("jsonl", "out.jsonl")])
def test_token_ids_and_logprobs_go_out_and_come_back(tmp_path: Path, form: str, name: str) -> None:
    place = dataset(tmp_path / "source", count=6)
    export_foreign(place, tmp_path / name, form)
    numbers = import_foreign(tmp_path / name, tmp_path / "in", form, tokenizer=None)
    back = locate(tmp_path / "in")
    assert list(validate(back)) == []
    key = ("prompt_tokens", "completion_tokens", "logprobs", "completion", "finish_reason")
    there, here = (
        sorted(
            tuple(map(str, (row[name] for name in key))) for batch in iter_batches(folder) for row in batch.to_pylist()
        )
        for folder in (place.rollouts, back.rollouts)
    )
    assert there == here
    manifest = read_manifest(back.rollouts)
    assert manifest.provenance.imported is not None
    assert manifest.provenance.imported["retokenised"] is False and manifest.provenance.logprobs_mode == "unknown"
    verdicts = [verdict(number, rollout) for number, rows in enumerate(groups(6)) for rollout in rows]
    assert numbers["reward_sum"] == sum(v["reward"] or 0 for v in verdicts)
    assert numbers["scored"] == sum(v["reward"] is not None for v in verdicts)
    assert "Re-tokenised" not in (tmp_path / "in" / "README.md").read_text()


def test_verl_has_a_row_a_prompt(tmp_path: Path, policy: Path) -> None:
    place = dataset(tmp_path / "source", count=6)
    export_foreign(place, tmp_path / "out.parquet", "verl")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.num_rows == 6
    row = next(row for row in table.to_pylist() if row["prompt"][1]["content"] == "question 4")
    assert row["responses"] == [rollout.completion for rollout in group(4)]
    assert row["reward_model"]["ground_truth"] == "4" and row["rewards"] == [1.0] * 4
    import_foreign(tmp_path / "out.parquet", tmp_path / "in", "verl", tokenizer=policy)
    texts = {row for batch in iter_batches(tmp_path / "in" / "rollouts") for row in batch["completion"].to_pylist()}
    assert texts == {rollout.completion for rows in groups(6) for rollout in rows}


BAD = {
    "line 1: 'completion' must be text": {"prompt": "x", "completion": 3},
    "line 1: 'prompt' must be text or a list of messages": {"prompt": 3, "completion": "y"},
    "line 1: 'completion_ids' must be a list of token ids": {"prompt": "x", "completion": "y", "completion_ids": "12"},
    "line 1: 'logprobs' must have one number a token": {
        "prompt": "x",
        "completion": "y",
        "completion_ids": [1, 2],
        "logprobs": [-0.1],
    },
    "line 1: the reward must be a finite number, not 'good'": {"prompt": "x", "completion": "y", "reward": "good"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_rows_are_named(tmp_path: Path, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(BAD[message]) + "\n")
    with pytest.raises(RequestError, match=message):
        import_foreign(tmp_path / "bad.jsonl", tmp_path / "in", "jsonl", tokenizer=None)


def test_a_prompt_in_two_places_and_an_empty_file(tmp_path: Path) -> None:
    row = {"completion": "y", "prompt_ids": [1], "completion_ids": [2], "answer": "1"}
    lines = [json.dumps({**row, "prompt": text}) for text in ("a", "b", "a")]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines))
    with pytest.raises(RequestError, match="stand in two places; sort the file by prompt first"):
        import_foreign(tmp_path / "mixed.jsonl", tmp_path / "in", "jsonl", tokenizer=None)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(RequestError, match="no rows"):
        import_foreign(tmp_path / "empty.jsonl", tmp_path / "in", "jsonl", tokenizer=None)
    (tmp_path / "torn.jsonl").write_text(lines[0] + "\n{")
    with pytest.raises(RequestError, match=r"torn\.jsonl, line 2: not JSON"):
        import_foreign(tmp_path / "torn.jsonl", tmp_path / "in", "jsonl", tokenizer=None)
    with pytest.raises(RequestError, match="no such file"):
        import_foreign(tmp_path / "none.jsonl", tmp_path / "in", "jsonl", tokenizer=None)
