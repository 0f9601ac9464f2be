"""Generation and scoring on a real Ray cluster of two nodes, against the same on one machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import polars as pl
import pytest
import ray_parts
from ray_parts import NotedEngine, add_node, prompts, settings, two_nodes

from pipeline.errors import RequestError, WorkError
from pipeline.generation import cluster as clusters
from pipeline.generation.batch import Work
from pipeline.generation.generate import generate
from pipeline.prompts.files import Prompt, make_prompt, write_prompts
from pipeline.rollouts.store import read_manifest

pytestmark = pytest.mark.system  # a cluster of two nodes takes the better part of a minute to come up and to be used

Oapl = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, random_policy: Path) -> pl.DataFrame:
    """What one engine makes of 60 prompts without a cluster."""
    folder = tmp_path_factory.mktemp("plain")
    work = Work(random_policy, settings(engine="local"), 3, 11)
    generate(work, prompts(60), folder / "out", NotedEngine(folder / "notes"))
    return rows(folder / "out")


def rows(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "part-*.parquet").sort("rollout_id")


class Drawn(list[Prompt]):
    """Prompts that count how many were drawn the last time they were gone through."""

    drawn = 0

    def __iter__(self) -> Iterator[Prompt]:
        for self.drawn, prompt in enumerate(super().__iter__(), 1):
            yield prompt


def test_two_replicas_make_what_one_engine_makes(
    cluster: Any, plain: pl.DataFrame, tmp_path: Path, random_policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engines = NotedEngine(tmp_path / "notes", step_s=0.02, hold_at=60)
    asked = Drawn(prompts(60))
    most: list[int] = []

    def watch() -> None:
        engines.wait_for(2)
        most.append(asked.drawn)
        engines.go()

    watcher = Thread(target=watch)
    watcher.start()
    totals = generate(Work(random_policy, settings(), 3, 11), asked, tmp_path / "ray", engines)
    watcher.join()
    assert (totals.groups, totals.completions, totals.tokens) == (60, 240, 720)
    assert rows(tmp_path / "ray").equals(plain)
    keys = list(engines.asked().values())
    assert len(keys) == 2
    assert len({key for asked_for in keys for key in asked_for}) == sum(map(len, keys)) == 240
    assert most[0] < 50  # prompts are read as replicas take them
    manifest = read_manifest(tmp_path / "ray")
    assert (manifest.rows, manifest.groups, manifest.samples) == (240, 60, 4)
    said = capsys.readouterr().err
    assert f"generate: on Ray cluster at {cluster.address}, 2 nodes" in said
    assert "generate: 240/240 completions" in said

    def never() -> Any:
        raise AssertionError("a replica was started for nothing")

    # Gone on with without the cluster, nothing is left to do.
    assert generate(Work(random_policy, settings(engine="local"), 3, 11), asked, tmp_path / "ray", never).groups == 0


def test_a_wrong_request_is_one_line(
    cluster: Any, tmp_path: Path, random_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = NotedEngine(tmp_path / "notes")
    with pytest.raises(RequestError, match=r"no node of the Ray cluster has 64 CPU for a replica"):
        generate(Work(random_policy, settings(replica_cpus=64), 0, 0), prompts(2), tmp_path / "g", engine)
    monkeypatch.setenv("RAY_ADDRESS", "ray://somewhere:10001")
    with pytest.raises(RequestError, match=r"not sent through Ray's client.*RAY_ADDRESS=auto"), clusters.connected("x"):
        pass
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RequestError, match=r"pip install 'oapl\[ray\]'"), clusters.connected("x"):
        pass


def test_what_a_lost_replica_and_a_lost_node_had_in_flight_is_made_by_others(
    cluster: Any, plain: pl.DataFrame, tmp_path: Path, random_policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engines = NotedEngine(tmp_path / "notes", step_s=0.02, hold_at=60)
    [node] = cluster.worker_nodes

    def disturb() -> None:
        first, *_ = engines.wait_for(2)
        os.kill(first, signal.SIGKILL)
        engines.wait_for(3)
        cluster.remove_node(node, allow_graceful=False)
        # Its replica ends a moment after it: let go before, it might finish what it holds.
        engines.wait_for_living(1)
        engines.go()

    disturber = Thread(target=disturb)
    disturber.start()
    try:
        totals = generate(Work(random_policy, settings(), 3, 11), prompts(60), tmp_path / "ray", engines)
    finally:
        disturber.join()
        add_node(cluster)
    assert totals.groups == 60
    assert rows(tmp_path / "ray").equals(plain)
    asked = Counter(key for keys in engines.asked().values() for key in keys)
    assert asked.keys() == {f"{prompt.prompt_id}/{sample}" for prompt in prompts(60) for sample in range(4)}
    # Two replicas were lost after sixty completions each, of which at most a shard's groups and an engine's were open.
    assert 0 < sum(asked.values()) - 240 <= 2 * (16 + 12)
    assert capsys.readouterr().err.count(" groups are given to others") == 2


def test_a_killed_driver_goes_on_where_it_was(
    cluster: Any, plain: pl.DataFrame, tmp_path: Path, random_policy: Path
) -> None:
    write_prompts(tmp_path / "prompts.parquet", prompts(60))
    before = NotedEngine(tmp_path / "before", hold_at=60)
    words = [random_policy, tmp_path / "prompts.parquet", tmp_path / "ray", before.notes]
    driver = subprocess.Popen([sys.executable, str(Path(ray_parts.__file__)), *map(str, words)])
    try:
        before.wait_for(2)
        deadline = time.monotonic() + 60
        while read_manifest(tmp_path / "ray").groups < 8 and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        driver.kill()
        driver.wait()
    kept = read_manifest(tmp_path / "ray").groups
    assert 8 <= kept < 60
    after = NotedEngine(tmp_path / "after")
    totals = generate(Work(random_policy, settings(), 3, 11), prompts(60), tmp_path / "ray", after)
    assert totals.skipped_groups >= kept
    assert totals.groups == 60 - totals.skipped_groups
    assert sum(map(len, after.asked().values())) == 4 * totals.groups
    assert rows(tmp_path / "ray").equals(plain)


def test_a_straggler_is_relieved_of_its_last_groups(
    cluster: Any, plain: pl.DataFrame, tmp_path: Path, random_policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engines = NotedEngine(tmp_path / "notes", step_s=0.02, first_s=2.0)
    generate(Work(random_policy, settings(), 3, 11), prompts(60), tmp_path / "ray", engines)
    assert rows(tmp_path / "ray").equals(plain)
    assert "stopped (more than 4 times as slow as an idle one)" in capsys.readouterr().err
    slow, fast = sorted(map(len, engines.asked().values()))
    assert slow < 60 < 180 < fast


def test_what_kills_every_replica_ends_the_round_in_one_line(cluster: Any, tmp_path: Path, random_policy: Path) -> None:
    asked = prompts(12)
    engine = NotedEngine(tmp_path / "notes", fails_on=asked[7].prompt_id)
    with pytest.raises(WorkError, match=r"4 replicas were lost one after another, the last one: .*died.*is kept"):
        generate(Work(random_policy, settings(replicas=1), 3, 11), asked, tmp_path / "ray", engine)
    long = make_prompt("math", [("user", "word " * 300)], answer="1", source="book")
    with pytest.raises(RequestError, match=r"\(book\) has \d+ tokens, and generation\.max_model_len is 256"):
        generate(Work(random_policy, settings(), 3, 11), [long], tmp_path / "other", NotedEngine(tmp_path / "n"))


def test_the_real_engine_on_two_nodes(cluster: Any, tmp_path: Path, random_policy: Path, oapl: Oapl) -> None:
    """The command line with and without a cluster: the same completions are asked for, and of the same seeds."""
    lines = [{"task": "math", "prompt": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(16)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["generate", "--policy", random_policy, "--prompts", tmp_path / "prompts.jsonl", "--samples", "4"]
    words += ["--max-tokens", "12", "--round", "2", "--seed", "5"]
    for change in ("dtype=float32", "max_model_len=128", "enforce_eager=true", "max_num_seqs=8"):
        words += ["--set", f"generation.{change}"]
    for engine in ("local", "ray"):
        done = oapl(*words, "--set", f"generation.engine={engine}", "--out", tmp_path / engine)
        assert done.returncode == 0, done.stderr
        assert "64 completions in 16 groups" in done.stdout
    assert f"generate: on Ray cluster at {cluster.address}, 2 nodes" in done.stderr
    ours, theirs = rows(tmp_path / "ray"), rows(tmp_path / "local")
    same = ["rollout_id", "prompt_id", "sample", "seed", "prompt_tokens", "round", "snapshot_id"]
    assert ours.select(same).equals(theirs.select(same))
    assert read_manifest(tmp_path / "ray").provenance.sampling == read_manifest(tmp_path / "local").provenance.sampling
    # In float32 batches of another composition change next to nothing.
    equal = (ours["completion_tokens"] == theirs["completion_tokens"]).sum()
    assert equal >= 60


def test_tensor_parallel_replicas_make_the_same(
    cluster: Any, tmp_path: Path, random_policy: Path, oapl: Oapl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One engine in one process, and one replica whose engine has its weights in two."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # a machine with one NUMA node has to be told
    lines = [{"task": "math", "prompt": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(4)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["generate", "--policy", random_policy, "--prompts", tmp_path / "prompts.jsonl", "--samples", "4"]
    for change in ("dtype=float32", "max_model_len=128", "enforce_eager=true", "max_num_seqs=8", "max_tokens=12"):
        words += ["--set", f"generation.{change}"]
    shared = [
        "--set",
        "generation.engine=ray",
        "--set",
        "generation.tensor_parallel=2",
        "--set",
        "generation.replicas=1",
    ]
    for name, more in {"alone": [], "shared": shared}.items():
        done = oapl(*words, *more, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    alone, both = rows(tmp_path / "alone"), rows(tmp_path / "shared")
    assert alone.drop("logprobs").equals(both.drop("logprobs"))
    gaps = (alone["logprobs"].explode() - both["logprobs"].explode()).abs()
    assert gaps.max() < 1e-4  # type: ignore[operator]
