"""Rollouts in object storage: a real S3-compatible server, behind a proxy that spoils requests where told to."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
from faulty_proxy import FAULTS, FaultyProxy
from rollout_data import group, groups, prompt, prompt_name, provenance, verdict, write_verdicts
from writing_processes import forking, start, store_processes

from pipeline.errors import OaplError, RequestError, WorkError
from pipeline.prompts.files import write_prompts
from pipeline.rollouts.shards import ShardWriter
from pipeline.rollouts.store import RolloutWriter, iter_batches, read_manifest
from pipeline.rollouts.validate import validate
from pipeline.sharing.bring import bring
from pipeline.storage import objects


def driver(url: str) -> RolloutWriter:
    return RolloutWriter(url, provenance(), samples=4, shared=True)


def write_groups(url: str, name: str, *numbers: int, shard_rows: int = 1000) -> None:
    with ShardWriter(url, provenance(), samples=4, writer=name, shard_rows=shard_rows) as one:
        for number in numbers:
            one.add_group(group(number))


def ids(place: Path) -> list[str]:
    return sorted(row for batch in iter_batches(place, ["rollout_id"]) for row in batch["rollout_id"].to_pylist())


def expected_ids(count: int) -> list[str]:
    return sorted(rollout.rollout_id for rows in groups(count) for rollout in rows)


def assert_whole(url: str, count: int, tmp_path: Path) -> None:
    """The groups 0 to `count`, sound, and nothing beside them."""
    write_prompts(tmp_path / "prompts.parquet", (prompt(number) for number in range(count)))
    place = objects.Objects(url)
    place.write("prompts.parquet", (tmp_path / "prompts.parquet").read_bytes())
    assert [str(problem) for problem in validate(bring(url))] == []
    assert ids(bring(url).rollouts) == expected_ids(count)
    there = {name for name in place.names() if name.startswith("part-")}
    assert there == {shard.file for shard in read_manifest(url).shards}
    assert place.names("commits") == []


def test_many_writers_and_a_driver_that_begins_again(bucket: str, tmp_path: Path) -> None:
    with driver(bucket) as leader:
        write_groups(bucket, "a", 0, 1, 2, 3, shard_rows=8)
        leader.adopt(now=True)
        write_groups(bucket, "b", 3, 4)
        leader.add_group(group(5))
    left = driver(bucket)
    write_groups(bucket, "c", 6)
    left.close()
    with driver(bucket) as leader:
        assert leader.committed == set(map(prompt_name, range(7)))
    assert_whole(bucket, 7, tmp_path)
    with pytest.raises(RequestError, match=r"other settings \(round: 0 there, 1 now\)"):
        RolloutWriter(bucket, provenance(round=1), samples=4)


@pytest.mark.parametrize("url", ["s3", "memory://bucket/two-drivers"])
def test_of_two_drivers_the_newer_one_goes_on(bucket: str, url: str, tmp_path: Path) -> None:
    url = bucket if url == "s3" else url
    old = driver(url)
    write_groups(url, "a", 0)
    old.adopt(now=True)
    write_groups(url, "a", 1)
    late = ShardWriter(url, provenance(), samples=4, writer="late")
    late.add_group(group(2))
    new = driver(url)
    old.add_group(group(3))
    with pytest.raises(WorkError, match=r"another driver has taken this dataset over, and this one stops; .*4 rows"):
        old.commit()
    old.close()
    with pytest.raises(WorkError, match="a newer driver has taken over"):
        late.commit()
    late.close()
    with new:
        write_groups(url, "b", 2, 3)
    driver(url).close()
    assert_whole(url, 4, tmp_path)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("method", "part"),
    [("PUT", "/part-"), ("PUT", "/commits/"), ("PUT", "manifest.json"), ("PUT", "epoch.json"), ("GET", "/commits/")],
)
def test_what_fails_once_is_tried_again(
    bucket: str, proxy: FaultyProxy, tmp_path: Path, fault: str, method: str, part: str
) -> None:
    proxy.spoil_once(fault, method, part)
    with driver(bucket) as leader:
        write_groups(bucket, "a", 0, 1)
        leader.adopt(now=True)
        write_groups(bucket, "b", 2)
    assert [(one[0], one[1]) for one in proxy.spoiled] == [(fault, method)]
    assert_whole(bucket, 3, tmp_path)


@pytest.mark.parametrize("part", ["/part-", "/commits/", "manifest.json"])
@pytest.mark.parametrize("fault", ["500", "cut"])
def test_what_goes_on_failing_ends_in_one_line_and_resumes(
    bucket: str, proxy: FaultyProxy, tmp_path: Path, fault: str, part: str
) -> None:
    with driver(bucket) as leader:
        write_groups(bucket, "a", 0, 1)
        leader.adopt(now=True)
        proxy.fault_of = lambda method, path: fault if method == "PUT" and part in path else None
        with pytest.raises(OaplError, match=f"^{bucket}: .*then run again") as caught:
            write_groups(bucket, "b", 2)
            leader.adopt(now=True)
        assert "\n" not in str(caught.value)
        assert "committed and stay valid" in str(caught.value) or "recorded and stay valid" in str(caught.value)
        assert ids(bring(bucket).rollouts) == expected_ids(2)
        proxy.fault_of = lambda method, path: None
    with driver(bucket) as leader:
        if prompt_name(2) not in leader.committed:
            write_groups(bucket, "b", 2)
    assert_whole(bucket, 3, tmp_path)


def test_what_the_store_refuses_is_said_at_once(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PAUSE_S", 100.0)  # no second try
    for url in ("s3://nobody/rollouts", "nonsense://x/y"):
        with pytest.raises(OaplError, match=url) as caught:
            driver(url)
        assert "\n" not in str(caught.value)
    with pytest.raises(RequestError, match="no driver has opened this folder"):
        write_groups(bucket, "a", 0)
    with pytest.raises(RequestError, match=r"no manifest\.json here"):
        read_manifest(bucket)


def test_writers_and_a_driver_killed_at_random_moments(bucket: str, tmp_path: Path) -> None:
    """As on a disk: each group once, whatever is killed."""
    count, dice, context = 24, random.Random(3), forking()
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    replicas = []
    for turn in range(3):
        place = objects.Objects(bucket)
        before = place.read("writers/epoch.json") if place.sizes(["writers/epoch.json"]) else b""
        leader = start(context, store_processes, environment, "drive", bucket, count)
        while not place.sizes(["writers/epoch.json"]) or place.read("writers/epoch.json") == before:
            time.sleep(0.05)
        shares = [list(range(first, count, 3)) for first in range(3)]
        own = [
            start(context, store_processes, environment, "replica", bucket, f"r{n}", s, 0.02)
            for n, s in enumerate(shares)
        ]
        replicas += own
        if turn < 2:
            time.sleep(dice.uniform(0.3, 1.0))
            own[0].kill()
            leader.kill()
            leader.join()
    leader.join(120)
    assert leader.exitcode == 0
    for one in replicas:
        one.join(60)
    driver(bucket).close()
    assert_whole(bucket, count, tmp_path)


@pytest.fixture
def run_on_s3(bucket: str, tmp_path: Path) -> str:
    """A run's folder with one scored round of 24 groups in six shards."""
    url = f"{bucket}/run"
    with RolloutWriter(f"{url}/rollouts/round=0000", provenance(), samples=4, shard_rows=16) as one:
        for rows in groups(24):
            one.add_group(rows)
    write_prompts(tmp_path / "prompts.parquet", (prompt(number) for number in range(24)))
    write_verdicts(tmp_path / "v.parquet", [verdict(n, r) for n, rows in enumerate(groups(24)) for r in rows])
    place = objects.Objects(url)
    place.write("prompts.parquet", (tmp_path / "prompts.parquet").read_bytes())
    place.write("verdicts/round=0000/math-1.0.parquet", (tmp_path / "v.parquet").read_bytes())
    return url


