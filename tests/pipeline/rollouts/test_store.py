from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rollout_data
from rollout_data import group, groups, provenance, write

from pipeline.errors import RequestError, WorkError
from pipeline.rollouts import store
from pipeline.rollouts.schema import ROLLOUTS
from pipeline.rollouts.store import RolloutWriter, iter_batches, read_manifest
from pipeline.storage import durable


def rows_of(folder: Path) -> dict[str, dict[str, object]]:
    return {row["rollout_id"]: row for batch in iter_batches(folder) for row in batch.to_pylist()}


def test_what_goes_in_comes_out_to_the_bit(tmp_path: Path) -> None:
    write(tmp_path, count=20)
    expected = {rollout.rollout_id: rollout for rows in groups(20) for rollout in rows}
    found = rows_of(tmp_path)
    assert found.keys() == expected.keys()
    for key, rollout in expected.items():
        row = found[key]
        assert np.array_equal(np.float32(row["logprobs"]), np.float32(rollout.logprobs))
        assert {**row, "logprobs": None} == {**rollout.as_row(), "logprobs": None}


def test_rollouts_without_logprobs_and_empty_completions(tmp_path: Path) -> None:
    rows = [replace(rollout, logprobs=None) for rollout in group(0)]
    empty = [replace(rollout, completion_tokens=[], logprobs=[], completion="") for rollout in group(1)]
    with RolloutWriter(tmp_path, provenance(logprobs_mode="missing"), samples=4) as writer:
        writer.add_group(rows)
        writer.add_group(empty)
    found = rows_of(tmp_path)
    assert [found[rollout.rollout_id]["logprobs"] for rollout in rows] == [None] * 4
    assert [found[rollout.rollout_id]["logprobs"] for rollout in empty] == [[]] * 4


def test_the_manifest_counts_what_is_there(tmp_path: Path) -> None:
    manifest = write(tmp_path, count=20, shard_rows=16)
    assert (manifest.rows, manifest.groups, len(manifest.shards)) == (80, 20, 5)
    assert manifest.tokens == sum(len(rollout.completion_tokens) for rows in groups(20) for rollout in rows)
    for shard in manifest.shards:
        assert (tmp_path / shard.file).stat().st_size == shard.bytes
        assert durable.sha256_file(tmp_path / shard.file) == shard.sha256
    assert manifest.digest == manifest.sealed().digest != write(tmp_path / "other", count=19).digest
    rest = {
        name: value for name, value in json.loads((tmp_path / "manifest.json").read_bytes()).items() if name != "digest"
    }
    assert manifest.digest == hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def test_shards_are_sorted_hold_whole_groups_and_say_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "ROW_GROUP_ROWS", 6)
    manifest = write(tmp_path, count=30, shard_rows=40)
    seen: list[str] = []
    for shard in manifest.shards:
        file = pq.ParquetFile(tmp_path / shard.file)
        assert file.num_row_groups > 1
        parts = [file.read_row_group(number)["prompt_id"].to_pylist() for number in range(file.num_row_groups)]
        assert list(chain(*parts)) == sorted(chain(*parts))
        seen += [prompt for part in parts for prompt in set(part)]
        assert file.schema_arrow.metadata[b"oapl.schema_version"] == b"1"
        assert store.Provenance.model_validate_json(file.schema_arrow.metadata[b"oapl.provenance"]) == provenance()
        column = file.metadata.row_group(0).column(8)
        assert column.path_in_schema == "logprobs.list.element"
        assert "BYTE_STREAM_SPLIT" in column.encodings
        assert not column.has_dictionary_page
        assert column.compression == "ZSTD"
    assert len(seen) == len(set(seen)) == 30


@pytest.mark.parametrize("batch_rows", [1, 4, 9, 1000])
def test_batches_hold_whole_groups_in_the_manifests_order(tmp_path: Path, batch_rows: int) -> None:
    write(tmp_path, count=20)
    batches = list(iter_batches(tmp_path, ["sample", "prompt_id"], batch_rows))
    assert all(batch.schema.names == ["sample", "prompt_id"] for batch in batches)
    assert all(batch.num_rows <= max(batch_rows, 4) and batch.num_rows % 4 == 0 for batch in batches)
    assert pa.Table.from_batches(batches)["sample"].to_pylist() == [0, 1, 2, 3] * 20
    everything = pa.concat_tables(pq.read_table(tmp_path / shard.file) for shard in read_manifest(tmp_path).shards)
    assert pa.Table.from_batches(batches)["prompt_id"].to_pylist() == everything["prompt_id"].to_pylist()


