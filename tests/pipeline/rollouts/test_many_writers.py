"""Many writers fill one dataset: whatever is killed, each group is there once."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rollout_data import group, groups, prompt, prompt_name, provenance
from writing_processes import drive, forking, replica, start

from pipeline.errors import RequestError, WorkError
from pipeline.prompts.files import write_prompts
from pipeline.rollouts import ledger
from pipeline.rollouts.ledger import Pace
from pipeline.rollouts.locate import locate
from pipeline.rollouts.shards import ShardWriter
from pipeline.rollouts.store import RolloutWriter, iter_batches, read_manifest, write_shard
from pipeline.rollouts.validate import validate
from pipeline.storage.places import Folder


def column(folder: Path, name: str) -> list[str]:
    return [row for batch in iter_batches(folder, [name]) for row in batch[name].to_pylist()]


def expected_ids(*numbers: int) -> list[str]:
    return sorted(rollout.rollout_id for number in numbers for rollout in group(number))


def shards_there(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*part-*")}


def assert_whole(folder: Path, count: int) -> None:
    """What an undisturbed writer makes, sound, and nothing beside it."""
    write_prompts(folder / "prompts.parquet", (prompt(number) for number in range(count)))
    assert [str(problem) for problem in validate(locate(folder))] == []
    assert sorted(column(folder, "rollout_id")) == expected_ids(*range(count))
    assert shards_there(folder) == {shard.file for shard in read_manifest(folder).shards}
    assert list((folder / "commits").iterdir()) == []


def driver(folder: Path) -> RolloutWriter:
    return RolloutWriter(folder, provenance(), samples=4, shared=True)


def writer(folder: Path, name: str = "a", shard_rows: int = 8) -> ShardWriter:
    return ShardWriter(folder, provenance(), samples=4, writer=name, shard_rows=shard_rows)


def write_groups(folder: Path, name: str, *numbers: int, shard_rows: int = 1000) -> None:
    with writer(folder, name, shard_rows) as one:
        for number in numbers:
            one.add_group(group(number))


def epoch(folder: Path) -> int:
    path = folder / "writers" / "epoch.json"
    return json.loads(path.read_bytes())["number"] if path.exists() else 0


def test_writers_and_drivers_killed_at_random_moments(tmp_path: Path) -> None:
    """Six writers with work in common, of which some are killed; the driver is killed under them, four times."""
    folder, count, dice, context = tmp_path / "rollouts", 100, random.Random(5), forking()
    replicas = []
    for turn in range(5):
        before = epoch(folder)
        leader = start(context, drive, str(folder), count)
        while epoch(folder) == before:
            time.sleep(0.005)
        there = set(column(folder, "prompt_id")) if (folder / "manifest.json").exists() else set()
        missing = [number for number in range(count) if prompt_name(number) not in there]
        assert turn < 4 or missing, "all was there before the last driver: too few groups for this test"
        dice.shuffle(missing)
        shares = [
            list(dict.fromkeys(missing[place::6] + dice.sample(missing, len(missing) // 6))) for place in range(6)
        ]
        own = [start(context, replica, str(folder), f"r{place}", shares[place], 0.004) for place in range(6)]
        replicas += own
        if turn < 4:
            for victim in dice.sample(own, 3):
                time.sleep(dice.uniform(0.02, 0.15))
                victim.kill()
            leader.kill()
            leader.join()
            assert leader.exitcode == -9
    leader.join(120)
    assert leader.exitcode == 0
    for one in replicas:
        one.join(60)
    driver(folder).close()  # adopts and sweeps what the last writers did after the driver was done
    assert_whole(folder, count)


def test_a_record_is_a_proposal_until_the_driver_lists_it(tmp_path: Path) -> None:
    with driver(tmp_path) as leader, writer(tmp_path) as one:
        one.add_group(group(0))
        assert leader.adopt(now=True) == [] and one.recorded == 0
        one.commit()
        assert one.recorded == 1 and prompt_name(0) not in leader.committed and read_manifest(tmp_path).rows == 0
        assert leader.adopt(now=True) == [prompt_name(0)]
        assert prompt_name(0) in leader.committed and read_manifest(tmp_path).rows == 4
        assert leader.adopt(now=True) == []


def test_groups_that_come_twice_are_listed_once(tmp_path: Path) -> None:
    """A replica is thought lost, its groups are made again, and then its record comes after all."""
    with driver(tmp_path) as leader:
        write_groups(tmp_path, "first", 0, 1, 2)
        leader.adopt(now=True)
        write_groups(tmp_path, "some_again", 1, 2, 3, 4)
        write_groups(tmp_path, "all_again", 0, 2)
        assert sorted(leader.adopt(now=True)) == sorted(map(prompt_name, (3, 4)))
        write_groups(tmp_path, "at_once", 5, 6)
        write_groups(tmp_path, "at_once_again", 6, 7)
        assert sorted(leader.adopt(now=True)) == sorted(map(prompt_name, (5, 6, 7)))
        with pytest.raises(WorkError, match="has this group already"):
            leader.add_group(group(3))
        leader.add_group(group(8))
    assert_whole(tmp_path, 9)


def test_a_driver_that_begins_again_adopts_what_lies_there_and_sweeps_the_rest(tmp_path: Path) -> None:
    leader = driver(tmp_path)
    write_groups(tmp_path, "a", 0, 1)
    leader.adopt(now=True)
    write_groups(tmp_path, "a", 2, 3, 4)
    late = writer(tmp_path, "late")
    late.add_group(group(5))
    leader.close()  # as a kill would: what is recorded is not listed
    orphan = tmp_path / "part-000001-dead-01234567-00000.parquet"
    write_shard(orphan, [], provenance())
    for temporary in (tmp_path / f".tmp-7-{orphan.name}", tmp_path / "commits" / ".tmp-7-000001-dead-01234567.json"):
        temporary.write_bytes(b"half")
    assert read_manifest(tmp_path).groups == 2
    with driver(tmp_path) as leader:
        assert leader.committed == set(map(prompt_name, range(5)))
        with pytest.raises(WorkError, match=r"a newer driver has taken over \(its epoch is 2, this writer's 1\)"):
            late.commit()
        late.close()
        write_groups(tmp_path, "b", 5)
    # The one that was refused may have left its shard; the next driver sweeps it.
    driver(tmp_path).close()
    assert_whole(tmp_path, 6)


def test_many_records_are_taken_in_by_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "RECORDS_AT_ONCE", 2)
    with driver(tmp_path) as leader:
        for number in range(5):
            write_groups(tmp_path, "a", number)
        assert sorted(leader.adopt(now=True)) == sorted(map(prompt_name, range(5)))
    assert_whole(tmp_path, 5)


def test_a_record_that_comes_after_its_shard_was_swept_is_dropped(tmp_path: Path) -> None:
    """The writer asked, a new driver began and swept the shard, and only then the record was written."""
    with driver(tmp_path):
        write_groups(tmp_path, "slow", 0)
        (path,) = (tmp_path / "commits").iterdir()
        record = path.read_bytes()
        path.unlink()
    with driver(tmp_path) as leader:
        path.write_bytes(record)
        assert leader.adopt(now=True) == []
        write_groups(tmp_path, "b", 0)
    assert_whole(tmp_path, 1)


def test_a_shared_folder_goes_on_with_one_writer_and_back(tmp_path: Path) -> None:
    with driver(tmp_path):
        write_groups(tmp_path, "a", 0, 1)
    with RolloutWriter(tmp_path, provenance(), samples=4) as alone:
        assert alone.committed == {prompt_name(0), prompt_name(1)}
        alone.add_group(group(2))
    with driver(tmp_path):
        write_groups(tmp_path, "a", 3)
    assert_whole(tmp_path, 4)


def test_what_does_not_belong_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no driver has opened this folder to many writers"):
        writer(tmp_path)
    with driver(tmp_path) as leader:
        with pytest.raises(RequestError, match="of other settings; give this writer the driver's provenance"):
            ShardWriter(tmp_path, provenance(round=1), samples=4, writer="a")
        with pytest.raises(RequestError, match="writer 'a/b': its name may have"):
            writer(tmp_path, "a/b")
        with pytest.raises(RequestError, match="another process"):
            driver(tmp_path)
        with writer(tmp_path) as one:
            one.add_group(group(0))
            with pytest.raises(WorkError, match="has this group already"):
                one.add_group(group(0))
        (path,) = (tmp_path / "commits").iterdir()
        good = path.read_text()
        for changed, reason in (
            ("{", "not the record of a shard; delete it"),
            (good.replace('"identity":"', '"identity":"0'), "its writer had other settings than the dataset"),
            (good.replace('"bytes":', '"bytes":1'), r"parquet: has \d+ bytes and not 1\d+; delete it and"),
        ):
            assert changed != good
            path.write_text(changed)
            with pytest.raises(WorkError, match=reason) as caught:
                leader.adopt(now=True)
            assert "\n" not in str(caught.value)
        path.write_text(good)
    assert_whole(tmp_path, 1)


def test_the_manifest_is_written_seldom_and_ends_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where writing it takes 30 ms, eighty shards that come within a second cause a few writes, not eighty."""
    written = []
    real = Folder.replace

    def slow(self: Folder, name: str, data: bytes, seen: str | None) -> str | None:
        time.sleep(0.03)
        written.append(name)
        return real(self, name, data, seen)

    monkeypatch.setattr(Folder, "replace", slow)
    began = time.monotonic()
    with RolloutWriter(tmp_path, provenance(), samples=4, shard_rows=4) as one:
        for rows in groups(80):
            one.add_group(rows)
    seconds = time.monotonic() - began
    assert len(read_manifest(tmp_path).shards) == 80
    assert len(written) <= 4 + seconds / (20 * 0.03)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The ledger's time, which passes when `now` is changed."""
    made = SimpleNamespace(now=100.0)
    monkeypatch.setattr(ledger, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def test_a_pace_keeps_to_its_share(clock: SimpleNamespace) -> None:
    pace, turns = Pace(0.2), 0
    while clock.now < 110:
        clock.now += 0.001
        if not pace.wait():
            turns += 1
            with pace.spending():
                clock.now += 0.01
    assert 190 < turns <= 200 and pace.spent == pytest.approx(0.01 * turns)


def test_a_pace_is_not_kept_for_ever(clock: SimpleNamespace) -> None:
    pace = Pace(0.05)
    with pace.spending():
        clock.now += 30  # a store that did not answer
    assert pace.wait() == pytest.approx(60)
