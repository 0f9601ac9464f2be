"""A round that is killed goes on from its checkpoint and ends at the same weights, bit by bit."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from learning_parts import Learned, Made, folder_hash, trainer_environment, with_seed

from pipeline.layout import Run
from pipeline.recipe import Recipe
from pipeline.rollouts.locate import locate
from trainer import checkpoints
from trainer.work import Round

Learn = Callable[..., Learned]
Recipes = Callable[..., Recipe]

KILLS = 20
MEASURED = ("seconds", "tokens_per_second", "tokens_per_second_per_rank", "mfu", "peak_resident_gib")
"""What of a step no two runs have alike."""

# A process that has imported everything forks one child a try; the child learns and is killed at a random moment.
DRIVER = """
import dataclasses, json, os, pickle, random, signal, sys, time
from pathlib import Path
import deepspeed, torch, torch.distributed as dist
torch.set_num_threads(1)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
from trainer.learner import learn
import transformers.models.qwen3.modeling_qwen3

work, kills, folder = pickle.loads(Path(sys.argv[1]).read_bytes()), int(sys.argv[2]), Path(sys.argv[3])

def start(work):
    child = os.fork()
    if child:
        return child
    try:
        work.out.mkdir(parents=True, exist_ok=True)
        store = f"file://{work.out}/.store-{os.getpid()}"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        os.environ["LOCAL_RANK"] = "0"
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
        learn(work)
        os._exit(0)
    finally:
        os._exit(1)

def fresh(number):
    out = folder / str(number)
    return dataclasses.replace(work, out=out, log=out / "learning.jsonl")

begun = time.monotonic()
assert os.waitpid(start(fresh(0)), 0)[1] == 0
whole = time.monotonic() - begun
rng, killed, number, report = random.Random(7), 0, 1, []
while killed < kills or not report:
    again = True
    while again:
        child = start(fresh(number))
        if killed < kills:
            time.sleep(rng.uniform(0.2, 1.0) * whole)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        again = os.WIFSIGNALED(status)
        killed += again
        assert again or status == 0
    report.append(number)
    number += 1
print(json.dumps({"killed": killed, "finished": report}))
"""


def test_twenty_kills_change_no_bit(recipe: Recipes, dataset: Made, policy: Path, tmp_path: Path) -> None:
    settings = recipe(checkpoint_every=2, epochs=6, zero_stage=0)
    work = Round(settings, locate(dataset.place), policy, tmp_path / "out", tmp_path / "log.jsonl", 0)
    (tmp_path / "work").write_bytes(pickle.dumps(work))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path / "work"), str(KILLS), str(tmp_path)],
        capture_output=True, text=True, timeout=240, env=trainer_environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["killed"] >= KILLS and report["finished"]
    undisturbed, log = published(tmp_path / "0")
    resumed = []
    for number in report["finished"]:
        weights, other = published(tmp_path / str(number))
        assert weights == undisturbed
        assert [without_times(line) for line in other] == [without_times(line) for line in log]
        resumed.append(json.loads((tmp_path / str(number) / "learning.json").read_bytes())["resumed_at"])
        assert not (tmp_path / str(number) / ".checkpoints").exists()
    assert any(resumed), "no kill came between two checkpoints"


def published(out: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    summary = json.loads((out / "learning.json").read_bytes())
    log = [json.loads(line) for line in (out / "learning.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(list(out.glob("[!.]*/snapshot.json"))) == 1
    return folder_hash(out / summary["snapshot_id"]), log


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in MEASURED}


class Stop(Exception):
    """Stands for the end of a process, where the test goes on in it."""


@pytest.fixture
def stopped_at(learn_here: Learn, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Learns until the checkpoint of step `steps` is written, and no further."""

    def run(steps: int, *arguments: Any, **more: Any) -> None:
        save = checkpoints.save

        def save_and_stop(*words: Any) -> None:
            save(*words)
            if words[3]["steps"] == steps:
                raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "save", save_and_stop)
            with pytest.raises(Stop):
                learn_here(*arguments, **more)

    return run


