"""The scale benchmark in small: it ends in an error unless each group is in the dataset exactly once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SMALL = {"replicas": 8, "sizes": 800, "paper": 12_000, "samples": 8, "shard-rows": 64, "failures": 0.02, "median": 300}


def test_replicas_that_die_and_straggle_lose_nothing(tmp_path: Path) -> None:
    told = {**SMALL, "deaths": 4, "slow": 0.3, "picture": tmp_path / "scale.png"}
    words = [sys.executable, "-m", "benchmarks.scale", *(f"--{name}={value}" for name, value in told.items())]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lost, again = re.search(r"(\d+) replicas lost, (\d+) groups given to others", done.stdout).groups()  # type: ignore[union-attr]
    assert int(lost) > 0
    assert int(again) > 0
    dead, doubled = re.search(r"(\d+) replicas died; \d+ groups were made again, (\d+) of", done.stdout).groups()  # type: ignore[union-attr]
    assert int(dead) > 0
    assert int(doubled) > 0
    assert "read: 800 rollout_ids, each once" in done.stdout
    assert (tmp_path / "scale.png").stat().st_size > 10_000


def test_engines_are_kept_full_where_a_groups_longest_completion_is_many_times_its_median() -> None:
    """On the simulated clock. Half of what they could make is what comes of giving them groups, and not completions."""
    told = {"sizes": 0, "replicas": 8, "sequences": 32, "paper": 12_000, "median": 300, "deaths": 0, "slow": 0}
    command = [sys.executable, "-m", "benchmarks.scale", *(f"--{name}={value}" for name, value in told.items())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    (share,) = re.search(r"(\d+)% of what they could make", done.stdout).groups()  # type: ignore[union-attr]
    assert int(share) > 65
