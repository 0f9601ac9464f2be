"""What of a run's folder is sent to its URL, in which order, and what comes to another machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest
from faulty_proxy import FaultyProxy, asked_for
from rollout_data import write

from pipeline.layout import Run
from pipeline.policies import snapshots
from pipeline.rollouts.locate import locate
from pipeline.rollouts.store import iter_batches, read_manifest
from pipeline.runs.at_url import RemoteRun, runs_at
from pipeline.storage.objects import Objects


def fill(run: Run, policy: Path) -> None:
    """Round 0 as its steps leave it, and some of round 1; the rollouts are what `bring_rollouts` leaves."""
    shutil.copytree(policy, run.snapshot(policy.name), dirs_exist_ok=True)
    shutil.copytree(run.rollouts(0), run.dataset(0) / "rollouts")
    texts = {
        run.recipe: "rounds: 1",
        run.prompts: "all",
        run.round_prompts(0): "some",
        run.verdicts(0) / "math-1.parquet": "half",
        run.verdicts(0) / "scoring.json": "{}",
        run.verdicts(1) / "math-1.parquet": "half",
        run.evaluation(0): "pass@k",
        run.log("learn", 0): "said",
        run.stages(0): "{}",
        run.stages(1): "{}",
        run.stages(0).with_suffix(".rollouts.lock"): "",
        run.checkpoints(0) / "position.json": "{}",
        run.snapshots / ".optimizer" / policy.name / "moments.pt": "large",
        run.snapshots / ".optimizer" / policy.name / "sharing.json": "{}",
        run.snapshots / ".partial-1" / "model.safetensors": "half",
        run.summary: "{}",
    }
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def sent(bucket: str, proxy: FaultyProxy, random_policy: Path, tmp_path: Path) -> tuple[RemoteRun, list[str]]:
    """A run that one machine sent, and the names in the order in which they were put."""
    url = f"{bucket}/runs/mine"
    write(f"{url}/rollouts/round=0000", 6)  # type: ignore[arg-type]
    remote = RemoteRun(bucket, "mine")
    remote.bring_rollouts(0)
    assert len([row for batch in iter_batches(remote.run.rollouts(0), ["sample"]) for row in batch[0]]) == 24
    fill(remote.run, random_policy)
    puts = asked_for(proxy, "PUT")
    assert remote.send(0).files == len(puts) - 1  # and the mark of unfinished verdicts
    before = f"/{url.removeprefix('s3://')}/"
    return remote, [unquote(path).partition("?")[0].removeprefix(before) for path in puts]


def test_data_is_sent_before_what_says_that_it_exists(sent: tuple[RemoteRun, list[str]], random_policy: Path) -> None:
    remote, names = sent
    place = {name: number for number, name in enumerate(names)}
    snapshot, moments = (f"snapshots/{part}{random_policy.name}" for part in ("", ".optimizer/"))
    for data, record in (
        (f"{snapshot}/model.safetensors", f"{snapshot}/snapshot.json"),
        ("verdicts/round=0000/.unfinished.json", "verdicts/round=0000/math-1.parquet"),
        ("verdicts/round=0000/math-1.parquet", "verdicts/round=0000/scoring.json"),
        (f"{moments}/moments.pt", f"{moments}/sharing.json"),
        (f"{snapshot}/snapshot.json", "stages/round=0000.json"),
        ("evaluations/round=0000.parquet", "stages/round=0000.json"),
        ("stages/round=0000.json", "report/summary.json"),
    ):
        assert place[data] < place[record], record
    assert not [name for name in names if name.startswith(("rollouts/", "checkpoints/")) or ".partial" in name]
    assert not [name for name in names if "round=0001" in name or name.endswith(".lock")]
    store = Objects(remote.url)
    for shard in read_manifest(remote.run.rollouts(0)).shards:
        exported = store.read(f"datasets/round=0000/rollouts/{shard.file}")
        assert exported == store.read(f"rollouts/round=0000/{shard.file}")
    assert remote.send().files == 1  # the other round's record; half of its verdicts stay here
    assert store.names("verdicts/round=0001") == []


def test_another_machine_gets_what_it_needs_when_it_needs_it(
    sent: tuple[RemoteRun, list[str]], random_policy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, _ = sent
    monkeypatch.setenv("OAPL_CACHE", str(tmp_path / "another"))
    assert runs_at(first.root) == ["mine"]
    remote = RemoteRun(first.root, "mine")
    run = remote.run
    assert run.path != first.run.path and not run.recipe.exists()
    remote.bring()
    here = {path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file()}
    assert {name for name in here if "/." not in f"/{name}"} == {
        "recipe.yaml",
        "prompts.parquet",
        "evaluations/round=0000.parquet",
        "stages/round=0000.json",
        "verdicts/round=0000/scoring.json",
        "rollouts/round=0000/manifest.json",
        "rollouts/round=0000/origin.json",
        f"snapshots/{random_policy.name}/snapshot.json",
    }
    remote.bring([0])
    assert (
        (run.verdicts(0) / "math-1.parquet").exists() and run.round_prompts(0).exists() and run.log("learn", 0).exists()
    )
    assert snapshots.verify(remote.bring_snapshot(random_policy.name)) == snapshots.load_record(random_policy)
    remote.bring_kept(random_policy.name)
    assert (run.snapshots / ".optimizer" / random_policy.name / "moments.pt").read_text() == "large"
    assert len([row for batch in iter_batches(run.rollouts(0), ["sample"]) for row in batch[0]]) == 24
    assert locate(run.path, 0).rollouts == run.rollouts(0)
    assert remote.send().files == 0
    run.stages(0).write_text(json.dumps({"learn": {}}))
    assert remote.send(0).files == 1
    first.bring()
    assert json.loads(first.run.stages(0).read_text()) == {"learn": {}}
