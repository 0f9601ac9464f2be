from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import duckdb
import polars as pl
import pytest
import yaml
from rollout_data import dataset, group, groups, provenance, write

from pipeline.errors import RequestError, WorkError
from pipeline.rollouts.locate import locate
from pipeline.rollouts.store import read_manifest
from pipeline.sharing import package as sharing
from pipeline.sharing.bring import bring
from pipeline.sharing.package import export_dataset, import_dataset, push_dataset


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    export_dataset(
        dataset(tmp_path / "source", count=12), tmp_path / "exported", licence="cc-by-4.0", title="Twelve groups"
    )
    return tmp_path / "exported"


def test_export_and_import_is_equal_to_the_bit(exported: Path, tmp_path: Path) -> None:
    assert import_dataset(str(exported), tmp_path / "back") == 48
    assert tree(tmp_path / "back") == tree(exported)
    export_dataset(locate(tmp_path / "back"), tmp_path / "again", licence="cc-by-4.0", title="Twelve groups")
    assert tree(tmp_path / "again") == tree(exported)
    source = tmp_path / "source"
    for shard in read_manifest(source).shards:
        assert (exported / "rollouts" / shard.file).read_bytes() == (source / shard.file).read_bytes()
    assert read_manifest(exported / "rollouts") == read_manifest(source)


def test_checksums_are_what_sha256sum_checks(exported: Path) -> None:
    result = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=exported, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    listed = {line.split(": ")[0] for line in result.stdout.splitlines()}
    assert listed == set(tree(exported)) - {"SHA256SUMS"}


