from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rollout_data import dataset, group, groups, prompt, verdict, write, write_verdicts

from pipeline.errors import RequestError
from pipeline.prompts.files import write_prompts
from pipeline.rollouts import store
from pipeline.rollouts.arrow import as_batch
from pipeline.rollouts.locate import locate
from pipeline.rollouts.store import read_manifest
from pipeline.rollouts.validate import decoder, validate
from pipeline.storage import durable


def problems(folder: Path) -> list[str]:
    return [str(problem) for problem in validate(locate(folder))]


def test_a_sound_dataset_has_no_problem(tmp_path: Path) -> None:
    dataset(tmp_path)
    assert problems(tmp_path) == []


def test_every_flipped_byte_is_caught(tmp_path: Path) -> None:
    """Whatever byte of a shard or of the manifest is changed, in whatever way, validation finds it."""
    dataset(tmp_path, count=3)
    dice = random.Random(1)
    for name, positions in (("part-00000.parquet", 600), ("manifest.json", 60)):
        whole = (tmp_path / name).read_bytes()
        for place in dice.sample(range(len(whole)), positions):
            changed = bytearray(whole)
            changed[place] ^= 1 << dice.randrange(8)
            (tmp_path / name).write_bytes(changed)
            if name == "manifest.json":
                # A manifest with a changed space says the same; anything else must not be believed.
                if _same_json(whole, changed):
                    continue
                with pytest.raises(RequestError):
                    problems(tmp_path)
            else:
                found = problems(tmp_path)
                assert any(line.startswith(f"{name}: its checksum is not the manifest's") for line in found), place
        (tmp_path / name).write_bytes(whole)
    assert problems(tmp_path) == []


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def test_a_changed_page_is_named_with_its_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ROW_GROUP_ROWS", 8)
    dataset(tmp_path, count=8, shard_rows=100)
    path = tmp_path / "part-00000.parquet"
    column = pq.read_metadata(path).row_group(2).column(8)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 3] ^= 4
    path.write_bytes(data)
    assert any(
        line.startswith("part-00000.parquet, row group 2") or "row group 2:" in line for line in problems(tmp_path)
    )


def rewrite(folder: Path, rows: list[list[store.Rollout]], metadata: dict[str, str] | None = None) -> None:
    """Replaces the first shard by one with these groups, and the manifest by one that agrees with it."""
    manifest = read_manifest(folder)
    path = folder / manifest.shards[0].file
    batches = [as_batch(group) for group in rows]
    if metadata is None:
        shard = store.write_shard(path, batches, manifest.provenance)
    else:
        pq.write_table(pa.Table.from_batches(batches).replace_schema_metadata(metadata), path)
        sizes = {"bytes": path.stat().st_size, "sha256": durable.sha256_file(path)}
        shard = replace(manifest.shards[0], **sizes)
    shards = [shard, *manifest.shards[1:]]
    totals = {name: sum(getattr(s, name) for s in shards) for name in ("rows", "groups", "tokens")}
    manifest.model_copy(update={"shards": shards, **totals}).sealed().save(folder)


def base(folder: Path) -> list[list[store.Rollout]]:
    """A dataset of two shards, and the groups of the first one."""
    dataset(folder, count=6, shard_rows=12)
    first = set(pq.read_table(folder / "part-00000.parquet")["prompt_id"].to_pylist())
    return [rows for rows in groups(6) if rows[0].prompt_id in first]


BREAKS = {
    r"part-00000\.parquet, row group 0: prompt \w+: 3 rows where each group has 4": lambda g: [g[0][:3], *g[1:]],
    r"row group 0: prompt \w+: a sample number twice": lambda g: [[*g[0][:3], replace(g[0][3], sample=0)], *g[1:]],
    r"row group 0: prompt \w+: log-probabilities and completion tokens of different lengths": lambda g: [
        [*g[0][:3], replace(g[0][3], completion_tokens=[*g[0][3].completion_tokens, 5])],
        *g[1:],
    ],
    r"row group 0: prompt \w+: a log-probability above zero \(0\.25\)": lambda g: [
        [*g[0][:3], replace(g[0][3], logprobs=[0.25] * len(g[0][3].logprobs))],
        *g[1:],
    ],
    r"row group 0: finish_reason 'tired' is none of": lambda g: [
        [replace(r, finish_reason="tired") for r in g[0]],
        *g[1:],
    ],
    r"row group 0: snapshot_id 'other', and the manifest says": lambda g: [
        [replace(r, snapshot_id="other") for r in g[0]],
        *g[1:],
    ],
    r"the group's rows are not together: it has others elsewhere": lambda g: [group(5), *g[1:]],
    r"manifest\.json: 4 rollout_ids occur more than once": lambda g: [group(5), *g[1:]],
    r"prompts\.parquet: 1 prompts of the rollouts are missing, such as": lambda g: [group(99), *g[1:]],
    r"math-1\.0\.parquet: 4 verdicts of rollouts that are not there, such as": lambda g: g[1:],
}