@pytest.mark.parametrize(
    "settings", [{"zero_stage": 2, "dtype": "bfloat16"}, {"lora_rank": 2}, {"behaviour": "recomputed"}], ids=str
)
def test_going_on_under_other_settings(
    settings: dict[str, Any], learn_here: Learn, stopped_at: Any, recipe: Recipes, dataset: Made, tmp_path: Path
) -> None:
    """Master weights, adapters and recomputed log-probabilities come back as they were, too."""
    wanted = recipe(checkpoint_every=2, **settings)
    whole = learn_here(dataset.place, wanted)
    stopped_at(4, dataset.place, wanted, out=tmp_path)
    resumed = learn_here(dataset.place, wanted, out=tmp_path)
    assert resumed.summary["resumed_at"] == 4 and whole.summary["resumed_at"] is None
    assert resumed.summary["snapshot_id"] == whole.summary["snapshot_id"]
    assert resumed.summary["logprob_gap"] == whole.summary["logprob_gap"]


def test_a_lagging_round_goes_on(
    learn_here: Learn, stopped_at: Any, recipe: Recipes, dataset: Made, policy: Path, tmp_path: Path
) -> None:
    parent = learn_here(dataset.place, recipe(epochs=1), out=tmp_path / "parent").snapshot
    wanted, more = recipe(checkpoint_every=2), {"parent": parent, "behaviour": policy, "number": 1}
    whole = learn_here(dataset.place, wanted, **more)
    stopped_at(2, dataset.place, wanted, out=tmp_path / "out", **more)
    resumed = learn_here(dataset.place, wanted, out=tmp_path / "out", **more)
    assert resumed.summary["resumed_at"] == 5  # three of the parent's, two of its own
    assert resumed.summary["snapshot_id"] == whole.summary["snapshot_id"]
    assert resumed.summary["logprob_gap"] == whole.summary["logprob_gap"]


def test_another_request_starts_anew(
    learn_here: Learn, stopped_at: Any, recipe: Recipes, dataset: Made, tmp_path: Path
) -> None:
    stopped_at(2, dataset.place, recipe(checkpoint_every=2), out=tmp_path)
    other = learn_here(dataset.place, recipe(checkpoint_every=2, beta2=0.06), out=tmp_path)
    assert other.summary["resumed_at"] is None
    assert other.summary["snapshot_id"] == learn_here(dataset.place, recipe(beta2=0.06)).summary["snapshot_id"]
    seeded = with_seed(recipe(checkpoint_every=2), 5)
    stopped_at(2, dataset.place, recipe(checkpoint_every=2), out=tmp_path)
    assert learn_here(dataset.place, seeded, out=tmp_path).summary["resumed_at"] is None


def test_a_checkpoint_half_written_does_not_exist(
    learn_here: Learn, stopped_at: Any, recipe: Recipes, dataset: Made, tmp_path: Path
) -> None:
    """What position.json does not name is ignored, and gone when the round is done; disk use stays at one."""
    wanted = recipe(checkpoint_every=2)
    stopped_at(4, dataset.place, wanted, out=tmp_path)
    folder = tmp_path / ".checkpoints"
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["step-000004"]
    shutil.copytree(folder / "step-000004", folder / "step-000006")
    for path in (folder / "step-000006").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    resumed = learn_here(dataset.place, wanted, out=tmp_path)
    assert resumed.summary["resumed_at"] == 4
    assert resumed.summary["snapshot_id"] == learn_here(dataset.place, recipe()).summary["snapshot_id"]
    assert not folder.exists()


def test_a_run_keeps_checkpoints_in_its_place(
    learn_here: Learn, stopped_at: Any, recipe: Recipes, policy: Path, float64: Any, tmp_path: Path
) -> None:
    from learning_parts import write_round

    run = Run(tmp_path, "small")
    write_round(run, 0, policy, float64)
    stopped_at(2, run.path, recipe(checkpoint_every=2), out=run.snapshots)
    assert (run.checkpoints(0) / "position.json").is_file()
    assert learn_here(run.path, recipe(checkpoint_every=2), out=run.snapshots).summary["resumed_at"] == 2
    assert not run.checkpoints(0).exists()