def test_only_what_is_read_is_fetched(run_on_s3: str, proxy: FaultyProxy) -> None:
    for url in (run_on_s3, f"{run_on_s3}/rollouts/round=0000"):
        place = bring(url)
        assert place.round == 0 and place.prompts is not None and place.verdicts is not None
    assert list(place.rollouts.glob("part-*")) == []
    first = next(iter_batches(place.rollouts, ["prompt_id"]))
    assert first.num_rows == 16
    (one,) = place.rollouts.glob("part-*")
    assert one.name == read_manifest(place.rollouts).shards[0].file
    assert [str(problem) for problem in validate(place)] == []
    asked: list[str] = []
    proxy.fault_of = lambda method, path: asked.append(path)
    assert ids(bring(run_on_s3).rollouts) == expected_ids(24)
    assert not [path for path in asked if "/part-" in path and path.endswith(".parquet")]


def test_a_mirror_follows_what_is_there(run_on_s3: str, tmp_path: Path) -> None:
    place = bring(run_on_s3)
    assert ids(place.rollouts) == expected_ids(24)
    url = f"{run_on_s3}/rollouts/round=0000"
    with RolloutWriter(url, provenance(), samples=4) as one:
        one.add_group(group(24))
    assert ids(bring(run_on_s3).rollouts) == expected_ids(25)
    remote = objects.Objects(url)
    shard = read_manifest(url).shards[-1]
    remote.write(shard.file, b"x" * shard.bytes)
    (place.rollouts / shard.file).unlink()
    with pytest.raises(WorkError, match="its bytes are not those of the manifest; not used"):
        ids(bring(run_on_s3).rollouts)
    remote.delete(remote.names())
    with RolloutWriter(url, provenance(), samples=4) as one:
        one.add_group(group(7))
    (path,) = bring(run_on_s3).rollouts.parent.parent.glob("verdicts/*/*.parquet")
    remote = objects.Objects(run_on_s3)
    remote.write("verdicts/round=0000/math-2.0.parquet", path.read_bytes())
    remote.delete(["verdicts/round=0000/math-1.0.parquet"])
    place = bring(run_on_s3)
    assert len(ids(place.rollouts)) == 4
    assert [path.name for path in (place.verdicts or tmp_path).iterdir()] == ["math-2.0.parquet"]


