from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from rollout_data import STATUS_OF, dataset, group, groups, prompt, prompt_name, provenance, verdict, write_verdicts

from pipeline.errors import RequestError
from pipeline.prompts.files import write_prompts
from pipeline.rollouts.locate import Located, locate
from pipeline.rollouts.store import RolloutWriter, iter_batches, read_manifest
from pipeline.rollouts.validate import validate
from pipeline.sharing.cut import Conditions, dedupe_dataset, filter_dataset, merge_datasets, split_dataset

COUNT = 24


def rows_in(folder: Path) -> set[str]:
    """rollout_ids of a result, which must be sound, and complete in prompts and verdicts."""
    place = locate(folder)
    assert list(validate(place)) == []
    found = {row for batch in iter_batches(place.rollouts, ["rollout_id"]) for row in batch["rollout_id"].to_pylist()}
    assert set(pl.read_parquet(folder / "verdicts" / "*.parquet")["rollout_id"]) == found
    prompts = {row for batch in iter_batches(place.rollouts, ["prompt_id"]) for row in batch["prompt_id"].to_pylist()}
    assert set(pl.read_parquet(folder / "prompts" / "*.parquet")["prompt_id"]) == prompts
    return found


def expected(keep_group: Any = lambda number, verdicts: True, keep_row: Any = None) -> set[str]:
    ids = set()
    for number, rows in enumerate(groups(COUNT)):
        verdicts = [verdict(number, rollout) for rollout in rows]
        if keep_group(number, verdicts):
            ids |= {r.rollout_id for r, v in zip(rows, verdicts, strict=True) if keep_row is None or keep_row(r, v)}
    return ids


def rate(verdicts: list[dict[str, Any]]) -> float:
    known = [v["reward"] for v in verdicts if v["reward"] is not None]
    return sum(known) / len(known)


