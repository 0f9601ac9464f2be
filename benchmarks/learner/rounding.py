"""How much of what rounds learn is left in the snapshots: `python -m benchmarks.learner.rounding`.

A random bfloat16 policy learns rounds of 50 small steps, each from the snapshot before, as `oapl train` does. With
what the learner keeps beside a snapshot (float32 masters, or the adapters themselves), and with that folder deleted
between rounds, so that each round begins from the rounded weights, as it was before anything was kept. Lost:
|published - start - learned| / |learned|, where learned is the sum of what each round moved its float32 weights by.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.learner.parts import join_ranks, machine, random_policy, random_rollouts
from pipeline.policies import snapshots
from pipeline.policies.tensors import stored
from pipeline.recipe import ColdStart, Learning, Policy, Recipe
from pipeline.rollouts.locate import locate
from trainer import wholes
from trainer.learner import learn
from trainer.work import Round

SHAPE = ColdStart(vocabulary=300, hidden=256, layers=2, heads=8, kv_heads=4, head_dim=32, mlp=512)
STEPS = 50
WAYS: dict[str, dict[str, Any]] = {
    "adapters, r = 16, 1e-6": {"lora_rank": 16, "learning_rate": 1e-6},
    "adapters, r = 16, 1e-5": {"lora_rank": 16, "learning_rate": 1e-5},
    "whole weights, 1e-6, moments not kept": {"learning_rate": 1e-6, "keep_optimizer": False},
    "whole weights, 1e-6, moments kept": {"learning_rate": 1e-6},
}
Weights = dict[str, torch.Tensor]


def weights(folder: Path) -> Weights:
    return {name: wholes.as_tensor(tensor).double() for name, tensor in stored(folder).items()}


def masters(out: Path, snapshot_id: str, base: Weights, settings: Learning) -> Weights:
    """The float32 weights that a round learned: what was kept, or the base with the kept adapters."""
    kept = {
        name: wholes.as_tensor(tensor).double()
        for name, tensor in stored(out / snapshots.MOMENTS / snapshot_id, "master").items()
    }
    if not settings.lora_rank:
        return kept
    whole = dict(base)
    for name in kept:
        if ".lora_A." in name:
            path = name.partition(".lora_A.")[0]
            a, b = kept[name], kept[name.replace("lora_A", "lora_B")]
            whole[f"{path}.weight"] = base[f"{path}.weight"] + (b @ a) * (settings.lora_alpha / settings.lora_rank)
    return whole


def lost(folder: Path, policy: Path, rollouts: Path, way: dict[str, Any], rounds: int, keep: bool) -> float:
    """The share of `rounds` rounds' learning that the last snapshot lacks."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    settings = Learning(
        dtype="bfloat16", epochs=1, batch_size=2, behaviour="recomputed", micro_batch_tokens=4096,
        drop_uniform_groups=False, max_logprob_gap=100.0, beta1=1.0, beta2=0.01, **way,
    )  # fmt: skip
    recipe = Recipe(name="rounding", policy=Policy(model=str(policy)), learning=settings)
    start = {name: value.bfloat16().double() for name, value in weights(policy).items()}
    parent, before, base = policy, start, start
    learned = {name: torch.zeros_like(value) for name, value in start.items()}
    for number in range(rounds):
        work = Round(recipe, locate(rollouts), parent, out, out / "learning.jsonl", number)
        snapshot_id = learn(work)["snapshot_id"]
        after = masters(out, snapshot_id, base, settings)
        for name, value in after.items():
            learned[name] += value - before[name]
        parent = out / snapshot_id
        before = after if keep else weights(parent)
        base = base if keep else before
        if not keep:
            shutil.rmtree(out / snapshots.MOMENTS)
    published = weights(parent)
    missing = sum(float((published[n] - start[n] - learned[n]).square().sum()) for n in start)
    return (missing / sum(float(value.square().sum()) for value in learned.values())) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 8])
    counts = parser.parse_args().rounds
    join_ranks()
    torch.set_num_threads(1)
    print(f"{machine()}; {STEPS} steps a round")
    print(f"{'lost':40}" + "".join(f"{f'{n} rounds, before':>20}{'now':>8}" for n in counts))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = random_policy(folder / "policy", SHAPE, spread=0.02)
        random_rollouts(folder / "rollouts", policy, [24] * 2 * STEPS, 2)
        for title, way in WAYS.items():
            found = [lost(folder, policy, folder / "rollouts", way, n, keep) for n in counts for keep in (False, True)]
            print(
                f"{title:40}" + "".join(f"{value:{20 - 12 * (n % 2)}.1%}" for n, value in enumerate(found)), flush=True
            )


if __name__ == "__main__":
    main()