@pytest.mark.system
def test_two_ranks_learn_from_a_run_on_s3_as_from_a_disk(bucket: str, tmp_path: Path, oapl: Any) -> None:
    from learning_parts import make_policy, read_log, write_dataset
    from transformers import AutoModelForCausalLM

    policy = make_policy(tmp_path / "policies", seed=1)
    model = AutoModelForCausalLM.from_pretrained(policy).double().eval()
    made = write_dataset(tmp_path / "made", policy, model, prompts=8)
    place = objects.Objects(f"{bucket}/made")
    for path in made.place.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            place.write(path.relative_to(made.place).as_posix(), path.read_bytes())
    (tmp_path / "recipe.yaml").write_text(
        "name: small\npolicy: {model: .}\nlearning: {batch_size: 8, ranks: 2, max_logprob_gap: 1, "
        "max_residual_gap: 9, dtype: float32, learning_rate: 1.5e-4}\n"
    )
    logs = []
    for name, rollouts in (("disk", str(made.place)), ("s3", f"{bucket}/made")):
        out = tmp_path / name
        done = oapl(
            "train", "--recipe", tmp_path / "recipe.yaml", "--rollouts", rollouts, "--policy", policy, "--out", out
        )
        assert done.returncode == 0, done.stderr[-3000:]
        logs.append([line["loss"] for line in read_log(out / "learning.jsonl")])
    assert len(logs[0]) > 2 and logs[0] == pytest.approx(logs[1], rel=1e-6)
