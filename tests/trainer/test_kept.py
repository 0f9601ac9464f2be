"""What a round of learning leaves for the next one: nothing that it learned is rounded away on the way."""

from __future__ import annotations

import json
import math
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from learning_parts import Learned, Made, learn_in_processes, trainer_command, trainer_environment
from safetensors.torch import load_file

from pipeline.errors import RequestError
from pipeline.policies.snapshots import kept_record
from pipeline.recipe import Recipe
from pipeline.rollouts.locate import locate
from trainer import engine as engines
from trainer.kept import Kept, take_up
from trainer.sequence import ALONE
from trainer.work import Round
from trainer.writing import Survival

Learn = Callable[..., Learned]
Recipes = Callable[..., Recipe]
BRIEF: dict[str, Any] = {"epochs": 1, "max_logprob_gap": 9.0}


def kept(learned: Learned, key: str) -> dict[str, torch.Tensor]:
    return load_file(learned.out / ".optimizer" / learned.summary["snapshot_id"] / f"{key}.safetensors")


def copied(out: Path) -> Path:
    """A folder of snapshots as it is now, for a round that must not change it."""
    place = Path(tempfile.mkdtemp(dir=out.parent))
    return Path(shutil.copytree(out, place, dirs_exist_ok=True))


def learnable(dataset: Made) -> int:
    """Completions of groups that have variance."""
    groups = [[reward for _, reward in group] for group in dataset.groups()]
    return sum(len(rewards) for rewards in groups if len(set(rewards)) > 1)


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """|one - other|, over all weights."""
    return math.sqrt(sum((one[name].double() - value.double()).square().sum().item() for name, value in other.items()))


def test_the_share_that_is_lost_by_hand() -> None:
    survival = Survival()
    survival.add(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 1.0]), torch.tensor([3.0, 1.0]))
    survival.add(torch.tensor([2.0]), torch.tensor([6.0]), torch.tensor([5.5]))
    assert survival.update == 25.0  # 3^2 + 4^2
    assert survival.share_lost == pytest.approx(0.5 / 5.0)
    assert Survival().share_lost == 0.0


def test_a_snapshot_is_its_master_rounded_and_the_next_round_goes_on_from_the_master(
    learn_here: Learn, recipe: Recipes, dataset: Made, policy: Path
) -> None:
    """Steps far below bfloat16's resolution: from snapshot to snapshot nearly all of them would be lost."""
    small = recipe(dtype="bfloat16", learning_rate=2e-6, keep_optimizer=False, **BRIEF)
    rounds = [learn_here(dataset.place, small)]
    for number in (1, 2, 3):
        before = rounds[-1]
        rounds.append(learn_here(dataset.place, small, parent=before.snapshot, out=before.out, number=number))
    for learned in rounds[-2:]:
        for name, master in kept(learned, "master").items():
            assert torch.equal(master.bfloat16(), learned.weights()[name])
    start = {name: value.bfloat16().float() for name, value in load_file(policy / "model.safetensors").items()}
    lengths = [learned.summary["update_norm"] for learned in rounds]
    # Each round moves the master by what it measured, from where the last one left it.
    assert apart(kept(rounds[3], "master"), kept(rounds[2], "master")) == pytest.approx(lengths[3], rel=1e-4)
    assert apart(kept(rounds[3], "master"), start) > 2 * max(lengths)
    # What was published of the last round's update, from the files alone.
    lost = apart(kept(rounds[3], "master"), rounds[3].weights()) / lengths[3]
    assert rounds[3].summary["rounded_away"] == pytest.approx(lost, rel=1e-3)
    assert lost > 0.5
    alone = learn_here(dataset.place, small, parent=rounds[2].snapshot, number=3)  # the master is not there
    assert apart(kept(alone, "master"), kept(rounds[3], "master")) > 0.5 * lengths[3]


def test_float32_keeps_no_second_copy_and_loses_nothing(learn_here: Learn, recipe: Recipes, dataset: Made) -> None:
    learned = learn_here(dataset.place, recipe(**BRIEF))
    folder = learned.out / ".optimizer" / learned.summary["snapshot_id"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "exp_avg.safetensors", "exp_avg_sq.safetensors", "kept.json"
    ]  # fmt: skip
    assert learned.summary["rounded_away"] == 0.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_live_on(learn_here: Learn, recipe: Recipes, dataset: Made, dtype: str) -> None:
    """Two rounds of one epoch learn what one of two epochs does: the same adapters, with their moments."""
    size = learnable(dataset)
    settings = {"lora_rank": 2, "dtype": dtype, "batch_size": size, "learning_rate": 0.01, "max_logprob_gap": 9.0}
    in_one = learn_here(dataset.place, recipe(epochs=2, **settings))
    first = learn_here(dataset.place, recipe(epochs=1, **settings))
    second = learn_here(dataset.place, recipe(epochs=1, **settings), parent=first.snapshot, out=first.out, number=1)
    for name, value in kept(in_one, "master").items():
        torch.testing.assert_close(
            kept(second, "master")[name], value, rtol=0, atol=2e-6 if dtype == "float32" else 1e-4
        )
    assert apart(second.weights(), in_one.weights()) <= 0.02 * in_one.summary["update_norm"]
    # Where the base is gone, new adapters start from the snapshot, which holds the old ones.
    alone = learn_here(dataset.place, recipe(epochs=1, **settings), parent=first.snapshot, number=1)
    assert alone.log[0]["loss"] == pytest.approx(second.log[0]["loss"], rel=1e-4 if dtype == "float32" else 0.05)