FILTERS: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "pass rate": (
        {"min_pass_rate": 0.2, "max_pass_rate": 0.9},
        lambda n, v: 0.2 <= rate(v) <= 0.9,
        None,
    ),
    "uniform groups": ({"drop_uniform": True}, lambda n, v: len({x["reward"] for x in v} - {None}) > 1, None),
    "task": ({"tasks": ("code",)}, lambda n, v: prompt(n).task == "code", None),
    "status, any of the group": (
        {"statuses": ("no_answer",)},
        lambda n, v: any(x["status"] == "no_answer" for x in v),
        None,
    ),
    "length, all of the group": (
        {"min_tokens": 3, "max_tokens": 22, "keep": "all"},
        lambda n, v: all(3 <= len(r.completion_tokens) <= 22 for r in group(n)),
        None,
    ),
    "rows with a status": (
        {"statuses": ("correct", "wrong"), "keep": "rows"},
        lambda n, v: True,
        lambda r, v: v["status"] in ("correct", "wrong"),
    ),
    "SQL": (
        {"where": "reward = 1 AND tokens > 5 AND source = 'source-1'", "keep": "rows"},
        lambda n, v: prompt(n).source == "source-1",
        lambda r, v: v["reward"] == 1 and len(r.completion_tokens) > 5,
    ),
    "SQL on null and pass rate": (
        {"where": "reward IS NULL OR pass_rate = 1", "keep": "any"},
        lambda n, v: rate(v) == 1 or any(x["reward"] is None for x in v),
        None,
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filter_keeps_what_fits(tmp_path: Path, name: str) -> None:
    conditions, keep_group, keep_row = FILTERS[name]
    place = dataset(tmp_path / "source", count=COUNT)
    numbers = filter_dataset(place, tmp_path / "out", Conditions(**conditions), licence="mit")
    wanted = expected(keep_group, keep_row)
    assert 0 < len(wanted) < 4 * COUNT
    assert rows_in(tmp_path / "out") == wanted
    assert numbers["rows"] == len(wanted)


def test_a_result_carries_its_parent(tmp_path: Path) -> None:
    place = dataset(tmp_path / "source", count=COUNT)
    filter_dataset(place, tmp_path / "once", Conditions(tasks=("math",)))
    filter_dataset(locate(tmp_path / "once"), tmp_path / "twice", Conditions(min_pass_rate=0.1))
    (parent,) = read_manifest(tmp_path / "twice" / "rollouts").provenance.parents
    assert (parent["operation"], parent["settings"]["min_pass_rate"]) == ("filter", 0.1)
    assert parent["digest"] == read_manifest(tmp_path / "once" / "rollouts").digest
    (grandparent,) = parent["provenance"]["parents"]
    assert grandparent["settings"] == {"tasks": ["math"], "keep": "any"}
    assert grandparent["digest"] == read_manifest(place.rollouts).digest
    assert grandparent["digest"] in (tmp_path / "twice" / "README.md").read_text()


def test_filters_that_cannot_work_say_why(tmp_path: Path) -> None:
    place = dataset(tmp_path / "source", count=4)
    for conditions, message in (
        (Conditions(min_pass_rate=0.99, max_pass_rate=0.995), "no group is left; loosen the conditions"),
        (Conditions(where="rewards > 1"), "'rewards'|rewards.*columns are rollout_id"),
        (Conditions(where="tokens +"), "--where 'tokens \\+'"),
        (Conditions(where="tokens + 1"), "not a condition on a rollout"),
        (Conditions(statuses=("right",)), "--status right: no such status; there are correct"),
    ):
        with pytest.raises(RequestError, match=message) as caught:
            filter_dataset(place, tmp_path / "out", conditions)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def other_round(folder: Path, count: int, **changes: Any) -> Located:
    """Round 1 of the same run: the same prompts, another snapshot."""
    rows = [group(number, round=1, snapshot_id="step000050-later") for number in range(count)]
    origin = provenance(round=1, snapshot_id="step000050-later", snapshot_step=50, **changes)
    with RolloutWriter(folder, origin, samples=4, shard_rows=16) as writer:
        for one in rows:
            writer.add_group(one)
    write_prompts(folder / "prompts.parquet", (prompt(number) for number in range(count)))
    verdicts = [verdict(number, rollout) for number, one in enumerate(rows) for rollout in one]
    write_verdicts(folder / "verdicts" / "math-1.0.parquet", verdicts)
    return locate(folder)


def test_merge_joins_rounds_and_takes_a_common_group_once(tmp_path: Path) -> None:
    first = dataset(tmp_path / "first", count=10)
    overlap = dataset(tmp_path / "overlap", count=COUNT)
    later = other_round(tmp_path / "later", 5)
    merge_datasets([first, overlap, later], tmp_path / "out")
    later_ids = {row for batch in iter_batches(later.rollouts, ["rollout_id"]) for row in batch[0].to_pylist()}
    assert rows_in(tmp_path / "out") == expected() | later_ids
    manifest = read_manifest(tmp_path / "out" / "rollouts")
    assert (manifest.groups, manifest.samples) == (COUNT + 5, 4)
    origin = manifest.provenance
    assert (origin.snapshot_id, origin.round, origin.engine) == ("several", 1, "fake")
    assert [parent["digest"] for parent in origin.parents] == [
        read_manifest(place.rollouts).digest for place in (first, overlap, later)
    ]


def test_merge_refuses_another_tokenizer_and_other_samples_of_a_group(tmp_path: Path) -> None:
    first = dataset(tmp_path / "first", count=4)
    foreign = other_round(tmp_path / "foreign", 4, tokenizer_sha256="e" * 64)
    with pytest.raises(RequestError, match=r"made with another tokenizer than .*first .eeeeeeeeeeee, not bbbbbbbbbbbb"):
        merge_datasets([first, foreign], tmp_path / "out")
    with RolloutWriter(tmp_path / "other", provenance(), samples=4) as writer:
        writer.add_group([replace(rollout, rollout_id=f"{number:016x}") for number, rollout in enumerate(group(2))])
    with pytest.raises(RequestError, match=f"other samples of prompt {prompt_name(2)} "):
        merge_datasets([first, locate(tmp_path / "other")], tmp_path / "out")
    with pytest.raises(RequestError, match="at least two"):
        merge_datasets([first], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dedupe_by_prompt_keeps_the_newest_policys_group(tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merge_datasets([dataset(tmp_path / "first", count=COUNT), other_round(tmp_path / "later", 5)], merged)
    dedupe_dataset(locate(merged), tmp_path / "out", by="prompt")
    later = {r.rollout_id for n in range(5) for r in group(n, round=1, snapshot_id="step000050-later")}
    assert rows_in(tmp_path / "out") == later | expected(lambda number, verdicts: number >= 5)


def test_dedupe_by_completion_keeps_one_of_equal_rows(tmp_path: Path) -> None:
    with RolloutWriter(tmp_path / "source", provenance(), samples=4) as writer:
        for number in range(3):
            rows = group(number)
            same = {"completion_tokens": rows[0].completion_tokens, "logprobs": rows[0].logprobs}
            writer.add_group([*rows[:2], *(replace(row, **same) for row in rows[2:])])
    write_prompts(tmp_path / "source" / "prompts.parquet", map(prompt, range(3)))
    dedupe_dataset(locate(tmp_path / "source"), tmp_path / "out", by="completion")
    found = {row for batch in iter_batches(tmp_path / "out" / "rollouts") for row in batch["rollout_id"].to_pylist()}
    assert found == {row.rollout_id for number in range(3) for row in group(number)[:2]}
    assert read_manifest(tmp_path / "out" / "rollouts").samples is None


def test_split_keeps_each_text_on_one_side(tmp_path: Path) -> None:
    place = dataset(tmp_path / "source", count=COUNT)
    # Prompts 0 and 1 ask the same, with other references and ids: they must not be torn apart.
    same = [replace(prompt(number), messages=prompt(0).messages) for number in (0, 1)]
    write_prompts(tmp_path / "source" / "prompts.parquet", [*same, *map(prompt, range(2, COUNT))])
    for seed in range(6):
        numbers = split_dataset(place, tmp_path / f"out{seed}", share=0.25, seed=seed)
        train, heldout = rows_in(tmp_path / f"out{seed}" / "train"), rows_in(tmp_path / f"out{seed}" / "heldout")
        assert train | heldout == expected() and not train & heldout
        assert numbers["train"]["rows"] == len(train)
        texts = [
            set(map(str, pl.read_parquet(tmp_path / f"out{seed}" / name / "prompts/*.parquet")["messages"].to_list()))
            for name in ("train", "heldout")
        ]
        assert not texts[0] & texts[1]
        assert len(texts[1]) == 6
    assert set(pl.read_parquet(tmp_path / "out0" / "heldout" / "prompts/*.parquet")["split"]) == {"heldout"}
    split_dataset(place, tmp_path / "again", share=0.25, seed=0)
    assert rows_in(tmp_path / "again" / "heldout") == rows_in(tmp_path / "out0" / "heldout")
    with pytest.raises(RequestError, match="leaves one side empty; change --heldout"):
        split_dataset(place, tmp_path / "none", share=0.001)


def test_of_several_verifier_versions_the_newest_counts_also_after_cutting_and_sharing(tmp_path: Path) -> None:
    from pipeline.rollouts.tables import STATUS_NAMES, VerdictIndex
    from pipeline.sharing.package import import_dataset

    place = dataset(tmp_path / "source", count=8)
    # "1.10" sorts before "1.0" and "1.9" by name in one way or the other: only the time of writing tells.
    newer = [
        {**verdict(number, rollout), "status": "timeout", "reward": 0.0, "verifier_version": "0.9"}
        for number in range(8)
        for rollout in group(number)
    ]
    path = tmp_path / "source" / "verdicts" / "math-0.9.parquet"
    write_verdicts(path, newer)
    os.utime(path, ns=(2**62, 2**62))
    filter_dataset(place, tmp_path / "cut", Conditions(tasks=("math", "code")))
    import_dataset(str(tmp_path / "cut"), tmp_path / "back")
    for folder in ("source", "cut", "back"):
        index = VerdictIndex(locate(tmp_path / folder).verdicts)
        codes, _ = index.lookup([row.rollout_id for row in group(0)])
        assert set(codes.tolist()) == {3}, folder
    assert STATUS_OF[0] == "correct"
    older = VerdictIndex(locate(tmp_path / "source").verdicts, verdict(0, group(0)[0])["verifier_version"])
    assert STATUS_NAMES[older.lookup([group(0)[0].rollout_id])[0][0]] == "correct"
    with pytest.raises(RequestError, match=r"no verdicts of verifier version '7'; there are .*0\.9"):
        VerdictIndex(locate(tmp_path / "source").verdicts, "7")