@pytest.mark.parametrize("message", BREAKS)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, message: str) -> None:
    groups_there = base(tmp_path)
    assert group(5)[0].prompt_id not in {rows[0].prompt_id for rows in groups_there}
    rewrite(tmp_path, BREAKS[message](groups_there))
    found = problems(tmp_path)
    assert any(re.search(message, line) for line in found), found


def test_shards_of_another_schema_or_version_are_refused(tmp_path: Path) -> None:
    rows = base(tmp_path)
    rewrite(tmp_path, rows, {"oapl.schema_version": "9"})
    assert problems(tmp_path) == [
        "part-00000.parquet: is of schema version 9, and this program reads 1; install the oapl that wrote it"
    ]
    rewrite(tmp_path, rows, {})
    assert "is of schema version none" in problems(tmp_path)[0]
    table = pq.read_table(tmp_path / "part-00000.parquet").replace_schema_metadata({"oapl.schema_version": "1"})
    pq.write_table(table.drop_columns(["seed"]), tmp_path / "part-00000.parquet")
    assert "part-00000.parquet: has no column 'seed'" in problems(tmp_path)


def test_missing_shards_and_false_counts(tmp_path: Path) -> None:
    write(tmp_path, count=6, shard_rows=12)
    manifest = read_manifest(tmp_path)
    shard = replace(manifest.shards[0], rows=13)
    manifest.model_copy(update={"shards": [shard, manifest.shards[1]]}).sealed().save(tmp_path)
    (tmp_path / "part-00001.parquet").unlink()
    found = problems(tmp_path)
    assert "part-00000.parquet: holds 12 rows, and the manifest says 13" in found
    assert "part-00001.parquet: is in the manifest and missing in the folder" in found
    assert "manifest.json: 24 rows, and its shards add up to 25" in found
    assert any("prompts.parquet: is missing" in line for line in found)


def test_verdicts_with_impossible_values(tmp_path: Path) -> None:
    place = dataset(tmp_path, count=4)
    rows = [verdict(number, rollout) for number in range(4) for rollout in group(number)]
    path = tmp_path / "verdicts" / "math-1.0.parquet"
    for change, message in (
        ({"status": "splendid"}, "math-1.0.parquet, row group 0: status 'splendid' is none of"),
        ({"status": "correct", "reward": None}, "reward is null exactly for bad_reference and refused"),
        ({"status": "correct", "reward": float("nan")}, "a reward that is not finite"),
        ({"rollout_id": rows[1]["rollout_id"]}, "1 rollouts are judged more than once in one file"),
    ):
        write_verdicts(path, [rows[0] | change, *rows[1:]])
        assert any(message in str(problem) for problem in validate(place)), message


def test_text_is_compared_with_the_decoded_tokens(tmp_path: Path) -> None:
    """With the tokenizer at hand; without it the text is not looked at."""
    from tokenizers import Tokenizer, decoders, models

    snapshot = tmp_path / "policy"
    snapshot.mkdir()
    tokenizer = Tokenizer(models.BPE(vocab={chr(code): code for code in range(32, 127)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(snapshot / "tokenizer.json"))
    place = dataset(tmp_path / "data", count=4)
    assert list(validate(place, decoder(place, snapshot))) == []
    manifest = read_manifest(tmp_path / "data")
    rows = list(groups(4))
    changed = [replace(rows[2][0], completion=rows[2][0].completion + "!"), *rows[2][1:]]
    rewrite(tmp_path / "data", [*rows[:2], changed, rows[3]])
    assert len(manifest.shards) == 1
    found = list(map(str, validate(place, decoder(place, snapshot))))
    assert found == [
        f"part-00000.parquet, row group 0: rollout {rows[2][0].rollout_id}: its text is not its decoded tokens"
    ]
    assert problems(tmp_path / "data") == []
    with pytest.raises(RequestError, match=r"no tokenizer\.json here"):
        decoder(place, tmp_path)


def test_a_prompt_twice(tmp_path: Path) -> None:
    dataset(tmp_path, count=4)
    write_prompts(tmp_path / "prompts.parquet", [*map(prompt, range(4)), prompt(0)])
    assert problems(tmp_path) == ["prompts.parquet: 1 prompt_ids occur more than once"]