def test_datasets_loads_every_table(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from datasets import load_dataset

    rows = load_dataset(str(exported), "rollouts", split="train", cache_dir=str(tmp_path / "cache"))
    expected = {r.rollout_id: r for rows_ in groups(12) for r in rows_}
    assert len(rows) == 48
    for row in rows:
        assert row["completion_tokens"] == expected[row["rollout_id"]].completion_tokens
        assert row["logprobs"] == pytest.approx(expected[row["rollout_id"]].logprobs, rel=1e-6)
    prompts = load_dataset(str(exported), "prompts", split="train", cache_dir=str(tmp_path / "cache"))
    assert prompts[0]["messages"][1] == {"role": "user", "content": "question 0"}
    verdicts = load_dataset(str(exported), "verdicts", split="train", cache_dir=str(tmp_path / "cache"))
    assert set(verdicts["rollout_id"]) == expected.keys()


def test_polars_joins_the_tables(exported: Path) -> None:
    rollouts, prompts, verdicts = (
        pl.scan_parquet(exported / name / "*.parquet") for name in ("rollouts", "prompts", "verdicts")
    )
    rows = rollouts.join(verdicts, on="rollout_id").join(prompts, on="prompt_id").collect()
    assert len(rows) == 48
    one = rows.filter(pl.col("rollout_id") == group(3)[1].rollout_id).row(0, named=True)
    assert one["completion_tokens"] == group(3)[1].completion_tokens
    assert one["detail"].endswith("of prompt 3")


def test_duckdb_reads_them(exported: Path) -> None:
    (row,) = duckdb.sql(
        f"""select count(*), sum(len(completion_tokens)), sum(list_sum(logprobs)), count(*) filter (status = 'correct')
        from '{exported}/rollouts/*.parquet' join '{exported}/verdicts/*.parquet' using (rollout_id)
        join '{exported}/prompts/*.parquet' using (prompt_id)"""
    ).fetchall()
    rollouts = [rollout for rows in groups(12) for rollout in rows]
    assert row[:2] == (48, sum(len(rollout.completion_tokens) for rollout in rollouts))
    assert row[2] == pytest.approx(sum(sum(rollout.logprobs) for rollout in rollouts), rel=1e-5)
    assert row[3] > 12


def test_the_card_says_what_was_recorded(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "cc-by-4.0"
    assert [config["config_name"] for config in front["configs"]] == ["rollouts", "prompts", "verdicts"]
    manifest = read_manifest(exported / "rollouts")
    for piece in (
        "# Twelve groups",
        manifest.digest,
        provenance().snapshot_sha256,
        "| sampling.temperature | `1.0` |",
        "name: small",
        "| completions | 48 |",
        f"| completion tokens | {manifest.tokens:,} |",
        "correct ",
        "load_dataset(",
    ):
        assert piece in card, piece
    assert "Re-tokenised" not in card


def test_croissant_lists_each_file_and_column(exported: Path) -> None:
    croissant = json.loads((exported / "croissant.json").read_text())
    files = {f["@id"]: f["sha256"] for f in croissant["distribution"] if f["@type"] == "cr:FileObject"}
    assert files == {n: sharing.durable.sha256_file(exported / n) for n in tree(exported) if n.endswith(".parquet")}
    fields = {field["@id"] for records in croissant["recordSet"] for field in records["field"]}
    assert {"rollouts/logprobs", "prompts/messages", "verdicts/reward"} <= fields


def test_prompts_of_others_stay_behind(tmp_path: Path) -> None:
    """A run's prompt set also holds held-out prompts: only those that were sampled from are shared."""
    place = dataset(tmp_path / "source", count=12)
    write(tmp_path / "few", count=3)
    shutil.copy(place.root / "prompts.parquet", tmp_path / "few" / "prompts.parquet")
    export_dataset(locate(tmp_path / "few"), tmp_path / "out")
    assert len(pl.read_parquet(tmp_path / "out" / "prompts" / "*.parquet")) == 3
    assert not (tmp_path / "out" / "verdicts").exists()


@pytest.mark.parametrize("victim", ["rollouts/part-00001.parquet", "verdicts/math-1.0.parquet", "README.md"])
def test_an_import_that_does_not_verify_leaves_nothing(exported: Path, tmp_path: Path, victim: str) -> None:
    data = bytearray((exported / victim).read_bytes())
    data[len(data) // 2] ^= 1
    (exported / victim).write_bytes(data)
    with pytest.raises(WorkError, match=f"{victim}: its checksum is not the one in SHA256SUMS; nothing was imported"):
        import_dataset(str(exported), tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "source"]


def test_an_import_looks_inside_even_where_the_checksums_agree(exported: Path, tmp_path: Path) -> None:
    """Checksums that were made over damaged data do not make it sound."""
    (exported / "rollouts" / "part-00001.parquet").unlink()
    sharing.write_sums(exported)
    with pytest.raises(WorkError, match=r"does not validate \(part-00001\.parquet: is in the manifest and missing"):
        import_dataset(str(exported), tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "rollouts/../../evil", ".hidden", "a//b", "rollouts/"])
def test_names_that_lead_out_of_the_folder_are_refused(exported: Path, tmp_path: Path, name: str) -> None:
    with (exported / "SHA256SUMS").open("a") as sums:
        sums.write(f"{'0' * 64}  {name}\n")
    with pytest.raises(RequestError, match=r"SHA256SUMS, line \d+: not a checksum and a plain file name"):
        import_dataset(str(exported), tmp_path / "back")


def test_refusals_say_what_to_do(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is not empty; choose another folder"):
        export_dataset(locate(exported), exported)
    with pytest.raises(RequestError, match="no prompts beside the rollouts"):
        write(tmp_path / "bare", count=2)
        export_dataset(locate(tmp_path / "bare"), tmp_path / "out")
    with pytest.raises(RequestError, match="run `oapl rollouts export` first"):
        push_dataset(tmp_path / "source", str(tmp_path / "out"))
    with pytest.raises(RequestError, match=r"not found; give an exported dataset"):
        import_dataset(str(tmp_path / "nowhere"), tmp_path / "out")
    with pytest.raises(RequestError, match="give a folder, an fsspec URL"):
        import_dataset("nosuch://place/there", tmp_path / "out")
    (exported / "README.md").write_text("changed")
    with pytest.raises(WorkError, match=r"README\.md: is not what SHA256SUMS says; export the dataset again"):
        push_dataset(exported, str(tmp_path / "out"))


def test_a_damaged_source_is_not_exported(tmp_path: Path) -> None:
    place = dataset(tmp_path / "source", count=4)
    path = place.rollouts / "part-00000.parquet"
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    with pytest.raises(WorkError, match="its bytes were changed; run `oapl rollouts validate`"):
        export_dataset(place, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def memory() -> Iterator[str]:
    import fsspec

    yield "memory://bucket/data"
    fsspec.filesystem("memory").store.clear()


def test_push_to_a_folder_and_to_a_url(exported: Path, tmp_path: Path, memory: str) -> None:
    assert push_dataset(exported, str(tmp_path / "copy")) == sum(map(len, tree(exported).values()))
    assert tree(tmp_path / "copy") == tree(exported)
    push_dataset(exported, memory)
    import_dataset(memory, tmp_path / "back")
    assert tree(tmp_path / "back") == tree(exported)


def test_a_push_that_breaks_off_cannot_be_imported(
    exported: Path, tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    push_dataset(exported, memory)
    filesystem = type(fsspec.filesystem("memory"))
    real, opened = filesystem.open, list[str]()

    def breaks(self: object, path: str, mode: str = "rb", **rest: object) -> object:
        opened.append(path)
        if len(opened) == 3:
            raise ConnectionError("the line is dead")
        return real(self, path, mode, **rest)

    monkeypatch.setattr(filesystem, "open", breaks)
    with pytest.raises(WorkError, match="the line is dead; check the address and the credentials"):
        push_dataset(exported, memory)
    monkeypatch.undo()
    with pytest.raises(RequestError, match="SHA256SUMS: not found"):
        import_dataset(memory, tmp_path / "back")


def test_a_url_is_located_through_the_verified_cache(
    exported: Path, tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OAPL_CACHE", str(tmp_path / "cache"))
    push_dataset(exported, memory)
    place = bring(memory)
    assert read_manifest(place.rollouts) == read_manifest(exported / "rollouts")
    shard = place.rollouts / "part-00000.parquet"
    before = shard.stat().st_ino
    assert bring(memory).rollouts == place.rollouts
    assert shard.stat().st_ino == before, "an unchanged dataset is not fetched again"
    export_dataset(dataset(tmp_path / "newer", count=5), tmp_path / "newer-exported")
    push_dataset(tmp_path / "newer-exported", memory)
    assert read_manifest(bring(memory).rollouts).groups == 5


def test_what_a_place_may_be(exported: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "small"
    for number in (0, 1, 12):
        write(run / "rollouts" / f"round={number:04d}", count=2, round=number)
    (run / "rollouts" / "round=0013").mkdir()
    (run / "verdicts" / "round=0001").mkdir(parents=True)
    shutil.copy(exported / "prompts" / "prompts.parquet", run / "prompts.parquet")
    assert locate(run).round == 12 and locate(run).rollouts.name == "round=0012"
    first = locate(run, 1)
    assert (first.rollouts, first.verdicts) == (run / "rollouts" / "round=0001", run / "verdicts" / "round=0001")
    assert first.prompts == run / "prompts.parquet" and first.snapshots == run / "snapshots"
    assert locate(exported).rollouts == exported / "rollouts"
    assert locate(tmp_path / "source").prompts == tmp_path / "source" / "prompts.parquet"
    with pytest.raises(RequestError, match="no round 7 here; it has 0, 1, 12"):
        locate(run, 7)
    with pytest.raises(RequestError, match="not a run's rounds; leave --round out"):
        locate(exported, 1)
    with pytest.raises(RequestError, match="no rollouts here"):
        locate(tmp_path)
    with pytest.raises(RequestError, match="no such folder"):
        locate(tmp_path / "nowhere")
