"""What is committed survives: SIGKILL, a full disk, a read-only mount, a mount that is gone."""

from __future__ import annotations

import os
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rollout_data
from rollout_data import groups

from pipeline.rollouts.store import iter_batches, read_manifest

PARTS = Path(rollout_data.__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{PARTS.parents[1]}{os.pathsep}{PARTS}"}
PYTHON = shlex.quote(sys.executable)
GENERATE = f"{PYTHON} {shlex.quote(str(PARTS / 'fake_generation.py'))}"


def ids(folder: Path) -> list[str]:
    return [row for batch in iter_batches(folder, ["rollout_id"]) for row in batch["rollout_id"].to_pylist()]


def prompts(folder: Path) -> set[str]:
    return {row for batch in iter_batches(folder, ["prompt_id"]) for row in batch["prompt_id"].to_pylist()}


def undisturbed(count: int) -> list[str]:
    return sorted(rollout.rollout_id for rows in groups(count, tokens=200) for rollout in rows)


def test_killed_at_twenty_random_moments_and_resumed(tmp_path: Path) -> None:
    """No group that was committed is generated again, and the end is what an undisturbed run writes."""
    folder, calls, count = tmp_path / "rollouts", tmp_path / "calls", 400
    command = [sys.executable, str(PARTS / "fake_generation.py"), str(folder), str(calls), str(count)]
    calls.touch()
    dice = random.Random(4)
    killed = 0
    while killed < 20:
        before = calls.stat().st_size
        committed = prompts(folder) if (folder / "manifest.json").exists() else set()
        with subprocess.Popen(command, env=ENVIRONMENT) as child:
            # A line of the log has 17 bytes: most kills fall into the writing, some into the start.
            mark = before + 17 * dice.randrange(0, 24)
            while child.poll() is None and calls.stat().st_size < mark:
                time.sleep(0.0005)
            time.sleep(dice.uniform(0, 0.01))
            child.kill()
        assert child.returncode == -9, "the run ended before it was killed: too few prompts for this test"
        killed += 1
        again = calls.read_bytes()[before:].decode().split("\n")
        assert not committed & set(again)
        if (folder / "manifest.json").exists():
            assert committed <= prompts(folder)
    committed, before = prompts(folder), calls.stat().st_size
    assert 0 < len(committed) < count
    assert subprocess.run(command, env=ENVIRONMENT).returncode == 0
    last = calls.read_bytes()[before:].decode().split()
    assert len(last) == len(set(last)) == count - len(committed)
    assert sorted(ids(folder)) == undisturbed(count)


def in_own_mounts(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a shell script that may mount, in a mount namespace of its own; $1, $2, ... are the arguments."""
    command = ["unshare", "--map-root-user", "--mount", "bash", "-ec", script, "bash", *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)


def test_a_full_disk_loses_nothing_that_was_committed(tmp_path: Path) -> None:
    mount, kept, done, calls = (tmp_path / name for name in ("mount", "kept", "done", "calls"))
    mount.mkdir()
    script = f"""
        mount -t tmpfs -o size=300k tmpfs $1
        status=0; {GENERATE} $1/rollouts $4 60 || status=$?; echo $status
        cp -r $1/rollouts $2; echo ---- >> $4
        mount -o remount,size=20m $1
        {GENERATE} $1/rollouts $4 60
        cp -r $1/rollouts $3
    """
    result = in_own_mounts(script, mount, kept, done, calls)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["1"]
    (line,) = result.stderr.splitlines()
    assert "can't be written: no space left on the disk; free some and run the command again" in line
    manifest = read_manifest(kept)
    assert f"({manifest.rows} rows in {len(manifest.shards)} shards are committed and stay valid)" in line
    assert 0 < manifest.rows < 240
    assert len(set(ids(kept))) == manifest.rows
    _, second = calls.read_text().split("----\n")
    assert len(second.split()) == 60 - manifest.groups
    assert not prompts(kept) & set(second.split())
    assert sorted(ids(done)) == undisturbed(60)


def test_a_read_only_mount_is_refused_in_one_line_and_stays_readable(tmp_path: Path) -> None:
    mount, kept, calls = (tmp_path / name for name in ("mount", "kept", "calls"))
    mount.mkdir()
    script = f"""
        mount -t tmpfs tmpfs $1
        {GENERATE} $1/rollouts $3 10
        mount -o remount,ro $1
        status=0; {GENERATE} $1/rollouts $3 20 || status=$?; echo $status
        status=0; {GENERATE} $1/other $3 20 || status=$?; echo $status
        cp -r $1/rollouts $2
    """
    result = in_own_mounts(script, mount, kept, calls)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["1", "1"]
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert all("can't be written: the file system is mounted read-only" in line for line in lines)
    assert sorted(ids(kept)) == undisturbed(10)


WRITE_AND_CHANGE = """
import os, sys
from pathlib import Path
from rollout_data import group, provenance
from pipeline.errors import WorkError
from pipeline.rollouts.store import RolloutWriter

folder, change = sys.argv[1:]
writer = RolloutWriter(Path(folder), provenance(), samples=4, shard_rows=8)
for number in range(6):
    writer.add_group(group(number))
writer.commit()
os.system(change)
try:
    for number in range(6, 12):
        writer.add_group(group(number))
    writer.commit()
except WorkError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("change", "reason", "entries"),
    [("mount -o remount,ro", "mounted read-only", 5), ("umount -l", "unmounted or replaced?", 0)],
)
def test_a_mount_that_turns_read_only_or_goes_away_while_writing(
    tmp_path: Path, change: str, reason: str, entries: int
) -> None:
    """The next shard fails in one line; nothing is written into the bare mount point."""
    script = f'mount -t tmpfs tmpfs $1; {PYTHON} -c "$2" $1 "$3"; ls -A $1 | wc -l'
    result = in_own_mounts(script, tmp_path, WRITE_AND_CHANGE, f"{change} {tmp_path}")
    assert result.returncode == 0, result.stderr
    line, left = result.stdout.splitlines()
    assert reason in line and "(24 rows in 3 shards are committed and stay valid)" in line
    assert int(left) == entries