def test_other_ranks_and_stages_take_it_up(
    learn_here: Learn, recipe: Recipes, dataset: Made, policy: Path, tmp_path: Path
) -> None:
    """A round on two ranks under ZeRO 2, then the next one on one rank, and on four under ZeRO 3: as on one alone."""
    size = learnable(dataset) // 4 * 4
    settings = {"batch_size": size, **BRIEF}

    def round_of(name: str, number: int, parent: Path, **more: Any) -> Round:
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        return Round(recipe(**settings, **more), locate(dataset.place), parent, out, out / "learning.jsonl", number)

    alone = learn_here(dataset.place, recipe(**settings))
    alone = learn_here(dataset.place, recipe(**settings), parent=alone.snapshot, out=alone.out, number=1)
    [two] = learn_in_processes(2, [round_of("shared", 0, policy, ranks=2, zero_stage=2)], tmp_path)
    shutil.copytree(two.out, tmp_path / "four")
    one = learn_here(dataset.place, recipe(**settings), parent=two.snapshot, out=two.out, number=1)
    (tmp_path / "store").unlink()
    parent = tmp_path / "four" / two.summary["snapshot_id"]
    [four] = learn_in_processes(4, [round_of("four", 1, parent, ranks=4, zero_stage=3)], tmp_path)
    for learned in (one, four):
        assert learned.summary["step"] == 2
        for name, value in alone.weights().items():
            torch.testing.assert_close(learned.weights()[name], value, rtol=0, atol=2e-5)
        for name, value in kept(alone, "exp_avg").items():
            torch.testing.assert_close(kept(learned, "exp_avg")[name], value, rtol=0, atol=1e-5)


def test_a_disk_that_refuses_is_told_by_all_ranks_and_nothing_is_published(
    recipe: Recipes, dataset: Made, policy: Path, tmp_path: Path
) -> None:
    """Rank 0 can't write; the others, which gather weights with it, neither hang nor are ended by a signal."""
    wanted = recipe(ranks=2, zero_stage=3, **BRIEF)
    command = trainer_command(wanted, dataset.place, policy, tmp_path / "out")
    limit = (policy / "model.safetensors").stat().st_size // 2
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env=trainer_environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        check=False,
    )
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith(f"oapl: {tmp_path / 'out'}: can't be written: "), ran.stderr[-2000:]
    assert not list((tmp_path / "out").glob("[0-9]*"))


def test_weights_that_transformers_renames_or_fuses_are_published_as_they_came(
    learn_here: Learn, recipe: Recipes, dataset: Made, policy: Path, tmp_path: Path
) -> None:
    """A mixture of experts: their matrices are one tensor in the model, and many in its files."""
    from transformers import AutoConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

    told = AutoConfig.from_pretrained(policy).to_dict()
    for name in ("model_type", "architectures"):
        told.pop(name)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**told, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16))
    for path in policy.iterdir():
        if path.name != "snapshot.json":
            shutil.copy(path, tmp_path)
    model.save_pretrained(tmp_path)
    learned = learn_here(dataset.place, recipe(**BRIEF), parent=tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    assert {name: value.shape for name, value in learned.weights().items()} == {n: v.shape for n, v in before.items()}
    assert sum("experts" in name for name in before) > 10
    assert not torch.equal(learned.weights()["model.layers.0.mlp.experts.0.gate_proj.weight"],
                           before["model.layers.0.mlp.experts.0.gate_proj.weight"])  # fmt: skip


def test_moments_of_an_earlier_version_are_taken_up_or_start_anew(
    learn_here: Learn,
    recipe: Recipes,
    dataset: Made,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They lie there as DeepSpeed's checkpoint, with a note of how the ranks shared them."""
    size = {"batch_size": learnable(dataset), **BRIEF}
    first = learn_here(dataset.place, recipe(**size))
    with_moments = learn_here(dataset.place, recipe(**size), parent=first.snapshot, out=first.out, number=1)
    folder = first.out / ".optimizer" / first.summary["snapshot_id"]
    monkeypatch.setenv("LOCAL_RANK", "0")
    engine = engines.start(recipe(**size), first.snapshot, dataset.temperature, ALONE)
    take_up(engine, Kept(folder, kept_record(folder), None), recipe(**size).learning)
    shutil.rmtree(folder)
    engines.save_state(engine, folder.parent, folder.name, recipe(**size).learning)
    engine.destroy()
    note = {"ranks": 1, "zero_stage": 0, "dtype": "float32"}
    for ranks in (1, 2):
        (folder / "sharing.json").write_text(json.dumps(note | {"ranks": ranks}), encoding="utf-8")
        again = learn_here(dataset.place, recipe(**size), parent=first.snapshot, out=copied(first.out), number=1)
        gone_on = apart(again.weights(), with_moments.weights())
        told = "moments of an earlier version" in capfd.readouterr().err
        assert (gone_on < 1e-5, told) == ((True, False) if ranks == 1 else (False, True))


def test_a_record_that_can_not_be_read_is_one_line(learn_here: Learn, recipe: Recipes, dataset: Made) -> None:
    first = learn_here(dataset.place, recipe(**BRIEF))
    record = first.out / ".optimizer" / first.summary["snapshot_id"] / "kept.json"
    record.write_text("{", encoding="utf-8")
    before = {path: path.read_bytes() for path in first.out.rglob("*") if path.is_file()}
    with pytest.raises(RequestError, match=r"kept\.json: not a record .* delete its folder"):
        learn_here(dataset.place, recipe(**BRIEF), parent=first.snapshot, out=first.out, number=1)
    assert {path: path.read_bytes() for path in first.out.rglob("*") if path.is_file()} == before