def test_batches_have_the_documented_types(tmp_path: Path) -> None:
    write(tmp_path, count=3)
    assert {batch.schema for batch in iter_batches(tmp_path)} == {ROLLOUTS}
    with pytest.raises(RequestError, match="no column 'reward'; they have rollout_id"):
        next(iter_batches(tmp_path, ["reward"]))


def test_resume_goes_on_after_what_is_committed(tmp_path: Path) -> None:
    first = write(tmp_path, count=10, shard_rows=16)
    with RolloutWriter(tmp_path, provenance(), samples=4, shard_rows=16) as writer:
        assert writer.committed == {rows[0].prompt_id for rows in groups(10)}
        with pytest.raises(WorkError, match="has this group already"):
            writer.add_group(group(3))
        for rows in groups(20):
            if rows[0].prompt_id not in writer.committed:
                writer.add_group(rows)
    assert read_manifest(tmp_path).shards[: len(first.shards)] == first.shards
    assert rows_of(tmp_path) == (write(tmp_path / "undisturbed", count=20), rows_of(tmp_path / "undisturbed"))[1]


def test_committed_grows_with_each_shard_and_not_before(tmp_path: Path) -> None:
    with RolloutWriter(tmp_path, provenance(), samples=4, shard_rows=8) as writer:
        writer.add_group(group(0))
        assert writer.committed == set() and read_manifest(tmp_path).rows == 0
        writer.add_group(group(1))  # a full shard: it is written while the next groups come in
        deadline = time.monotonic() + 20
        while read_manifest(tmp_path).rows != 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert read_manifest(tmp_path).rows == 8
        writer.add_group(group(2))
        writer.commit()
        assert len(writer.committed) == 3 and read_manifest(tmp_path).rows == 12


def test_a_writer_whose_shard_failed_takes_nothing_more(tmp_path: Path) -> None:
    """What it could not write is not forgotten, nor written after a gap: it says so each time, and resume mends it."""
    folder, away = tmp_path / "rollouts", tmp_path / "away"
    writer = RolloutWriter(folder, provenance(), samples=4, shard_rows=8)
    writer.add_group(group(0))
    folder.rename(away)
    with pytest.raises(
        WorkError, match=r"the folder is gone; mount or make it again \(0 rows in 0 shards are committed"
    ):
        writer.commit()
    away.rename(folder)
    with pytest.raises(WorkError, match="a shard could not be written before; begin again, and it resumes"):
        writer.commit()
    writer.close()
    assert write(folder, count=2).groups == 2


def test_an_exception_still_commits_the_groups_that_are_whole(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), RolloutWriter(tmp_path, provenance(), samples=4) as writer:
        writer.add_group(group(0))
        raise KeyboardInterrupt
    assert read_manifest(tmp_path).groups == 1


def test_resume_under_other_settings_names_the_difference(tmp_path: Path) -> None:
    write(tmp_path, count=2)
    sampling = provenance().sampling | {"temperature": 0.6}
    with pytest.raises(RequestError, match=r"\(sampling\.temperature: 1\.0 there, 0\.6 now\)"):
        RolloutWriter(tmp_path, provenance(sampling=sampling), samples=4)
    with pytest.raises(RequestError, match=r"snapshot_id: step000000-0badcafe there, other now"):
        RolloutWriter(tmp_path, provenance(snapshot_id="other"), samples=4)
    with pytest.raises(RequestError, match="group size: 4 there, 8 now"):
        RolloutWriter(tmp_path, provenance(), samples=8)
    with RolloutWriter(tmp_path, provenance(code_version="9", recipe=None), samples=4) as writer:
        assert len(writer.committed) == 2


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path; from rollout_data import provenance\n"
        "from pipeline.rollouts.store import RolloutWriter\n"
        "w = RolloutWriter(Path(sys.argv[1]), provenance(), samples=4); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(Path(rollout_data.__file__).parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        with pytest.raises(RequestError, match=rf"another process \(id {child.pid}\) is writing here") as caught:
            RolloutWriter(tmp_path, provenance(), samples=4)
        assert "\n" not in str(caught.value)
        child.kill()
    with RolloutWriter(tmp_path, provenance(), samples=4) as writer:
        writer.add_group(group(0))


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    writer = RolloutWriter(tmp_path, provenance(), samples=4)
    reader, sender = os.pipe()
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:  # stands for an engine's worker that outlives its parent
        os.close(sender)
        os.write(tell, b"x")
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    try:
        os.read(ready, 1)
        writer.close()
        RolloutWriter(tmp_path, provenance(), samples=4).close()
    finally:
        os.close(sender)
        os.waitpid(child, 0)


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    manifest = write(tmp_path, count=4)
    (tmp_path / ".tmp-1-part-00009.parquet").write_bytes(b"half")
    (tmp_path / "part-00009.parquet").write_bytes(b"whole, but not in the manifest")
    (tmp_path / "prompts.parquet").write_bytes(b"not the writer's")
    RolloutWriter(tmp_path, provenance(), samples=4).close()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"manifest.json", ".lock", "prompts.parquet", *(shard.file for shard in manifest.shards)}


def test_foreign_parquet_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "part-00000.parquet").write_bytes(b"somebody's")
    with pytest.raises(RequestError, match=r"holds Parquet files and no manifest\.json; choose another folder"):
        RolloutWriter(tmp_path, provenance(), samples=4)
    assert (tmp_path / "part-00000.parquet").read_bytes() == b"somebody's"


def test_a_shard_that_is_gone_stops_the_resume(tmp_path: Path) -> None:
    manifest = write(tmp_path, count=4)
    (tmp_path / manifest.shards[0].file).unlink()
    with pytest.raises(RequestError, match=r"part-00000\.parquet: not the \d+ bytes of the manifest"):
        RolloutWriter(tmp_path, provenance(), samples=4)
    with pytest.raises(WorkError, match=r"part-00000\.parquet: can't be read"):
        list(iter_batches(tmp_path))


BAD = {
    "3 rows where each group has 4": lambda rows: rows[:3],
    "rows of more than one group": lambda rows: [*rows[:3], group(9)[3]],
    "a sample number twice": lambda rows: [*rows[:3], replace(rows[3], sample=2)],
    "a rollout_id twice": lambda rows: [*rows[:3], replace(rows[3], rollout_id=rows[0].rollout_id)],
    "of different lengths": lambda rows: [*rows[:3], replace(rows[3], logprobs=[*rows[3].logprobs, -1.0])],
    "not finite": lambda rows: [*rows[:3], replace(rows[3], logprobs=[float("nan")] * len(rows[3].logprobs))],
    "above zero": lambda rows: [*rows[:3], replace(rows[3], logprobs=[0.5] * len(rows[3].logprobs))],
    "a negative token id": lambda rows: [*rows[:3], replace(rows[3], prompt_tokens=[-1])],
}


@pytest.mark.parametrize("problem", BAD)
def test_a_group_that_is_not_one_is_refused_and_nothing_of_it_kept(tmp_path: Path, problem: str) -> None:
    with RolloutWriter(tmp_path, provenance(), samples=4) as writer:
        writer.add_group(group(0))
        with pytest.raises(WorkError, match=problem):
            writer.add_group(BAD[problem](group(1)))
    assert read_manifest(tmp_path).groups == 1


def test_manifests_that_cannot_be_trusted_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no manifest\.json here"):
        read_manifest(tmp_path)
    write(tmp_path, count=2)
    text = (tmp_path / "manifest.json").read_text()
    for changed, reason in (
        (text.replace('"version": 1', '"version": 7'), "schema version 7, and this program reads version 1; install"),
        (text.replace('"rows": 8', '"rows": 9'), "digest does not fit"),
        (text.replace('"rows": 8', '"rows": "many"'), "rows: Input should be a valid integer"),
        (text[:100], "can't be read"),
        ("[]", "schema version None"),
    ):
        assert changed != text
        (tmp_path / "manifest.json").write_text(changed)
        with pytest.raises(RequestError, match=reason) as caught:
            read_manifest(tmp_path)
        assert "\n" not in str(caught.value)
